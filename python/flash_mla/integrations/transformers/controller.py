"""Plans the forward passes of a model: which run absorbed, which on the model's own attention, and counts both."""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

import flash_mla

from . import cache as _cache
from . import masks, structure
from .attention import AbsorbedLayer
from .cache import LatentLayer
from .rows import KEEP
from .static import StaticLatentLayer
from .weights import NotAbsorbable

_STATIC = {StaticLayer, StaticLatentLayer}
_KNOWN = {DynamicLayer, LatentLayer, *_STATIC}
_DTYPES = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16),
}


class Controller:
    """Settings and counts of one `enable`.

    `calls` counts calls of attention layers: "absorbed"; "prefill" (nothing was cached yet) and
    "long chunk" (more new tokens than max_s_q), which run the model's own attention by design; and
    "fallback", whose `reasons` are counted too, each with one warning.
    """

    def __init__(self, max_s_q: int, max_pages: int | None) -> None:
        self.max_s_q, self.max_pages = max_s_q, max_pages
        self.decoders: list[Decoder] = []
        self.left: dict[str, str] = {}  # why layers were not taken, by name
        self.compiled: dict[torch.device, torch.Tensor] = {}  # calls that ran absorbed in graphs
        self.calls: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.kind = "prefill"  # of calls that do not run absorbed, in this forward pass
        self.reason = ""
        self.absorbs = False  # whether this forward pass runs absorbed
        self._warned: set[str] = set()

    def count(self, layer: AbsorbedLayer, absorbed: bool) -> None:
        if absorbed:
            self.calls["absorbed"] += 1
            return
        kind = "fallback" if self.reason else self.kind
        self.calls[kind] += 1
        if kind == "fallback":
            self.reasons[self.reason or layer.obstacle] += 1

    @property
    def counts(self) -> dict[str, int]:
        kinds = ("absorbed", "prefill", "long chunk", "fallback")
        counts = {kind: self.calls[kind] for kind in kinds}
        counts["absorbed"] += sum(int(counter) for counter in self.compiled.values())
        return counts

    def counter_on(self, device: torch.device) -> torch.Tensor:
        """Where graphs on a device count, () int64."""
        if device not in self.compiled:
            with torch.inference_mode(False):
                self.compiled[device] = torch.zeros((), dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(self.compiled[device])
        return self.compiled[device]

    def fall_back(self, reason: str) -> None:
        """This forward pass runs on the model's own attention."""
        self.reason = reason
        self.warn(reason)

    def warn(self, reason: str) -> None:
        """Says, once for each reason, that the model's own attention runs."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"flash_mla: the model's own attention runs: {reason}", stacklevel=2)


@dataclasses.dataclass
class _Call:
    """What a decoder's forward was given."""

    arguments: dict[str, Any]
    cache: Any
    mask: Any
    tokens: torch.Tensor  # ids or embeddings: (b, s_q, ...)
    b: int
    s_q: int


class Decoder:
    """The module of a model that is called with a cache and a mask, and its layers that can run absorbed.

    `before` is its forward pre-hook.
    """

    def __init__(
        self, controller: Controller, module: nn.Module, layers: dict[int, nn.Module]
    ) -> None:
        self.controller = controller
        self.module = module
        self.layers = layers  # attention modules by their index in the cache
        self.names = structure.arguments_of(module)
        # Where nobody else needs the mask, absorbed steps do without one.
        self.owns_mask = "hidden_states" not in self.names and not structure.has_other_attention(
            module, set(layers.values())
        )
        self._ready_masks: dict[torch.device, torch.Tensor] = {}
        self.handle = module.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Decides how the coming forward pass runs, and makes room for its tokens.

        Raises MemoryError when pages run out, and ValueError for a mask that asks for tokens which
        are not cached. Nothing has changed then.
        """
        if torch.compiler.is_compiling():
            return None  # what is compiled is the model's own attention
        call = self._read(args, kwargs)
        control = self.controller
        control.kind, control.reason, control.absorbs = "prefill", "", False
        if not self._plan(call) or not self.owns_mask:
            return None
        # A mask with four axes passes for one that is ready: no layer builds one or looks at it.
        mask = self._ready_masks.get(call.tokens.device)
        if mask is None:
            mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=call.tokens.device)
            self._ready_masks[call.tokens.device] = mask
        position = self.names.index("attention_mask")
        if position < len(args):
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> _Call:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        names = ("input_ids", "inputs_embeds", "hidden_states")
        tokens = next(given[name] for name in names if given.get(name) is not None)
        return _Call(
            given,
            next((given[n] for n in structure.CACHE_NAMES if given.get(n) is not None), None),
            given.get("attention_mask"),
            tokens,
            *tokens.shape[:2],
        )

    def _plan(self, call: _Call) -> bool:
        """Plans a forward pass. Returns whether every layer runs absorbed."""
        control = self.controller
        held = getattr(call.cache, "layers", [])
        held = {index: held[index] for index in self.layers if index < len(held)}
        kinds = {type(layer) for layer in held.values()}
        if kinds and kinds <= _STATIC:
            return self._plan_static(call, held)
        rows = _rows_of(held) if LatentLayer in kinds else None
        length = rows.length if rows else _length_of(held)
        reason = self._obstacle(call, held, length)
        if length and self._wants_gradients(call):
            reason = reason or "gradients are wanted (it is not under torch.no_grad())"
            rows = _give_back(call.cache, rows)
        if not length:
            self._recheck_weights()
        elif call.s_q > control.max_s_q:
            control.kind = "long chunk"
        absorbed = bool(length) and not reason and call.s_q <= control.max_s_q
        mask, unknown = call.mask, ""
        if absorbed or rows:
            mask, unknown = _padding(call, length, rows)
        if absorbed and unknown:
            absorbed, reason = False, unknown
        if absorbed:
            self._make_ready(held)
            control.absorbs = True
            if kinds != {LatentLayer}:
                self._adopt(call, held, None if mask is KEEP else mask)
                rows = _rows_of(held)
        if rows:
            if rows.batch != call.b:
                raise ValueError(
                    f"flash_mla: {call.b} rows of tokens, the cache holds {rows.batch}"
                )
            rows.begin(call.s_q, mask, absorbed)
        if reason:
            control.fall_back(reason)
        if not absorbed:
            return False
        control.kind = "fallback"  # of the layers that cannot
        obstacles = set()
        for index, layer in held.items():
            obstacle = self.layers[index]._flash_mla.obstacle
            if type(layer) is LatentLayer:
                layer.absorbs = not obstacle
            if obstacle:
                obstacles.add(obstacle)
        for obstacle in sorted(obstacles):
            control.warn(obstacle)
        return rows is not None and not obstacles

    def _adopt(self, call: _Call, held: dict[int, Any], mask: Any) -> None:
        """Moves the layers of a cache that can be into pages, and says of the others why not."""
        able = [
            i for i in held if not self.layers[i]._flash_mla.obstacle and not _is_unused(held[i])
        ]
        present = list(held)
        held.clear()  # what is moved into pages must be free to go
        left = _cache.adopt(call.cache, able, mask, self.controller.max_pages)
        for index, why in left.items():
            self.layers[index]._flash_mla.obstacle = why
        held.update((index, call.cache.layers[index]) for index in present)

    def _plan_static(self, call: _Call, held: dict[int, Any]) -> bool:
        """Plans a pass over a static cache. Returns whether every layer runs absorbed.

        Keys and values stay where Transformers looks for them, so any pass may fall back. Later ones
        may be compiled and come by here no more: what this decides at prefill holds for them.
        """
        control = self.controller
        length = max(int(layer.get_seq_length()) for layer in held.values())
        reason = self._obstacle(call, held, length)
        if self._wants_gradients(call):
            reason = reason or "gradients are wanted (it is not under torch.no_grad())"
        if not reason and not _is_dense(call, length):
            reason = "there is padding, or more than padding, in the mask of a static cache"
        if length == 0:
            self._recheck_weights()
            if not reason:
                reason = self._adopt_static(call, held)
                held = {index: call.cache.layers[index] for index in held}
        elif not reason and any(type(layer) is StaticLayer for layer in held.values()):
            obstacles = [self.layers[index]._flash_mla.obstacle for index in held]
            reason = next(filter(None, obstacles), "the static cache was filled before")
        elif call.s_q > control.max_s_q:
            control.kind = "long chunk"
        absorbed = bool(length) and not reason and call.s_q <= control.max_s_q
        control.absorbs = absorbed
        for layer in held.values():
            if type(layer) is StaticLatentLayer:
                layer.absorbs, layer.goes_on = absorbed, not reason
        if reason:
            control.fall_back(reason)
        return absorbed

    def _adopt_static(self, call: _Call, held: dict[int, Any]) -> str:
        """Puts pages in the place of an empty static cache's layers, or says why not."""
        for index in held:
            module = self.layers[index]
            layer = module._flash_mla
            dtype, device = structure.latent_type(module)
            layer.obstacle = _device_obstacle(dtype, device)
            if layer.obstacle:
                return layer.obstacle
            try:
                layer.ready = layer.weights.get(module.kv_b_proj, dtype, device)
            except NotAbsorbable as refusal:
                layer.obstacle = str(refusal)
                return layer.obstacle
            for tensor in layer.ready:
                torch._dynamo.mark_static_address(tensor)
        for number, (index, old) in enumerate(held.items()):
            made = StaticLatentLayer(old.max_cache_len, self.controller.max_s_q)
            if number == 0:
                device = structure.latent_type(self.layers[index])[1]
                made.counter, made.counts = self.controller.counter_on(device), len(held)
            call.cache.layers[index] = made
        return ""

    def _obstacle(self, call: _Call, held: dict[int, Any], length: int) -> str:
        """Why a call cannot run absorbed, as far as its arguments tell."""
        cache = call.cache
        if self.module.training:
            return "the model is in training mode"
        for layer in held.values():
            if type(layer) not in _KNOWN:
                return (
                    f"the cache has a {type(layer).__name__}, wanted a DynamicLayer or StaticLayer"
                )
        if getattr(cache, "offloading", False):
            return "the cache is offloaded"
        if held and type(cache).get_mask_sizes is not Cache.get_mask_sizes:
            return f"the cache is a {type(cache).__name__}"
        attentions = getattr(self.module.config, "output_attentions", False)
        if length and call.arguments.get("output_attentions", attentions):
            return "output_attentions is set"
        return ""

    def _wants_gradients(self, call: _Call) -> bool:
        """Whether gradients flow through the layers: of what the decoder has, or of what it is given."""
        return torch.is_grad_enabled() and (
            call.tokens.requires_grad
            or any(parameter.requires_grad for parameter in self.module.parameters())
        )

    def _recheck_weights(self) -> None:
        for module in self.layers.values():
            module._flash_mla.weights.recheck(module.kv_b_proj)

    def _make_ready(self, held: dict[int, Any]) -> None:
        """Gets each layer's absorbed weights, or says why there are none."""
        for index, cached in held.items():
            module = self.layers[index]
            layer = module._flash_mla
            if type(cached) is LatentLayer:  # what it is made of was looked at then
                dtype, device, layer.obstacle = cached.dtype, cached.device, ""
            elif _is_unused(cached):
                continue
            else:
                dtype, device = cached.keys.dtype, cached.keys.device
                layer.obstacle = _device_obstacle(dtype, device)
                if layer.obstacle:
                    continue
            try:
                layer.ready = layer.weights.get(module.kv_b_proj, dtype, device)
            except NotAbsorbable as refusal:
                layer.obstacle = str(refusal)


def _rows_of(held: dict[int, Any]) -> Any:
    return next((layer.rows for layer in held.values() if type(layer) is LatentLayer), None)


def _length_of(held: dict[int, Any]) -> int:
    lengths = (layer.get_seq_length() for layer in held.values() if type(layer) is DynamicLayer)
    return max(lengths, default=0)


def _is_unused(cached: Any) -> bool:
    """A layer of the cache that was never called, as when a model exits early."""
    return type(cached) is DynamicLayer and not cached.is_initialized


def _give_back(cache: Any, rows: Any) -> None:
    """Moves latents out of pages: gradients flow through a `DynamicLayer`'s tensors."""
    if rows is None:
        return
    if rows.real is not None:
        raise RuntimeError(
            "flash_mla: gradients are wanted of a cache whose padding was not kept; call it under torch.no_grad(), or "
            "disable(model) before the first call"
        )
    _cache.release(cache)


def _is_dense(call: _Call, length: int) -> bool:
    """Whether a mask is causal and no more. Synchronises."""
    mask = call.mask
    if mask is None:
        return True
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1] >= length + call.s_q and bool(mask[:, : length + call.s_q].all())
    padding = masks.padding_of(masks.visible_of(mask), call.b, call.s_q, length)
    return padding is not None and bool(padding.all())


def _padding(call: _Call, length: int, rows: Any) -> tuple[Any, str]:
    """The mask for `LatentRows.begin`, and why a step with this mask cannot run absorbed."""
    mask = call.mask
    if mask is None:
        return None, ""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if mask.shape[1] >= length + call.s_q:
            return mask, ""
        reason = "the attention_mask is shorter than what is cached"
        visible = mask.ne(0)[:, None, None, :]
    else:
        reason = "the attention mask is more than causal with padding"
        visible = masks.visible_of(mask)
        padding = masks.padding_of(visible, call.b, call.s_q, length)
        if padding is not None:
            return padding, ""
    if rows is not None and rows.real is not None:
        if visible is None or masks.sees(visible, rows.real.eq(0)):
            raise ValueError(
                "flash_mla: the attention mask asks for tokens that an earlier one called padding; those are not cached"
            )
    return KEEP, reason


@functools.cache
def _device_obstacle(dtype: torch.dtype, device: torch.device) -> str:
    dtypes = _DTYPES.get(device.type)
    if dtypes is None:
        return f"the model is on {device}"
    if dtype not in dtypes:
        names = ", ".join(str(name).removeprefix("torch.") for name in dtypes)
        return f"the latents are {str(dtype).removeprefix('torch.')} on {device}, wanted {names}"
    if device.type == "cuda":
        for found in flash_mla.info()["devices"]:
            if found["index"] == (device.index or 0):
                return "" if found["supported"] else found["why_not"]
        return f"this build cannot use {device}"
    return ""
