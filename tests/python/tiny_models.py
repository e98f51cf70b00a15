"""Tiny models of every family with the real geometry of a latent (512 + 64), and how the tests drive them.

Importing this skips a module where Transformers is missing or too old; conftest.py says so aloud.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.15")

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# As many experts as each token takes: routing that flips on a rounding would hide what is measured.
_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    config: str  # name of the config class in transformers
    model: str
    settings: dict[str, Any]
    attention_layers: int  # that run absorbed
    wrap: Callable[[Any], Any] | None = None  # makes the model's config of the text config


def _v3(**settings: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        **_EXPERTS,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        **settings,
    }


def _kimi_k25(text: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return transformers.Kimi_K25Config(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 2},
        projection_hidden_size=32,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


_KIMI_LINEAR = {
    **_COMMON,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}

FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _v3(norm_topk_prob=False, topk_method="greedy"),
        2,
    ),
    "deepseek_v2_lite": Family(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", _v3(q_lora_rank=None, topk_method="greedy"), 2
    ),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", _v3(), 2),
    "deepseek_v3_yarn": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", _v3(rope_parameters=_YARN), 2
    ),
    "deepseek_v3_not_interleaved": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", _v3(rope_interleave=False), 2
    ),
    "kimi_k25": Family(
        "DeepseekV3Config", "Kimi_K25ForConditionalGeneration", _v3(), 2, wrap=_kimi_k25
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        _v3(num_attention_heads=20, num_key_value_heads=20),
        2,
    ),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **_COMMON,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "q_lora_rank": 32,
            "moe_topk": 3,
            "n_routed_experts": 2,
            "zero_expert_num": 1,
        },
        4,
    ),
    "youtu": Family("YoutuConfig", "YoutuForCausalLM", _v3(tie_word_embeddings=False), 2),
    "axk1": Family("AXK1Config", "AXK1ForCausalLM", _v3(), 2),
    "kimi_linear": Family("KimiLinearConfig", "KimiLinearForCausalLM", _KIMI_LINEAR, 2),
    "bailing_hybrid": Family(
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        {
            **_KIMI_LINEAR,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
        2,
    ),
}


def family_names() -> list[Any]:
    """Parameters of a test: every family; those that this Transformers lacks are skipped by name."""
    parameters = []
    for name, family in FAMILIES.items():
        there = all(hasattr(transformers, part) for part in (family.config, family.model))
        skip = pytest.mark.skip(reason=f"Transformers {transformers.__version__} has no {name}")
        parameters.append(pytest.param(name, marks=() if there else skip))
    return parameters


def build(
    name: str = "deepseek_v3",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "eager",
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A model with random weights, large enough for attention to decide what comes next."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(
        **{**family.settings, **settings}, attn_implementation=attention
    )
    if family.wrap:
        config = family.wrap(config)
        config._attn_implementation = attention
    model = getattr(transformers, family.model)(config)
    model.set_experts_implementation("eager")  # the one that takes float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in key:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                fan_in = parameter.shape[-1]
                scale = 1.0 if "embed" in key else 2.0 * fan_in**-0.5
                parameter.copy_(values * scale)
    return model.to(device=device, dtype=dtype).eval()


def in_float64(model: Any) -> Any:
    """The same model for exact results. NOTE: its eager attention makes NaN of rows that see nothing, as the
    padding of a row does: it takes the softmax in float32, where the mask of float64 is infinite."""
    model = model.double()
    model.set_attn_implementation("sdpa")
    return model


def tokens(b: int, n: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """(b, n) token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (b, n), generator=generator).to(device)


def padded(ids: torch.Tensor, padding: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids with `padding[i]` tokens of row i overwritten from the left, and their mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return torch.where(mask.bool(), ids, 0), mask


def forward(model: Any, ids: torch.Tensor, cache: Any, mask: Any = None, **options: Any) -> Any:
    """One call with a cache, positions as generate() makes them."""
    if mask is not None and mask.dim() == 2 and "position_ids" not in options:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, **{cache_name(): cache}, **options)


def step(model: Any, cache: Any, n: int = 1) -> torch.Tensor:
    """Logits of a call with n tokens for each of two rows, without gradients."""
    with torch.no_grad():
        return forward(model, tokens(2, n), cache).logits


def cache_name() -> str:
    """What the model's argument for a cache is called: another name since Transformers 5.19."""
    parameters = transformers.DeepseekV3ForCausalLM.forward
    while hasattr(parameters, "__wrapped__"):
        parameters = parameters.__wrapped__
    names = parameters.__code__.co_varnames
    return "cache" if "cache" in names else "past_key_values"


def cache_of(output: Any) -> Any:
    return getattr(output, cache_name())


@torch.no_grad()
def logits_of_chunks(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunks: Sequence[int],
    cache: Any = None,
) -> torch.Tensor:
    """(b, n, vocabulary) float64: the ids in chunks, each called with the cache of those before."""
    cache = transformers.DynamicCache(config=text_config(model)) if cache is None else cache
    parts, start = [], 0
    for count in chunks:
        stop = start + count
        part = forward(model, ids[:, start:stop], cache, None if mask is None else mask[:, :stop])
        parts.append(part.logits.double())
        start = stop
    assert start == ids.shape[1]
    return torch.cat(parts, dim=1)


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
