"""Times ours and the peers on a Hopper GPU and writes bench/results/<date>-<gpu>.json.

This is `make gpu-bench`. The measuring itself is the package's (flash_mla.cli.measure); this program adds what a result file
needs: which GPU code was measured (the ledger's digest), on what, and when. bench/README.md says how to bring peers.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent / "tools"), str(BENCH.parent / "python")]

import ledger  # noqa: E402

from flash_mla.cli import measure, peers  # noqa: E402

CASES = [BENCH / "cases/dense.json", BENCH / "cases/dense-small-heads.json"]


def finish(row):
    """A row as the result files have it: what a peer could not do moves out of its times."""
    told = {name: why for name, why in row["peers"].items() if isinstance(why, str)}
    row["peers"] = {name: us for name, us in row["peers"].items() if name not in told}
    if told:
        row["peer_failures"] = told
    return row


def line(row):
    """One line of progress."""
    if "failure" in row:
        return f"{row['name']:32} FAILED: {row['failure']}"
    theirs = "  ".join(f"{name} {us:.1f}" for name, us in row["peers"].items())
    return (
        f"{row['name']:32} {row['us']:8.1f} us  {row['tflops']:4.0f} TFLOPS  {row['gbps']:5.0f} GB/s"
        f"  host {row['host_us']:.1f} us  {theirs}"
    )


def cpp_host_us(build):
    """What bench/cpp/host_time.cpp measures: (rows, "") or (None, why there are none)."""
    program = (build / "bench/flash_mla_host_time").resolve()
    if not program.exists():
        return None, f"{program} was not built"
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, done.stderr.strip() or f"{program} ended with {done.returncode}"
    return [json.loads(text) for text in done.stdout.splitlines()], ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="the CMake build folder")
    parser.add_argument("--cases", type=Path, nargs="+", default=CASES, metavar="FILE")
    parser.add_argument("--filter", default="", help="only cases whose name matches this pattern")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--ms", type=float, default=120.0, help="time spent on each figure")
    parser.add_argument("--out", type=Path, help="default bench/results/<date>-<gpu>.json")
    args = parser.parse_args()

    gpu = ledger.gpu()
    if gpu is None or gpu[2] != "9.0":
        sys.exit("gpu-bench: a Hopper GPU is needed; on the CPU: make bench")
    stamp = ledger.read_stamp(args.build)
    if stamp is None or not stamp["toolkit"]:
        sys.exit(f"gpu-bench: {args.build} is no CUDA build of these sources; run make gpu-bench")
    cases = [case for file in args.cases for case in measure.load_cases(file)]
    cases = [case for case in cases if re.search(args.filter, case.name)]
    adapters, missing = peers.load_peers(dict(peer.split("=", 1) for peer in args.peer))
    for name, why in missing.items():
        print(f"without {name}: {why}", flush=True)

    slug = re.sub(r"[^a-z0-9]+", "-", gpu[0].lower()).strip("-")
    date = datetime.date.today().isoformat()
    out = args.out or ledger.RESULTS / f"{date}-{slug}.json"
    result = {"gpu": gpu[0], "driver": gpu[1], "cuda": ".".join(stamp["toolkit"].split(".")[:2])}
    result |= {"toolkit": stamp["toolkit"], "torch": measure.machine("cuda")["torch"], "date": date}
    result |= {"digest": stamp["digest"], "rounds": measure.ROUNDS}
    cpp, why = cpp_host_us(args.build)
    if cpp is None:
        print(f"without the host time of the C++ calls: {why}", flush=True)
    else:
        result["cpp_host_us"] = cpp
    result |= {"ceilings": measure.measure_ceilings("cuda"), "rows": []}
    for case in cases:
        row = finish(measure.measure_case(case, adapters, args.ms))
        result["rows"].append(row)
        print(line(row), flush=True)
        ledger.write(out, result)
    print(f"gpu-bench: {len(result['rows'])} cases in {out}")
    failed = [row["name"] for row in result["rows"] if "failure" in row]
    if failed:
        sys.exit("gpu-bench: FAILED: " + ", ".join(failed))


if __name__ == "__main__":
    main()
