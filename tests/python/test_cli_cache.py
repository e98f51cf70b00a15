"""`flash-mla cache`: the arithmetic against numbers worked out by hand."""

import argparse
import json

import pytest

from flash_mla.cli import main
from flash_mla.cli.cache import MODELS, Model, layer_bytes, longest_context, parse_memory, report

# Bytes per token and layer: heads * (128 + 64 + 128) * 2 for MHA, 8 * 2 * 128 * 2 for GQA.
HAND_COMPUTED = {
    "deepseek-v2-lite": {"layers": 27, "MHA": 10240, "times": 8.89},
    "deepseek-v2": {"layers": 60, "MHA": 81920, "times": 71.11},
    "deepseek-v3": {"layers": 61, "MHA": 81920, "times": 71.11},
    "deepseek-r1": {"layers": 61, "MHA": 81920, "times": 71.11},
    "kimi-k2": {"layers": 61, "MHA": 40960, "times": 35.56},
}


@pytest.mark.parametrize("name", MODELS)
def test_presets(name):
    want = HAND_COMPUTED[name]
    kinds = layer_bytes(MODELS[name])
    assert list(kinds.values()) == [want["MHA"], 4096, 1152, 656, 576]
    rows = report(MODELS[name], memory=80 * 2**30, requests=1, page_size=64, groups=8)
    mla = next(row for row in rows if row["cache"] == "MLA bf16")
    assert mla["bytes_per_token"] == 1152 * want["layers"]
    assert mla["times_smaller_than_mha"] == want["times"]


def test_longest_context_is_in_whole_pages():
    # DeepSeek-V3 in 80 GiB: 85,899,345,920 / (61 * 1152 * 64) = 19,099.8 pages.
    assert longest_context(61 * 1152, 80 * 2**30) == 19_099 * 64
    assert longest_context(61 * 1152, 80 * 2**30, requests=8) == 2_387 * 64
    assert longest_context(100, 64 * 100 - 1) == 0


def test_other_geometries():
    model = Model("m", layers=2, heads=4, kv_lora_rank=256, rope=32, nope=64, v_head=96)
    kinds = layer_bytes(model, groups=2)
    assert list(kinds.values()) == [4 * 192 * 2, 2 * 192 * 2, 576, 256 + 8 + 64, 288]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("1kB", 1000),
        ("80GiB", 80 * 2**30),
        ("80G", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 TiB", 3 * 2**39),
    ],
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80 giga", "1e9"])
def test_bad_memory_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a size such as 80GiB"):
        parse_memory(text)


def test_json_with_changed_numbers(capsys):
    flags = "--model kimi-k2 --layers 10 --memory 1GiB --requests 2 --page-size 16 --gqa-groups 4"
    assert main(["cache", *flags.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["layers"] == 10 and document["model"]["heads"] == 64
    assert document["memory"] == 2**30
    by_kind = {row["cache"]: row for row in document["rows"]}
    assert by_kind["GQA, 4 groups"]["bytes_per_token_and_layer"] == 2048
    # 2**30 / (11520 * 16) = 5825.4 pages, 2912 for each of two requests.
    assert by_kind["MLA bf16"]["longest_context"] == 2912 * 16


def test_table(capsys):
    assert main(["cache", "--model", "deepseek-v2-lite"]) == 0
    text = capsys.readouterr().out
    assert "DeepSeek-V2-Lite" in text and "10,240" in text and "1/8.89" in text


@pytest.mark.parametrize(
    ("written", "title"),
    [("DeepSeek-V2-Lite", "DeepSeek-V2-Lite"), ("R1", "DeepSeek-V3/R1"), ("Kimi K2", "Kimi K2")],
)
def test_presets_by_the_names_people_write(written, title, capsys):
    assert main(["cache", "--model", written, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == title


@pytest.mark.parametrize("flags", [["--layers", "0"], ["--memory", "much"], ["--model", "gpt"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cache", *flags])
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
