"""torch.compile(fullgraph=True) traces through, and the operators keep the rules of torch.library."""

from __future__ import annotations

import pytest
import torch
from reference import Case, make_inputs

from flash_mla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata, merge_states

CASE = Case(b=3, s_q=2, s_kv=150)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def plan_of(form: str, lengths: torch.Tensor) -> tuple:
    md, num_splits = get_mla_metadata(lengths, 32, 1)
    forms = {
        "none": (None,),
        "plain tensors": (md.clone(), num_splits),
        "tensor without num_splits": (md.clone(),),
        "tensor with fields": (md,),
        "object": (get_mla_metadata()[0],),
    }
    return forms[form]


@pytest.mark.parametrize(
    "form", ["none", "plain tensors", "tensor without num_splits", "tensor with fields", "object"]
)
def test_decode(device: str, form: str) -> None:
    inputs = make_inputs(CASE, device)
    wanted = flash_mla_with_kvcache(*inputs.args(), None, causal=True)
    plan = plan_of(form, inputs.cache_seqlens)

    def layer(q, k_cache, *plan):
        out, lse = flash_mla_with_kvcache(
            q * 1, k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan, causal=True
        )
        return out + 0, lse

    for _ in range(2):
        out, lse = compiled(layer)(inputs.q, inputs.k_cache, *plan)
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def test_metadata_inside(device: str) -> None:
    inputs = make_inputs(CASE, device)
    wanted = flash_mla_with_kvcache(*inputs.args(), None, causal=True)

    def step(q, lengths):
        args = (q, inputs.k_cache, inputs.block_table, lengths, 512)
        md, num_splits = get_mla_metadata(lengths, 32, 1)
        out, lse = flash_mla_with_kvcache(*args, md, num_splits, causal=True)
        fresh, _ = get_mla_metadata()
        for _ in range(2):
            again, _ = flash_mla_with_kvcache(*args, fresh, causal=True)
        return out, lse, again

    out, lse, again = compiled(step)(inputs.q, inputs.cache_seqlens)
    assert (
        torch.equal(out, wanted[0])
        and torch.equal(lse, wanted[1])
        and torch.equal(again, wanted[0])
    )


def test_out_arguments(device: str) -> None:
    inputs = make_inputs(CASE, device)
    wanted = flash_mla_with_kvcache(*inputs.args(), None, causal=True)

    def step(q, out, lse):
        flash_mla_with_kvcache(q, *inputs.args()[1:], None, causal=True, out=out, lse=lse)
        return out * 2

    out, lse = torch.zeros_like(wanted[0]), torch.zeros_like(wanted[1])
    doubled = compiled(step)(inputs.q, out, lse)
    assert (
        torch.equal(out, wanted[0])
        and torch.equal(lse, wanted[1])
        and torch.equal(doubled, out * 2)
    )


def test_dynamic_batch(device: str) -> None:
    def step(q, k_cache, block_table, lengths):
        return flash_mla_with_kvcache(q, k_cache, block_table, lengths, 512, None, causal=True)

    function = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for b in (2, 3, 7):
        inputs = make_inputs(Case(b=b), device)
        got = function(*inputs.args()[:4])
        wanted = step(*inputs.args()[:4])
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.cuda
def test_reduce_overhead() -> None:
    """A graph's warm-up may be the first decode in its stream, and what we keep of it is not the graph's memory."""
    inputs = make_inputs(CASE, "cuda")

    def step(q):
        out, lse = flash_mla_with_kvcache(q * 1, *inputs.args()[1:], None, causal=True)
        return out + 0, lse + 0

    function = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    wanted = step(inputs.q)
    for _ in range(4):  # warm-up, capture, replays
        got = function(inputs.q)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_append_and_merge(device: str) -> None:
    kv_c = torch.randn((3, 512), dtype=torch.bfloat16, device=device)
    k_pe = torch.randn((3, 64), dtype=torch.bfloat16, device=device)
    slots = torch.tensor([2, -1, 70], dtype=torch.int64, device=device)
    outs = [torch.randn((2, 1, 4, 512), dtype=torch.bfloat16, device=device) for _ in range(3)]
    lses = [torch.randn((2, 4, 1), dtype=torch.float32, device=device) for _ in range(3)]

    def step(cache):
        append_kv_cache(kv_c, k_pe, cache, slots)
        return merge_states(outs, lses)

    caches = [torch.zeros((2, 64, 1, 576), dtype=torch.bfloat16, device=device) for _ in range(2)]
    got, wanted = compiled(step)(caches[0]), step(caches[1])
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_operators_keep_the_rules(device: str) -> None:
    inputs = make_inputs(CASE, device)
    md, num_splits = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    ops = torch.ops.flash_mla
    arguments = (*inputs.args()[:4], 0.05, True, md.clone(), num_splits, False, False)
    out, lse = ops.decode(*arguments)
    kv_c, k_pe = inputs.q[0, 0, :4, :512], inputs.q[0, 0, :4, 512:]
    slots = torch.tensor([0, 1, -1, 5], dtype=torch.int64, device=device)
    inputs.k_cache.zero_()  # opcheck compares with itself, and NaN would differ
    for op, args in (
        (ops.decode, arguments),
        (ops.decode_out, (*arguments, out, lse)),
        (ops.plan, (inputs.cache_seqlens, 2, 16, 1, 64)),
        (ops.append_kv_cache, (kv_c, k_pe, inputs.k_cache, slots)),
        (ops.merge_states, ([out, out], [lse, lse], False)),
        (ops.merge_states, ([out, out], [lse, lse], True)),
    ):
        torch.library.opcheck(op.default, args)
