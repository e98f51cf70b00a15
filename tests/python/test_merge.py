"""merge_states against decoding over all keys at once, and against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from reference import Case, Inputs, assert_close, decode, make_inputs

from flash_mla import flash_mla_with_kvcache, merge_states


def parts(count: int, shape: tuple, device: str, dtype: torch.dtype) -> tuple[list, list]:
    generator = torch.Generator(device).manual_seed(count)
    *batch, s_q, h_q, d = shape

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device=device)

    outs = [randn(*shape).to(dtype) for _ in range(count)]
    lses = [3 * randn(*batch, h_q, s_q) for _ in range(count)]
    for part, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        unseen = randn(*batch, h_q, s_q) > 0.8
        lse[unseen] = math.inf if part % 2 else -math.inf
        out.masked_fill_(unseen.transpose(-1, -2)[..., None], math.nan)
    return outs, lses


def reference(outs: list, lses: list) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.stack(lses).double()
    lse[torch.isinf(lse)] = -math.inf
    total = torch.logsumexp(lse, 0)
    seen = ~torch.isneginf(total)
    weights = torch.exp(lse - torch.where(seen, total, 0.0)).transpose(-1, -2)[..., None]
    out = (torch.where(weights > 0, torch.stack(outs).double(), 0.0) * weights).sum(0)
    return out, torch.where(seen, total, math.inf)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_definition(device: str, count: int, dtype: torch.dtype) -> None:
    outs, lses = parts(count, (2, 3, 5, 512), device, dtype)
    got = merge_states(outs, lses)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_close(got, reference(outs, lses))


@pytest.mark.parametrize(
    "shape",
    [(3, 5, 64), (2, 3, 1, 5, 512), (0, 2, 4, 512), (2, 0, 4, 512), (1, 1, 1, 1024)],
    ids=str,
)
def test_shapes(device: str, shape: tuple) -> None:
    outs, lses = parts(3, shape, device, torch.float16)
    got = merge_states(tuple(outs), tuple(lses))
    assert got[0].shape == shape
    assert_close(got, reference(outs, lses))


def test_nobody_saw_a_key(device: str) -> None:
    out = torch.full((1, 1, 2, 512), math.nan, dtype=torch.bfloat16, device=device)
    lse = torch.full((1, 2, 1), math.inf, dtype=torch.float32, device=device)
    merged = merge_states([out, out], [lse, -lse])
    assert (merged[0] == 0).all() and (merged[1] == math.inf).all()


def test_strided_parts(device: str) -> None:
    outs, lses = parts(3, (2, 3, 5, 512), device, torch.bfloat16)
    wanted = reference(outs, lses)
    outs = [torch.stack((out, out), 2)[:, :, 1] for out in outs]
    lses = [lse.permute(2, 0, 1).contiguous().permute(1, 2, 0) for lse in lses]
    assert_close(merge_states(outs, lses), wanted)


def test_context_parallel(device: str) -> None:
    """Each worker decodes its pages; merged, this is the decode of everything."""
    inputs = make_inputs(Case(b=3, s_kv=640, h_q=16, varlen=False, causal=False), device)
    wanted = decode(inputs, False)
    outs, lses = [], []
    for worker in range(4):
        pages = inputs.block_table[:, worker:10:4].contiguous()
        lengths = torch.full_like(inputs.cache_seqlens, 64 * pages.shape[1])
        part = Inputs(inputs.q, inputs.k_cache, pages, lengths)
        out, lse = flash_mla_with_kvcache(*part.args(), None)
        outs.append(out.float())
        lses.append(lse)
    got = merge_states(outs, lses)
    assert (got[0].double() - wanted[0]).abs().max() < 2e-3  # the parts were rounded to bf16
    torch.testing.assert_close(got[1].double(), wanted[1], atol=1e-5, rtol=1.2e-4)
