"""MLA decoding of a text: from its words to an attention layer's output, through a paged cache.

All but the last tokens of each request are compressed into the cache; the last ones are decoded
step by step, all requests together. The outcome is compared with the naive form in float64.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
import zlib
from collections.abc import Sequence

import torch

import flash_mla
from flash_mla.cli.measure import D_V, DTYPES, graph_time, host_clock_time
from flash_mla.cli.mla_layer import Geometry, MlaLayer

PAGE_SIZE = 64
_EMBEDDINGS = 4096  # rows that tokens are hashed to


def tokenize(text: str) -> list[str]:
    """Pieces of at most four letters, the mean length of a language model's tokens. Raises
    ValueError when there is none."""
    tokens = re.findall(r"\w{1,4}|[^\w\s]", text)
    if not tokens:
        raise ValueError("the text has no token in it")
    return tokens


def cut(tokens: list[str], requests: int) -> list[list[str]]:
    """Consecutive pieces of the text whose lengths are about as 1 : 2 : 3 and so on, none empty."""
    requests = min(requests, len(tokens))
    shares = requests * (requests + 1) // 2
    spare = len(tokens) - requests  # every request has one token to begin with
    ends = [i + spare * (i * (i + 1) // 2) // shares for i in range(requests + 1)]
    return [tokens[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def embed(tokens: list[str]) -> torch.Tensor:
    """Fixed random embeddings, [t, 2048] in fp32, chosen by a hash of the token."""
    generator = torch.Generator("cpu").manual_seed(1)
    table = torch.randn(
        _EMBEDDINGS, Geometry().hidden, generator=generator, dtype=torch.float32, device="cpu"
    )
    rows = [zlib.crc32(token.encode()) % _EMBEDDINGS for token in tokens]
    # bf16 values, so that every device starts from the same numbers.
    return table[rows].bfloat16().float()


@dataclasses.dataclass
class Result:
    """What the demo found on one device. Errors are relative to the reference's largest value."""

    device: str
    error: float
    error_limit: float
    steps: int
    tokens_cached: int
    pages_used: int
    pages_total: int
    page_utilisation: float
    layer_tokens_per_second: float
    attention_tokens_per_second: float

    @property
    def passed(self) -> bool:
        return self.error <= self.error_limit


def decode_text(requests: list[list[str]], device: str, dtype_name: str, steps: int) -> Result:
    """Fills a cache, decodes the last `steps` tokens of every request together, and compares."""
    on_gpu = device != "cpu"
    dtype = DTYPES[dtype_name]
    # Projections: bf16 tensor cores on a GPU; fp32 on the CPU, where PyTorch's bf16 may be slow.
    layer = MlaLayer(Geometry(), device, dtype if on_gpu else torch.float32)
    tokens = [token for request in requests for token in request]
    hidden = embed(tokens).to(layer.w_q).split([len(request) for request in requests])
    steps = min(steps, *(len(request) for request in requests))
    decoder = _Decoder(layer, hidden, steps, dtype)

    step_seconds = []
    for step in range(steps):
        start = time.perf_counter()
        output = decoder.step(step)
        if on_gpu:
            torch.cuda.synchronize(device)
        step_seconds.append(time.perf_counter() - start)

    error, limit = _compare(layer, hidden, output, dtype)
    return Result(
        device=device,
        error=error,
        error_limit=limit,
        steps=steps,
        layer_tokens_per_second=len(requests) / statistics.median(step_seconds),
        attention_tokens_per_second=len(requests) / decoder.attention_seconds(),
        **decoder.page_figures(),
    )


class _Decoder:
    """One layer and one paged cache that all requests share."""

    def __init__(
        self, layer: MlaLayer, hidden: Sequence[torch.Tensor], steps: int, dtype: torch.dtype
    ) -> None:
        self.layer, self.hidden, self.dtype = layer, hidden, dtype
        self.device = layer.w_q.device
        self.lengths = [len(rows) for rows in hidden]
        self.prompts = [length - steps for length in self.lengths]
        self.ids = list(range(len(hidden)))
        pages = sum(-(-length // PAGE_SIZE) for length in self.lengths)
        self.cache = flash_mla.PagedKVCache(pages, PAGE_SIZE, dtype, self.device)
        for i, prompt in zip(self.ids, self.prompts, strict=True):
            self.cache.allocate(i)
            positions = torch.arange(prompt, device=self.device)
            self.cache.append(i, *self._compress(hidden[i][:prompt], positions))

    def step(self, step: int) -> torch.Tensor:
        """Decodes the next token of every request: the layer's output, [b, hidden]."""
        now = [prompt + step for prompt in self.prompts]
        rows = torch.stack([rows[at] for rows, at in zip(self.hidden, now, strict=True)])
        positions = torch.tensor(now, device=self.device)
        slots = torch.cat([self.cache.grow(i) for i in self.ids])
        flash_mla.append_kv_cache(*self._compress(rows, positions), self.cache.kv_cache, slots)
        self.q = self.layer.absorbed_query(rows, positions)[:, None].to(self.dtype)
        self.block_table = self.cache.block_table(self.ids)
        self.cache_seqlens = self.cache.cache_seqlens(self.ids)
        return self.layer.project_out(self.attend()[:, 0].to(rows.dtype))

    def attend(self) -> torch.Tensor:
        metadata, _ = flash_mla.get_mla_metadata()
        out, _ = flash_mla.flash_mla_with_kvcache(
            self.q,
            self.cache.kv_cache,
            self.block_table,
            self.cache_seqlens,
            D_V,
            metadata,
            softmax_scale=self.layer.geometry.softmax_scale,
            causal=True,
        )
        return out

    def attention_seconds(self) -> float:
        """Median time of the attention call of the last step alone."""
        if self.device.type == "cpu":
            return host_clock_time(self.attend)[0] * 1e-6
        with torch.cuda.device(self.device):
            return graph_time(self.attend)[0] * 1e-6

    def page_figures(self) -> dict:
        usage = self.cache.usage
        return {
            "tokens_cached": usage.tokens,
            "pages_used": usage.used_pages,
            "pages_total": usage.num_pages,
            "page_utilisation": usage.token_fraction,
        }

    def _compress(
        self, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latent, k_rope = self.layer.compress(rows, positions)
        return latent.to(self.dtype), k_rope.to(self.dtype)


def _compare(
    layer: MlaLayer, hidden: Sequence[torch.Tensor], output: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """(error of the decode, its limit): the limit is twice the error of the naive form with the
    roundings of a kernel of that type, plus one rounding of the largest value."""
    exact = layer.to_float64()
    error = plain_error = 0.0
    for rows, got in zip(hidden, output, strict=True):
        rows = rows.to("cpu", torch.float64)
        want = exact.naive(rows)
        plain = exact.naive(rows, round_to=dtype)
        largest = want.abs().max()
        error = max(error, float((got.cpu().double() - want).abs().max() / largest))
        plain_error = max(plain_error, float((plain - want).abs().max() / largest))
    return error, 2 * plain_error + torch.finfo(dtype).eps / 2
