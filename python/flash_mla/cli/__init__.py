"""The command `flash-mla`: one module per sub-command, each with add_parser() and run()."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def build_parser() -> argparse.ArgumentParser:
    # Here and not above: flash_mla.cli.measure must import where there is no rich.
    from flash_mla.cli import bench, cache, check, demo, generate, info

    parser = argparse.ArgumentParser(
        prog="flash-mla",
        description="Multi-head Latent Attention decoding on Hopper GPUs and CPUs.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (info, demo, check, bench, cache, generate):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command. Returns the exit code: 0 done, 1 a check failed, 2 bad input."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"flash-mla {args.command}: {error}", file=sys.stderr)
        return 2
