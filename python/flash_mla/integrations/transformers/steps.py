"""One forward pass of a model as its cache sees it (rows.py): what the layers need to know, on the host and on a device, what the
attention mask says, and what takes it back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class Step:
    """One forward pass, as the layers need to know it."""

    s_q: int
    absorbed: bool  # layers hand out the new latents alone; else all of them, gathered
    first: bool  # nothing was cached before
    moves: list[tuple[int, int, int]]  # (from slot, to slot, tokens), to be made before appending


@dataclasses.dataclass
class StepTensors:
    """The same on a device. It moves on with steps as long as each row gets one token more, in the same
    page: nothing is computed or uploaded then."""

    clock: int
    table: torch.Tensor  # (b, max_pages) int32
    coming: list[tuple[torch.Tensor, torch.Tensor]]  # lengths, slots of later steps, the last first
    lengths: torch.Tensor  # (b,) int32, with the step's tokens
    slots: torch.Tensor  # (b * s_q,) int64, -1 for padding
    moves: tuple[torch.Tensor, torch.Tensor] | None  # slots (n,) int64 from and to
    # (b * s_q,) int64: the new tokens of each row, padding first; None where it is first already. In this
    # order the kernel's causal mask, which counts from the last key, is the right one for real tokens.
    order: torch.Tensor | None
    # Room for the layers' queries, see attention.py.
    queries: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def advance(self) -> None:
        self.clock += 1
        self.lengths, self.slots = self.coming.pop()


@dataclasses.dataclass
class Undo:
    """What takes the rows back to before the step."""

    length: int
    tokens: list[int]
    real: torch.Tensor | None
    pages: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    taken: list[int] = dataclasses.field(default_factory=list)
    dropped: list[int] = dataclasses.field(default_factory=list)  # released once the step is done


@dataclasses.dataclass
class Change:
    """What a step's attention mask says."""

    counts: list[int] | None = None  # real tokens among the new ones, by row; None: all are
    new: torch.Tensor | None = None  # (b, s_q) bool on the CPU: which ones; None: all
    kept: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # row -> cached tokens
    real: torch.Tensor | None = None  # (b, length + s_q): the mask to remember; None: all real
