"""The peers' adapters against stand-ins that take what the real libraries take, on the CPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from flash_mla.cli import measure, peers

INPUTS = measure.make_inputs(measure.Case("x", b=3, s_q=2, h_q=4, s_kv=100, varlen=True), "cpu")
D_V = measure.D_V


def expected(inputs):
    requests = range(len(inputs.lengths))
    return torch.stack([measure.reference_request(inputs, i) for i in requests])


def test_sgl_flash_mla(monkeypatch):
    def dense_decode_fwd(q, cache, d_v, lengths, table, scale, causal, metadata, num_splits):
        assert d_v == D_V and causal
        assert (metadata is None) == (num_splits is None)
        inputs = measure.Inputs(q, cache, table, lengths, lengths.tolist(), scale)
        return expected(inputs), "lse", "metadata", "num_splits"

    legacy = SimpleNamespace(dense_decode_fwd=dense_decode_fwd)
    monkeypatch.setattr(torch.ops, "flash_mla_legacy", legacy, raising=False)
    call = peers.PEERS["sgl_flash_mla"].adapter(INPUTS)
    torch.testing.assert_close(call(), expected(INPUTS))


def test_fa3_qv(monkeypatch):
    def get_scheduler_metadata(*arguments):
        assert arguments[:8] == (3, 2, max(INPUTS.lengths), 4, 1, 64, 512, torch.bfloat16)
        assert arguments[8] is INPUTS.cache_seqlens and arguments[9].tolist() == [0, 2, 4, 6]
        assert arguments[10:] == (None,) * 4 + (64, 0, True, -1, -1, False, 0, None, 0)
        return "plan"

    def fwd(*arguments):
        assert len(arguments) == 37
        q_rope, k, v, _, _, q_latent = arguments[:6]
        lengths, (s_q, max_seqlen, table) = arguments[11], arguments[12:15]
        assert (s_q, max_seqlen) == (2, max(INPUTS.lengths))
        assert arguments[23:29] == (INPUTS.softmax_scale, True, -1, -1, 0.0, True)
        assert arguments[29:] == ("plan", 0, None, 0, None, 1, 0, None)
        q = torch.cat((q_latent, q_rope), -1).view_as(INPUTS.q)
        cache = torch.cat((v, k), -1)
        inputs = measure.Inputs(q, cache, table, lengths, lengths.tolist(), arguments[23])
        return [expected(inputs).flatten(0, 1)]

    fa3 = SimpleNamespace(get_scheduler_metadata=get_scheduler_metadata, fwd=fwd)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", fa3, raising=False)
    call = peers.PEERS["fa3_qv"].adapter(INPUTS)
    torch.testing.assert_close(call(), expected(INPUTS))


def test_flashinfer(monkeypatch):
    class Wrapper:
        def __init__(self, workspace, backend):
            assert workspace.dtype == torch.int8 and backend == "fa3"

        def plan(self, starts, indptr, indices, lengths, heads, d_v, d_rope, page_size, causal, *_):
            assert starts.tolist() == [0, 2, 4, 6] and starts.dtype == indptr.dtype == torch.int32
            assert (heads, d_v, d_rope, page_size, causal) == (4, 512, 64, 64, True)
            for i, length in enumerate(lengths.tolist()):
                pages = indices[indptr[i] : indptr[i + 1]]
                assert pages.tolist() == INPUTS.block_table[i, : -(-length // 64)].tolist()

        def run(self, q_latent, q_rope, latent, rope, return_lse):
            assert latent.shape == (*INPUTS.kv_cache.shape[:2], 512) and not return_lse
            assert torch.equal(torch.cat((q_latent, q_rope), -1).view_as(INPUTS.q), INPUTS.q)
            return expected(INPUTS).flatten(0, 1)

    mla = SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(mla=mla))
    call = peers.PEERS["flashinfer_fa3"].adapter(INPUTS)
    torch.testing.assert_close(call(), expected(INPUTS))


def test_missing_peers_say_why(monkeypatch, tmp_path):
    for peer in peers.PEERS.values():
        if peer.environment:
            monkeypatch.delenv(peer.environment, raising=False)
    no_library = tmp_path / "peer.so"
    no_library.write_text("not a library")
    adapters, missing = peers.load_peers({"fa3_qv": str(no_library)})
    assert set(adapters) | set(missing) == set(peers.PEERS)
    assert str(no_library) in missing["fa3_qv"]
    if "sgl_flash_mla" in missing:
        assert "FLASH_MLA_PEER_SGL" in missing["sgl_flash_mla"]
    with pytest.raises(ValueError, match="peer = other, wanted one of sgl_flash_mla"):
        peers.load_peers({"other": "x.so"})
