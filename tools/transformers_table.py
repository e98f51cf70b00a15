"""Tables and plots of README.md and docs/transformers.md about Transformers, from bench/results/transformers-*.json.

readme_table.py calls this; none of the figures is written by hand.
"""

from html import escape

import ledger

BARS = {  # what each row should reach, and what it may: the figures that the integration was asked for
    "v3-layer-b16": ("V3 attention layer, b 16, context 8192", 50, 75),
    "v3-layer-b1": ("V3 attention layer, b 1, context 8192", 6, 9),
    "v3-dense-b16-8192": ("V3's three dense layers end to end, b 16, context 8192", 15, 25),
    "v2-lite-b16-32768": ("V2-Lite, 27 layers, b 16, context 32768", 1.5, 1.7),
    "v2-lite-b8-128": ("V2-Lite, 27 layers, b 8, context 128", 1.0, 1.1),
}
SWEEP = "v2-lite-b16-"
COLORS = {"own": "#d1495b", "ours": "#30638e"}
LABELS = {"own": "the model's own attention", "ours": "flash_mla"}
# DeepSeek-V2 (arXiv:2405.04434, sections 2.1.4 and 3.2.3): its cache against that of DeepSeek 67B, which
# has 95 layers of GQA with 8 groups of 128.
V2_LAYERS, V2_BITS, DENSE_LAYERS, DENSE_ELEMENTS = 60, 6, 95, 2 * 8 * 128


def newest():
    """The newest result of each GPU, newest first."""
    found = {}
    for file in sorted(ledger.RESULTS.glob("transformers-*.json")):
        result = ledger.read(file)
        if not result["smoke"]:
            found[result["gpu"]] = result
    return sorted(found.values(), key=lambda result: result["date"], reverse=True)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def measured_on(result):
    return (
        f"{result['gpu']}, driver {result['driver']}, CUDA {result['cuda']}, PyTorch {result['torch']}, "
        f"Transformers {result['transformers']}, bf16, {result['date']}"
    )


def by_name(result):
    return {row["name"]: row for row in result["rows"] if "failure" not in row}


def summary(result):
    """One row a figure: the model's own attention at its best, ours, and how they compare."""
    rows, found = [], by_name(result)
    for name, (title, _, _) in BARS.items():
        row = found.get(name)
        if row is None:
            continue
        if "us" in row["ours"]:
            rows += layer_rows(title, row, found.get(name.replace("-layer-", "-layer-compiled-")))
            continue
        rows += model_rows(title, row, found.get(name.replace("-dense-", "-dense-compiled-")))
    layer = found.get("v3-layer-b16")
    if layer:
        own = layer["own"][layer["best_own"]]["temporary_bytes"]
        ours = layer["ours"]["temporary_bytes"]
        ratio = f"{own / ours:.0f}x" if ours else "-"
        cells = [f"{own / 1e9:.1f} GB", f"{ours / 1e9:.2f} GB", ratio]
        rows.append(["its temporary memory, b 16", *cells])
    return table(["", "own attention", "flash_mla", ""], rows)


def layer_rows(title, row, compiled):
    """A layer's figures, and those of the layer compiled over a static cache, against the fastest own attention."""
    own = {name: timed["us"] for name, timed in row["own"].items() if "us" in timed}
    ours = {title: row["ours"]["us"]}
    if compiled:
        own[f"{compiled['best_own']}, compiled"] = compiled["own"][compiled["best_own"]]["us"]
        ours[f"{title}, compiled over a static cache"] = compiled["ours"]["us"]
    best = min(own, key=own.get)
    return [
        [name, f"{own[best] / 1e3:.2f} ms ({best})", f"{us / 1e3:.3f} ms", f"{own[best] / us:.1f}x"]
        for name, us in ours.items()
    ]


def model_rows(title, row, compiled):
    """A model's speeds, and those of its steps compiled over a static cache, against the fastest own attention."""
    measured = [(title, "", row)]
    if compiled and compiled is not row:
        measured.append((f"{title}, compiled over a static cache", " (compiled)", compiled))
    own = {how: found["own"].get("tokens_per_second", 0) for _, how, found in measured}
    best = max(own, key=own.get)
    rows = []
    for name, _, found in measured:
        ours = found["ours"]["tokens_per_second"]
        cells = ["out of memory", f"{ours:,.0f} tokens/s", "-"]
        if own[best]:
            cells[0] = f"{own[best]:,.0f} tokens/s{best}"
            cells[2] = f"{ours / own[best]:.2f}x"
        rows.append([name, *cells])
    return rows


def cache_text(result):
    """What a cached token costs, and what the published figure includes."""
    lines = []
    for row in result["rows"]:
        if "reduction" in row and "failure" not in row:
            lines.append(
                f"{row['layers']} layers of {row['heads']} heads: {row['bytes_per_token']:,.0f} bytes a cached token measured "
                f"(formula: layers * 576 * 2 = {row['bytes_per_token_formula']:,}, the rest is free room in last pages), "
                f"{row['mha_bytes_per_token']:,} for the same model's keys and values ({row['mha_formula']}): "
                f"{row['reduction']:.1%} less."
            )
    elements = V2_LAYERS * 576 * V2_BITS / (DENSE_LAYERS * DENSE_ELEMENTS * 16)
    plain = V2_LAYERS * 576 / (DENSE_LAYERS * DENSE_ELEMENTS)
    lines.append(
        f"The published {1 - elements:.1%} compares DeepSeek-V2 with another model, DeepSeek 67B, whose cache is GQA of "
        f"{DENSE_LAYERS} layers, and counts {V2_BITS} bits a value on one side and 16 on the other; with 16 bits on both sides the "
        f"same two models differ by {1 - plain:.1%}."
    )
    return "\n\n".join(lines)


def details(result):
    """Every row, eager and replayed."""
    rows = []
    for row in result["rows"]:
        if "failure" in row:
            rows.append([row["name"], "failed", "-", "-", "-"])
        elif "reduction" in row:
            continue
        elif "us" in row["ours"]:
            for who, timed in (*row["own"].items(), ("flash_mla", row["ours"])):
                if "us" in timed:
                    us = [f"{timed['us']:.0f} us", f"{timed['us_eager']:.0f} us"]
                    rows.append([row["name"], who, *us, f"{timed['temporary_bytes'] / 1e9:.2f} GB"])
        else:
            for who in ("own", "ours"):
                if "tokens_per_second" in row[who]:
                    timed = row[who]
                    cells = [
                        f"{timed['ms_per_step']:.1f} ms",
                        f"{timed['tokens_per_second']:,.0f} tokens/s",
                    ]
                    rows.append(
                        [row["name"], LABELS[who], *cells, f"{timed['peak_bytes'] / 1e9:.1f} GB"]
                    )
    return table(["row", "attention", "replay or step", "eager call or speed", "memory"], rows)


def sweep(result):
    """(context, own, ours) of the rows that the plot shows, by context."""
    rows = [row for name, row in by_name(result).items() if name.startswith(SWEEP)]
    return sorted((row["context"], row["own"], row["ours"]) for row in rows)


def plot(result):
    """SVG: tokens per second and memory beyond the weights against context, the model's own attention and ours."""
    points = sweep(result)
    width, height, left, gap, top = 330, 220, 70, 90, 60
    panels = (
        ("tokens_per_second", "tokens per second", 1),
        ("peak_bytes", "GB beyond the weights", 1e9),
    )
    total = left + len(panels) * width + (len(panels) - 1) * gap + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{top + height + 60}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13">DeepSeek-V2-Lite, 27 layers, 16 rows, bf16: {escape(result["gpu"])}, '
        f"{result['date']}</text>",
    ]
    for index, who in enumerate(("own", "ours")):
        x = left + 200 * index
        parts.append(f'<circle cx="{x}" cy="36" r="4" fill="{COLORS[who]}"/>')
        parts.append(f'<text x="{x + 8}" y="40">{LABELS[who]}</text>')
    for number, (key, title, unit) in enumerate(panels):
        x0 = left + number * (width + gap)
        values = [pair[key] / unit for _, *both in points for pair in both if key in pair]
        high = max(values, default=1) * 1.1 or 1
        bottom = top + height
        for tick in range(5):
            y = bottom - height * tick / 4
            parts.append(
                f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + width}" y2="{y:.1f}" stroke="#dddddd"/>'
            )
            parts.append(
                f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{high * tick / 4:,.3g}</text>'
            )
        parts.append(f'<text x="{x0}" y="{top - 6}">{title}</text>')
        parts.append(
            f'<text x="{x0 + width / 2:.0f}" y="{bottom + 40}" text-anchor="middle">context</text>'
        )
        step = width / max(len(points) - 1, 1)
        for who in ("own", "ours"):
            line = []
            for i, (context, own, ours) in enumerate(points):
                pair = own if who == "own" else ours
                if who == "own":
                    parts.append(
                        f'<text x="{x0 + step * i:.1f}" y="{bottom + 18}" text-anchor="middle">{context}</text>'
                    )
                if key in pair:
                    line.append((x0 + step * i, bottom - height * pair[key] / unit / high))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{COLORS[who]}" stroke-width="2"/>'
            )
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLORS[who]}"/>' for x, y in line
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


NONE = "No result has been committed yet: `make gpu-bench-transformers` on a Hopper GPU writes one."


def sections(slug):
    """(text for README.md, text for docs/transformers.md, {name of a plot in docs: contents})."""
    short, full, plots = [], [], {}
    for result in newest():
        short += [measured_on(result) + ":\n", summary(result) + "\n"]
        full += [f"### {result['gpu']}\n\n{measured_on(result)}, GPU code {result['digest']}.\n"]
        full += [summary(result) + "\n", cache_text(result) + "\n", details(result) + "\n"]
        if sweep(result):
            name = f"transformers-{slug(result['gpu'])}.svg"
            plots[name] = plot(result)
            short.append(f"![Tokens per second and memory against context](docs/{name})\n")
    return "\n".join(short).strip() or NONE, "\n".join(full).strip() or NONE, plots
