"""Writes the performance tables of README.md and docs/performance.md and the plots beside them.

The figures come from the newest file of bench/results for each GPU, from bench/results/cpu, and from bench/cases; none is written
by hand. The cases of dense.json are judged; those of MORE_CASES are shown, but no part of the means. `--check` writes nothing and fails when a file is not what it would write.
"""

import math
import re
import sys
from html import escape

import ledger
import roofline
import transformers_table

ROOT = ledger.ROOT
CASES = ROOT / "bench/cases/dense.json"
MORE_CASES = [ROOT / "bench/cases/dense-small-heads.json"]
PEERS = {"sgl_flash_mla": "FlashMLA", "fa3_qv": "FA3 qv", "flashinfer_fa3": "FlashInfer"}
COLORS = {"sgl_flash_mla": "#d1495b", "fa3_qv": "#edae49", "flashinfer_fa3": "#66a182"}
REGIMES = {
    "T": "compute bound (s_q * h_q > 64)",
    "M": "memory bound (s_q * h_q <= 64)",
    "L": "16 requests or fewer",
}


def slug(gpu):
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def newest_per_gpu():
    """The newest result of each GPU, newest first."""
    newest = {}
    for _, result in ledger.results():
        newest[result["gpu"]] = result
    return sorted(newest.values(), key=lambda result: result["date"], reverse=True)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value, digits=1):
    return "-" if value is None else f"{value:.{digits}f}"


def best_ratio(row):
    """Best peer's time over ours; None without a peer."""
    return min(row["peers"].values()) / row["us"] if row["peers"] and row["us"] else None


def geomean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def by_name(document):
    """The cases of a case file."""
    return {case["name"]: case for case in document["cases"]}


def measured_on(result):
    return (
        f"{result['gpu']}, driver {result['driver']}, CUDA {result['cuda']}, "
        f"PyTorch {result['torch']}, {result['date']}"
    )


def summary(result, cases):
    """One row a regime: how our time compares with each peer's, and with the best of them."""
    rows = []
    judged = [row for row in result["rows"] if row["name"] in cases and row["us"]]
    for regime, meaning in REGIMES.items():
        group = [row for row in judged if cases[row["name"]]["regime"] == regime]
        ratios = {
            peer: geomean([row["peers"][peer] / row["us"] for row in group if peer in row["peers"]])
            for peer in PEERS
        }
        best = geomean([ratio for row in group if (ratio := best_ratio(row))])
        cells = [number(ratio, 2) for ratio in ratios.values()]
        rows.append([meaning, str(len(group)), *cells, number(best, 2)])
    header = ["cases", "number", *(f"over {name}" for name in PEERS.values()), "over the best"]
    return table(header, rows)


def details(result, cases):
    """One row a case that was measured: times in microseconds. Empty when none was."""
    own = {"us": "ours", "us_with_plan": "with plan", "us_batch_invariant": "batch invariant"}
    own["host_us"] = "host"
    # Older results lack some.
    own = {key: name for key, name in own.items() if any(key in row for row in result["rows"])}
    rows = []
    for row in result["rows"]:
        if row["name"] not in cases:
            continue
        case = cases[row["name"]]
        tokens = f"{case['s_kv']}{' v' if case['varlen'] else ''}"
        shape = [str(case["b"]), str(case["s_q"]), str(case["h_q"]), tokens]
        ours = [number(row.get(key)) for key in own]
        theirs = [number(row["peers"].get(peer)) for peer in PEERS]
        rates = [number(row["tflops"], 0), number(row["gbps"], 0)]
        rows.append([*shape, *ours, *theirs, number(best_ratio(row), 2), *rates])
    header = ["b", "s_q", "h_q", "s_kv", *own.values(), *PEERS.values()]
    return table([*header, "best / ours", "TFLOPS", "GB/s"], rows) if rows else ""


def cpp_host(result):
    """What the C++ calls cost the host, one row a shape. Empty where it was not measured."""
    rows = [
        [str(row["b"]), str(row["h_q"]), number(row["decode_us"]), number(row["plan_decode_us"])]
        for row in result.get("cpp_host_us", [])
    ]
    return table(["b", "h_q", "decode()", "plan_decode()"], rows) if rows else ""


def floors(document):
    """What each case must move and compute, and the time below which it cannot go."""
    model = document["floor"]
    fixed = model["latency_us"] + model["block_us"] + model["merge_us"]
    rows = []
    for case in document["cases"]:
        query_rows = case["b"] * case["s_q"] * case["h_q"]
        moved = 1152 * case["tokens"] + 2 * 1088 * query_rows
        flop = 2 * 1088 * case["s_q"] * case["h_q"] * case["tokens"]
        floor = fixed + max(moved / model["gbps"] / 1e3, flop / model["tflops"] / 1e6)
        if abs(floor - case["floor_us"]) > 0.06:
            sys.exit(
                f"readme_table: {case['name']}: floor_us = {case['floor_us']}, it is {floor:.1f}"
            )
        cells = [f"{moved / 1e6:.1f}", f"{flop / 1e9:.1f}", f"{floor:.1f}"]
        rows.append([case["name"], str(case["tokens"]), *cells, f"{case['best_peer_us']:.1f}"])
    return (
        f"{model['latency_us']} us + {model['block_us']} us + max(bytes / {model['gbps']} GB/s, "
        f"FLOP / {model['tflops']} TFLOPS) + {model['merge_us']} us:\n\n"
        + table(["case", "tokens", "MB", "GFLOP", "floor us", "best peer us"], rows)
    )


def cpu_tables():
    """Ours against PyTorch's bf16 operations, one table a processor."""
    parts = []
    for file in sorted((ledger.RESULTS / "cpu").glob("*.json")):
        result = ledger.read(file)
        head = f"{result['cpu']}, {result['isa']}, {result['threads']} threads, PyTorch {result['torch']}"
        rows = [
            [row["name"], f"{row['us']:.0f}", f"{row['us_torch']:.0f}", f"{row['ratio']:.1f}"]
            for row in result["rows"]
        ]
        parts.append(f"{head}:\n\n" + table(["case", "us", "us PyTorch", "ratio"], rows))
    return "\n\n".join(parts) or "No result has been committed yet."


def plot(result):
    """SVG: the time of every peer relative to ours, one line a case; right of 1 we are faster."""
    rows = [row for row in result["rows"] if row["us"]]
    ratios = [us / row["us"] for row in rows for us in row["peers"].values()]
    low, high = min([0.8, *ratios]), max([1.6, *ratios]) * 1.02
    left, width, step, top = 230, 470, 18, 54
    height = top + step * len(rows) + 34

    def axis(ratio):
        return left + width * (ratio - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Time of each peer over ours: {escape(result["gpu"])}, '
        f"{result['date']}</text>",
    ]
    timed = [peer for peer in PEERS if any(peer in row["peers"] for row in rows)]
    for index, peer in enumerate(timed):
        x = left + 110 * index
        parts.append(f'<circle cx="{x}" cy="36" r="4" fill="{COLORS[peer]}"/>')
        parts.append(f'<text x="{x + 8}" y="40">{PEERS[peer]}</text>')
    bottom = top + step * len(rows)
    for tenth in range(math.ceil(low * 5), math.floor(high * 5) + 1):
        x, ours = axis(tenth / 5), tenth == 5
        color, stroke = ("#30638e", 2) if ours else ("#dddddd", 1)
        parts.append(
            f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{color}" '
            f'stroke-width="{stroke}"/>'
        )
        label = "ours" if ours else f"{tenth / 5:.1f}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    for index, row in enumerate(rows):
        y = top + step * index + 8
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{row["name"]}</text>')
        for peer, us in sorted(row["peers"].items()):
            x = axis(us / row["us"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{COLORS[peer]}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def fill(text, name, content):
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: generated by make readme -->", f"<!-- {name}: end -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        sys.exit(f"readme_table: the markers of {name} are missing")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def documents():
    """{file: contents} of everything that is generated."""
    document = ledger.read(CASES)
    cases = by_name(document)
    more = {name: case for file in MORE_CASES for name, case in by_name(ledger.read(file)).items()}
    results = newest_per_gpu()
    short, full, files = [], [], {}
    for result in results:
        if unknown := {row["name"] for row in result["rows"]} - cases.keys() - more.keys():
            sys.exit(f"readme_table: {', '.join(sorted(unknown))}: in no file of bench/cases")
        name = f"performance-{slug(result['gpu'])}.svg"
        files[ROOT / "docs" / name] = plot(result)
        short.append(f"{measured_on(result)}; geometric means of speed, ours over theirs:\n")
        short.append(summary(result, cases) + "\n")
        short.append(f"![Time of each peer over ours](docs/{name})\n")
        if any(row["us"] and row["peers"] for row in result["rows"]):
            name = f"roofline-{slug(result['gpu'])}.svg"
            files[ROOT / "docs" / name] = roofline.plot(result)
            short.append(f"![Roofline](docs/{name})\n")
        full.append(f"### {result['gpu']}\n\n{measured_on(result)}, GPU code {result['digest']}.\n")
        full.append(summary(result, cases) + "\n")
        full.append(details(result, cases) + "\n")
        if extra := details(result, more):
            full.append("Timed beside them, and no part of the means above:\n")
            full.append(extra + "\n")
        if host := cpp_host(result):
            full.append("Microseconds that a call of the C++ library keeps the host:\n")
            full.append(host + "\n")
    none = "No result has been committed yet: `make gpu-bench` on a Hopper GPU writes one."
    readme, page = ROOT / "README.md", ROOT / "docs/performance.md"
    text = fill(readme.read_text(), "performance", "\n".join(short).strip() or none)
    brief, long, plots = transformers_table.sections(slug)
    files[readme] = fill(text, "transformers", brief)
    files |= {ROOT / "docs" / name: contents for name, contents in plots.items()}
    guide = ROOT / "docs/transformers.md"
    files[guide] = fill(guide.read_text(), "transformers", long)
    text = fill(page.read_text(), "results", "\n".join(full).strip() or none)
    text = fill(text, "cpu", cpu_tables())
    files[page] = fill(text, "floors", floors(document))
    return files


def main():
    stale = []
    for file, contents in documents().items():
        if file.exists() and file.read_text() == contents:
            continue
        stale.append(file.relative_to(ROOT).as_posix())
        if "--check" not in sys.argv:
            file.write_text(contents)
    if "--check" in sys.argv and stale:
        sys.exit(f"readme_table: {', '.join(stale)} not up to date: run make readme")
    print("readme_table: " + (f"wrote {', '.join(stale)}" if stale else "up to date"))


if __name__ == "__main__":
    main()
