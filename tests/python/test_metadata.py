"""Metadata in every form that callers use: two tensors, an object, a tensor used like the object."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from reference import Case, assert_close, decode, make_inputs

from flash_mla import (
    FlashMLASchedMeta,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
)

CASE = Case(b=5, s_q=2, s_kv=600, zero_rows=True)


def num_sm_parts(device: str) -> int:
    return get_mla_metadata(torch.ones(1, dtype=torch.int32, device=device), 32, 1)[0].shape[0]


def test_2025_shapes(device: str) -> None:
    parts = num_sm_parts(device)
    sms = 1 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    assert 1 <= parts <= sms
    for b, s_kv in ((0, 1), (1, 5), (17, 900), (300, 3)):
        lengths = torch.full((b,), s_kv, dtype=torch.int32, device=device)
        md, num_splits = get_mla_metadata(lengths, 32, 1)
        assert md.shape == (parts, 8) and num_splits.shape == (b + 1,)
        assert md.dtype == num_splits.dtype == torch.int32
        assert md.device == num_splits.device == lengths.device
        assert num_splits[0] == 0 and bool((num_splits.diff() >= 1).all())


def test_2025_call_forms_agree(device: str) -> None:
    lengths = make_inputs(CASE, device).cache_seqlens
    forms = [
        get_mla_metadata(lengths, 32, 1),
        get_mla_metadata(lengths, num_heads_per_head_k=32, num_heads_k=1),
        get_mla_metadata(cache_seqlens=lengths, num_q_tokens_per_head_k=32, num_heads_k=1),
        get_mla_metadata(lengths, 32, 1, None, False, None),
        get_mla_metadata(lengths, 32, 1, num_heads_q=16, is_fp8_kvcache=False, topk=None),
        get_mla_decoding_metadata(lengths, 32, 1, use_legacy=True),
    ]
    for md, num_splits in forms[1:]:
        assert torch.equal(md, forms[0][0]) and torch.equal(num_splits, forms[0][1])


def test_2025_plan_agrees_with_the_call(device: str) -> None:
    """num_sm_parts comes from s_q * h_q // h_kv alone, so a plan fits however the product is made up."""
    for s_q, h_q, h_kv in ((1, 32, 1), (2, 16, 1), (4, 8, 1), (1, 64, 2), (2, 128, 2), (128, 1, 1)):
        inputs = make_inputs(Case(b=2, s_q=s_q, h_q=h_q, h_kv=h_kv), device)
        md, num_splits = get_mla_metadata(inputs.cache_seqlens, s_q * h_q // h_kv, h_kv)
        got = flash_mla_with_kvcache(*inputs.args(), md, num_splits, causal=True)
        assert_close(got, decode(inputs, True))


@pytest.mark.parametrize("args", [(), (None,), (None, 32, 1)], ids=str)
def test_2026_object(device: str, args: tuple) -> None:
    md, nothing = get_mla_metadata(*args)
    assert nothing is None
    assert md == FlashMLASchedMeta()
    names = [field.name for field in dataclasses.fields(md)]
    assert names == ["have_initialized", "config", "tile_scheduler_metadata", "num_splits"]
    inputs = make_inputs(CASE, device)
    wanted = decode(inputs, True)
    for _ in range(3):  # layers
        assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), wanted)
        assert md.have_initialized
        assert md.config == FlashMLASchedMeta.Config(5, 2, 16, 64, 1, True, False, None, None, None)
        assert md.tile_scheduler_metadata.shape == (num_sm_parts(device), 8)
        assert md.num_splits.shape == (6,)
    assert get_mla_metadata(cache_seqlens=None, num_q_tokens_per_head_k=3)[0] == FlashMLASchedMeta()


def test_object_plan_is_the_2025_plan(device: str) -> None:
    inputs = make_inputs(CASE, device)
    md, _ = get_mla_metadata()
    flash_mla_with_kvcache(*inputs.args(), md)
    tensors = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    assert torch.equal(md.tile_scheduler_metadata, tensors[0])
    assert torch.equal(md.num_splits, tensors[1])


def test_reset_plans_anew(device: str) -> None:
    """have_initialized = False has the next call plan for what it is given then, even for another batch size."""
    md, _ = get_mla_metadata()
    flash_mla_with_kvcache(*make_inputs(CASE, device).args(), md, causal=True)
    first = md.tile_scheduler_metadata
    md.have_initialized = False
    inputs = make_inputs(Case(b=3, s_kv=100), device)
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), decode(inputs, True))
    assert md.have_initialized and md.config.b == 3
    assert md.num_splits.shape == (4,) and md.tile_scheduler_metadata is not first


def test_preset_tensors_are_kept(device: str) -> None:
    inputs = make_inputs(CASE, device)
    tensors = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    md = FlashMLASchedMeta(tile_scheduler_metadata=tensors[0], num_splits=tensors[1])
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), decode(inputs, True))
    assert md.tile_scheduler_metadata is tensors[0] and md.num_splits is tensors[1]
    assert md.have_initialized and md.config.b == 5
    md.have_initialized = False
    flash_mla_with_kvcache(*inputs.args(), md, causal=True)
    assert md.tile_scheduler_metadata is tensors[0]


def test_one_row_means_no_split(device: str) -> None:
    inputs = make_inputs(Case(b=2, s_q=2, s_kv=3000), device)
    wanted = flash_mla_with_kvcache(*inputs.args(), None, causal=True, enable_batch_invariant=True)
    row = torch.zeros((1, 8), dtype=torch.int32, device=device)
    row[0, 2:4] = torch.tensor([1, 47], dtype=torch.int32)
    num_splits = torch.zeros(3, dtype=torch.int32, device=device)
    by_object = FlashMLASchedMeta(tile_scheduler_metadata=row, num_splits=num_splits)
    by_tensor, _ = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    by_tensor.tile_scheduler_metadata, by_tensor.num_splits = row, num_splits
    for plan in ((row, num_splits), (row,), (by_object,), (by_tensor,)):
        got = flash_mla_with_kvcache(*inputs.args(), *plan, causal=True)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_tensor_carries_the_fields(device: str) -> None:
    inputs = make_inputs(CASE, device)
    md, num_splits = get_mla_metadata(inputs.cache_seqlens, 32, 1, is_fp8_kvcache=False)
    assert isinstance(md, torch.Tensor)
    assert md.have_initialized is False and md.config is None
    assert md.num_splits is num_splits
    assert torch.equal(md.tile_scheduler_metadata, md)
    wanted = decode(inputs, True)
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), wanted)
    assert md.have_initialized and md.config.b == 5
    md.have_initialized = False
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), wanted)
    assert md.have_initialized


def test_tensor_is_freed_without_the_collector() -> None:
    md, _ = get_mla_metadata(torch.ones(2, dtype=torch.int32), 16, 1)
    gone = weakref.ref(md)
    gc.disable()
    try:
        del md, _
        assert gone() is None
    finally:
        gc.enable()


def test_copies_and_slices_are_plans(device: str) -> None:
    """Static buffers made once for the largest batch; slices of them come back."""
    parts = num_sm_parts(device)
    largest = get_mla_metadata(torch.ones(64, dtype=torch.int32, device=device), 32, 1)
    buffer, splits_buffer = torch.zeros_like(largest[0]), torch.zeros_like(largest[1])
    inputs = make_inputs(CASE, device)
    md, num_splits = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    buffer[:parts].copy_(md)
    splits_buffer[:6].copy_(num_splits)
    wanted = decode(inputs, True)
    assert_close(
        flash_mla_with_kvcache(*inputs.args(), buffer, splits_buffer[:6], causal=True), wanted
    )
    assert_close(flash_mla_with_kvcache(*inputs.args(), buffer[:parts], causal=True), wanted)
    assert_close(
        flash_mla_with_kvcache(*inputs.args(), md.clone(), num_splits, causal=True), wanted
    )


@pytest.mark.parametrize("fill", ["other lengths", "zeros", "garbage"])
def test_contents_are_never_trusted(device: str, fill: str) -> None:
    inputs = make_inputs(CASE, device)
    md, num_splits = get_mla_metadata(inputs.cache_seqlens * 7 + 1000, 32, 1)
    if fill == "zeros":
        md.zero_(), num_splits.zero_()
    elif fill == "garbage":
        md.fill_(2147480000), num_splits.fill_(-5)
    wanted = decode(inputs, True)
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, num_splits, causal=True), wanted)
    holder = FlashMLASchedMeta(True, None, md, num_splits)
    assert_close(flash_mla_with_kvcache(*inputs.args(), holder, causal=True), wanted)


def test_failed_call_leaves_the_object_alone(device: str) -> None:
    md, _ = get_mla_metadata()
    inputs = make_inputs(CASE, device)
    with pytest.raises(ValueError):
        flash_mla_with_kvcache(inputs.q[0], *inputs.args()[1:], md)
    assert md == FlashMLASchedMeta()
    assert_close(flash_mla_with_kvcache(*inputs.args(), md, causal=True), decode(inputs, True))
