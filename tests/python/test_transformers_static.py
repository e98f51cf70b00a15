"""Static caches: absorbed eagerly and compiled as one graph; with padding the model's own attention."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from test_transformers_logits import assert_as_good
from tiny_models import (
    FAMILIES,
    build,
    cache_name,
    family_names,
    forward,
    in_float64,
    padded,
    text_config,
    tokens,
)
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers.static import StaticLatentLayer

pytestmark = pytest.mark.usefixtures("one_thread")

PADDING = "there is padding, or more than padding, in the mask of a static cache"


@pytest.fixture
def model():
    return build("deepseek_v3", attention="sdpa")


@torch.no_grad()
def chunks(model, ids, sizes, cache=None, step=None, **options) -> torch.Tensor:
    """Logits of the ids in chunks over a static cache; all but the first are called through `step`."""
    if cache is None:
        cache = StaticCache(config=text_config(model), max_cache_len=ids.shape[1] + 5)
    parts, start = [], 0
    for index, size in enumerate(sizes):
        call = step if step is not None and index else model
        positions = torch.arange(start, start + size, device=ids.device)[None]
        given = {"input_ids": ids[:, start : start + size], "position_ids": positions}
        parts.append(call(**given, **{cache_name(): cache}, **options).logits)
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate(attention: str, options: dict) -> None:
    model = build("deepseek_v3", attention=attention)
    ids = tokens(2, 20)

    def generate():
        torch.manual_seed(0)
        return model.generate(ids, max_new_tokens=70, cache_implementation="static", **options)

    wanted = generate()
    hf.enable(model)
    assert torch.equal(generate(), wanted)
    calls = hf.info(model).calls
    assert calls == {"absorbed": 69 * 2, "prefill": 2, "long chunk": 0, "fallback": 0}


@pytest.mark.parametrize("name", family_names())
def test_families(name: str) -> None:
    model = build(name, attention="sdpa")
    ids = tokens(2, 20)
    sizes = (12, 1, 1, 3, 3)
    wanted = chunks(model, ids, sizes)
    hf.enable(model)
    torch.testing.assert_close(chunks(model, ids, sizes), wanted, rtol=1e-4, atol=1e-4)
    calls = hf.info(model).calls
    layers = FAMILIES[name].attention_layers
    assert calls == {"absorbed": 4 * layers, "prefill": layers, "long chunk": 0, "fallback": 0}


def test_logits(device: str) -> None:
    """In bf16, on a GPU too, within the derived tolerance."""
    model = build("deepseek_v3", torch.bfloat16, device, attention="sdpa")
    ids = tokens(3, 90, device)
    sizes = (60, 1, 1, 8, 1, 19)
    plain = chunks(model, ids, sizes).double()
    hf.enable(model)
    got = chunks(model, ids, sizes).double()
    assert hf.info(model).calls["absorbed"] == 10
    hf.disable(model)
    exact = chunks(in_float64(model), ids, (90,)).double()
    for row in range(3):
        assert_as_good(got[row], plain[row], exact[row], torch.bfloat16)


def compiled(model, backend: str = "aot_eager"):
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def test_compiled(model) -> None:
    """One graph, without a break, replayed for every step; its calls are counted."""
    model.set_experts_implementation("batched_mm")
    ids = tokens(2, 20)
    sizes = (14, 1, 1, 1, 1, 1, 1)
    hf.enable(model)
    eager = chunks(model, ids, sizes)
    before = hf.info(model).calls["absorbed"]
    step, counter = compiled(model)
    got = chunks(model, ids, sizes, step=step)
    assert counter.frame_count == 1
    names = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("flash_mla.decode" in name for name in names) == 2
    assert hf.info(model).calls["absorbed"] == before + 6 * 2 == 24
    torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
    # Without flash_mla it is another graph, and the model's own attention.
    hf.disable(model)
    step, counter = compiled(model)
    own = chunks(model, ids, sizes, step=step)
    assert not any("flash_mla" in str(node.target) for node in counter.graphs[0].graph.nodes)
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)


def test_compiled_with_weights_that_are_not_views(model) -> None:
    model.set_experts_implementation("batched_mm")
    ids = tokens(2, 18)
    sizes = (14, 1, 1, 1, 1)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = torch.nn.Sequential(layer.self_attn.kv_b_proj)
    wanted = chunks(model, ids, sizes)
    hf.enable(model)
    step, counter = compiled(model)
    got = chunks(model, ids, sizes, step=step)
    assert counter.frame_count == 1 and hf.info(model).calls["absorbed"] == 8
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_compiled_step_writes_in_place(device: str) -> None:
    """Inductor's code for a step makes nothing as large as the pages, which plain operations write there."""
    model = build("deepseek_v3", torch.bfloat16, device, attention="sdpa")
    attention = model.model.layers[0].self_attn
    hf.enable(model)
    calls: list[tuple] = []
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    cache = StaticCache(config=text_config(model), max_cache_len=2000)
    chunks(model, tokens(2, 19, device), (18, 1), cache)
    handle.remove()
    args, kwargs = calls[1]
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(attention, fullgraph=True), *args, **kwargs)
    assert "flash_mla.decode" in code and "append_kv_cache" not in code
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", code)
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
    assert len(sizes) > 3 and max(sizes) < cache.layers[0].pages.numel() / 4


@pytest.mark.cuda
def test_generate_compiles_on_a_gpu() -> None:
    """As generate() does by itself there, with CUDA graphs: the logits that it saw, within the tolerance."""
    model = build("deepseek_v3", torch.bfloat16, "cuda", attention="sdpa")
    model.set_experts_implementation("batched_mm")
    ids = tokens(2, 20, "cuda")
    hf.enable(model)
    options = {"do_sample": False, "max_new_tokens": 40, "cache_implementation": "static"}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    first = model.generate(ids, **options)
    again = model.generate(ids, **options)
    assert torch.equal(first.sequences, again.sequences)
    assert hf.info(model).calls["absorbed"] == 2 * 39 * 2
    hf.disable(model)
    got = torch.stack(again.logits, dim=1).double()
    whole = (again.sequences.shape[1],)
    plain = chunks(model, again.sequences, whole)[:, 19:-1].double()
    model.set_experts_implementation("eager")
    exact = chunks(in_float64(model), again.sequences, whole)[:, 19:-1]
    for row in range(2):
        assert_as_good(got[row], plain[row], exact[row], torch.bfloat16)


def told_of(caught) -> list[str]:
    return [str(one.message) for one in caught if "flash_mla" in str(one.message)]


def expect_fallback(model, reason: str, run, **counts: int) -> None:
    wanted = run()
    hf.enable(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = run()
    assert told_of(caught) == [f"flash_mla: the model's own attention runs: {reason}"]
    assert set(hf.info(model).fallbacks) == {reason}
    for kind, count in counts.items():
        assert hf.info(model).calls[kind] == count
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_padding(model) -> None:
    ids, mask = padded(tokens(2, 20), (0, 5))

    def run():
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=12, cache_implementation="static"
        )  # fmt: skip

    expect_fallback(model, PADDING, run, absorbed=0, fallback=24)


def test_padding_that_comes_later(model) -> None:
    """Tokens keep their places, so that this step falls back alone."""
    ids = tokens(2, 20)
    hidden = torch.ones(2, 14, dtype=torch.long)
    hidden[1, 3] = 0

    @torch.no_grad()
    def run():
        cache = StaticCache(config=model.config, max_cache_len=30)
        parts = [forward(model, ids[:, :12], cache).logits]
        for at in range(12, 16):
            mask = hidden if at == 13 else None
            positions = torch.tensor([[at]])
            given = ids[:, at : at + 1]
            parts.append(forward(model, given, cache, mask, position_ids=positions).logits)
        return torch.cat(parts, 1)

    expect_fallback(model, PADDING, run, absorbed=6, fallback=2)


def test_output_attentions() -> None:
    model = build("deepseek_v3", attention="eager")
    ids = tokens(2, 14)

    @torch.no_grad()
    def run():
        cache = StaticCache(config=model.config, max_cache_len=30)
        forward(model, ids[:, :12], cache)
        forward(model, ids[:, 12:13], cache)
        return forward(model, ids[:, 13:], cache, output_attentions=True).attentions[1]

    expect_fallback(model, "output_attentions is set", run, absorbed=2, fallback=2)


def test_a_cache_that_was_filled_before(model) -> None:
    ids = tokens(2, 14)

    def run():
        hf_on = bool(hf.info(model).taken)
        cache = StaticCache(config=model.config, max_cache_len=20)
        hf.disable(model)
        first = chunks(model, ids[:, :12], (12,), cache)
        if hf_on:
            hf.enable(model)
        with torch.no_grad():
            at = torch.tensor([[12]])
            second = forward(model, ids[:, 12:13], cache, position_ids=at).logits
        assert all(type(layer) is StaticLayer for layer in cache.layers)
        return torch.cat((first, second), 1)

    expect_fallback(model, "the static cache was filled before", run, absorbed=0, fallback=2)


def test_a_projection_that_is_not_linear(model) -> None:
    class Curved(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return torch.tanh(self.base(x))

    attention = model.model.layers[1].self_attn
    ids = tokens(2, 14)
    hf.enable(model)  # taken before it bends
    controller = attention._flash_mla.controller
    attention.kv_b_proj = Curved(attention.kv_b_proj)
    with pytest.warns(UserWarning) as caught:
        got = chunks(model, ids, (12, 1, 1))
    reason = "kv_b_proj is not linear"
    assert told_of(caught) == [f"flash_mla: the model's own attention runs: {reason}"]
    assert controller.counts["absorbed"] == 0 and set(controller.reasons) == {reason}
    hf.disable(model)
    assert torch.equal(got, chunks(model, ids, (12, 1, 1)))


def test_long_chunk(model) -> None:
    ids = tokens(2, 30)
    sizes = (10, 1, 9, 1, 9)
    wanted = chunks(model, ids, sizes)
    hf.enable(model, max_s_q=4)
    torch.testing.assert_close(chunks(model, ids, sizes), wanted, rtol=1e-4, atol=1e-4)
    calls = hf.info(model).calls
    assert calls == {"absorbed": 4, "prefill": 2, "long chunk": 4, "fallback": 0}


def test_training_and_gradients(model) -> None:
    ids = tokens(1, 12)
    hf.enable(model)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.warns(UserWarning, match="gradients are wanted"):
        forward(model, ids, cache)
    assert all(type(layer) is StaticLayer for layer in cache.layers)
    model.train()
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad(), pytest.warns(UserWarning, match="in training mode"):
        forward(model, ids, cache)
    assert all(type(layer) is StaticLayer for layer in cache.layers)


def test_reorder_reset_and_copy(model) -> None:
    """Keys and values stay views of the pages."""
    ids = tokens(3, 14)
    hf.enable(model)
    cache = StaticCache(config=model.config, max_cache_len=100)
    chunks(model, ids, (12, 1, 1), cache)
    layer = cache.layers[0]
    assert type(layer) is StaticLatentLayer and layer.pages.shape == (6, 64, 1, 576)
    assert (layer.keys.shape, layer.values.shape) == ((3, 1, 100, 512), (3, 1, 100, 64))
    before = layer.keys.clone()
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, before[[2, 0, 0]])
    assert torch.equal(other.layers[0].keys, before)
    other.layers[0].pages.zero_()
    assert not other.layers[0].keys.any() and layer.keys.any()
    cache.reset()
    assert not layer.pages.any() and int(cache.get_seq_length()) == 0
