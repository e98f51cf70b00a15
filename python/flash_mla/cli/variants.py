"""What a device can decode, found by asking it: one tiny call for each variant."""

from __future__ import annotations

from collections.abc import Callable

import torch

import flash_mla
from flash_mla.cli.measure import D_QK, D_V, DTYPES

_PAGE_SIZES = (1, 16, 32, 64, 128, 256)


def probe(device: str) -> dict[str, str]:
    """{variant: why not}; an empty string where the device can."""
    answers = {}
    for name, call in _variants(device).items():
        try:
            call()
            answers[name] = ""
        except Exception as error:  # every refusal is an answer
            answers[name] = str(error).strip().splitlines()[0]
    return answers


def _variants(device: str) -> dict[str, Callable[[], object]]:
    variants = {
        f"decode {name}": lambda dtype=dtype: _decode(device, dtype)
        for name, dtype in DTYPES.items()
    }
    for size in _PAGE_SIZES:
        variants[f"decode, pages of {size}"] = lambda size=size: _decode(device, page_size=size)
    indices = torch.zeros(1, 1, 64, dtype=torch.int32, device=device)
    sink = torch.zeros(1, dtype=torch.float32, device=device)
    variants["decode, fp8 cache"] = lambda: _decode(device, is_fp8_kvcache=True)
    variants["decode, sparse (indices)"] = lambda: _decode(device, indices=indices)
    variants["decode, attention sink"] = lambda: _decode(device, attn_sink=sink)
    variants["sparse prefill"] = lambda: _sparse_prefill(device, indices)
    variants["append_kv_cache"] = lambda: _append(device)
    variants["merge_states"] = lambda: _merge(device)
    return variants


def _decode(device: str, dtype: torch.dtype = torch.bfloat16, page_size: int = 64, **options):
    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return flash_mla.flash_mla_with_kvcache(
        zeros(1, 1, 1, D_QK),
        zeros(1, page_size, 1, D_QK),
        zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32, device=device),
        D_V,
        flash_mla.get_mla_metadata()[0],
        **options,
    )


def _merge(device: str) -> None:
    out, lse = _decode(device)
    flash_mla.merge_states([out, out], [lse, lse])


def _sparse_prefill(device: str, indices: torch.Tensor) -> None:
    rows = torch.zeros(1, 1, D_QK, dtype=torch.bfloat16, device=device)
    flash_mla.flash_mla_sparse_fwd(rows, rows, indices[0], D_QK**-0.5)


def _append(device: str) -> None:
    rows = torch.zeros(1, D_QK, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(1, 64, 1, D_QK, dtype=torch.bfloat16, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    flash_mla.append_kv_cache(rows[:, :D_V].contiguous(), rows[:, D_V:].contiguous(), cache, slots)
