"""The norms of absorbed steps: when PyTorch's function takes them, and that it computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build, step
from torch.nn import functional
from transformers import DynamicCache

import flash_mla.integrations.transformers as hf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes that torch.nn.functional.rms_norm was called with."""
    shapes = []
    own = functional.rms_norm

    def rms_norm(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return own(x, *args, **kwargs)

    monkeypatch.setattr(functional, "rms_norm", rms_norm)
    return shapes


def norms_of(model) -> list[torch.nn.Module]:
    layers = [layer.self_attn for layer in model.model.layers]
    return [norm for layer in layers for norm in (layer.q_a_layernorm, layer.kv_a_layernorm)]


def test_absorbed_steps_alone(calls) -> None:
    model, cache = build("deepseek_v3"), DynamicCache()
    hf.enable(model)
    calls.clear()  # enable asks each norm
    step(model, cache, 7)
    assert not calls
    step(model, cache)
    assert len(calls) == len(norms_of(model)) and {shape[:2] for shape in calls} == {(2, 1)}
    step(model, cache, 130)  # a long chunk
    assert len(calls) == len(norms_of(model))
    step(copy.deepcopy(model), copy.deepcopy(cache))
    assert len(calls) == 2 * len(norms_of(model))
    hf.disable(model)
    step(model, cache)
    assert len(calls) == 2 * len(norms_of(model))
    assert all(not {"forward", "_flash_mla_layer"} & vars(norm).keys() for norm in norms_of(model))


def test_a_norm_that_does_something_else_stays(calls) -> None:
    model, cache = build("deepseek_v3"), DynamicCache()
    norm = norms_of(model)[1]

    class Shifted(type(norm)):
        def forward(self, hidden_states):
            return hidden_states + super().forward(hidden_states)

    norm.__class__ = Shifted
    hf.enable(model)
    assert "forward" not in vars(norm)
    step(model, cache, 7)
    calls.clear()
    step(model, cache)
    assert len(calls) == len(norms_of(model)) - 1


def test_another_dtype_takes_the_own_norm(calls) -> None:
    model, cache = build("deepseek_v3"), DynamicCache()
    hf.enable(model)
    step(model, cache, 7)
    calls.clear()
    with torch.no_grad():
        norms_of(model)[0](
            torch.zeros(1, 1, norms_of(model)[0].weight.numel(), dtype=torch.float64)
        )
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_values(dtype: torch.dtype, device: str) -> None:
    norm = norms_of(build("deepseek_v3"))[1].to(dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
        x = torch.randn((3, 2, len(norm.weight)), generator=generator).to(device, dtype)
        fused = functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(fused, norm(x), rtol=3 * torch.finfo(dtype).eps, atol=0)
