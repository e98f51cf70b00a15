"""What this build can do on this machine, as data; `flash-mla info` prints it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from . import _library

_DISTRIBUTION = "flash-mla"


def conflicts() -> list[str]:
    """Other installed distributions that own the import name `flash_mla`: installed over ours, they break it."""
    owners = importlib.metadata.packages_distributions().get("flash_mla", [])
    return sorted({owner for owner in owners if owner.lower().replace("_", "-") != _DISTRIBUTION})


def collect() -> dict[str, Any]:
    """Version, backends and devices.

    Keys: version (str); cuda_build (toolkit of the build, 13000 for 13.0; 0 without CUDA); cpu
    (isa, threads); torch (its version); devices (a list of dicts: index, name, capability, sms,
    memory in bytes, driver_version, supported, why_not); conflicts (names of other distributions
    that own the import name).
    """
    devices = []
    for index in range(_library.cuda_device_count()):
        device = _library.cuda_device(index)
        devices.append(
            {
                "index": device.index,
                "name": device.name,
                "capability": device.capability,
                "sms": device.sms,
                "memory": device.memory,
                "driver_version": device.driver_version,
                "supported": device.supported,
                "why_not": device.why_not,
            }
        )
    return {
        "version": _library.version(),
        "cuda_build": _library.cuda_build_version(),
        "cpu": {"isa": _library.cpu_isa(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "devices": devices,
        "conflicts": conflicts(),
    }
