"""`flash-mla generate`: a checkpoint and random weights, alone and compared."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build

from flash_mla.cli import generate, main, random_models

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 200,
}


@pytest.fixture
def tiny(monkeypatch) -> None:
    for name, geometry in random_models.GEOMETRIES.items():
        monkeypatch.setitem(random_models.GEOMETRIES, name, {**geometry, **TINY})


@pytest.fixture
def prompt(tmp_path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text("All happy families are alike; every unhappy family is unhappy in its own way.")
    return str(path)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    build("deepseek_v3").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def of_json(capsys, *arguments: str) -> dict:
    assert main(["generate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("geometry", ["deepseek-v2-lite", "v3"])
def test_geometries(tiny, device, capsys, prompt, geometry) -> None:
    dtype = "fp32" if device == "cpu" else "bf16"
    document = of_json(
        capsys, "--geometry", geometry, "--layers", "2", "--device", device, "--dtype", dtype,
        "--prompt-file", prompt, "--batch", "2", "--max-new-tokens", "9", "--compare",
    )  # fmt: skip
    without, ours = document["runs"]
    assert (without["flash_mla"], ours["flash_mla"]) == (False, True)
    assert document["layers"] == 2 and document["left"] == {}
    assert (ours["absorbed"], ours["fallback"]) == (16, 0)
    assert (without["absorbed"], without["fallback"]) == (0, 0)
    assert [len(row) for row in ours["tokens"]] == [9, 9]
    if device == "cpu":
        assert document["same_tokens"] and ours["tokens"] == without["tokens"]
    cached = 2 * (document["prompt_tokens"] + 8)
    assert ours["cache_tokens"] == without["cache_tokens"] == cached
    itemsize = 4 if dtype == "fp32" else 2
    assert without["cache_bytes"] == cached * 576 * itemsize * 2
    assert ours["cache_bytes"] == 2 * 1 * 64 * 576 * itemsize * 2
    assert min(run[key] for run in (ours, without) for key in ("seconds_to_first_token", "tokens_per_second")) > 0  # fmt: skip


def test_checkpoint_without_tokenizer(capsys, checkpoint, prompt) -> None:
    document = of_json(
        capsys, "--model", checkpoint, "--prompt-file", prompt, "--device", "cpu", "--dtype", "fp32",
        "--max-new-tokens", "5", "--context", "70", "--attention", "eager", "--compare",
    )  # fmt: skip
    assert document["prompt_tokens"] == 70 and document["same_tokens"]
    assert document["runs"][1]["absorbed"] == 8


def test_tokenizer_is_used(capsys, checkpoint, prompt, monkeypatch) -> None:
    class Words:
        def __call__(self, text):
            return {"input_ids": [3 + len(word) for word in text.split()]}

        def decode(self, ids):
            return " ".join("x" * token for token in ids)

    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: Words()
    )
    arguments = ["--model", checkpoint, "--prompt-file", prompt, "--device", "cpu"]
    assert main(["generate", *arguments, "--max-new-tokens", "3", "--dtype", "fp32"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for wanted in ("1 rows of 14 tokens", "2 attention layers absorbed", "xxx", "4 calls ran absorbed, 0 fell back"):  # fmt: skip
        assert wanted in text


def test_table_of_a_comparison(tiny, capsys) -> None:
    arguments = ["--geometry", "v3", "--layers", "1", "--device", "cpu", "--context", "8"]
    assert main(["generate", *arguments, "--max-new-tokens", "4", "--compare", "--dtype", "fp32"]) == 0  # fmt: skip
    text = " ".join(capsys.readouterr().out.split())
    for wanted in ("without", "flash_mla", "x the tokens per second, the same tokens"):
        assert wanted in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--geometry", "v3", "--batch", "0"], "--batch = 0, wanted >= 1"),
        (["--geometry", "v3", "--max-new-tokens", "0"], "--max-new-tokens = 0, wanted >= 1"),
        (["--geometry", "v3", "--context", "-1"], "--context = -1, wanted >= 1"),
        (["--model", "x", "--layers", "2"], "--layers goes with --geometry"),
        (["--geometry", "v3", "--layers", "1", "--prompt-file", "none.txt"], "none.txt"),
    ],
)
def test_bad_arguments(tiny, capsys, arguments, message) -> None:
    assert main(["generate", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_empty_prompt(tiny, capsys, tmp_path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("  ")
    arguments = ["--geometry", "v3", "--layers", "1", "--prompt-file", str(path)]
    assert main(["generate", *arguments, "--device", "cpu"]) == 2
    assert "the text has no token in it" in capsys.readouterr().err


def test_a_model_with_nothing_to_absorb(capsys, tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nothing was enabled"):
        assert main(["generate", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "can run absorbed" in capsys.readouterr().err


def test_filled_cache_and_clock() -> None:
    model = build("deepseek_v3")
    cache = random_models.filled_cache(model, 2, 70)
    assert cache.get_seq_length() == 70 and len(cache.layers) == 2
    assert random_models.cache_bytes(cache) == 2 * 2 * 70 * 576 * 4
    clock = random_models.StepClock(torch.device("cpu"), skip=1)
    scores = torch.zeros(1, 3)
    for _ in range(5):
        assert clock(torch.zeros(1, 1), scores) is scores
    clock.stop()
    assert clock.first <= clock.steady <= clock.end and clock.steps == 5
    assert clock.ms_per_step == (clock.end - clock.steady) * 1e3 / 3


def test_geometries_are_the_published_ones() -> None:
    lite = random_models.config_of("deepseek-v2-lite")
    assert (lite.num_hidden_layers, lite.num_attention_heads, lite.hidden_size) == (27, 16, 2048)
    v3 = random_models.config_of("v3", 3)
    assert (v3.num_hidden_layers, v3.num_attention_heads, v3.hidden_size) == (3, 128, 7168)
    for config in (lite, v3):
        latent = (config.kv_lora_rank, config.qk_rope_head_dim)
        assert (*latent, config.qk_nope_head_dim, config.v_head_dim) == (512, 64, 128, 128)
    assert generate.DTYPES["bf16"] == torch.bfloat16
