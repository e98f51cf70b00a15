"""bench/transformers.py runs, and its result files become tables and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import readme_table  # noqa: E402
import transformers_table  # noqa: E402

GENERATED = {"ms_per_step": 2.0, "peak_bytes": 3e9, "cache_bytes": 1000, "cache_tokens": 10}


def whole(name: str, context: int, own: float | None, ours: float) -> dict:
    row = {"name": name, "b": 16, "context": context, "layers": 27}
    row["ours"] = {**GENERATED, "tokens_per_second": ours}
    if own is None:
        row["own"] = {"failure": "out of memory"}
    else:
        row |= {"own": {**GENERATED, "tokens_per_second": own}, "ratio": ours / own}
    return row


@pytest.fixture
def result() -> dict:
    timed = {"us": 19500.0, "us_spread": 1.0, "us_eager": 20000.0, "temporary_bytes": 15e9}
    layer = {
        "name": "v3-layer-b16", "b": 16, "context": 8192, "best_own": "sdpa", "ratio": 65.0,
        "ratio_eager": 40.0, "error": 0.004, "own": {"sdpa": timed, "eager": {"failure": "x"}},
        "ours": {"us": 300.0, "us_spread": 1.0, "us_eager": 500.0, "temporary_bytes": 5e7},
    }  # fmt: skip
    cache = {
        "name": "cache-x", "layers": 3, "heads": 128, "bytes_per_token": 3480.0,
        "bytes_per_token_formula": 3456, "mha_bytes_per_token": 245760, "mha_formula": "a * b",
        "reduction": 0.986,
    }  # fmt: skip
    compiled = {
        **layer, "name": "v3-layer-compiled-b16", "own": {"sdpa": {**timed, "us": 15000.0}},
        "ours": {**layer["ours"], "us": 250.0},
    }  # fmt: skip
    rows = [layer, compiled, cache, {"name": "v3-dense", "failure": "broke"}]
    rows += [
        whole("v2-lite-b16-32768", 32768, None, 50.0),
        whole("v2-lite-b16-128", 128, 100.0, 110.0),
        whole("v3-dense-b16-8192", 8192, 100.0, 1600.0),
        whole("v3-dense-compiled-b16-8192", 8192, 160.0, 2400.0),
    ]
    head = {"gpu": "NVIDIA H100", "driver": "1", "cuda": "13.0", "torch": "2.11.0", "digest": "d"}
    return {**head, "transformers": "5.17.0", "date": "2026-11-24", "smoke": False, "rows": rows}


def test_tables_of_a_result(result, tmp_path, monkeypatch) -> None:
    (tmp_path / "transformers-1.json").write_text(json.dumps(result))
    (tmp_path / "transformers-2.json").write_text(json.dumps({**result, "smoke": True}))
    monkeypatch.setattr(transformers_table.ledger, "RESULTS", tmp_path)
    short, full, plots = transformers_table.sections(readme_table.slug)
    own = "15.00 ms (sdpa, compiled)"  # the fastest of all that were measured
    title = "V3 attention layer, b 16, context 8192"
    assert f"| {title} | {own} | 0.300 ms | 50.0x |" in short
    assert f"| {title}, compiled over a static cache | {own} | 0.250 ms | 60.0x |" in short
    assert "| its temporary memory, b 16 | 15.0 GB | 0.05 GB | 300x |" in short
    assert "| out of memory | 50 tokens/s | - |" in short
    title = "V3's three dense layers end to end, b 16, context 8192"
    assert f"| {title} | 160 tokens/s (compiled) | 1,600 tokens/s | 10.00x |" in short
    assert (
        f"| {title}, compiled over a static cache | 160 tokens/s (compiled) | 2,400 tokens/s | 15.00x |"
        in short
    )
    assert "Transformers 5.17.0, bf16, 2026-11-24" in short
    assert (
        "![Tokens per second and memory against context](docs/transformers-nvidia-h100.svg)"
        in short
    )
    assert "| v3-dense | failed | - | - | - |" in full and "98.6% less" in full
    assert "93.3%" in full and "82.2%" in full
    picture = plots["transformers-nvidia-h100.svg"]
    assert picture.count("<polyline") == 4 and "32768" in picture


def test_without_results(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transformers_table.ledger, "RESULTS", tmp_path)
    assert transformers_table.sections(readme_table.slug) == (*[transformers_table.NONE] * 2, {})


def test_kernel_results_are_apart() -> None:
    """The ledger and the kernels' tables read other files."""
    names = [file.name for file, _ in readme_table.ledger.results()]
    assert names and not any(name.startswith("transformers") for name in names)


def test_smoke_run(tmp_path) -> None:
    pytest.importorskip("transformers", minversion="5.15")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "bench/transformers.py",
            "--smoke",
            "--out",
            out,
            "--rows",
            "layer-b1$|dense",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == [
        "v3-layer-b1",
        "v3-dense-b16-100",
        "cache-v3-dense-b16-100",
        "v3-dense-compiled-b16-100",
    ]
    layer, dense, cache, compiled = result["rows"]
    assert layer["ratio"] > 0 and layer["error"] < 0.02
    assert dense["ours"]["tokens_per_second"] > 0 and dense["own"]["tokens_per_second"] > 0
    assert compiled["ratio"] > 0 and compiled["ours"]["late_graphs"] == 0
    assert cache["bytes_per_token"] >= cache["bytes_per_token_formula"] == 3 * 576 * 2
    assert transformers_table.details(result).count("| v3-dense-b16-100 |") == 2


@pytest.mark.usefixtures("one_thread")
def test_filled_caches_hold_the_same() -> None:
    """Both attentions are measured on the same latents, in either cache."""
    pytest.importorskip("transformers", minversion="5.15")
    import flash_mla.integrations.transformers as hf
    from flash_mla.cli import random_models

    tiny = {"hidden_size": 64, "vocab_size": 128, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = random_models.config_of("v3", 2, **tiny, **heads)
    model = random_models.build(config, "cpu", torch.float32, "eager")
    b, context = 2, 70
    ids = torch.ones((b, context + 1), dtype=torch.long)

    def step(cache):
        name = random_models.cache_argument()
        positions = torch.full((b, 1), context)
        with torch.no_grad():
            return model(ids[:, -1:], position_ids=positions, **{name: cache}).logits

    wanted = step(random_models.filled_cache(model, b, context))
    own = random_models.filled_static_cache(model, b, context, room=10)
    torch.testing.assert_close(step(own), wanted)
    hf.enable(model)
    ours = random_models.filled_static_cache(model, b, context, room=10)
    for _ in range(2):
        torch.testing.assert_close(step(ours), wanted, rtol=1e-4, atol=1e-5)
        assert int(ours.get_seq_length()) == context + 1
        random_models.rewind(ours, context)
    torch.testing.assert_close(
        step(random_models.filled_cache(model, b, context)), wanted, rtol=1e-4, atol=1e-5
    )
    calls = hf.info(model).calls
    assert calls["absorbed"] == 6 and calls["fallback"] == 0
