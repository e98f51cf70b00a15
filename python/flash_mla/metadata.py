"""Scheduling metadata (plans), in every form in which callers of this API keep it.

A plan says how a decode is cut into parts for the SMs. It is a hint: its shape is checked, its
contents are never trusted, and the lengths are read again on the device in each call. A plan made
for other lengths never gives a wrong answer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import _errors

_plan = torch.ops.flash_mla.plan.default

_PAGE_SIZE = 64  # of the plans made before a cache is seen; a plan does not depend on it


@dataclasses.dataclass
class FlashMLASchedMeta:
    """A plan that the first call with it makes; one object may serve all layers of a step.

    Engines may preset the two tensors (one row in `tile_scheduler_metadata` means "do not split any
    request"), read them after the first call, and set `have_initialized` to False to have the next
    call plan anew.
    """

    @dataclasses.dataclass
    class Config:
        """The shapes and modes of the call that made the plan."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int

        causal: bool
        is_fp8_kvcache: bool
        topk: int | None

        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None  # (num_sm_parts, 8) int32
    num_splits: torch.Tensor | None = None  # (b + 1,) int32


def get_mla_metadata(
    *args: Any, **kwargs: Any
) -> tuple[FlashMLASchedMeta | torch.Tensor, torch.Tensor | None]:
    """Makes the metadata for `flash_mla_with_kvcache`, in the form that the arguments ask for.

    Without arguments, or with cache_seqlens=None (2026): returns `(FlashMLASchedMeta(), None)`, to
    be filled by the first call.

    With arguments (2025), by position or by name:

        cache_seqlens: (b,) int32, tokens of each request.
        num_q_tokens_per_head_k (or num_heads_per_head_k): s_q * h_q // h_kv.
        num_heads_k: h_kv.
        num_heads_q, is_fp8_kvcache, topk: for sparse attention and fp8 caches, not supported yet.

    returns two int32 tensors on the device of cache_seqlens, `tile_scheduler_metadata`
    (num_sm_parts, 8) and `num_splits` (b + 1,). num_sm_parts depends on neither b nor the lengths,
    is at most the number of SMs, and is 1 on the CPU; so both can be copied into buffers made once
    for the largest batch. The first tensor carries the fields of FlashMLASchedMeta as attributes,
    and may be passed on without num_splits.

    Runs in the current stream, without synchronising; may be captured in a CUDA graph.

    Raises ValueError and TypeError for wrong arguments, NotImplementedError for those not supported
    yet.
    """
    if (not args or args[0] is None) and kwargs.get("cache_seqlens") is None:
        return FlashMLASchedMeta(), None
    return _plan_tensors(*args, **kwargs)


def _plan_tensors(
    cache_seqlens: torch.Tensor,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    function = "get_mla_metadata"
    if num_q_tokens_per_head_k is None:
        num_q_tokens_per_head_k = num_heads_per_head_k
    elif num_heads_per_head_k is not None:
        raise TypeError(
            f"{function}: num_heads_per_head_k is the old name of num_q_tokens_per_head_k; give one of them"
        )
    if is_fp8_kvcache:
        raise _errors.unsupported(function, "is_fp8_kvcache=True")
    if topk is not None:
        raise _errors.unsupported(function, "topk")
    for name, value in (
        ("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        ("num_heads_k", num_heads_k),
    ):
        if not _errors.is_int(value):
            raise TypeError(f"{function}: {name} is {type(value).__name__}, wanted an int")
        if value < 1:
            raise ValueError(f"{function}: {name} = {value}, wanted 1 or more")
    num_heads_k = int(num_heads_k)
    h_q = int(num_q_tokens_per_head_k) * num_heads_k
    if h_q >= 2**31:
        raise ValueError(
            f"{function}: num_q_tokens_per_head_k * num_heads_k = {h_q}, wanted less than 2 ** 31"
        )
    metadata, num_splits = _make_plan(function, cache_seqlens, 1, h_q, num_heads_k, _PAGE_SIZE)
    if torch.compiler.is_compiling():
        return metadata, num_splits  # Dynamo cannot trace what follows, and plain tensors are legal
    # The object's fields, so that the tensor can be used like the object. `tile_scheduler_metadata`
    # is an alias and not the tensor itself, which would then hold itself alive.
    metadata.have_initialized = False
    metadata.config = None
    metadata.tile_scheduler_metadata = metadata._planned = metadata.detach()
    metadata.num_splits = num_splits
    return metadata, num_splits


_plan_tensors.__qualname__ = "get_mla_metadata"  # as which it complains about its arguments


def get_mla_decoding_metadata(
    seqlens_k: torch.Tensor,
    num_q_tokens_per_head_k: int,
    h_k: int,
    h_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    use_legacy: bool = False,
) -> tuple[FlashMLASchedMeta | torch.Tensor, torch.Tensor | None]:
    """`get_mla_metadata` under the names of the serving fork; `use_legacy` changes nothing."""
    return get_mla_metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk)


def _make_plan(
    function: str, cache_seqlens: torch.Tensor, s_q: int, h_q: int, h_kv: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return _plan(cache_seqlens, s_q, h_q, h_kv, page_size)
    except RuntimeError as error:
        _errors.raise_translated(error, function, cache_seqlens=cache_seqlens)


def tensors_of(
    function: str, plan: Any, num_splits: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """What a call passes on of a plan given in any form, and whether `initialize` must follow the call."""
    if plan is None:
        if num_splits is not None:
            raise ValueError(
                f"{function}: num_splits was given without tile_scheduler_metadata; wanted both or neither"
            )
        return None, None, False
    if isinstance(plan, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(
                f"{function}: num_splits was given beside a FlashMLASchedMeta, which holds its own; wanted None"
            )
    elif isinstance(plan, torch.Tensor):
        if num_splits is not None or not hasattr(plan, "tile_scheduler_metadata"):
            return plan, num_splits, False
    else:
        raise TypeError(
            f"{function}: tile_scheduler_metadata is {type(plan).__name__}, wanted what get_mla_metadata returned first: "
            "a FlashMLASchedMeta or a torch.Tensor"
        )
    if plan.have_initialized:
        return plan.tile_scheduler_metadata, plan.num_splits, False
    if _is_stale(plan):
        return None, None, True
    return plan.tile_scheduler_metadata, plan.num_splits, True


def _is_stale(plan: Any) -> bool:
    """No plan yet, or one that an earlier call made and the caller dropped by resetting have_initialized."""
    if plan.tile_scheduler_metadata is None:
        return True
    return plan.config is not None and plan.tile_scheduler_metadata is getattr(
        plan, "_planned", None
    )


def initialize(
    function: str,
    plan: Any,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    causal: bool,
) -> None:
    """Fills the fields of `plan` after the first call that used it (after, so that a call that failed leaves no trace)."""
    b, s_q, h_q, _ = q.shape
    _, page_size, h_kv, _ = k_cache.shape
    if _is_stale(plan):
        plan.tile_scheduler_metadata, plan.num_splits = _make_plan(
            function, cache_seqlens, s_q, h_q, h_kv, page_size
        )
        plan._planned = plan.tile_scheduler_metadata
    plan.config = FlashMLASchedMeta.Config(
        b, s_q, h_q, page_size, h_kv, causal, False, None, None, None
    )
    plan.have_initialized = True
