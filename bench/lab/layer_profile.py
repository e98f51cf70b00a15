"""Prints which GPU kernels one decode step of a DeepSeek-V3 attention layer takes, and for how long, with the layer of bench/transformers.py.

PYTHONPATH=python python3 bench/lab/layer_profile.py [--b 1] [--own] [--compiled] [--smoke]
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 20


def load_bench():
    """bench/transformers.py, which is called like what it imports."""
    path = Path(__file__).resolve().parents[1] / "transformers.py"
    spec = importlib.util.spec_from_file_location("bench_transformers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--b", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="the model's own attention (sdpa)")
    parser.add_argument("--compiled", action="store_true", help="compiled, over a static cache")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU too")
    args = parser.parse_args()
    bench = load_bench()
    layer = bench.Layer(bench.Sizes(args.smoke), args.b, bench.OWN[0])
    if not args.own:
        bench.hf.enable(layer.module)
    run = layer.compiled(not args.own) if args.compiled else layer.fresh()
    run(3)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [ProfilerActivity.CUDA]
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        run(STEPS)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    total = 0.0
    for row in sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total):
        us = row.self_device_time_total / STEPS
        total += us
        print(f"{us:9.2f} us  {row.count / STEPS:5.1f} x  {row.key[:120]}")
    print(f"{total:9.2f} us of kernels a step")


if __name__ == "__main__":
    main()
