"""The paged latent KV cache: writing new tokens, and a page allocator for callers without an engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _errors
from .pages import Pages

_append = torch.ops.flash_mla.append_kv_cache.default

_D_LATENT = 512
_D_ROPE = 64


def append_kv_cache(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    format: str | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """Writes new tokens into a paged cache: row slot_mapping[i] becomes concat(kv_c[i], k_pe[i]).

    Args:
        kv_c: (t, 512) latents, bfloat16 or float16, on the CPU float32 too; last axis contiguous.
        k_pe: (t, 64) keys after RoPE, dtype of kv_c; last axis contiguous.
        kv_cache: (num_pages, page_size, 1, 576) or (num_pages, page_size, 576), dtype of kv_c; last
            axis contiguous. Written.
        slot_mapping: (t,) int64 contiguous, page * page_size + offset; a negative slot skips its
            token. A slot past the end is an error on the CPU (nothing is written) and skipped on a
            GPU.
        format, scale: for fp8 caches, not supported yet.

    Runs in the current stream, without synchronising; may be captured in a CUDA graph.

    Raises ValueError for wrong shapes, strides, devices or slots, TypeError for wrong types,
    NotImplementedError for fp8.
    """
    if format is not None or scale is not None:
        raise _errors.unsupported("append_kv_cache", "format" if format is not None else "scale")
    try:
        _append(kv_c, k_pe, kv_cache, slot_mapping)
    except RuntimeError as error:
        _errors.raise_translated(
            error,
            "append_kv_cache",
            kv_c=kv_c,
            k_pe=k_pe,
            kv_cache=kv_cache,
            slot_mapping=slot_mapping,
        )


@dataclass(frozen=True)
class CacheUsage:
    """How full a cache is: `page_fraction` of the pages is used, `token_fraction` of their slots."""

    num_pages: int
    used_pages: int
    tokens: int
    page_fraction: float
    token_fraction: float


@dataclass
class _Request:
    pages: list[int]
    tokens: int


class PagedKVCache:
    """A latent cache cut into pages, and who owns them.

    Args:
        num_pages, page_size: 1 or more; a GPU decodes pages of 64 tokens.
        dtype: torch.bfloat16 or torch.float16, on the CPU torch.float32 too.
        device: where `kv_cache` and all tensors that the methods return live.

    Attributes:
        kv_cache: (num_pages, page_size, 1, 576), uninitialised.

    Bookkeeping is on the host. A method that raises has changed nothing; running out of pages
    raises MemoryError.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages = _count("PagedKVCache: num_pages", num_pages, least=1)
        self.page_size = _count("PagedKVCache: page_size", page_size, least=1)
        self.kv_cache = torch.empty(
            (self.num_pages, self.page_size, 1, _D_LATENT + _D_ROPE), dtype=dtype, device=device
        )
        self._pages = Pages(self.num_pages)
        self._requests: dict[Hashable, _Request] = {}

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._requests)

    @property
    def device(self) -> torch.device:
        return self.kv_cache.device

    def allocate(self, request_id: Hashable, tokens: int = 0) -> torch.Tensor:
        """Adds a request with room for `tokens` tokens. Returns their slots, (tokens,) int64."""
        if request_id in self._requests:
            raise ValueError(f"PagedKVCache.allocate: request {request_id!r} exists already")
        return self._extend(_Request([], 0), request_id, tokens, "allocate")

    def grow(self, request_id: Hashable, tokens: int = 1) -> torch.Tensor:
        """Makes room for `tokens` more tokens of a request. Returns their slots, (tokens,) int64."""
        return self._extend(self._request(request_id, "grow"), request_id, tokens, "grow")

    def append(self, request_id: Hashable, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
        """Makes room for kv_c.shape[0] more tokens of a request and writes them; shapes as for `append_kv_cache`."""
        _errors.require_tensors("PagedKVCache.append", kv_c=kv_c, k_pe=k_pe)
        request = self._request(request_id, "append")
        pages, tokens = len(request.pages), request.tokens
        slots = self.grow(request_id, kv_c.shape[0] if kv_c.dim() else 0)
        try:
            append_kv_cache(kv_c, k_pe, self.kv_cache, slots)
        except Exception:
            self._pages.release(request.pages[pages:])
            del request.pages[pages:]
            request.tokens = tokens
            raise

    def free(self, request_id: Hashable) -> None:
        """Removes a request; its pages may be given to others."""
        request = self._request(request_id, "free")
        del self._requests[request_id]
        self._pages.release(request.pages)

    def block_table(self, request_ids: Sequence[Hashable]) -> torch.Tensor:
        """Page numbers of requests, (b, max_pages) int32; rows of shorter requests are padded with 0."""
        rows = [self._request(request_id, "block_table").pages for request_id in request_ids]
        width = max((len(row) for row in rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.device).reshape(len(rows), width)

    def cache_seqlens(self, request_ids: Sequence[Hashable]) -> torch.Tensor:
        """Tokens of requests, (b,) int32."""
        lengths = [self._request(request_id, "cache_seqlens").tokens for request_id in request_ids]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def slot_mapping(
        self, request_id: Hashable, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Slots of tokens start .. stop - 1 of a request, int64; stop defaults to its length."""
        request = self._request(request_id, "slot_mapping")
        stop = request.tokens if stop is None else stop
        if not 0 <= start <= stop <= request.tokens:
            raise ValueError(
                f"PagedKVCache.slot_mapping: start = {start}, stop = {stop}, wanted 0 <= start <= stop <= {request.tokens}"
            )
        return self._slots(request, start, stop)

    @property
    def usage(self) -> CacheUsage:
        """How full the cache is."""
        used = self._pages.used
        tokens = sum(request.tokens for request in self._requests.values())
        return CacheUsage(
            num_pages=self.num_pages,
            used_pages=used,
            tokens=tokens,
            page_fraction=used / self.num_pages,
            token_fraction=tokens / (used * self.page_size) if used else 0.0,
        )

    def _request(self, request_id: Hashable, method: str) -> _Request:
        try:
            return self._requests[request_id]
        except KeyError:
            raise KeyError(f"PagedKVCache.{method}: no request {request_id!r}") from None

    def _extend(
        self, request: _Request, request_id: Hashable, tokens: int, method: str
    ) -> torch.Tensor:
        tokens = _count(f"PagedKVCache.{method}: tokens", tokens, least=0)
        first, last = request.tokens, request.tokens + tokens
        wanted = -(-last // self.page_size) - len(request.pages)
        if wanted > self._pages.free:
            raise MemoryError(
                f"PagedKVCache.{method}: request {request_id!r} needs {wanted} pages, {self._pages.free} of {self.num_pages} are free"
            )
        request.pages.extend(self._pages.take(wanted))
        request.tokens = last
        self._requests[request_id] = request
        return self._slots(request, first, last)

    def _slots(self, request: _Request, start: int, stop: int) -> torch.Tensor:
        size = self.page_size
        slots = [request.pages[token // size] * size + token % size for token in range(start, stop)]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)


def _count(name: str, value: Any, least: int) -> int:
    if not _errors.is_int(value) or value < least:
        raise ValueError(f"{name} = {value!r}, wanted an int of {least} or more")
    return int(value)
