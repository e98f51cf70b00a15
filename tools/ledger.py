"""The GPU ledger: proof that the GPU code of this commit was tested on a GPU.

CI has no GPU, so a run of `make gpu-test` on one writes tests/gpu-ledger.json: the GPU, what ran and how it ended, and a digest of
what the GPU code is built from. `check` computes the digest again and fails when it differs.

  ledger.py check          fails unless the ledger, and the newest file of bench/results, belong to these sources
  ledger.py digest         prints the digest of these sources
  ledger.py stamp FILE     notes in FILE, in a build folder, which sources these are
  ledger.py built BUILD    succeeds when BUILD holds a build of these very sources (stamp.json)

The digest covers the sources under SOURCES with comments and layout taken out, the lines of CMake that choose how they are compiled,
and the version of the CUDA toolkit, which decides both the generated code and the headers.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "tests/gpu-ledger.json"
RESULTS = ROOT / "bench/results"
SOURCES = ("include", "src/core", "src/cuda", "src/api")
# NOTE: the version number changes with every release and no kernel depends on it.
EXCLUDED = ("include/flash_mla/version.h",)
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
SUITES = ("python", "cpp", "memcheck", "racecheck", "synccheck", "initcheck")

# A string or character literal is kept as it is, a comment becomes a space.
LITERAL_OR_COMMENT = re.compile(
    r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL
)
DIGIT_SEPARATOR = re.compile(r"(?<=[0-9a-fA-F])'(?=[0-9a-fA-F])")
CMAKE_FILES = ("CMakeLists.txt", "cmake/cuda.cmake")
COMPILE_LINE = re.compile(
    r"COMPILE_LANGUAGE:CUDA|CMAKE_CUDA_|CUDA_STANDARD|cxx_std_|compile_definitions"
)


def normalised(text):
    """C++ text without comments and layout: what is left when two files compile to the same thing."""
    text = DIGIT_SEPARATOR.sub("", text)
    text = LITERAL_OR_COMMENT.sub(lambda m: " " if m[0].startswith("/") else m[0], text)
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = " ".join(line.split())
        if words:
            # A preprocessor directive ends with its line; elsewhere a line break is a space.
            lines.append(f"\n{words}\n" if words.startswith("#") else words)
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(lines))


def toolkit_version(build=None):
    """Version of the CUDA compiler of a build folder, or of nvcc here: "13.0.88"; "" where there is none."""
    if build is not None:
        for file in sorted(Path(build).glob("CMakeFiles/*/CMakeCUDACompiler.cmake")):
            if match := re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', file.read_text()):
                return match[1]
        return ""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"\bV([\d.]+)", output)
    return match[1] if match else ""


def digest(toolkit):
    """Digest of what the GPU code is built from, with that toolkit."""
    state = hashlib.sha256(f"toolkit {toolkit}\n".encode())
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.suffix in SUFFIXES and name not in EXCLUDED:
                state.update(f"\0{name}\0{normalised(file.read_text())}".encode())
    for name in CMAKE_FILES:
        for line in (ROOT / name).read_text().splitlines():
            code = " ".join(line.partition("#")[0].split())
            if COMPILE_LINE.search(code):
                state.update(f"\0{code}".encode())
    return state.hexdigest()[:32]


def read_stamp(build):
    """{"digest", "toolkit"} of the build folder, or None when it was built from other sources."""
    file = Path(build) / "stamp.json"
    if not file.exists():
        return None
    stamp = read(file)
    return stamp if stamp["digest"] == digest(stamp["toolkit"]) else None


def write_stamp(file):
    toolkit = toolkit_version(file.parent)
    write(file, {"digest": digest(toolkit), "toolkit": toolkit})


def gpu():
    """(name, driver, compute capability) of the first GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    rows = done.stdout.strip().splitlines()
    return (
        tuple(field.strip() for field in rows[0].split(","))
        if done.returncode == 0 and rows
        else None
    )


def read(file):
    return json.loads(file.read_text())


def write(file, document):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def results():
    """(file, contents) of every file of kernel timings in bench/results, oldest first."""
    pairs = [(file, read(file)) for file in RESULTS.glob("[0-9]*.json")]
    return sorted(pairs, key=lambda pair: (pair[1]["date"], pair[0].name))


def problems():
    """Why the ledger does not vouch for these sources; empty when it does."""
    if not LEDGER.exists():
        return [f"{LEDGER.relative_to(ROOT)} is missing: run make gpu-test on a Hopper GPU"]
    ledger = read(LEDGER)
    here = toolkit_version()
    found = []
    if ledger["digest"] != digest(ledger["toolkit"]):
        found.append("GPU code changed since it was last tested on a GPU")
    elif here and here != ledger["toolkit"]:
        found.append(
            "GPU code changed since it was last tested on a GPU: "
            f"CUDA {here} compiles it here, {ledger['toolkit']} did then"
        )
    for name in SUITES:
        suite = ledger["suites"].get(name)
        if suite is None:
            found.append(f"suite {name} has not run on a GPU")
        elif suite["failed"] or not suite["passed"]:
            found.append(f"suite {name}: {suite['passed']} passed, {suite['failed']} failed")
    measured = results()
    if not measured:
        found.append("bench/results is empty: run make gpu-bench on a Hopper GPU")
    else:
        file, newest = measured[-1]
        if newest["digest"] != digest(newest["toolkit"]):
            found.append(f"GPU code changed since bench/results/{file.name} was measured")
    return found


def check():
    found = problems()
    if found:
        sys.exit("ledger-check: " + "\nledger-check: ".join(found))
    ledger = read(LEDGER)
    print(f"ledger-check: tested on {ledger['gpu']} ({ledger['date']}), digest {ledger['digest']}")


def main():
    match sys.argv[1:]:
        case ["check"]:
            check()
        case ["digest"]:
            print(digest(toolkit_version()))
        case ["stamp", file]:
            write_stamp(Path(file))
        case ["built", build]:
            sys.exit(0 if read_stamp(build) else 1)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
