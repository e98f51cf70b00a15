"""enable, disable, info: what they take, leave, count and put back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import build, forward, tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers import structure
from flash_mla.integrations.transformers.attention import NAME
from flash_mla.integrations.transformers.cache import LatentLayer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return build("deepseek_v3")


def decode(model, ids, cache=None, steps: int = 4) -> torch.Tensor:
    cache = DynamicCache() if cache is None else cache
    prompt = ids.shape[1] - steps
    with torch.no_grad():
        parts = [forward(model, ids[:, :prompt], cache).logits]
        for at in range(prompt, ids.shape[1]):
            parts.append(forward(model, ids[:, at : at + 1], cache).logits)
    return torch.cat(parts, 1)


def state(model) -> dict:
    """Everything that is hung on the model's modules."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
    return found


def test_report(model) -> None:
    report = hf.enable(model)
    names = tuple(f"model.layers.{i}.self_attn" for i in range(2))
    assert report == hf.Report(
        names, {}, 128, {"absorbed": 0, "prefill": 0, "long chunk": 0, "fallback": 0}, {}
    )
    assert str(report) == "2 attention layers run absorbed, 0 do not"
    decode(model, tokens(2, 12))
    assert hf.info(model).calls == {"absorbed": 8, "prefill": 2, "long chunk": 0, "fallback": 0}
    assert "absorbed: 8 calls" in str(hf.info(model))


def test_some_layers_are_left(model) -> None:
    """They run as before, beside the others, with the mask that they need."""
    ids = tokens(2, 14)
    wanted = decode(model, ids)
    model.model.layers[0].self_attn.sliding_window = 4096
    report = hf.enable(model)
    assert report.taken == ("model.layers.1.self_attn",)
    assert report.left == {"model.layers.0.self_attn": "its attention has a sliding window"}
    cache = DynamicCache()
    got = decode(model, ids, cache)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, LatentLayer]
    assert hf.info(model).calls["absorbed"] == 4


def test_disable_restores_everything(model) -> None:
    ids = tokens(2, 14)
    before, wanted = state(model), decode(model, ids)
    hf.enable(model)
    decode(model, ids)
    assert state(model) != before
    hf.disable(model)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] or after[key] == before[key] for key in before)
    assert torch.equal(decode(model, ids), wanted)
    hf.disable(model)  # nothing to do
    assert hf.info(model).taken == () and hf.info(model).calls == {}


def test_enable_twice(model) -> None:
    """Settings are the last ones, counts start anew, and one disable is enough."""
    ids = tokens(2, 14)
    before = state(model)
    hf.enable(model)
    decode(model, ids)
    report = hf.enable(model, max_s_q=2)
    assert report.max_s_q == 2 and report.calls["prefill"] == 0
    cache = DynamicCache()
    with torch.no_grad():
        for start, stop in ((0, 9), (9, 11), (11, 14)):
            forward(model, ids[:, start:stop], cache)
    assert hf.info(model).calls == {"absorbed": 2, "prefill": 2, "long chunk": 2, "fallback": 0}
    hf.disable(model)
    assert state(model).keys() == before.keys()


def test_the_model_around_it_may_be_asked(model) -> None:
    """enable on the model, disable and info on a part of it, or the other way round."""
    hf.enable(model.model)
    decode(model, tokens(1, 8))
    assert hf.info(model).calls["absorbed"] == 8
    hf.disable(model)
    assert hf.info(model.model).taken == ()


def test_a_layer_alone(model) -> None:
    """An attention module without its model."""
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 12, 64)
    positions = model.model.rotary_emb(hidden, torch.arange(12)[None])

    @torch.no_grad()
    def run():
        cache, parts = DynamicCache(), []
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
            at = tuple(part[:, start:stop] for part in positions)
            mask = torch.zeros(1, 1, stop - start, stop)
            mask[0, 0] = torch.full((stop - start, stop), float("-inf")).triu(start + 1)
            parts.append(attention(hidden[:, start:stop], at, mask, cache)[0])
        return torch.cat(parts, 1)

    wanted = run()
    report = hf.enable(attention)
    assert report.taken == ("",)
    torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4)
    assert hf.info(attention).calls == {
        "absorbed": 3, "prefill": 1, "long chunk": 0, "fallback": 0
    }  # fmt: skip
    hf.disable(attention)
    assert torch.equal(run(), wanted)


def test_a_copy_of_an_enabled_model(model) -> None:
    """It is enabled too, on its own modules and counts."""
    ids = tokens(2, 14)
    wanted = decode(model, ids)
    hf.enable(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.kv_b_proj.weight.mul_(-1)
    torch.testing.assert_close(decode(model, ids), wanted, rtol=1e-4, atol=1e-4)
    assert hf.info(other).calls["absorbed"] == 0
    got = decode(other, ids)
    assert (hf.info(model).calls["absorbed"], hf.info(other).calls["absorbed"]) == (8, 8)
    hf.disable(other)
    torch.testing.assert_close(decode(other, ids), got, rtol=1e-4, atol=1e-4)
    assert not other.model._forward_pre_hooks and model.model._forward_pre_hooks
    decode(model, ids)
    assert hf.info(model).calls["absorbed"] == 16


def test_pickling_an_enabled_model_is_refused(model) -> None:
    """It would come back half enabled."""
    ids = tokens(1, 12)
    wanted = decode(model, ids)
    hf.enable(model)
    with pytest.raises(TypeError, match="cannot be pickled; disable"):
        pickle.dumps(model)
    hf.disable(model)
    assert torch.equal(decode(pickle.loads(pickle.dumps(model)), ids), wanted)


def test_weights_that_are_offloaded(model) -> None:
    """Accelerate keeps them elsewhere and brings them in for each call, through hooks."""
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(2, 14)
    wanted = decode(model, ids)
    for order in ("before", "after"):
        other = copy.deepcopy(model)
        if order == "after":
            hf.enable(other)
        accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
        assert other.model.layers[0].self_attn.kv_b_proj.weight.device.type == "meta"
        if order == "before":
            hf.enable(other)
        torch.testing.assert_close(decode(other, ids), wanted, rtol=1e-4, atol=1e-4)
        assert hf.info(other).calls["absorbed"] == 8 and not hf.info(other).fallbacks


def test_attention_implementation_may_change(model) -> None:
    """What the model's own attention is, is the config's to say, enabled or not."""
    hf.enable(model)
    attention = model.model.layers[0].self_attn
    assert attention.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert attention.config._attn_implementation == "sdpa"
    attention.config.rope_interleave = False
    assert model.config.rope_interleave is False
    hf.disable(model)
    assert attention.config is model.config


def test_state_dict_is_untouched(model, tmp_path) -> None:
    keys = model.state_dict().keys()
    hf.enable(model)
    assert model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ids = tokens(2, 12)
    hf.disable(model)
    torch.testing.assert_close(decode(loaded.eval(), ids), decode(model, ids))


def test_positional_arguments(model) -> None:
    """Of the decoder: ids, mask, positions, cache."""
    ids = tokens(2, 12)
    mask, positions = torch.ones_like(ids), torch.arange(12)[None]
    decoder = model.model

    @torch.no_grad()
    def run():
        cache = DynamicCache()
        decoder(ids[:, :11], mask[:, :11], positions[:, :11], cache)
        return decoder(ids[:, 11:], mask, positions[:, 11:], cache).last_hidden_state

    wanted = run()
    hf.enable(model)
    torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4)
    assert hf.info(model).calls["absorbed"] == 2


def test_embeddings_instead_of_ids(model) -> None:
    ids = tokens(2, 12)
    embedded = model.get_input_embeddings()(ids).detach()
    wanted = decode(model, ids)
    hf.enable(model)
    cache = DynamicCache()
    with torch.no_grad():
        name = "cache" if "cache" in structure.arguments_of(model) else "past_key_values"
        parts = [
            model(inputs_embeds=embedded[:, start:stop], **{name: cache}).logits
            for start, stop in ((0, 8), (8, 9), (9, 12))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-4)
    assert hf.info(model).calls["absorbed"] == 4


@pytest.mark.parametrize("name", ["max_s_q", "max_pages"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_wrong_settings(model, name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"enable: {name} = .*, wanted an int of 1 or more"):
        hf.enable(model, **{name: value})
    assert hf.info(model).taken == ()


def test_structure_is_what_counts(model) -> None:
    """Layers are refused for what they lack or do, whatever their name."""
    attention = model.model.layers[0].self_attn
    kind = type(attention)

    def refused(**changes) -> str:
        changed = copy.copy(attention)
        changed.__dict__ = {**attention.__dict__, **changes}
        return structure.obstacle(changed)

    assert structure.obstacle(attention) == ""
    assert refused(kv_lora_rank=256) == "kv_lora_rank is 256, wanted 512"
    assert refused(qk_nope_head_dim=None) == "qk_nope_head_dim is None, wanted an int"
    assert refused(scaling=torch.ones(())) == "it has no config or no scaling"
    assert refused(is_causal=False) == "its attention is not causal"
    assert refused(v_head_dim=20).startswith("its expand_kv")

    class Swapped(kind):
        def expand_kv(self, kv_nope, k_rot):
            keys, values = super().expand_kv(kv_nope, k_rot)
            return torch.cat((keys[..., -64:], keys[..., :-64]), -1), values

    class Scaled(kind):
        def expand_kv(self, kv_nope, k_rot):
            keys, values = super().expand_kv(kv_nope, k_rot)
            return keys, values * 2

    class Old(kind):
        expand_kv = None

    for other, reason in (
        (Swapped, "its expand_kv is not the known one"),
        (Scaled, "its expand_kv is not the known one"),
        (Old, "it has no expand_kv: it does not cache latents"),
    ):
        attention.__class__ = other
        assert structure.obstacle(attention) == reason
        attention.__class__ = kind


def test_registered_under_a_name_that_gets_a_mask(model) -> None:
    """An attention function without a mask function gets no mask, and padding would be seen."""
    hf.enable(model)
    assert NAME in transformers.AttentionInterface._global_mapping
    assert NAME in transformers.masking_utils.AttentionMaskInterface._global_mapping
    assert "flash" not in NAME


@pytest.mark.parametrize(
    "stub, found",
    [
        ("__version__ = '5.14.1'\nAttentionInterface = None\n", "found 5.14.1"),
        ("__version__ = '4.40.0'\n", "pip install 'transformers>=5.15'"),
        ("raise ImportError\n", "pip install 'transformers>=5.15'"),
    ],
)
def test_old_or_missing_transformers(tmp_path, stub: str, found: str) -> None:
    (tmp_path / "transformers.py").write_text(stub)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "import flash_mla.integrations.transformers"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("ImportError: flash_mla.integrations.transformers needs") and found in last
    )


def test_flash_mla_alone_does_not_import_transformers() -> None:
    code = "import flash_mla, sys; sys.exit('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
