"""DeepSeek-style models in Hugging Face Transformers, decoding on flash_mla: `enable(model)` is all it takes.

Prefill stays with the model's own attention. Every later step of up to `max_s_q` tokens runs
absorbed: W_UK is folded into the query, attention runs over the latents in pages, W_UV is applied to
its output. `generate()` works as before. docs/design/0005-transformers.md tells how and why.

Needs Transformers 5.15 or newer, which caches latents; importing this without it raises ImportError.
"""

from __future__ import annotations

import dataclasses
import warnings

from torch import nn

try:
    import transformers as _transformers
    from transformers import AttentionInterface as _AttentionInterface  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flash_mla.integrations.transformers needs Transformers 5.15 or newer: pip install 'transformers>=5.15'"
    ) from error

MINIMUM_VERSION = (5, 15)
if tuple(int(part) for part in _transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
    raise ImportError(
        f"flash_mla.integrations.transformers needs Transformers 5.15 or newer, found {_transformers.__version__}: "
        "older ones cache expanded keys and values"
    )

from . import structure  # noqa: E402
from .attention import AbsorbedLayer, attach, detach  # noqa: E402
from .cache import LatentLayer  # noqa: E402
from .controller import Controller, Decoder  # noqa: E402

__all__ = ["LatentLayer", "Report", "disable", "enable", "info"]

MAX_S_Q = 128


@dataclasses.dataclass(frozen=True)
class Report:
    """What `enable` took, and what became of it.

    Attributes:
        taken: names of the attention layers that can run absorbed.
        left: why the others cannot, by name.
        max_s_q: new tokens up to which a step runs absorbed.
        calls: calls of the taken layers: "absorbed", inside compiled graphs too; "prefill" and
            "long chunk", which run the model's own attention by design; "fallback".
        fallbacks: why calls fell back, and how many did for each reason.
    """

    taken: tuple[str, ...]
    left: dict[str, str]
    max_s_q: int
    calls: dict[str, int]
    fallbacks: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} attention layers run absorbed, {len(self.left)} do not"]
        lines += [f"  {name}: {why}" for name, why in self.left.items()]
        lines += [f"  {kind}: {count} calls" for kind, count in self.calls.items() if count]
        lines += [f"    {count} because {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines)


def enable(model: nn.Module, *, max_s_q: int = MAX_S_Q, max_pages: int | None = None) -> Report:
    """Lets the attention layers of a model decode on flash_mla.

    Args:
        model: a Transformers model, or a part of one. Layers are taken for what they have (latent
            attention with kv_lora_rank 512 and 64 dimensions of RoPE), whatever the model's name.
        max_s_q: new tokens of a row up to which a step runs absorbed; longer ones run the model's
            own attention over the gathered latents. At 128 both cost about the same.
        max_pages: pages of 64 tokens that a cache may use for all its rows; None for no limit.

    Returns a report of the layers taken and left. Warns when none was taken. Enabling once more
    changes the settings and starts the counts anew.

    On the CPU latents may be bfloat16, float16 or float32, on a Hopper GPU the first two. A
    `DynamicCache`, handed in by the caller or not, turns into pages at the first step after
    prefill, a `StaticCache` at prefill; steps over the latter may be compiled. What is not supported
    runs the model's own attention, with one warning for each reason: training, wanted gradients,
    output_attentions, quantised and offloaded caches, masks that are more than causal with padding,
    padding in a static cache. Steps raise MemoryError when pages or memory run out (nothing is lost
    then), and ValueError for an attention mask that asks for tokens which an earlier mask called
    padding.

    Raises ValueError for a max_s_q or max_pages below 1.
    """
    for name, value in (("max_s_q", max_s_q), ("max_pages", 1 if max_pages is None else max_pages)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"enable: {name} = {value!r}, wanted an int of 1 or more")
    disable(model)
    taken, left = _sort(model)
    controller = Controller(max_s_q, max_pages)
    decoders: dict[str, dict[int, nn.Module]] = {}
    for name, module in taken.items():
        path, _ = structure.decoder_of(model, name)
        decoders.setdefault(path, {})[module.layer_idx] = module
        attach(module, AbsorbedLayer(controller, name, module))
    controller.left = left
    for path, layers in decoders.items():
        decoder = model.get_submodule(path)
        controller.decoders.append(Decoder(controller, decoder, layers))
    if not taken:
        reasons = sorted(set(left.values())) or ["it has no layer of multi-head latent attention"]
        warnings.warn(f"flash_mla: nothing was enabled: {'; '.join(reasons)}", stacklevel=2)
        return Report((), left, max_s_q, {}, {})
    return info(model)


def disable(model: nn.Module) -> None:
    """Takes back what `enable` did. A model that was not enabled stays as it is.

    Caches in pages go on working, as any cache layer does.
    """
    controllers = _controllers(model)
    for module in model.modules():
        if isinstance(vars(module).get("_flash_mla"), AbsorbedLayer):
            detach(module)
    for controller in controllers:
        for decoder in controller.decoders:
            decoder.handle.remove()


def info(model: nn.Module) -> Report:
    """Which layers of a model run absorbed, and how many calls did, since `enable`."""
    layers = [
        module._flash_mla
        for module in model.modules()
        if isinstance(vars(module).get("_flash_mla"), AbsorbedLayer)
    ]
    if not layers:
        return Report((), _sort(model)[1], 0, {}, {})
    controller = layers[0].controller
    return Report(
        tuple(layer.name for layer in layers),
        dict(controller.left),
        controller.max_s_q,
        controller.counts,
        dict(controller.reasons),
    )


def _sort(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can run absorbed, and why the others cannot, by name."""
    taken, left = {}, {}
    for name, module in structure.attention_layers(model):
        reason = structure.obstacle(module)
        if reason:
            left[name] = reason
        else:
            taken[name] = module
    return taken, left


def _controllers(model: nn.Module) -> list[Controller]:
    found = {}
    for module in model.modules():
        layer = vars(module).get("_flash_mla")
        if isinstance(layer, AbsorbedLayer):
            found[id(layer.controller)] = layer.controller
    return list(found.values())
