"""W_UK and W_UV of an attention layer, as the layer's own kv_b_proj has them at this moment.

`kv_b_proj` expands a latent c into keys and values: k_nope[h] = W_UK[h] c and v[h] = W_UV[h] c. Its
output holds [W_UK[h] c, W_UV[h] c] for one head after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

D_LATENT = 512
# How far a projection may be from linear, over the root of the sum of its squared products. Rounding the
# input to e4m3, as quantised layers do, moves each product by up to 2 ** -4: 0.036 in the mean, 0.16 at
# 4.5 deviations, the largest of 32768 outputs. A function that is not linear is off by about 1.
_ROUGHNESS = 0.25
_PLAIN_VALUES = (bool, int, float, str, type(None))


class NotAbsorbable(Exception):
    """Why a kv_b_proj cannot be folded into queries and outputs."""


class AbsorbedWeights:
    """Keeps W_UK (h, d_nope, 512) and W_UV transposed (h, 512, d_v) up to date, for batched products.

    Of a plain `nn.Linear` they are views of its weight: no copy, and what changes the weight changes
    them. Of anything else (quantised, with an adapter, with hooks, under autocast) they are what the
    module makes of the unit vectors, made anew when one of its tensors or settings changes.
    """

    def __init__(self, d_nope: int, d_v: int) -> None:
        self.d_nope, self.d_v = d_nope, d_v
        self.rebuilt = 0  # times that they were made
        self._key: Any = None
        self._weights: tuple[torch.Tensor, torch.Tensor] | None = None
        self._refusal = ""  # why there are none for this key
        self._probe: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parts: list[tuple[nn.Module, list[str]]] = []

    def get(
        self, projection: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two weights in dtype on device. Raises NotAbsorbable."""
        weight = _plain_weight(projection)
        if weight is not None and weight.dtype == dtype and weight.device == device:
            key = (id(projection), id(weight), weight.data_ptr())
            if key != self._key:
                self._weights = self._split(weight.detach())
                self._key, self._probe, self._parts, self._refusal = key, None, [], ""
                self.rebuilt += 1
            return self._weights
        if (id(projection), dtype, device, self._state()) != self._key:
            self._parts = _parts(projection)  # anew: they may be others now
            self._key = (id(projection), dtype, device, self._state())
            self._refusal, self._probe = "", None
            self.rebuilt += 1
            try:
                self._weights = self._effective(projection, dtype, device)
            except NotAbsorbable as refusal:
                self._refusal = str(refusal)
        if self._refusal:
            raise NotAbsorbable(self._refusal)
        return self._weights

    def views(self, projection: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The two weights as views, where `get` found that they are: what a compiled step uses, which
        takes parameters, unlike other tensors, for what stays where it is."""
        return None if self._parts else self._split(projection.weight)

    def recheck(self, projection: nn.Module) -> None:
        """Drops weights that are no longer what the projection does, for a change that leaves no trace on
        its tensors (`tensor.data`). Views need no check. Synchronises."""
        if self._probe is not None:
            given, result = self._probe
            if not torch.equal(projection(given), result):
                self._key = None

    def _split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        by_head = weight.view(-1, self.d_nope + self.d_v, D_LATENT)
        return by_head[:, : self.d_nope], by_head[:, self.d_nope :].transpose(1, 2)

    def _effective(
        self, projection: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = torch.zeros((1, 1, D_LATENT + 2, D_LATENT), dtype=dtype, device=device)
        given[0, 0, :D_LATENT] = torch.eye(D_LATENT, dtype=dtype, device=device)
        # Then a vector to test with, and zero, which shows a bias.
        given[0, 0, D_LATENT] = torch.linspace(-1, 1, D_LATENT, dtype=torch.float32, device=device)
        result = projection(given)
        if not isinstance(result, torch.Tensor) or result.dtype != dtype:
            raise NotAbsorbable(f"kv_b_proj gives {getattr(result, 'dtype', type(result))}")
        weight = result[0, 0, :D_LATENT].T.contiguous()
        if weight.shape[0] % (self.d_nope + self.d_v):
            raise NotAbsorbable(
                f"kv_b_proj gives {weight.shape[0]} values, no multiple of {self.d_nope + self.d_v}"
            )
        if result[0, 0, D_LATENT + 1].any():
            raise NotAbsorbable("kv_b_proj has a bias")
        vector = given[0, 0, D_LATENT].double()
        error = (result[0, 0, D_LATENT].double() - weight.double() @ vector).abs()
        size = (weight.double() * vector).norm(dim=1)
        if not bool((error <= _ROUGHNESS * size + torch.finfo(dtype).tiny).all()):
            raise NotAbsorbable("kv_b_proj is not linear")
        probe = given[:, :, D_LATENT : D_LATENT + 1].clone()
        self._probe = probe, projection(probe)
        return self._split(weight)

    def _state(self) -> tuple:
        """Changes when a tensor or a setting of the projection does."""
        return tuple(
            _mark(vars(module).get(name)) for module, names in self._parts for name in names
        )


def _plain_weight(projection: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer that it may stand for: no subclass, bias, hook or own forward."""
    if type(projection) is not nn.Linear or projection.bias is not None:
        return None
    if projection._forward_hooks or projection._forward_pre_hooks:
        return None
    weight = projection.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_contiguous()
    return weight if plain and "forward" not in projection.__dict__ else None


def _parts(projection: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Modules and those of their attributes that decide what the projection does."""
    looked_at = (*_PLAIN_VALUES, torch.Tensor, list, tuple, dict, set)
    return [
        (module, [name for name, value in vars(module).items() if isinstance(value, looked_at)])
        for module in projection.modules()
    ]


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        pointer = 0 if value.device.type == "meta" else value.data_ptr()
        version = 0 if value.is_inference() else value._version
        return (id(value), pointer, version)
    if isinstance(value, _PLAIN_VALUES):
        return value
    if isinstance(value, dict):
        return tuple((key, _mark(item)) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(_mark(item) for item in value)
    return id(value)
