"""Which devices a command runs on."""

from __future__ import annotations

import flash_mla


def usable_devices(wanted: str = "all") -> list[str]:
    """Devices of the wanted kind ("all", "cpu", "cuda") that can decode: ["cpu", "cuda:0", ...].

    Raises RuntimeError, with the reason, when "cuda" is wanted and no GPU can.
    """
    facts = flash_mla.info()
    gpus = [f"cuda:{device['index']}" for device in facts["devices"] if device["supported"]]
    if wanted == "cpu":
        return ["cpu"]
    if wanted == "all":
        return ["cpu", *gpus]
    if not gpus:
        reasons = [f"{device['name']}: {device['why_not']}" for device in facts["devices"]]
        if not reasons:
            reasons = ["no CUDA device is visible" if facts["cuda_build"] else "built without CUDA"]
        raise RuntimeError(f"no GPU can run it ({'; '.join(reasons)})")
    return gpus
