"""append_kv_cache and PagedKVCache."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from reference import Inputs, assert_close, decode

from flash_mla import PagedKVCache, append_kv_cache, flash_mla_with_kvcache


def tokens(
    t: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(t)
    both = torch.randn((t, 576), generator=generator, dtype=torch.float32, device=device).to(dtype)
    return both[:, :512], both[:, 512:]  # slices: rows are 576 apart


@pytest.mark.parametrize("heads", [True, False], ids=["4 axes", "3 axes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_append(device: str, dtype: torch.dtype, heads: bool) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is for the CPU")
    kv_c, k_pe = tokens(7, device, dtype)
    frame = torch.full(
        (5, 2, 16, 1, 584), 3.0, dtype=dtype, device=device
    )  # a slice of a larger allocation
    cache = frame[:, 1, :, :, :576] if heads else frame[:, 1, :, 0, :576]
    slots = torch.tensor([0, 79, -1, 33, 16, -7, 15], dtype=torch.int64, device=device)
    append_kv_cache(kv_c, k_pe, cache, slots)
    wanted = torch.full_like(frame, 3.0)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // 16, 1, slot % 16, 0, :576] = torch.cat((kv_c[i], k_pe[i]))
    assert torch.equal(frame, wanted)


def test_append_nothing(device: str) -> None:
    cache = torch.zeros((2, 64, 1, 576), dtype=torch.bfloat16, device=device)
    append_kv_cache(*tokens(0, device), cache, torch.zeros(0, dtype=torch.int64, device=device))
    assert (cache == 0).all()


@pytest.mark.cuda
def test_append_skips_slots_past_the_end_on_a_gpu() -> None:
    cache = torch.zeros((2, 64, 1, 576), dtype=torch.bfloat16, device="cuda")
    append_kv_cache(*tokens(2, "cuda"), cache, torch.tensor([128, 2**40], device="cuda"))
    assert (cache == 0).all()


def test_paged_cache_decodes(device: str) -> None:
    """Requests that are allocated, grown and freed in turn decode as if each had its own memory."""
    cache = PagedKVCache(20, 64, torch.bfloat16, device)
    cache.kv_cache.fill_(float("nan"))
    rows: dict[str, torch.Tensor] = {}

    def add(name: str, t: int, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        new = torch.randn((t, 576), generator=generator, dtype=torch.float32, device=device)
        new = (new / 10).to(torch.bfloat16)  # the scale that the field's tolerance is made for
        if name not in cache:
            cache.allocate(name)
        cache.append(name, new[:, :512], new[:, 512:])
        rows[name] = torch.cat((rows[name], new)) if name in rows else new

    for seed, (name, t) in enumerate(
        [("a", 100), ("b", 3), ("c", 64), ("a", 1), ("b", 200), ("a", 63)]
    ):
        add(name, t, seed)
    cache.free("c")
    del rows["c"]
    add("d", 130, 99)
    names = ["b", "d", "a"]
    q = torch.randn((3, 1, 16, 576), dtype=torch.float32, device=device).to(torch.bfloat16)
    lengths, table = cache.cache_seqlens(names), cache.block_table(names)
    assert lengths.tolist() == [203, 130, 164] and table.dtype == torch.int32
    got = flash_mla_with_kvcache(q, cache.kv_cache, table, lengths, 512, None, causal=True)
    own = torch.zeros((3, 256, 1, 576), dtype=torch.bfloat16, device=device)
    for i, name in enumerate(names):
        own[i, : rows[name].shape[0], 0] = rows[name]
    own_table = torch.arange(3, dtype=torch.int32, device=device)[:, None]
    assert_close(got, decode(Inputs(q, own, own_table, lengths), True))


def test_bookkeeping() -> None:
    cache = PagedKVCache(4, 16, torch.float32)
    assert cache.kv_cache.shape == (4, 16, 1, 576) and cache.kv_cache.dtype == torch.float32
    assert cache.allocate("x", 17).tolist() == list(range(17))
    assert cache.grow("x").tolist() == [17]
    assert cache.slot_mapping("x", 15, 18).tolist() == [15, 16, 17]
    assert cache.allocate(7).shape == (0,)
    assert len(cache) == 2 and 7 in cache and "y" not in cache
    usage = cache.usage
    assert (usage.num_pages, usage.used_pages, usage.tokens) == (4, 2, 18)
    assert usage.page_fraction == 0.5 and usage.token_fraction == 18 / 32
    assert cache.block_table(["x", 7]).tolist() == [[0, 1], [0, 0]]
    assert cache.cache_seqlens(["x", 7]).tolist() == [18, 0]
    assert cache.block_table([]).shape == (0, 0)
    cache.free("x")
    assert cache.usage.used_pages == 0 and cache.usage.token_fraction == 0.0
    assert cache.grow(7, 64).tolist() == list(range(64))


def test_numpy_counts() -> None:
    cache = PagedKVCache(numpy.int64(4), numpy.int32(16))
    assert cache.allocate("x", numpy.int64(17)).tolist() == list(range(17))
    assert cache.grow("x", numpy.uint8(1)).tolist() == [17]
    assert type(cache.num_pages) is int and type(cache.usage.tokens) is int


def test_running_out_changes_nothing() -> None:
    cache = PagedKVCache(3, 16)
    cache.allocate("x", 30)
    before = cache.block_table(["x"]), cache.usage
    with pytest.raises(MemoryError, match="request 'y' needs 2 pages, 1 of 3 are free"):
        cache.allocate("y", 17)
    with pytest.raises(MemoryError, match="request 'x' needs 2 pages, 1 of 3 are free"):
        cache.grow("x", 19)
    with pytest.raises(MemoryError, match="needs 2 pages"):
        cache.append("x", *tokens(19, "cpu"))
    with pytest.raises(TypeError, match="kv_c.dtype"):
        cache.append("x", *(tensor.int() for tensor in tokens(5, "cpu")))
    assert "y" not in cache and cache.usage == before[1]
    assert torch.equal(cache.block_table(["x"]), before[0])
    assert cache.cache_seqlens(["x"]).tolist() == [30]


def test_wrong_calls() -> None:
    cache = PagedKVCache(3, 16)
    cache.allocate("x", 3)
    with pytest.raises(ValueError, match="request 'x' exists already"):
        cache.allocate("x", 3)
    for method in (cache.grow, cache.free, cache.slot_mapping):
        with pytest.raises(KeyError, match="no request 'z'"):
            method("z")
    for method in (cache.block_table, cache.cache_seqlens):
        with pytest.raises(KeyError, match="no request 'z'"):
            method(["x", "z"])
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="wanted an int of 0 or more"):
            cache.grow("x", wrong)
    with pytest.raises(ValueError, match="wanted 0 <= start <= stop <= 3"):
        cache.slot_mapping("x", 1, 4)
    for wrong in (0, -1, 2.0):
        with pytest.raises(ValueError, match="wanted an int of 1 or more"):
            PagedKVCache(wrong)


def test_random_histories() -> None:
    """No page has two owners, none is lost, and usage adds up, whatever happens."""
    rng = random.Random(0)
    cache = PagedKVCache(12, 4, torch.float16)
    lengths: dict[int, int] = {}
    for step in range(2000):
        action = rng.choice(["allocate", "grow", "grow", "free"])
        try:
            if action == "allocate":
                count = rng.randrange(12)
                cache.allocate(step, count)
                lengths[step] = count
            elif lengths:
                name = rng.choice(list(lengths))
                if action == "free":
                    cache.free(name)
                    del lengths[name]
                else:
                    count = rng.randrange(6)
                    cache.grow(name, count)
                    lengths[name] += count
        except MemoryError:
            pass
        slots = [slot for name in lengths for slot in cache.slot_mapping(name).tolist()]
        assert len(set(slots)) == len(slots) == sum(lengths.values()) == cache.usage.tokens
        assert cache.usage.used_pages == sum(-(-count // 4) for count in lengths.values()) <= 12
