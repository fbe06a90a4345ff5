"""What is particular to EFA, on emulated devices (tests/efa/run): never a result of EFA itself."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands
from tests.efa.emulator import NO_RECEIVES, Emulator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Farm, Node
    from tests.node import State

needs_emulator = pytest.mark.skipif(
    "EFA_EMULATOR" not in os.environ, reason="needs emulated EFA devices: tests/efa/run"
)
pytestmark = needs_emulator
everywhere = pytest.mark.only("efa", "efa-4")
old = pytest.mark.only("efa-old")
OLD, NEW = 41, 42
SIZE = 1 << 20
PAGE = 4096
RANGES = 10_000
SENDERS = 3
CREDIT = 64  # immediates of a lane that its receiver has not read
RECEIVES = 256 + 32  # of a NIC, and answers to strangers
MILLION = 1_000_000
ALLOWED, FORBIDDEN = ({"FABRIC_EFA_ALLOW_EMULATED": value} for value in "10")


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """The control file of this run, without faults before and after."""
    emulator = Emulator()
    with emulator.having(faults=emulator["faults"], lost_acks=0, lost_writes=0, gone=0, cq_limit=0):
        yield emulator


def mixed(node: State, descriptor: bytes, imm: int, ranges: int, seed: int) -> int:
    """Make writes, paged writes and scatters of random sizes; returns their ranges."""
    rng = random.Random(seed)
    remote = fabric.Descriptor.from_bytes(descriptor)
    source, engine = node.things["src"], node.engine
    under_way: list[fabric.Transfer] = []
    done = 0
    while done < ranges:
        offset = rng.randrange(SIZE - 70_000)
        length = rng.choice([0, 1, 100, 5000, 70_000])
        under_way.append(
            engine.write(
                source, remote, src_offset=offset, dst_offset=offset, length=length, imm=imm
            )
        )
        pages = rng.sample(range(SIZE // PAGE), rng.randrange(1, 60))
        under_way.append(engine.write_pages(source, remote, pages, pages, page_bytes=PAGE, imm=imm))
        rows = [(remote, i * 1000, i * 1000, 1000) for i in rng.sample(range(1000), 10)]
        under_way.append(engine.scatter(source, rows, imm=imm))
        done += 1 + len(pages) + len(rows)
        while len(under_way) > 60:
            under_way.pop(0).wait(timeout=60.0)
    under_way.append(engine.write(source, remote, imm=imm))
    for transfer in under_way:
        transfer.wait(timeout=60.0)
    return done + 1


@everywhere
def test_ten_thousand_ranges_are_exact(farm: Farm, emulator: Emulator, seed: int) -> None:
    """Out of order on every device: bytes and counts exact, and all of it device writes."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    a.write("src", descriptor, length=1)
    before = emulator.counters()
    ranges = a.call(mixed, descriptor, imm, RANGES, seed, within=120.0)
    b.wait("count", ranges, 30.0)
    assert b.differs("dst", NEW) == ""
    assert b.settled("count", ranges) == ranges
    after = emulator.counters()
    moved = {name: after[name] - before[name] for name in after}
    print(moved)
    pieces = a.stats()["tx_pieces"] - 1
    assert moved["write_imms"] == pieces >= ranges
    assert moved["write_bytes"] > 10 * moved["send_bytes"] > 0, "payload went as messages"
    assert moved["writes"] == moved["reads"] == 0
    if emulator["reorder_ns"]:
        assert moved["overtaken"] > ranges // 10, "nothing was out of order: it shows nothing"


def early_bytes(node: State, name: str, count: int) -> int:
    """Wait for each of so many writes in turn; returns how many were counted before their bytes."""
    view, counter = commands.see(node, "dst"), node.things[name]
    early = 0
    for number in range(1, count + 1):
        counter.wait(number, timeout=20.0)
        early += bool((view != number % 251).any())
        node.engine.send(node.things["sender"], b"next")
    return early


def write_in_turn(node: State, descriptor: bytes, imm: int, count: int) -> None:
    """Write a region full of 1, of 2, ...: the next when the receiver has looked."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    view = commands.see(node, "src")
    for number in range(1, count + 1):
        view[:] = number % 251
        node.engine.write(node.things["src"], remote, imm=imm).wait(timeout=20.0)
        node.engine.recv(timeout=20.0)


def keep_address(node: State, address: bytes) -> None:
    """Remember who writes."""
    node.things["sender"] = commands.peer(address)


@everywhere
def test_an_immediate_comes_last(farm: Farm) -> None:
    """Whatever order the packets have: what is counted is there. --early is the control."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    b.call(keep_address, a.address)
    writing = a.start(write_in_turn, descriptor, imm, 50, thread=True)
    early = b.call(early_bytes, "count", 50)
    writing.result()
    b.call(commands.drop, "sender")
    assert early == 0, f"{early} of 50 immediates came before their bytes"


def many_imms(node: State, address: bytes, imm: int, count: int) -> None:
    """Raise so many immediates, as fast as it goes."""
    under_way = [node.engine.write_imm(commands.peer(address), imm) for _ in range(count)]
    for transfer in under_way:
        transfer.wait(timeout=60.0)


@everywhere
def test_a_burst_overruns_no_completion_queue(farm: Farm, emulator: Emulator) -> None:
    """Many senders at one receiver, whose queue has few places: they wait for credit."""
    receiver = farm("r")
    imm = receiver.counter("count")
    places = SENDERS * CREDIT + RECEIVES
    emulator["cq_limit"] = places  # one too many would end the process
    senders = [farm(f"s{i}") for i in range(SENDERS)]
    running = [s.start(many_imms, receiver.address, imm, 3000) for s in senders]
    for work in running:
        work.result(120.0)
    assert receiver.settled("count", 3000 * SENDERS) == 3000 * SENDERS
    row = next(row for row in emulator.processes() if row["pid"] == receiver.pid)
    print(f"{row['cq_most']} of {places} places were taken")
    assert 0 < row["cq_most"] <= places
    assert row["cq_overruns"] == 0


def fails(node: State, descriptor: bytes, imm: int) -> list[str]:
    """Write; returns the class of the failure, its NIC, and its text."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    try:
        node.engine.write(node.things["src"], remote, imm=imm).wait(timeout=20.0)
    except fabric.TransferFailed as error:
        return [type(error).__name__, error.nic, str(error)]
    return ["done", "", ""]


@everywhere
@pytest.mark.parametrize("what", ["lost_writes", "lost_acks"])
def test_a_write_that_fails(farm: Farm, emulator: Emulator, what: str) -> None:
    """Executed or not: it fails with the device named, is never counted twice, and both go on."""
    a, b = farm("a", peer_timeout=3.0), farm("b", peer_timeout=3.0)
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    a.write("src", descriptor, length=1)
    emulator[what] = MILLION
    kind, nic, text = a.call(fails, descriptor, imm)
    emulator[what] = 0
    assert kind in ("TransferFailed", "PeerUnreachable"), text
    assert "rdmap" in (nic or text), text
    time.sleep(0.1)
    assert b.value("count") <= 1
    again(a, b, descriptor)
    assert b.settled("fresh", 1) == 1
    assert b.differs("dst", NEW) == ""


def again(a: Node, b: Node, descriptor: bytes) -> None:
    """Write under a fresh id, as often as it takes until both sides see that they may."""
    imm = b.counter("fresh")
    deadline = time.monotonic() + 10.0
    while a.call(fails, descriptor, imm)[0] != "done":
        assert time.monotonic() < deadline, "they do not come together again"
        b.call(commands.release, "fresh")
        imm = b.counter("fresh")
        # Either may have been told that the other is gone, and keeps it out until it is used here.
        b.call(speak, a.address)


def speak(node: State, address: bytes) -> None:
    """Use the peer's address, which lifts a bar; what it leads to does not matter."""
    try:
        node.engine.write_imm(commands.peer(address), 1).wait(timeout=2.0)
    except fabric.FabricError as error:
        print(f"the peer is not back yet: {error}")


@everywhere
def test_a_device_that_goes_away(farm: Farm, emulator: Emulator) -> None:
    """Transfers over it fail within the peer timeout, with its name; the others' go on.

    The two do not find each other again: libfabric waits for the message that was lost, as it would
    on EFA, where a peer that was unresponsive is gone for good.
    """
    a, b = farm("a", peer_timeout=5.0), farm("b", peer_timeout=5.0)
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    a.write("src", descriptor, length=1)
    begin = time.monotonic()
    with emulator.having(gone=1):
        kind, nic, text = a.call(fails, descriptor, imm)
        assert kind in ("TransferFailed", "PeerUnreachable"), text
        assert "rdmap16s0-rdm" in (nic or text), text
        assert time.monotonic() - begin < 7.0
    c = farm("c")
    c.region("src", SIZE, NEW)
    c.write("src", descriptor, imm=b.counter("fresh"))
    assert b.settled("fresh", 1) == 1
    assert b.differs("dst", NEW) == ""


@everywhere
def test_no_receives_are_waited_for(farm: Farm, emulator: Emulator) -> None:
    """RNR: control frames wait until the peer posts receives, and nothing is lost."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    before = emulator.counters()["rnr"]
    with emulator.having(faults=emulator["faults"] | NO_RECEIVES):
        pending = a.start(commands.write, "src", descriptor, {"imm": imm})
        time.sleep(0.5)
        assert not pending.done()
    pending.result(30.0)
    assert b.settled("count", 1) == 1
    assert b.differs("dst", NEW) == ""
    assert emulator.counters()["rnr"] > before


@everywhere
def test_keys_are_of_one_peer(trio: tuple[Node, Node, Node]) -> None:
    """The fence of one peer takes its keys alone: the other goes on with the same descriptor."""
    a, b, c = trio
    for node in (a, c):
        node.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    for node in (a, c):
        node.write("src", descriptor, imm=imm)
    running = c.start(mixed, descriptor, imm, 500, 1, thread=True)
    b.call(commands.disconnect, a.address)
    with pytest.raises(fabric.PeerUnreachable):
        a.write("src", descriptor, imm=imm)
    ranges = running.result(60.0)
    assert b.settled("count", 2 + ranges) == 2 + ranges
    for node in (a, c):
        node.call(commands.deregister, "src")
    b.call(commands.release, "count")
    b.call(commands.deregister, "dst")


def stale_of(address: bytes) -> bytes:
    """Return the address of an engine that is gone, whose queue pairs' numbers are in use again."""
    now = fabric.Address.from_bytes(address)
    # A blob is a token (8 bytes), a GID (16), a queue pair (2), padding (2), and its key (4).
    nics = tuple(
        nic._replace(blob=nic.blob[:28] + bytes(b ^ 0xFF for b in nic.blob[28:32]) + nic.blob[32:])
        for nic in now.nics
    )
    return bytes(fabric.Address(os.urandom(16), "stale", nics))


@everywhere
def test_a_stale_address_takes_nobody_s_immediates(farm: Farm) -> None:
    """The source of an immediate is a queue pair, while an address has a key besides."""
    a, b = farm("a", peer_timeout=2.0), farm("b", peer_timeout=2.0)
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    with pytest.raises(fabric.PeerUnreachable):
        b.call(commands.write_imm, stale_of(a.address), 1)
    a.call(commands.write_imm, b.address, imm, 3 * CREDIT)
    assert b.settled("count", 1 + 3 * CREDIT) == 1 + 3 * CREDIT


@everywhere
def test_peers_that_take_nothing_leave_room(farm: Farm) -> None:
    """All share one send queue; what is stuck in it is not all of it."""
    a, *stuck = (farm(name, peer_timeout=10.0) for name in "abcdef")
    free = farm("g", peer_timeout=10.0)
    a.region("src", SIZE, NEW)
    descriptors = [node.region("dst", SIZE, OLD) for node in (*stuck, free)]
    for descriptor in descriptors:
        a.write("src", descriptor)
    for node in stuck:
        node.pause()
    for descriptor in descriptors[:-1]:
        a.call(pour, descriptor)
    begin = time.monotonic()
    for _ in range(20):
        a.write("src", descriptors[-1])
    assert time.monotonic() - begin < 2.0
    for node in stuck:
        node.thaw()
    a.call(wait_for_all)
    assert [node.differs("dst", NEW) for node in stuck] == [""] * len(stuck)


def pour(node: State, descriptor: bytes) -> None:
    """Begin more writes than a send queue has places."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    transfers = node.things.setdefault("poured", [])
    for _ in range(300):
        transfers.append(node.engine.write(node.things["src"], remote, length=1000))


def wait_for_all(node: State) -> None:
    """Wait for what `pour` began."""
    for transfer in node.things.pop("poured"):
        transfer.wait(timeout=20.0)


@old
def test_emulated_writes_are_refused(farm: Farm) -> None:
    """A libfabric that would write with messages is refused, with the way out."""
    with pytest.raises(fabric.ProviderUnavailable, match="FABRIC_EFA_ALLOW_EMULATED"):
        farm("a", env=FORBIDDEN)


@old
def test_emulated_writes_cannot_be_fenced(farm: Farm) -> None:
    """Their keys are asked for once: what has begun may still land, and this is said."""
    a, b = (farm(name, env=ALLOWED) for name in "ab")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    b.region("other", SIZE, OLD)
    a.write("src", descriptor)
    with pytest.raises(fabric.FenceUnsupported, match="may still land"):
        b.call(commands.disconnect, a.address)
    with pytest.raises(fabric.FenceUnsupported, match="do not free or reuse"):
        b.call(commands.deregister, "dst")
    b.call(commands.deregister, "other")
    a.kill()
    with pytest.raises(fabric.PeerUnreachable):
        b.call(commands.write_imm, a.address, 1)
    with pytest.raises(fabric.FenceUnsupported, match="may still land"):  # for all that
        b.call(commands.disconnect, a.address)


@old
def test_emulated_writes_when_they_are_allowed(farm: Farm, emulator: Emulator) -> None:
    a, b = (farm(name, env=ALLOWED) for name in "ab")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    ranges = a.call(mixed, descriptor, imm, 300, 1, within=120.0)
    assert b.settled("count", ranges) == ranges
    assert b.differs("dst", NEW) == ""
    assert emulator.counters()["write_imms"] == 0
