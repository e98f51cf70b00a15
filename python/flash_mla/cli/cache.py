"""`flash-mla cache`: bytes per token and longest context, by kind of attention.

Pure arithmetic. For each layer and token, in elements: MHA caches h_q * (d_nope + d_rope + d_v)
(this model's own heads, kept as they are), GQA g * 2 * d_v for g groups, MLA kv_lora_rank + d_rope
(DeepSeek-V2, arXiv:2405.04434, table 1). The fp8 formats are those of docs/formats.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re

from rich.console import Console
from rich.table import Table

_UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    **{prefix: 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SCALE_TILE = 128  # latent values that share one fp32 scale in the tile-128 format


@dataclasses.dataclass(frozen=True)
class Model:
    """The numbers of a model's public config that size its cache."""

    name: str
    layers: int
    heads: int
    kv_lora_rank: int = 512
    rope: int = 64
    nope: int = 128
    v_head: int = 128
    max_context: int = 163840  # max_position_embeddings


MODELS = {
    "deepseek-v2-lite": Model("DeepSeek-V2-Lite", layers=27, heads=16),
    "deepseek-v2": Model("DeepSeek-V2", layers=60, heads=128),
    "deepseek-v3": Model("DeepSeek-V3/R1", layers=61, heads=128),
    "deepseek-r1": Model("DeepSeek-V3/R1", layers=61, heads=128),
    "kimi-k2": Model("Kimi K2", layers=61, heads=64, max_context=131072),
}
_SHAPE_FLAGS = ("layers", "heads", "kv_lora_rank", "rope", "nope", "v_head", "max_context")


def layer_bytes(model: Model, groups: int = 8, itemsize: int = 2) -> dict[str, int]:
    """Bytes per token and layer of each kind of cache."""
    rank, rope = model.kv_lora_rank, model.rope
    scales = -(-rank // _SCALE_TILE) * 4
    return {
        "MHA": model.heads * (model.nope + rope + model.v_head) * itemsize,
        f"GQA, {groups} groups": groups * 2 * model.v_head * itemsize,
        "MLA bf16": (rank + rope) * 2,
        "MLA fp8, tile-128": rank + scales + rope * 2,
        "MLA fp8, per tensor": rank + rope,
    }


def longest_context(token_bytes: int, memory: int, requests: int = 1, page_size: int = 64) -> int:
    """Tokens that each of `requests` equal requests can hold, in whole pages."""
    pages = memory // (token_bytes * page_size)
    return pages // requests * page_size


def parse_memory(text: str) -> int:
    """Bytes in "80GiB", "80G" (both 2**30), "80GB" (10**9) or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a size such as 80GiB, 80G or 80GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def report(model: Model, memory: int, requests: int, page_size: int, groups: int) -> list[dict]:
    """One row per kind of cache."""
    kinds = layer_bytes(model, groups)
    rows = []
    for kind, size in kinds.items():
        token_bytes = size * model.layers
        rows.append(
            {
                "cache": kind,
                "bytes_per_token_and_layer": size,
                "bytes_per_token": token_bytes,
                "times_smaller_than_mha": round(kinds["MHA"] / size, 2),
                "longest_context": longest_context(token_bytes, memory, requests, page_size),
            }
        )
    return rows


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("cache", help="bytes per token and longest context of a model")
    parser.add_argument("--model", type=_preset, choices=MODELS, default="deepseek-v3")
    parser.add_argument(
        "--memory", type=parse_memory, default="80GiB", help="memory of the cache (default 80GiB)"
    )
    parser.add_argument("--requests", type=_positive, default=1, help="requests that share it")
    parser.add_argument("--page-size", type=_positive, default=64, help="tokens per page")
    parser.add_argument("--gqa-groups", type=_positive, default=8, help="KV heads of the GQA row")
    for name in _SHAPE_FLAGS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=_positive, help="instead of the model's number")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in _SHAPE_FLAGS if getattr(args, name) is not None}
    model = dataclasses.replace(MODELS[args.model], **given)
    if given:
        model = dataclasses.replace(model, name=f"{model.name}, changed")
    rows = report(model, args.memory, args.requests, args.page_size, args.gqa_groups)
    if args.json:
        document = {"model": dataclasses.asdict(model), "memory": args.memory}
        document.update(requests=args.requests, page_size=args.page_size, rows=rows)
        print(json.dumps(document, indent=2))
        return 0
    console = Console()
    console.print(
        f"[bold]{model.name}[/]: {model.layers} layers, {model.heads} heads, "
        f"latent {model.kv_lora_rank} + {model.rope}, K {model.nope} + {model.rope}, "
        f"V {model.v_head}; max_position_embeddings {model.max_context:,}"
    )
    title = f"{args.memory / 2**30:,.1f} GiB of cache, {args.requests} request(s)"
    table = Table(title=title, title_justify="left")
    table.add_column("cache")
    for column in ("bytes / token / layer", "bytes / token", "vs MHA", "longest context"):
        table.add_column(column, justify="right")
    for row in rows:
        context = row["longest_context"]
        table.add_row(
            row["cache"],
            f"{row['bytes_per_token_and_layer']:,}",
            f"{row['bytes_per_token']:,}",
            f"1/{row['times_smaller_than_mha']:.3g}",
            f"{context:,}" + (" *" if context > model.max_context else ""),
        )
    console.print(table)
    console.print("MHA: the same heads, kept unfolded. *: past max_position_embeddings.")
    return 0


def _preset(text: str) -> str:
    """The key in MODELS of a name as people write it: "DeepSeek-V3", "V3", "Kimi K2"."""
    name = text.lower().replace(" ", "-").replace("_", "-")
    return f"deepseek-{name}" if f"deepseek-{name}" in MODELS else name


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a positive integer")
    return int(text)
