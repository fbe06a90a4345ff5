"""What C gave us to give back, as the last thing that happens to it."""

from __future__ import annotations

from typing import Any

from ._native import ffi, lib


class _Number(int):
    """A number whose `__del__` gives back what it stands for.

    Of a set of objects that refer to each other the garbage collector calls every `__del__`, and
    what ffi.gc() registered, in any order: an engine could be freed before an object that calls C
    with it in its own `__del__`. An int without attributes is not seen by the collector. It dies
    when the last reference is dropped, which is after all of those.
    """

    __slots__ = ()


class EngineOwner(_Number):
    """Frees a C engine; made from its address. In a forked child C does nothing."""

    __slots__ = ()

    def __del__(self, free: Any = lib.fab_engine_free, cast: Any = ffi.cast) -> None:
        free(cast("fab_engine *", int(self)))


class MappingOwner(_Number):
    """Unmaps memory of the C core; made from its address << 64 | its length."""

    __slots__ = ()

    def __del__(self, unmap: Any = lib.fab_unmap) -> None:
        unmap(self >> 64, self & (1 << 64) - 1)
