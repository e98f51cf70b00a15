"""RoPE of a step's queries and key in one go.

A model rotates its queries (b, h, s_q, 64) and the one key of each token (b, 1, s_q, 64) by the same function, one after the other: in
DeepSeek-V3 that is seven kernels each, which with few tokens take as long as their launches do. All heads are rotated alike, so the
key goes along as one more head of the queries.

The function is a global of the model's file in Transformers. Other models made from that file, enabled or not, call it too; what they get is the
same, bit for bit: sums and products of the same elements.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .cache import D_ROPE

_NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
# Of a call, all rows together. With more the copy would take longer than the launches that it spares.
_MOST_TOKENS = 256
# Functions that stand in for a model's, and the modules that they do it for. Not an attribute of the function, which functools.wraps
# would hand on to what somebody else makes of it.
_users: weakref.WeakKeyDictionary[Callable, weakref.WeakSet[nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def attach(module: nn.Module) -> None:
    """Of an attention module's RoPE functions those that rotate all heads alike."""
    for space, name in _functions(module):
        if space[name] not in _users:
            if not _is_known(space[name]):
                continue
            space[name] = _joining(space[name])
        _users[space[name]].add(module)


def detach(module: nn.Module) -> None:
    """Takes back what `attach` did, with the last module of those that it did it for."""
    for space, name in _functions(module):
        if space[name] in _users:
            users = _users[space[name]]
            users.discard(module)
            if not users:
                space[name] = space[name].__wrapped__


def _functions(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the RoPE functions that the module's forward calls are found."""
    space = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    for name in _NAMES:
        if callable(space.get(name)):
            yield space, name


def _joining(function: Callable) -> Callable:
    @functools.wraps(function)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or torch.compiler.is_compiling() or not _fit(*args[:2]):
            return function(*args, **kwargs)
        return _join(function, *args)

    _users[rotate] = weakref.WeakSet()
    return rotate


def _fit(q: Any, k: Any) -> bool:
    return (
        type(q) is torch.Tensor
        and type(k) is torch.Tensor
        and q.dim() == k.dim() == 4
        and k.shape == (q.shape[0], 1, *q.shape[2:])
        and q.shape[0] * q.shape[2] <= _MOST_TOKENS
        and (q.dtype, q.device) == (k.dtype, k.device)
        and not (q.requires_grad or k.requires_grad)
    )


def _join(
    function: Callable, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = torch.cat((q, k), dim=1)
    heads, _ = function(heads, heads[:, :0], cos, sin)
    return heads[:, :-1], heads[:, -1:]


def _is_known(function: Callable) -> bool:
    """Tries it with two rows of two tokens and three heads."""
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    given = randn(2, 3, 2, D_ROPE), randn(2, 1, 2, D_ROPE), randn(2, 2, D_ROPE), randn(2, 2, D_ROPE)
    try:
        with torch.no_grad():
            own, joined = function(*given), _join(function, *given)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return len(own) == 2 and all(torch.equal(x, y) for x, y in zip(own, joined, strict=True))
