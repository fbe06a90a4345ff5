"""Which pages of a region are free."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from fabric import InvalidArgument

from .errors import PoolExhausted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fabric import MemoryRegion


class PagePool:
    """The pages of one registered region, by index. Any thread may call any method.

    A page is *free*, *held*, or *quarantined*: given up by its holder while writes of a peer may
    still land in it. `take` hands out free pages only, so no page has two holders, and nobody
    holds a page that a stranger may still write to.

    Args:
        region: the memory. The pool does not know how a page lies in it; the layout does.
        capacity: how many pages it holds.
    """

    def __init__(self, region: MemoryRegion, capacity: int) -> None:
        if capacity < 1:
            raise InvalidArgument(f"capacity: must be at least 1, not {capacity}")
        self.region = region
        self.capacity = capacity
        self._lock = threading.Lock()
        self._free = list(range(capacity - 1, -1, -1))
        self._held: set[int] = set()
        self._quarantined: set[int] = set()

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"<PagePool [{len(self._free)} free, {len(self._held)} held, "
                f"{len(self._quarantined)} quarantined]>"
            )

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages that have a holder."""
        return len(self._held)

    @property
    def quarantined(self) -> int:
        """Pages that wait until no write can land in them."""
        return len(self._quarantined)

    def take(self, count: int) -> tuple[int, ...]:
        """Hold `count` free pages, all or none.

        Raises:
            PoolExhausted: fewer than `count` are free.
        """
        if count < 0:
            raise InvalidArgument(f"count: must not be negative, not {count}")
        with self._lock:
            if count > len(self._free):
                raise PoolExhausted(
                    f"{count} pages asked for, {len(self._free)} of {self.capacity} are free"
                )
            pages = tuple(self._free.pop() for _ in range(count))
            self._held.update(pages)
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Free held pages, which no write can reach any more."""
        with self._lock:
            self._move(pages, self._held, "held")

    def quarantine(self, pages: Iterable[int]) -> None:
        """Give up held pages that a peer may still write to."""
        with self._lock:
            chosen = _chosen(pages, self._held, "held")
            self._held -= chosen
            self._quarantined |= chosen

    def restore(self, pages: Iterable[int]) -> None:
        """Free quarantined pages, now that no write can reach them any more."""
        with self._lock:
            self._move(pages, self._quarantined, "quarantined")

    def _move(self, pages: Iterable[int], source: set[int], state: str) -> None:
        chosen = _chosen(pages, source, state)
        source -= chosen
        self._free.extend(sorted(chosen, reverse=True))


def _chosen(pages: Iterable[int], source: set[int], state: str) -> set[int]:
    listed = list(pages)
    chosen = set(listed)
    if len(chosen) != len(listed):
        raise InvalidArgument("pages: a page is listed twice")
    if not chosen <= source:
        raise InvalidArgument(f"pages: page {min(chosen - source)} is not {state}")
    return chosen
