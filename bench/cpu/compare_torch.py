"""Times decode on the CPU against the same maths written with PyTorch's bf16 operations.

Both run in this process on the same tensors and the same number of threads, in turns, so that a busy machine disturbs both alike.
PyTorch's side gathers the pages, multiplies, takes the softmax and multiplies again; of two ways to write that (one batched
product for all requests, one product for each request) the faster counts. Before it is timed, each output is
compared with attention in float64: `error` is the largest difference over the largest value.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import flash_mla
from flash_mla import _library

D_QK, D_V, PAGE_SIZE = 576, 512, 64
SCALE = D_QK**-0.5
# (b, h_q, s_kv, s_q). The first two are the ones with a goal: 1.5x and 1.2x.
CASES = [
    (4, 16, 4096, 1),
    (4, 128, 4096, 1),
    (1, 16, 4096, 1),
    (4, 16, 4096, 2),
    (16, 16, 1024, 1),
    (1, 128, 32768, 1),
]


def make_inputs(b, h_q, s_kv, s_q):
    """Query, cache and a block table whose pages are shuffled over the whole cache."""
    generator = torch.Generator().manual_seed(0)
    num_pages = b * s_kv // PAGE_SIZE
    q = torch.randn(b, s_q, h_q, D_QK, generator=generator).bfloat16()
    kv_cache = torch.randn(num_pages, PAGE_SIZE, 1, D_QK, generator=generator).bfloat16()
    table = torch.randperm(num_pages, generator=generator).int().view(b, -1)
    return q, kv_cache, table, torch.full((b,), s_kv, dtype=torch.int32)


def attention(q, keys):
    """q [.., rows, 576], keys [.., s_kv, 576], in their dtype; the softmax is in fp32 at least."""
    scores = (q @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return torch.softmax(scores * SCALE, -1).to(q.dtype) @ keys[..., :D_V]


def torch_batched(q, kv_cache, table):
    b = q.shape[0]
    keys = kv_cache[table].view(b, -1, D_QK)
    return attention(q.reshape(b, -1, D_QK), keys).view(*q.shape[:3], D_V)


def torch_each(q, kv_cache, table):
    out = [
        attention(rows.reshape(-1, D_QK), kv_cache[pages].view(-1, D_QK))
        for rows, pages in zip(q, table, strict=True)
    ]
    return torch.stack(out).view(*q.shape[:3], D_V)


def error(out, expected):
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


def median_us(functions, seconds):
    """Medians of the functions' times, called in turns, at least three times each."""
    times = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


def measure(b, h_q, s_kv, s_q, seconds):
    q, kv_cache, table, seqlens = make_inputs(b, h_q, s_kv, s_q)
    metadata, num_splits = flash_mla.get_mla_metadata(seqlens, s_q * h_q, 1)

    def ours():
        return flash_mla.flash_mla_with_kvcache(
            q, kv_cache, table, seqlens, D_V, metadata, num_splits, softmax_scale=SCALE
        )[0]

    expected = torch_each(q.double(), kv_cache.double(), table)
    ours_error = error(ours(), expected)
    torch_errors = [error(way(q, kv_cache, table), expected) for way in (torch_batched, torch_each)]
    if not max(ours_error, *torch_errors) < 0.02:
        raise SystemExit(f"wrong result: errors {ours_error} (ours), {torch_errors} (PyTorch)")
    us, *torch_us = median_us(
        [
            ours,
            lambda: torch_batched(q, kv_cache, table),
            lambda: torch_each(q, kv_cache, table),
        ],
        seconds,
    )
    fastest = min(range(2), key=lambda way: torch_us[way])
    return {
        "name": f"b{b} h{h_q} s{s_kv} q{s_q}",
        "us": us,
        "us_torch": torch_us[fastest],
        "ratio": torch_us[fastest] / us,
        "error": ours_error,
        "error_torch": torch_errors[fastest],
    }


def cpu_name():
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each case")
    parser.add_argument("--quick", action="store_true", help="only the two cases with a goal")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    result = {
        "cpu": cpu_name(),
        "isa": _library.cpu_isa(),
        "threads": args.threads,
        "torch": torch.__version__,
        "rows": [],
    }
    print(f"{result['cpu']}, {result['isa']}, {args.threads} threads, PyTorch {torch.__version__}")
    print(f"{'case':20} {'us':>10} {'us PyTorch':>12} {'ratio':>7} {'error':>9} {'PyTorch':>9}")
    for case in CASES[: 2 if args.quick else None]:
        row = measure(*case, args.seconds)
        result["rows"].append(row)
        print(
            f"{row['name']:20} {row['us']:10.0f} {row['us_torch']:12.0f} {row['ratio']:6.1f}x"
            f" {row['error']:9.1e} {row['error_torch']:9.1e}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
