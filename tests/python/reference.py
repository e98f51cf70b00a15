"""Naive decode in float64, and the tolerance that the field uses. Shares no code with the package."""

from __future__ import annotations

import dataclasses
import math

import torch

D_QK, D_V = 576, 512
GARBAGE_PAGE = 2147480000  # fills table entries that must never be read

# The tolerances of the field's dense decode tests.
OUT_ABS, OUT_REL, OUT_COSINE = 8e-4, 0.016, 5e-6
LSE_ABS, LSE_REL = 1e-6, 1.2e-4


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 2
    s_q: int = 1
    s_kv: int = 200
    h_q: int = 16
    h_kv: int = 1
    causal: bool = True
    varlen: bool = True
    zero_rows: bool = False  # some requests are empty
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64

    def __str__(self) -> str:
        flags = "".join(
            letter
            for letter, on in (("c", self.causal), ("v", self.varlen), ("z", self.zero_rows))
            if on
        )
        dtype = str(self.dtype).removeprefix("torch.")
        return f"b{self.b}-sq{self.s_q}-kv{self.s_kv}-h{self.h_q}x{self.h_kv}-{dtype}-page{self.page_size}-{flags}"


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The leading arguments of flash_mla_with_kvcache."""
        return self.q, self.k_cache, self.block_table, self.cache_seqlens, D_V


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs; what must not be read is poisoned: NaN in cache rows, garbage in table entries."""
    generator = torch.Generator("cpu").manual_seed(seed)
    lengths = torch.full((case.b,), case.s_kv, dtype=torch.int32, device="cpu")
    if case.varlen:
        noise = torch.randn(case.b, generator=generator, dtype=torch.float64, device="cpu")
        lengths = (
            (case.s_kv + noise * case.s_kv / 2)
            .to(torch.int32)
            .clamp(case.s_q, 2 * case.s_kv + case.s_q)
        )
    if case.zero_rows:
        lengths[::2] = 0
    pages = (lengths + case.page_size - 1) // case.page_size
    num_pages, max_pages = int(pages.sum()) + 3, int(pages.max()) + 2 if case.b else 1
    order = torch.randperm(num_pages, generator=generator, device="cpu").to(torch.int32)
    block_table = torch.full((case.b, max_pages), GARBAGE_PAGE, dtype=torch.int32, device="cpu")
    used = torch.zeros((num_pages, case.page_size), dtype=torch.bool, device="cpu")
    at = 0
    for i, (count, length) in enumerate(zip(pages.tolist(), lengths.tolist(), strict=True)):
        block_table[i, :count] = order[at : at + count]
        rows = torch.zeros(count * case.page_size, dtype=torch.bool, device="cpu")
        rows[:length] = True
        used[order[at : at + count].long()] = rows.view(count, case.page_size)
        at += count

    gpu_generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=gpu_generator, dtype=torch.float32, device=device)
        return (values / 10).clamp_(-1, 1).to(case.dtype)

    k_cache = randn(num_pages, case.page_size, case.h_kv, D_QK)
    k_cache[~used.to(device)] = math.nan
    q = randn(case.b, case.s_q, case.h_q, D_QK)
    return Inputs(q, k_cache, block_table.to(device), lengths.to(device))


def decode(
    inputs: Inputs, causal: bool, softmax_scale: float = D_QK**-0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (b, s_q, h_q, 512) and lse (b, h_q, s_q) in float64; a row without a key gets 0 and +inf."""
    b, s_q, h_q, _ = inputs.q.shape
    page_size, h_kv = inputs.k_cache.shape[1:3]
    device = inputs.q.device
    out = torch.zeros((b, s_q, h_q, D_V), dtype=torch.float64, device=device)
    lse = torch.full((b, h_q, s_q), math.inf, dtype=torch.float64, device=device)
    for i, length in enumerate(inputs.cache_seqlens.tolist()):
        if length == 0:
            continue
        pages = inputs.block_table[i, : -(-length // page_size)].long()
        keys = inputs.k_cache[pages].reshape(-1, h_kv, D_QK)[:length].double()
        keys = keys.repeat_interleave(h_q // h_kv, dim=1)
        scores = torch.einsum("shd,nhd->hsn", inputs.q[i].double(), keys) * softmax_scale
        if causal:
            last = length - s_q + torch.arange(s_q, device=device)
            hidden = torch.arange(length, device=device)[None, :] > last[:, None]
            scores.masked_fill_(hidden, -math.inf)
        row_lse = torch.logsumexp(scores, dim=-1)
        seen = ~torch.isneginf(row_lse)
        weights = torch.exp(scores - torch.where(seen, row_lse, 0.0)[..., None])
        out[i] = torch.einsum("hsn,nhd->shd", weights, keys[..., :D_V])
        lse[i] = torch.where(seen, row_lse, math.inf)
    return out, lse


def _assert_within(
    name: str, got: torch.Tensor, wanted: torch.Tensor, abs_tol: float, rel_tol: float
) -> None:
    assert got.shape == wanted.shape, (
        f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    )
    got = got.to(torch.float64)
    special = torch.isinf(wanted)
    assert torch.equal(got[special], wanted[special]), f"{name}: infinities differ"
    error = torch.where(special, 0.0, got - wanted).abs()
    limit = torch.where(special, math.inf, torch.clamp(rel_tol * wanted.abs(), min=abs_tol))
    bad = ~(error <= limit)  # NaN is bad
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} off, worst by {error[bad].max().item():g}"
    )


def assert_close(
    got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Both results within the field's tolerance."""
    _assert_within("out", got[0], wanted[0], OUT_ABS, OUT_REL)
    x, y = got[0].to(torch.float64), wanted[0]
    norm = (x * x + y * y).sum().item()
    if norm > 0:
        cosine = 1 - 2 * (x * y).sum().item() / norm
        assert cosine <= OUT_COSINE, f"out: cosine difference {cosine:g}"
    _assert_within("lse", got[1], wanted[1], LSE_ABS, LSE_REL)
