"""Times ours beside a peer on a card that has rested and on one at its power limit.

    PYTHONPATH=python python3 bench/lab/cool_and_hot.py [--peer sgl_flash_mla] [CASE...]

A CASE is the name of one in bench/cases. For each, ours and the peer in turns, twice: medians of replays 0-9, 10-19 and 30-39 after
1.5 seconds of rest, then, after 1.5 seconds of replays, the median of another second and the watts that NVML saw in it. L2 is
overwritten before every replay. Where the two ratios differ, energy decides the benchmark.
"""

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import torch

from flash_mla.cli import measure, peers

CASES = Path(__file__).resolve().parents[1] / "cases"
DEFAULT = (
    "dense-b128-sq2-h128-kv8192v",
    "dense-b128-sq1-h128-kv8192v",
    "dense-b64-sq4-h128-kv4096",
)


class Energy:
    """Joules that the first card has taken."""

    def __init__(self):
        self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self.device = ctypes.c_void_p()
        if self.nvml.nvmlInit_v2() or self.nvml.nvmlDeviceGetHandleByIndex_v2(
            0, ctypes.byref(self.device)
        ):
            raise SystemExit("cool_and_hot: NVML does not answer")

    def joules(self):
        millijoules = ctypes.c_ulonglong()
        self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(millijoules))
        return millijoules.value / 1e3


def replay_for(run, seconds):
    """Microseconds of each replay."""
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        times += run(100)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="sgl_flash_mla")
    parser.add_argument("cases", nargs="*", default=DEFAULT, metavar="CASE")
    args = parser.parse_args()
    known = {
        case.name: case
        for file in sorted(CASES.glob("*.json"))
        for case in measure.load_cases(file)
    }
    adapters, missing = peers.load_peers({})
    if args.peer not in adapters:
        raise SystemExit(f"cool_and_hot: no {args.peer}: {missing.get(args.peer, 'no such peer')}")
    energy = Energy()
    for name in args.cases:
        inputs = measure.make_inputs(known[name], "cuda")
        runs = {
            "ours": measure.graph_run(measure.ours(inputs)),
            args.peer: measure.graph_run(adapters[args.peer](inputs)),
        }
        for who in [*runs, *runs]:
            run = runs[who]
            run(3)
            time.sleep(1.5)
            times = run(40)
            cool = [statistics.median(times[first : first + 10]) for first in (0, 10, 30)]
            replay_for(run, 1.5)
            before, start = energy.joules(), time.perf_counter()
            hot = statistics.median(replay_for(run, 1.0))
            watts = (energy.joules() - before) / (time.perf_counter() - start)
            print(
                f"{name:30} {who:14} cool {' '.join(f'{us:.0f}' for us in cool)}  hot {hot:.0f} us  {watts:.0f} W",
                flush=True,
            )
        del inputs, runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
