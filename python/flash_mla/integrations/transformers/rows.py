"""What the rows of a batch hold of a paged cache: pages, tokens and padding, once for all layers of a model.

A model calls its cache layer by layer, and every layer sees the same tokens. So pages, lengths and
padding are kept here once, and the layers follow: the first layer that is told of an operation
carries it out, the others check that they are told the same. A forward pass is planned before its
first layer runs (`begin`), so that whatever can fail fails there, with nothing changed.

The length of a row is the padded one, as the model counts it; its pages hold real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flash_mla.pages import Pages

from .steps import Change, Step, StepTensors, Undo

if TYPE_CHECKING:
    from .cache import LatentLayer

PAGE_SIZE = 64  # what a GPU decodes
_ROOM = 8  # a pool that grows takes one page more for each so many


KEEP = (
    object()
)  # as a mask: nothing is known about padding; what is cached stays, all that is new is real


class LatentRows:
    """Pages, tokens and padding of `batch` rows.

    Args:
        batch: rows.
        max_pages: pages of 64 tokens that they may use together, None for no limit.
    """

    def __init__(self, batch: int, max_pages: int | None = None) -> None:
        self.max_pages = max_pages
        self.layers: list[LatentLayer] = []
        self.pool = Pages(0)
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.tokens = [0] * batch
        self.real: torch.Tensor | None = None  # (b, length) as the model got it; None: no padding
        self.clock = 0  # operations so far; a layer that lags has not been told of the last one
        self.step: Step | None = None
        self._length = 0
        self._pending = 0  # layers that have not been told yet
        self._operation: tuple[str, Any] = ("", None)
        self._undo: Undo | None = None
        self._new: torch.Tensor | None = None
        self._advances = False
        self._table = torch.zeros((batch, 0), dtype=torch.int32, device="cpu")
        self._table_version = 0
        self._tensors: dict[torch.device, StepTensors] = {}
        self._tables: dict[torch.device, tuple[int, torch.Tensor]] = {}  # by version
        self._padded: dict[torch.device, tuple[int, torch.Tensor]] = {}  # by clock

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their tensors of a step themselves: many small ones, and room that is written to."""
        return {**vars(self), "_tensors": {}}

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Padded tokens. A step counts when its last layer has run."""
        return self._undo.length if self._undo and self._pending else self._length

    @property
    def used_pages(self) -> int:
        return self.pool.used

    # Steps

    def begin(self, s_q: int, mask: Any = None, absorbed: bool = False) -> Step:
        """Plans a forward pass over s_q new tokens.

        Args:
            s_q: new tokens of each row, with padding.
            mask: (b, length + s_q or more), 0 for padding; None when there is none. KEEP when
                nothing is known.
            absorbed: whether layers may keep what is cached to themselves.

        On a GPU a mask costs one synchronisation, no mask none.

        Raises MemoryError when pages or memory run out, ValueError for a mask that asks for tokens
        which are not cached. Nothing has changed then.
        """
        self._settle()
        change = self._read(mask, s_q)
        undo = Undo(self._length, list(self.tokens), self.real)
        self._undo = undo
        try:
            moves = self._make_room(change, s_q)
            if undo.taken:
                for layer in self.layers:
                    layer.reserve(len(self.pool))
        except BaseException:
            self._roll_back()
            raise
        # One token more in the last page of each row, after one token more: see tensors().
        self._advances = (
            s_q == 1
            and change.new is None
            and not undo.pages
            and self._operation[0] == "step"
            and self.step.s_q == 1
            and self._new is None
        )
        self.step = Step(
            s_q,
            absorbed=absorbed,
            first=undo.length == 0,
            moves=moves,
        )
        self._new = change.new
        self._length += s_q
        self.real = change.real
        self._tell("step", None)
        return self.step

    def _read(self, mask: Any, s_q: int) -> Change:
        if mask is KEEP:
            real = self.real
            return Change(real=None if real is None else _continued(real, s_q))
        if mask is None:
            if self.real is not None:
                raise ValueError(
                    "flash_mla: the cache holds no padding, and there is some by the attention_mask of earlier calls: "
                    "pass an attention_mask"
                )
            return Change()
        width = self._length + s_q
        if mask.shape[0] != self.batch:
            raise ValueError(
                f"flash_mla: attention_mask has {mask.shape[0]} rows, the cache {self.batch}"
            )
        mask = mask[:, :width]
        # One comparison, on the device, with what nearly every step has: no change, no new padding.
        if self.real is None:
            if bool(mask.all()):
                return Change()
        elif torch.equal(mask, _continued(self.real.to(mask), s_q)):
            return Change(real=mask)
        return self._read_slowly(mask, s_q)

    def _read_slowly(self, mask: torch.Tensor, s_q: int) -> Change:
        wanted = mask.ne(0).to("cpu")
        old, new = wanted[:, : self._length], wanted[:, self._length :]
        stored = torch.ones_like(old) if self.real is None else self.real.ne(0).to("cpu")
        if bool((old & ~stored).any()):
            raise ValueError(
                "flash_mla: the attention_mask asks for tokens that it called padding before; those are not cached"
            )
        change = Change(
            counts=new.sum(1).tolist(),
            new=new,
            real=None if bool(wanted.all()) else mask,
        )
        for row in (stored & ~old).any(1).nonzero().flatten().tolist():
            change.kept[row] = old[row][stored[row]].nonzero().flatten().tolist()
        return change

    def _make_room(self, change: Change, s_q: int) -> list[tuple[int, int, int]]:
        moves: list[tuple[int, int, int]] = []
        for row, kept in change.kept.items():
            moves += self._compact(row, kept)
        counts = [s_q] * self.batch if change.counts is None else change.counts
        shared = self.pool.any_shared
        tight = [
            row
            for row, pages in enumerate(self.pages)
            if shared or self.tokens[row] + counts[row] > len(pages) * PAGE_SIZE
        ]
        if tight:
            self._enlarge(sum(self._pages_short(row, counts[row]) for row in tight))
        for row in tight:
            moves += self._extend(row, counts[row])
        self.tokens = [tokens + count for tokens, count in zip(self.tokens, counts, strict=True)]
        return moves

    def _pages_short(self, row: int, count: int) -> int:
        """Pages that a row lacks for `count` more tokens."""
        return -(-(self.tokens[row] + count) // PAGE_SIZE) - len(self.pages[row])

    def _extend(self, row: int, count: int) -> list[tuple[int, int, int]]:
        """Room for `count` more tokens of a row; a last page that others own too is copied first."""
        pages, tokens = self.pages[row], self.tokens[row]
        copied = bool(count and tokens % PAGE_SIZE) and self.pool.is_shared(pages[-1])
        added = self._pages_short(row, count)
        if not copied and not added:
            return []
        taken = self._take(added + copied)
        if not copied:
            self._set_pages(row, pages + taken)
            return []
        self._set_pages(row, pages[:-1] + taken)
        self._drop(pages[-1:])
        return [(pages[-1] * PAGE_SIZE, taken[0] * PAGE_SIZE, tokens % PAGE_SIZE)]

    def _compact(self, row: int, kept: list[int]) -> list[tuple[int, int, int]]:
        """Takes tokens out of a row: those after the first one that goes move to other pages."""
        pages = self.pages[row]
        gone = next((i for i, token in enumerate(kept) if i != token), len(kept))
        head = gone // PAGE_SIZE  # pages that stay as they are
        taken = self._take(-(-len(kept) // PAGE_SIZE) - head)
        renewed = pages[:head] + taken
        moves = [
            (_slot(pages, kept[i]), _slot(renewed, i), 1)
            for i in range(head * PAGE_SIZE, len(kept))
        ]
        self._set_pages(row, renewed)
        self._drop(pages[head:])
        self.tokens[row] = len(kept)
        return moves

    def _take(self, count: int) -> list[int]:
        self._enlarge(count)
        if count > self.pool.free:
            used = self.pool.used
            raise MemoryError(
                f"flash_mla: out of pages: a row needs {count} more, {self.max_pages - used} of {self.max_pages} are free "
                f"(pages of {PAGE_SIZE} tokens; max_pages of enable() sets their number)"
            )
        taken = self.pool.take(count)
        if self._undo:
            self._undo.taken += taken
        return taken

    def _enlarge(self, count: int) -> None:
        """Sees to `count` free pages, as far as the limit lets it; with some more, so that it is rare."""
        if count > self.pool.free:
            wanted = self.pool.used + count
            wanted += max(self.batch, wanted // _ROOM)
            limit = wanted if self.max_pages is None else self.max_pages
            self.pool.enlarge(max(min(wanted, limit), len(self.pool)))

    def _drop(self, pages: list[int]) -> None:
        self._undo.dropped += pages

    def _set_pages(self, row: int, pages: list[int]) -> None:
        if self._undo:
            self._undo.pages.setdefault(row, self.pages[row])
        self.pages[row] = pages
        self._write_table(row)

    def _write_table(self, row: int) -> None:
        pages, width = self.pages[row], self._table.shape[1]
        if len(pages) > width:
            wider = max(len(pages), width + width // _ROOM + 1)
            self._table = torch.nn.functional.pad(self._table, (0, wider - width))
        self._table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        self._table_version += 1

    def _settle(self) -> None:
        """Ends the last operation: a step that an exception cut short is taken back."""
        if self._pending:
            if self._operation[0] != "step":
                raise RuntimeError(
                    f"flash_mla: {self._pending} cache layers were not told of {self._operation[0]}; all must be"
                )
            self._roll_back()
            self.clock -= 1
            for layer in self.layers:
                layer.clock = self.clock
            self._pending = 0
            self._operation = ("", None)
        elif self._undo:
            self.pool.release(self._undo.dropped)
            self._undo = None

    def _roll_back(self) -> None:
        undo, self._undo = self._undo, None
        self._length, self.tokens, self.real = undo.length, undo.tokens, undo.real
        for row, pages in undo.pages.items():
            self.pages[row] = pages
            self._write_table(row)
        self.pool.release(undo.taken)
        self._tensors.clear()
        self._padded.clear()

    # What layers call

    def follow(self, layer: LatentLayer, name: str, argument: Any, do: Callable[[], None]) -> None:
        """Carries out an operation that all layers are told of in turn: the first to come does it."""
        if layer.clock == self.clock:
            self._settle()
            do()
            self._tell(name, argument)
        elif not (
            self._operation[0] == name
            and (
                self._operation[1] is argument
                or (isinstance(argument, int) and self._operation[1] == argument)
            )
        ):
            raise RuntimeError(
                f"flash_mla: a cache layer was told to {name} where others were told to {self._operation[0]}"
            )
        self.passed(layer)

    def passed(self, layer: LatentLayer) -> None:
        """A layer has carried out the last operation."""
        layer.clock += 1
        self._pending -= 1

    def _tell(self, name: str, argument: Any) -> None:
        self.clock += 1
        self._pending = len(self.layers)
        self._operation = (name, argument)

    def started(self) -> None:
        """Ends the step that fills new rows, before there are layers that follow."""
        self._pending = 0
        self._settle()

    # Operations on rows

    def select(self, indices: Sequence[int]) -> None:
        """Row i becomes the row indices[i]; rows that come several times share their pages."""
        counts = [0] * self.batch
        for index in indices:
            counts[index] += 1
        for pages, count in zip(self.pages, counts, strict=True):
            if count == 0:
                self.pool.release(pages)
            for _ in range(count - 1):
                self.pool.share(pages)
        self.pages = [list(self.pages[index]) for index in indices]
        self.tokens = [self.tokens[index] for index in indices]
        order = torch.tensor(indices, dtype=torch.int64, device="cpu")
        self._table = self._table[order]
        self._table_version += 1
        if self.real is not None:
            self.real = self.real[order.to(self.real.device)]

    def crop(self, count: int) -> None:
        """Takes off the last `count` padded tokens."""
        count = min(count, self._length)
        kept = self._length - count
        cut = [count] * self.batch
        if self.real is not None:
            cut = self.real[:, kept:].ne(0).sum(1).tolist()
            self.real = self.real[:, :kept]
        self._length = kept
        for row, tokens in enumerate(cut):
            self.tokens[row] -= tokens
            needed = -(-self.tokens[row] // PAGE_SIZE)
            self.pool.release(self.pages[row][needed:])
            self.pages[row] = self.pages[row][:needed]

    # On a device

    def tensors(self, device: torch.device) -> StepTensors:
        """The current step's tensors; made once a step, for all layers."""
        held = self._tensors.get(device)
        if held is not None and held.clock == self.clock:
            return held
        if held is not None and self._advances and held.clock == self.clock - 1:
            held.advance()
            return held
        # Ordinary tensors even under inference_mode: they outlive it.
        with torch.inference_mode(False):
            table, coming = self._table_on(device), self._coming(device)
            moves, order = self._moves(device), self._order(device)
        made = StepTensors(self.clock, table, coming, *coming.pop(), moves, order)
        self._tensors[device] = made
        return made

    def _table_on(self, device: torch.device) -> torch.Tensor:
        version, table = self._tables.get(device, (-1, None))
        if version != self._table_version:
            table = _upload(self._table, device)
            self._tables[device] = self._table_version, table
        return table

    def _coming(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Lengths and slots of this step, which comes last, and of those that may go on like it."""
        steps = 1
        if self.step.s_q == 1 and self._new is None:  # up to the first last page that is full then
            steps = min((-tokens % PAGE_SIZE for tokens in self.tokens), default=0) + 1
        later = torch.arange(steps, dtype=torch.int64, device="cpu").flip(0)[:, None]
        lengths = torch.tensor(self.tokens, dtype=torch.int64, device="cpu") + later
        slots = self._new_slots() + later
        lengths, slots = _upload(lengths.int(), device), _upload(slots, device)
        return list(zip(lengths.unbind(), slots.unbind(), strict=True))

    def _new_slots(self) -> torch.Tensor:
        """Where the step's tokens go, (b * s_q,) int64 on the CPU."""
        s_q, new = self.step.s_q, self._new
        if new is None:
            new = torch.ones((self.batch, s_q), dtype=torch.bool, device="cpu")
        last = torch.tensor(self.tokens, dtype=torch.int64, device="cpu")[:, None]
        token = last - new.sum(1, keepdim=True) + new.cumsum(1) - 1
        return torch.where(new, self._slots_of(token, self._table), -1).flatten()

    def _slots_of(self, token: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        token = token.clamp(min=0)
        if not table.shape[1]:
            return token
        page = table.long().gather(1, token // PAGE_SIZE)
        return page * PAGE_SIZE + token % PAGE_SIZE

    def _moves(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.step.moves:
            return None
        both = [
            [slot for move in self.step.moves for slot in range(move[end], move[end] + move[2])]
            for end in (0, 1)
        ]
        source, target = _upload(torch.tensor(both, dtype=torch.int64, device="cpu"), device)
        return source, target

    def _order(self, device: torch.device) -> torch.Tensor | None:
        new = self._new
        if new is None or not bool((new[:, :-1] & ~new[:, 1:]).any()):
            return None
        first = torch.arange(self.batch, device="cpu")[:, None] * self.step.s_q
        return _upload((new.byte().argsort(dim=1, stable=True) + first).flatten(), device)

    def padded_slots(self, device: torch.device) -> torch.Tensor:
        """Where each padded token is, (b, length) int64; -1 for padding."""
        clock, slots = self._padded.get(device, (-1, None))
        if clock != self.clock:
            with torch.inference_mode(False):
                if self.real is None:
                    real = torch.ones((self.batch, self._length), dtype=torch.bool, device=device)
                else:
                    real = self.real.to(device).ne(0)
                token = real.cumsum(1) - 1
                slots = torch.where(real, self._slots_of(token, self._table_on(device)), -1)
            self._padded[device] = self.clock, slots
        return slots


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. Pageable memory is read before the call returns, so nothing has to wait."""
    return tensor.to(device, copy=True, non_blocking=True)


def _continued(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The mask with `count` more tokens, all real."""
    return torch.nn.functional.pad(mask, (0, count), value=1)


def _slot(pages: list[int], token: int) -> int:
    return pages[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
