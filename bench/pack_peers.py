"""Gathers the peers of bench/README.md, small enough to travel to a GPU machine without a network.

    python3 bench/pack_peers.py [--out build/peers] [--python 3.12]

Here it needs pip and PyPI (330 MB are downloaded). There, `. build/peers/unpack.sh` unpacks them and sets what bench/run.py looks
for. FlashInfer compiles its kernel at first use, which takes nvcc and about a minute.
"""

import argparse
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# The versions that were timed beside ours: what is current on PyPI need not run with the same PyTorch.
LIBRARIES = {"sgl-flash-mla==1.0.0": "_C_legacy.abi3.so", "vllm==0.26.0": "_vllm_fa3_C.abi3.so"}
# And what `import flashinfer` takes besides torch and numpy.
FLASHINFER = (
    "flashinfer-python==0.6.18.post1", "apache-tvm-ffi==0.1.15.post2", "certifi", "charset-normalizer", "click", "einops", "idna", "nvidia-ml-py", "requests",
    "tabulate", "tqdm", "urllib3",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")

UNPACK = """# Unpacks the peers beside this file; to be sourced: . build/peers/unpack.sh
peers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for library in "$peers"/*.so.xz; do [ -e "${library%.xz}" ] || xz -dk "$library"; done
[ -d "$peers/flashinfer" ] || { mkdir "$peers/flashinfer" && tar xJf "$peers/flashinfer.tar.xz" -C "$peers/flashinfer"; }
export FLASH_MLA_PEER_SGL="$peers/_C_legacy.abi3.so" FLASH_MLA_PEER_FA3="$peers/_vllm_fa3_C.abi3.so"
export PYTHONPATH="$peers/flashinfer${PYTHONPATH:+:$PYTHONPATH}"
"""


def download(names, python, folder):
    """The wheels of the named packages, without what they need."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(folder), *names]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def pack_libraries(wheels, out):
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in LIBRARIES.values():
                    (out / f"{Path(name).name}.xz").write_bytes(lzma.compress(archive.read(name)))


def pack_flashinfer(wheels, out, folder):
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    with tarfile.open(out / "flashinfer.tar.xz", "w:xz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    parser.add_argument("--python", default="3.12", help="the version on the GPU machine")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as text:
        work = Path(text)
        for name in ("libraries", "flashinfer", "unpacked"):
            (work / name).mkdir()
        pack_libraries(download(LIBRARIES, args.python, work / "libraries"), args.out)
        wheels = download(FLASHINFER, args.python, work / "flashinfer")
        pack_flashinfer(wheels, args.out, work / "unpacked")
    (args.out / "unpack.sh").write_text(UNPACK)
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 2**20
    print(f"pack_peers: {size:.0f} MiB in {args.out}")


if __name__ == "__main__":
    main()
