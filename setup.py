"""`python setup.py install`, which the 2025 documents name, and what it means today: pip."""

import importlib.util
import pathlib
import subprocess
import sys

_PIP = {
    "install": ["install"],
    "develop": ["install", "--editable"],
    "bdist_wheel": ["wheel", "--no-deps", "--wheel-dir", "dist"],
}


def main() -> int:
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command not in _PIP:
        print(
            f"usage: python setup.py {{{','.join(_PIP)}}} (forwards to pip; pyproject.toml has the settings)",
            file=sys.stderr,
        )
        return 2
    folder = str(pathlib.Path(__file__).resolve().parent)
    # What the build needs is taken from this environment where it is there: isolation downloads
    # PyTorch once more.
    here = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "torch"))
    return subprocess.call(
        [sys.executable, "-m", "pip", *_PIP[command], *["--no-build-isolation"] * here, folder]
    )


if __name__ == "__main__":
    sys.exit(main())
