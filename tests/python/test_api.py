"""The public surface: names and signatures that callers rely on, and what the package says about itself."""

from __future__ import annotations

import inspect
import pathlib
import subprocess
import sys

import pytest
import torch

import flash_mla
from flash_mla import flash_mla_interface

ROOT = pathlib.Path(__file__).resolve().parents[2]

SIGNATURES = {
    "flash_mla_with_kvcache": (
        "(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, "
        "softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, attn_sink=None, extra_k_cache=None, "
        "extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, *, enable_batch_invariant=False, "
        "descale_q=None, descale_k=None, kv_format=None, use_legacy=False, out=None, lse=None, validate=False)"
    ),
    "flash_mla_sparse_fwd": (
        "(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, *, use_legacy=False, "
        "return_log2_lse=None, out=None)"
    ),
    "get_mla_metadata": "(*args, **kwargs)",
    "get_mla_decoding_metadata": (
        "(seqlens_k, num_q_tokens_per_head_k, h_k, h_q=None, is_fp8_kvcache=False, topk=None, use_legacy=False)"
    ),
    "append_kv_cache": "(kv_c, k_pe, kv_cache, slot_mapping, format=None, scale=None)",
    "merge_states": "(outs, lses)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(flash_mla, name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("name", flash_mla.__all__)
def test_documented(name: str) -> None:
    assert inspect.getdoc(getattr(flash_mla, name))


def test_import_path_of_callers() -> None:
    for name in (
        "FlashMLASchedMeta",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_mla_sparse_fwd",
        "flash_mla_with_kvcache",
        "get_mla_metadata",
    ):
        assert getattr(flash_mla_interface, name) is getattr(flash_mla, name)
    assert flash_mla_interface.FlashMLASchedMeta.Config.__qualname__ == "FlashMLASchedMeta.Config"
    assert flash_mla.has_legacy() is False


def test_operators() -> None:
    for name in ("decode", "decode_out", "plan", "append_kv_cache", "merge_states"):
        assert hasattr(torch.ops.flash_mla, name)


def test_version() -> None:
    assert flash_mla.__version__ == (ROOT / "VERSION").read_text().strip()


def test_info() -> None:
    info = flash_mla.info()
    assert set(info) == {"version", "cuda_build", "cpu", "torch", "devices", "conflicts"}
    assert info["cpu"]["isa"] and info["cpu"]["threads"] == torch.get_num_threads()
    for device in info["devices"]:
        assert device["supported"] or device["why_not"]


def test_typed() -> None:
    assert (pathlib.Path(flash_mla.__file__).parent / "py.typed").exists()


def run_python(code: str) -> subprocess.CompletedProcess:
    folder = str(pathlib.Path(flash_mla.__file__).resolve().parents[1])
    script = f"import sys; sys.path.insert(0, {folder!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )


def test_missing_torch_is_named() -> None:
    done = run_python("sys.modules['torch'] = None\nimport flash_mla")
    assert (
        "flash_mla needs PyTorch >= 2.10, which is not installed: pip install torch" in done.stderr
    )


def test_old_torch_is_named() -> None:
    done = run_python("import torch; torch.__version__ = '2.9.1'\nimport flash_mla")
    assert "flash_mla needs PyTorch >= 2.10, found 2.9.1" in done.stderr


def test_second_copy_is_named() -> None:
    done = run_python(
        "import torch; library = torch.library.Library('flash_mla', 'DEF'); library.define('decode() -> ()')\n"
        "import flash_mla"
    )
    assert (
        "another copy of the package has registered the operators torch.ops.flash_mla"
        in done.stderr
    )
    assert done.returncode == 1


def test_other_owner_of_the_operators_is_no_harm() -> None:
    done = run_python(
        "import torch; library = torch.library.Library('flash_mla', 'DEF'); library.define('theirs() -> ()')\n"
        "import flash_mla; print(flash_mla.__version__)"
    )
    assert done.stdout.strip() == flash_mla.__version__, done.stderr


def test_threads_follow_torch() -> None:
    """The CPU backend uses as many threads as PyTorch is told to, from the next call on."""
    done = run_python(
        "import torch, flash_mla\n"
        "from flash_mla import _library\n"
        "q = torch.zeros(1, 1, 1, 576); kv = torch.zeros(1, 64, 1, 576)\n"
        "one = torch.ones(1, dtype=torch.int32)\n"
        "for n in (3, 1):\n"
        "    torch.set_num_threads(n)\n"
        "    flash_mla.flash_mla_with_kvcache(q, kv, one[None] * 0, one, 512, None)\n"
        "    print(_library.cpu_num_threads())\n"
    )
    assert done.stdout.split() == ["3", "1"], done.stderr


def test_forked_child() -> None:
    """PyTorch's threads are missing in a child of fork(), which therefore uses others."""
    done = run_python(
        "import os, signal, torch, flash_mla\n"
        "q = torch.ones(2, 1, 16, 576); kv = torch.ones(40, 64, 1, 576)\n"
        "table = torch.arange(40, dtype=torch.int32).view(2, 20); lengths = torch.full((2,), 1280).int()\n"
        "torch.set_num_threads(2)\n"
        "def decode():\n"
        "    return flash_mla.flash_mla_with_kvcache(q, kv, table, lengths, 512, None)[0][0, 0, 0, 0].item()\n"
        "expected = decode()\n"
        "if child := os.fork():\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "else:\n"
        "    signal.alarm(60)\n"
        "    os._exit(0 if decode() == expected else 1)\n"
    )
    assert done.stdout.split() == ["0"], done.stderr


SCRIPTS = [
    "examples/python/decode.py",
    "examples/continuous_batching.py",
    "tests/test_flash_mla.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: str) -> None:
    arguments = ["--quick"] if script.startswith("tests") else []
    folder = str(pathlib.Path(flash_mla.__file__).resolve().parents[1])
    code = f"import sys, runpy; sys.path.insert(0, {folder!r}); sys.argv[:] = {[script, *arguments]!r}\n"
    code += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "error" in done.stdout
