"""Every table has a bound, and reaching it is an error that says so, never more than that."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric
from tests import commands
from tests.scale import patient, scaled

if TYPE_CHECKING:
    from tests.harness import Farm
    from tests.node import State

COUNTERS = 65536
REGIONS = 4096
TRANSFERS = 16384
SIZE = 4096
PATIENT = 60.0
TICKS = 10
"""How often an event loop comes round while a submission waits on it for room."""


def take_all_counters(node: State) -> None:
    """Open more counters than there are."""
    with node.engine.counter_block(COUNTERS):
        node.engine.counter()


def test_counters(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    with pytest.raises(fabric.QueueFull, match=str(COUNTERS)):
        b.call(take_all_counters)
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    assert b.settled("count", 1) == 1


def take_all_regions(node: State) -> int:
    """Register more regions than there are; returns how many went well."""
    memory = np.zeros((REGIONS + 1) * 8, np.uint8)
    regions = []
    try:
        for number in range(REGIONS + 1):
            regions.append(node.engine.register(memory[number * 8 : number * 8 + 8]))  # noqa: PERF401
    except fabric.QueueFull as error:
        if str(REGIONS) not in str(error):
            raise
    for region in regions:
        node.engine.deregister(region)
    return len(regions)


def test_regions(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    for _ in range(scaled(2)):
        assert a.call(take_all_regions) == REGIONS
    a.region("src", SIZE, 1)
    a.write("src", b.region("dst", SIZE, 2))
    assert b.differs("dst", 1) == ""


def take_all_transfers(node: State, descriptor: bytes, imm: int) -> int:
    """Submit until there is no more room; keeps the transfers, returns how many there are."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    transfers: list[fabric.Transfer] = []
    node.things["all"] = transfers
    try:
        while len(transfers) <= TRANSFERS:
            transfers.append(
                node.engine.write(node.things["src"], remote, length=8, imm=imm, timeout=0)
            )
    except fabric.QueueFull as error:
        if str(TRANSFERS) not in str(error):
            raise
    begin = time.monotonic()
    with pytest.raises(fabric.QueueFull):
        node.engine.write(node.things["src"], remote, length=8, imm=imm, timeout=0.3)
    if time.monotonic() - begin < 0.3:
        raise AssertionError("it did not wait for room")
    return len(transfers)


def write_when_there_is_room(node: State, descriptor: bytes, imm: int) -> None:
    """Submit on an event loop, which goes on meanwhile; its ticks until there was room are kept."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    node.things["ticks"] = 0

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.01)
            node.things["ticks"] += 1

    async def work() -> None:
        ticking = asyncio.create_task(tick())
        write = node.engine.write
        await (await node.engine.submit(write, node.things["src"], remote, length=8, imm=imm))
        ticking.cancel()

    asyncio.run(work())


def ticks_so_far(node: State) -> int:
    """Return how often the event loop has come round so far."""
    ticks: int = node.things.get("ticks", 0)
    return ticks


def wait_for_all(node: State) -> None:
    """Wait for the kept transfers."""
    for transfer in node.things.pop("all"):
        transfer.wait(timeout=30.0)


def test_transfers(farm: Farm) -> None:
    """Full means back-pressure: one may wait for room, in threads and in asyncio."""
    a, b = (farm(name, peer_timeout=PATIENT) for name in ("a", "b"))  # one of them stands still
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    b.pause()
    count = a.call(take_all_transfers, descriptor, imm)
    assert 0 < count <= TRANSFERS
    waiting = [
        a.start(commands.write, "src", descriptor, {"length": 8, "imm": imm}, thread=True),
        a.start(write_when_there_is_room, descriptor, imm, thread=True),
    ]
    deadline = time.monotonic() + patient(10.0)
    while a.call(ticks_so_far) <= TICKS:
        assert time.monotonic() < deadline, "the event loop was blocked"
        time.sleep(0.1)
    time.sleep(0.5)
    assert not any(pending.done() for pending in waiting)
    b.thaw()
    a.call(wait_for_all)
    for pending in waiting:
        pending.result()
    assert b.settled("count", count + 3) == count + 3
    assert b.differs("dst", 2, [(0, 1, 0, 8)]) == ""
    assert a.stats()["queue_full"] > 0
