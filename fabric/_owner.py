"""What C gave us to give back, as the last thing that happens to it.

Of a set of objects that refer to each other the garbage collector calls every ``__del__`` in any
order: an engine could be freed, or memory unmapped, before an object that still uses it in its own
``__del__``. So what dies inside a collection is given back when that collection is over, and what
dies when the interpreter ends is left to the kernel.
"""

from __future__ import annotations

import collections
import gc
import sys
from collections.abc import Callable
from typing import Any

from ._native import lib

_late: collections.deque[Callable[[], None]] = collections.deque()
_collections = 0  # under way, in whatever thread


def _follow_collections(phase: str, _info: dict[str, int]) -> None:
    global _collections
    if phase == "start":
        _collections += 1
        return
    _collections -= 1
    while not _collections and _late:
        _late.popleft()()


gc.callbacks.append(_follow_collections)


def _give_back(
    action: Callable[[], None],
    finalizing: Any = sys.is_finalizing,
    late: Any = _late,
) -> None:
    if finalizing():
        return
    if _collections:
        late.append(action)
    else:
        action()


class EngineOwner:
    """Frees a C engine. In a forked child C does nothing."""

    __slots__ = ("_ptr",)

    def __init__(self, ptr: Any) -> None:
        self._ptr = ptr

    def __del__(self, give_back: Any = _give_back, free: Any = lib.fab_engine_free) -> None:
        ptr = self._ptr
        give_back(lambda: free(ptr))


class MappingOwner:
    """Unmaps memory of the C core."""

    __slots__ = ("_base", "_length")

    def __init__(self, base: int, length: int) -> None:
        self._base = base
        self._length = length

    def __del__(self, give_back: Any = _give_back, unmap: Any = lib.fab_unmap) -> None:
        base, length = self._base, self._length
        give_back(lambda: unmap(base, length))
