"""Runs the GPU suites on the Hopper GPU of this machine and writes tests/gpu-ledger.json.

Each suite runs on its own in under ten minutes and its result is written at once, so a run can be cut short and taken up again:
`--suite NAME` runs that suite alone, and what other suites found on the same GPU code stays in the ledger.

Suites: python (tests/python on cuda), cpp (the GoogleTest program), and compute-sanitizer's memcheck, racecheck, synccheck and
initcheck over the named subset SANITIZED of the C++ tests, memcheck over one more. A report that is a false positive is suppressed,
with its reason, in tests/sanitizer/TOOL.supp.xml; none is ignored.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ledger

ROOT = ledger.ROOT
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# A CTA of the decode has 31 mbarriers; synccheck loses track, and the run fails, past its default number.
SANITIZER_OPTIONS = {"synccheck": ["--num-cuda-barriers", "16384"]}
TIME_LIMIT = 590  # seconds a suite may take
GPU_TESTS = "*Gpu*"
SANITIZED = "*GpuSanitized*"
# More for a tool; too long for those that follow every access to shared memory.
SANITIZED_TOO = {"memcheck": ":*GpuMemcheck*"}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def count(report):
    """Counts of a JUnit file, as pytest and GoogleTest write it."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        if tags & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in tags or case.get("result") == "skipped":
            counts["skipped"] += 1
        elif case.get("status") != "notrun":
            counts["passed"] += 1
    return counts


def run(command, report):
    """Runs a suite, showing its output: (exit status, output, counts)."""
    print("+ " + " ".join(map(str, command)), flush=True)
    report.unlink(missing_ok=True)
    lines = []
    deadline = time.monotonic() + TIME_LIMIT
    with subprocess.Popen(
        ["timeout", "--kill-after=5", str(TIME_LIMIT), *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    counts = count(report) if report.exists() else {"passed": 0, "failed": 0, "skipped": 0}
    if process.returncode != 0 and not counts["failed"]:
        # A crash or the time limit: nothing says what failed, so something did.
        counts["failed"] = 1
        if time.monotonic() > deadline:
            print(f"gpu-test: stopped after {TIME_LIMIT} s")
    return "".join(lines), counts


def run_python(build):
    report = build / "gpu-python.xml"
    command = [sys.executable, "-m", "pytest", "tests/python", "-q", "-m", "cuda"]
    return run([*command, f"--junitxml={report}"], report)[1]


def run_cpp(build, binary):
    report = build / "gpu-cpp.xml"
    return run([binary, f"--gtest_filter={GPU_TESTS}", f"--gtest_output=xml:{report}"], report)[1]


def run_sanitizer(tool, build, binary):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        sys.exit("gpu-test: compute-sanitizer is missing; it is part of the CUDA toolkit")
    report = build / f"gpu-{tool}.xml"
    options = ["--tool", tool, "--error-exitcode", "86", *SANITIZER_OPTIONS.get(tool, [])]
    suppressions = ROOT / "tests/sanitizer" / f"{tool}.supp.xml"
    if suppressions.exists():
        options += ["--suppressions", suppressions]
    tests = SANITIZED + SANITIZED_TOO.get(tool, "")
    test = [binary, f"--gtest_filter={tests}", f"--gtest_output=xml:{report}"]
    output, counts = run([sanitizer, *options, *test], report)
    summaries = SUMMARY.findall(output)
    counts["reports"] = sum(int(errors or hazards) for errors, hazards in summaries)
    if counts["reports"] or not summaries:
        counts["failed"] = max(counts["failed"], 1)
    return counts


def find_binary(build, wanted):
    """The C++ test program, or None with a loud word."""
    binary = Path(wanted) if wanted else build / "tests/cpp/flash_mla_tests"
    if binary.exists():
        return binary.resolve()
    print(
        f"gpu-test: SKIPPED, LOUDLY: {binary} is missing (no GoogleTest here?): the C++ GPU tests and "
        "compute-sanitizer do not run. Build it elsewhere and name it: make gpu-test TEST_BINARY=...",
        flush=True,
    )
    return None


def describe(gpu, stamp):
    """The ledger's head: what was tested, on what."""
    import torch

    return {
        "gpu": gpu[0],
        "driver": gpu[1],
        "cuda": ".".join(stamp["toolkit"].split(".")[:2]),
        "toolkit": stamp["toolkit"],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "digest": stamp["digest"],
    }


def record(head, suite, counts):
    """Writes one suite's result; what other suites found on the same GPU code and GPU stays."""
    kept = {}
    if ledger.LEDGER.exists():
        old = ledger.read(ledger.LEDGER)
        if all(old.get(key) == head[key] for key in ("digest", "gpu", "driver")):
            kept = old["suites"]
    kept[suite] = counts
    suites = {name: kept[name] for name in ledger.SUITES if name in kept}
    ledger.write(ledger.LEDGER, {**head, "suites": suites})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="the CMake build folder")
    parser.add_argument(
        "--suite", action="append", choices=ledger.SUITES, help="repeatable; default all"
    )
    parser.add_argument("--test-binary", help="the C++ test program, when it was built elsewhere")
    args = parser.parse_args()

    gpu = ledger.gpu()
    if gpu is None or gpu[2] != "9.0":
        found = "no GPU" if gpu is None else f"{gpu[0]}, compute capability {gpu[2]}"
        sys.exit(f"gpu-test: a Hopper GPU (9.0) is needed, found {found}; no ledger is written")
    stamp = ledger.read_stamp(args.build)
    if stamp is None or not stamp["toolkit"]:
        sys.exit(f"gpu-test: {args.build} is no CUDA build of these sources; run make gpu-test")
    head = describe(gpu, stamp)
    build = args.build.resolve()
    binary = find_binary(build, args.test_binary)

    failed = []
    for suite in args.suite or ledger.SUITES:
        if suite != "python" and binary is None:
            continue
        began = time.monotonic()
        if suite == "python":
            counts = run_python(build)
        elif suite == "cpp":
            counts = run_cpp(build, binary)
        else:
            counts = run_sanitizer(suite, build, binary)
        counts["seconds"] = round(time.monotonic() - began)
        record(head, suite, counts)
        if counts["failed"] or not counts["passed"]:
            failed.append(suite)
        print(f"gpu-test: {suite}: {counts}", flush=True)
    if failed:
        sys.exit("gpu-test: FAILED: " + ", ".join(failed))
    print("gpu-test: passed")


if __name__ == "__main__":
    main()
