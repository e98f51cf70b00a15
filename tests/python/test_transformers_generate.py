"""generate() in all its forms: the same tokens with and without flash_mla, in float32, and how many calls ran absorbed."""

from __future__ import annotations

from collections.abc import Callable

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
    tokens,
)
from transformers import DynamicCache

import flash_mla.integrations.transformers as hf

pytestmark = pytest.mark.usefixtures("one_thread")


def same_tokens(model, generate: Callable, absorbed: int | None = None, seed: int = 1) -> hf.Report:
    """Runs generate(model) without and with flash_mla; both must give the same tokens."""
    torch.manual_seed(seed)
    wanted = generate(model)
    hf.enable(model)
    torch.manual_seed(seed)
    got = generate(model)
    info = hf.info(model)
    hf.disable(model)
    assert torch.equal(got, wanted)
    assert info.calls["absorbed"] > 0 and info.calls["fallback"] == 0
    if absorbed is not None:
        assert info.calls["absorbed"] == absorbed
    return info


@pytest.fixture(scope="module")
def model():
    return build("deepseek_v3")


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    ids, mask = padded(tokens(3, 20), (0, 4, 11))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", family_names())
def test_greedy_256(name: str) -> None:
    model = build(name)
    ids, mask = padded(tokens(2, 12), (0, 5))
    layers = FAMILIES[name].attention_layers

    def generate(model):
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=256, min_new_tokens=256
        )

    same_tokens(model, generate, absorbed=255 * layers)


FORMS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"do_sample": False, "num_beams": 4},
    "beam sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(model, prompt, form: str) -> None:
    """With left padding, over more than a page."""
    options = {"max_new_tokens": 70, "min_new_tokens": 70, **FORMS[form]}
    same_tokens(model, lambda m: m.generate(**prompt, **options), absorbed=69 * 2)


def test_rows_end_early(model, prompt) -> None:
    """Rows that have ended are padded behind, and go on beside the others."""
    ended = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    ends = [int(ended[0, 23]), int(ended[1, 26])]

    def generate(model):
        return model.generate(**prompt, do_sample=False, max_new_tokens=60, eos_token_id=ends)

    same_tokens(model, generate)


def test_prefill_in_chunks(model, prompt) -> None:
    options = {"do_sample": False, "max_new_tokens": 20, "prefill_chunk_size": 8}
    same_tokens(model, lambda m: m.generate(**prompt, **options))


@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_by_a_model(model, sampled: bool) -> None:
    """Several tokens a step, and crops of zero and more."""
    ids = tokens(1, 20)
    assistant = build("deepseek_v3", num_hidden_layers=1)
    options = {"assistant_model": assistant, "do_sample": sampled, "max_new_tokens": 80}
    same_tokens(model, lambda m: m.generate(ids, **options))


def test_assisted_by_an_equal_model(model) -> None:
    """Every candidate is accepted: crops of zero tokens. The assistant is enabled too."""
    ids = tokens(1, 20)
    assistant = build("deepseek_v3")
    hf.enable(assistant)
    options = {"assistant_model": assistant, "do_sample": False, "max_new_tokens": 80}
    same_tokens(model, lambda m: m.generate(ids, **options))
    assert hf.info(assistant).calls["absorbed"] > 0


def test_prompt_lookup(model) -> None:
    ids = tokens(1, 10).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 5, "do_sample": False, "max_new_tokens": 80}
    same_tokens(model, lambda m: m.generate(ids, **options))


def test_early_exit() -> None:
    """The model assists itself with its first layer: a second cache, of fewer layers.

    NOTE: Transformers 5.15 at times hands a mask that is shorter than the cache; those steps fall back.
    """
    model = build("deepseek_v3")
    ids = tokens(1, 20)
    options = {"assistant_early_exit": 1, "do_sample": False, "max_new_tokens": 40}
    wanted = model.generate(ids, **options)
    hf.enable(model)
    assert torch.equal(model.generate(ids, **options), wanted)
    info = hf.info(model)
    assert info.calls["absorbed"] > 60
    assert set(info.fallbacks) <= {"the attention_mask is shorter than what is cached"}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["kept", "masked out"])
def test_turns(model, prompt, with_config: bool, masked: bool) -> None:
    """A cache handed in by the caller, used for two turns; the second has padding in the middle of rows, and
    may mask out tokens of the first."""

    def generate(model):
        cache = DynamicCache(config=model.config) if with_config else DynamicCache()
        options = {cache_name(): cache, "do_sample": False}
        first = model.generate(**prompt, **options, max_new_tokens=60)
        more, more_mask = padded(tokens(3, 9, seed=5), (5, 0, 2))
        answered = torch.ones(3, first.shape[1] - 20, dtype=torch.long)
        if masked:
            answered[0, 40:] = 0
            answered[1, 2:5] = 0
        mask = torch.cat([prompt["attention_mask"], answered, more_mask], dim=1)
        ids = torch.cat([first, more], dim=1)
        return model.generate(ids, attention_mask=mask, **options, max_new_tokens=30)

    same_tokens(model, generate)


def test_turns_of_a_batch_that_is_selected_and_repeated(model, prompt) -> None:
    @torch.no_grad()
    def generate(model):
        cache, mask = DynamicCache(), prompt["attention_mask"]
        forward(model, prompt["input_ids"], cache, mask)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        forward(model, tokens(3, 1), cache, mask)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 1, 4]))
        mask = mask.repeat_interleave(2, 0)[[5, 0, 1, 4]]
        logits = []
        for step in range(50):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids = tokens(4, 1, seed=step)
            logits.append(forward(model, ids, cache, mask).logits[:, -1].argmax(-1))
        return torch.stack(logits)

    same_tokens(model, generate)


def test_under_inference_mode(model, prompt) -> None:
    """Pages that are made under inference_mode are used outside of it."""

    def generate(model):
        cache = DynamicCache()
        with torch.inference_mode():
            first = model.generate(
                **prompt, do_sample=False, max_new_tokens=8, **{cache_name(): cache}
            )
        mask = torch.cat([prompt["attention_mask"], torch.ones(3, 8, dtype=torch.long)], 1)
        ids = first.clone()
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **{cache_name(): cache}
        )

    same_tokens(model, generate)


def test_logits_of_a_generation(device: str) -> None:
    """On a GPU too, in bf16: the logits that generate() saw, against the model's own attention over the tokens
    that it chose."""
    model = build("deepseek_v3", torch.bfloat16, device)
    ids, mask = padded(tokens(3, 20, device), (0, 4, 11))
    hf.enable(model)
    options = {"do_sample": False, "max_new_tokens": 100, "min_new_tokens": 100}
    output = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    info = hf.info(model)
    assert info.calls["absorbed"] == 99 * 2 and info.calls["fallback"] == 0
    hf.disable(model)
    got = torch.stack(output.logits, dim=1).double()
    mask = torch.cat([mask, torch.ones_like(output.sequences[:, 20:])], dim=1)

    @torch.no_grad()
    def of_whole(model):
        return forward(model, output.sequences, None, mask, use_cache=False).logits.double()

    plain, exact = of_whole(model)[:, 19:-1], of_whole(in_float64(model))[:, 19:-1]
    for row in range(3):
        assert_as_good(got[row], plain[row], exact[row], torch.bfloat16)
