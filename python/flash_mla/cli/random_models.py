"""Transformers models of published geometries with random weights, and caches filled with random latents.

For measuring where there is no checkpoint: speed does not depend on the weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch

# From the public config.json of each model; what is not named here is the config class's default.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 163840,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def config_of(geometry: str, layers: int | None = None, **changes: Any) -> Any:
    """The Transformers config of a geometry, with its first `layers` layers."""
    from transformers import AutoConfig

    settings = {**GEOMETRIES[geometry], **changes}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build(config: Any, device: str | torch.device, dtype: torch.dtype, attention: str) -> Any:
    """A model in evaluation mode whose weights are drawn where they stay."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def filled_cache(model: Any, b: int, context: int, seed: int = 0) -> Any:
    """A DynamicCache of b rows that holds `context` tokens with random latents in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    _fill(cache, model, b, context, seed)
    return cache


def filled_static_cache(model: Any, b: int, context: int, room: int, seed: int = 0) -> Any:
    """The same in a StaticCache with room for `room` tokens more, made as a prefill makes it: what an enabled
    model puts in its layers' place is there."""
    from transformers import StaticCache

    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=context + room)
    ids = torch.ones((b, 1), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=ids, **{cache_argument(): cache})
        rewind(cache, 0)
        _fill(cache, model, b, context, seed)
    return cache


def rewind(cache: Any, length: int) -> None:
    """Takes a StaticCache back to `length` tokens. Its tensors stay where compiled steps know them."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _fill(cache: Any, model: Any, b: int, context: int, seed: int) -> None:
    config = model.config.get_text_config(decoder=True)
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(seed)
    for index in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(
                (b, 1, context, width),
                generator=generator,
                dtype=parameter.dtype,
                device=parameter.device,
            )
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(keys, values, index)


def cache_bytes(cache: Any) -> int:
    """Bytes that hold the tokens of a cache: of pages those in use, of tensors all."""
    total = 0
    for layer in getattr(cache, "layers", []):
        if hasattr(layer, "nbytes"):
            total += layer.nbytes
        elif isinstance(getattr(layer, "keys", None), torch.Tensor):
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def cache_argument() -> str:
    """What models call their cache: another name since Transformers 5.19."""
    import inspect

    from transformers import DeepseekV3ForCausalLM

    function = inspect.unwrap(DeepseekV3ForCausalLM.forward)
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


class StepClock:
    """A logits processor that changes nothing and notes when the steps of generate() come by.

    `first` is the time at which the first step's logits were there. Steady speed is taken from the
    step `skip` on; for both, the device is waited for, once.
    """

    def __init__(self, device: torch.device, skip: int = 2) -> None:
        self.device, self.skip = torch.device(device), skip
        self.steps, self.first, self.steady, self.end = 0, 0.0, 0.0, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.steps == 0:
            self.first = self.now()
        if self.steps == self.skip:
            self.steady = self.now()
        self.steps += 1
        return scores

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self) -> None:
        self.end = self.now()

    @property
    def ms_per_step(self) -> float:
        """Of the steps after `skip`."""
        steps = self.steps - 1 - self.skip
        return (self.end - self.steady) * 1e3 / steps if steps > 0 else float("nan")
