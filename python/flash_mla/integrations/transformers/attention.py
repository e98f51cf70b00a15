"""Absorbed attention of one layer, and the place where it steps in for the model's own.

    q'[h] = W_UK[h]^T q_nope[h]          the query in the space of the latents
    o'[h] = attention(q', latents)       over the pages as they are
    o[h]  = W_UV[h] o'[h]

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and appendix C. The model's own module makes the
queries (with its RoPE), calls the cache, then `expand_kv`, then the attention function that its
config names. So two attributes of the module are replaced: `expand_kv`, which passes latents of
ours on as they are, and `config`, which names our function for that one call; and the norms and
RoPE get a shorter way (norms.py, rope.py).
"""

from __future__ import annotations

import copy
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import flash_mla

from . import norms, rope
from .cache import D_LATENT, D_ROPE, LatentLayer
from .static import is_pages
from .weights import AbsorbedWeights

if TYPE_CHECKING:
    from .controller import Controller

NAME = "mla_absorbed"  # of the attention function; one with "flash" in it gets the masks of FlashAttention
_UNSUPPORTED = {"sliding_window", "softcap", "s_aux", "position_bias", "indices"}


class LayerConfig:
    """A module's config, read through; it names our attention function while a call is to run absorbed."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_flash_mla_config"] = config
        self.__dict__["_flash_mla_absorb"] = False

    @property
    def _attn_implementation(self) -> str:
        return NAME if self._flash_mla_absorb else self._flash_mla_config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_flash_mla_config" not in self.__dict__:
            raise AttributeError(name)  # also while a copy is being made
        return getattr(self._flash_mla_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self._flash_mla_config, name, value)


class AbsorbedLayer:
    """What is kept beside an attention module that can run absorbed (`module._flash_mla`)."""

    def __init__(self, controller: Controller, name: str, module: nn.Module) -> None:
        self.controller = controller
        self.name = name
        self.index = module.layer_idx
        self.d_nope = module.qk_nope_head_dim
        self.weights = AbsorbedWeights(module.qk_nope_head_dim, module.v_head_dim)
        self.obstacle = ""  # why it cannot run absorbed at the moment
        self.ready: tuple[torch.Tensor, torch.Tensor] | None = None  # its weights, for this step
        self.pending: LatentLayer | None = None  # between expand_kv and the attention function

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsorbedLayer:
        """A copy of an enabled model is enabled."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made

    def __reduce__(self) -> Any:
        # What is loaded would be half enabled: methods of an instance do not come back from a pickle.
        raise TypeError("flash_mla: an enabled model cannot be pickled; disable(model) first")


def attach(module: nn.Module, layer: AbsorbedLayer) -> None:
    """Lets `layer` step in for the module's own attention."""
    AttentionInterface.register(NAME, _attend)
    # Nothing asks for a mask by this name; if something does, it must not get none at all.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module._flash_mla = layer
    module.config = LayerConfig(module.config)
    module.expand_kv = types.MethodType(_expand_kv, module)
    norms.attach(module, layer)
    rope.attach(module)


def detach(module: nn.Module) -> None:
    """Takes back what `attach` did."""
    rope.detach(module)
    norms.detach(module)
    module.config = module.config._flash_mla_config
    del module.expand_kv, module._flash_mla


def _expand_kv(
    module: nn.Module, kv_nope: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    own = type(module).expand_kv
    if is_pages(kv_nope):  # of a static cache, with the lengths in k_rot's place
        module.config._flash_mla_absorb = True
        return kv_nope, k_rot
    if torch.compiler.is_compiling():
        return own(module, kv_nope, k_rot)
    layer = module._flash_mla
    layer.pending = getattr(kv_nope, "_flash_mla_layer", None)
    module.config._flash_mla_absorb = layer.pending is not None
    if layer.pending is not None:
        del kv_nope._flash_mla_layer
        return kv_nope, k_rot
    layer.controller.count(layer, absorbed=False)
    return own(module, kv_nope, k_rot)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function, in Transformers' form. query (b, h, s_q, d_nope + 64); key and value are
    pages and lengths of a static cache, or not looked at. Returns (b, s_q, h, d_v) and no weights."""
    layer = module._flash_mla
    module.config._flash_mla_absorb = False
    if is_pages(key):
        return _attend_static(module, query, key, value, scaling), None
    latents, layer.pending = layer.pending, None
    for name in _UNSUPPORTED & kwargs.keys():
        if kwargs[name] is not None:
            raise NotImplementedError(f"flash_mla: {name} of {layer.name} is not supported")
    b, h, s_q, _ = query.shape
    w_uk, w_uv = layer.ready
    tensors = latents.rows.tensors(latents.device)

    n = b * s_q
    heads = query.transpose(0, 1).reshape(h, n, -1)  # a view where b or s_q is 1
    if tensors.order is not None:
        heads = heads[:, tensors.order]
    nope, rope = heads.split_with_sizes((layer.d_nope, D_ROPE), 2)
    # Kept for the layers and steps that follow where it is small; a chunk's would take up memory.
    kept = tensors.queries if s_q == 1 else {}
    q, q_latent, q_rope = _query_room(query, kept)
    torch.bmm(nope, w_uk, out=q_latent)
    q_rope.copy_(rope)
    out, _ = flash_mla.flash_mla_with_kvcache(
        q,
        latents.pages,
        tensors.table,
        tensors.lengths,
        D_LATENT,
        None,  # a plan is a hint, and takes a launch to write
        softmax_scale=scaling,
        causal=True,
    )
    result = query.new_empty(n, h, w_uv.shape[2])
    torch.bmm(out.view(n, h, -1).transpose(0, 1), w_uv, out=result.transpose(0, 1))
    if tensors.order is not None:
        result = torch.empty_like(result).index_copy_(0, tensors.order, result)
    layer.controller.count(layer, absorbed=True)
    return result.view(b, s_q, h, -1), None


def _query_room(query: torch.Tensor, kept: dict[Any, Any]) -> tuple[torch.Tensor, ...]:
    """Room for an absorbed query (b, s_q, h, 576), and its two parts by head, (h, b * s_q, 512 and 64).

    Layers run one after the other in one stream, and nobody else sees a query: one is enough for all
    layers of a device. `kept` belongs to steps of one b and s_q.
    """
    b, h, s_q, _ = query.shape
    key = (h, query.dtype)
    if key not in kept:
        with torch.inference_mode(False):  # it outlives it
            q = torch.empty((b, s_q, h, D_LATENT + D_ROPE), dtype=query.dtype, device=query.device)
            by_head = q.view(b * s_q, h, -1).transpose(0, 1)
            kept[key] = q, *by_head.split_with_sizes((D_LATENT, D_ROPE), 2)
    return kept[key]


def _attend_static(
    module: nn.Module,
    query: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """The same for a static cache, in operations that compile."""
    layer = module._flash_mla
    b, h, s_q, _ = query.shape
    w_uk, w_uv = layer.weights.views(module.kv_b_proj) or layer.ready
    rows = query.transpose(1, 2).reshape(b * s_q, h, -1)
    latent = torch.bmm(rows[..., : layer.d_nope].transpose(0, 1), w_uk).transpose(0, 1)
    q = torch.cat((latent, rows[..., layer.d_nope :]), dim=-1).view(b, s_q, h, -1)
    table = pages._flash_mla_table
    out, _ = flash_mla.flash_mla_with_kvcache(
        q, pages, table, lengths, D_LATENT, None, softmax_scale=scaling, causal=True
    )
    result = torch.bmm(out.view(b * s_q, h, -1).transpose(0, 1), w_uv).transpose(0, 1)
    if not torch.compiler.is_compiling():
        layer.controller.count(layer, absorbed=True)
    return result.reshape(b, s_q, h, -1)
