"""Adapters to other MLA decode kernels for Hopper, for timing beside ours. None is ever required.

Each peer is a library that the user brings: a path given by hand (`--peer NAME=PATH`) or in an
environment variable, or an installed package that has it. An adapter takes measure.Inputs, plans
outside of the timed call, and returns the call.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping

import torch

from flash_mla.cli.measure import D_V, Adapter, Inputs

_FLASHINFER_WORKSPACE_BYTES = 128 * 2**20


def _sgl_flash_mla(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlashMLA's Hopper kernel as the serving fork (sgl-flash-mla) ships it."""
    decode = torch.ops.flash_mla_legacy.dense_decode_fwd
    arguments = (
        inputs.q,
        inputs.kv_cache,
        D_V,
        inputs.cache_seqlens,
        inputs.block_table,
        inputs.softmax_scale,
        True,  # causal
    )
    _, _, metadata, num_splits = decode(*arguments, None, None)
    return lambda: decode(*arguments, metadata, num_splits)[0]


def _fa3_qv(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlashAttention-3 with a separate V operand ("qv"), as vLLM builds it.

    The operators take everything by position; the names stand beside the values.
    """
    ops = torch.ops._vllm_fa3_C
    b, s_q, h_q, _ = inputs.q.shape
    _, page_size, h_kv, _ = inputs.kv_cache.shape
    q_rope, q_latent, cu_seqlens_q = _split_query(inputs)
    k_cache, v_cache = inputs.kv_cache[..., D_V:], inputs.kv_cache[..., :D_V]
    max_seqlen = max(inputs.lengths)
    lengths, table = inputs.cache_seqlens, inputs.block_table
    plan = ops.get_scheduler_metadata(
        *(b, s_q, max_seqlen, h_q, h_kv, q_rope.shape[-1], D_V, inputs.q.dtype),
        *(lengths, cu_seqlens_q),
        *(None, None, None, None),  # cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k
        *(page_size, 0, True, -1, -1),  # page_size, max_seqlen_k_new, causal, window left, right
        *(False, 0, None, 0),  # softcap, num_splits (0: heuristic), pack_gqa, sm_margin
    )

    def call() -> torch.Tensor:
        out = ops.fwd(
            *(q_rope, k_cache, v_cache, None, None, q_latent, None),  # q, k, v, new k, v, q_v, out
            *(cu_seqlens_q, None, None, None, lengths),  # cu_seqlens q, k, k_new; seqused q, k
            *(s_q, max_seqlen, table, None, None),  # max_seqlen q, k, table, batch_idx, leftpad
            *(None, None, None),  # rotary cos, sin, seqlens
            *(None, None, None),  # q, k, v descale
            *(inputs.softmax_scale, True),  # softmax_scale, causal
            *(-1, -1, 0.0),  # window left, right, softcap
            *(True, plan, 0, None, 0),  # rotary_interleaved, plan, num_splits, pack_gqa, sm_margin
            *(None, 1, 0, None),  # sinks, context-parallel world size, rank, total lengths
        )[0]
        return out.view(b, s_q, h_q, D_V)

    return call


def _flashinfer_fa3(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlashInfer's paged MLA with its fa3 backend; compiles at first use."""
    import flashinfer

    b, s_q, h_q, d_qk = inputs.q.shape
    page_size = inputs.kv_cache.shape[1]
    device = inputs.q.device
    q_rope, q_latent, cu_seqlens_q = _split_query(inputs)
    pages = [-(-length // page_size) for length in inputs.lengths]
    indptr = torch.tensor([0, *pages], dtype=torch.int32, device=device).cumsum(0).int()
    indices = torch.cat([inputs.block_table[i, :count] for i, count in enumerate(pages)])
    workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.int8, device=device)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    dtypes = (inputs.q.dtype, inputs.kv_cache.dtype)
    rows = (cu_seqlens_q, indptr, indices, inputs.cache_seqlens)
    sizes = (h_q, D_V, d_qk - D_V, page_size)
    wrapper.plan(*rows, *sizes, True, inputs.softmax_scale, *dtypes)
    latent, rope = inputs.kv_cache[:, :, 0, :D_V], inputs.kv_cache[:, :, 0, D_V:]

    def call() -> torch.Tensor:
        out = wrapper.run(q_latent, q_rope, latent, rope, return_lse=False)
        return out.view(b, s_q, h_q, D_V)

    return call


def _split_query(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoPE part [b * s_q, h_q, 64], latent part [b * s_q, h_q, 512], each request's first row."""
    b, s_q, _, _ = inputs.q.shape
    rows = inputs.q.flatten(0, 1)
    starts = torch.arange(0, (b + 1) * s_q, s_q, dtype=torch.int32, device=inputs.q.device)
    return rows[..., D_V:].contiguous(), rows[..., :D_V].contiguous(), starts


@dataclasses.dataclass(frozen=True)
class Peer:
    """Where a peer may come from, and how to call it."""

    title: str
    adapter: Adapter
    environment: str = ""  # variable that may hold the library's path
    distribution: str = ""  # installed package that may hold it
    library: str = ""  # file name in that package
    module: str = ""  # for a peer that is imported, not loaded


PEERS: dict[str, Peer] = {
    "sgl_flash_mla": Peer(
        title="FlashMLA",
        adapter=_sgl_flash_mla,
        environment="FLASH_MLA_PEER_SGL",
        distribution="sgl-flash-mla",
        library="_C_legacy.abi3.so",
    ),
    "fa3_qv": Peer(
        title="FlashAttention-3 with qv",
        adapter=_fa3_qv,
        environment="FLASH_MLA_PEER_FA3",
        distribution="vllm",
        library="_vllm_fa3_C.abi3.so",
    ),
    "flashinfer_fa3": Peer(title="FlashInfer", adapter=_flashinfer_fa3, module="flashinfer"),
}


def load_peers(
    paths: Mapping[str, str] | None = None, names: Iterable[str] = tuple(PEERS)
) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Loads what is there: ({name: adapter}, {name: why it is missing}). Raises only for a name
    in `paths` that is no peer (ValueError)."""
    paths = dict(paths or {})
    for name in (*paths, *names):
        if name not in PEERS:
            raise ValueError(f"peer = {name}, wanted one of {', '.join(PEERS)}")
    adapters: dict[str, Adapter] = {}
    missing: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        if peer.module:
            if importlib.util.find_spec(peer.module):
                adapters[name] = peer.adapter
            else:
                missing[name] = f"the package {peer.module} is not installed"
            continue
        path = paths.get(name) or os.environ.get(peer.environment) or _installed_library(peer)
        if not path:
            missing[name] = f"no library: give --peer {name}=PATH or set {peer.environment}"
            continue
        try:
            torch.ops.load_library(path)
            adapters[name] = peer.adapter
        except (OSError, RuntimeError) as error:
            missing[name] = f"{path}: {str(error).splitlines()[0]}"
    return adapters, missing


def _installed_library(peer: Peer) -> str | None:
    try:
        files = importlib.metadata.distribution(peer.distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == peer.library), None)
