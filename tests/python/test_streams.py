"""CUDA streams and graphs: calls and replays at once, capture next to eager calls, memory that graphs own."""

from __future__ import annotations

import threading

import pytest
import torch
from reference import Case, assert_close, decode, make_inputs

from flash_mla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata, merge_states

pytestmark = pytest.mark.cuda

# Long requests in small batches: these are split, so the calls count arrivals in their workspaces.
CASES = [
    Case(b=2, s_kv=6000, h_q=128),
    Case(b=1, s_kv=20000, h_q=16),
    Case(b=3, s_q=2, s_kv=4000, h_q=64),
]


def call(inputs, **kwargs):
    return flash_mla_with_kvcache(*inputs.args(), get_mla_metadata()[0], causal=True, **kwargs)


def test_two_streams_at_once() -> None:
    jobs = [
        (make_inputs(case, "cuda", seed), torch.cuda.Stream()) for seed, case in enumerate(CASES)
    ]
    wanted = [decode(inputs, True) for inputs, _ in jobs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for inputs, stream in jobs:
            with torch.cuda.stream(stream):
                results.append(call(inputs))
    torch.cuda.synchronize()
    for number, got in enumerate(results):
        assert_close(got, wanted[number % len(jobs)])


def test_threads_on_one_stream() -> None:
    """Calls of several threads in one stream share a workspace that grows under them."""
    jobs = [make_inputs(case, "cuda", seed) for seed, case in enumerate(CASES)]
    wanted = [decode(inputs, True) for inputs in jobs]
    results = [[] for _ in jobs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()

    def work(number: int) -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                results[number].append(call(jobs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for number, got in enumerate(results):
        assert len(got) == 20
        for result in got:
            assert_close(result, wanted[number])


def test_graphs_replayed_at_once() -> None:
    """Two graphs captured in the same stream, replayed at the same time in two others, again and again."""
    jobs = [make_inputs(case, "cuda", seed) for seed, case in enumerate(CASES[:2])]
    wanted = [decode(inputs, True) for inputs in jobs]
    graphs, results = [], []
    for inputs in jobs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                result = call(inputs)
        graphs.append(graph)
        results.append(result)
    streams = [torch.cuda.Stream() for _ in jobs]
    for _ in range(10):
        for (out, lse), graph, stream in zip(results, graphs, streams, strict=True):
            out.zero_(), lse.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(5):
                    graph.replay()
        torch.cuda.synchronize()
        for got, reference in zip(results, wanted, strict=True):
            assert_close(got, reference)


def test_forked_capture() -> None:
    """One capture over two streams: the branches run at the same time and do not share counters."""
    jobs = [make_inputs(case, "cuda", seed) for seed, case in enumerate(CASES[:2])]
    wanted = [decode(inputs, True) for inputs in jobs]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        first = call(jobs[0])
        with torch.cuda.stream(side):
            second = call(jobs[1])
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    assert_close(first, wanted[0])
    assert_close(second, wanted[1])


def test_eager_calls_between_replays() -> None:
    """A larger eager call replaces the eager workspace; graphs do not notice."""
    small = make_inputs(CASES[1], "cuda")
    call(small)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(small)
    large = make_inputs(Case(b=40, s_kv=3000, h_q=128, s_q=2), "cuda")
    large_wanted, wanted = decode(large, True), decode(small, True)
    for _ in range(3):
        large_got = call(large)
        graph.replay()
    torch.cuda.synchronize()
    assert_close(large_got, large_wanted)
    assert_close(got, wanted)


def test_append_and_merge_in_a_graph() -> None:
    cache = torch.zeros((10, 64, 1, 576), dtype=torch.bfloat16, device="cuda")
    kv_c = torch.randn((5, 512), dtype=torch.bfloat16, device="cuda")
    k_pe = torch.randn((5, 64), dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(5, dtype=torch.int64, device="cuda")
    outs = [torch.randn((2, 1, 16, 512), dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    lses = [torch.randn((2, 16, 1), dtype=torch.float32, device="cuda") for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_kv_cache(kv_c, k_pe, cache, slots)
        out, lse = merge_states(outs, lses)
    slots.copy_(torch.tensor([7, -1, 639, 64, 3]))
    lses[1].fill_(float("-inf"))
    graph.replay()
    assert torch.equal(cache.view(-1, 576)[639], torch.cat([kv_c[2], k_pe[2]]))
    assert cache.view(-1, 576)[0].eq(0).all()
    eager = merge_states(outs, lses)
    assert torch.equal(out, eager[0]) and torch.equal(lse, eager[1])


def test_validate_is_refused_under_capture() -> None:
    inputs = make_inputs(CASES[0], "cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(Exception, match="captur"), torch.cuda.graph(graph):
        call(inputs, validate=True)
    torch.cuda.synchronize()
    assert_close(call(inputs), decode(inputs, True))


@pytest.mark.parametrize("what", ["page", "length"])
def test_validate_finds_bad_values(what: str) -> None:
    inputs = make_inputs(Case(b=3, s_kv=500), "cuda")
    if what == "page":
        inputs.block_table[1, 0] = inputs.k_cache.shape[0]
    else:
        inputs.cache_seqlens[2] = -1
    with pytest.raises(ValueError, match="block_table" if what == "page" else "cache_seqlens"):
        call(inputs, validate=True)


def test_no_synchronisation() -> None:
    inputs = make_inputs(Case(b=3, s_kv=500), "cuda")
    call(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        md, num_splits = get_mla_metadata(inputs.cache_seqlens, 16, 1)
        flash_mla_with_kvcache(*inputs.args(), md, num_splits, causal=True)
        call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("h_q", [16, 128])
def test_while_other_kernels_hold_sms(h_q: int) -> None:
    """CTAs that waited too long for the other pieces of their tile leave, and those that come later merge it whole."""
    inputs = make_inputs(Case(b=1, h_q=h_q, s_kv=16896, varlen=False), "cuda")
    wanted = call(inputs)
    out, lse = torch.empty_like(wanted[0]), torch.empty_like(wanted[1])
    held = 0
    for _ in range(8):  # a stream may share a hardware queue with ours: then nothing runs at once
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        sleeper = torch.cuda.Stream()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(sleeper):
            torch.cuda._sleep(5_000_000)  # clocks, in a CTA that leaves too few registers for ours
        torch.cuda._sleep(2_000_000)  # so that the host is through with the call when it begins
        begin.record()
        call(inputs, out=out, lse=lse)
        end.record()
        torch.cuda.synchronize()
        # A CTA waits for 200,000 clocks (kPatience, merge.cuh), of at most 1.98 GHz; a decode that waits for nobody takes 0.03 ms.
        held += begin.elapsed_time(end) > 0.1
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    if not held:
        pytest.skip("the sleeping kernel held no SM that the decode waited for")
    again = call(inputs)
    assert torch.equal(again[0], wanted[0]) and torch.equal(again[1], wanted[1])
