"""Correctness and speed of decoding in one table: `python tests/test_flash_mla.py`, as the 2025
documents have it.

Runs on a Hopper GPU when there is one, else a small part of it on the CPU. --quick leaves the
timing out.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "python"))

from reference import Case, Inputs, assert_close, decode, make_inputs  # noqa: E402

import flash_mla  # noqa: E402


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            Case(b=4, s_q=s_q, h_q=h_q, s_kv=512, varlen=varlen)
            for h_q in (16, 128)
            for s_q, varlen in ((1, False), (2, True))
        ]
    return [
        Case(b=b, s_q=s_q, h_q=h_q, s_kv=s_kv, varlen=varlen)
        for b in (1, 128)
        for s_kv in (4096, 8192)
        for h_q in (16, 64, 128)
        for s_q in (1, 2)
        for varlen in (False, True)
    ]


def microseconds(inputs: Inputs, causal: bool) -> float:
    """Median time of one call; on a GPU by replaying a CUDA graph after the L2 cache was overwritten."""
    args = inputs.args()

    def call() -> None:
        flash_mla.flash_mla_with_kvcache(*args, metadata, causal=causal)

    metadata, _ = flash_mla.get_mla_metadata()
    call()
    times = []
    if inputs.q.device.type == "cpu":
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def report(case: Case, device: str, timed: bool) -> str:
    inputs = make_inputs(case, device)
    wanted = decode(inputs, case.causal)
    out, lse = flash_mla.flash_mla_with_kvcache(
        *inputs.args(), flash_mla.get_mla_metadata()[0], causal=case.causal
    )
    assert_close((out, lse), wanted)
    line = f"{case!s:52} error {(out.double() - wanted[0]).abs().max().item():8.1e}"
    if timed:
        us = microseconds(inputs, case.causal)
        tokens = int(inputs.cache_seqlens.sum())
        flops = 2 * tokens * case.s_q * case.h_q * (576 + 512)
        moved = 2 * (tokens * 576 + case.b * case.s_q * case.h_q * (576 + 512))
        line += f" {us:10.1f} us {flops / us / 1e6:7.1f} TFLOPS {moved / us / 1e3:7.0f} GB/s"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="correctness alone")
    quick = parser.parse_args().quick
    supported = torch.cuda.is_available() and any(
        entry["supported"] for entry in flash_mla.info()["devices"]
    )
    device = "cuda" if supported else "cpu"
    if device == "cpu":
        print("no Hopper GPU: a small part runs on the CPU")
    for case in cases(device):
        print(report(case, device, not quick), flush=True)
    print("all correct")


if __name__ == "__main__":
    main()
