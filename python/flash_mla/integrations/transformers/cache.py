"""The layer of a Transformers cache that keeps latents in pages, and how it comes into a cache and out again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from flash_mla import append_kv_cache

from .rows import KEEP, PAGE_SIZE, LatentRows

D_LATENT, D_ROPE = 512, 64


class LatentLayer(CacheLayerMixin):
    """One layer's latents in pages of 64 tokens, (num_pages, 64, 1, 576).

    A `DynamicLayer` in all that a model or `generate` asks of it: `keys` (b, 1, length, 512) are
    the latents, `values` (b, 1, length, 64) the keys after RoPE, with zeros for padding, which is
    not kept. Rows that a beam search repeats share pages, which are copied when one of them writes.
    Made by `adopt`; layers of one cache share their `rows`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_initialized = True

    def __init__(self, rows: LatentRows, dtype: torch.dtype, device: torch.device) -> None:
        # Not super().__init__(), which would set keys and values; here they are properties.
        self.rows = rows
        self.clock = rows.clock
        self.absorbs = True  # whether the module that this layer serves takes new latents alone
        self.dtype, self.device = dtype, device
        self.pages = self._new_pages(len(rows.pool))

    def __repr__(self) -> str:
        return f"LatentLayer({self.rows.batch} rows, {self.get_seq_length()} tokens, {self.rows.used_pages} pages)"

    @property
    def keys(self) -> torch.Tensor:
        return self.gather()[0]

    @property
    def values(self) -> torch.Tensor:
        return self.gather()[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.rows.used_pages * self.pages[:1].nbytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: a layer starts with the tokens that it adopts."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new tokens into pages.

        Args:
            key_states: (b, 1, s_q, 512) latents, in the layer's dtype and on its device.
            value_states: (b, 1, s_q, 64) keys after RoPE.

        Returns what is cached, with the new tokens, in the padded layout. In a step that is planned
        to run absorbed: the arguments themselves, the first of them marked with this layer.

        Raises MemoryError when pages run out and TypeError for another dtype; nothing is written.
        """
        b, heads, s_q, width = key_states.shape
        if (b, heads, width, value_states.shape[-1]) != (self.rows.batch, 1, D_LATENT, D_ROPE):
            raise ValueError(
                f"flash_mla: the cache holds latents of {self.rows.batch} rows, 512 and 64 wide; got {tuple(key_states.shape)} "
                f"and {tuple(value_states.shape)}"
            )
        if key_states.dtype != self.dtype or value_states.dtype != self.dtype:
            raise TypeError(
                f"flash_mla: latents are {key_states.dtype} and {value_states.dtype}, the cache holds {self.dtype}"
            )
        rows = self.rows
        if self.clock == rows.clock:
            rows.begin(
                s_q, KEEP
            )  # nobody planned the step: all is handed out, for the mask of others
        step = rows.step
        if step.s_q != s_q:
            raise ValueError(f"flash_mla: {s_q} new tokens, the step was planned for {step.s_q}")
        tensors = rows.tensors(self.device)
        if tensors.moves is not None:
            flat = self.pages.view(-1, D_LATENT + D_ROPE)
            flat[tensors.moves[1]] = flat[tensors.moves[0]]
        self._write(key_states, value_states, tensors.slots)
        rows.passed(self)
        if step.absorbed and self.absorbs:
            key_states._flash_mla_layer = self
            return key_states, value_states
        if step.first:
            return key_states, value_states
        return self.gather()

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes all tokens of the rows, given in the padded layout."""
        self._write(keys, values, self.rows.padded_slots(self.device).flatten())

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached, in the padded layout: (b, 1, length, 512) and (b, 1, length, 64)."""
        rows = self.rows
        slots = rows.padded_slots(self.device)
        if self.clock != rows.clock:  # a step is under way, and has not come here yet
            slots = slots[:, : rows.length]
        both = self.pages.view(-1, D_LATENT + D_ROPE)[slots.clamp(min=0)]
        if rows.real is not None:
            both = both.masked_fill((slots < 0)[..., None], 0)
        return both[:, None, :, :D_LATENT], both[:, None, :, D_LATENT:]

    def get_seq_length(self) -> int:
        """Padded tokens."""
        return self.rows.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.rows.follow(
            self, "reorder_cache", beam_idx, lambda: self.rows.select(beam_idx.tolist())
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        def repeat() -> None:
            self.rows.select([row for row in range(self.rows.batch) for _ in range(repeats)])

        self.rows.follow(self, "batch_repeat_interleave", repeats, repeat)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows that `indices` names, by number or by a mask."""

        def select() -> None:
            self.rows.select(torch.arange(self.rows.batch)[indices.to("cpu")].tolist())

        self.rows.follow(self, "batch_select_indices", indices, select)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes off the last -tokens_to_remove padded tokens; a positive number is the length to keep,
        as in Transformers before 5.18."""
        if isinstance(tokens_to_remove, int) and tokens_to_remove == 0:
            return  # generate() says so after every step: it must not cost what other operations do

        def crop() -> None:
            count = int(tokens_to_remove)
            self.rows.crop(-count if count <= 0 else max(self.rows.length - count, 0))

        self.rows.follow(self, "crop", tokens_to_remove, crop)

    def reset(self) -> None:
        """Gives all pages back."""
        self.rows.follow(self, "reset", None, lambda: self.rows.crop(self.rows.length))

    def offload(self) -> None:
        raise NotImplementedError("flash_mla: pages are not offloaded")

    prefetch = offload

    def reserve(self, num_pages: int) -> None:
        """Room for num_pages pages. What is there stays there."""
        held = self.pages.shape[0]
        if num_pages > held:
            pages = self._new_pages(num_pages)
            pages[:held] = self.pages
            self.pages = pages

    def _new_pages(self, num_pages: int) -> torch.Tensor:
        shape = (num_pages, PAGE_SIZE, 1, D_LATENT + D_ROPE)
        try:
            with torch.inference_mode(False):  # they outlive it
                return torch.empty(shape, dtype=self.dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"flash_mla: no memory for {num_pages} pages of a layer ({num_pages * PAGE_SIZE * 576 * self.dtype.itemsize:,} "
                f"bytes) on {self.device}"
            ) from error

    def _write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        append_kv_cache(keys.reshape(-1, D_LATENT), values.reshape(-1, D_ROPE), self.pages, slots)


def adopt(
    cache: Cache, indices: Iterable[int], mask: Any = None, max_pages: int | None = None
) -> dict[int, str]:
    """Moves what a cache holds of some layers into pages, layer by layer.

    Args:
        cache: a cache of `DynamicLayer`s; those that can be are replaced.
        indices: the layers.
        mask: (b, length or more), 0 for padding, or None, as for `LatentRows.begin`.
        max_pages: pages that the rows may use together, None for no limit.

    Returns why a layer stays as it is, by index. Raises MemoryError when pages or memory run out:
    layers that were moved before stay moved, and nothing is lost.
    """
    reasons: dict[int, str] = {}
    rows = next((layer.rows for layer in cache.layers if isinstance(layer, LatentLayer)), None)
    for index in indices:
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, LatentLayer):
            continue
        reason = _obstacle(layer, rows)
        if reason:
            reasons[index] = reason
            continue
        if rows is None:
            rows = LatentRows(layer.keys.shape[0], max_pages)
            length = layer.keys.shape[-2]
            rows.begin(length, mask if mask is None else mask[:, :length])
            rows.started()
        moved = LatentLayer(rows, layer.keys.dtype, layer.keys.device)
        moved.fill(layer.keys, layer.values)
        rows.layers.append(moved)
        cache.layers[index] = moved
    return reasons


def _obstacle(layer: Any, rows: LatentRows | None) -> str:
    """Why a layer's contents cannot move into pages; empty when they can."""
    if type(layer) is not DynamicLayer:
        return f"its cache is a {type(layer).__name__}, wanted a DynamicLayer"
    if not layer.is_initialized or layer.keys.dim() != 4:
        return "its cache is empty"
    keys, values = layer.keys, layer.values
    if (keys.shape[1], keys.shape[3], values.shape[3]) != (1, D_LATENT, D_ROPE):
        return f"its cache holds {tuple(keys.shape)} and {tuple(values.shape)}, wanted latents 512 and 64 wide"
    if keys.dtype != values.dtype:
        return f"its latents are {keys.dtype} and {values.dtype}"
    if rows is not None and (rows.batch, rows.length) != (keys.shape[0], keys.shape[2]):
        return f"its cache holds {keys.shape[2]} tokens of {keys.shape[0]} rows, other layers {rows.length} of {rows.batch}"
    return ""


def release(cache: Cache) -> None:
    """Moves what is in pages back into `DynamicLayer`s, with zeros for padding."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LatentLayer):
            plain = DynamicLayer()
            plain.update(*layer.gather())
            cache.layers[index] = plain
