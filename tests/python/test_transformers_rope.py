"""RoPE of queries and key in one go: what it spares, that nothing changes, and that it goes away again."""

from __future__ import annotations

import copy
import functools
import gc
import inspect

import pytest
import torch
from tiny_models import build, step
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers import rope

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_model_is_enabled(monkeypatch) -> None:
    """Other tests leave enabled models behind."""
    space = vars(modeling_deepseek_v3)
    for name in rope._NAMES:
        monkeypatch.setitem(space, name, inspect.unwrap(space[name]))


class Products(TorchDispatchMode):
    """Counts products that are half of RoPE's 64 wide and have an axis of heads."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mul.Tensor and result.shape[3:] == (32,) and result.numel():
            self.count += 1
        return result


def functions() -> list:
    return [getattr(modeling_deepseek_v3, name) for name in rope._NAMES]


def are_ours() -> list[bool]:
    return [function in rope._users for function in functions()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_products_with_the_same_results(monkeypatch, dtype: torch.dtype) -> None:
    logits, products = [], []
    for joined in (True, False):
        model, cache = build("deepseek_v3").to(dtype), DynamicCache()
        with monkeypatch.context() as patch:
            if not joined:
                patch.setattr(rope, "attach", lambda module: None)
            hf.enable(model)
        logits.append(step(model, cache, 7))
        with Products() as counted:
            logits.append(step(model, cache))
        products.append(counted.count)
        logits.append(step(model, cache, 3))
        hf.disable(model)
    assert products[0] > 0 and products[1] == 2 * products[0]
    assert all(torch.equal(x, y) for x, y in zip(logits[:3], logits[3:], strict=True))


def test_the_last_one_to_leave_takes_it_back() -> None:
    first, second, never = build("deepseek_v3"), build("deepseek_v3"), build("deepseek_v3")
    own = functions()
    assert are_ours() == [False, False]
    wanted = step(never, DynamicCache())
    hf.enable(first)
    hf.enable(second)
    assert are_ours() == [True, True]
    assert torch.equal(step(never, DynamicCache()), wanted)
    copied = copy.deepcopy(first)
    hf.disable(first)
    hf.disable(copied)
    assert are_ours() == [True, True]
    hf.disable(second)
    assert functions() == own


def test_models_that_are_gone_do_not_count() -> None:
    gone, model = build("deepseek_v3"), build("deepseek_v3")
    own = functions()
    hf.enable(gone)
    del gone
    gc.collect()
    hf.enable(model)
    hf.disable(model)
    assert functions() == own


def test_a_function_that_treats_the_key_otherwise_stays(monkeypatch) -> None:
    model = build("deepseek_v3")
    own = modeling_deepseek_v3.apply_rotary_pos_emb

    def other(q, k, cos, sin):
        q, k = own(q, k, cos, sin)
        return q, 2 * k

    monkeypatch.setattr(modeling_deepseek_v3, "apply_rotary_pos_emb", other)
    hf.enable(model)
    assert modeling_deepseek_v3.apply_rotary_pos_emb is other
    hf.disable(model)


def test_what_others_make_of_it_is_theirs(monkeypatch) -> None:
    model = build("deepseek_v3")
    hf.enable(model)
    ours = modeling_deepseek_v3.apply_rotary_pos_emb

    @functools.wraps(ours)
    def theirs(*args):
        return ours(*args)

    monkeypatch.setattr(modeling_deepseek_v3, "apply_rotary_pos_emb", theirs)
    hf.disable(model)
    assert modeling_deepseek_v3.apply_rotary_pos_emb is theirs


def test_many_tokens_and_gradients_go_one_by_one(monkeypatch) -> None:
    model, seen = build("deepseek_v3"), []
    hf.enable(model)
    monkeypatch.setattr(rope, "_join", lambda *args: seen.append(args))
    rotate = functions()[1]

    def given(b: int, s_q: int) -> list[torch.Tensor]:
        return [torch.randn(shape) for shape in ((b, 4, s_q, 64), (b, 1, s_q, 64), (b, s_q, 64), (b, s_q, 64))]  # fmt: skip

    rotate(*given(257, 1))
    rotate(*given(2, 129))
    q, k, cos, sin = given(1, 1)
    rotate(q.requires_grad_(), k, cos, sin)
    rotate(q.detach(), k, cos, sin=sin)
    assert not seen
    rotate(*given(256, 1))
    assert len(seen) == 1
    hf.disable(model)
