"""Attention masks that were made already: what they say of padding, if they say no more than that."""

from __future__ import annotations

from typing import Any

import torch


def visible_of(mask: Any) -> torch.Tensor | None:
    """(b, heads, s_q, s_kv) bool, True where a key is seen, of a mask with four axes; None of others.

    Additive masks hold 0 and very negative values; with any other value (a bias) the answer is None.
    Synchronises for additive masks.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return None
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return seen if bool((seen | hidden).all()) else None


def padding_of(visible: torch.Tensor | None, b: int, s_q: int, length: int) -> torch.Tensor | None:
    """The padding of a mask that is causal, with padding or without: (b, length + s_q) bool, True for real
    tokens. None for any other mask. Synchronises."""
    width = length + s_q
    if visible is None or visible.shape[1] != 1 or visible.shape[2] != s_q:
        return None
    if visible.shape[3] < width or bool(visible[..., width:].any()):
        return None
    visible = visible[:, 0, :, :width].expand(b, -1, -1)
    real = visible[:, -1]
    query = torch.arange(length, width, device=visible.device)[:, None]
    causal = torch.arange(width, device=visible.device) <= query
    return real if torch.equal(visible, causal & real[:, None]) else None


def sees(visible: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether a mask lets any query see any of the keys in hidden, (b, n) bool. Synchronises."""
    columns = visible.flatten(1, 2).any(1)[:, : hidden.shape[1]]
    return bool((columns & hidden[:, : columns.shape[1]].to(columns.device)).any())
