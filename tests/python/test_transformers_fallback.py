"""What runs the model's own attention: the same results, one warning, and the counts say so."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from test_transformers_logits import assert_as_good
from tiny_models import build, cache_name, forward, padded, tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers import masks
from flash_mla.integrations.transformers.cache import LatentLayer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return build("deepseek_v3")


def chunks(model, ids, masks, sizes, cache=None, **options) -> torch.Tensor:
    """Logits of the ids in chunks; masks[i], if any, is the mask of chunk i."""
    cache = DynamicCache() if cache is None else cache
    parts, start = [], 0
    for index, size in enumerate(sizes):
        mask = masks[index] if masks else None
        part = forward(model, ids[:, start : start + size], cache, mask, **options)
        parts.append(part.logits)
        start += size
    return torch.cat(parts, 1)


def expect(model, reason: str, run, absorbed: int = 0, fallback: int | None = None):
    """run(model) without and with flash_mla: bitwise the same when nothing is absorbed, one warning, and as
    many calls as told fall back."""
    wanted = run(model)
    hf.enable(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = run(model)
    told = [str(warning.message) for warning in caught if "flash_mla" in str(warning.message)]
    assert told == [f"flash_mla: the model's own attention runs: {reason}"]
    info = hf.info(model)
    assert set(info.fallbacks) == {reason}
    assert info.calls["fallback"] == info.fallbacks[reason] > 0
    assert info.calls["absorbed"] == absorbed
    if fallback is not None:
        assert info.calls["fallback"] == fallback
    if absorbed:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, wanted)
    assert reason in str(info)


def test_output_attentions(model) -> None:
    ids = tokens(2, 12)

    @torch.no_grad()
    def run(model):
        cache = DynamicCache()
        forward(model, ids[:, :10], cache)
        weights = []
        for start in (10, 11):
            output = forward(model, ids[:, start : start + 1], cache, output_attentions=True)
            weights.append(output.attentions[1].sum(-1))
        return torch.stack(weights)

    expect(model, "output_attentions is set", run, fallback=4)


def test_output_attentions_between_absorbed_steps(model) -> None:
    """The step that wants them gathers the latents; pages go on after it."""
    ids, mask = padded(tokens(2, 14), (0, 5))

    @torch.no_grad()
    def run(model):
        cache = DynamicCache()
        forward(model, ids[:, :10], cache, mask[:, :10])
        logits = []
        for at in range(10, 14):
            wanted = {"output_attentions": True} if at == 12 else {}
            output = forward(model, ids[:, at : at + 1], cache, mask[:, : at + 1], **wanted)
            logits.append(output.logits)
        return torch.stack(logits)

    expect(model, "output_attentions is set", run, absorbed=6, fallback=2)


def test_training(model) -> None:
    """Gradients are those of the model itself."""
    ids = tokens(2, 12)

    def run(model):
        model.train()
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        model.eval()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expect(model, "the model is in training mode", run, fallback=2)


def test_wanted_gradients(model) -> None:
    """They flow through the cache, which stays as Transformers made it."""
    ids = tokens(2, 12)

    def run(model):
        model.zero_grad()
        cache = DynamicCache()
        logits = chunks(model, ids, None, (9, 1, 1, 1), cache)
        assert all(type(layer) is DynamicLayer for layer in cache.layers)
        logits.square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expect(model, "gradients are wanted (it is not under torch.no_grad())", run, fallback=6)


def test_gradients_of_embeddings_through_frozen_layers(model) -> None:
    """As prompt tuning wants them."""
    ids = tokens(2, 12)

    def run(model):
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()(ids[:, 10:]).requires_grad_()
        cache = DynamicCache()
        forward(model, ids[:, :10], cache)
        model(inputs_embeds=embeddings, **{cache_name(): cache}).logits.square().mean().backward()
        return embeddings.grad

    expect(model, "gradients are wanted (it is not under torch.no_grad())", run, fallback=2)


def test_gradients_are_wanted_of_pages(model) -> None:
    """A cache in pages turns back, as nothing of it is lost; one whose padding was dropped cannot."""
    ids, mask = padded(tokens(2, 14), (0, 5))

    def run(model):
        cache = DynamicCache()
        with torch.no_grad():
            chunks(model, ids[:, :10], None, (8, 1, 1), cache)
        logits = chunks(model, ids[:, 10:], None, (1, 1, 2), cache)
        assert logits.requires_grad
        return logits.detach()

    expect(
        model,
        "gradients are wanted (it is not under torch.no_grad())",
        run,
        absorbed=4,
        fallback=6,
    )
    cache = DynamicCache()
    with torch.no_grad():
        chunks(model, ids[:, :11], [mask[:, :10], mask[:, :11]], (10, 1), cache)
    with pytest.raises(
        RuntimeError, match="gradients are wanted of a cache whose padding was not kept"
    ):
        forward(model, ids[:, 11:12], cache, mask[:, :12])
    model.requires_grad_(False)  # a frozen model wants none
    forward(model, ids[:, 11:12], cache, mask[:, :12])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_custom_mask(attention: str) -> None:
    """A mask with four axes that hides keys by query; before, between and after absorbed steps."""
    model = build("deepseek_v3", attention=attention)
    ids = tokens(2, 24)
    custom = torch.ones(2, 1, 5, 20, dtype=torch.bool).tril(15)
    custom[:, :, 2:, 3] = False
    if attention == "eager":
        custom = torch.where(custom, 0.0, torch.finfo(torch.float32).min)

    @torch.no_grad()
    def run(model):
        return chunks(model, ids, [None, None, custom, None, None], (14, 1, 5, 1, 3))

    expect(
        model,
        "the attention mask is more than causal with padding",
        run,
        absorbed=6,
        fallback=2,
    )


def test_bias_as_a_mask(model) -> None:
    ids = tokens(1, 11)
    bias = torch.linspace(-1, 0, 11).view(1, 1, 1, 11)

    @torch.no_grad()
    def run(model):
        return chunks(model, ids, [None, bias], (10, 1))

    expect(model, "the attention mask is more than causal with padding", run, fallback=2)


def test_custom_mask_that_wants_padding(model) -> None:
    ids, mask = padded(tokens(2, 13), (0, 5))
    hf.enable(model)
    cache = DynamicCache()
    with torch.no_grad():
        chunks(model, ids[:, :11], [mask[:, :10], mask[:, :11]], (10, 1), cache)
        everything = torch.ones(2, 1, 2, 13, dtype=torch.bool)
        with pytest.raises(ValueError, match="asks for tokens that an earlier one called padding"):
            forward(model, ids[:, 11:], cache, everything)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ready_masks_run_absorbed(attention: str) -> None:
    """Four axes, but no more than causal with padding: additive for eager attention, bool for the other."""
    model = build("deepseek_v3", attention=attention)
    ids, mask = padded(tokens(2, 16), (0, 5))
    ready = []
    for start, stop in ((0, 10), (10, 11), (11, 16)):
        causal = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
        ready.append(causal[None, None] & mask[:, None, None, :stop].bool())
    if attention == "eager":
        ready = [torch.where(one, 0.0, torch.finfo(torch.float32).min) for one in ready]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def run(model):
        cache, parts, start = DynamicCache(), [], 0
        for one in ready:
            stop = one.shape[-1]
            at = positions[:, start:stop]
            parts.append(forward(model, ids[:, start:stop], cache, one, position_ids=at).logits)
            start = stop
        return torch.cat(parts, 1)

    wanted = run(model)
    hf.enable(model)
    got = run(model)
    assert hf.info(model).calls["absorbed"] == 4
    real = mask.bool()
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-4)


def test_padding_of_ready_masks() -> None:
    """What counts as causal with padding."""
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 1]], dtype=torch.bool)
    good = torch.ones(2, 5, dtype=torch.bool).tril(3)[None, None] & padding[:, None, None]
    assert torch.equal(masks.padding_of(good, 2, 2, 3), padding)
    assert torch.equal(masks.padding_of(good[:1], 2, 2, 3), padding[:1].expand(2, -1))
    wider = torch.nn.functional.pad(good, (0, 3))
    assert torch.equal(masks.padding_of(wider, 2, 2, 3), padding)
    assert masks.padding_of(~torch.nn.functional.pad(~good, (0, 1)), 2, 2, 3) is None
    assert masks.padding_of(good, 2, 2, 4) is None
    assert masks.padding_of(good, 2, 1, 3) is None
    assert masks.padding_of(good.expand(-1, 4, -1, -1), 2, 2, 3) is None
    for hidden in ((0, 0, 0, 1), (1, 0, 1, 2)):
        other = good.clone()
        other[hidden] = False
        assert masks.padding_of(other, 2, 2, 3) is None
    assert masks.visible_of({"full_attention": good}) is good
    assert masks.visible_of({"linear_attention": good}) is None
    assert masks.visible_of(good.long()) is None and masks.visible_of(padding) is None
    additive = torch.where(good, 0.0, float("-inf"))
    assert torch.equal(masks.visible_of(additive), good)
    additive[0, 0, 0, 0] = 0.5
    assert masks.visible_of(additive) is None


def test_short_mask(model) -> None:
    """Narrower than what is cached: Transformers hides what it does not cover."""
    ids = tokens(2, 14)
    masks = [None, None, torch.ones(2, 11, dtype=torch.long), None]

    @torch.no_grad()
    def run(model):
        cache = DynamicCache()
        parts, start = [], 0
        for mask, size in zip(masks, (10, 1, 2, 1), strict=True):
            positions = torch.arange(start, start + size)[None]
            given = ids[:, start : start + size]
            parts.append(forward(model, given, cache, mask, position_ids=positions).logits)
            start += size
        return torch.cat(parts, 1)

    expect(
        model,
        "the attention_mask is shorter than what is cached",
        run,
        absorbed=4,
        fallback=2,
    )


@pytest.mark.cuda
def test_offloaded_cache() -> None:
    model = build("deepseek_v3", torch.bfloat16, "cuda")
    ids = tokens(2, 10, "cuda")

    def run(model):
        options = {"do_sample": False, "max_new_tokens": 12}
        return model.generate(ids, cache_implementation="offloaded", **options)

    expect(model, "the cache is offloaded", run)


def test_other_caches(model) -> None:
    class Shifted(DynamicCache):
        def get_mask_sizes(self, query_length, layer_idx):
            return super().get_mask_sizes(query_length, layer_idx)

    ids = tokens(2, 12)

    @torch.no_grad()
    def run(model):
        return chunks(model, ids, None, (10, 1, 1), Shifted(config=model.config))

    expect(model, "the cache is a Shifted", run, fallback=6)


@pytest.mark.cuda
def test_float32_on_a_gpu() -> None:
    model = build("deepseek_v3", torch.float32, "cuda")
    ids = tokens(2, 12, "cuda")

    @torch.no_grad()
    def run(model):
        return chunks(model, ids, None, (10, 1, 1))

    expect(model, "the latents are float32 on cuda:0, wanted bfloat16, float16", run, fallback=4)


LEFT = {
    "minicpm3": (
        "MiniCPM3Config",
        "MiniCPM3ForCausalLM",
        {"kv_lora_rank": 256, "qk_rope_head_dim": 32},
        "kv_lora_rank is 256, wanted 512",
    ),
    "small rope": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {"qk_rope_head_dim": 32},
        "qk_rope_head_dim is 32, wanted 64",
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 128},
        "its attention is sparse (it has an indexer)",
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, None),
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_are_left(name: str) -> None:
    """Nothing to take: a warning with the reason, and the model works as before."""
    config_name, model_name, settings, reason = LEFT[name]
    shared = {
        "vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    latent = {
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "q_lora_rank": 32, "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    if reason:
        shared |= latent
    config = getattr(transformers, config_name)(**{**shared, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    ids = tokens(1, 12)
    wanted = model.generate(ids, do_sample=False, max_new_tokens=5)
    expected = reason or "it has no layer of multi-head latent attention"
    with pytest.warns(UserWarning) as caught:
        report = hf.enable(model)
    assert [str(one.message) for one in caught] == [f"flash_mla: nothing was enabled: {expected}"]
    assert report.taken == () and len(report.left) == (2 if reason else 0)
    assert set(report.left.values()) <= {reason}
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=5), wanted)
    assert hf.info(model) == hf.Report((), report.left, 0, {}, {})


def test_compiled_by_the_caller(model) -> None:
    """A compiled forward is the model's own: traced without flash_mla, the same with a cache in pages."""
    ids = tokens(2, 14)
    cache = DynamicCache()
    with torch.no_grad():
        wanted = chunks(model, ids, None, (10, 1, 1, 1, 1))
        hf.enable(model)
        got = [chunks(model, ids[:, :12], None, (10, 1, 1), cache)]
        assert all(type(layer) is LatentLayer for layer in cache.layers)
        before = hf.info(model).calls["absorbed"]
        compiled = torch.compile(model, backend="eager")
        for at in (12, 13):
            got.append(forward(compiled, ids[:, at : at + 1], cache).logits)
    assert hf.info(model).calls["absorbed"] == before == 4
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-4, atol=1e-4)


def test_bf16_after_a_fallback(device: str) -> None:
    """The tolerance holds for a run that mixes absorbed steps and gathered ones."""
    model = build("deepseek_v3", torch.bfloat16, device)
    ids = tokens(2, 20, device)

    @torch.no_grad()
    def run(model):
        cache, parts = DynamicCache(), []
        for start, stop in ((0, 10), (10, 11), (11, 14), (14, 15), (15, 20)):
            wanted = {"output_attentions": True} if start == 11 else {}
            parts.append(forward(model, ids[:, start:stop], cache, **wanted).logits)
        return torch.cat(parts, 1).double()

    plain = run(model)
    hf.enable(model)
    with pytest.warns(UserWarning, match="output_attentions is set"):
        got = run(model)
    assert hf.info(model).calls == {"absorbed": 6, "prefill": 2, "long chunk": 0, "fallback": 2}
    hf.disable(model)
    exact = run(model.double())
    for row in range(2):
        assert_as_good(got[row], plain[row], exact[row], torch.bfloat16)
