"""The eager function beside the operator: the same results, errors and texts; used only where the operator has nothing to add."""

from __future__ import annotations

import concurrent.futures
import contextlib

import pytest
import torch
from reference import Case, make_inputs
from test_errors import DECODE_ERRORS, arguments

import flash_mla
from flash_mla import flash_mla_interface as interface
from flash_mla import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.skipif(
    not hasattr(flash_mla._library._LIBRARY, "flash_mla_python_fast_decode"),
    reason="the extension was built without Python's headers",
)

CASES = [
    Case(),
    Case(b=0, varlen=False),
    Case(b=3, s_q=2, h_q=12, h_kv=4, s_kv=300, dtype=torch.float16),
    Case(b=5, s_q=3, h_q=128, zero_rows=True),
    Case(b=1, s_kv=4000, causal=False),
]


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """One entry for each call of the eager function: whether it gave the results."""
    function = interface._fast_decode
    assert function is not None
    made = []

    def counted(*args):
        results = function(*args)
        made.append(results is not None)
        return results

    monkeypatch.setattr(interface, "_fast_decode", counted)
    return made


def both_ways(monkeypatch, function) -> tuple:
    """What `function` gives with the eager function and without, an error as its type and text."""
    outcomes = []
    for fast in (interface._fast_decode, None):
        with monkeypatch.context() as patch:
            patch.setattr(interface, "_fast_decode", fast)
            try:
                outcomes.append(function())
            except Exception as error:
                outcomes.append((type(error), str(error)))
    return tuple(outcomes)


def plans(inputs, case: Case) -> dict:
    metadata, num_splits = get_mla_metadata(
        inputs.cache_seqlens, case.s_q * case.h_q // case.h_kv, case.h_kv
    )
    return {
        "none": (None,),
        "tensors": (metadata, num_splits),
        "tensor": (metadata.clone(),),
        "object": (get_mla_metadata()[0],),
        "one row": (metadata[:1].clone(), num_splits),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", ["none", "tensors", "tensor", "object", "one row"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_same_results(device: str, calls, monkeypatch, case, form, batch_invariant) -> None:
    inputs = make_inputs(case, device)
    plan = plans(inputs, case)[form]

    def call():
        return flash_mla_with_kvcache(
            *inputs.args(), *plan, causal=case.causal, enable_batch_invariant=batch_invariant
        )

    fast, slow = both_ways(monkeypatch, call)
    assert calls == [True]
    assert type(fast) is tuple and len(fast) == 2
    for ours, operators in zip(fast, slow, strict=True):
        assert type(ours) is torch.Tensor
        assert ours.dtype == operators.dtype and ours.device == operators.device
        assert ours.shape == operators.shape and ours.stride() == operators.stride()
        assert torch.equal(ours, operators)


@pytest.mark.parametrize("name", DECODE_ERRORS)
def test_same_errors(device: str, monkeypatch, name: str) -> None:
    change = DECODE_ERRORS[name][0]
    good = arguments(device)
    bad = good | change(good)
    fast, slow = both_ways(monkeypatch, lambda: flash_mla_with_kvcache(**bad))
    if isinstance(fast[0], torch.Tensor):  # legal on this device
        assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    else:
        assert fast == slow


def test_errors_are_the_operators(calls) -> None:
    good = arguments("cpu")
    with pytest.raises(ValueError, match="q.rank = 3"):
        flash_mla_with_kvcache(**(good | {"q": good["q"][0]}))
    with pytest.raises(ValueError):
        flash_mla_with_kvcache(**(good | {"cache_seqlens": good["cache_seqlens"] - 1000}))
    assert calls == [False, False]


class Subclass(torch.Tensor):
    pass


@contextlib.contextmanager
def profile():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield
    assert any(event.name == "flash_mla::decode" for event in profiler.events())


MODES = {
    "default device": lambda: torch.device("cpu"),
    "function mode": torch.overrides.BaseTorchFunctionMode,
    "profiler": profile,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_see_the_operator(calls, mode: str) -> None:
    inputs = make_inputs(Case())
    wanted = flash_mla_with_kvcache(*inputs.args(), None)
    with MODES[mode]():
        got = flash_mla_with_kvcache(*inputs.args(), None)
    assert calls == [True, False]
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_dispatch_mode_sees_the_operator(calls) -> None:
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs = make_inputs(Case())
    with Mode():
        flash_mla_with_kvcache(*inputs.args(), None)
    assert calls == [False] and torch.ops.flash_mla.decode.default in seen


def test_fake_tensors(calls) -> None:
    inputs = make_inputs(Case())
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs.args()[:4]]
        out, _ = flash_mla_with_kvcache(*fakes, 512, None)
    assert out.shape == (2, 1, 16, 512) and isinstance(out, torch._subclasses.FakeTensor)
    assert True not in calls


@pytest.mark.parametrize("which", ["q", "k_cache"])
@pytest.mark.parametrize(
    "kind",
    [
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: tensor.as_subclass(Subclass),
        torch.nn.Parameter,
    ],
    ids=["requires_grad", "subclass", "parameter"],
)
def test_special_tensors_go_to_the_operator(calls, monkeypatch, which, kind) -> None:
    inputs = make_inputs(Case())
    setattr(inputs, which, kind(getattr(inputs, which)))
    fast, slow = both_ways(monkeypatch, lambda: flash_mla_with_kvcache(*inputs.args(), None))
    assert calls == [False]
    for ours, operators in zip(fast, slow, strict=True):
        assert type(ours) is type(operators) and ours.requires_grad == operators.requires_grad
        assert torch.equal(ours, operators)


def test_meta_tensors(monkeypatch) -> None:
    inputs = [tensor.to("meta") for tensor in make_inputs(Case()).args()[:4]]
    fast, slow = both_ways(monkeypatch, lambda: flash_mla_with_kvcache(*inputs, 512, None))
    assert [(x.shape, x.dtype) for x in fast] == [(x.shape, x.dtype) for x in slow]


def test_vmap(calls) -> None:
    inputs = make_inputs(Case())
    queries = torch.stack([inputs.q, inputs.q * 2])
    with contextlib.suppress(RuntimeError):  # the operator has no rule for it and may say so
        torch.vmap(lambda q: flash_mla_with_kvcache(q, *inputs.args()[1:], None)[0])(queries)
    assert True not in calls


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference(calls, monkeypatch, guard) -> None:
    inputs = make_inputs(Case())
    with guard():
        fast, slow = both_ways(monkeypatch, lambda: flash_mla_with_kvcache(*inputs.args(), None))
    assert calls == [True]
    for ours, operators in zip(fast, slow, strict=True):
        assert ours.is_inference() == operators.is_inference()
        assert torch.equal(ours, operators)


def test_results_are_freed_with_their_last_name(device: str, calls) -> None:
    inputs = make_inputs(Case(), device)
    for result in flash_mla_with_kvcache(*inputs.args(), None):
        assert result._use_count() == 1
        assert result.untyped_storage().resizable()
    assert calls == [True]


def test_other_versions_of_pytorch(monkeypatch) -> None:
    """Without one of the things that the eager function is made of, there is none, and calls go on."""
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    assert flash_mla._library.fast_decode() is None


def test_threads(device: str, calls) -> None:
    """Calls of several threads with different shapes, which share what is kept of the last shape."""
    jobs = [make_inputs(Case(b=b, s_q=s_q), device) for b, s_q in ((1, 1), (2, 3), (5, 2))]
    wanted = [flash_mla_with_kvcache(*inputs.args(), None) for inputs in jobs]

    def work(number: int) -> bool:
        results = [flash_mla_with_kvcache(*jobs[number].args(), None) for _ in range(50)]
        return all(
            torch.equal(ours, theirs)
            for result in results
            for ours, theirs in zip(result, wanted[number], strict=True)
        )

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        assert all(pool.map(work, range(len(jobs))))
    assert calls == [True] * (len(jobs) * 51)


@pytest.mark.cuda
def test_unaligned_q(calls, monkeypatch) -> None:
    inputs = make_inputs(Case(), "cuda")
    wide = torch.zeros((*inputs.q.shape[:3], 577), dtype=inputs.q.dtype, device="cuda")
    wide[..., 1:] = inputs.q
    inputs.q = wide[..., 1:]
    fast, slow = both_ways(monkeypatch, lambda: flash_mla_with_kvcache(*inputs.args(), None))
    assert calls == [False]
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])


@pytest.mark.cuda
def test_graph(calls) -> None:
    """Results made inside a capture belong to the graph's pool; a replay with other lengths is right."""
    inputs = make_inputs(Case(b=4, s_kv=3000, varlen=False), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(*inputs.args(), get_mla_metadata()[0], causal=True)
    inputs.cache_seqlens.copy_(torch.tensor([1, 700, 0, 2000], dtype=torch.int32))
    graph.replay()
    wanted = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
    assert calls == [True, True]
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
