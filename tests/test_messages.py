"""Two-sided messages: whole, in order per peer, bounded, and none lost."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands
from tests.harness import Farm, Node
from tests.patterns import pattern
from tests.scale import patient, scaled

if TYPE_CHECKING:
    from tests.node import State

LONGEST = 65536
SIZES = [0, 1, 4095, 4096, 4097, 8192, 65535, LONGEST]
Pair = tuple[Node, Node]
Trio = tuple[Node, Node, Node]


def payload(seed: int, number: int, longest: int = LONGEST) -> bytes:
    """Return the message of this number; most are short."""
    rng = random.Random(seed * 1_000_003 + number)
    length = min(
        longest, rng.choice([0, 1, 8, 300, rng.randrange(5000), rng.randrange(longest + 1)])
    )
    return pattern(seed + number, length).tobytes()


def send(node: State, address: bytes, message: bytes) -> None:
    """Send one message; returns when the other engine holds it."""
    node.engine.send(commands.peer(address), message).wait(timeout=30.0)


def receive(node: State, timeout: float | None = 20.0) -> tuple[bytes, bytes]:
    """Receive one message."""
    sender, message = node.engine.recv(timeout=timeout)
    return sender.id, bytes(message)


def send_many(node: State, address: bytes, seed: int, count: int) -> None:
    """Send numbered messages."""
    target = commands.peer(address)
    for number in range(count):
        last = node.engine.send(target, payload(seed, number))
    last.wait(timeout=30.0)


def receive_many(node: State, seeds: dict[bytes, int], count: int) -> dict[bytes, int]:
    """Receive `count` messages; each must be the next of its sender. Returns how many of each."""
    come = dict.fromkeys(seeds, 0)
    for _ in range(count):
        sender, message = receive(node)
        if message != payload(seeds[sender], come[sender]):
            raise AssertionError(f"message {come[sender]} is wrong: {len(message)} bytes")
        come[sender] += 1
    return come


@pytest.mark.parametrize("size", SIZES)
def test_sizes(pair: Pair, size: int) -> None:
    a, b = pair
    message = pattern(size, size).tobytes()
    a.call(send, b.address, message)
    assert b.call(receive) == (a.id, message)


def test_too_long(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(fabric.InvalidArgument, match=rf"(?s){LONGEST + 1}.*{LONGEST}"):
        a.call(send, b.address, bytes(LONGEST + 1))
    a.call(send, b.address, b"good")
    assert b.call(receive) == (a.id, b"good")


def send_kinds(node: State, address: bytes) -> None:
    """Send what is not bytes but can be seen as such."""
    target = commands.peer(address)
    for message in (b"x1", bytearray(b"x2"), memoryview(b"_x3_")[1:3]):
        node.engine.send(target, message).wait(timeout=10.0)


def test_any_bytes(pair: Pair) -> None:
    a, b = pair
    a.call(send_kinds, b.address)
    assert [b.call(receive)[1] for _ in range(3)] == [b"x1", b"x2", b"x3"]


def test_many_in_both_directions(pair: Pair, seed: int) -> None:
    a, b = pair
    count = scaled(2000, 200)
    sending = [
        a.start(send_many, b.address, seed, count, thread=True),
        b.start(send_many, a.address, seed + 1, count, thread=True),
    ]
    receiving = [
        a.start(receive_many, {b.id: seed + 1}, count),
        b.start(receive_many, {a.id: seed}, count),
    ]
    for pending in sending + receiving:
        pending.result(90.0)


def test_order_per_peer(trio: Trio, seed: int) -> None:
    a, b, c = trio
    count = 300
    seeds = {a.id: seed, c.id: seed + 1}
    sending = [
        node.start(send_many, b.address, seeds[node.id], count, thread=True) for node in (a, c)
    ]
    assert b.call(receive_many, seeds, 2 * count) == dict.fromkeys(seeds, count)
    for pending in sending:
        pending.result()


def fill_up(node: State, address: bytes, seed: int) -> int:
    """Send until there is no more room, and none comes either; returns how many were taken."""
    target = commands.peer(address)
    taken, full_since = 0, 0.0
    while taken < 100_000 and (not full_since or time.monotonic() - full_since < 0.3):
        try:
            node.engine.send(target, payload(seed, taken), timeout=0)
        except fabric.QueueFull:
            full_since = full_since or time.monotonic()
            time.sleep(0.01)
        else:
            taken, full_since = taken + 1, 0.0
    return taken


def test_back_pressure(pair: Pair, seed: int) -> None:
    """Nobody receives: sending stops at a bound, and what was taken arrives."""
    a, b = pair
    a.call(send, b.address, payload(seed, 0))
    assert b.call(receive_many, {a.id: seed}, 1) == {a.id: 1}
    count = a.call(fill_up, b.address, seed)
    assert 0 < count < 100_000, "the queue has no bound"
    blocked = a.start(send, b.address, payload(seed, count), thread=True)
    time.sleep(0.3)
    assert not blocked.done(), "a send that must wait for room came back"
    assert b.call(receive_many, {a.id: seed}, count + 1) == {a.id: count + 1}
    blocked.result()
    a.call(send, b.address, b"after")
    assert b.call(receive) == (a.id, b"after")


def test_a_full_receiver_still_takes_writes(pair: Pair, seed: int) -> None:
    """Messages that nobody takes hold up neither writes nor counts, nor other directions."""
    a, b = pair
    a.region("src", 1 << 20, 1)
    descriptor = b.region("dst", 1 << 20, 2)
    imm = b.counter("count")
    count = a.call(fill_up, b.address, seed)
    a.write("src", descriptor, imm=imm)
    assert b.settled("count", 1) == 1
    assert b.differs("dst", 1) == ""
    b.call(send, a.address, b"back")
    assert a.call(receive) == (b.id, b"back")
    b.call(receive_many, {a.id: seed}, count)


def test_nothing_to_receive(pair: Pair) -> None:
    _, b = pair
    for timeout in (0, 0.1):
        begin = time.monotonic()
        with pytest.raises(fabric.WaitTimeout):
            b.call(receive, timeout)
        assert time.monotonic() - begin < patient(1.0)


def test_a_message_before_anybody_receives(pair: Pair) -> None:
    a, b = pair
    a.call(send, b.address, b"early")
    time.sleep(0.2)
    assert b.call(receive, 5.0) == (a.id, b"early")


def test_a_waiting_receiver_is_woken(pair: Pair) -> None:
    a, b = pair
    waiting = b.start(receive, thread=True)
    time.sleep(0.3)
    a.call(send, b.address, b"wake up")
    assert waiting.result(patient(2.0)) == (a.id, b"wake up")


def receive_async(node: State, seeds: dict[bytes, int], count: int) -> dict[bytes, int]:
    """Receive on an event loop, which must stay free for others meanwhile."""
    come = dict.fromkeys(seeds, 0)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async def take() -> None:
        async for sender, message in node.engine.messages():
            key = sender.id
            if bytes(message) != payload(seeds[key], come[key]):
                raise AssertionError(f"message {come[key]} is wrong: {len(message)} bytes")
            come[key] += 1
            if sum(come.values()) == count:
                return

    async def both() -> None:
        ticking = asyncio.create_task(tick())
        await asyncio.wait_for(take(), 30.0)
        ticking.cancel()

    asyncio.run(both())
    if ticks == 0:
        raise AssertionError("the event loop was blocked")
    return come


def test_messages_on_an_event_loop(trio: Trio, seed: int) -> None:
    a, b, c = trio
    seeds = {a.id: seed, c.id: seed + 1}
    receiving = b.start(receive_async, seeds, 400)
    time.sleep(0.2)
    for node in (a, c):
        node.start(send_many, b.address, seeds[node.id], 200)
    assert receiving.result() == dict.fromkeys(seeds, 200)


def test_a_message_to_one_that_is_gone(farm: Farm) -> None:
    a, b = farm("a", peer_timeout=patient(2.0)), farm("b", peer_timeout=patient(2.0))
    a.call(send, b.address, b"one")
    assert b.call(receive) == (a.id, b"one")
    b.kill()
    with pytest.raises(fabric.PeerUnreachable):
        a.call(send, b.address, b"two")
