"""Devices of the suite: the CPU always; a Hopper GPU when there is one, else its tests are skipped, loudly."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

import flash_mla


def _cuda_obstacle() -> str:
    """Why the GPU tests cannot run; empty when they can."""
    if not flash_mla.info()["cuda_build"]:
        return "this build has no CUDA"
    devices = flash_mla.info()["devices"]
    if not devices or not torch.cuda.is_available():
        return "there is no GPU"
    device = devices[0]
    return "" if device["supported"] else device["why_not"]


CUDA_OBSTACLE = _cuda_obstacle()
NO_TRANSFORMERS = importlib.util.find_spec("transformers") is None


def pytest_report_header() -> str:
    info = flash_mla.info()
    gpu = f"NOT RUN ({CUDA_OBSTACLE})" if CUDA_OBSTACLE else torch.cuda.get_device_name(0)
    return f"flash_mla {info['version']}, PyTorch {info['torch']}, CPU {info['cpu']['isa']}, GPU tests: {gpu}"


def pytest_terminal_summary(terminalreporter) -> None:
    if CUDA_OBSTACLE:
        terminalreporter.write_line(
            f"GPU TESTS WERE SKIPPED: {CUDA_OBSTACLE}", yellow=True, bold=True
        )
    if NO_TRANSFORMERS:
        terminalreporter.write_line(
            "TRANSFORMERS TESTS WERE SKIPPED: it is not installed (pip install 'transformers>=5.15')",
            yellow=True,
            bold=True,
        )


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "cuda: needs a Hopper GPU")


def pytest_collection_modifyitems(items) -> None:
    if CUDA_OBSTACLE:
        skip = pytest.mark.skip(reason=f"needs a Hopper GPU: {CUDA_OBSTACLE}")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits: for seconds, on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
