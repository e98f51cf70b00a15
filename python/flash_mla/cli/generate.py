"""`flash-mla generate`: a Transformers model generates on flash_mla, and without it when asked to compare."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flash_mla.cli import random_models
from flash_mla.cli.decode_text import tokenize
from flash_mla.cli.devices import usable_devices
from flash_mla.cli.measure import DTYPES

_SAMPLE = Path(__file__).with_name("sample.txt")
_SPECIAL = 16  # ids that random prompts leave out
_WARM_UP = 3  # tokens of the run before the one that is timed


@dataclasses.dataclass
class Run:
    """One generation. `absorbed` and `fallback` count calls of attention layers; 0 without flash_mla."""

    flash_mla: bool
    tokens: list[list[int]]
    seconds_to_first_token: float
    tokens_per_second: float
    cache_bytes: int
    cache_tokens: int
    peak_bytes: int  # on a GPU, beyond the weights
    absorbed: int = 0
    fallback: int = 0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("generate", help="generate with a Transformers model")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint: a folder, or a name that Transformers finds")
    source.add_argument(
        "--geometry", choices=random_models.GEOMETRIES, help="random weights of this geometry"
    )
    add("--layers", type=int, help="only the first layers (with --geometry)")
    add("--prompt-file", type=Path, help="the prompt (default: a sample)")
    add("--context", type=int, help="tokens of the prompt: it is repeated or cut to so many")
    add("--batch", type=int, default=1, help="rows, all with the same prompt")
    add("--max-new-tokens", type=int, default=64)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--attention", default="sdpa", help="the model's own attention (default sdpa)")
    add("--compare", action="store_true", help="the same without flash_mla, too")
    add("--seed", type=int, default=0, help="of random weights")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("layers", "context", "batch", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {value}, wanted >= 1")
    if args.layers and args.model:
        raise ValueError("--layers goes with --geometry: a checkpoint has its own")
    try:
        import flash_mla.integrations.transformers as hf
    except ImportError as error:
        raise RuntimeError(str(error)) from None

    console = Console(stderr=args.json)
    device = _device(args.device)
    model, tokenizer = _load(args, device)
    prompt = _prompt(args, tokenizer, model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.tensor([prompt] * args.batch, dtype=torch.long, device=device)
    runs = []
    if args.compare:
        runs.append(generate(model, ids, args.max_new_tokens))
    report = hf.enable(model)
    if not report.taken:
        raise ValueError(f"no layer of {args.model or args.geometry} can run absorbed")
    runs.append(generate(model, ids, args.max_new_tokens, hf))
    document = {
        "model": args.model or args.geometry,
        "layers": len(report.taken),
        "left": report.left,
        "device": str(device),
        "dtype": args.dtype,
        "batch": args.batch,
        "prompt_tokens": len(prompt),
        "runs": [dataclasses.asdict(one) for one in runs],
    }
    if args.compare:
        document["same_tokens"] = runs[0].tokens == runs[1].tokens
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        _print(console, document, runs, tokenizer)
    return 0


def generate(model: Any, ids: torch.Tensor, max_new_tokens: int, hf: Any = None) -> Run:
    """Greedy generation of exactly so many tokens, after a short run that warms up.

    `hf` is the integration of an enabled model.
    """

    def once(count: int, **options: Any) -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            return_dict_in_generate=True,
            **options,
        )

    once(min(_WARM_UP, max_new_tokens))
    before = hf.info(model).calls if hf else {}
    on_gpu = ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(ids.device)
        torch.cuda.reset_peak_memory_stats(ids.device)
    held = torch.cuda.memory_allocated(ids.device) if on_gpu else 0
    clock = random_models.StepClock(ids.device, skip=0)
    start = time.perf_counter()
    output = once(max_new_tokens, logits_processor=[clock])
    clock.stop()
    calls = hf.info(model).calls if hf else {}
    cache = getattr(output, random_models.cache_argument())
    return Run(
        flash_mla=hf is not None,
        tokens=output.sequences[:, ids.shape[1] :].tolist(),
        seconds_to_first_token=clock.first - start,
        tokens_per_second=ids.shape[0] * 1e3 / clock.ms_per_step if max_new_tokens > 1 else 0.0,
        cache_bytes=random_models.cache_bytes(cache),
        cache_tokens=ids.shape[0] * int(cache.get_seq_length()),
        peak_bytes=torch.cuda.max_memory_allocated(ids.device) - held if on_gpu else 0,
        absorbed=calls.get("absorbed", 0) - before.get("absorbed", 0),
        fallback=calls.get("fallback", 0) - before.get("fallback", 0),
    )


def _device(wanted: str) -> torch.device:
    devices = usable_devices("all" if wanted == "auto" else wanted)
    return torch.device(next((device for device in devices if device != "cpu"), "cpu"))


def _load(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """The model, and its tokenizer where there is one."""
    dtype = DTYPES[args.dtype]
    if args.geometry:
        torch.manual_seed(args.seed)
        config = random_models.config_of(args.geometry, args.layers)
        return random_models.build(config, device, dtype, args.attention), None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation=args.attention
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError):  # a checkpoint without one: ids are made and printed
        tokenizer = None
    return model.to(device).eval(), tokenizer


def _prompt(args: argparse.Namespace, tokenizer: Any, vocabulary: int) -> list[int]:
    path = args.prompt_file or _SAMPLE
    text = path.read_text(encoding="utf-8", errors="replace")
    if tokenizer is not None:
        ids = tokenizer(text)["input_ids"]
    else:
        usable = vocabulary - _SPECIAL
        ids = [_SPECIAL + zlib.crc32(piece.encode()) % usable for piece in tokenize(text)]
    if not ids:
        raise ValueError(f"{path}: no token in it")
    if args.context:
        ids = (ids * -(-args.context // len(ids)))[: args.context]
    return ids


def _print(console: Console, document: dict, runs: list[Run], tokenizer: Any) -> None:
    console.print(
        f"[bold]{document['model']}[/] on {document['device']}, {document['dtype']}: {document['batch']} rows of "
        f"{document['prompt_tokens']:,} tokens, {document['layers']} attention layers absorbed, {len(document['left'])} left"
    )
    for name, why in document["left"].items():
        console.print(f"  {name}: {why}", markup=False)
    first = runs[-1].tokens[0]
    text = tokenizer.decode(first) if tokenizer else " ".join(map(str, first))
    console.print(text, markup=False)
    table = Table()
    table.add_column("")
    for column in ("first token", "tokens / s", "cache bytes", "bytes / token", "peak memory"):
        table.add_column(column, justify="right")
    for one in runs:
        table.add_row(
            "flash_mla" if one.flash_mla else "without",
            f"{one.seconds_to_first_token:.2f} s",
            f"{one.tokens_per_second:,.1f}",
            f"{one.cache_bytes:,}",
            f"{one.cache_bytes / max(one.cache_tokens, 1):,.0f}",
            f"{one.peak_bytes / 1e9:.2f} GB" if one.peak_bytes else "-",
        )
    console.print(table)
    console.print(f"{runs[-1].absorbed:,} calls ran absorbed, {runs[-1].fallback:,} fell back")
    if len(runs) > 1:
        speed = runs[1].tokens_per_second / max(runs[0].tokens_per_second, 1e-9)
        same = "the same tokens" if document["same_tokens"] else "other tokens"
        console.print(f"{speed:.2f}x the tokens per second, {same}")
