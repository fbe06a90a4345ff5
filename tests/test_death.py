"""Processes that die or hang in the middle of a transfer."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest

import fabric
from tests import commands
from tests.efa.emulator import UNRESPONSIVE_MS
from tests.harness import Farm, Node, let_devices_be_silent, wait_until
from tests.node import Failure, State, describe
from tests.scale import patient, scaled

PAGE = commands.LONG_PAGE
SLOTS = 64  # pages of a destination
PAGES = 32_768  # of the write that is cut short: seconds of work, its last page alone at the end
ACKNOWLEDGED = 500  # of which the sender must know some: not every write is acknowledged alone
MARK = 0xA5  # what the source holds; the destination holds zeros
TIMEOUT = patient(2.0)  # peer_timeout of these engines, in seconds
SLACK = patient(1.5)  # for two cores that others use as well, in seconds
pytestmark = pytest.mark.fences
CHILDREN = ["none", "python", "raw"]


def limit(provider: str) -> float:
    """Seconds within which the death of a process must be seen."""
    return 1.0 if provider == "local" else TIMEOUT + SLACK


def mark(node: State, name: str) -> None:
    """Fill a region with the byte that the destination does not hold."""
    commands.see(node, name)[:] = MARK


def landed(node: State, name: str) -> int:
    """Return how many bytes of the source are in a region that was zero."""
    view = commands.see(node, name)
    marks, zeros = int(np.count_nonzero(view == MARK)), int(np.count_nonzero(view == 0))
    assert marks + zeros == view.size, "bytes that are neither old nor new"
    return marks


def strike_when_partial(node: State, name: str, pid: int, number: int) -> float:
    """Send a signal when the first byte is in a region and the last is not; returns when."""
    view = commands.see(node, name)
    deadline = time.monotonic() + 20.0
    while view[0] == 0 and time.monotonic() < deadline:
        time.sleep(0)
    if view[0] == 0 or view[-1] != 0:
        raise AssertionError("nothing came, or all of it at once")
    os.kill(pid, number)
    return time.monotonic()


def die_when_counted(node: State, name: str, count: int) -> None:
    """Kill this process once a counter has got somewhere."""
    node.things[name].wait(count, timeout=20.0)
    os.kill(os.getpid(), signal.SIGKILL)


def when_it_failed(
    node: State, name: str, target: int, peers: list[bytes]
) -> tuple[float, Failure]:
    """Wait for a counter in vain; returns when that became clear, and how."""
    try:
        commands.counter_wait(node, name, target, 30.0, peers)
    except fabric.FabricError as error:
        return time.monotonic(), describe(error)
    raise AssertionError("the wait came to a good end")


def write_for_long(node: State, descriptor: bytes, imm: int) -> tuple[float, Failure | None]:
    """Write many pages, the last place only at the end; returns when that ended, and how."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    sources = np.zeros(PAGES, np.int32)
    targets = (np.arange(PAGES) % (SLOTS - 1)).astype(np.int32)
    targets[-1] = SLOTS - 1
    transfer = node.engine.write_pages(
        node.things["src"], remote, sources, targets, page_bytes=PAGE, imm=imm
    )
    try:
        transfer.wait(timeout=60.0)
    except fabric.FabricError as error:
        return time.monotonic(), describe(error)
    return time.monotonic(), None


def exchange(one: Node, other: Node) -> None:
    """Check that two engines still work with each other."""
    for source, target in ((one, other), (other, one)):
        source.region("check src", 100_000, 7)
        descriptor = target.region("check dst", 100_000, 8)
        imm = target.counter("check count")
        source.write("check src", descriptor, imm=imm)
        assert target.settled("check count", 1) == 1
        assert target.differs("check dst", 7) == ""
        target.call(commands.release, "check count")
        target.call(commands.deregister, "check dst")
        source.call(commands.deregister, "check src")


def fork_in(farm: Farm, node: Node, how: str) -> None:
    """Give a node a forked child, which outlives it and keeps what it inherited."""
    if how == "python":
        farm.adopt(node.call(commands.fork_python, 60.0))
    elif how == "raw":
        farm.adopt(node.call(commands.fork_raw))


def same_descriptors(farm: Farm, node: Node, before: list[str]) -> None:
    """Check that a process got rid of every file descriptor that a dead peer cost.

    On tcp the connection of the first contact is libfabric's, and is not closed one by one: it
    stays while a forked child of the dead process holds its other end, and goes with that child.
    """
    if farm.provider == "tcp":
        extra = list(node.call(commands.descriptors_open))
        for name in before:
            extra.remove(name)
        assert extra in ([], ["socket"])
        farm.kill_strangers()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: node.call(commands.descriptors_open) == before, 3.0, "leak")
    assert node.call(commands.descriptors_open) == before


@pytest.mark.parametrize("child", CHILDREN)
def test_the_sender_is_killed(farm: Farm, child: str) -> None:
    kill_the_sender(farm, child, "alloc")


@pytest.mark.only("local")
@pytest.mark.parametrize("child", CHILDREN)
def test_the_sender_is_killed_while_it_is_pulled_from(farm: Farm, child: str) -> None:
    kill_the_sender(farm, child, "numpy")


def kill_the_sender(farm: Farm, child: str, kind: str) -> None:
    """Kill the sender in the middle of a transfer to memory of this kind."""
    b, c = farm("b", peer_timeout=TIMEOUT), farm("c", peer_timeout=TIMEOUT)
    exchange(b, c)
    before = b.call(commands.descriptors_open)
    a = farm("a", peer_timeout=TIMEOUT)
    a.region("src", PAGE, None)
    a.call(mark, "src")
    descriptor = b.region("dst", SLOTS * PAGE, None, kind)
    imm = b.counter("count")
    a.write("src", descriptor, length=0, imm=imm)
    b.wait("count", 1)
    fork_in(farm, a, child)
    waiting = b.start(when_it_failed, "count", PAGES + 1, [a.address], thread=True)
    a.start(write_for_long, descriptor, imm, thread=True)
    struck = b.call(strike_when_partial, "dst", a.pid, signal.SIGKILL)
    failed, failure = waiting.result()
    assert failure.name == "PeerUnreachable", failure.traceback
    assert failed - struck < limit(farm.provider)
    b.call(commands.disconnect, a.address)
    value = b.value("count")
    assert 0 < b.call(landed, "dst") < SLOTS * PAGE
    assert b.call(commands.changes, "dst", 0.5) == ""
    assert b.value("count") == value < PAGES + 1
    exchange(b, c)
    b.call(commands.release, "count")
    b.call(commands.deregister, "dst")
    same_descriptors(farm, b, before)


@pytest.mark.parametrize("child", CHILDREN)
def test_the_receiver_is_killed(farm: Farm, child: str) -> None:
    kill_the_receiver(farm, child, "alloc")


@pytest.mark.only("local")
@pytest.mark.parametrize("child", CHILDREN)
def test_the_receiver_is_killed_while_it_pulls(farm: Farm, child: str) -> None:
    kill_the_receiver(farm, child, "numpy")


def kill_the_receiver(farm: Farm, child: str, kind: str) -> None:
    """Kill the receiver in the middle of a transfer to memory of this kind."""
    let_devices_be_silent()
    a, c = farm("a", peer_timeout=TIMEOUT), farm("c", peer_timeout=TIMEOUT)
    exchange(a, c)
    before = a.call(commands.descriptors_open)
    b = farm("b", peer_timeout=TIMEOUT)
    a.region("src", PAGE, 3)
    descriptor = b.region("dst", SLOTS * PAGE, 4, kind)
    imm = b.counter("count")
    a.write("src", descriptor, imm=imm)
    fork_in(farm, b, child)
    writing = a.start(write_for_long, descriptor, imm, thread=True)
    b.start(die_when_counted, "count", ACKNOWLEDGED)
    try:
        b.process.wait(30.0)
    except TimeoutError as error:
        ended = writing.result() if writing.done() else "not ended"
        raise AssertionError(
            f"the receiver lives: the writer has {ended}, {b.value('count')} of"
            f" {ACKNOWLEDGED} pages counted; writer {a.stats()}, receiver {b.stats()}"
        ) from error
    struck = time.monotonic()
    let_devices_be_silent(UNRESPONSIVE_MS)
    failed, failure = writing.result()
    assert failure is not None, "the transfer had ended before the receiver was killed"
    assert failure.name == "PeerUnreachable", failure.traceback
    assert failed - struck < limit(farm.provider)
    assert 0 < failure.attributes["acknowledged"] < PAGES
    exchange(a, c)
    a.call(commands.disconnect, b.address)
    a.call(commands.deregister, "src")
    exchange(a, c)
    same_descriptors(farm, a, before)


def wait_in_bits(node: State, name: str, address: bytes) -> float:
    """Wait a little, do something else, wait again; returns when the peer was found to be gone."""
    peers = [commands.peer(address)]
    deadline = time.monotonic() + 4 * TIMEOUT
    while time.monotonic() < deadline:
        try:
            node.things[name].wait(1 << 20, timeout=0.05, peers=peers)
        except fabric.PeerUnreachable:
            return time.monotonic()
        except fabric.WaitTimeout:
            time.sleep(0.03)
    raise AssertionError("nobody noticed")


def test_short_waits_see_that_a_peer_is_gone(farm: Farm) -> None:
    """Silence counts from wait to wait: a program that polls learns of a death as well."""
    a, b = farm("a", peer_timeout=TIMEOUT), farm("b", peer_timeout=TIMEOUT)
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    waiting = b.start(wait_in_bits, "count", a.address, thread=True)
    time.sleep(0.5)
    struck = time.monotonic()
    a.kill()
    assert waiting.result() - struck < limit(farm.provider)


def test_a_transfer_to_one_that_is_gone(farm: Farm) -> None:
    a, b = farm("a", peer_timeout=TIMEOUT), farm("b", peer_timeout=TIMEOUT)
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    b.kill()
    with pytest.raises(fabric.PeerUnreachable):
        a.write("src", descriptor)


def test_one_that_came_back_is_somebody_else(farm: Farm) -> None:
    a, b = farm("a", peer_timeout=TIMEOUT), farm("b", peer_timeout=TIMEOUT)
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    a.write("src", descriptor)
    old = b.address
    b.call(commands.close_engine)
    b.open(farm.provider, farm.nics, peer_timeout=TIMEOUT)
    assert b.address != old
    fresh = b.region("dst", 1000, 2)
    with pytest.raises(fabric.PeerUnreachable):
        a.write("src", descriptor)
    assert b.differs("dst", 2) == ""
    a.write("src", fresh)
    assert b.differs("dst", 1) == ""


def test_a_slow_wait_does_not_hold_up_other_peers(farm: Farm) -> None:
    """One dead peer delays nobody else's transfers."""
    a, b, c = (farm(name, peer_timeout=patient(5.0)) for name in "abc")
    exchange(a, c)
    exchange(a, b)
    a.region("src", scaled(8 << 20), 1)
    stuck = b.region("dst", scaled(8 << 20), 2, "numpy")
    good = c.region("dst", scaled(8 << 20), 2, "numpy")
    b.pause()
    for number in range(50):
        a.call(commands.begin_write, f"stuck {number}", "src", stuck, {})
    begin = time.monotonic()
    for _ in range(10):
        a.write("src", good)
    assert time.monotonic() - begin < patient(2.5)
    assert c.differs("dst", 1) == ""
    b.thaw()
    for number in range(50):
        a.call(commands.transfer_wait, f"stuck {number}")
    assert b.differs("dst", 1) == ""


# ---- processes that hang ----


def test_the_sender_hangs(farm: Farm, provider: str) -> None:
    a, b, c = (farm(name, peer_timeout=TIMEOUT) for name in "abc")
    exchange(b, c)
    a.region("src", PAGE, None)
    a.call(mark, "src")
    descriptor = b.region("dst", SLOTS * PAGE, None)
    imm = b.counter("count")
    a.write("src", descriptor, length=0, imm=imm)
    waiting = b.start(when_it_failed, "count", PAGES + 1, [a.address], thread=True)
    writing = a.start(write_for_long, descriptor, imm, thread=True)
    struck = b.call(strike_when_partial, "dst", a.pid, signal.SIGSTOP)
    failed, failure = waiting.result()
    assert failure.name in ("PeerUnreachable", "FencePending"), failure.traceback
    assert failed - struck < TIMEOUT + SLACK
    exchange(b, c)
    if not b.call(fenced, a.address):
        # It was stopped inside a write: the memory is in quarantine until it goes on.
        assert provider == "local"
        with pytest.raises(fabric.FencePending):
            b.call(commands.deregister, "dst", 0.5)
        a.thaw()
        wait_until(lambda: b.call(fenced, a.address), 5.0, "the fence stays pending")
    before, value = b.call(landed, "dst"), b.value("count")
    a.thaw()
    assert b.call(commands.changes, "dst", 1.0) == ""
    assert 0 < b.call(landed, "dst") == before < SLOTS * PAGE
    assert b.value("count") == value < PAGES + 1
    b.call(commands.deregister, "dst")
    failure = writing.result()[1]
    assert failure is not None
    assert failure.name == "PeerUnreachable", failure.traceback


def fenced(node: State, address: bytes) -> bool:
    """Try to fence a peer; False where it may still be inside a write."""
    try:
        node.engine.disconnect(commands.peer(address))
    except fabric.FencePending:
        return False
    return True


def test_the_receiver_hangs(farm: Farm) -> None:
    stop_the_receiver(farm, "alloc")


@pytest.mark.only("local")
def test_the_receiver_hangs_while_it_pulls(farm: Farm) -> None:
    stop_the_receiver(farm, "numpy")


def stop_the_receiver(farm: Farm, kind: str) -> None:
    """Stop the receiver in the middle of a transfer to memory of this kind."""
    a, b, c = (farm(name, peer_timeout=TIMEOUT) for name in "abc")
    exchange(a, c)
    a.region("src", PAGE, 3)
    descriptor = b.region("dst", SLOTS * PAGE, 4, kind)
    imm = b.counter("count")
    a.write("src", descriptor, imm=imm)
    b.wait("count", 1)
    a.call(commands.begin_long, "t", "src", descriptor, imm, PAGES)
    b.wait("count", 20)
    b.freeze()
    end = a.call(end_within, "t", 2 * TIMEOUT + SLACK)
    exchange(a, c)
    if end == "draining":
        # It was stopped inside a copy out of our memory, which stays pinned until it goes on.
        assert kind == "numpy"
        assert farm.provider == "local"
        with pytest.raises((fabric.WaitTimeout, fabric.FencePending)):
            a.call(commands.deregister, "src", 0.5)
        b.thaw()
        end = a.call(end_within, "t", 5.0)
    assert end == "PeerUnreachable"
    a.call(commands.deregister, "src")
    b.thaw()
    with pytest.raises((fabric.PeerUnreachable, fabric.CounterVoid)):
        b.wait("count", PAGES + 1, 5.0, [a.address])


def end_within(node: State, name: str, seconds: float) -> str:
    """Wait for the end of a transfer; returns its exception's name, or how far it got."""
    try:
        node.things[name].wait(timeout=seconds)
    except fabric.WaitTimeout as error:
        return error.phase
    except fabric.FabricError as error:
        return type(error).__name__
    return "done"


def test_a_receiver_that_hung_for_a_moment(farm: Farm) -> None:
    a, b = (farm(name, peer_timeout=patient(4.0)) for name in "ab")
    a.region("src", scaled(32 << 20), 3)
    descriptor = b.region("dst", scaled(32 << 20), 4, "numpy")
    imm = b.counter("count")
    a.write("src", descriptor, length=1, imm=imm)
    b.pause()
    a.call(commands.begin_write, "t", "src", descriptor, {"imm": imm})
    time.sleep(1.0)
    assert not a.call(commands.transfer_done, "t")
    b.thaw()
    a.call(commands.transfer_wait, "t")
    assert b.settled("count", 2) == 2
    assert b.differs("dst", 3) == ""
