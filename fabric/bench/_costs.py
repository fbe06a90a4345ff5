"""What single calls take, in microseconds, and what idling takes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import selectors
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._engine import TransferEngine
from .._errors import FabricError
from ._burst import Burst
from ._result import microseconds

if TYPE_CHECKING:
    from .._transfer import Transfer

CALLS = 5000
ROUNDS = 9
FAN_IN = 1000
IDLE_SECONDS = 3.0
QUEUED = 500
"""Calls of one round that find the worker at work."""
BUSY_WRITES = 200
"""Large writes that may be made for them."""
PAGES = 1024
MIB = 1 << 20
WAIT_SECONDS = 10.0


class Rig:
    """Two engines on `local` in this process, and memory on both sides. To be closed."""

    def __init__(self) -> None:
        self.near = TransferEngine("local")
        self.far = TransferEngine("local")
        self.source = self.near.alloc(64 * MIB)
        self.target = self.far.alloc(64 * MIB)
        self.counter = self.far.counter()
        self.near.write(self.source, self.target.descriptor, length=8).wait(WAIT_SECONDS)

    def close(self) -> None:
        """Close both engines."""
        self.near.close(1)
        self.far.close(1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A call, and the most it may take."""

    name: str
    unit: str
    bound: float
    run: Callable[[Rig], list[float]]


def timed(call: Callable[[], Any], between: Callable[[Any], None] | None = None) -> float:
    """Return the median time of a call in microseconds, less that of an empty one."""
    now = time.perf_counter_ns
    times, empty = [], []
    for _ in range(CALLS):
        before = now()
        result = call()
        times.append(now() - before)
        if between is not None:
            between(result)
        before = now()
        empty.append(now() - before)
    return max(0.0, (microseconds(times, 0.5) or 0.0) - (microseconds(empty, 0.5) or 0.0))


def rounds(call: Callable[[], Any], between: Callable[[Any], None] | None = None) -> list[float]:
    """Return `timed` several times."""
    return [timed(call, between) for _ in range(ROUNDS)]


def _write(rig: Rig) -> list[float]:
    d, imm, write, source = rig.target.descriptor, rig.counter.id, rig.near.write, rig.source
    far = rig.far

    def drained(transfer: Transfer) -> None:
        far.progress()  # the receiver is awake, on this core

    return rounds(lambda: write(source, d, length=8, imm=imm), drained)


def _pages(rig: Rig, nbytes: int) -> list[float]:
    d, imm, write, source = rig.target.descriptor, rig.counter.id, rig.near.write_pages, rig.source
    pages = np.random.default_rng(0).permutation(PAGES).astype(np.int32)

    def drained(transfer: Transfer) -> None:
        transfer.wait(WAIT_SECONDS)
        rig.far.progress()

    def call() -> Transfer:
        return write(source, d, pages, pages, page_bytes=nbytes, imm=imm)

    return rounds(call, drained)


def _pages_inline(rig: Rig) -> list[float]:
    return _pages(rig, 8)


def _pages_queued(rig: Rig) -> list[float]:
    """Time calls while the worker copies a large write: they are queued behind it."""
    return [_queued(rig) for _ in range(ROUNDS)]


def _queued(rig: Rig) -> float:
    d, write, now = rig.target.descriptor, rig.near.write_pages, time.perf_counter_ns
    pages = np.random.default_rng(0).permutation(PAGES).astype(np.int32)
    times: list[int] = []
    for _ in range(BUSY_WRITES):
        busy = rig.near.write(rig.source, d, length=64 * MIB)
        queued: list[Transfer] = []
        while len(times) < QUEUED:
            before = now()
            transfer = write(rig.source, d, pages, pages, page_bytes=8)
            spent = now() - before
            if busy.done():
                break
            times.append(spent)
            queued.append(transfer)
        for transfer in (*queued, busy):
            transfer.wait(WAIT_SECONDS)
        if len(times) == QUEUED:
            return microseconds(times, 0.5) or 0.0
    raise FabricError("the worker was never at work for long enough")


def _satisfied_wait(rig: Rig) -> list[float]:
    return rounds(lambda: rig.counter.wait(0))


def _value(rig: Rig) -> list[float]:
    counter = rig.counter
    return rounds(lambda: counter.value)


class CountingSelector(selectors.DefaultSelector):
    """Counts how often an event loop woke up for a file descriptor that is not the loop's own."""

    def __init__(self) -> None:
        super().__init__()
        self.own: frozenset[int] = frozenset()
        self.wakes = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Look, as the base class does."""
        ready = super().select(timeout)
        self.wakes += any(key.fd not in self.own for key, _ in ready)
        return ready

    def keep(self, registered: Mapping[Any, selectors.SelectorKey]) -> None:
        """Take what is registered now as the loop's own."""
        self.own = frozenset(key.fd for key in registered.values())


def wakes_of_fan_in(rig: Rig, burst: Burst) -> int:
    """Return how often an event loop wakes up for a wait that many immediates fulfil."""
    selector = CountingSelector()
    with contextlib.closing(asyncio.SelectorEventLoop(selector)) as loop:
        selector.keep(selector.get_map())
        loop.run_until_complete(asyncio.wait_for(_resumed(rig, burst), WAIT_SECONDS))
        loop.run_until_complete(loop.shutdown_default_executor())
    return selector.wakes


def _fan_in_wakes(rig: Rig) -> list[float]:
    """Return the worst of several: none may wake the loop twice."""
    with contextlib.closing(Burst()) as burst:
        return [float(max(wakes_of_fan_in(rig, burst) for _ in range(5 * ROUNDS)))]


def _fan_in(rig: Rig) -> list[float]:
    """Time from the call that sends the last of many immediates until the coroutine runs again."""
    return asyncio.run(_resumes(rig))


async def _resumes(rig: Rig) -> list[float]:
    with contextlib.closing(Burst()) as burst:
        await _resumed(rig, burst)  # which connects
        return [await _resumed(rig, burst) for _ in range(5 * ROUNDS)]


async def _resumed(rig: Rig, burst: Burst) -> float:
    counter = rig.far.counter()

    async def awaits() -> int:
        await counter.reached(FAN_IN)
        return time.monotonic_ns()

    waiting = asyncio.ensure_future(awaits())
    await asyncio.sleep(0.005)  # the loop and the worker sleep
    burst.begin(rig.far.address, counter.id, FAN_IN)
    resumed = await asyncio.wait_for(waiting, WAIT_SECONDS)
    counter.close()
    return (resumed - burst.last()) / 1e3


def _idle(rig: Rig) -> list[float]:
    """Return what two idle engines take of a core, each, in percent."""
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(IDLE_SECONDS)
    return [100 * (time.process_time() - before) / IDLE_SECONDS / 2]


COSTS = (
    Cost("Python, write (receiver awake), p50", "us", 0.8, _write),
    Cost("Python, write_pages of 1024 x 8 B, p50", "us", 10.0, _pages_inline),
    Cost("Python, write_pages of 1024, queued behind others, p50", "us", 3.0, _pages_queued),
    Cost("Python, satisfied counter.wait, p50", "us", 0.3, _satisfied_wait),
    Cost("Python, counter.value, p50", "us", 0.1, _value),
    Cost("asyncio, last of 1000 immediates to coroutine, p50", "us", 40.0, _fan_in),
    Cost("asyncio, wakes of the loop for 1000 immediates, worst", "", 1.0, _fan_in_wakes),
    Cost("idle engine, of a core", "%", 0.1, _idle),
)
