"""Random bad arguments: each call ends in an error of a documented type or in the right answer, never in anything else."""

from __future__ import annotations

import random

import pytest
import torch
from reference import Case, Inputs, assert_close, decode, make_inputs

from flash_mla import (
    FlashMLASchedMeta,
    append_kv_cache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_states,
)

ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
CALLS, CHUNKS = 6000, 6


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> object:
    """Something near `tensor`, often wrong: another rank, shape, dtype, stride, device, type."""
    kind = rng.randrange(14)
    if kind == 0:
        return rng.choice([None, 3, "x", [1, 2], 2.5, object(), (), {}])
    if kind == 1:
        return tensor[0] if tensor.dim() else tensor
    if kind == 2:
        return tensor[None]
    if kind == 3:
        dtypes = [
            torch.float16,
            torch.float32,
            torch.float64,
            torch.int8,
            torch.int32,
            torch.int64,
            torch.bool,
        ]
        return tensor.to(rng.choice(dtypes))
    if kind == 4:
        return tensor.transpose(rng.randrange(tensor.dim()), rng.randrange(tensor.dim()))
    if kind == 5:
        axis = rng.randrange(tensor.dim())
        return tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis] + 1))
    if kind == 6:
        return torch.stack((tensor, tensor), -1)[..., rng.randrange(2)]
    if kind == 7:
        axis = rng.randrange(tensor.dim())
        return tensor.repeat_interleave(rng.randrange(1, 3), axis)
    if kind == 8:
        shape = list(tensor.shape)
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 7, 33, 2**40])
        return tensor.new_zeros(1).expand(shape)
    if kind == 9:
        return tensor.flatten()
    if kind == 10:
        return tensor.reshape(*[1] * rng.randrange(1, 5), *tensor.shape)
    if kind == 11:
        return tensor.new_empty(0)
    if kind == 12:
        return tensor.clone().as_strided(tensor.shape, [0] * tensor.dim())
    return tensor


def odd_plan(rng: random.Random, inputs: Inputs) -> tuple[object, object]:
    md, num_splits = get_mla_metadata(inputs.cache_seqlens, 8, 1)
    plans = [
        None,
        md,
        md.clone(),
        get_mla_metadata()[0],
        FlashMLASchedMeta(True, None, md, num_splits),
    ]
    plan = rng.choice(plans)
    if rng.random() < 0.4:
        plan = odd_tensor(rng, md)
    if isinstance(plan, FlashMLASchedMeta) and rng.random() < 0.3:
        plan.tile_scheduler_metadata = odd_tensor(rng, md)
        plan.have_initialized = rng.random() < 0.5
    splits = rng.choice([None, num_splits, odd_tensor(rng, num_splits)])
    return plan, splits


def odd_scalar(rng: random.Random) -> object:
    return rng.choice(
        [None, True, False, 0, 1, -1, 0.1, 1e300, float("nan"), "x", 2**70, [], torch.zeros(1)]
    )


def bad_decode(rng: random.Random, inputs: Inputs) -> None:
    names = ["q", "k_cache", "block_table", "cache_seqlens"]
    call = dict(zip(names, inputs.args()[:4], strict=True))
    call["head_dim_v"] = 512
    call["tile_scheduler_metadata"], call["num_splits"] = odd_plan(rng, inputs)
    call["causal"] = rng.random() < 0.5
    for name in rng.sample(names, rng.choice([0, 1, 1, 1, 2])):
        call[name] = odd_tensor(rng, call[name])
    if rng.random() < 0.15:
        call["cache_seqlens"] = torch.randint(-2, 400, (3,), dtype=torch.int32)
    if rng.random() < 0.15:
        shape = inputs.block_table.shape
        call["block_table"] = torch.randint(-2, 40, shape, dtype=torch.int32)
    if rng.random() < 0.2:
        name = rng.choice(
            "head_dim_v softmax_scale causal is_fp8_kvcache indices attn_sink topk_length descale_q kv_format "
            "enable_batch_invariant use_legacy validate out lse".split()
        )
        call[name] = odd_scalar(rng)
    if rng.random() < 0.15:
        call["out"] = odd_tensor(rng, torch.zeros((3, 2, 4, 512), dtype=torch.bfloat16))
    if rng.random() < 0.15:
        call["lse"] = odd_tensor(rng, torch.zeros((3, 4, 2), dtype=torch.float32))
    if inputs.q.device.type == "cuda":
        call["validate"] = True  # on a GPU lengths and page numbers are checked on demand
    got = flash_mla_with_kvcache(**call)
    used = Inputs(*(call[name] for name in names))
    scale = 576**-0.5 if call.get("softmax_scale") is None else float(call["softmax_scale"])
    if not any(
        torch.isnan(tensor).any() for tensor in got
    ):  # unused rows may be NaN, and a table may name them now
        assert_close(got, decode(used, call["causal"], scale))


def bad_metadata(rng: random.Random, inputs: Inputs) -> None:
    args = [odd_tensor(rng, inputs.cache_seqlens), 32, 1]
    for i in (1, 2):
        if rng.random() < 0.3:
            args[i] = odd_scalar(rng)
    args += [odd_scalar(rng) for _ in range(rng.choice([0, 0, 0, 1, 2, 3, 5]))]
    md, num_splits = get_mla_metadata(*args)
    if args[0] is not None:
        assert md.shape[1] == 8 and num_splits.shape[0] == args[0].shape[0] + 1


def bad_append(rng: random.Random, inputs: Inputs) -> None:
    kv_c, k_pe = (
        torch.ones((3, 512), dtype=torch.bfloat16),
        torch.ones((3, 64), dtype=torch.bfloat16),
    )
    args = [
        kv_c,
        k_pe,
        torch.zeros((4, 64, 1, 576), dtype=torch.bfloat16),
        torch.tensor([1, -1, 200]),
    ]
    for i in rng.sample(range(4), rng.choice([1, 1, 2])):
        args[i] = odd_tensor(rng, args[i])
    if rng.random() < 0.3:
        args[3] = torch.randint(-300, 300, (3,), dtype=torch.int64)
    append_kv_cache(*args)
    rows = args[2].reshape(-1, 576)
    slots = [slot for slot in args[3].tolist() if 0 <= slot < rows.shape[0]]
    for slot in slots:
        assert (rows[slot] == 1).all()


def bad_merge(rng: random.Random, inputs: Inputs) -> None:
    outs = [torch.ones((2, 3, 4, 16), dtype=torch.bfloat16) for _ in range(rng.randrange(4))]
    lses = [torch.zeros((2, 4, 3), dtype=torch.float32) for _ in range(rng.randrange(4))]
    for tensors in (outs, lses):
        if tensors and rng.random() < 0.7:
            tensors[rng.randrange(len(tensors))] = odd_tensor(rng, tensors[0])
    out, lse = merge_states(outs, lses)
    assert out.shape == outs[0].shape and lse.shape == lses[0].shape


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fuzz(device: str, chunk: int) -> None:
    inputs = make_inputs(Case(b=3, s_q=2, s_kv=30, h_q=4), device)
    targets = [bad_decode] * 6 + [bad_metadata, bad_append, bad_merge]
    answered = 0
    for number in range(CALLS // CHUNKS):
        seed = chunk * CALLS + number
        rng = random.Random(seed)
        torch.manual_seed(seed)
        target = rng.choice(targets)
        try:
            with torch.device(device):
                target(rng, inputs)
            answered += 1
        except ERRORS as error:
            assert str(error), f"seed {seed}: {type(error).__name__} without a text"
    assert 0 < answered < CALLS // CHUNKS
    if device == "cuda":
        torch.cuda.synchronize()
