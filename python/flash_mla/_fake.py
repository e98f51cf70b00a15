"""Shapes and dtypes of the operators' results, so that torch.compile and torch.export trace through them."""

from __future__ import annotations

import torch

from ._library import plan_size

_D_V = 512
_PLAN_COLUMNS = 8


@torch.library.register_fake("flash_mla::decode")
def _decode(
    q,
    kv_cache,
    block_table,
    cache_seqlens,
    softmax_scale,
    causal,
    metadata,
    num_splits,
    batch_invariant,
    validate,
):
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, _D_V)), q.new_empty((b, h_q, s_q), dtype=torch.float32)


@torch.library.register_fake("flash_mla::decode_out")
def _decode_out(
    q,
    kv_cache,
    block_table,
    cache_seqlens,
    softmax_scale,
    causal,
    metadata,
    num_splits,
    batch_invariant,
    validate,
    out,
    lse,
):
    return None


@torch.library.register_fake("flash_mla::plan")
def _plan(cache_seqlens, s_q, h_q, h_kv, page_size):
    rows = plan_size(cache_seqlens.device, int(s_q), int(h_q), int(h_kv), int(page_size))
    return (
        cache_seqlens.new_empty((rows, _PLAN_COLUMNS), dtype=torch.int32),
        cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,), dtype=torch.int32),
    )


@torch.library.register_fake("flash_mla::append_kv_cache")
def _append_kv_cache(kv_c, k_pe, kv_cache, slot_mapping):
    return None


@torch.library.register_fake("flash_mla::merge_states")
def _merge_states(outs, lses, fp32_out):
    b, s_q, h_q, d = outs[0].shape
    dtype = torch.float32 if fp32_out else outs[0].dtype
    return outs[0].new_empty((b, s_q, h_q, d), dtype=dtype), outs[0].new_empty(
        (b, h_q, s_q), dtype=torch.float32
    )
