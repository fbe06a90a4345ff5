"""Ten thousand writes at once: bytes and counts exact, and nothing left when they are over."""

from __future__ import annotations

import asyncio
import functools
import random
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric
from tests import commands
from tests.patterns import Bytes, difference, pattern
from tests.scale import scaled

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness import Farm, Node
    from tests.node import State

WRITES = 10_000
IDS = 8
THREADS = 4
WINDOW = 256  # writes that one thread has under way
OLD, NEW = 31, 32
GROWTH_BYTES = 4 << 20  # by which a process may grow in a second run
GROWTH_BLOCKS = 1000  # of Python's allocator; a run makes several times as many writes
Write = tuple[int, int, int, int]  # source offset, destination offset, length, which id


def plan(seed: int, count: int) -> tuple[list[Write], int]:
    """Return writes to disjoint destinations in random order, and the destination's size."""
    rng = random.Random(seed)
    limits = rng.choices([64, 4096, 32 << 10, 256 << 10], [40, 50, 9, 1], k=count)
    lengths = [rng.randrange(limit + 1) for limit in limits]
    order = rng.sample(range(count), count)
    writes, end = [], 0
    for index in order:
        start = end + rng.randrange(3)
        writes.append((rng.randrange(1 << 20), start, lengths[index], rng.randrange(IDS)))
        end = start + lengths[index]
    rng.shuffle(writes)
    return writes, end + 1


def write_from_threads(node: State, descriptor: bytes, ids: list[int], writes: list[Write]) -> None:
    """Make the writes from several threads, each with a window of its own."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    source = node.things["src"]

    def share(mine: list[Write]) -> None:
        under_way: list[fabric.Transfer] = []
        for src, dst, length, which in mine:
            if len(under_way) == WINDOW:
                under_way.pop(0).wait(timeout=30.0)
            under_way.append(
                node.engine.write(
                    source, remote, src_offset=src, dst_offset=dst, length=length, imm=ids[which]
                )
            )
        for transfer in under_way:
            transfer.wait(timeout=30.0)

    in_threads([functools.partial(share, writes[i::THREADS]) for i in range(THREADS)])


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run functions at the same time; the first exception of any is raised."""
    errors: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def write_from_asyncio(node: State, descriptor: bytes, ids: list[int], writes: list[Write]) -> None:
    """Make the writes from one event loop, thousands awaited at a time."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    source = node.things["src"]

    async def one(limit: asyncio.Semaphore, row: Write) -> None:
        src, dst, length, which = row
        async with limit:
            await node.engine.write(
                source, remote, src_offset=src, dst_offset=dst, length=length, imm=ids[which]
            )

    async def everything() -> None:
        limit = asyncio.Semaphore(4000)
        await asyncio.gather(*(one(limit, row) for row in writes))

    asyncio.run(everything())


def await_all(node: State, targets: list[int]) -> None:
    """Await the counters of all ids on one event loop."""

    async def everything() -> None:
        reached = [node.things[f"id {i}"].reached(target) for i, target in enumerate(targets)]
        await asyncio.wait_for(asyncio.gather(*reached), 60.0)

    asyncio.run(everything())


def expected(writes: list[Write], size: int) -> tuple[Bytes, list[int]]:
    """Return the destination after the writes, and the count of each id."""
    source = pattern(NEW, 2 << 20)
    result = pattern(OLD, size).copy()
    counts = [0] * IDS
    for src, dst, length, which in writes:
        result[dst : dst + length] = source[src : src + length]
        counts[which] += 1
    return result, counts


def wrong(node: State, writes: list[Write], size: int) -> str:
    """Compare the destination with what the writes must have made of it."""
    return difference(commands.see(node, "dst")[:size], expected(writes, size)[0])


def sizes(node: State) -> tuple[int, int]:
    """Return the resident bytes of the process, and the blocks that Python has allocated."""
    return commands.resident_bytes(node), sys.getallocatedblocks()


def storm(pair: tuple[Node, Node], descriptor: bytes, writes: list[Write], size: int) -> None:
    """Make all the writes, from threads and then from asyncio, and check what they did."""
    a, b = pair
    counts = expected(writes, size)[1]
    for make in (write_from_threads, write_from_asyncio):
        b.refill("dst", OLD)
        ids = [b.counter(f"id {i}") for i in range(IDS)]
        waiting = b.start(await_all, counts, thread=True)
        a.call(make, descriptor, ids, writes)
        waiting.result()
        assert [b.settled(f"id {i}", 0) for i in range(IDS)] == counts
        assert b.call(wrong, writes, size) == ""
        for i in range(IDS):
            b.call(commands.release, f"id {i}")


@pytest.mark.parametrize("kind", ["alloc", "numpy"])
def test_storm(farm: Farm, kind: str, seed: int) -> None:
    pair = a, b = farm("a"), farm("b")
    writes, size = plan(seed, scaled(WRITES, 4000))
    a.region("src", 2 << 20, NEW)
    descriptor = b.region("dst", size, OLD, kind)
    storm(pair, descriptor, writes, size)
    # What the allocators keep for themselves differs by some MiB from run to run, so a growth
    # must show twice; a leak of anything for each write would be there in every run.
    writes, size = plan(seed, scaled(WRITES, 1200))
    for attempt in (1, 2):
        before = [node.call(sizes) for node in pair]
        storm(pair, descriptor, writes, size)
        growth = np.subtract([node.call(sizes) for node in pair], before)
        if (growth < (GROWTH_BYTES, GROWTH_BLOCKS)).all():
            break
        assert attempt == 1, f"a and b grew by (bytes, blocks) {growth.tolist()}"
    assert a.settle() == b.settle() == {}
    assert a.stats()["transfers_failed"] == 0
    assert b.stats()["imm_stale"] == 0
