"""`flash-mla bench`: times decode cases, with peers beside ours; table, JSON, CSV and a plot."""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flash_mla.cli import measure
from flash_mla.cli.devices import usable_devices
from flash_mla.cli.peers import PEERS, load_peers
from flash_mla.cli.roofline import roofline_plot

_SMALL_CASES = Path(__file__).with_name("small_cases.json")
_FAILED = "[red]failed[/]"
_LIVE_MARGIN = 6  # lines of the screen that the live table leaves for its head and the bar
_PLAIN_WIDTH = 160  # columns of a table that goes to a file
_CSV_COLUMNS = (
    *("name", "us", "us_spread", "us_with_plan", "us_batch_invariant", "host_us"),
    *("tflops", "gbps", "error"),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="time decode cases")
    add = parser.add_argument
    add(
        "--cases",
        type=Path,
        help="case file (default: the repository's on a GPU, else a small one)",
    )
    add("--filter", default="*", help="only cases whose name contains this, or matches the pattern")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--ms", type=float, default=120.0, help="milliseconds to repeat each measurement for")
    add("--seed", type=int, default=0)
    add("--peers", action="store_true", help="time the peers that are there, too")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="library of a peer (sgl_flash_mla, fa3_qv); implies --peers",
    )
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON (to the output, or FILE)")
    add("--csv", nargs="?", const="-", metavar="FILE", help="write CSV (to the output, or FILE)")
    add("--plot", type=Path, metavar="FILE", help="write a roofline plot, .png or .svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot = {args.plot}, wanted a name that ends in .png or .svg")
    device = _choose_device(args.device)
    if device != "cpu":
        torch.cuda.set_device(device)
    cases = select(measure.load_cases(args.cases or _default_cases(device)), args.filter)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    peers = _load_peers(args, device, console)
    rows = measure_with_table(
        console,
        cases,
        list(peers),
        lambda case: measure.measure_case(case, peers, args.ms, device, args.seed),
    )
    for failure in _failures(rows):
        console.print(failure, style="red", markup=False)
    document = {
        **measure.machine(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rows": rows,
    }
    if args.json:
        _write(args.json, lambda file: print(json.dumps(document, indent=1), file=file))
    if args.csv:
        _write(args.csv, lambda file: write_csv(rows, list(peers), file))
    if args.plot:
        roofline_plot(rows, measure.measure_ceilings(device), args.plot, title=document["gpu"])
    return 1 if any("failure" in row for row in rows) else 0


def select(cases: list[measure.Case], pattern: str) -> list[measure.Case]:
    """Cases whose name contains or matches the pattern. Raises ValueError when there is none."""
    chosen = [c for c in cases if pattern in c.name or fnmatch.fnmatchcase(c.name, pattern)]
    if not chosen:
        raise ValueError(f"--filter = {pattern}, which matches none of {len(cases)} cases")
    return chosen


def measure_with_table(
    console: Console,
    cases: list[measure.Case],
    peer_names: list[str],
    measure_one: Callable[[measure.Case], dict],
) -> list[dict]:
    """Calls measure_one(case) for each case under a progress bar and a table that grows."""
    rows: list[dict] = []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
    task = progress.add_task("", total=len(cases))
    visible = max(console.height - _LIVE_MARGIN, 1)
    with Live(progress, console=console, refresh_per_second=4) as live:
        for case in cases:
            progress.update(task, description=case.name)
            rows.append(measure_one(case))
            progress.advance(task)
            live.update(Group(result_table(rows[-visible:], peer_names), progress))
        live.update(result_table(rows, peer_names), refresh=True)
    return rows


def result_table(rows: list[dict], peer_names: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    columns = ["us", "+-", "with\nplan", "host\nus", "TFLOPS", "GB/s", "error"]
    if peer_names:
        columns += [*(name.replace("_", "\n") for name in peer_names), "best peer\nover ours"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *_cells(row, peer_names))
    return table


def _cells(row: dict, peer_names: list[str]) -> list[str]:
    keys = ("us", "us_spread", "us_with_plan", "host_us", "tflops", "gbps", "error")
    cells = [_FAILED, *[""] * 6] if "failure" in row else [_number(row[key]) for key in keys]
    if not peer_names:
        return cells
    times = [row["peers"][name] for name in peer_names]
    cells += [_FAILED if isinstance(us, str) else _number(us) for us in times]
    timed = [us for us in times if not isinstance(us, str)]
    cells.append(f"{min(timed) / row['us']:.2f}x" if timed and row["us"] else "-")
    return cells


def _failures(rows: list[dict]) -> list[str]:
    """What went wrong, one line each."""
    lines = []
    for row in rows:
        reasons = {"ours": row["failure"]} if "failure" in row else {}
        reasons.update((name, us) for name, us in row["peers"].items() if isinstance(us, str))
        lines += [f"{row['name']}: {name}: {reason}" for name, reason in reasons.items()]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def write_csv(rows: list[dict], peer_names: list[str], file: TextIO) -> None:
    """One line per case; a peer that failed, and a case of ours that failed, have empty fields."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_CSV_COLUMNS, *(f"{name}_us" for name in peer_names), "failure"])
    for row in rows:
        times = [row["peers"][name] for name in peer_names]
        times = ["" if isinstance(us, str) else us for us in times]
        ours = ["" if row[key] is None else row[key] for key in _CSV_COLUMNS]
        writer.writerow([*ours, *times, row.get("failure", "")])


def _load_peers(
    args: argparse.Namespace, device: str, console: Console
) -> dict[str, measure.Adapter]:
    if not (args.peers or args.peer):
        return {}
    paths = dict(_peer_path(text) for text in args.peer)
    if device == "cpu":
        console.print("peers run on a GPU only: none is timed")
        return {}
    peers, missing = load_peers(paths)
    for name, reason in missing.items():
        console.print(f"no {PEERS[name].title}: {reason}", style="yellow", markup=False)
    return peers


def _choose_device(wanted: str) -> str:
    devices = usable_devices("all" if wanted == "auto" else wanted)
    return next((device for device in devices if device != "cpu"), "cpu")


def _default_cases(device: str) -> Path:
    """The repository's list on a GPU, in a checkout; its cases are too big for a CPU."""
    checkout = Path(__file__).resolve().parents[3] / "bench" / "cases" / "dense.json"
    return checkout if device != "cpu" and checkout.is_file() else _SMALL_CASES


def _peer_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise ValueError(f"--peer = {text}, wanted NAME=PATH")
    return name, path


def _write(target: str, write: Callable[[TextIO], None]) -> None:
    if target == "-":
        write(sys.stdout)
        return
    with Path(target).open("w", encoding="utf-8", newline="") as file:
        write(file)
