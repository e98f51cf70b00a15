"""W_UK and W_UV follow kv_b_proj: plain, quantised, with an adapter, moved, changed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, forward, tokens
from torch import nn
from transformers import DynamicCache

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers.weights import AbsorbedWeights, NotAbsorbable

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
H, D_NOPE, D_V = 3, 32, 48


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(512, H * (D_NOPE + D_V), bias=False).to(dtype)


class Quantised(nn.Module):
    """Int8 weights with a scale for each output, dequantised at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).to(x.dtype).T


class Adapter(nn.Module):
    """A low-rank adapter as PEFT makes them: base layer, two matrices, a switch."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(512, 4, bias=False)
        self.lora_b = nn.Linear(4, H * (D_NOPE + D_V), bias=False)
        self.scaling = {"default": 0.5}
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.active:
            y = y + self.lora_b(self.lora_a(x)) * self.scaling["default"]
        return y


class Curved(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x))


def check(weights: AbsorbedWeights, projection: nn.Module, dtype=torch.float32) -> None:
    """W_UK and W_UV do what the projection does."""
    w_uk, w_uv = weights.get(projection, dtype, CPU)
    latent = torch.randn(7, 512).to(dtype)
    wanted = projection(latent).detach().view(7, H, D_NOPE + D_V)
    keys = torch.einsum("hnc,tc->thn", w_uk.double(), latent.double())
    values = torch.einsum("hcv,tc->thv", w_uv.double(), latent.double())
    got = torch.cat((keys, values), -1)
    # 512 products, each off by a rounding of the weight or of a partial sum.
    limit = 4 * torch.finfo(dtype).eps * 512**0.5 * wanted.double().abs().max()
    assert (got - wanted.double()).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_weights_are_views(dtype: torch.dtype) -> None:
    linear, weights = plain(dtype=dtype), AbsorbedWeights(D_NOPE, D_V)
    check(weights, linear, dtype)
    w_uk, w_uv = weights.get(linear, dtype, CPU)
    memory = linear.weight.untyped_storage().data_ptr()
    assert w_uk.untyped_storage().data_ptr() == w_uv.untyped_storage().data_ptr() == memory
    assert (w_uk.shape, w_uv.shape) == ((H, D_NOPE, 512), (H, 512, D_V))
    assert not w_uk.requires_grad
    with torch.no_grad():
        linear.weight.mul_(2)
    check(weights, linear, dtype)
    linear.weight.data.add_(0.5)  # leaves no trace on the parameter
    check(weights, linear, dtype)
    assert weights.rebuilt == 1


def test_plain_weights_that_are_replaced() -> None:
    linear, weights = plain(), AbsorbedWeights(D_NOPE, D_V)
    check(weights, linear)
    linear.weight.data = torch.randn_like(linear.weight)
    check(weights, linear)
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    check(weights, linear)
    check(weights, plain(1))
    linear.to(torch.bfloat16)
    check(weights, linear, torch.bfloat16)
    assert weights.rebuilt == 5


@pytest.mark.parametrize("make", [Quantised, Adapter, lambda base: Adapter(Quantised(base))])
def test_effective_weights(make) -> None:
    projection, weights = make(plain()), AbsorbedWeights(D_NOPE, D_V)
    with torch.no_grad():
        for _ in range(3):
            check(weights, projection)
        assert weights.rebuilt == 1  # kept as long as nothing changes
        for tensor in (*projection.parameters(), *projection.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
                check(weights, projection)
        if isinstance(projection, Adapter):
            projection.active = False
            check(weights, projection)
            projection.active = True
            projection.scaling["default"] = 2.0
            check(weights, projection)
            projection.lora_b = nn.Linear(4, H * (D_NOPE + D_V), bias=False)
            check(weights, projection)
        check(weights, projection.to(torch.float32))
        rebuilt = weights.rebuilt
        check(weights, projection)
        assert weights.rebuilt == rebuilt


def test_changes_without_a_trace_are_found_at_prefill() -> None:
    projection, weights = Adapter(plain()), AbsorbedWeights(D_NOPE, D_V)
    with torch.no_grad():
        check(weights, projection)
        weights.recheck(projection)
        check(weights, projection)
        assert weights.rebuilt == 1
        projection.lora_b.weight.data.mul_(3)
        weights.recheck(projection)
        check(weights, projection)
        assert weights.rebuilt == 2


def test_hooks_count() -> None:
    """What runs round the layer is part of what it does."""
    linear, weights = plain(), AbsorbedWeights(D_NOPE, D_V)
    with torch.no_grad():
        check(weights, linear)
        handle = linear.register_forward_hook(lambda module, args, output: output * 2)
        check(weights, linear)
        handle.remove()
        check(weights, linear)
        forward = linear.forward
        linear.forward = lambda x: forward(x) * 3
        check(weights, linear)


def test_autocast() -> None:
    """The weight is float32, latents are bfloat16: it is rounded as autocast rounds it."""
    linear, weights = plain(), AbsorbedWeights(D_NOPE, D_V)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        w_uk, _ = weights.get(linear, torch.bfloat16, CPU)
    rounded = linear.weight.detach().view(H, -1, 512)[:, :D_NOPE].bfloat16()
    assert torch.equal(w_uk, rounded)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Curved(plain()), "kv_b_proj is not linear"),
        (lambda: nn.Linear(512, H * (D_NOPE + D_V)), "kv_b_proj has a bias"),
        (lambda: nn.Linear(512, 100, bias=False), "kv_b_proj gives 100 values, no multiple of 80"),
    ],
    ids=["curved", "bias", "width"],
)
def test_not_absorbable(make, reason: str) -> None:
    torch.manual_seed(0)
    projection, weights = make(), AbsorbedWeights(D_NOPE, D_V)
    if isinstance(projection, nn.Linear) and projection.bias is None:
        projection = nn.Sequential(projection)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(NotAbsorbable, match=reason):
            weights.get(projection, torch.float32, CPU)
    assert weights.rebuilt == 1  # it is not asked again as long as nothing changes


def decode(model, ids) -> torch.Tensor:
    cache = DynamicCache()
    with torch.no_grad():
        parts = [forward(model, ids[:, :10], cache).logits]
        for at in range(10, ids.shape[1]):
            parts.append(forward(model, ids[:, at : at + 1], cache).logits)
    return torch.cat(parts, 1)


@pytest.fixture
def model():
    return build("deepseek_v3", num_attention_heads=H, num_key_value_heads=H)


@pytest.mark.parametrize("make", [Quantised, Adapter], ids=["quantised", "adapter"])
def test_models_whose_projection_is_wrapped(model, make) -> None:
    """Wrapped after enable: absorbed with what it does now."""
    ids = tokens(2, 14)
    hf.enable(model)
    decode(model, ids)
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = make(attention.kv_b_proj)
    got = decode(model, ids)
    info = hf.info(model)
    assert info.calls["absorbed"] == 16 and info.calls["fallback"] == 0
    hf.disable(model)
    torch.testing.assert_close(got, decode(model, ids), rtol=1e-4, atol=1e-4)


def test_a_layer_that_cannot_be_absorbed_falls_back_alone(model) -> None:
    ids = tokens(2, 14)
    hf.enable(model)
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = Curved(attention.kv_b_proj)
    reason = "kv_b_proj is not linear"
    with pytest.warns(UserWarning) as caught:
        got = decode(model, ids)
        again = decode(model, ids)
    assert [str(one.message) for one in caught] == [
        f"flash_mla: the model's own attention runs: {reason}"
    ]
    info = hf.info(model)
    assert info.calls == {"absorbed": 8, "prefill": 4, "long chunk": 0, "fallback": 8}
    assert info.fallbacks == {reason: 8}
    hf.disable(model)
    wanted = decode(model, ids)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got, again)


def test_a_layer_that_breaks_while_its_cache_is_in_pages(model) -> None:
    """It gathers from then on; the other layers go on absorbed."""
    ids = tokens(2, 14)
    hf.enable(model)
    cache = DynamicCache()
    attention = model.model.layers[1].self_attn
    own = attention.kv_b_proj
    with torch.no_grad(), pytest.warns(UserWarning, match="not linear"):
        parts = [forward(model, ids[:, :10], cache).logits]
        for at in range(10, 14):
            attention.kv_b_proj = Curved(own) if at in (12, 13) else own
            parts.append(forward(model, ids[:, at : at + 1], cache).logits)
    assert hf.info(model).calls["absorbed"] == 6 and hf.info(model).calls["fallback"] == 2
    hf.disable(model)
    plain_cache = DynamicCache()
    with torch.no_grad():
        attention.kv_b_proj = own
        wanted = [forward(model, ids[:, :10], plain_cache).logits]
        for at in range(10, 14):
            attention.kv_b_proj = Curved(own) if at in (12, 13) else own
            wanted.append(forward(model, ids[:, at : at + 1], plain_cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)


def test_peft(model) -> None:
    """A real adapter: added, switched off, merged."""
    peft = pytest.importorskip("peft")
    ids = tokens(2, 14)
    hf.enable(model)
    config = peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False, r=4)
    adapted = peft.get_peft_model(model, config).eval()

    def compare() -> None:
        before = hf.info(model).calls["absorbed"]
        got = decode(adapted, ids)
        assert hf.info(model).calls["absorbed"] == before + 8
        hf.disable(model)
        wanted = decode(adapted, ids)
        hf.enable(model)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    with_adapter = decode(adapted, ids)
    compare()
    with adapted.disable_adapter():
        assert not torch.allclose(decode(adapted, ids), with_adapter)
        compare()
    compare()
    adapted.merge_adapter()
    compare()
    adapted.unmerge_adapter()
    compare()
