"""Fails when a CUDA kernel spills registers or when ptxas serialised its wgmma instructions.

Reads the build log that `make build` keeps (ninja's lines, then what `ptxas -v` said about each file). The last report of each object
file counts, so the log may hold many incremental builds. Usage: check_spills.py BUILD_DIR [--verbose]
"""

import re
import sys
from pathlib import Path

BUILDING = re.compile(r"Building CUDA object (\S+)")
ENTRY = re.compile(r"(?:Compiling entry function '|Function properties for )([^'\s]+)")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
# C7510 to C7529: "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
SERIALISED = re.compile(r"\bC75[12]\d\b|wgmma\.mma_async instructions are serialized")


def parse(log):
    """{object file: {"kernels": {name: {"stack", "stores", "loads", "registers"}}, "warnings": [line]}}"""
    reports = {}
    current, kernel = None, None
    for line in log.splitlines():
        if match := BUILDING.search(line):
            current, kernel = {"kernels": {}, "warnings": []}, None
            reports[match[1]] = current
        elif current is None:
            continue
        elif match := ENTRY.search(line):
            kernel = current["kernels"].setdefault(match[1], {})
        elif SERIALISED.search(line):
            current["warnings"].append(line.strip())
        elif kernel is not None and (match := SPILLS.search(line)):
            kernel.update(zip(("stack", "stores", "loads"), map(int, match.groups()), strict=True))
        elif kernel is not None and (match := REGISTERS.search(line)):
            kernel["registers"] = int(match[1])
    return reports


def main():
    build = Path(sys.argv[1])
    log = build / "build.log"
    if not log.exists():
        sys.exit(f"check_spills: {log} is missing; run make build")
    reports = parse(log.read_text(errors="replace"))
    reports = {name: report for name, report in reports.items() if (build / name).exists()}
    bad, count = [], 0
    for name, report in sorted(reports.items()):
        bad += [f"{name}: {warning}" for warning in report["warnings"]]
        for kernel, usage in report["kernels"].items():
            count += 1
            if "--verbose" in sys.argv:
                print(f"{usage.get('registers', '?'):>4} registers  {kernel}")
            if "stores" not in usage:
                bad.append(f"{name}: {kernel}: no report of its spills")
            elif usage["stores"] or usage["loads"]:
                bad.append(
                    f"{name}: {kernel}: {usage['stores']} + {usage['loads']} bytes of spills"
                )
    if reports and not count:
        bad.append("CUDA files were compiled, but the log holds no report of ptxas (-Xptxas=-v)")
    if bad:
        sys.exit("check_spills: failed\n  " + "\n  ".join(bad))
    print(f"check_spills: {count} kernels in {len(reports)} files, no spills, no serialised wgmma")


if __name__ == "__main__":
    main()
