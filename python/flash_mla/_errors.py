"""Turns what PyTorch's operators raise into the exceptions of the public functions."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch

# The operators raise RuntimeError alone; the text starts with the name of the type that is meant.
_TAGS = {
    "[ValueError] ": ValueError,
    "[TypeError] ": TypeError,
    "[NotImplementedError] ": NotImplementedError,
    "[RuntimeError] ": RuntimeError,
}


def is_int(value: Any) -> bool:
    """Whether it is an int, or one of NumPy's; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_tensors(function: str, **arguments: Any) -> None:
    """Raises TypeError, naming the first of `arguments` that is not a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function}: {name} is {type(value).__name__}, wanted a torch.Tensor")


def raise_translated(error: RuntimeError, function: str, **arguments: Any) -> NoReturn:
    """Raises the exception that `error`, from one of our operators, stands for.

    An operator that was called with something else than tensors reports PyTorch's own error, which
    names the operator rather than the caller's argument; `arguments` are the caller's tensors,
    looked at only then.
    """
    text = str(error)
    for tag, kind in _TAGS.items():
        if text.startswith(tag):
            raise kind(text[len(tag) :]) from None
    require_tensors(function, **arguments)
    raise error


def unsupported(function: str, argument: str) -> NotImplementedError:
    """The error for an argument that this release accepts by name only."""
    return NotImplementedError(f"{function}: {argument} is not supported yet")
