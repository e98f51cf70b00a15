"""`flash-mla info`: what this build and this machine can run, and why not."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("info", help="version, backends, devices")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import flash_mla

    facts = flash_mla.info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("flash_mla", str(facts["version"]))
    table.add_row("PyTorch", str(facts["torch"]))
    table.add_row("CUDA build", _cuda_text(facts["cuda_build"]))
    console.print(table)
    console.print(_device_table(facts))
    for conflict in facts["conflicts"]:
        console.print(
            f"[bold red]conflict:[/] the installed package {conflict} has the import name flash_mla "
            "too: uninstall both, then install one"
        )
    return 0


def _cuda_text(version: int) -> str:
    if not version:
        return "none: this build has the CPU backend only"
    return f"{version // 1000}.{version % 1000 // 10}"


def _device_table(facts: dict) -> Table:
    table = Table(title="Devices", title_justify="left")
    for column in ("device", "name", "runs", "limits, or why not"):
        table.add_column(column)
    cpu = facts["cpu"]
    name = f"{cpu['isa']}, {cpu['threads']} threads"
    table.add_row("cpu", name, "[green]yes[/]", "bf16, fp16, fp32; page_size 1 to 256; any h_kv")
    for device in facts["devices"]:
        supported = device["supported"]
        memory = f"{device['memory'] / 2**30:.0f} GiB"
        table.add_row(
            f"cuda:{device['index']}",
            f"{device['name']}, {device['capability']}, {device['sms']} SMs, {memory}",
            "[green]yes[/]" if supported else "[red]no[/]",
            "bf16, fp16; page_size 64; any h_kv" if supported else device["why_not"],
        )
    if not facts["devices"]:
        reason = "no CUDA device is visible" if facts["cuda_build"] else "built without CUDA"
        table.add_row("cuda", "-", "[red]no[/]", reason)
    return table
