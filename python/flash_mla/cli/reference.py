"""Naive paged MLA decode in plain PyTorch: the oracle of `flash-mla check`, and random problems."""

from __future__ import annotations

import dataclasses
import math

import torch

from flash_mla.cli.measure import D_QK, D_V, DTYPES

GARBAGE_PAGE = 2147480000  # in table entries past a request's length, which are never read
_LSE_FLOOR = 2.0**-18


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one check covers. `lengths` holds the tokens of each request; 0 is legal."""

    name: str
    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    page_size: int = 64
    dtype: str = "bf16"
    causal: bool = True


@dataclasses.dataclass
class Problem:
    shape: Shape
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    softmax_scale: float = D_QK**-0.5

    def to(self, device: str | torch.device) -> Problem:
        tensors = ("q", "kv_cache", "block_table", "cache_seqlens")
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in tensors}
        )


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """Shuffled pages; NaN in rows that no request owns, garbage in unused table entries."""
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = DTYPES[shape.dtype]
    b, size = len(shape.lengths), shape.page_size
    pages = [-(-length // size) for length in shape.lengths]
    num_pages = sum(pages) + 2
    order = torch.randperm(num_pages, generator=generator, device="cpu").int()
    like = {"device": "cpu", "dtype": torch.float32}
    kv_cache = torch.full((num_pages, size, shape.h_kv, D_QK), math.nan, **like)
    block_table = torch.full((b, max(pages) + 1), GARBAGE_PAGE, dtype=torch.int32, device="cpu")
    used = 0
    for i, (length, count) in enumerate(zip(shape.lengths, pages, strict=True)):
        block_table[i, :count] = order[used : used + count]
        rows = torch.randn(length, shape.h_kv, D_QK, generator=generator, **like)
        token = torch.arange(length, device="cpu")
        kv_cache[block_table[i, token // size].long(), token % size] = rows
        used += count
    return Problem(
        shape=shape,
        q=torch.randn(b, shape.s_q, shape.h_q, D_QK, generator=generator, **like).to(dtype),
        kv_cache=kv_cache.to(dtype),
        block_table=block_table,
        cache_seqlens=torch.tensor(shape.lengths, dtype=torch.int32, device="cpu"),
    )


def request_keys(problem: Problem, i: int) -> torch.Tensor:
    """The cached rows of request i: [length, h_kv, 576]."""
    size = problem.shape.page_size
    token = torch.arange(problem.shape.lengths[i], device=problem.kv_cache.device)
    pages = problem.block_table[i, token // size].long()
    return problem.kv_cache[pages, token % size]


def attend(
    q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, emulate: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request, straight from the formula: out [s_q, h_q, 512], lse [h_q, s_q].

    In float64; or, with `emulate`, as a plain kernel of that type computes it: fp32 sums,
    probabilities and result rounded to the type. Results come in float64 either way.
    """
    work = torch.float64 if emulate is None else torch.float32
    s_q, h_q, _ = q.shape
    length, h_kv, _ = k.shape
    q, k = q.to(work), k.to(work).repeat_interleave(h_q // h_kv, dim=1)
    scores = torch.einsum("shd,nhd->hsn", q, k) * scale
    if causal:
        last_key = length - s_q + torch.arange(s_q, device=q.device)
        hidden = torch.arange(length, device=q.device)[None, :] > last_key[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    if length == 0:
        empty = torch.zeros(s_q, h_q, D_V, dtype=torch.float64, device=q.device)
        return empty, torch.full((h_q, s_q), math.inf, dtype=torch.float64, device=q.device)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    p = (scores - top).exp()
    total = p.sum(-1)
    seen = total > 0
    if emulate is not None:
        p = p.to(emulate).to(work)
    divisor = torch.where(seen, total, 1.0).T[..., None]
    out = torch.einsum("hsn,nhd->shd", p, k[..., :D_V]) / divisor
    if emulate is not None:
        out = out.to(emulate)
    lse = torch.where(seen, total.log() + top[..., 0], math.inf)
    return out.double(), lse.double()


def solve(
    problem: Problem, emulate: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """attend() for every request: out [b, s_q, h_q, 512], lse [b, h_q, s_q]."""
    results = [
        attend(
            problem.q[i],
            request_keys(problem, i),
            problem.softmax_scale,
            problem.shape.causal,
            emulate,
        )
        for i in range(len(problem.shape.lengths))
    ]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Largest errors against float64 and what they may be."""

    out_error: float
    out_limit: float
    lse_error: float
    lse_limit: float

    @property
    def passed(self) -> bool:
        return self.out_error <= self.out_limit and self.lse_error <= self.lse_limit


def judge(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    want: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Verdict:
    """Errors against float64, and the limit: twice the error of a plain emulation of the same
    maths in the same type, plus one rounding of the largest value. inf and NaN must be where the
    reference has them."""
    want_out, want_lse = want or solve(problem)
    plain_out, plain_lse = solve(problem, emulate=problem.q.dtype)
    rounding = torch.finfo(problem.q.dtype).eps / 2
    finite = want_lse.isfinite()
    largest_lse = float(want_lse[finite].abs().max()) if finite.any() else 0.0
    return Verdict(
        out_error=_largest_difference(out, want_out),
        out_limit=2 * _largest_difference(plain_out, want_out)
        + rounding * float(want_out.abs().max()),
        lse_error=_largest_difference(lse, want_lse),
        lse_limit=2 * _largest_difference(plain_lse, want_lse) + _LSE_FLOOR * (1 + largest_lse),
    )


def _largest_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().to(want.device), want.double()
    difference = torch.where(got == want, 0.0, (got - want).abs())
    largest = float(difference.max()) if difference.numel() else 0.0
    return math.inf if math.isnan(largest) else largest
