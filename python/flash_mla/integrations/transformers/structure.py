"""Which modules of a model are attention layers that can run absorbed: found by what they have and do, not by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .cache import D_LATENT, D_ROPE

CACHE_NAMES = (
    "past_key_values",
    "cache",
)  # the argument's name, before and since Transformers 5.19
_SIZES = {
    "kv_lora_rank": D_LATENT,
    "qk_rope_head_dim": D_ROPE,
    "qk_nope_head_dim": None,
    "v_head_dim": None,
    "layer_idx": None,
}


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all layers of multi-head latent attention."""
    for name, module in model.named_modules():
        if hasattr(module, "kv_lora_rank") and isinstance(
            getattr(module, "kv_b_proj", None), nn.Module
        ):
            yield name, module


def obstacle(module: nn.Module) -> str:
    """Why a layer cannot run absorbed; empty when it can."""
    if not callable(getattr(type(module), "expand_kv", None)):
        return "it has no expand_kv: it does not cache latents"
    if not hasattr(module, "config") or not isinstance(getattr(module, "scaling", None), float):
        return "it has no config or no scaling"
    for name, wanted in _SIZES.items():
        value = getattr(module, name, None)
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{name} is {value!r}, wanted an int"
        if wanted not in (None, value):
            return f"{name} is {value}, wanted {wanted}"
    if getattr(module, "indexer", None) is not None:
        return "its attention is sparse (it has an indexer)"
    if getattr(module, "sliding_window", None) is not None:
        return "its attention has a sliding window"
    if not getattr(module, "is_causal", True):
        return "its attention is not causal"
    return _expansion_obstacle(module)


def latent_type(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Of the latents that a layer makes: what its norm has, as projections may be quantised."""
    weight = getattr(getattr(module, "kv_a_layernorm", None), "weight", None)
    if weight is None:
        weight = next(module.parameters())
    return weight.dtype, weight.device


def _expansion_obstacle(module: nn.Module) -> str:
    """Asks expand_kv with two tokens: keys must be [W_UK c, k_rot], values W_UV c, by head."""
    reference = next(module.parameters(), None)
    if reference is None or reference.device.type == "meta":
        return ""  # nothing to ask with yet
    dtype, device = latent_type(module)
    if not dtype.is_floating_point:
        return f"its latents are {dtype}"

    def ramp(width: int) -> torch.Tensor:
        values = torch.linspace(-1, 1, 2 * width, dtype=torch.float32, device=device)
        return values.view(1, 1, 2, width).to(dtype)

    latent, rope = ramp(D_LATENT), ramp(D_ROPE)
    d_nope, d_v = module.qk_nope_head_dim, module.v_head_dim
    try:
        with torch.no_grad():
            keys, values = type(module).expand_kv(module, latent, rope)
            by_head = module.kv_b_proj(latent)[0, 0].unflatten(-1, (-1, d_nope + d_v))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"its expand_kv fails: {str(error).splitlines()[0]}"
    heads = by_head.shape[1]
    by_head = by_head.transpose(0, 1)[None]
    same = (
        keys.shape == (1, heads, 2, d_nope + D_ROPE)
        and torch.equal(keys[..., d_nope:], rope.expand(-1, heads, -1, -1))
        and torch.equal(keys[..., :d_nope], by_head[..., :d_nope])
        and torch.equal(values, by_head[..., d_nope:])
    )
    return "" if same else "its expand_kv is not the known one"


def decoder_of(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The module that plans a forward pass for an attention layer: the nearest one round it that takes
    token ids or embeddings, a mask and a cache; else the layer itself."""
    path = name
    while True:
        module = model.get_submodule(path) if path else model
        wanted = arguments_of(module)
        if "attention_mask" in wanted and {"input_ids", "inputs_embeds"} & set(wanted):
            if any(cache in wanted for cache in CACHE_NAMES):
                return path, module
        if not path:
            return name, model.get_submodule(name) if name else model
        path = path.rpartition(".")[0]


def arguments_of(module: nn.Module) -> list[str]:
    """Names of what the module's forward takes, in order; those behind decorators are found."""
    function: Any = inspect.unwrap(type(module).forward)
    return list(inspect.signature(function).parameters)[1:]


def has_other_attention(decoder: nn.Module, taken: set[nn.Module]) -> bool:
    """Whether layers that are not taken get the mask too."""
    return any(
        hasattr(module, "layer_idx") and module not in taken and _attends(module)
        for module in decoder.modules()
    )


def _attends(module: nn.Module) -> bool:
    """NOTE: decoder layers (LongCat-Flash's) may have a layer_idx too, and hand the mask on to what they hold."""
    return not any(hasattr(child, "layer_idx") for child in module.children()) and not any(
        hasattr(grandchild, "layer_idx")
        for child in module.children()
        for grandchild in child.children()
    )
