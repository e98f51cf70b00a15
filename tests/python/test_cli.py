"""The command `flash-mla`: every sub-command in this process, and as a program."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_mla
from flash_mla.cli import check, decode_text, devices, main, reference
from flash_mla.cli.mla_layer import Geometry, MlaLayer

TINY_CASES = [
    {"name": "one", "b": 1, "s_q": 1, "h_q": 2, "s_kv": 70},
    {"name": "two", "b": 2, "s_q": 2, "h_q": 3, "s_kv": 40, "varlen": True},
]
NO_GPU = {
    "version": "1.2.3",
    "cuda_build": 13000,
    "cpu": {"isa": "avx2", "threads": 3},
    "torch": "2.11.0",
    "devices": [
        {
            "index": 0,
            "name": "NVIDIA A100",
            "capability": "8.0",
            "sms": 108,
            "memory": 80 * 2**30,
            "supported": False,
            "why_not": "compute capability 8.0, needs 9.0",
        }
    ],
    "conflicts": ["sgl-flash-mla"],
}


def flash_mla_program(*arguments):
    package = Path(flash_mla.__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "flash_mla.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def cases(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": TINY_CASES}))
    return str(path)


# info


def test_info_json(device, capsys):
    assert main(["info", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    variants = document.pop("variants")
    assert document == json.loads(json.dumps(flash_mla.info()))
    answers = next(answers for name, answers in variants.items() if name.startswith(device))
    for variant in ("decode bf16", "decode fp16", "decode, pages of 64", "append_kv_cache"):
        assert answers[variant] == ""
    assert (answers["decode fp32"] == "") == (device == "cpu")
    assert "attn_sink" in answers["decode, attention sink"]


def test_info_table_says_why_not(capsys, monkeypatch):
    monkeypatch.setattr(flash_mla, "info", lambda: NO_GPU)
    assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for wanted in ("1.2.3", "13.0", "avx2, 3 threads", "needs 9.0", "sgl-flash-mla"):
        assert wanted in text


def test_devices(monkeypatch):
    assert devices.usable_devices("cpu") == ["cpu"]
    assert devices.usable_devices("all")[0] == "cpu"
    monkeypatch.setattr(flash_mla, "info", lambda: NO_GPU)
    with pytest.raises(RuntimeError, match="no GPU can run it .NVIDIA A100: .*needs 9.0"):
        devices.usable_devices("cuda")
    gpu = {**NO_GPU["devices"][0], "supported": True}
    monkeypatch.setattr(flash_mla, "info", lambda: {**NO_GPU, "devices": [gpu]})
    assert devices.usable_devices("all") == ["cpu", "cuda:0"]
    assert devices.usable_devices("cuda") == ["cuda:0"]


def test_no_gpu_is_an_error_message(capsys, monkeypatch):
    monkeypatch.setattr(flash_mla, "info", lambda: {**NO_GPU, "devices": [], "cuda_build": 0})
    for command in ("demo", "check", "bench"):
        assert main([command, "--device", "cuda"]) == 2
        error = capsys.readouterr().err
        assert error == f"flash-mla {command}: no GPU can run it (built without CUDA)\n"


# check


def test_check_passes(device, capsys):
    assert main(["check", "--device", device, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and len(document["rows"]) >= 18
    assert all(row["device"].startswith(device) for row in document["rows"])


def test_check_finds_a_wrong_result(capsys, monkeypatch):
    decode = flash_mla.flash_mla_with_kvcache

    def without_mask(*args, **kwargs):
        return decode(*args, **{**kwargs, "causal": False})

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", without_mask)
    monkeypatch.setattr(check, "_shapes", lambda device: [reference.Shape("x", (257,), s_q=4)])
    assert main(["check", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" in "".join(lines) and lines[-1] == "3 checks on cpu: 1 failed"


def test_check_survives_a_broken_build(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", broken)
    assert main(["check", "--device", "cpu", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["failure"] == "RuntimeError: no kernel" for row in rows)


def test_reference_against_pytorch():
    problem = reference.make_problem(reference.Shape("x", (70, 3), s_q=2, h_q=4, h_kv=2))
    out, lse = reference.solve(problem)
    for i, length in enumerate((70, 3)):
        k = reference.request_keys(problem, i).double().transpose(0, 1).repeat_interleave(2, 0)
        q = problem.q[i].double().transpose(0, 1)
        mask = torch.ones(2, length, dtype=torch.bool).tril(diagonal=length - 2)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, k[..., :512], attn_mask=mask, scale=problem.softmax_scale
        )
        torch.testing.assert_close(out[i], want.transpose(0, 1))
        scores = (q @ k.transpose(1, 2) * problem.softmax_scale).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[i], scores.logsumexp(-1))


def test_reference_of_rows_without_keys():
    problem = reference.make_problem(reference.Shape("x", (0, 1), s_q=2))
    out, lse = reference.solve(problem)
    assert (out[0] == 0).all() and (lse[0] == torch.inf).all()
    assert (out[1, 0] == 0).all() and (lse[1, :, 0] == torch.inf).all()
    assert lse[1, :, 1].isfinite().all()


def test_problems_are_poisoned():
    problem = reference.make_problem(reference.Shape("x", (65, 1)))
    assert problem.kv_cache[..., 0].isnan().sum() == problem.kv_cache.shape[0] * 64 - 66
    assert (problem.block_table == reference.GARBAGE_PAGE).sum() == 3
    nan = torch.full_like(problem.q[..., :512], torch.nan)
    lse = torch.zeros(2, 16, 1)
    assert not reference.judge(problem, nan, lse).passed


def test_check_covers_what_differs_by_device():
    names = {
        device: {shape.name for shape in check._shapes(device)} for device in ("cpu", "cuda:0")
    }
    assert names["cuda:0"] < names["cpu"]


# demo


def test_layer_absorbed_is_naive_in_float64():
    layer = MlaLayer(Geometry(hidden=64, heads=3), "cpu", torch.float64)
    hidden = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20)
    latent, k_rope = layer.compress(hidden, positions)
    q = layer.absorbed_query(hidden[-1:], positions[-1:])[0]
    scores = q @ torch.cat((latent, k_rope), -1).T * layer.geometry.softmax_scale
    absorbed = layer.project_out((torch.softmax(scores, -1) @ latent)[None])[0]
    torch.testing.assert_close(absorbed, layer.naive(hidden), rtol=1e-10, atol=1e-12)


def test_rope_scores_depend_on_distance_alone():
    layer = MlaLayer(Geometry(hidden=64, heads=1), "cpu", torch.float64)
    hidden = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(query_position, key_position):
        q = layer.query(hidden, torch.tensor([query_position]))[1][0, 0]
        return float(q @ layer.compress(hidden, torch.tensor([key_position]))[1][0])

    assert score(7, 3) == pytest.approx(score(1004, 1000), rel=1e-9)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)


@pytest.mark.parametrize(("tokens", "requests"), [(1, 8), (5, 8), (36, 8), (1000, 7), (10, 1)])
def test_cut_loses_nothing(tokens, requests):
    words = [str(i) for i in range(tokens)]
    pieces = decode_text.cut(words, requests)
    assert sum(pieces, []) == words
    assert len(pieces) == min(tokens, requests) and all(pieces)


def test_tokenize():
    assert decode_text.tokenize("Latent, 576 wide!") == ["Late", "nt", ",", "576", "wide", "!"]
    with pytest.raises(ValueError, match="no token"):
        decode_text.tokenize(" \n")


def test_demo_on_a_file(device, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The latent is all that is cached of a token. " * 20)
    flags = ["--device", device, "--requests", "3", "--steps", "4", "--json"]
    assert main(["demo", "--file", str(text), *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and document["tokens"] == 280
    result = document["devices"][0]
    assert result["device"].startswith(device) and result["tokens_cached"] == 280
    assert 0 < result["error"] <= result["error_limit"] < 0.05
    assert 0 < result["page_utilisation"] <= 1
    assert result["layer_tokens_per_second"] > 0 and result["attention_tokens_per_second"] > 0


def test_demo_of_one_word(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("word")
    assert main(["demo", "--file", str(text), "--device", "cpu"]) == 0
    assert "1 tokens" in capsys.readouterr().out


def test_demo_finds_a_wrong_result(tmp_path, capsys, monkeypatch):
    decode = flash_mla.flash_mla_with_kvcache

    def wrong(*args, **kwargs):
        out, lse = decode(*args, **kwargs)
        return out * 1.1, lse

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", wrong)
    text = tmp_path / "text.txt"
    text.write_text("some words " * 20)
    assert main(["demo", "--file", str(text), "--device", "cpu"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--file", "no/such/file"], "No such file"),
        (["--requests", "0"], "--requests = 0, wanted >= 1"),
        (["--max-tokens", "-1"], "--max-tokens = -1, wanted >= 1"),
    ],
)
def test_demo_bad_input(flags, message, capsys):
    assert main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err


# bench


def test_bench_files(device, cases, tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}
    flags = ["--json", str(files["json"]), "--csv", str(files["csv"])]
    assert main(["bench", "--cases", cases, "--device", device, "--ms", "2", *flags]) == 0
    document = json.loads(files["json"].read_text())
    assert [row["name"] for row in document["rows"]] == ["one", "two"]
    assert document["gpu"].startswith("cpu-") == (device == "cpu") and document["date"]
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["one", "two"]
    assert [float(row["us"]) for row in rows] == [row["us"] for row in document["rows"]]
    captured = capsys.readouterr()
    assert captured.out == "" and "TFLOPS" in captured.err


def test_bench_plot(cases, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    flags = ["--device", "cpu", "--ms", "1", "--filter", "one", "--plot", str(plot)]
    assert main(["bench", "--cases", cases, *flags]) == 0
    assert "<svg" in plot.read_text()


def test_bench_filter_and_output(cases, capsys):
    flags = ["--cases", cases, "--device", "cpu", "--ms", "1"]
    assert main(["bench", *flags, "--filter", "t?o", "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "name,us,us_spread,us_with_plan,us_batch_invariant,host_us,tflops,gbps,error"
    )
    assert [line.partition(",")[0] for line in lines[1:]] == ["two"]
    assert main(["bench", *flags, "--filter", "three"]) == 2
    assert "matches none of 2 cases" in capsys.readouterr().err


def test_bench_on_the_cpu_has_no_peers(cases, capsys):
    flags = ["--cases", cases, "--device", "cpu", "--ms", "1", "--filter", "one"]
    assert main(["bench", *flags, "--peers"]) == 0
    assert "peers run on a GPU only" in capsys.readouterr().err


def test_bench_reports_a_wrong_result(cases, capsys, monkeypatch):
    def nothing(q, *args, **kwargs):
        return torch.zeros_like(q[..., :512]), None

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", nothing)
    assert main(["bench", "--cases", cases, "--device", "cpu", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["failure"].startswith("ArithmeticError: wrong result") for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "no/such/file"], "No such file"),
        (["--plot", "plot.pdf"], "wanted a name that ends in .png or .svg"),
    ],
)
def test_bench_bad_input(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


# the program


def test_program():
    result = flash_mla_program("cache", "--model", "deepseek-v3", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["rows"][2]["bytes_per_token"] == 70272
    result = flash_mla_program()
    assert result.returncode == 2 and "COMMAND" in result.stderr
