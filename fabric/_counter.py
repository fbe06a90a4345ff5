"""Counters: how a receiver learns that writes have arrived."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ._core import listed
from ._errors import EngineClosed, InvalidArgument, check, error_of
from ._native import ffi, lib
from ._peer import Peer
from ._values import U64_MAX, in_slices, integer, nanoseconds

if TYPE_CHECKING:
    from ._core import Core

UNIT: int = lib.FAB_PIECE_UNIT
TARGET_MAX = U64_MAX // UNIT
FIRST_NS = 10_000_000
"""How long a wait for one counter takes the shortest way; most are over by then."""
_reached = lib.fab_counter_reached
_await = lib.fab_counter_await
Peers: TypeAlias = Iterable[Peer] | Peer | None


class _Cells:
    """Counters in a row, open in the C core."""

    __slots__ = ("_cells", "_core", "_final", "_handle", "id")

    def __init__(self, core: Core, wanted: int, count: int) -> None:
        self._core = core
        self._final: list[int] | None = None
        self._handle = check(lib.fab_counter_open(core.ptr, wanted, count))
        self.id: int = lib.fab_counter_id(core.ptr, self._handle)
        self._cells = [lib.fab_counter_cell(core.ptr, self._handle, i) for i in range(count)]

    def __del__(self) -> None:
        if getattr(self, "_final", ()) is None and hasattr(self, "_cells"):
            self.close()

    def _value(self, index: int) -> int:
        final = self._final
        return int(self._cells[index][0]) // UNIT if final is None else final[index]

    def close(self) -> None:
        """Release the ids. Counts that come later are for nobody; waits raise `EngineClosed`.

        A counter that is dropped is closed. Harmless to call again.
        """
        if self._final is None:
            self._final = [int(cell[0]) // UNIT for cell in self._cells]
            lib.fab_counter_close(self._core.ptr, self._handle)

    def _check_open(self) -> None:
        self._core.check_open()
        if self._final is not None:
            raise InvalidArgument(f"counter {self.id:#x} is closed")

    def _wait(
        self, targets: Sequence[int], timeout: float | None, peers: Peers, missing: Any
    ) -> int:
        """Wait for all counters at once; returns a code."""
        self._check_open()
        core, named = self._core, listed(peers)
        goals = ffi.new("uint64_t[]", targets)

        def look(slice_ns: int) -> int:
            return _valid(
                lib.fab_counter_wait(
                    core.ptr,
                    self._handle,
                    0,
                    goals,
                    len(targets),
                    slice_ns,
                    *core.peers(named),
                    missing,
                )
            )

        def call(slice_ns: int) -> int:
            return core.with_peers(named, functools.partial(look, slice_ns))

        return in_slices(call, nanoseconds("timeout", timeout))

    async def _reached(self, index: int, target: int, peers: Peers) -> None:
        self._check_open()
        core, named = self._core, listed(peers)

        def look(queue: int, tag: int) -> int:
            array, count = core.peers(named)
            return _valid(
                lib.fab_watch_counter(
                    core.ptr, queue, self._handle, index, target, array, count, tag
                )
            )

        def watch(queue: int, tag: int) -> int:
            return core.with_peers(named, functools.partial(look, queue, tag))

        code = await core.loop_queue().wait(watch)
        if code == 0:
            return
        if code == lib.FAB_E_CLOSED:
            core.check_open()
            raise EngineClosed(f"counter {self.id:#x} was closed during the wait")
        # The event has a code only: looking once more says it in words.
        goal = ffi.new("uint64_t[]", [target])
        again = lib.fab_counter_wait(
            core.ptr, self._handle, index, goal, 1, 0, *core.peers(named), ffi.NULL
        )
        raise error_of(code, None if again == code else "a peer that the wait named is gone")


def _valid(code: int) -> int:
    """Return a code of the C core; raise if it means that an argument was refused."""
    return check(code) if code == lib.FAB_E_INVALID else code


class ImmCounter(_Cells):
    """Counts the ranges that arrived under one id. Made by `TransferEngine.counter`.

    Attributes:
        id: what senders pass as ``imm``.
    """

    __slots__ = ("_cell",)

    def __init__(self, core: Core, wanted: int | None) -> None:
        number = -1 if wanted is None else integer("id", wanted, 0, lib.FAB_USER_ID_MAX)
        super().__init__(core, number, 1)
        self._cell = self._cells[0]

    def __repr__(self) -> str:
        state = " closed" if self._final is not None else ""
        return f"<ImmCounter {self.id:#x} at {self.value}{state}>"

    def __enter__(self) -> ImmCounter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def value(self) -> int:
        """Ranges that have arrived. Only grows. It is progress; `wait` is what proves bytes."""
        final = self._final
        value: int = self._cell[0] // UNIT if final is None else final[0]
        return value

    def wait(self, target: int, timeout: float | None = None, peers: Peers = None) -> None:
        """Wait until `target` ranges have arrived.

        Where the target covers every range that was started under this id, all their bytes are
        visible when this returns.

        Args:
            target: of the counter's value.
            timeout: seconds; None waits for ever, 0 only looks.
            peers: who the counts come from: the wait ends as soon as one of them is gone.

        Raises:
            WaitTimeout: not reached yet.
            CounterVoid: a write under this id failed: its count proves nothing.
            PeerUnreachable, FencePending: one of `peers` is gone; it may still be inside a write.
            InvalidArgument: a negative target, or the counter is closed.
        """
        if type(target) is int and 0 <= target <= TARGET_MAX and self._final is None:
            core = self._core
            if _reached(core.ptr, self._handle, self._cell, target):
                return  # it is so already
            limit = nanoseconds("timeout", timeout)
            if peers is None and limit:
                first = FIRST_NS if limit < 0 or limit > FIRST_NS else limit
                if _await(core.ptr, self._handle, target, first) == 0:
                    return
                if limit > 0:
                    timeout = (limit - first) / 1e9
        goal = integer("target", target, 0, TARGET_MAX)
        code = self._wait((goal,), timeout, peers, ffi.NULL)
        if code == lib.FAB_E_TIMEOUT:
            raise error_of(code, f"counter {self.id:#x} is at {self.value} of {goal}")
        check(code)

    async def reached(self, target: int, peers: Peers = None) -> None:
        """Wait in asyncio until `target` ranges have arrived; otherwise as `wait`.

        Cancelling it, e.g. by ``asyncio.wait_for``, changes nothing else.
        """
        await self._reached(0, integer("target", target, 0, TARGET_MAX), peers)


class CounterBlock(_Cells):
    """Counters with consecutive ids, waited on together. Made by `TransferEngine.counter_block`.

    Attributes:
        id: of the first; the ids of all are ``b.ids``, and ``b[i]`` is one of them.
    """

    __slots__ = ()

    def __init__(self, core: Core, count: int) -> None:
        super().__init__(core, -1, integer("n", count, 1, lib.FAB_MAX_COUNTERS))

    def __repr__(self) -> str:
        state = " closed" if self._final is not None else ""
        return f"<CounterBlock {self.id:#x} of {len(self)}{state}>"

    def __enter__(self) -> CounterBlock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> int:
        return self.ids[index]

    @property
    def ids(self) -> range:
        """What senders pass as ``imm``, one for each counter."""
        return range(self.id, self.id + len(self))

    @property
    def values(self) -> list[int]:
        """Ranges that have arrived, for each counter."""
        return [self._value(i) for i in range(len(self))]

    def wait(
        self, targets: Sequence[int] | int, timeout: float | None = None, peers: Peers = None
    ) -> list[int]:
        """Wait until every counter has reached its target.

        Args:
            targets: one for each counter, or one for all.
            timeout: seconds; None waits for ever, 0 only looks.
            peers: who the counts come from: the wait ends as soon as one of them is gone.

        Returns:
            Indices of the counters that are still below their target; empty when all are there.

        Raises:
            CounterVoid, PeerUnreachable, FencePending, InvalidArgument: as for `ImmCounter.wait`.
        """
        goals = self._goals(targets)
        missing = ffi.new("uint8_t[]", len(goals))
        code = self._wait(goals, timeout, peers, missing)
        if code == 0:
            return []
        if code != lib.FAB_E_TIMEOUT:
            check(code)
        return [index for index, flag in enumerate(ffi.buffer(missing)[:]) if flag]

    async def reached(self, targets: Sequence[int] | int, peers: Peers = None) -> None:
        """Wait in asyncio until every counter has reached its target; otherwise as `wait`."""
        named = listed(peers)
        waits = [
            asyncio.ensure_future(self._reached(index, goal, named))
            for index, goal in enumerate(self._goals(targets))
        ]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    def _goals(self, targets: Sequence[int] | int) -> list[int]:
        count = len(self)
        items = list(targets) if isinstance(targets, Iterable) else [targets] * count
        goals = [integer("targets", target, 0, TARGET_MAX) for target in items]
        if len(goals) != count:
            raise InvalidArgument(f"targets: {len(goals)} for {count} counters")
        return goals
