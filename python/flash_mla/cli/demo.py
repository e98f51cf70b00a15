"""`flash-mla demo`: MLA decoding of a real text, shown as tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flash_mla.cli.cache import MODELS, layer_bytes
from flash_mla.cli.decode_text import PAGE_SIZE, Result, cut, decode_text, tokenize
from flash_mla.cli.devices import usable_devices

_SAMPLE = Path(__file__).with_name("sample.txt")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="decode a real text through an MLA layer")
    parser.add_argument("--file", type=Path, help="the text (default: README.md, else a sample)")
    parser.add_argument("--requests", type=int, default=8, help="requests to cut it into")
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode per request")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens to read at most")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of the cache")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("requests", "steps", "max_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)}, wanted >= 1")
    path = args.file or _default_text()
    tokens = tokenize(path.read_text(encoding="utf-8", errors="replace"))[: args.max_tokens]
    requests = cut(tokens, args.requests)
    console = Console(stderr=args.json)
    console.print(
        f"[bold]{path.name}[/]: {len(tokens):,} tokens, cut into {len(requests)} requests of "
        + ", ".join(str(len(request)) for request in requests)
    )
    results = []
    with console.status("decoding") as status:
        for device in usable_devices(args.device):
            status.update(f"decoding on {device}")
            results.append(decode_text(requests, device, args.dtype, args.steps))
    passed = all(result.passed for result in results)
    if args.json:
        rows = [{**dataclasses.asdict(result), "passed": result.passed} for result in results]
        print(json.dumps({"tokens": len(tokens), "passed": passed, "devices": rows}, indent=2))
    else:
        _print_report(console, results)
    return 0 if passed else 1


def _default_text() -> Path:
    checkout = Path(__file__).resolve().parents[3]
    candidates = (Path("README.md"), checkout / "README.md")
    return next((path for path in candidates if path.is_file()), _SAMPLE)


def _print_report(console: Console, results: list[Result]) -> None:
    first = results[0]
    console.print(f"All requests decode their last {first.steps} tokens together, step by step.")
    console.print(_error_table(results))
    console.print(
        "Naive: keys and values of every head, in float64. Limit: twice the error of that form "
        "rounded as a kernel rounds, plus one rounding."
    )
    console.print(_bytes_table(first.tokens_cached))
    console.print(
        f"Pages: {first.pages_used} of {first.pages_total} in use, {first.page_utilisation:.1%} "
        f"of their slots hold a token ({first.tokens_cached:,} tokens, {PAGE_SIZE} to a page)"
    )
    console.print(_speed_table(results))


def _error_table(results: list[Result]) -> Table:
    table = Table(title="Absorbed decode against naive attention", title_justify="left")
    for column in ("device", "relative error", "limit", ""):
        table.add_column(column)
    for result in results:
        state = "[green]equal[/]" if result.passed else "[red]DIFFERENT[/]"
        table.add_row(result.device, f"{result.error:.2e}", f"{result.error_limit:.2e}", state)
    return table


def _bytes_table(tokens: int) -> Table:
    kinds = layer_bytes(MODELS["deepseek-v2-lite"])
    table = Table(title="KV cache of one DeepSeek-V2-Lite layer", title_justify="left")
    table.add_column("cache")
    for column in ("bytes / token", "this text", "MLA bf16 is smaller by"):
        table.add_column(column, justify="right")
    for kind, size in kinds.items():
        times = f"{size / kinds['MLA bf16']:.1f}x" if size > kinds["MLA bf16"] else ""
        table.add_row(kind, f"{size:,}", f"{size * tokens / 2**20:.1f} MiB", times)
    return table


def _speed_table(results: list[Result]) -> Table:
    table = Table(title="Tokens per second, one layer", title_justify="left")
    table.add_column("device")
    for column in ("attention alone", "whole layer"):
        table.add_column(column, justify="right")
    for result in results:
        speeds = (result.attention_tokens_per_second, result.layer_tokens_per_second)
        table.add_row(result.device, *(f"{speed:,.0f}" for speed in speeds))
    return table
