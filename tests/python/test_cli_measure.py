"""The measuring core: cases, inputs, the check before the clock, the plot."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from flash_mla.cli import measure, roofline

CASES = sorted((Path(__file__).resolve().parents[2] / "bench" / "cases").glob("*.json"))
TINY = measure.Case("tiny", b=3, s_q=2, h_q=4, s_kv=130, varlen=True)


def reference_adapter(inputs):
    """A peer that is right: the reference of every request."""
    requests = range(len(inputs.lengths))
    return lambda: torch.stack([measure.reference_request(inputs, i) for i in requests])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_cases_have_the_names_and_the_tokens_they_say(path):
    entries, cases = json.loads(path.read_text())["cases"], measure.load_cases(path)
    assert [sum(measure.case_lengths(case)) for case in cases] == [e["tokens"] for e in entries]
    for case in cases:
        v = "v" if case.varlen else ""
        assert case.name == f"dense-b{case.b}-sq{case.s_q}-h{case.h_q}-kv{case.s_kv}{v}"


def test_no_case_is_in_two_files():
    names = [case.name for path in CASES for case in measure.load_cases(path)]
    assert len(CASES) == 2 and len(set(names)) == len(names)


def test_case_file_may_be_a_plain_list(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text('[{"name": "x", "b": 1, "s_q": 1, "h_q": 2, "s_kv": 3, "note": "skipped"}]')
    assert measure.load_cases(path) == [measure.Case("x", b=1, s_q=1, h_q=2, s_kv=3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "wanted a list of cases"),
        ("[1]", "case 0"),
        ('[{"name": "x"}]', "case 0: .*missing"),
        ('[{"name": "x", "b": 0, "s_q": 1, "h_q": 2, "s_kv": 3}]', "positive integer"),
        (
            '[{"name": "x", "b": 1, "s_q": 1, "h_q": 3, "h_kv": 2, "s_kv": 3}]',
            "no multiple of h_kv",
        ),
        ('[{"name": "x", "b": 1, "s_q": 1, "h_q": 2, "s_kv": 3, "dtype": "int4"}]', "dtype = int4"),
        ("[", "Expecting value"),
    ],
)
def test_bad_case_files(tmp_path, text, message):
    path = tmp_path / "cases.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        measure.load_cases(path)


def test_inputs_are_shuffled_and_repeatable():
    first, second = (measure.make_inputs(TINY, "cpu", seed=1) for _ in range(2))
    assert torch.equal(first.q, second.q) and torch.equal(first.kv_cache, second.kv_cache)
    pages = first.block_table.flatten()
    assert sorted(pages.tolist()) == list(range(first.kv_cache.shape[0]))
    assert pages.tolist() != sorted(pages.tolist())
    assert first.cache_seqlens.tolist() == first.lengths == measure.case_lengths(TINY, seed=1)
    assert max(first.lengths) <= first.block_table.shape[1] * 64


def test_reference_agrees_with_pytorch():
    case = measure.Case("gqa", b=2, s_q=3, h_q=4, h_kv=2, s_kv=70, dtype="fp32")
    inputs = measure.make_inputs(case, "cpu")
    k = inputs.kv_cache[inputs.block_table[1].long()].flatten(0, 1)[:70].transpose(0, 1)
    q = inputs.q[1].transpose(0, 1)
    mask = torch.ones(3, 70, dtype=torch.bool).tril(diagonal=67)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), k[..., :512].repeat_interleave(2, 0), attn_mask=mask
    )
    torch.testing.assert_close(measure.reference_request(inputs, 1), want.transpose(0, 1))


def test_flop_and_bytes_of_one_case():
    case = measure.Case("x", b=2, s_q=3, h_q=4, s_kv=5)
    assert measure.case_flop(case, [5, 5]) == 2 * 3 * 4 * 10 * 1088
    assert measure.case_bytes(case, [5, 5]) == 10 * 1152 + 2 * 3 * 4 * 1088 * 2


def test_row(device):
    def wrong(inputs):
        right = reference_adapter(inputs)
        return lambda: right() + 0.1

    def broken(inputs):
        raise RuntimeError("no such kernel\nsecond line")

    adapters = {"right": reference_adapter, "wrong": wrong, "broken": broken}
    row = measure.measure_case(TINY, adapters, ms=5, device=device)
    assert "failure" not in row, row
    assert list(row) == [
        *("name", "us", "us_spread", "us_with_plan", "us_batch_invariant", "host_us"),
        *("tflops", "gbps", "error", "peers", "peer_host_us"),
    ]
    assert row["us"] > 0 and row["us_with_plan"] > 0 and row["us_batch_invariant"] > 0
    assert row["us_spread"] >= 0
    assert 0 < row["error"] < measure.ERROR_LIMIT and (row["host_us"] is None) == (device == "cpu")
    assert row["peers"]["right"] > 0
    assert row["peers"]["wrong"].startswith("ArithmeticError: wrong result")
    assert row["peers"]["broken"] == "RuntimeError: no such kernel"
    assert json.loads(json.dumps(row)) == row


def test_batch_invariant_asks_for_it(monkeypatch):
    asked = []

    def decode(*args, enable_batch_invariant, **kwargs):
        asked.append(enable_batch_invariant)
        return (None,)

    monkeypatch.setattr(measure.flash_mla, "flash_mla_with_kvcache", decode)
    inputs = measure.make_inputs(TINY, "cpu")
    for modes in ({}, {"replan": True}, {"batch_invariant": True}):
        measure.ours(inputs, **modes)()
    assert asked == [False, False, True]


def test_our_failure_is_a_row(monkeypatch):
    monkeypatch.setattr(measure, "ours", lambda inputs, **modes: lambda: inputs.q * math.nan)
    row = measure.measure_case(TINY, {"right": reference_adapter}, ms=1, device="cpu")
    assert row["failure"] and row["us"] is None and row["peers"]["right"] > 0


class FakeCard:
    """Calls that take made-up times by a clock of their own, which slows down with all that ran."""

    def __init__(self, drift=0.0):
        self.now = 0.0
        self.drift = drift
        self.slots = []  # (name, calls)

    def run(self, name, us, fail_after=math.inf):
        def repeat(repeats):
            if sum(slot == name for slot, _ in self.slots) >= fail_after:
                raise RuntimeError("out of luck\nsecond line")
            self.slots.append((name, repeats))
            times = []
            for _ in range(repeats):
                times.append(us * (1 + self.drift * self.now))
                self.now += times[-1]
            return times

        return repeat

    def order(self):
        return [name for name, _ in self.slots]


def test_rounds_alternate():
    card = FakeCard()
    samples, failures = measure.time_in_rounds({n: card.run(n, 100.0) for n in "abcdef"}, ms=60)
    estimates, order = card.order()[:6], "".join(card.order()[6:])
    assert failures == {} and estimates == list("abcdef")
    assert order == "abcdeffedcbacdefabbafedcefabcddcbafe"
    assert {calls for _, calls in card.slots[6:]} == {66 + 100}  # of 400 to warm up, and 600
    assert all(len(times) == 600 for times in samples.values())


def test_rounds_take_no_longer_than_one_after_the_other():
    for us in (3.0, 20.0, 55.0, 300.0, 900.0, 3000.0, 3900.0, 5000.0, 50000.0):
        rounds, alone = FakeCard(), FakeCard()
        measure.time_in_rounds({n: rounds.run(n, us) for n in "abcde"})
        for name in "abcde":
            measure._time_alone(alone.run(name, us), 120.0)
        assert rounds.now < 1.1 * alone.now, us


def test_rounds_cancel_a_drift():
    def drifting():
        card = FakeCard(drift=1e-7)  # 10 % slower after a second
        return {n: card.run(n, 100.0) for n in "abcdef"}

    alone = {n: measure._time_alone(run, 120.0)[0] for n, run in drifting().items()}
    assert alone["f"] / alone["a"] > 1.05
    samples, _ = measure.time_in_rounds(drifting())
    medians = [statistics.median(times) for times in samples.values()]
    assert max(medians) / min(medians) < 1.01


def test_figures_are_medians_of_what_is_counted():
    first = []

    def slow_at_first(repeats):  # every slot's warm-up is slow, and a counted call in ten
        first.append(repeats)
        warm = 0 if len(first) == 1 else 66
        return [900.0] * warm + [100.0 if i % 10 else 700.0 for i in range(warm, repeats)]

    samples, _ = measure.time_in_rounds({"a": slow_at_first}, ms=60)
    assert statistics.median(samples["a"]) == 100.0 and 900.0 not in samples["a"]


def test_who_fails_in_a_round_is_out_alone():
    card = FakeCard()
    runs = {"a": card.run("a", 10.0), "b": card.run("b", 20.0, 3), "c": card.run("c", 30.0, 0)}
    samples, failures = measure.time_in_rounds(runs, ms=5)
    assert failures == {"b": "RuntimeError: out of luck", "c": "RuntimeError: out of luck"}
    assert set(samples) == {"a"} and set(samples["a"]) == {10.0}
    assert card.order().count("a") == 7 and card.order().count("b") == 3


def test_row_takes_its_times_from_the_rounds(monkeypatch):
    card, us = FakeCard(), iter((10.0, 12.0, 15.0, 20.0, 40.0))

    def prepare(call):
        call()
        return card.run(f"run {len(card.slots)}", next(us))

    def fails_late(inputs):
        right, calls = reference_adapter(inputs), []

        def call():
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once")
            return right()

        return call

    adapters = {"x": reference_adapter, "late": fails_late, "y": reference_adapter}
    monkeypatch.setattr(measure, "host_clock_run", prepare)
    row = measure.measure_case(TINY, adapters, ms=5, device="cpu")
    assert (row["us"], row["us_with_plan"], row["us_batch_invariant"]) == (10.0, 12.0, 15.0)
    assert row["us_spread"] == 0.0
    assert row["peers"] == {"x": 20.0, "late": "RuntimeError: only once", "y": 40.0}
    assert row["tflops"] == pytest.approx(
        measure.case_flop(TINY, measure.case_lengths(TINY)) / 10e6, rel=1e-3
    )


def test_median_and_spread_of_the_clock():
    us, spread = measure.host_clock_time(lambda: statistics.mean(range(100)), ms=2)
    assert us > 0 and spread >= 0


def test_roofline_plot(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"name": "x", "us": 10.0, "tflops": 2.0, "gbps": 40.0}
    rows = [{**row, "peers": {"a": 20.0, "b": "failed"}}, {"name": "y", "us": None, "peers": {}}]
    assert roofline.roofline_points(rows) == {"flash_mla": [(50.0, 2.0)], "a": [(50.0, 1.0)]}
    ceilings = {"gbps": 3000.0, "tflops": 800.0}
    roofline.roofline_plot(rows, ceilings, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name in ("one.svg", "two.svg"):
        roofline.roofline_plot(rows, ceilings, tmp_path / name, title="GPU")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    with pytest.raises(ValueError, match="ends in .png or .svg"):
        roofline.roofline_plot(rows, ceilings, tmp_path / "plot.pdf")
    with pytest.raises(ValueError, match="no case was timed"):
        roofline.roofline_plot(rows[1:], ceilings, tmp_path / "plot.png")


@pytest.mark.cuda
def test_graph_time_on_a_gpu():
    x = torch.zeros(2**20, device="cuda")
    us, spread = measure.graph_time(lambda: x.add_(1), ms=5)
    assert 0 < us < 1000 and spread >= 0
    assert 0 < measure.host_time(lambda: x.add_(1)) < 1000
