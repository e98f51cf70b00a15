"""Adds up how long each instruction of a machine-code listing holds up the next one, as ptxas has written it into the instruction.

    cuobjdump -sass FILE.o > LISTING
    python3 bench/lab/stall_counts.py LISTING FIRST LAST          # addresses, in hexadecimal, as the listing has them

A line is: address, clocks until the warp's next instruction may issue, barriers of the scoreboard that it sets (w: when its result is
there, r: when its operands have been read) and waits for, sum so far in brackets, instruction. What it waits for comes on top: results
of loads, of shuffles and of the exponential, mbarriers, products. The places of these fields in an instruction's 128 bits are those that
were found for Volta (Jia et al., arXiv:1804.06826); that sm_90a keeps them is inferred from listings that make sense so.
"""

import argparse
import re
from pathlib import Path

LOW = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/")
HIGH = re.compile(r"\s+/\* (0x[0-9a-f]+) \*/")
NO_BARRIER = 7


def instructions(text):
    """Address, text and the upper 64 bits of each instruction, which a listing has in two lines."""
    lines = text.split("\n")
    for line, following in zip(lines, lines[1:], strict=False):
        if (low := LOW.match(line)) and (high := HIGH.match(following)):
            yield int(low[1], 16), low[2].strip(), int(high[1], 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("listing", type=Path)
    parser.add_argument("first", type=lambda text: int(text, 16))
    parser.add_argument("last", type=lambda text: int(text, 16))
    args = parser.parse_args()
    total = 0
    for address, text, upper in instructions(args.listing.read_text()):
        if not args.first <= address <= args.last:
            continue
        control = upper >> 41
        stall, written, read, waits = (
            control & 15,
            control >> 5 & 7,
            control >> 8 & 7,
            control >> 11 & 63,
        )
        total += max(stall, 1)
        notes = [f"w{written}"] * (written != NO_BARRIER) + [f"r{read}"] * (read != NO_BARRIER)
        if waits:
            notes.append("waits " + "".join(str(i) for i in range(6) if waits >> i & 1))
        print(f"{address:6x} {stall:3d} {' '.join(notes):16} [{total:4d}] {text}")


if __name__ == "__main__":
    main()
