"""`flash-mla check`: self test of every device against a naive float64 reference."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import flash_mla
from flash_mla.cli.devices import usable_devices
from flash_mla.cli.measure import D_V
from flash_mla.cli.reference import (
    Problem,
    Shape,
    Verdict,
    judge,
    make_problem,
    request_keys,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("check", help="self test against a naive reference")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rows = []
    devices = usable_devices(args.device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = [
            (device, name, test) for device in devices for name, test in _tests(device, args.seed)
        ]
        for device, name, test in progress.track(steps, description="checking"):
            rows.append({"device": device, "check": name, **_outcome(test)})
    failed = sum(not row["passed"] for row in rows)
    if args.json:
        print(json.dumps({"passed": failed == 0, "rows": rows}, indent=2))
    else:
        console = Console()
        console.print(_table(rows))
        verdict = f"[red]{failed} failed[/]" if failed else "[green]all passed[/]"
        console.print(f"{len(rows)} checks on {', '.join(devices)}: {verdict}")
    return 1 if failed else 0


def _shapes(device: str) -> list[Shape]:
    shapes = [
        Shape("one token", (1,)),
        Shape("one page", (64,), h_q=128),
        Shape("part of a page", (65, 63), h_q=64),
        Shape("lengths 0, 1, 700", (0, 1, 700)),
        Shape("long, one request", (4000,)),
        Shape("fp16", (300, 129), dtype="fp16"),
        Shape("not causal", (300, 129), s_q=2, causal=False),
        Shape("s_q 4", (257, 64), s_q=4),
        Shape("s_q 128", (200,), s_q=128, h_q=3),
        Shape("s_q past the length", (3, 0, 70), s_q=5),
        Shape("h_kv 2", (150, 64), h_q=32, h_kv=2),
        *(Shape(f"{h_q} heads", (130, 20), h_q=h_q) for h_q in (1, 3, 9, 63, 126)),
    ]
    if device == "cpu":
        shapes.append(Shape("fp32", (300, 129), dtype="fp32"))
        for page_size in (1, 16, 256):
            shapes.append(Shape(f"pages of {page_size}", (300, 129), page_size=page_size))
    return shapes


def _tests(device: str, seed: int) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    for shape in _shapes(device):
        yield f"decode: {shape.name}", lambda shape=shape: check_decode(shape, device, seed)
    yield "append_kv_cache", lambda: check_append(device, seed)
    yield "merge_states", lambda: check_merge(device, seed)


def check_decode(shape: Shape, device: str, seed: int) -> Verdict:
    """One decode, run twice: near the reference, and bitwise the same again."""
    problem = make_problem(shape, seed)
    out, lse = _decode(problem.to(device), shape.causal)
    again, lse_again = _decode(problem.to(device), shape.causal)
    if not (torch.equal(out, again) and torch.equal(lse, lse_again)):
        raise ArithmeticError("a second run gave other bits")
    return judge(problem, out, lse)


def check_append(device: str, seed: int) -> Verdict:
    """Writes a cache token by token, in random order, then decodes from it."""
    shape = Shape("append", (100, 65))
    problem = make_problem(shape, seed)
    target = problem.to(device)
    target.kv_cache = torch.full_like(target.kv_cache, torch.nan)
    for i, length in enumerate(shape.lengths):
        order = torch.randperm(length, device="cpu")
        pages = problem.block_table[i, order // shape.page_size].long()
        slots = (pages * shape.page_size + order % shape.page_size).to(device)
        rows = request_keys(problem, i)[order, 0].to(device)
        kv_c, k_pe = rows[:, :D_V].contiguous(), rows[:, D_V:].contiguous()
        flash_mla.append_kv_cache(kv_c, k_pe, target.kv_cache, slots)
    return judge(problem, *_decode(target, shape.causal))


def check_merge(device: str, seed: int) -> Verdict:
    """Decodes the first page and the rest apart, and merges."""
    problem = make_problem(Shape("merge", (200, 64, 70), causal=False), seed)
    whole = problem.to(device)
    size = problem.shape.page_size
    head = dataclasses.replace(whole, cache_seqlens=whole.cache_seqlens.clamp(max=size))
    rest = dataclasses.replace(
        whole,
        cache_seqlens=(whole.cache_seqlens - size).clamp(min=0),
        block_table=whole.block_table[:, 1:].contiguous(),
    )
    parts = [_decode(part, causal=False) for part in (head, rest)]
    merged = flash_mla.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    verdict = judge(problem, *merged)
    # The parts were rounded before they were merged: one more rounding than a decode makes.
    return dataclasses.replace(verdict, out_limit=1.5 * verdict.out_limit)


def _decode(problem: Problem, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    metadata, _ = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(
        problem.q,
        problem.kv_cache,
        problem.block_table,
        problem.cache_seqlens,
        D_V,
        metadata,
        softmax_scale=problem.softmax_scale,
        causal=causal,
    )


def _outcome(test: Callable[[], Verdict]) -> dict:
    try:
        verdict = test()
    except Exception as error:  # whatever a broken build raises is a failed check
        return {"passed": False, "failure": f"{type(error).__name__}: {error}"}
    return {"passed": verdict.passed, **dataclasses.asdict(verdict)}


def _table(rows: list[dict]) -> Table:
    table = Table(title="Largest error against float64 (and its limit)", title_justify="left")
    for column in ("device", "check", "out", "limit", "lse", "limit", ""):
        table.add_column(column, justify="right" if column in ("out", "limit", "lse") else "left")
    for row in rows:
        if "failure" in row:
            figures = ["-"] * 4
            state = f"[red]{escape(row['failure'])}[/]"
        else:
            keys = ("out_error", "out_limit", "lse_error", "lse_limit")
            figures = [f"{row[key]:.1e}" for key in keys]
            state = "[green]ok[/]" if row["passed"] else "[red]FAILED[/]"
        table.add_row(row["device"], row["check"], *figures, state)
    return table
