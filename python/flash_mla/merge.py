"""Merging partial attention results of the same queries over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import _errors

_merge = torch.ops.flash_mla.merge_states.default

_MAX_PARTS = 64  # kMaxMergeParts of the library: what one call of it takes


def merge_states(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges partial results, as if all their keys had been attended to at once.

    For context parallelism and shared prefixes. lse = ln sum_p exp(lses[p]) and out = sum_p exp(lses[p] - lse) * outs[p]: the merge of
    Flash-Decoding.

    Args:
        outs: any number of tensors (..., s_q, h_q, d), all of one shape and dtype (bfloat16,
            float16 or float32); last axis contiguous, d a multiple of 8 up to 1024.
        lses: as many tensors (..., h_q, s_q) float32, natural logarithm, as
            `flash_mla_with_kvcache` returns them; +inf and -inf both mean that the part saw no key,
            and its out is then not read into the result.

    Returns:
        out (..., s_q, h_q, d) in the dtype of the parts and lse (..., h_q, s_q) float32. A row that
        no part saw: out 0, lse +inf.

    More than 64 parts are merged in several calls with float32 in between. Runs in the current
    stream, without synchronising.

    Raises ValueError for wrong shapes, strides or devices, TypeError for wrong types.
    """
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not isinstance(tensors, (Sequence, torch.Tensor)):
            raise TypeError(
                f"merge_states: {name} is {type(tensors).__name__}, wanted a sequence of tensors"
            )
    outs, lses = list(outs), list(lses)
    for name, tensors in (("outs", outs), ("lses", lses)):
        _errors.require_tensors(
            "merge_states", **{f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}
        )
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge_states: {len(outs)} outs and {len(lses)} lses, wanted equally many, at least 1"
        )
    if outs[0].dim() < 3:
        raise ValueError(
            f"merge_states: outs[0] has {outs[0].dim()} axes, wanted (..., s_q, h_q, d)"
        )
    *batch, s_q, h_q, d = outs[0].shape
    for name, tensors, shape in (
        ("outs", outs, (*batch, s_q, h_q, d)),
        ("lses", lses, (*batch, h_q, s_q)),
    ):
        for i, tensor in enumerate(tensors):
            if tensor.shape != shape:
                raise ValueError(
                    f"merge_states: {name}[{i}].shape = {tuple(tensor.shape)}, wanted {tuple(shape)}"
                )

    dtype = outs[0].dtype
    if len(batch) != 1:
        b = math.prod(batch)
        outs = [out.reshape(b, s_q, h_q, d) for out in outs]
        lses = [lse.reshape(b, h_q, s_q) for lse in lses]
    try:
        while len(outs) > _MAX_PARTS:
            groups = [slice(i, i + _MAX_PARTS) for i in range(0, len(outs), _MAX_PARTS)]
            merged = [_merge(list(outs[group]), list(lses[group]), True) for group in groups]
            outs, lses = zip(*merged, strict=True)
        out, lse = _merge(list(outs), list(lses), False)
    except RuntimeError as error:
        _errors.raise_translated(error, "merge_states")
    return out.reshape(*batch, s_q, h_q, d).to(dtype), lse.reshape(*batch, h_q, s_q)
