"""Pages: random sequences of calls against owners counted by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from flash_mla.pages import Pages


@pytest.mark.parametrize("seed", range(20))
def test_owners(seed: int) -> None:
    draw = random.Random(seed)
    pages, owned = Pages(3), Counter()
    for _ in range(300):
        step = draw.choice(("take", "take", "share", "release", "release", "enlarge"))
        taken = sorted(owned)
        if step == "take" and pages.free:
            for page in pages.take(draw.randint(1, pages.free)):
                assert page not in owned
                owned[page] = 1
        elif step == "share" and taken:
            chosen = draw.sample(taken, draw.randint(1, len(taken)))
            pages.share(chosen)
            owned.update(chosen)
        elif step == "release" and taken:
            chosen = draw.sample(taken, draw.randint(1, len(taken)))
            pages.release(chosen)
            owned.subtract(chosen)
            owned = +owned
        elif step == "enlarge" and len(pages) < 40:
            pages.enlarge(len(pages) + draw.randint(0, 5))
        assert (pages.used, pages.free) == (len(owned), len(pages) - len(owned))
        assert pages.any_shared == any(count > 1 for count in owned.values())
        assert all(pages.is_shared(page) == (count > 1) for page, count in owned.items())


def test_low_pages_go_first() -> None:
    pages = Pages(3)
    assert pages.take(2) == [0, 1]
    pages.enlarge(5)
    pages.release([0])
    assert pages.take(4) == [0, 2, 3, 4]
