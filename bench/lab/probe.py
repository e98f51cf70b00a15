"""Builds the decode kernel from a copy of the sources, changed for an experiment, with the program that times and traces it.

  python3 bench/lab/probe.py --out build/lab/NAME [--tree PATH] [--trace [--fine] | --chain] [--subst 'FILE=>OLD=>NEW' ...] [--report]

OUT/tree holds the copy, OUT/decode_time is the program (README.md). A second call with the same --out compiles only what has changed.
A probe's place is named by a line of the kernel. Where no such line is found, or more than one, the kernel has changed, and PROBES
must follow.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "bench/lab"
KERNEL = "src/cuda/sm90/decode_dense"
COPIED = ("include", "src", "cmake", "CMakeLists.txt", "VERSION")
OFF = ("BUILD_TESTS", "BUILD_BENCH", "BUILD_EXAMPLES", "INSTALL", "PYTHON")

sys.path.insert(0, str(ROOT / "tools"))
import check_spills  # noqa: E402

# Text to put before or after a line: (file, "before" or "after", text, line). Lines are compared without their indentation.
OUT, SCORES, ITEMS = "kLeft + threadIdx.x / 128", "kScores", "kItems"


def note(file, where, track, event, line, condition=""):
    text = (
        f"flash_mla::lab::probe<SharedStorage>(flash_mla::lab::{track}, flash_mla::lab::{event});"
    )
    return file, where, f"if ({condition}) {text}" if condition else text, line


CLOCKS = (
    ("traits.h", "before", '}\n#define FLASH_MLA_LAB_KERNEL\n#include "probes.cuh"\nnamespace flash_mla::cuda::decode_dense {',
     "struct TensorMaps {"),
    ("kernel.cuh", "after", "flash_mla::lab::note_clock(0);",
     "SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);"),
    ("kernel.cuh", "before", "flash_mla::lab::note_clock(1);",
     "cluster_sync<T>(::cuda::ptx::sem_release);  // the other CTA may still signal this one's barriers"),
)  # fmt: skip
QUERY_LANE, RIGHT_LANE = "threadIdx.x == kQueryWarp * 32", "threadIdx.x == kRightWarp * 32"
PREPARE = "is_new = prepare<T>(params, maps, shared);"
LOADS = "load<T::kMulticast>(part, item.head, page, stream);"
FIRST_LOAD = "load<false>(part, item.head, __ldg(table_of(item)), stream);"
PROBES = (
    ("traits.h", "after", "uint16_t lab_count[7];", "int32_t num_split_tiles, merge_ready;"),
    ("kernel.cuh", "before", "flash_mla::lab::begin_probes(shared);", "bool is_new = false;"),
    note("kernel.cuh", "after", "kPages", "kFound", "if (!holds) memory.first = plan(params, position, memory.seqlen(), shared);", RIGHT_LANE),
    note("kernel.cuh", "after", "kPages", "kBarriers", "init_barriers(shared, T::kCluster);", RIGHT_LANE),
    note("producer.cuh", "before", "kPages + warp - kRightWarp", "kFirstItem", "if (warp == kRightWarp) {"),
    note("kernel.cuh", "after", ITEMS, "kPlanned", PREPARE, QUERY_LANE),
    note("kernel.cuh", "before", ITEMS, "kRoles", "ptx::decrease_registers<kProducerRegisters>();", QUERY_LANE),
    note("kernel.cuh", "before", SCORES, "kRoles", "Scorer<T>(params, shared).run();"),
    note("kernel.cuh", "before", OUT, "kItem", "output.run(item);"),
    note("kernel.cuh", "after", OUT, "kItemDone", "output.run(item);"),
    note("kernel.cuh", "after", OUT, "kItemOut", "merger.put_out(item, output, at);"),
    note("kernel.cuh", "before", OUT, "kAllItems", "merger.finish();"),
    note("kernel.cuh", "after", OUT, "kMerged", "merger.finish();"),
    note("score.cuh", "before", SCORES, "kWaitQ", "load_query();"),
    note("score.cuh", "after", SCORES, "kQ", "load_query();"),
    note("score.cuh", "before", SCORES, "kIssue", "issue_scores(q, item.query_phase, next);"),
    note("score.cuh", "after", SCORES, "kRightLanded + (buffer < kLeftBuffers ? 2 : buffer >= kHalfBuffers)",
         "ptx::mbarrier_wait(&shared_.barriers.full[buffer], phase);", "buffer != kQueryBuffer"),
    note("score.cuh", "after", SCORES, "kS", "ptx::pin(s_);"),
    note("score.cuh", "after", SCORES, "kPDone", "softmax(place, scale, first);"),
    note("output.cuh", "after", OUT, "kP", "ptx::mbarrier_wait(&shared_.barriers.p_ready[rope.slot()], rope.phase());"),
    note("output.cuh", "before", OUT, "kGo", "ptx::wgmma_fence();"),
    note("output.cuh", "before", OUT, "kPvIssued", "ptx::wgmma_wait<0>();"),
    note("output.cuh", "before", OUT, "kPvDone", "if (--left == 0) break;"),
    note("merge.cuh", "before", OUT, "kStored", "if (many) arrive(item);"),
    note("merge.cuh", "after", OUT, "kLast", "if (many || !arrive_second(item)) return;"),
    note("merge.cuh", "before", OUT, "kPieces", "if (shared.merge_ready && item.rows > 0) {"),
    note("merge.cuh", "before", OUT, "kTileDone",
         "if ((before >> 32) + 1 == static_cast<Counter>(item.piece_count)) *counter(item) = 0;"),
    note("merge.cuh", "before", OUT, "kWeights", "if (first == 0) scratch.inverse[row] = inverse_or_zero(total);"),
    note("producer.cuh", "before", "kPages + warp - kRightWarp", "kLoad", LOADS),
    note("producer.cuh", "after", "kPages + warp - kRightWarp", "kLoaded", LOADS),
    note("producer.cuh", "after", ITEMS, "kItemTold", "::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_full[at.slot()]);"),
    # The first page, before the roles begin.
    note("producer.cuh", "before", "kPages + warp - kRightWarp", "kLoad", FIRST_LOAD),
    note("producer.cuh", "after", "kPages + warp - kRightWarp", "kLoaded", FIRST_LOAD),
    note("producer.cuh", "after", ITEMS, "kItemTold", "::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_full[0]);"),
)  # fmt: skip
FINE = (
    note("score.cuh", "before", SCORES, "kSoftmax", "softmax(place, scale, first);"),
    note("score.cuh", "after", SCORES, "kMaxima", "if (tried) find_maxima(scale, factor);"),
)  # fmt: skip


# What decode_time chain needs, and no other probe: each costs its warp time, and a page has fifteen.
CHAIN = tuple(edit for edit in PROBES if "probe<" not in edit[2] or f"probe<SharedStorage>(flash_mla::lab::{SCORES}, " in edit[2]
              and any(f"flash_mla::lab::{event})" in edit[2] for event in ("kIssue", "kS", "kPDone")))  # fmt: skip


def put(texts, edit):
    """Puts an edit's text into texts[file], a list of lines."""
    name, where, text, anchor = edit
    lines = texts[f"{KERNEL}/{name}"]
    stripped = [line.strip() for line in lines]
    if (count := stripped.count(anchor)) != 1:
        sys.exit(
            f"probe: {name} has {count} lines {anchor!r}, the probe needs one: PROBES must follow it"
        )
    at = stripped.index(anchor) + (where == "after")
    lines[at:at] = text.split("\n")


def copy(tree, target, edits, substitutions):
    """Copies the sources with the edits and substitutions; leaves alone what is right already, so that it is not compiled again."""
    names = [p for part in COPIED for p in ([tree / part] if (tree / part).is_file() else sorted((tree / part).rglob("*")))]  # fmt: skip
    texts = {p.relative_to(tree).as_posix(): p.read_text() for p in names if p.is_file()}
    for rule in substitutions:
        if rule.count("=>") != 2:
            sys.exit(f"probe: --subst wants FILE=>OLD=>NEW, not {rule!r}")
        name, old, new = rule.split("=>")
        matches = [n for n in texts if n.endswith(name)]
        if len(matches) != 1 or old not in texts[matches[0]]:
            sys.exit(f"probe: --subst: {name!r} names {len(matches)} files; {old!r} must be in it")
        texts[matches[0]] = texts[matches[0]].replace(old, new)
    texts = {name: text.split("\n") for name, text in texts.items()}
    for edit in edits:
        put(texts, edit)
    for name in ("bf16_pair", "bf16_single"):
        texts[f"{KERNEL}/{name}.cu"] += [f"FLASH_MLA_LAB_READER({name})", ""]
    for name, text in ((n, "\n".join(lines)) for n, lines in texts.items()):
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    for file in [f for f in target.rglob("*") if f.is_file()]:
        if file.relative_to(target).as_posix() not in texts:
            file.unlink()


def run(*command, **more):
    done = subprocess.run([str(c) for c in command], text=True, **more)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}\nprobe: {command[0]} failed")
    return done.stdout or ""


def report(build):
    """Registers, spills, instructions and serialised products of each kernel, as ptxas and cuobjdump tell them."""
    reports = check_spills.parse((build / "build.log").read_text())
    for name, found in sorted(reports.items()):
        if KERNEL not in name or not found["kernels"]:
            continue
        count = "?"
        if shutil.which("cuobjdump"):
            code = run("cuobjdump", "-sass", build / name, stdout=subprocess.PIPE)
            count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
        for usage in found["kernels"].values():
            spills = f"{usage.get('stores', '?')} + {usage.get('loads', '?')} bytes of spills"
            print(f"{Path(name).stem:16} {usage.get('registers', '?')} registers, {spills}, {count} instructions")  # fmt: skip
        for warning in found["warnings"]:
            print(f"{Path(name).stem:16} {warning}")


def main():
    parser = argparse.ArgumentParser(prog="probe.py", usage=__doc__.split("\n")[2].strip())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--trace", action="store_true", help="put the probes in")
    parser.add_argument("--fine", action="store_true", help="and some within the softmax")
    parser.add_argument(
        "--chain", action="store_true", help="only the three that `decode_time chain` reads"
    )
    parser.add_argument("--subst", action="append", default=[], metavar="FILE=>OLD=>NEW")
    parser.add_argument("--report", action="store_true", help="print what ptxas said")
    options = parser.parse_args()
    out, tree = options.out.resolve(), options.tree.resolve()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or sys.exit("probe: no nvcc")
    edits = (
        CLOCKS
        + PROBES * (options.trace or options.fine)
        + FINE * options.fine
        + CHAIN * options.chain
    )
    copy(tree, out / "tree", edits, options.subst)
    build = out / "build"
    switches = [f"-DFLASH_MLA_{name}=OFF" for name in OFF] + ["-DFLASH_MLA_CUDA=ON"]
    switches.append(f"-DCMAKE_CUDA_FLAGS=-I{LAB}")
    run("cmake", "-S", out / "tree", "-B", build, "-G", "Ninja", *switches, stdout=subprocess.PIPE)
    command = ("cmake", "--build", build, "-j", "2", "--target", "flash_mla_static")
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        log = process.stdout.read()
    with (build / "build.log").open("a") as file:
        file.write(log)  # of a build that fails too: what it did compile is not compiled again
    if process.returncode:
        sys.exit(f"{log}\nprobe: the build failed")
    run(nvcc, "-std=c++20", "-O2", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{out / 'tree/include'}", "-o",
        out / "decode_time", LAB / "decode_time.cu", build / "libflash_mla.a")  # fmt: skip
    if options.report:
        report(build)
    print(out / "decode_time")


if __name__ == "__main__":
    main()
