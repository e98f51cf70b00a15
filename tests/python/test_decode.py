"""Decoding against the float64 reference, over the field's grid: all of it on a GPU, a part of it on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from reference import Case, assert_close, decode, make_inputs

from flash_mla import flash_mla_with_kvcache, get_mla_metadata


def cpu_cases() -> list[Case]:
    cases = [
        Case(b=b, s_q=s_q, s_kv=s_kv, h_q=h_q, causal=causal)
        for b, s_q, s_kv, h_q, causal in [
            (1, 1, 20, 128, False),
            (1, 1, 4096, 16, True),
            (1, 4, 1000, 16, True),
            (2, 2, 140, 64, True),
            (6, 1, 140, 128, True),
            (16, 1, 100, 16, False),
            (64, 1, 20, 16, True),
            (128, 1, 20, 2, True),
            (1, 1, 32768, 1, True),
            (1, 128, 150, 1, True),
        ]
    ]
    cases += [Case(h_q=h_q) for h_q in (1, 3, 9, 12, 63, 126)]
    cases += [
        Case(h_q=h_q, h_kv=h_kv, s_q=2) for h_q, h_kv in ((2, 2), (12, 4), (15, 5), (64, 8), (6, 3))
    ]
    cases += [Case(page_size=page_size, s_kv=130) for page_size in (1, 3, 16, 32, 128, 256)]
    cases += [Case(dtype=dtype, s_q=2) for dtype in (torch.float16, torch.float32)]
    cases += [Case(b=5, zero_rows=True, s_q=s_q) for s_q in (1, 3)]
    cases += [Case(b=3, s_kv=2, s_q=4, varlen=False)]  # some rows see no key
    cases += [Case(b=0, varlen=False)]
    return cases


def cuda_cases() -> list[Case]:
    cases = []
    grid = itertools.product((1, 2, 6, 64, 128), (1, 2, 4), (20, 140, 1000, 4096), (1, 16, 64, 128))
    for number, (b, s_q, s_kv, h_q) in enumerate(grid):
        cases.append(Case(b, s_q, s_kv, h_q, causal=number % 3 != 0, varlen=number % 4 != 0))
    cases += [Case(1, s_q, 32768, h_q) for s_q in (1, 4) for h_q in (1, 16, 128)]
    cases += [Case(128, 1, 32768, h_q) for h_q in (16, 128)]
    cases += [
        Case(s_q=s_q, h_q=h_q, s_kv=700) for s_q in (1, 2, 3) for h_q in (2, 3, 9, 12, 63, 65, 126)
    ]
    cases += [
        Case(s_q=s_q, h_q=h_q, h_kv=h_kv, s_kv=500)
        for s_q in (1, 3)
        for h_q, h_kv in ((2, 2), (12, 4), (15, 5), (64, 8), (128, 2), (8, 8))
    ]
    cases += [Case(dtype=torch.float16, b=b, s_q=2, h_q=h_q) for b in (1, 40) for h_q in (16, 128)]
    cases += [Case(b=b, zero_rows=True, s_q=s_q) for b in (1, 5, 64) for s_q in (1, 3)]
    cases += [Case(b=3, s_kv=2, s_q=4, varlen=False), Case(b=0, varlen=False)]
    cases += [Case(b=2, s_q=s_q, h_q=h_q, s_kv=900) for s_q in (7, 32, 128) for h_q in (1, 16, 128)]
    return cases


def check(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    got = flash_mla_with_kvcache(*inputs.args(), get_mla_metadata()[0], causal=case.causal)
    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    assert got[0].is_contiguous() and got[1].is_contiguous()
    assert_close(got, decode(inputs, case.causal))


@pytest.mark.parametrize("case", cpu_cases(), ids=str)
def test_cpu(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("case", cuda_cases(), ids=str)
def test_cuda(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("scale", [0.0, 0.05, -0.03, 1, 3.5])
def test_softmax_scale(device: str, scale: float) -> None:
    case = Case(s_q=2)
    inputs = make_inputs(case, device)
    got = flash_mla_with_kvcache(*inputs.args(), None, softmax_scale=scale, causal=True)
    assert_close(got, decode(inputs, True, scale))


# A page's largest score, in bits above that of the page before. The GPU kernel leaves the maxima of the pages before alone until a
# score is 8 bits above them.
@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("bits", [-20, 3, 7, 9, 20])
@pytest.mark.parametrize("rows", ["all", "one"])
def test_maxima_that_move(device: str, h_q: int, bits: int, rows: str) -> None:
    inputs = make_inputs(Case(b=2, s_q=2, s_kv=640, h_q=h_q, varlen=False), device)
    rope = 512  # a column that is no value's
    inputs.q[..., rope] = 0
    inputs.q[:, :, slice(None) if rows == "all" else 5, rope] = 1
    bit = math.log(2) * math.sqrt(576)
    inputs.k_cache[..., rope] = 0
    for page in range(10):
        inputs.k_cache[inputs.block_table[:, page].long(), ..., rope] = page * bits * bit
    whole = {"enable_batch_invariant": True}  # one CTA does all pages of a request
    got = flash_mla_with_kvcache(*inputs.args(), None, causal=True, **whole)
    assert_close(got, decode(inputs, True))


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.bfloat16, bits) for bits in (-100, -12, 14, 100)]
    + [(torch.float16, bits) for bits in (-4, 12)],
)
def test_values_of_any_size(device: str, h_q: int, dtype: torch.dtype, bits: int) -> None:
    """Scores do not depend on them here. A request is cut into two, three, or many pieces."""
    for b in (1, 24, 90) if device == "cuda" else (1,):
        inputs = make_inputs(Case(b=b, s_kv=3000, h_q=h_q, dtype=dtype), device)
        inputs.q[..., :512] = 0
        want = decode(inputs, True)
        inputs.k_cache[..., :512] *= 2.0**bits
        out, lse = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
        assert_close((out.double() / 2.0**bits, lse), want)


def test_rerun_is_bitwise_equal(device: str) -> None:
    inputs = make_inputs(Case(b=3, s_kv=2500, h_q=32), device)
    first = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
    for _ in range(3):
        again = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("b", [1, 32, 33, 128, 129, 256, 257])
def test_lengths_that_come_back(device: str, b: int) -> None:
    """What a GPU has kept of one call serves the next one, if that has the same lengths and shapes."""
    inputs = make_inputs(Case(b=b, s_kv=100, h_q=12, s_q=2), device)
    one_token = inputs.q[:, :1].contiguous()
    more_heads = inputs.q.repeat(1, 1, 3, 1)  # on a GPU, by pairs of CTAs
    shorter = (inputs.cache_seqlens // 2).clamp(min=2)
    last_shorter = inputs.cache_seqlens.clone()
    last_shorter[-1] -= 1
    for q in (inputs.q, one_token, more_heads):
        first: dict[int, tuple] = {}
        for i in (0, 0, 1, 1, 2, 0, 2, 2, 1):
            seqlens = (inputs.cache_seqlens, shorter, last_shorter)[i]
            got = flash_mla_with_kvcache(
                q, inputs.k_cache, inputs.block_table, seqlens, 512, None, causal=True
            )
            if i not in first:
                first[i] = got
                these = dataclasses.replace(inputs, q=q, cache_seqlens=seqlens)
                assert_close(got, decode(these, True))
            assert torch.equal(got[0], first[i][0]) and torch.equal(got[1], first[i][1])


def test_batch_invariant(device: str) -> None:
    """A request's result has the same bits whatever else is in the batch."""
    inputs = make_inputs(Case(b=7, s_kv=1500, h_q=32), device)
    every = flash_mla_with_kvcache(*inputs.args(), None, causal=True, enable_batch_invariant=True)
    assert_close(every, decode(inputs, True))
    for i in range(7):
        one = (
            inputs.q[i : i + 1],
            inputs.k_cache,
            inputs.block_table[i : i + 1],
            inputs.cache_seqlens[i : i + 1],
        )
        alone = flash_mla_with_kvcache(*one, 512, None, causal=True, enable_batch_invariant=True)
        assert torch.equal(alone[0][0], every[0][i]) and torch.equal(alone[1][0], every[1][i])


def strided_inputs(device: str):
    """q, cache and table as slices of larger tensors, as engines keep them."""
    inputs = make_inputs(Case(b=3, s_q=2, s_kv=300), device)
    wide_q = torch.full((3, 2, 20, 640), math.nan, dtype=torch.bfloat16, device=device)
    wide_q[:, :, 2:18, 64:] = inputs.q
    num_pages = inputs.k_cache.shape[0]
    all_layers = torch.full(
        (num_pages, 3, 64, 1, 640), math.nan, dtype=torch.bfloat16, device=device
    )
    all_layers[:, 1, :, :, :576] = inputs.k_cache
    wide_table = torch.full((3, 50), 2147480000, dtype=torch.int32, device=device)
    wide_table[:, : inputs.block_table.shape[1]] = inputs.block_table
    views = (
        wide_q[:, :, 2:18, 64:],
        all_layers[:, 1, :, :, :576],
        wide_table[:, : inputs.block_table.shape[1]],
        inputs.cache_seqlens,
        512,
    )
    return inputs, views


def test_strides_are_free(device: str) -> None:
    inputs, views = strided_inputs(device)
    assert_close(flash_mla_with_kvcache(*views, None, causal=True), decode(inputs, True))


def test_misaligned_q(device: str) -> None:
    """Where the kernel cannot read q in place, a copy is made of it."""
    inputs = make_inputs(Case(b=2, s_q=2), device)
    wide = torch.zeros((2, 2, 16, 579), dtype=torch.bfloat16, device=device)
    wide[..., 3:] = inputs.q
    got = flash_mla_with_kvcache(wide[..., 3:], *inputs.args()[1:], None, causal=True)
    assert_close(got, decode(inputs, True))


def test_out_and_lse(device: str) -> None:
    """Results go into the caller's tensors, with guard elements around them untouched."""
    inputs = make_inputs(Case(b=2, s_q=3), device)
    wanted = decode(inputs, True)
    frame = torch.full((2, 3, 18, 528), 7.0, dtype=torch.bfloat16, device=device)
    out = frame[:, :, 1:17, 8:520]
    lse_frame = torch.full((3, 20, 4), 7.0, dtype=torch.float32, device=device)
    lse = lse_frame[:, 2:18, 1:3].permute(2, 1, 0)
    got = flash_mla_with_kvcache(*inputs.args(), None, causal=True, out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert_close(got, wanted)
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (frame == 7.0).all() and (lse_frame == 7.0).all()
    only_out = flash_mla_with_kvcache(*inputs.args(), None, causal=True, out=out)
    assert only_out[0] is out
    assert_close(only_out, wanted)
    only_lse = flash_mla_with_kvcache(*inputs.args(), None, causal=True, lse=lse)
    assert only_lse[1] is lse
    assert_close(only_lse, wanted)


def test_misaligned_out(device: str) -> None:
    """Rows of out may start anywhere; what lies between them is untouched."""
    inputs = make_inputs(Case(b=2, s_q=3), device)
    wanted = decode(inputs, True)
    frame = torch.full((2, 3, 16, 515), 7.0, dtype=torch.bfloat16, device=device)
    out = frame[..., 1:513]
    got = flash_mla_with_kvcache(*inputs.args(), None, causal=True, out=out)
    assert got[0] is out
    assert_close(got, wanted)
    out.fill_(7.0)
    assert (frame == 7.0).all()


def test_expanded_q(device: str) -> None:
    """A q whose tokens are one and the same in memory."""
    inputs = make_inputs(Case(b=2, s_q=1), device)
    expanded = inputs.q.expand(2, 3, -1, -1)
    out, lse = flash_mla_with_kvcache(expanded, *inputs.args()[1:], None)
    copied = flash_mla_with_kvcache(expanded.contiguous(), *inputs.args()[1:], None)
    assert torch.equal(out, copied[0]) and torch.equal(lse, copied[1])
    one = decode(inputs, False)
    for token in range(3):
        assert_close((out[:, token : token + 1], lse[..., token : token + 1]), one)


@pytest.mark.parametrize("extra", ["use_legacy", "validate"])
def test_flags_that_change_nothing(device: str, extra: str) -> None:
    inputs = make_inputs(Case(), device)
    plain = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
    flagged = flash_mla_with_kvcache(*inputs.args(), None, causal=True, **{extra: True})
    assert torch.equal(plain[0], flagged[0]) and torch.equal(plain[1], flagged[1])


def test_default_dtype_and_device(device: str) -> None:
    """Callers set defaults for the whole process; they change nothing here."""
    inputs = make_inputs(Case(s_q=2), device)
    wanted = decode(inputs, True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            md, num_splits = get_mla_metadata(inputs.cache_seqlens, 2 * 16, 1)
            got = flash_mla_with_kvcache(*inputs.args(), md, num_splits, causal=True)
            lse = torch.empty((2, 16, 2), dtype=torch.float32)
            again = flash_mla_with_kvcache(
                *inputs.args(), get_mla_metadata()[0], causal=True, lse=lse
            )
    finally:
        torch.set_default_dtype(before)
    assert md.dtype == torch.int32 and got[1].dtype == torch.float32
    assert_close(got, wanted)
    assert_close(again, wanted)


def test_requires_grad(device: str) -> None:
    inputs = make_inputs(Case(), device)
    inputs.q.requires_grad_()
    with torch.no_grad():
        wanted = decode(inputs, True)
    got = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
    assert_close((got[0].detach(), got[1].detach()), wanted)


@pytest.mark.cuda
def test_other_device_of_several() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = make_inputs(Case(), "cuda:1")
    torch.cuda.set_device(0)
    assert_close(flash_mla_with_kvcache(*inputs.args(), None, causal=True), decode(inputs, True))
    assert torch.cuda.current_device() == 0
