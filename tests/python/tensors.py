"""Small tensors for tests of arguments."""

from __future__ import annotations

import torch


def int32(*shape: int, device: str = "cpu", fill: int = 0) -> torch.Tensor:
    return torch.full(shape, fill, dtype=torch.int32, device=device)


def bf16(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a last axis of stride 2."""
    return torch.stack((tensor, tensor), -1)[..., 0]
