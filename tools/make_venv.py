"""Makes .venv ready: creates it, takes a PyTorch >= 2.10 that the system has, else everything from PyPI.

Usage: make_venv.py VENV [--lint]. Runs on any Python >= 3.10 without a single package; safe to repeat.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MIN_CMAKE = (3, 24)
TORCH_CHECK = "import torch; v = torch.__version__.split('.'); raise SystemExit((int(v[0]), int(v[1])) < (2, 10))"


def run_quietly(*command):
    """Exit status and combined output of a command."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def has_torch(python):
    return run_quietly(python, "-c", TORCH_CHECK)[0] == 0


def create(venv):
    """Creates the environment; with the system's packages when a usable PyTorch is among them."""
    options = ["--system-site-packages"] if has_torch(sys.executable) else []
    status, output = run_quietly(sys.executable, "-m", "venv", *options, str(venv))
    if status == 0:
        return
    # Debian's python3 without python3-venv lacks ensurepip: the system's pip can fill the environment instead.
    shutil.rmtree(venv, ignore_errors=True)
    if run_quietly(sys.executable, "-m", "pip", "--version")[0] == 0:
        status, output = run_quietly(
            sys.executable, "-m", "venv", "--without-pip", *options, str(venv)
        )
    if status != 0:
        sys.exit(
            f"{output}\nmake_venv: no environment; on Debian and Ubuntu: apt install python3-venv"
        )


def pip_command(venv):
    python = str(venv / "bin" / "python")
    if run_quietly(python, "-m", "pip", "--version")[0] == 0:
        return [python, "-m", "pip"]
    return [sys.executable, "-m", "pip", "--python", python]


def requirements(lint_only):
    """(requirement, optional) pairs of the requirements file."""
    rows = []
    for line in REQUIREMENTS.read_text().splitlines():
        requirement, _, note = (part.strip() for part in line.partition("#"))
        if requirement and (not lint_only or note == "lint"):
            rows.append((requirement, note in ("lint", "optional") and not lint_only))
    return rows


def build_tools():
    """CMake and Ninja from PyPI where the system's are missing or too old."""
    rows = []
    cmake = shutil.which("cmake")
    version = re.search(r"(\d+)\.(\d+)", run_quietly(cmake, "--version")[1]) if cmake else None
    if version is None or tuple(map(int, version.groups())) < MIN_CMAKE:
        rows.append(("cmake>=3.24", False))
    if shutil.which("ninja") is None:
        rows.append(("ninja", False))
    return rows


def main():
    if sys.version_info < (3, 10):
        sys.exit("make_venv: Python 3.10 or newer is needed; say make PYTHON=python3.x")
    venv = Path(sys.argv[1])
    lint_only = "--lint" in sys.argv[2:]
    if not (venv / "bin" / "python").exists():
        create(venv)
    rows = requirements(lint_only)
    if not lint_only:
        rows += build_tools()
        if has_torch(str(venv / "bin" / "python")):
            rows = [row for row in rows if not row[0].startswith("torch")]
    # --no-compile: PyTorch has thousands of files; those that are used are compiled at their first import.
    install = [*pip_command(venv), "install", "--no-compile", "--disable-pip-version-check", "-q"]
    print(f"setting up {venv}: " + " ".join(requirement for requirement, _ in rows), flush=True)
    if subprocess.run([*install, *(requirement for requirement, _ in rows)]).returncode == 0:
        return
    print("not all of it can be had here (offline?); trying one by one", flush=True)
    missing = [row for row in rows if run_quietly(*install, row[0])[0] != 0]
    for requirement, optional in missing:
        print(f"  missing: {requirement}{' (optional, going on without)' if optional else ''}")
    if not all(optional for _, optional in missing):
        sys.exit("make_venv: a required package is missing")


if __name__ == "__main__":
    main()
