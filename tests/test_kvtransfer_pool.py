"""The page pool: no page has two holders, and none is handed out while writes may land."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fabric import InvalidArgument
from kvtransfer import PagePool, PoolExhausted

CAPACITY = 12
REGION: Any = SimpleNamespace()  # the pool never looks at it


class PoolMachine(RuleBasedStateMachine):
    """The pool against three plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(REGION, CAPACITY)
        self.held: set[int] = set()
        self.quarantined: set[int] = set()

    @rule(count=st.integers(0, CAPACITY + 2))
    def take(self, count: int) -> None:
        free = CAPACITY - len(self.held) - len(self.quarantined)
        if count > free:
            with pytest.raises(PoolExhausted, match=f"{free} of {CAPACITY}"):
                self.pool.take(count)
            return
        pages = set(self.pool.take(count))
        assert len(pages) == count
        assert not pages & (self.held | self.quarantined)
        assert pages <= set(range(CAPACITY))
        self.held |= pages

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        pages = self.some(data, self.held)
        self.pool.give_back(pages)
        self.held -= pages

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        pages = self.some(data, self.held)
        self.pool.quarantine(pages)
        self.held -= pages
        self.quarantined |= pages

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        pages = self.some(data, self.quarantined)
        self.pool.restore(pages)
        self.quarantined -= pages

    @rule(page=st.integers(-2, CAPACITY + 2))
    def wrong(self, page: int) -> None:
        """A page that is not in the right state changes nothing."""
        if page not in self.held:
            for refuse in (self.pool.give_back, self.pool.quarantine):
                with pytest.raises(InvalidArgument, match=f"page {page} is not held"):
                    refuse([*self.held, page])
        if page not in self.quarantined:
            with pytest.raises(InvalidArgument, match=f"page {page} is not quarantined"):
                self.pool.restore([*self.quarantined, page])

    @invariant()
    def counts(self) -> None:
        held, quarantined = len(self.held), len(self.quarantined)
        assert (self.pool.held, self.pool.quarantined) == (held, quarantined)
        assert self.pool.free == CAPACITY - held - quarantined

    @staticmethod
    def some(data: st.DataObject, pages: set[int]) -> set[int]:
        return data.draw(st.sets(st.sampled_from(sorted(pages)))) if pages else set()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


def test_a_page_listed_twice_is_refused() -> None:
    pool = PagePool(REGION, 4)
    (page,) = pool.take(1)
    with pytest.raises(InvalidArgument, match="twice"):
        pool.give_back([page, page])
    assert (pool.held, pool.free) == (1, 3)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_pool_has_pages(capacity: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^capacity:"):
        PagePool(REGION, capacity)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^count:"):
        PagePool(REGION, 4).take(-1)
