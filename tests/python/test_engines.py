"""The calling code of serving engines, of 2025, of 2026 and of today, with its buffers and its
order of calls; eager, and captured
in CUDA graphs that are replayed with other lengths, tables and contents."""

from __future__ import annotations

import pytest
import torch
from reference import Case, Inputs, assert_close, decode, make_inputs

from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from flash_mla.flash_mla_interface import FlashMLASchedMeta

H_Q, MAX_BATCH, MAX_PAGES = 16, 8, 40


class StaticInputs:
    """Buffers of the largest batch, refilled before each step, whose slices a captured graph reads."""

    def __init__(self, device: str) -> None:
        self.q = torch.zeros((MAX_BATCH, 1, H_Q, 576), dtype=torch.bfloat16, device=device)
        self.k_cache = torch.zeros((400, 64, 1, 576), dtype=torch.bfloat16, device=device)
        self.block_table = torch.full((MAX_BATCH, MAX_PAGES), -1, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.ones(MAX_BATCH, dtype=torch.int32, device=device)

    def fill(self, b: int, s_kv: int, seed: int) -> Inputs:
        inputs = make_inputs(Case(b=b, s_kv=s_kv, h_q=H_Q), self.q.device.type, seed)
        self.q[:b].copy_(inputs.q)
        self.k_cache[: inputs.k_cache.shape[0]].copy_(inputs.k_cache)
        self.block_table.fill_(-1)
        self.block_table[:b, : inputs.block_table.shape[1]].copy_(inputs.block_table)
        self.cache_seqlens[:b].copy_(inputs.cache_seqlens)
        return inputs

    def slices(self, b: int) -> dict:
        return {
            "q": self.q[:b],
            "k_cache": self.k_cache,
            "block_table": self.block_table[:b],
            "cache_seqlens": self.cache_seqlens[:b],
            "head_dim_v": 512,
            "softmax_scale": 576**-0.5,
            "causal": True,
        }


class Engine2025:
    """Two tensors, planned outside the graph and copied into static buffers."""

    def __init__(self, static: StaticInputs, b: int) -> None:
        self.static, self.b = static, b
        ones = torch.ones(MAX_BATCH, dtype=torch.int32, device=static.q.device)
        self.metadata, self.num_splits = get_mla_metadata(ones, H_Q, 1)

    def prepare(self) -> None:
        metadata, num_splits = get_mla_metadata(
            self.static.cache_seqlens[: self.b].to(torch.int32), H_Q, 1
        )
        self.metadata.copy_(metadata)
        self.num_splits[: self.b + 1].copy_(num_splits)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_mla_with_kvcache(
            **self.static.slices(self.b),
            tile_scheduler_metadata=self.metadata,
            num_splits=self.num_splits[: self.b + 1],
        )


class Engine2026:
    """One object for all layers of a step; planned anew inside the graph."""

    def __init__(self, static: StaticInputs, b: int) -> None:
        self.static, self.b = static, b
        self.metadata, _ = get_mla_metadata()

    def prepare(self) -> None:
        pass

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.metadata.have_initialized = False
        for _ in range(3):
            result = flash_mla_with_kvcache(
                **self.static.slices(self.b),
                tile_scheduler_metadata=self.metadata,
                is_fp8_kvcache=False,
            )
        return result


class EngineToday:
    """Arguments given to get_mla_metadata, its first result used like the object, and no num_splits."""

    def __init__(self, static: StaticInputs, b: int) -> None:
        self.static, self.b = static, b
        self.metadata = None

    def prepare(self) -> None:
        self.metadata, _ = get_mla_metadata(
            self.static.cache_seqlens[: self.b], H_Q, 1, is_fp8_kvcache=False
        )

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(3):
            result = flash_mla_with_kvcache(
                **self.static.slices(self.b),
                tile_scheduler_metadata=self.metadata,
                is_fp8_kvcache=False,
            )
        return result


class EngineBatchInvariant(EngineToday):
    """Writes a plan of one row itself."""

    def prepare(self) -> None:
        super().prepare()
        device = self.static.q.device
        row = [0, 0, self.b - 1, MAX_PAGES, 0, 0, 0, 0]
        self.row = torch.tensor([row], dtype=torch.int32, device=device)
        self.splits = torch.zeros(self.b + 1, dtype=torch.int32, device=device)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.metadata.tile_scheduler_metadata = self.row
        self.metadata.num_splits = self.splits
        return super().step()


class EnginePreset(Engine2026):
    """Presets the object's two tensors (config stays None) and reads them after the call."""

    def prepare(self) -> None:
        planned = get_mla_metadata(self.static.cache_seqlens[: self.b], H_Q, 1)
        self.metadata = FlashMLASchedMeta()
        self.metadata.tile_scheduler_metadata, self.metadata.num_splits = planned

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        result = super().step()
        assert self.metadata.tile_scheduler_metadata.shape[1] == 8
        assert self.metadata.num_splits.shape == (self.b + 1,)
        return result


ENGINES = [Engine2025, Engine2026, EngineToday, EngineBatchInvariant, EnginePreset]
STEPS = ((200, 1), (900, 2), (3, 3))  # lengths around, seed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("b", [1, 5, MAX_BATCH])
def test_eager(device: str, engine: type, b: int) -> None:
    static = StaticInputs(device)
    runner = engine(static, b)
    for s_kv, seed in STEPS:
        inputs = static.fill(b, s_kv, seed)
        runner.prepare()
        assert_close(runner.step(), decode(inputs, True))


@pytest.mark.cuda
@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("b", [1, 5, MAX_BATCH])
def test_captured(engine: type, b: int, warm_up: bool) -> None:
    """The first call may be inside the capture; replays see other lengths, tables and contents."""
    static = StaticInputs("cuda")
    runner = engine(static, b)
    static.fill(b, 64, 0)
    runner.prepare()
    if warm_up:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            runner.step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runner.step()
    for s_kv, seed in STEPS:
        inputs = static.fill(b, s_kv, seed)
        if isinstance(runner, Engine2025):
            runner.prepare()
        graph.replay()
        assert_close(result, decode(inputs, True))
