"""Absorbed steps of every model family against the model's own attention, within the derived tolerance."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build, family_names, in_float64, logits_of_chunks, padded, tokens

import flash_mla.integrations.transformers as hf

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_as_good(
    got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype
) -> None:
    """The rule of docs/conventions.md, on the logits of a row: at most twice the error that the model's own
    attention makes in the same precision, plus the rounding of the result and of a partial result."""
    limit = 2 * (plain - exact).abs().max() + 2 * UNIT[dtype] * exact.abs().max()
    error = (got - exact).abs().max()
    assert error <= limit, f"off by {error:g}, the limit is {limit:g}"


def compare(name: str, dtype: torch.dtype, device: str, ids, mask, chunks, **settings) -> dict:
    """The calls of the enabled model, whose logits were compared."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is for the CPU")
    ids, mask = ids.to(device), mask.to(device)
    model = build(name, dtype, device, **settings)
    plain = logits_of_chunks(model, ids, mask, chunks)
    report = hf.enable(model)
    assert len(report.taken) == FAMILIES[name].attention_layers and not report.left
    got = logits_of_chunks(model, ids, mask, chunks)
    exact = logits_of_chunks(in_float64(model), ids, mask, (ids.shape[1],))
    for row in range(ids.shape[0]):
        real = mask[row].bool()
        assert_as_good(got[row, real], plain[row, real], exact[row, real], dtype)
    info = hf.info(model)
    assert info.calls["fallback"] == 0 and not info.fallbacks
    return info.calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", family_names())
def test_families(device: str, name: str, dtype: torch.dtype) -> None:
    """Left padding, steps of one token and of several."""
    ids, mask = padded(tokens(3, 80), (0, 7, 41))
    chunks = (60, 1, 1, 3, 1, 9, 1, 1, 3)
    calls = compare(name, dtype, device, ids, mask, chunks)
    layers = FAMILIES[name].attention_layers
    assert calls["absorbed"] == layers * (len(chunks) - 1)
    # Once in the dtype, once in float64 for the exact result.
    assert calls["prefill"] == 2 * layers and calls["long chunk"] == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("s_q", [1, 2, 17, 64, 128, 129])
def test_tokens_per_step(device: str, s_q: int, attention: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids, mask = padded(tokens(2, 10 + 2 * s_q), (0, 3))
    calls = compare("deepseek_v3", dtype, device, ids, mask, (10, s_q, s_q), attention=attention)
    ours, own = ("absorbed", "long chunk") if s_q <= 128 else ("long chunk", "absorbed")
    assert (calls[ours], calls[own]) == (4, 0)


def test_long_chunk_after_pages(device: str) -> None:
    """Latents are gathered out of pages for a chunk that is too long, and pages go on after it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids, mask = padded(tokens(3, 300), (0, 5, 66))
    calls = compare("deepseek_v3", dtype, device, ids, mask, (70, 1, 150, 1, 78))
    assert (calls["absorbed"], calls["long chunk"]) == (6, 2)


@pytest.mark.parametrize("s_q", [3, 70, 140])
def test_padding_in_the_middle(device: str, s_q: int) -> None:
    """New tokens begin, end or are interrupted with padding, absorbed and gathered."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids, mask = padded(tokens(4, 90 + s_q), (0, 5, 66, 0))
    mask[0, 82 : 82 + s_q // 2] = 0
    mask[1, 81] = 0
    mask[2, 81 + s_q // 2 : 81 + s_q] = 0
    chunks = (80, 1, s_q, 1, 1, 7)
    calls = compare("deepseek_v3", dtype, device, ids, mask, chunks)
    assert calls["absorbed"] == 2 * (5 if s_q <= 128 else 4)
