"""The roofline plot of `flash-mla bench`: what each call reached, under the device's ceilings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

OURS = "flash_mla"
_MARKERS = ("o", "s", "^", "D", "v")


def roofline_points(rows: Iterable[Mapping]) -> dict[str, list[tuple[float, float]]]:
    """{who: [(FLOP per byte, TFLOPS)]} for ours and every peer that was timed."""
    points: dict[str, list[tuple[float, float]]] = {OURS: []}
    for row in rows:
        if not row.get("us"):
            continue
        intensity = row["tflops"] / row["gbps"] * 1e3
        points[OURS].append((intensity, row["tflops"]))
        for name, us in row["peers"].items():
            if isinstance(us, (int, float)):
                reached = row["tflops"] * row["us"] / us
                points.setdefault(name, []).append((intensity, reached))
    return points


def roofline_plot(
    rows: Iterable[Mapping], ceilings: Mapping[str, float], path: str | Path, title: str = ""
) -> None:
    """Writes a PNG or SVG (by the path's ending) of rows as measure_case() returns them.

    `ceilings` is {"gbps", "tflops"}, as measure_ceilings() gives. Raises RuntimeError without
    matplotlib, ValueError for another ending or when no row was timed.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot = {path}, wanted a name that ends in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = roofline_points(rows)
    everything = [point for series in points.values() for point in series]
    if not everything:
        raise ValueError("plot: no case was timed")
    peak, gbps = ceilings["tflops"], ceilings["gbps"]
    ridge = peak * 1e3 / gbps
    low = min([x for x, _ in everything] + [ridge]) / 2
    high = max([x for x, _ in everything] + [ridge]) * 2

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog([low, ridge, high], [low * gbps * 1e-3, peak, peak], color="black", linewidth=1.5)
    middle = (low * ridge) ** 0.5
    for label, point in (
        (f"{gbps:,.0f} GB/s", (middle, middle * gbps * 1e-3)),
        (f"{peak:,.3g} TFLOPS", (high, peak)),
    ):
        axes.annotate(label, point, (-8, 6), textcoords="offset points", ha="right")
    for (name, series), marker in zip(points.items(), _MARKERS, strict=False):
        size = 42 if name == OURS else 24
        xs, ys = [x for x, _ in series], [y for _, y in series]
        axes.scatter(xs, ys, s=size, marker=marker, label=name, alpha=0.8)
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOPS")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    # The same rows give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "flash-mla"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
