"""The layer of a StaticCache: pages with a fixed place for every token, for steps that torch.compile traces.

Shapes never change, lengths are on the device, and nothing is decided by values, so that the step
compiles as one graph and replays as a CUDA graph. Tokens keep their padded places: with padding in
a row the model's own attention runs, which finds keys and values where it would have put them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from flash_mla import append_kv_cache

from .rows import PAGE_SIZE

D_LATENT, D_ROPE = 512, 64


class StaticLatentLayer(StaticLayer):
    """A `StaticLayer` whose keys and values are views of pages, (b * max_pages, 64, 1, 576).

    Row i owns the pages from i * max_pages on. What is public here decides how a compiled step is
    traced:

    Attributes:
        absorbs: whether the coming `update` hands out pages and lengths.
        goes_on: what `absorbs` is after that: a prefill, which does not, is followed by steps that do.
        max_s_q: new tokens up to which it does.
        counter: where steps inside compiled graphs are counted, () int64, with `counts` for each.
    """

    def __init__(self, max_cache_len: int, max_s_q: int) -> None:
        super().__init__(max_cache_len)
        self.absorbs = self.goes_on = False
        self.max_s_q = max_s_q
        self.counter: torch.Tensor | None = None
        self.counts = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the base's, in pages. key_states (b, 1, n, 512) and value_states (b, 1, n, 64)."""
        # With an empty batch, for all that is no memory.
        super().lazy_initialization(key_states[:0], value_states[:0])
        self.batch_size = b = key_states.shape[0]
        max_pages = -(-self.max_cache_len // PAGE_SIZE)
        like = {"dtype": key_states.dtype, "device": key_states.device}
        with torch.inference_mode(False):  # they outlive it
            self.pages = torch.zeros((b * max_pages, PAGE_SIZE, 1, D_LATENT + D_ROPE), **like)
            numbers = torch.arange(b * max_pages, dtype=torch.int32, device=key_states.device)
        self.table = numbers.view(b, max_pages)
        self.pages._flash_mla_table = self.table  # goes where the pages go
        padded = self.pages.view(b, 1, max_pages * PAGE_SIZE, -1)[:, :, : self.max_cache_len]
        self.keys, self.values = padded[..., :D_LATENT], padded[..., D_LATENT:]
        if not torch.compiler.is_compiling():
            for tensor in (self.pages, self.table, self.keys, self.values):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new tokens behind those that are cached.

        Returns keys and values over the whole length, as a StaticLayer does; where the step is to
        run absorbed, the pages and the rows' lengths, (b,) int32, which `expand_kv` knows by their
        shape.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        s_q = key_states.shape[2]
        position = torch.arange(s_q, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(s_q)
        slots = (self.table[:, :1].long() * PAGE_SIZE + position).flatten()
        latents = key_states.detach().reshape(-1, D_LATENT)
        ropes = value_states.detach().reshape(-1, D_ROPE)
        if torch.compiler.is_compiling():  # in operations that fuse with what comes before
            self.pages.index_put_(
                (slots // PAGE_SIZE, slots % PAGE_SIZE),
                torch.cat((latents, ropes), -1)[:, None],
            )
        else:
            append_kv_cache(latents, ropes, self.pages, slots)
        absorbed, self.absorbs = self.absorbs and s_q <= self.max_s_q, self.goes_on
        if not absorbed:
            return self.keys, self.values
        if self.counter is not None and torch.compiler.is_compiling():
            self.counter.add_(self.counts)
        lengths = self.cumulative_length.to(torch.int32).expand(self.table.shape[0])
        return self.pages, lengths.contiguous()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows keep their places, which compiled steps know; contents move."""
        rows = self.pages.view(self.table.shape[0], -1)
        rows.copy_(rows.index_select(0, beam_idx.to(self.device)))


def is_pages(tensor: torch.Tensor) -> bool:
    """Whether what `update` returned first are pages."""
    return tensor.shape[-1] == D_LATENT + D_ROPE
