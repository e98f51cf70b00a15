"""The drop-in: decoding with a paged latent cache under the names and signatures that callers of the field use."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy
import torch

from . import _errors, _library
from . import metadata as _metadata
from .metadata import FlashMLASchedMeta, get_mla_decoding_metadata, get_mla_metadata
from .unsupported import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    has_legacy,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "has_legacy",
]

_FUNCTION = "flash_mla_with_kvcache"
_D_V = 512
_DEFAULT_SCALE = 576**-0.5

_decode = torch.ops.flash_mla.decode.default
_decode_out = torch.ops.flash_mla.decode_out.default
_fast_decode = _library.fast_decode()
_is_compiling = torch.compiler.is_compiling


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor | None,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    enable_batch_invariant: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    kv_format: str | None = None,
    use_legacy: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    validate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each request's s_q * h_q query rows against its paged latent cache.

        out[i] = sum_j softmax_j(softmax_scale * <q[i], k[j]>) * k[j][:512]
        lse[i] = ln sum_j exp(softmax_scale * <q[i], k[j]>)

    where k[j] is the 576-wide row (512 latent, 64 RoPE) of token j. Source of the method: the
    absorbed form of multi-head latent attention, DeepSeek-V2, arXiv:2405.04434, section 2.1.

    Args:
        q: (b, s_q, h_q, 576) bfloat16 or float16, on the CPU float32 too; last axis contiguous. On
            a GPU, a q whose rows do not start at multiples of 16 bytes is copied first.
        k_cache: (num_pages, page_size, h_kv, 576), dtype of q; last axis contiguous. On a GPU
            page_size is 64 and base and other strides are multiples of 16 bytes; on the CPU
            page_size is 1 to 256. h_q is a multiple of h_kv.
        block_table: (b, max_pages) int32, page numbers; entries past a request's length are never
            read.
        cache_seqlens: (b,) int32, tokens of each request; 0 is legal.
        head_dim_v: 512.
        tile_scheduler_metadata: what `get_mla_metadata` returned first. A hint: a plan for other
            lengths never gives a wrong result. One row means that no request is split. None is
            legal.
        num_splits: what `get_mla_metadata` returned second, or None.
        softmax_scale: a finite number; 576 ** -0.5 when None.
        causal: bottom-right aligned: query i of s_q sees keys 0 .. cache_seqlens - s_q + i,
            inclusive.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
            extra_topk_length, descale_q, descale_k, kv_format: for fp8 caches and sparse attention,
            not supported yet.
        enable_batch_invariant: never split a request, so that its result does not depend on the
            rest of the batch.
        use_legacy: changes nothing.
        out, lse: tensors to write into, with the shapes and dtypes below; the last axis of out is
            contiguous.
        validate: check lengths and page numbers on the device first. Synchronises; refused under
            CUDA-graph capture. On the CPU they are always checked.

    Returns:
        out (b, s_q, h_q, 512) in q's dtype, and lse (b, h_q, s_q) float32, natural logarithm. A row
        that sees no key gets out 0 and lse +inf.

    Runs in the current stream of q's device, without synchronising, and may be captured in a CUDA
    graph and replayed with other lengths, tables and contents. CPU tensors are decoded on the CPU.

    The operator is `torch.ops.flash_mla.decode`, and what compiles, traces, profiles or intercepts
    operators sees it. Where nothing does, a call goes past PyTorch's dispatcher, to the same effect.

    Raises:
        ValueError: a shape, stride, alignment, range or device is wrong. Nothing was written; this
            holds for all errors.
        TypeError: an argument or a dtype has the wrong type.
        NotImplementedError: a feature that this build does not have.
        RuntimeError: no backend for the device, or CUDA failed.
    """
    if (
        is_fp8_kvcache
        or indices is not None
        or attn_sink is not None
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
        or descale_q is not None
        or descale_k is not None
        or kv_format is not None
    ):
        _refuse(
            indices=indices,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
            descale_q=descale_q,
            descale_k=descale_k,
            kv_format=kv_format,
            is_fp8_kvcache=is_fp8_kvcache,
        )
    if head_dim_v != _D_V:
        raise ValueError(f"{_FUNCTION}: head_dim_v = {head_dim_v}, this build supports {{{_D_V}}}")
    if softmax_scale is None:
        softmax_scale = _DEFAULT_SCALE
    elif type(softmax_scale) is not float or not math.isfinite(softmax_scale):
        softmax_scale = _checked_scale(softmax_scale)
    if type(causal) is not bool:
        causal = _checked_causal(causal)

    plan, splits, is_first_call = _metadata.tensors_of(
        _FUNCTION, tile_scheduler_metadata, num_splits
    )
    try:
        if out is None and lse is None:
            # PyTorch's dispatcher costs more than all the rest of a call on the host, so it is left
            # out where it has nothing to do. The eager function finds that out, and answers None
            # where the operator has to be asked: for its arguments, the modes in force, any error.
            results = None
            if not _is_compiling() and _fast_decode is not None and not validate:
                results = _fast_decode(
                    q, k_cache, block_table, cache_seqlens, softmax_scale, causal, plan, splits,
                    bool(enable_batch_invariant),
                )  # fmt: skip
            out, lse = results or _decode(
                q, k_cache, block_table, cache_seqlens, softmax_scale, causal, plan, splits,
                bool(enable_batch_invariant), bool(validate),
            )  # fmt: skip
        else:
            if out is None or lse is None:
                out, lse = _allocate_missing(q, out, lse)
            _decode_out(
                q, k_cache, block_table, cache_seqlens, softmax_scale, causal, plan, splits,
                bool(enable_batch_invariant), bool(validate), out, lse,
            )  # fmt: skip
    except RuntimeError as error:
        tensors = {
            "q": q,
            "k_cache": k_cache,
            "block_table": block_table,
            "cache_seqlens": cache_seqlens,
        }
        optional = {"tile_scheduler_metadata": plan, "num_splits": splits, "out": out, "lse": lse}
        tensors.update((name, value) for name, value in optional.items() if value is not None)
        _errors.raise_translated(error, _FUNCTION, **tensors)
    if is_first_call:
        _metadata.initialize(_FUNCTION, tile_scheduler_metadata, q, k_cache, cache_seqlens, causal)
    return out, lse


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise _errors.unsupported(
                _FUNCTION, f"{name}={value}" if isinstance(value, (bool, str)) else name
            )


def _checked_causal(value: Any) -> bool:
    if isinstance(value, numpy.bool_):
        return bool(value)
    raise TypeError(f"{_FUNCTION}: causal is {type(value).__name__}, wanted a bool")


def _checked_scale(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(
            f"{_FUNCTION}: softmax_scale is the bool {value}, wanted a finite number; old examples pass causal by "
            "position there: write causal=..."
        )
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{_FUNCTION}: softmax_scale is {type(value).__name__}, wanted a finite number"
        )
    if not math.isfinite(value):
        raise ValueError(f"{_FUNCTION}: softmax_scale = {value}, wanted a finite number")
    return float(value)


def _allocate_missing(
    q: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _errors.require_tensors(_FUNCTION, q=q)
    if q.dim() != 4:
        raise ValueError(f"{_FUNCTION}: q has {q.dim()} axes, wanted 4")
    b, s_q, h_q, _ = q.shape
    if out is None:
        out = torch.empty((b, s_q, h_q, _D_V), dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((b, h_q, s_q), dtype=torch.float32, device=q.device)
    return out, lse
