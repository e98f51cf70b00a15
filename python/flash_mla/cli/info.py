"""`flash-mla info`: what this build and this machine can run, and why not."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import flash_mla
from flash_mla.cli.devices import usable_devices
from flash_mla.cli.variants import probe

_YES = "[green]yes[/]"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("info", help="version, backends, devices")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = flash_mla.info()
    variants = {device: probe(device) for device in usable_devices()}
    if args.json:
        print(json.dumps({**facts, "variants": variants}, indent=2))
        return 0
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("flash_mla", facts["version"])
    table.add_row("PyTorch", facts["torch"])
    table.add_row("CUDA build", _cuda_text(facts["cuda_build"]))
    console.print(table)
    console.print(_device_table(facts))
    console.print(_variant_table(variants))
    for conflict in facts["conflicts"]:
        console.print(
            f"[bold red]conflict:[/] the installed package {conflict} has the import name "
            "flash_mla too: uninstall both, then install one"
        )
    return 0


def _cuda_text(version: int) -> str:
    if not version:
        return "none: this build has the CPU backend only"
    return f"{version // 1000}.{version % 1000 // 10}"


def _device_table(facts: dict) -> Table:
    table = Table(title="Devices", title_justify="left")
    for column in ("device", "name", "can decode"):
        table.add_column(column)
    cpu = facts["cpu"]
    table.add_row("cpu", f"{cpu['isa']}, {cpu['threads']} threads", _YES)
    for device in facts["devices"]:
        memory = f"{device['memory'] / 2**30:.0f} GiB"
        table.add_row(
            f"cuda:{device['index']}",
            f"{device['name']}, {device['capability']}, {device['sms']} SMs, {memory}",
            _YES if device["supported"] else _no(device["why_not"]),
        )
    if not facts["devices"]:
        reason = "no CUDA device is visible" if facts["cuda_build"] else "built without CUDA"
        table.add_row("cuda", "-", _no(reason))
    return table


def _variant_table(variants: dict[str, dict[str, str]]) -> Table:
    table = Table(title="What they support", title_justify="left")
    for column in ("", *variants):
        table.add_column(column)
    for name in variants["cpu"]:
        reasons = [answers[name] for answers in variants.values()]
        table.add_row(name, *(_no(reason) if reason else _YES for reason in reasons))
    return table


def _no(reason: str) -> str:
    return f"[red]no[/]: {escape(reason)}"
