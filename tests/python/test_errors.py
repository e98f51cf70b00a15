"""One test for each check of the arguments of decodes and plans: the exception and its text. Nothing is written on an error."""

from __future__ import annotations

import math
import re

import numpy
import pytest
import torch
from reference import Case, make_inputs
from tensors import bf16, int32, spread

import flash_mla
from flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

B, S_Q, H_Q = 2, 2, 16


def arguments(device: str) -> dict:
    inputs = make_inputs(Case(b=B, s_q=S_Q, h_q=H_Q, s_kv=100, varlen=False), device)
    return {
        "q": inputs.q,
        "k_cache": inputs.k_cache,
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "causal": True,
    }


# name: (what replaces the good arguments, exception, text)
DECODE_ERRORS = {
    "q None": (lambda a: {"q": None}, TypeError, "q is None, wanted a torch.Tensor"),
    "q list": (lambda a: {"q": [1]}, TypeError, "q is list, wanted a torch.Tensor"),
    "q rank": (
        lambda a: {"q": a["q"][0]},
        ValueError,
        "decode: q.rank = 3, wanted 4: [b, s_q, h_q, d_qk]",
    ),
    "q dtype": (
        lambda a: {"q": a["q"].int()},
        TypeError,
        "q.dtype = int32, wanted bf16, fp16 or fp32",
    ),
    "q float64": (
        lambda a: {"q": a["q"].double()},
        TypeError,
        "q.dtype = float64, which no argument takes",
    ),
    "q d_qk": (
        lambda a: {"q": a["q"][..., :512]},
        ValueError,
        "q.shape[3] (d_qk) = 512, this build supports {576}",
    ),
    "q stride": (lambda a: {"q": spread(a["q"])}, ValueError, "q.stride[3] (d_qk) = 2, wanted 1"),
    "k_cache None": (
        lambda a: {"k_cache": None},
        TypeError,
        "k_cache is None, wanted a torch.Tensor",
    ),
    "k_cache rank": (
        lambda a: {"k_cache": a["k_cache"][:, :, 0]},
        ValueError,
        "kv_cache.rank = 3, wanted 4",
    ),
    "k_cache dtype": (
        lambda a: {"k_cache": a["k_cache"].half()},
        TypeError,
        "kv_cache.dtype = fp16, wanted bf16 as q",
    ),
    "k_cache fp8": (
        lambda a: {"k_cache": a["k_cache"].to(torch.float8_e4m3fn)},
        NotImplementedError,
        "kv_cache.dtype = fp8_e4m3, not supported by this build",
    ),
    "k_cache d_qk": (
        lambda a: {"k_cache": a["k_cache"][..., :512]},
        ValueError,
        "kv_cache.shape[3] (d_qk) = 512, this build supports {576}",
    ),
    "k_cache stride": (
        lambda a: {"k_cache": spread(a["k_cache"])},
        ValueError,
        "kv_cache.stride[3] (d_qk) = 2, wanted 1",
    ),
    "page_size 257": (
        lambda a: {"k_cache": bf16(1, 257, 1, 576, device=a["q"].device)},
        ValueError,
        "kv_cache.shape[1] (page_size) = 257, wanted 1 .. 256",
    ),
    "page_size 0": (
        lambda a: {"k_cache": bf16(1, 0, 1, 576, device=a["q"].device)},
        ValueError,
        "kv_cache.shape[1] (page_size) = 0, wanted 1 .. 256",
    ),
    "h_kv": (
        lambda a: {"k_cache": bf16(4, 64, 3, 576, device=a["q"].device)},
        ValueError,
        "q.shape[2] (h_q) = 16, wanted a multiple of kv_cache.shape[2] (h_kv) = 3",
    ),
    "block_table None": (lambda a: {"block_table": None}, TypeError, "block_table is None"),
    "block_table rank": (
        lambda a: {"block_table": a["block_table"][0]},
        ValueError,
        "block_table.rank = 1, wanted 2: [b, max_pages]",
    ),
    "block_table dtype": (
        lambda a: {"block_table": a["block_table"].long()},
        TypeError,
        "block_table.dtype = int64, wanted int32",
    ),
    "block_table b": (
        lambda a: {"block_table": a["block_table"][:1]},
        ValueError,
        "block_table.shape[0] (b) = 1, wanted 2 as q",
    ),
    "block_table stride": (
        lambda a: {"block_table": spread(a["block_table"])},
        ValueError,
        "block_table.stride[1] (max_pages) = 2, wanted 1",
    ),
    "cache_seqlens None": (lambda a: {"cache_seqlens": None}, TypeError, "cache_seqlens is None"),
    "cache_seqlens rank": (
        lambda a: {"cache_seqlens": a["cache_seqlens"][None]},
        ValueError,
        "cache_seqlens.rank = 2, wanted 1: [b]",
    ),
    "cache_seqlens dtype": (
        lambda a: {"cache_seqlens": a["cache_seqlens"].long()},
        TypeError,
        "cache_seqlens.dtype = int64, wanted int32",
    ),
    "cache_seqlens b": (
        lambda a: {"cache_seqlens": a["cache_seqlens"][:1]},
        ValueError,
        "cache_seqlens.shape[0] (b) = 1, wanted 2 as q",
    ),
    "cache_seqlens stride": (
        lambda a: {"cache_seqlens": spread(a["cache_seqlens"])},
        ValueError,
        "cache_seqlens.stride[0] (b) = 2, wanted 1",
    ),
    "head_dim_v": (
        lambda a: {"head_dim_v": 256},
        ValueError,
        "head_dim_v = 256, this build supports {512}",
    ),
    "metadata type": (
        lambda a: {"tile_scheduler_metadata": "x"},
        TypeError,
        "tile_scheduler_metadata is str, wanted what get_mla_metadata returned first",
    ),
    "metadata rank": (
        lambda a: {"tile_scheduler_metadata": int32(8, device=a["q"].device)},
        ValueError,
        "plan.metadata.rank = 1, wanted 2",
    ),
    "metadata columns": (
        lambda a: {"tile_scheduler_metadata": int32(1, 7, device=a["q"].device)},
        ValueError,
        "plan.metadata.shape[1] (8) = 7, wanted 8",
    ),
    "metadata empty": (
        lambda a: {"tile_scheduler_metadata": int32(0, 8, device=a["q"].device)},
        ValueError,
        "plan.metadata.shape[0] (num_parts) = 0, wanted 1 or more",
    ),
    "metadata dtype": (
        lambda a: {"tile_scheduler_metadata": int32(1, 8, device=a["q"].device).float()},
        TypeError,
        "plan.metadata.dtype = fp32, wanted int32",
    ),
    "num_splits shape": (
        lambda a: {
            "tile_scheduler_metadata": int32(1, 8, device=a["q"].device),
            "num_splits": int32(7, device=a["q"].device),
        },
        ValueError,
        "plan.num_splits.shape[0] (b + 1) = 7, wanted 3",
    ),
    "num_splits dtype": (
        lambda a: {
            "tile_scheduler_metadata": int32(1, 8, device=a["q"].device),
            "num_splits": int32(3, device=a["q"].device).long(),
        },
        TypeError,
        "plan.num_splits.dtype = int64, wanted int32",
    ),
    "num_splits type": (
        lambda a: {"tile_scheduler_metadata": int32(1, 8, device=a["q"].device), "num_splits": 3},
        TypeError,
        "num_splits is int, wanted a torch.Tensor",
    ),
    "num_splits alone": (
        lambda a: {"num_splits": int32(3, device=a["q"].device)},
        ValueError,
        "num_splits was given without tile_scheduler_metadata",
    ),
    "num_splits beside the object": (
        lambda a: {
            "tile_scheduler_metadata": FlashMLASchedMeta(),
            "num_splits": int32(3, device=a["q"].device),
        },
        ValueError,
        "num_splits was given beside a FlashMLASchedMeta",
    ),
    "softmax_scale bool": (
        lambda a: {"softmax_scale": True},
        TypeError,
        "softmax_scale is the bool True, wanted a finite number; old examples pass causal by position there",
    ),
    "softmax_scale text": (
        lambda a: {"softmax_scale": "1"},
        TypeError,
        "softmax_scale is str, wanted a finite number",
    ),
    "softmax_scale nan": (
        lambda a: {"softmax_scale": math.nan},
        ValueError,
        "softmax_scale = nan, wanted a finite number",
    ),
    "softmax_scale inf": (
        lambda a: {"softmax_scale": -math.inf},
        ValueError,
        "softmax_scale = -inf, wanted a finite number",
    ),
    "softmax_scale large": (
        lambda a: {"softmax_scale": 1e39},
        ValueError,
        "softmax_scale = 1e+39, wanted a finite 32-bit float",
    ),
    "causal": (lambda a: {"causal": 1}, TypeError, "causal is int, wanted a bool"),
    "out type": (lambda a: {"out": 3}, TypeError, "out is int, wanted a torch.Tensor"),
    "out shape": (
        lambda a: {"out": bf16(B, S_Q, H_Q, 576, device=a["q"].device)},
        ValueError,
        "out.shape[3] (d_v) = 576, this build supports {512}",
    ),
    "out dtype": (
        lambda a: {"out": bf16(B, S_Q, H_Q, 512, device=a["q"].device).float()},
        TypeError,
        "out.dtype = fp32, wanted bf16 as q",
    ),
    "out stride": (
        lambda a: {"out": spread(bf16(B, S_Q, H_Q, 512, device=a["q"].device))},
        ValueError,
        "out.stride[3] (d_v) = 2, wanted 1",
    ),
    "out overlap": (
        lambda a: {"out": bf16(1, S_Q, H_Q, 512, device=a["q"].device).expand(B, -1, -1, -1)},
        ValueError,
        "out.stride[0] (b) = 0, wanted more than 0: elements overlap",
    ),
    "lse type": (lambda a: {"lse": "x"}, TypeError, "lse is str, wanted a torch.Tensor"),
    "lse shape": (
        lambda a: {"lse": torch.zeros((B, S_Q, H_Q), dtype=torch.float32, device=a["q"].device)},
        ValueError,
        "lse.shape[1] (h_q) = 2, wanted 16 as q",
    ),
    "lse dtype": (
        lambda a: {"lse": bf16(B, H_Q, S_Q, device=a["q"].device)},
        TypeError,
        "lse.dtype = bf16, wanted fp32",
    ),
    "is_fp8_kvcache": (
        lambda a: {"is_fp8_kvcache": True},
        NotImplementedError,
        "is_fp8_kvcache=True is not supported yet",
    ),
    "kv_format": (
        lambda a: {"kv_format": "V32"},
        NotImplementedError,
        "kv_format=V32 is not supported yet",
    ),
}
for _name in (
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
    "descale_q",
    "descale_k",
):
    DECODE_ERRORS[_name] = (
        lambda a, name=_name: {name: torch.zeros(1)},
        NotImplementedError,
        f"flash_mla_with_kvcache: {_name} is not supported yet",
    )


@pytest.mark.parametrize("name", DECODE_ERRORS)
def test_decode(device: str, name: str) -> None:
    replace, exception, text = DECODE_ERRORS[name]
    good = arguments(device)
    out = torch.full((B, S_Q, H_Q, 512), 7.0, dtype=torch.bfloat16, device=device)
    lse = torch.full((B, H_Q, S_Q), 7.0, dtype=torch.float32, device=device)
    changed = {"out": out, "lse": lse, **replace(good)}
    with pytest.raises(exception, match=re.escape(text)):
        flash_mla_with_kvcache(**{**good, **changed})
    assert (out == 7.0).all() and (lse == 7.0).all()


CPU_VALUES = {
    "length above the table": (
        {"cache_seqlens": int32(B, fill=9999)},
        "cache_seqlens[0] = 9999, wanted 0 .. 256 (max_pages * page_size)",
    ),
    "length below 0": (
        {"cache_seqlens": int32(B, fill=-1)},
        "cache_seqlens[0] = -1, wanted 0 .. 256",
    ),
    "page above": (
        {"block_table": int32(B, 4, fill=7)},
        "block_table[0, 0] = 7, wanted 0 .. num_pages - 1 = 6",
    ),
    "page below 0": (
        {"block_table": int32(B, 4, fill=-1)},
        "block_table[0, 0] = -1, wanted 0 .. num_pages - 1",
    ),
}


@pytest.mark.parametrize("name", CPU_VALUES)
def test_values_on_the_cpu(name: str) -> None:
    changed, text = CPU_VALUES[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        flash_mla_with_kvcache(**{**arguments("cpu"), **changed})


def test_sparse_calls_may_lack_tables(device: str) -> None:
    """block_table and cache_seqlens may be None with indices; what is missing is named all the same."""
    with pytest.raises(NotImplementedError, match="indices is not supported yet"):
        flash_mla_with_kvcache(
            **{
                **arguments(device),
                "block_table": None,
                "cache_seqlens": None,
                "indices": int32(2, 2, 64),
            }
        )


@pytest.mark.cuda
def test_gpu_page_size() -> None:
    with pytest.raises(
        NotImplementedError, match=re.escape("(page_size) = 32, this build supports {64}")
    ):
        flash_mla_with_kvcache(
            **{**arguments("cuda"), "k_cache": bf16(8, 32, 1, 576, device="cuda")}
        )


@pytest.mark.cuda
def test_gpu_fp32() -> None:
    good = arguments("cuda")
    with pytest.raises(NotImplementedError, match="fp32"):
        flash_mla_with_kvcache(
            **{**good, "q": good["q"].float(), "k_cache": good["k_cache"].float()}
        )


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["q", "k_cache", "block_table", "cache_seqlens"])
def test_gpu_tensors_on_two_devices(name: str) -> None:
    good = arguments("cuda")
    with pytest.raises(ValueError, match="device = "):
        flash_mla_with_kvcache(**{**good, name: good[name].cpu()})


@pytest.mark.cuda
def test_gpu_cache_alignment() -> None:
    good = arguments("cuda")
    wide = bf16(7, 64, 1, 580, device="cuda")
    with pytest.raises(ValueError, match="kv_cache"):
        flash_mla_with_kvcache(**{**good, "k_cache": wide[..., :576]})


METADATA_ERRORS = {
    "missing": (lambda n: (n,), TypeError, "num_q_tokens_per_head_k is NoneType, wanted an int"),
    "text": (lambda n: (n, "x", 1), TypeError, "num_q_tokens_per_head_k is str, wanted an int"),
    "no kv head": (lambda n: (n, 16, 0), ValueError, "num_heads_k = 0, wanted 1 or more"),
    "huge": (lambda n: (n, 2**20, 2**20), ValueError, "wanted less than 2 ** 31"),
    "not a tensor": (lambda n: ([1], 16, 1), TypeError, "get_mla_metadata: cache_seqlens is list"),
    "dtype": (lambda n: (n.long(), 16, 1), TypeError, "cache_seqlens.dtype = int64, wanted int32"),
    "rank": (lambda n: (n[None], 16, 1), ValueError, "cache_seqlens.rank = 2, wanted 1"),
    "fp8": (
        lambda n: (n, 16, 1, None, True),
        NotImplementedError,
        "is_fp8_kvcache=True is not supported yet",
    ),
    "topk": (
        lambda n: (n, 16, 1, 16, False, 2048),
        NotImplementedError,
        "topk is not supported yet",
    ),
    "too many": (lambda n: (n, 16, 1, 16, False, None, 1), TypeError, "get_mla_metadata() takes"),
}


@pytest.mark.parametrize("name", METADATA_ERRORS)
def test_metadata(device: str, name: str) -> None:
    make, exception, text = METADATA_ERRORS[name]
    with pytest.raises(exception, match=re.escape(text)):
        get_mla_metadata(*make(int32(2, device=device)))


def test_numbers_of_numpy() -> None:
    good = arguments("cpu")
    metadata, num_splits = get_mla_metadata(
        good["cache_seqlens"], numpy.int64(S_Q * H_Q), numpy.int32(1)
    )
    given = {**good, "tile_scheduler_metadata": metadata, "num_splits": num_splits}
    wanted = flash_mla_with_kvcache(**good)
    got = flash_mla_with_kvcache(
        **{**given, "causal": numpy.bool_(True), "softmax_scale": numpy.float64(576**-0.5)}
    )
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_metadata_names() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        get_mla_metadata(int32(2), 16, 1, heads=3)
    with pytest.raises(
        TypeError, match="num_heads_per_head_k is the old name of num_q_tokens_per_head_k"
    ):
        get_mla_metadata(int32(2), 16, 1, num_heads_per_head_k=16)


@pytest.mark.parametrize(
    "name",
    [
        "flash_mla_sparse_fwd",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
        "fused_norm_rope_attn_rope_cast",
    ],
)
def test_published_names_that_come_later(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: .* not supported yet"):
        getattr(flash_mla, name)(*[None] * 4)


@pytest.mark.cuda
def test_a_failed_call_does_not_poison_the_next() -> None:
    good = arguments("cuda")
    for name in ("q rank", "metadata columns", "lse dtype"):
        replace, exception, _ = DECODE_ERRORS[name]
        with pytest.raises(exception):
            flash_mla_with_kvcache(**{**good, **replace(good)})
    flash_mla_with_kvcache(**good)
    torch.cuda.synchronize()
