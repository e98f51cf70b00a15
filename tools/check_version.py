"""Fails when VERSION, include/flash_mla/version.h and pyproject.toml do not name one version."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    version = (ROOT / "VERSION").read_text().strip()
    header = (ROOT / "include/flash_mla/version.h").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    parts = [
        re.search(rf"FLASH_MLA_VERSION_{part} (\d+)", header)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    named = {
        "version.h's numbers": ".".join(part[1] if part else "?" for part in parts),
        "version.h's string": re.search(r'FLASH_MLA_VERSION_STRING "([^"]+)"', header)[1],
    }
    # pyproject.toml either repeats the version or takes it from VERSION ("dynamic").
    if match := re.search(r'^version\s*=\s*"([^"]+)"', project, re.MULTILINE):
        named["pyproject.toml"] = match[1]
    wrong = [f"{where} says {found}" for where, found in named.items() if found != version]
    if wrong:
        sys.exit(f"check_version: VERSION says {version}, but " + ", ".join(wrong))


if __name__ == "__main__":
    main()
