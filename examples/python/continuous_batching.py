"""Continuous batching over one paged cache: what an engine does round the attention call.

Requests come and go, their lengths differ, and pages that one gives back serve the next. Each step
decodes one token of every running request. On a Hopper GPU the step is a CUDA graph, one for each
batch size, replayed with other tables, lengths and slots; on the CPU it is called as it is. Results
are checked against attention in float64.
"""

import collections
import dataclasses
import itertools
import random

import torch

import flash_mla

H_Q = 16  # query heads that share the one latent KV head
NUM_PAGES, PAGE_SIZE = 24, 64
BATCH_SIZES = (1, 2, 4, 8)  # a graph each; a smaller batch is padded with rows of length 0
MAX_PAGES = 8  # of one request: the width of the table


@dataclasses.dataclass
class Request:
    name: int
    prompt: int  # tokens that are cached when it starts
    tokens: int  # tokens to decode
    done: int = 0
    slot: torch.Tensor | None = None  # of its newest token, (1,) int64


class Engine:
    """Static buffers, a graph for each batch size, and the page allocator."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache = flash_mla.PagedKVCache(NUM_PAGES, PAGE_SIZE, torch.bfloat16, device)
        most = BATCH_SIZES[-1]
        like = {"dtype": torch.bfloat16, "device": device}
        self.q = torch.zeros(most, 1, H_Q, 576, **like)
        self.latent = torch.zeros(most, 576, **like)  # of the new tokens
        self.slots = torch.full((most,), -1, dtype=torch.int64, device=device)
        self.table = torch.zeros(most, MAX_PAGES, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(most, dtype=torch.int32, device=device)
        self.graphs: dict[int, tuple] = {}
        if device == "cuda":
            self.graphs = {b: self.capture(b) for b in BATCH_SIZES}

    def attend(self, b: int) -> torch.Tensor:
        """Writes the new tokens and attends: what is captured. Padding rows write and see nothing."""
        flash_mla.append_kv_cache(
            self.latent[:b, :512], self.latent[:b, 512:], self.cache.kv_cache, self.slots[:b]
        )
        metadata, _ = flash_mla.get_mla_metadata()  # planned anew in each replay, on the device
        out, _ = flash_mla.flash_mla_with_kvcache(
            self.q[:b],
            self.cache.kv_cache,
            self.table[:b],
            self.lengths[:b],
            head_dim_v=512,
            tile_scheduler_metadata=metadata,
            causal=True,
        )
        return out

    def capture(self, b: int) -> tuple:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.attend(b)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.attend(b)
        return graph, out

    def step(self, running: list[Request]) -> torch.Tensor:
        """One token of every running request, for which there is room already: (b, H_Q, 512)."""
        names = [request.name for request in running]
        b = next(size for size in BATCH_SIZES if size >= len(names))
        self.slots.fill_(-1)
        self.lengths.zero_()
        self.slots[: len(names)] = torch.cat([request.slot for request in running])
        self.lengths[: len(names)] = self.cache.cache_seqlens(names)
        table = self.cache.block_table(names)
        self.table[: len(names), : table.shape[1]] = table
        self.q.normal_(std=0.1)
        self.latent.normal_(std=0.1)
        if self.device == "cuda":
            graph, out = self.graphs[b]
            graph.replay()
        else:
            out = self.attend(b)
        return out[: len(names), 0]

    def check(self, running: list[Request], out: torch.Tensor, row: int) -> float:
        """The largest error of a row against float64."""
        slots = self.cache.slot_mapping(running[row].name)
        keys = self.cache.kv_cache.view(-1, 576)[slots].double()
        weights = torch.softmax(self.q[row, 0].double() @ keys.T * 576**-0.5, dim=-1)
        return (out[row].double() - weights @ keys[:, :512]).abs().max().item()


def main() -> None:
    supported = any(device["supported"] for device in flash_mla.info()["devices"])
    device = "cuda" if supported and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    draw = random.Random(0)
    engine = Engine(device)
    cache = engine.cache
    waiting = collections.deque(
        Request(name, draw.randint(1, 250), draw.randint(5, 90)) for name in range(20)
    )
    running: list[Request] = []
    taken, preempted, worst = 0, 0, 0.0
    for step in itertools.count():
        # Admit requests while there is a row and pages for their prompt and one token more.
        while waiting and len(running) < BATCH_SIZES[-1]:
            request = waiting[0]
            try:
                cache.allocate(request.name)
                rows = torch.randn(request.prompt + request.done, 576, device=device) / 10
                rows = rows.to(torch.bfloat16)
                cache.append(request.name, rows[:, :512], rows[:, 512:])
            except MemoryError:  # another step, when somebody has gone
                cache.free(request.name)
                break
            taken += -(-(request.prompt + request.done) // PAGE_SIZE)
            running.append(waiting.popleft())
        if not running:
            break
        # Room for one token each. Who gets none waits again, its pages serve the others; the youngest go first.
        for request in list(running):
            while request in running:
                try:
                    before = cache.usage.used_pages
                    request.slot = cache.grow(request.name)
                    taken += cache.usage.used_pages - before
                    break
                except MemoryError:
                    youngest = running.pop()
                    cache.free(youngest.name)
                    waiting.appendleft(youngest)
                    preempted += 1
        out = engine.step(running)
        worst = max(worst, engine.check(running, out, step % len(running)))
        for request in list(running):
            request.done += 1
            if request.done == request.tokens:
                cache.free(request.name)
                running.remove(request)
    print(f"device {device}: 20 requests in {step} steps, {preempted} preempted")
    print(f"{taken} pages taken of {NUM_PAGES}: each served {taken / NUM_PAGES:.1f} times")
    print(f"largest error against float64: {worst:.1e}")
    assert worst < 1e-3 and taken > NUM_PAGES and len(cache) == 0 and cache.usage.used_pages == 0


if __name__ == "__main__":
    main()
