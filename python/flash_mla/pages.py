"""Which pages of a cache are free, and how many owners the others have: host bookkeeping, without a tensor."""

from __future__ import annotations

from collections.abc import Iterable


class Pages:
    """Page numbers 0 .. num_pages - 1, each free or with one owner or more.

    A page with several owners is shared: it may be read, and is copied before one of them writes.
    Errors are for the callers, who know what a page is wanted for: `take` needs enough free pages,
    `share` and `release` need pages that are taken.
    """

    def __init__(self, num_pages: int) -> None:
        self._owners = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # taken from the end: low pages first
        self._shares = 0  # owners beyond the first, over all pages

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._owners) - len(self._free)

    @property
    def any_shared(self) -> bool:
        return self._shares > 0

    def is_shared(self, page: int) -> bool:
        return self._owners[page] > 1

    def enlarge(self, num_pages: int) -> None:
        """Adds free pages, up to num_pages in all."""
        first = len(self._owners)
        self._owners.extend([0] * (num_pages - first))
        # Below the pages that are free already, so that low ones still go first.
        self._free[:0] = range(num_pages - 1, first - 1, -1)

    def take(self, count: int) -> list[int]:
        """`count` free pages, now with one owner each."""
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of `pages`."""
        for page in pages:
            self._owners[page] += 1
            self._shares += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each of `pages`; those without an owner are free, the first to be taken next."""
        freed = []
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page]:
                self._shares -= 1
            else:
                freed.append(page)
        self._free.extend(reversed(freed))
