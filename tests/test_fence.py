"""`disconnect` is a fence: when it has returned, nothing that the peer started lands any more."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands
from tests.patterns import difference
from tests.scale import patient, scaled

if TYPE_CHECKING:
    from tests.harness import Farm
    from tests.node import State

pytestmark = pytest.mark.fences
SIZE = scaled(4 << 20)
CALLS = 100  # that need the lock of an engine
LONG = 32_768  # pages: seconds of work
KINDS = ["alloc", "numpy"]
WRITTEN = 4096  # of so many bytes, one is another each time that `keep_writing` writes


def keep_writing(node: State, descriptor: bytes, imm: int | None) -> str:
    """Write with ever changing bytes, several at a time, until it fails; says how it failed."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    view = commands.see(node, "src")
    deadline = time.monotonic() + 30.0
    number = 0
    try:
        while time.monotonic() < deadline:
            number += 1
            view[::WRITTEN] = number % 251
            for transfer in [
                node.engine.write(node.things["src"], remote, imm=imm) for _ in range(3)
            ]:
                transfer.wait(timeout=20.0)
    except fabric.FabricError as error:
        return type(error).__name__
    return "never"


def see_writes(node: State, name: str) -> None:
    """Return as soon as a byte of a region has changed: then writes are provably under way."""
    view = commands.see(node, name)[::WRITTEN]
    before = view.copy()
    deadline = time.monotonic() + patient(10.0)
    while (view == before).all():
        assert time.monotonic() < deadline, "nothing is written: the test shows nothing"


def fence_and_watch(node: State, address: bytes, name: str) -> str:
    """Disconnect in the middle of writes, and watch a region from then on; says what changed."""
    see_writes(node, name)
    node.engine.disconnect(commands.peer(address))
    return commands.changes(node, name, 0.7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counted", [False, True])
def test_nothing_lands_after_disconnect(farm: Farm, kind: str, counted: bool) -> None:
    a, b = farm("a", peer_timeout=patient(5.0)), farm("b", peer_timeout=patient(5.0))
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2, kind)
    imm = b.counter("count") if counted else None
    for _ in range(3):
        writing = a.start(keep_writing, descriptor, imm, thread=True)
        before = b.stats()["rx_imms"]
        while counted and b.stats()["rx_imms"] < before + 3:
            time.sleep(0.01)
        assert b.call(fence_and_watch, a.address, "dst") == ""
        value = b.value("count") if counted else 0
        assert writing.result() == "PeerUnreachable"
        # Barred: what the peer starts now is refused, and changes nothing.
        for _ in range(2):
            with pytest.raises(fabric.PeerUnreachable):
                a.write("src", descriptor, imm=imm)
        assert b.call(commands.changes, "dst", 0.1) == ""
        assert not counted or b.value("count") == value
        # This side uses the peer's address again: that lifts the bar. As the peer was told that we
        # are unreachable, what is begun here before we hear of that fails.
        a.counter("back", 5)
        with pytest.raises(fabric.TransferFailed, match="begin it anew"):
            b.call(commands.write_imm, a.address, 5)
        b.call(commands.write_imm, a.address, 5)
        a.call(commands.release, "back")
        if imm is not None:
            b.call(commands.release, "count")
            imm = b.counter("count")
        a.refill("src", 3)
        a.write("src", descriptor, imm=imm)
        assert b.differs("dst", 3) == ""
        assert not counted or b.settled("count", 1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_transfer_that_was_cut_off_voids_nothing_here(farm: Farm, kind: str) -> None:
    """The count stays where it was: no immediate of a session that is over is counted."""
    a, b = farm("a"), farm("b")
    a.region("src", commands.LONG_PAGE, 1)
    descriptor = b.region("dst", 64 * commands.LONG_PAGE, 2, kind)
    imm = b.counter("count")
    # By another thread: what may hold up that call shall not hold up the fence.
    begun = a.start(commands.begin_long, "t", "src", descriptor, imm, LONG, thread=True)
    b.wait("count", 3)
    b.call(commands.disconnect, a.address)
    begun.result()
    value = b.value("count")
    assert b.call(commands.changes, "dst", 0.5) == ""
    assert b.value("count") == value < LONG
    assert a.call(commands.transfer_end, "t") == "PeerUnreachable"


@pytest.mark.only("local")
def test_calls_get_their_turn_beside_a_long_transfer(farm: Farm) -> None:
    """The worker copies without a pause, and still lets every call that needs its lock go first."""
    a, b = farm("a"), farm("b")
    a.region("src", commands.LONG_PAGE, 1)
    descriptor = b.region("dst", 64 * commands.LONG_PAGE, 2)
    imm = b.counter("count")
    a.call(commands.begin_long, "t", "src", descriptor, imm, LONG)
    b.wait("count", 3)
    turns = a.call(turns_of_calls, CALLS)
    assert b.value("count") < LONG, "the transfer is over"
    a.call(commands.transfer_cancel, "t")
    print(f"{turns} turns of the worker beside {CALLS} calls")
    assert turns < 4 * CALLS


def turns_of_calls(node: State, count: int) -> int:
    """Return how many turns the worker took while `count` calls needed its lock."""
    first = node.engine.stats().worker_turns
    for _ in range(count - 1):
        node.engine.stats()
    turns: int = node.engine.stats().worker_turns - first
    return turns


def test_disconnect_of_one_leaves_the_others(farm: Farm) -> None:
    a, b, c = farm("a"), farm("b"), farm("c")
    for node in (a, c):
        node.region("src", SIZE, 1)
    mine, theirs = b.region("mine", SIZE, 2), b.region("theirs", SIZE, 2)
    imm = b.counter("count")
    writing = a.start(keep_writing, mine, None, thread=True)
    c.write("src", theirs, imm=imm)
    b.call(see_writes, "mine")
    running = c.start(many_writes, theirs, imm, 50, thread=True)
    b.call(commands.disconnect, a.address)
    running.result()
    assert b.settled("count", 51) == 51
    assert b.differs("theirs", 1) == ""
    assert writing.result() == "PeerUnreachable"


def many_writes(node: State, descriptor: bytes, imm: int, count: int) -> None:
    """Write the whole source `count` times."""
    for _ in range(count):
        commands.write(node, "src", descriptor, {"imm": imm})


def test_a_wait_on_a_peer_that_this_side_disconnects(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    waiting = b.start(commands.counter_wait, "count", 2, 20.0, [a.address], thread=True)
    time.sleep(0.2)
    begin = time.monotonic()
    b.call(commands.disconnect, a.address)
    with pytest.raises(fabric.PeerUnreachable):
        waiting.result()
    assert time.monotonic() - begin < patient(1.0)


def test_disconnect_of_a_peer_that_never_came(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    b.call(commands.disconnect, a.address)
    a.region("src", 100, 1)
    descriptor = b.region("dst", 100, 2)
    with pytest.raises(fabric.PeerUnreachable):
        a.write("src", descriptor)
    assert b.differs("dst", 2) == ""


def test_disconnect_twice(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    b.counter("count", 1)
    a.call(commands.write_imm, b.address, 1)
    b.call(commands.disconnect, a.address)
    b.call(commands.disconnect, a.address)


def test_own_transfers_to_a_peer_that_is_disconnected(farm: Farm) -> None:
    """Disconnecting ends this side's transfers to the peer too, and names the peer."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2, "numpy")
    a.write("src", descriptor)
    b.freeze()
    a.call(commands.begin_write, "t", "src", descriptor, {})
    a.call(commands.disconnect, b.address)
    with pytest.raises(fabric.PeerUnreachable):
        a.call(commands.transfer_wait, "t", 5.0)
    a.call(commands.deregister, "src")


# ---- deregistering ----


@pytest.mark.parametrize("kind", KINDS)
def test_deregister_stops_the_writers(farm: Farm, kind: str) -> None:
    """A region that a peer is writing to: asked to stop, it does; nothing lands afterwards."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    doomed, other = b.region("doomed", SIZE, 2, kind), b.region("other", SIZE, 2, kind)
    writing = a.start(keep_writing, doomed, None, thread=True)
    assert b.call(deregister_and_watch, "doomed") == ""
    assert writing.result() == "TransferFailed"
    # Only the region is gone: the session goes on.
    a.refill("src", 1)
    a.write("src", other)
    assert b.differs("other", 1) == ""
    with pytest.raises(fabric.TransferFailed, match="region"):
        a.write("src", doomed)


def deregister_and_watch(node: State, name: str) -> str:
    """Deregister a region in the middle of writes and watch its bytes; says what changed."""
    see_writes(node, name)
    region, view = node.things.pop(name), commands.see(node, name)
    node.engine.deregister(region, timeout=10.0)
    deadline = time.monotonic() + 0.5
    before = view.copy()
    while time.monotonic() < deadline:
        if text := difference(view, before):
            return text
    return ""


def test_deregister_of_a_source_waits_for_its_transfers(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2, "numpy")
    imm = b.counter("count")
    a.write("src", descriptor, length=1, imm=imm)
    b.pause()
    a.call(commands.begin_write, "t", "src", descriptor, {"imm": imm})
    with pytest.raises(fabric.WaitTimeout):
        a.call(commands.deregister, "src", 0.3)
    b.thaw()
    a.call(commands.transfer_wait, "t")
    a.call(commands.deregister, "src")
    assert b.settled("count", 2) == 2
    assert b.differs("dst", 1) == ""


def test_deregister_fences_a_holder_that_does_not_answer(farm: Farm) -> None:
    a, b = farm("a", peer_timeout=patient(2.0)), farm("b", peer_timeout=patient(2.0))
    a.region("src", SIZE, 1)
    b.region("dst", SIZE, 2)
    a.write("src", b.call(descriptor_of, "dst"))
    a.freeze()
    begin = time.monotonic()
    b.call(commands.deregister, "dst", 10.0)
    assert time.monotonic() - begin < patient(5.0)
    a.thaw()


def descriptor_of(node: State, name: str) -> bytes:
    """Return the descriptor of a region."""
    return bytes(node.things[name].descriptor)


def test_fencing_a_descriptor_for_one_peer(farm: Farm) -> None:
    """Deregistering what one peer was given leaves the others' grants alone."""
    a, b, c = farm("a"), farm("b"), farm("c")
    for node in (a, c):
        node.region("src", SIZE, 1)
    shared = b.region("dst", SIZE, 2)
    private = b.call(make_private, "dst", a.address)
    a.write("src", private)
    c.write("src", shared)
    b.call(drop_private)
    with pytest.raises(fabric.TransferFailed, match="region"):
        a.write("src", private)
    b.refill("dst", 2)
    c.write("src", shared)
    assert b.differs("dst", 1) == ""


def make_private(node: State, name: str, address: bytes) -> bytes:
    """Make a descriptor for one peer and keep it."""
    node.things["private"] = node.things[name].descriptor_for(commands.peer(address))
    return bytes(node.things["private"])


def drop_private(node: State) -> None:
    """Take back the descriptor that was made for one peer."""
    node.engine.deregister(node.things.pop("private"), timeout=10.0)


def test_disconnect_from_many_threads(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    writing = a.start(keep_writing, descriptor, None, thread=True)
    b.call(see_writes, "dst")
    b.call(disconnect_in_threads, a.address)
    assert b.call(commands.changes, "dst", 0.3) == ""
    assert writing.result() == "PeerUnreachable"


def disconnect_in_threads(node: State, address: bytes) -> None:
    """Fence a peer from four threads at once."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            commands.disconnect(node, address)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
