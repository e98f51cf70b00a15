"""Tests of tools/: the ledger's digest and verdict, the spill check, the counts of GPU suites, the generated tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench/lab")]

import check_spills  # noqa: E402
import check_text  # noqa: E402
import gpu_test  # noqa: E402
import ledger  # noqa: E402
import probe  # noqa: E402
import readme_table  # noqa: E402

SOURCE = """#include "a.h"  // why
constexpr int kRows = 1'000; /* in
 two lines */
int f(int a) { return a + kRows; }
const char* s = "// no comment";
"""


def test_digest_ignores_comments_and_layout():
    other = '#include "a.h"\nconstexpr int kRows=1000;\nint\n\n  f(int a) {\n  return a+kRows;  // sum\n}\n'
    other += 'const char *s = "// no comment";\n'
    assert ledger.normalised(SOURCE) == ledger.normalised(other)


@pytest.mark.parametrize(
    "old, new",
    [
        ("1'000", "1'001"),
        ("return a", "return  -a"),
        ("no comment", "a comment"),
        ('"a.h"', '"b.h"'),
    ],
)
def test_digest_sees_every_change_of_code(old, new):
    assert ledger.normalised(SOURCE) != ledger.normalised(SOURCE.replace(old, new))


@pytest.fixture
def good_ledger(tmp_path, monkeypatch):
    """A ledger and a result that vouch for these sources; a function that changes the ledger."""
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "gpu-ledger.json")
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ledger, "toolkit_version", lambda build=None: "13.0.88")
    digest = ledger.digest("13.0.88")
    head = {"gpu": "NVIDIA H200", "toolkit": "13.0.88", "date": "2026-11-23", "digest": digest}
    counts = {"passed": 3, "failed": 0, "skipped": 0}
    ledger.write(ledger.RESULTS / "2026-11-23-nvidia-h200.json", {**head, "rows": []})

    def write(suites=ledger.SUITES, **changes):
        ledger.write(ledger.LEDGER, {**head, "suites": dict.fromkeys(suites, counts), **changes})

    write()
    return write


def test_ledger_vouches_for_what_was_tested(good_ledger):
    assert ledger.problems() == []


def test_ledger_of_other_code(good_ledger):
    good_ledger(digest="0" * 32)
    assert ledger.problems() == ["GPU code changed since it was last tested on a GPU"]


def test_ledger_of_another_toolkit(good_ledger):
    good_ledger(toolkit="12.8.1", digest=ledger.digest("12.8.1"))
    (problem,) = ledger.problems()
    assert problem.startswith("GPU code changed since it was last tested on a GPU: CUDA 13.0.88")


def test_ledger_with_a_suite_missing(good_ledger):
    good_ledger(suites=ledger.SUITES[:-1])
    assert ledger.problems() == ["suite initcheck has not run on a GPU"]


def test_ledger_with_a_failure(good_ledger):
    good_ledger(suites={})
    document = ledger.read(ledger.LEDGER)
    document["suites"] = {name: {"passed": 1, "failed": 0, "skipped": 0} for name in ledger.SUITES}
    document["suites"]["cpp"]["failed"] = 2
    ledger.write(ledger.LEDGER, document)
    assert ledger.problems() == ["suite cpp: 1 passed, 2 failed"]


def test_gpu_test_writes_no_ledger_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_test.py", "--build", str(tmp_path)])
    with pytest.raises(SystemExit, match="a Hopper GPU .* is needed, found no GPU; no ledger"):
        gpu_test.main()


def test_counts_of_a_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase status="run" result="completed"/><testcase>'
        '<failure message="x"/></testcase><testcase result="skipped"><skipped/></testcase>'
        '<testcase status="notrun"/></testsuite></testsuites>'
    )
    assert gpu_test.count(report) == {"passed": 1, "failed": 1, "skipped": 1}


def test_ledger_keeps_other_suites_of_the_same_code(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "gpu-ledger.json")
    head = {"gpu": "NVIDIA H200", "driver": "580", "digest": "a"}
    gpu_test.record(head, "cpp", {"passed": 1})
    gpu_test.record(head, "python", {"passed": 2})
    assert ledger.read(ledger.LEDGER)["suites"] == {"python": {"passed": 2}, "cpp": {"passed": 1}}
    gpu_test.record({**head, "digest": "b"}, "memcheck", {"passed": 3})
    assert list(ledger.read(ledger.LEDGER)["suites"]) == ["memcheck"]


def ptxas_report(kernel, stores):
    return (
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {kernel}\n"
        f"    0 bytes stack frame, {stores} bytes spill stores, {stores} bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 9 barriers\n"
    )


def check(build, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_spills.py", str(build)])
    check_spills.main()


def test_spills_of_the_last_build_count(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.cu.o").touch()
    building = "[1/2] Building CUDA object a.cu.o\n"
    gone = "[2/2] Building CUDA object gone.cu.o\n" + ptxas_report("other", 8)
    log = tmp_path / "build.log"
    log.write_text(
        building + ptxas_report("kernel", 8) + gone + building + ptxas_report("kernel", 0)
    )
    check(tmp_path, monkeypatch)
    assert "1 kernels in 1 files, no spills" in capsys.readouterr().out
    log.write_text(building + ptxas_report("kernel", 8))
    with pytest.raises(SystemExit, match=r"a\.cu\.o: kernel: 8 \+ 8 bytes of spills"):
        check(tmp_path, monkeypatch)
    log.write_text(building)
    with pytest.raises(SystemExit, match="no report of ptxas"):
        check(tmp_path, monkeypatch)


def test_serialised_wgmma_fails(tmp_path, monkeypatch):
    (tmp_path / "a.cu.o").touch()
    warning = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions ...\n"
    )
    log = "[1/2] Building CUDA object a.cu.o\n" + warning + ptxas_report("kernel", 0)
    (tmp_path / "build.log").write_text(log)
    with pytest.raises(SystemExit, match="C7510"):
        check(tmp_path, monkeypatch)


def test_text_check():
    assert list(check_text.complaints("a.py", "x = 1\n")) == []
    assert [what for _, what in check_text.complaints("a.py", "x = 1 \n\ty\n\u00e9")] == [
        "no newline at the end of the file",
        "trailing blanks",
        "a tab",
        "a character outside ASCII",
    ]


def test_generated_text_goes_between_the_markers():
    text = "a\n<!-- t: generated by make readme -->\nold\n<!-- t: end -->\nb\n"
    want = "a\n<!-- t: generated by make readme -->\nnew\n<!-- t: end -->\nb\n"
    assert readme_table.fill(text, "t", "new") == want
    with pytest.raises(SystemExit, match="the markers of u are missing"):
        readme_table.fill(text, "u", "new")


@pytest.fixture
def bench_run():
    """bench/run.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "bench/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_host_time_of_the_cpp_calls(bench_run, tmp_path):
    assert bench_run.cpp_host_us(tmp_path)[1].endswith("flash_mla_host_time was not built")
    program = tmp_path / "bench/flash_mla_host_time"
    program.parent.mkdir()
    row = {"b": 1, "s_q": 1, "h_q": 16, "s_kv": 1024, "decode_us": 3.25, "plan_decode_us": 2.5}

    def answers(text):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        return bench_run.cpp_host_us(tmp_path)

    assert answers(f"echo '{json.dumps(row)}'\necho '{json.dumps(row)}'") == ([row, row], "")
    assert answers("echo no GPU >&2; exit 1") == (None, "no GPU")
    assert answers("exit 3")[1].endswith("ended with 3")
    result = {"cpp_host_us": [row]}
    assert readme_table.cpp_host(result).endswith("| 1 | 16 | 3.2 | 2.5 |")
    assert readme_table.cpp_host({}) == ""


def test_all_case_files_are_timed_and_shown(bench_run):
    files = sorted((ROOT / "bench/cases").glob("*.json"))
    assert sorted(bench_run.CASES) == sorted([readme_table.CASES, *readme_table.MORE_CASES])
    assert sorted(bench_run.CASES) == files


def test_tables_of_a_result():
    cases = {"a": {"regime": "T", "b": 2, "s_q": 1, "h_q": 128, "s_kv": 64, "varlen": True}}
    row = {
        "name": "a",
        "us": 10.0,
        "us_with_plan": 11.0,
        "host_us": 8.0,
        "tflops": 5.0,
        "gbps": 7.0,
    }
    row["peers"] = {"sgl_flash_mla": 12.5, "fa3_qv": 20.0}
    result = {"gpu": "NVIDIA H200", "date": "2026-11-23", "rows": [row]}
    assert "| 2 | 1 | 128 | 64 v | 10.0 | 11.0 | 8.0 | 12.5 | 20.0 | - | 1.25 | 5 | 7 |" in (
        readme_table.details(result, cases)
    )
    assert "| 1 | 1.25 | 2.00 | - | 1.25 |" in readme_table.summary(result, cases)
    assert readme_table.plot(result).count("<circle") == 4
    assert readme_table.details(result, {}) == ""
    assert "batch invariant" not in readme_table.details(result, cases)
    row["us_batch_invariant"] = 14.0
    table = readme_table.details(result, cases)
    assert "| ours | with plan | batch invariant | host | FlashMLA |" in table
    assert "| 64 v | 10.0 | 11.0 | 14.0 | 8.0 | 12.5 |" in table

    more = {"more": {**cases["a"], "regime": "T", "h_q": 8}}
    result["rows"].append({**row, "name": "more", "us": 100.0})
    assert "| 1 | 1.25 | 2.00 | - | 1.25 |" in readme_table.summary(result, cases)
    assert readme_table.details(result, cases).count("\n") == 2
    assert "| 2 | 1 | 8 | 64 v | 100.0 |" in readme_table.details(result, more)


@pytest.mark.parametrize(
    "edits", [probe.CLOCKS + probe.PROBES + probe.FINE, probe.CLOCKS + probe.CHAIN]
)
def test_probes_find_their_places_in_the_kernel(tmp_path, edits):
    probe.copy(ROOT, tmp_path, edits, [])  # exits where a line is not found once
    score = (tmp_path / probe.KERNEL / "score.cuh").read_text()
    assert score.count("flash_mla::lab::kPDone)") == 1
