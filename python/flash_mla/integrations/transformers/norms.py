"""The RMS norms of a layer's latents, in one kernel of PyTorch's instead of eight, while a step runs absorbed.

A step of one token is short enough for the launches to count: with a layer's two norms they are 16 of about 40 kernels.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from .attention import AbsorbedLayer

_NAMES = ("q_a_layernorm", "kv_a_layernorm")
# Roundings of the dtype that the two may be apart: the model's own norm rounds before it multiplies with the weight, too.
_ROUNDINGS = 3


def attach(module: nn.Module, layer: AbsorbedLayer) -> None:
    """Of an attention module those norms that PyTorch's function computes too."""
    for name in _NAMES:
        norm = getattr(module, name, None)
        if isinstance(norm, nn.Module) and _is_known(norm):
            norm._flash_mla_layer = layer
            norm.forward = types.MethodType(_forward, norm)


def detach(module: nn.Module) -> None:
    """Takes back what `attach` did."""
    for name in _NAMES:
        norm = getattr(module, name, None)
        if isinstance(norm, nn.Module) and "_flash_mla_layer" in vars(norm):
            del norm.forward, norm._flash_mla_layer


def _is_known(norm: nn.Module) -> bool:
    """Asks the norm with two tokens. One whose weights are not there yet stays as it is."""
    weight, epsilon = norm._parameters.get("weight"), getattr(norm, "variance_epsilon", None)
    if "forward" in vars(norm) or type(weight) is not nn.Parameter or weight.dim() != 1:
        return False
    if not isinstance(epsilon, float) or len(norm._parameters) != 1 or weight.device.type == "meta":
        return False
    if not weight.dtype.is_floating_point:
        return False
    ramp = torch.linspace(-2, 3, 2 * len(weight), dtype=torch.float32, device=weight.device)
    tokens = ramp.view(1, 2, -1).to(weight.dtype)
    with torch.no_grad():
        try:
            own = type(norm).forward(norm, tokens)
        except (RuntimeError, TypeError, ValueError):
            return False
        if type(own) is not torch.Tensor or (own.shape, own.dtype) != (tokens.shape, tokens.dtype):
            return False
        fused = functional.rms_norm(tokens, weight.shape, weight, epsilon)
    limit = _ROUNDINGS * torch.finfo(own.dtype).eps
    return torch.allclose(own.double(), fused.double(), rtol=limit, atol=0)


def _forward(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    weight, layer = norm.weight, norm._flash_mla_layer
    if (
        torch.compiler.is_compiling()  # it fuses on its own
        or not layer.controller.absorbs
        or layer.obstacle
        or hidden_states.dtype != weight.dtype
    ):
        return type(norm).forward(norm, hidden_states)
    return functional.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)
