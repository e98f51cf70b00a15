"""The roofline plot of a GPU's results: what every case reached, ours and the best peer's, against both ceilings."""

import math
from html import escape

LEFT, TOP, WIDTH, HEIGHT = 62, 58, 640, 360
OURS, BEST = "#30638e", "#d1495b"


def point(row, us):
    """(FLOP per byte, TFLOPS) of a case that takes `us`."""
    return row["tflops"] * 1e3 / row["gbps"], row["tflops"] * row["us"] / us


def ticks(low, high):
    """1, 2 and 5 times each power of ten from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def plot(result):
    """SVG, both axes logarithmic. A line joins our point of a case to the best peer's."""
    rows = [row for row in result["rows"] if row["us"] and row["peers"]]
    pairs = [
        (point(row, row["us"]), point(row, min(row["peers"].values())), row["name"]) for row in rows
    ]
    gbps, tflops = result["ceilings"]["gbps"], result["ceilings"]["tflops"]
    low_x, high_x = min(p[0][0] for p in pairs) / 1.3, max(p[0][0] for p in pairs) * 1.6
    low_y = min(min(ours[1], best[1]) for ours, best, _ in pairs) / 1.3
    high_y = max(tflops, *(max(ours[1], best[1]) for ours, best, _ in pairs)) * 1.3

    def x_of(intensity):
        return LEFT + WIDTH * math.log(intensity / low_x) / math.log(high_x / low_x)

    def y_of(rate):
        return TOP + HEIGHT - HEIGHT * math.log(rate / low_y) / math.log(high_y / low_y)

    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 20}" height="{bottom + 46}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Roofline: {escape(result["gpu"])}, {result["date"]}</text>',
        f'<circle cx="{LEFT}" cy="36" r="4" fill="{OURS}"/><text x="{LEFT + 8}" y="40">ours</text>',
        f'<circle cx="{LEFT + 60}" cy="36" r="4" fill="{BEST}"/>'
        f'<text x="{LEFT + 68}" y="40">best peer of the case</text>',
        f'<text x="{LEFT + 220}" y="40" fill="#555555">roof: a copy ({gbps:.0f} GB/s) and a product '
        f"({tflops:.0f} TFLOPS) by PyTorch, same run</text>",
    ]
    for x in ticks(low_x, high_x):
        at = f"{x_of(x):.1f}"
        parts.append(f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(low_y, high_y):
        at = f"{y_of(y):.1f}"
        parts.append(f'<line x1="{LEFT}" y1="{at}" x2="{right}" y2="{at}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{y:g}</text>')
    parts.append(
        f'<text x="{right}" y="{bottom + 34}" text-anchor="end">FLOP per byte of Q, cache and output</text>'
    )
    parts.append(f'<text x="10" y="{TOP - 6}">TFLOPS</text>')
    ridge = tflops * 1e3 / gbps
    start = max(low_x, low_y * 1e3 / gbps)
    knee = min(max(ridge, start), high_x)
    roof = [
        (start, start * gbps / 1e3),
        (knee, knee * gbps / 1e3),
        (high_x, min(high_x * gbps / 1e3, tflops)),
    ]
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in roof)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#555555" stroke-width="2"/>')
    for ours, best, name in pairs:
        (x, y), (_, other) = ours, best
        at = f"{x_of(x):.1f}"
        parts.append(
            f'<line x1="{at}" y1="{y_of(y):.1f}" x2="{at}" y2="{y_of(other):.1f}" stroke="#999999"/>'
        )
        parts.append(f'<circle cx="{at}" cy="{y_of(other):.1f}" r="3.5" fill="{BEST}"/>')
        parts.append(
            f'<circle cx="{at}" cy="{y_of(y):.1f}" r="3.5" fill="{OURS}"><title>{escape(name)}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
