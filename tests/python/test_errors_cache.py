"""The same as test_errors.py for append_kv_cache and merge_states."""

from __future__ import annotations

import re

import pytest
import torch
from tensors import bf16, spread

from flash_mla import append_kv_cache, merge_states


def append_arguments(device: str) -> dict:
    return {
        "kv_c": bf16(3, 512, device=device),
        "k_pe": bf16(3, 64, device=device),
        "kv_cache": bf16(4, 64, 1, 576, device=device),
        "slot_mapping": torch.zeros(3, dtype=torch.int64, device=device),
    }


APPEND_ERRORS = {
    "kv_c type": (lambda a: {"kv_c": 1}, TypeError, "append_kv_cache: kv_c is int"),
    "kv_c rank": (lambda a: {"kv_c": a["kv_c"][0]}, ValueError, "kv_c.rank = 1, wanted 2"),
    "kv_c width": (
        lambda a: {"kv_c": a["kv_c"][:, :64]},
        ValueError,
        "kv_c.shape[1] (512) = 64, wanted 512",
    ),
    "k_pe width": (
        lambda a: {"k_pe": a["kv_c"]},
        ValueError,
        "k_pe.shape[1] (64) = 512, wanted 64",
    ),
    "k_pe dtype": (
        lambda a: {"k_pe": a["k_pe"].half()},
        TypeError,
        "k_pe.dtype = fp16, wanted bf16 as kv_c",
    ),
    "k_pe tokens": (
        lambda a: {"k_pe": a["k_pe"][:2]},
        ValueError,
        "k_pe.shape[0] (t) = 2, wanted 3 as kv_c",
    ),
    "kv_cache heads": (
        lambda a: {"kv_cache": bf16(4, 64, 2, 576, device=a["kv_c"].device)},
        ValueError,
        "kv_cache.shape[2] (h_kv) = 2, wanted 1",
    ),
    "kv_cache overlap": (
        lambda a: {"kv_cache": a["kv_cache"][:1].expand(4, -1, -1, -1)},
        ValueError,
        "elements overlap",
    ),
    "slot dtype": (
        lambda a: {"slot_mapping": a["slot_mapping"].int()},
        TypeError,
        "slot_mapping.dtype = int32, wanted int64",
    ),
    "slot count": (
        lambda a: {"slot_mapping": a["slot_mapping"][:2]},
        ValueError,
        "slot_mapping.shape[0] (t) = 2, wanted 3 as kv_c",
    ),
    "format": (
        lambda a: {"format": "fp8"},
        NotImplementedError,
        "append_kv_cache: format is not supported yet",
    ),
    "scale": (
        lambda a: {"scale": a["kv_c"]},
        NotImplementedError,
        "append_kv_cache: scale is not supported yet",
    ),
}


@pytest.mark.parametrize("name", APPEND_ERRORS)
def test_append(device: str, name: str) -> None:
    replace, exception, text = APPEND_ERRORS[name]
    good = append_arguments(device)
    with pytest.raises(exception, match=re.escape(text)):
        append_kv_cache(**{**good, **replace(good)})


def test_append_slot_on_the_cpu() -> None:
    good = append_arguments("cpu")
    good["kv_c"] += 1
    good["slot_mapping"][2] = 256
    with pytest.raises(ValueError, match=re.escape("slot_mapping[2] = 256, wanted < 256")):
        append_kv_cache(**good)
    assert (good["kv_cache"] == 0).all()


MERGE_ERRORS = {
    "nothing": (
        lambda o, n: ([], []),
        ValueError,
        "0 outs and 0 lses, wanted equally many, at least 1",
    ),
    "counts": (lambda o, n: ([o, o], [n]), ValueError, "2 outs and 1 lses, wanted equally many"),
    "no sequence": (
        lambda o, n: (None, [n]),
        TypeError,
        "outs is NoneType, wanted a sequence of tensors",
    ),
    "no tensor": (
        lambda o, n: ([o, 3], [n, n]),
        TypeError,
        "outs[1] is int, wanted a torch.Tensor",
    ),
    "out rank": (
        lambda o, n: ([o[0, 0]], [n]),
        ValueError,
        "outs[0] has 2 axes, wanted (..., s_q, h_q, d)",
    ),
    "out shape": (
        lambda o, n: ([o, o[:1]], [n, n]),
        ValueError,
        "outs[1].shape = (1, 3, 4, 512), wanted",
    ),
    "lse shape": (
        lambda o, n: ([o], [n.mT]),
        ValueError,
        "lses[0].shape = (2, 3, 4), wanted (2, 4, 3)",
    ),
    "out dtype": (
        lambda o, n: ([o.int()], [n]),
        TypeError,
        "dtype = int32, wanted bf16, fp16 or fp32",
    ),
    "out dtypes": (
        lambda o, n: ([o, o.half()], [n, n]),
        TypeError,
        "outs[1].dtype = fp16, wanted bf16",
    ),
    "lse dtype": (lambda o, n: ([o], [n.half()]), TypeError, "lses[0].dtype = fp16, wanted fp32"),
    "width": (lambda o, n: ([o[..., :12]], [n]), ValueError, "wanted a multiple of 8 up to 1024"),
    "stride": (
        lambda o, n: ([spread(o)], [n]),
        ValueError,
        "outs[0].stride[3] (d_v) = 2, wanted 1",
    ),
}


@pytest.mark.parametrize("name", MERGE_ERRORS)
def test_merge(device: str, name: str) -> None:
    make, exception, text = MERGE_ERRORS[name]
    out = bf16(2, 3, 4, 512, device=device)
    lse = torch.zeros((2, 4, 3), dtype=torch.float32, device=device)
    with pytest.raises(exception, match=re.escape(text)):
        merge_states(*make(out, lse))
