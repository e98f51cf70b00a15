"""Fails on what no reviewer should have to see: non-ASCII text, tabs, trailing blanks, a missing last newline, one machine's paths."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = (".png", ".pdf", ".whl", ".patch")  # context lines of a patch end in blanks
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|tmp)/|\.\./shared")


def complaints(name, text):
    """(line, what) pairs of one file."""
    if text and not text.endswith("\n"):
        yield text.count("\n") + 1, "no newline at the end of the file"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.isascii():
            yield number, "a character outside ASCII"
        if line != line.rstrip():
            yield number, "trailing blanks"
        if "\t" in line and not name.endswith("Makefile"):
            yield number, "a tab"
        if MACHINE_PATH.search(line) and name != "tools/check_text.py":
            yield number, "a path of one machine"


def main():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    bad = []
    for name in listed.stdout.decode().split("\0"):
        if name and not name.endswith(SKIPPED) and (ROOT / name).is_file():
            text = (ROOT / name).read_bytes().decode(errors="replace")
            bad += [f"{name}:{line}: {what}" for line, what in complaints(name, text)]
    if bad:
        sys.exit("check_text: failed\n  " + "\n  ".join(bad))


if __name__ == "__main__":
    main()
