"""Opening, closing and leaving; who may connect; what an engine says about itself."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric
from tests import commands
from tests.harness import ROOT, Farm, Node, environment, wait_until
from tests.scale import patient, scaled

if TYPE_CHECKING:
    from tests.node import State

Pair = tuple[Node, Node]
SECRET = b"correct horse battery staple"


def open_and_close(node: State, provider: str, nics: list[str] | None, count: int) -> list[int]:
    """Open and close engines; returns the descriptors and threads that are open afterwards."""
    for _ in range(count):
        with fabric.TransferEngine(provider=provider, nics=nics) as engine:
            region = engine.alloc(4096)
            engine.counter()
            engine.register(np.zeros(100, np.uint8))
            region.numpy()[:4] = 7
            del region
    gc.collect()
    return [len(commands.descriptors_open(node)), commands.thread_count(node)]


def test_a_hundred_engines(farm: Farm) -> None:
    farm("probe")
    node = farm.bare("a")
    first = node.call(open_and_close, farm.provider, farm.nics, 10)
    # What an allocator keeps to itself grows until all that was ever needed at once is in use; a
    # leak would show in each round.
    growth = []
    for _ in range(2):
        memory = node.call(commands.resident_bytes)
        assert node.call(open_and_close, farm.provider, farm.nics, scaled(100, 20)) == first
        growth.append(node.call(commands.resident_bytes) - memory)
        if growth[-1] < 8 << 20:
            return
    raise AssertionError(f"the process grew by {growth} bytes")


def visit(node: State, provider: str, nics: list[str] | None, descriptor: bytes, imm: int) -> None:
    """Open an engine, write once with it, and close it."""
    with fabric.TransferEngine(provider=provider, nics=nics) as engine:
        source = engine.register(np.full(1000, 7, np.uint8))
        engine.write(source, fabric.Descriptor.from_bytes(descriptor), imm=imm).wait(timeout=10.0)


def descriptors_at_rest(node: Node) -> list[str]:
    """Return a node's descriptors once they stay the same: tcp closes some a while later."""
    seen: list[list[str]] = [[]]

    def same() -> bool:
        seen.append(node.call(commands.descriptors_open))
        time.sleep(0.5)
        return seen[-1] == seen[-2]

    wait_until(same, 10.0, "its descriptors come and go")
    return seen[-1]


def test_peers_that_come_and_go(farm: Farm) -> None:
    """Engines that connect, write and leave cost the one that stays nothing."""
    b, a = farm("b"), farm.bare("a")
    descriptor = b.region("dst", 1000, 2)
    imm = b.counter("count")
    for _ in range(3):
        a.call(visit, farm.provider, farm.nics, descriptor, imm)
    b.wait("count", 3)
    wait_until(lambda: b.stats()["peers_up"] == 0, 5.0, "peers that left are still up")
    fds, threads = descriptors_at_rest(b), b.call(commands.thread_count)
    own = [descriptors_at_rest(a), a.call(commands.thread_count)]
    for _ in range(20):
        a.call(visit, farm.provider, farm.nics, descriptor, imm)
    assert b.settled("count", 23) == 23
    wait_until(lambda: b.stats()["peers_up"] == 0, 5.0, "peers that left are still up")
    assert descriptors_at_rest(b) == fds
    assert b.call(commands.thread_count) == threads
    assert [descriptors_at_rest(a), a.call(commands.thread_count)] == own


def close_under_load(node: State, descriptor: bytes) -> list[str]:
    """Close with transfers and waits outstanding; returns how they ended."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    ends: list[str] = []

    def wait() -> None:
        try:
            node.things["count"].wait(1, timeout=30.0)
        except fabric.FabricError as error:
            ends.append(type(error).__name__)

    thread = threading.Thread(target=wait)
    thread.start()
    transfers = [node.engine.write(node.things["src"], remote) for _ in range(20)]
    time.sleep(0.1)
    node.engine.close()
    thread.join(10.0)
    ends.extend(commands.end_of(transfer) for transfer in transfers)
    node.engine.close()
    return ends


def test_close_with_transfers_outstanding(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", scaled(64 << 20), 1)
    descriptor = b.region("dst", scaled(64 << 20), 2, "numpy")
    a.counter("count")
    a.write("src", descriptor, length=1)
    begin = time.monotonic()
    ends = a.call(close_under_load, descriptor)
    assert time.monotonic() - begin < patient(20.0)
    assert ends[0] == "EngineClosed"
    assert len(ends) == 21
    assert set(ends[1:]) <= {"done", "EngineClosed", "PeerUnreachable", "TransferCancelled"}
    assert b.call(commands.changes, "dst", 0.3) == ""
    c = farm("c")
    c.region("src", 100, 3)
    c.write("src", descriptor)


def test_close_with_a_peer_that_hangs(farm: Farm) -> None:
    a, b = farm("a", peer_timeout=patient(2.0)), farm("b", peer_timeout=patient(2.0))
    a.region("src", 1 << 20, 1)
    descriptor = b.region("dst", 1 << 20, 2, "numpy")
    a.write("src", descriptor)
    b.freeze()
    a.call(commands.begin_write, "t", "src", descriptor, {})
    begin = time.monotonic()
    a.call(commands.close_engine)
    assert time.monotonic() - begin < patient(6.0)
    b.thaw()


LEAVE = """
import contextlib, sys, threading
import numpy as np
import fabric
engine = fabric.TransferEngine(provider=sys.argv[1], nics=sys.argv[3].split() or None,
                               callbacks=True)
remote = fabric.Descriptor.from_bytes(bytes.fromhex(sys.argv[2]))
source = engine.register(np.zeros(len(remote), np.uint8))
transfers = [engine.write(source, remote) for _ in range(10)]
counter = engine.counter()
if sys.argv[4] == "thread":
    def wait():
        with contextlib.suppress(fabric.EngineClosed):
            counter.wait(1)
    threading.Thread(target=wait, daemon=True).start()
    engine.write(source, remote).add_done_callback(print)
if sys.argv[4] == "error":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["plain", "thread", "error"])
def test_leaving_without_closing(farm: Farm, how: str) -> None:
    """The interpreter exits at once, and says nothing."""
    b = farm("b")
    descriptor = b.region("dst", scaled(8 << 20), 2).hex()
    nics = " ".join(farm.nics or ())
    begin = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "ignore",
            "-c",
            LEAVE,
            farm.provider,
            descriptor,
            nics,
            how,
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=patient(30.0),
        check=False,
    )
    assert done.returncode == (3 if how == "error" else 0), done.stderr.decode()
    assert b"Error" not in done.stderr, done.stderr.decode()
    assert b"Exception" not in done.stderr, done.stderr.decode()
    assert time.monotonic() - begin < patient(15.0)
    wait_until(lambda: b.stats()["peers_up"] == 0, 5.0, "the peer that left is still up")


# ---- who may connect ----


def connect(a: Node, b: Node) -> None:
    """Write one byte-checked region from one node to another."""
    if a.call(has, "src") is False:
        a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    a.write("src", descriptor)
    assert b.differs("dst", 1) == ""


def has(node: State, name: str) -> bool:
    """Return whether the node has a thing of this name."""
    return name in node.things


def test_the_same_secret(farm: Farm) -> None:
    connect(farm("a", secret=SECRET), farm("b", secret=SECRET))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(SECRET, SECRET + b"!"), (None, SECRET), (SECRET, None), (b"x" * 64, SECRET)],
)
def test_another_secret(farm: Farm, ours: bytes | None, theirs: bytes | None) -> None:
    a, b = farm("a", secret=ours), farm("b", secret=theirs)
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    begin = time.monotonic()
    with pytest.raises(fabric.PeerUnreachable, match="secret"):
        a.write("src", descriptor)
    assert time.monotonic() - begin < patient(5.0)
    assert b.differs("dst", 2) == ""
    assert a.stats()["peers_up"] == b.stats()["peers_up"] == 0
    # Whoever knows the secret is not kept out by one who does not.
    connect(farm("c", secret=theirs), b)


def open_with_accept(node: State, provider: str, nics: list[str] | None, admit: str) -> bytes:
    """Open an engine that asks who comes; `admit` is a label, or what the callback does."""

    def accept(peer: object) -> bool:
        node.things["asked"] = str(peer)
        if admit == "raise":
            raise RuntimeError("cannot decide")
        return admit in str(peer)

    node.engine = fabric.TransferEngine(provider=provider, nics=nics, accept=accept)
    return bytes(node.engine.address)


def thing(node: State, name: str) -> object:
    """Return a thing that can cross a pipe."""
    return node.things.get(name)


@pytest.mark.parametrize("admit", ["nobody of this name", "raise"])
def test_accept_refuses(farm: Farm, admit: str) -> None:
    a, b = farm("a", label="the-peer-a"), farm.bare("b")
    b.address = b.call(open_with_accept, farm.provider, farm.nics, admit)
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    with pytest.raises(fabric.PeerUnreachable, match="refused"):
        a.write("src", descriptor)
    assert b.differs("dst", 2) == ""
    assert "the-peer-a" in b.call(thing, "asked")


def test_accept_admits(farm: Farm) -> None:
    a, b = farm("a", label="the-peer-a"), farm.bare("b")
    b.address = b.call(open_with_accept, farm.provider, farm.nics, "the-peer-a")
    connect(a, b)
    with pytest.raises(fabric.PeerUnreachable, match="refused"):
        connect(farm("c", label="the-peer-c"), b)
    connect(a, b)


def test_both_sides_connect_at_once(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    for _ in range(6):
        ids = {node: node.counter("count") for node in (a, b)}
        running = [
            one.start(commands.write_imm, other.address, ids[other], 50)
            for one, other in ((a, b), (b, a))
        ]
        for pending in running:
            pending.result()
        for node in (a, b):
            assert node.settled("count", 50) == 50
            assert node.stats()["peers_up"] == 1
        for node in (a, b):
            node.call(commands.close_engine)
            node.open(farm.provider, farm.nics)


# ---- memory and statistics ----


def keep_only_the_region(node: State, descriptor: bytes) -> None:
    """Register memory that nobody else holds on to, and write from it."""
    region = node.engine.register(np.full(1 << 20, 9, np.uint8))
    gc.collect()
    node.engine.write(region, fabric.Descriptor.from_bytes(descriptor)).wait(timeout=10.0)
    node.engine.deregister(region, timeout=10.0)


def test_a_region_keeps_its_memory_alive(pair: Pair) -> None:
    a, b = pair
    descriptor = b.region("dst", 1 << 20, 2)
    a.call(keep_only_the_region, descriptor)
    assert b.call(all_bytes, "dst") == {9}


def all_bytes(node: State, name: str) -> set[int]:
    """Return which values occur in a region."""
    return {int(value) for value in np.unique(commands.see(node, name))}


def look_after_deregister(node: State) -> str:
    """Look at allocated memory through a view that outlives its region."""
    region = node.engine.alloc(1 << 16)
    view = np.frombuffer(memoryview(region), np.uint8)
    view[:] = 5
    node.engine.deregister(region, timeout=5.0)
    del region
    gc.collect()
    return "good" if (view == 5).all() else "changed"


def test_a_view_outlives_its_region(pair: Pair) -> None:
    """No view ever points to memory that is gone."""
    a, _ = pair
    assert a.call(look_after_deregister) == "good"


# torch takes a minute to be imported in the SoftRoCE guest
@pytest.mark.only("local", "tcp", "efa", "efa-4", "efa-old")
def test_tensors_and_arrays_of_a_region(farm: Farm, torch: tuple[str, ...]) -> None:
    a = farm("a", modules=torch)
    assert a.call(views_of_a_region) == [77, 77, 77]


def views_of_a_region(node: State) -> list[int]:
    """Look at one byte of a region in three ways."""
    region = node.engine.alloc(4096)
    node.things["region"] = region
    memoryview(region)[100] = 77
    return [int(memoryview(region)[100]), int(region.numpy()[100]), int(region.tensor()[100])]


def test_stats(pair: Pair) -> None:
    a, b = pair
    a.region("src", 10_000, 1)
    descriptor = b.region("dst", 10_000, 2)
    imm = b.counter("count")
    a.write("src", descriptor, length=1)
    before = [node.stats() for node in pair]
    for length in (10_000, 5000, 0):
        a.write("src", descriptor, length=length, imm=imm)
    b.wait("count", 3)
    after = [node.stats() for node in pair]
    grown = [
        {key: new[key] - old[key] for key in new} for old, new in zip(before, after, strict=True)
    ]
    assert grown[0]["tx_bytes"] == 15_000
    assert grown[0]["tx_ranges"] == 3
    assert grown[0]["transfers_done"] == 3
    assert grown[0]["transfers_failed"] == 0
    assert grown[1]["rx_imms"] == 3
    assert after[0]["peers_up"] >= 1


def test_addresses(pair: Pair) -> None:
    for node in pair:
        address = fabric.Address.from_bytes(node.address)
        assert bytes(address) == node.address
        assert fabric.Address.parse(str(address)) == address
        assert hash(fabric.Address.parse(str(address))) == hash(address)
    assert pair[0].address != pair[1].address
