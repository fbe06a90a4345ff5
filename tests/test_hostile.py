"""A peer that ruins what it shares harms nobody but itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands
from tests.patterns import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Farm, Node
    from tests.node import State

pytestmark = pytest.mark.only("local")

SECONDS = 1.0  # how long the hostile process does its worst


def shared_mappings() -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, name) of the memory that this process shares and may write to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *name = line.split(None, 5)
        if permissions == "rw-s" and "memfd:" in "".join(name):
            start, end = (int(side, 16) for side in span.split("-"))
            yield start, end, "".join(name)


def scribble(node: State, seed: int) -> list[str]:
    """Write random bytes over everything that is shared, again and again; names it."""
    names = []
    deadline = time.monotonic() + SECONDS
    mappings = list(shared_mappings())
    rounds = 0
    while time.monotonic() < deadline:
        rounds += 1
        for start, end, name in mappings:
            noise = pattern(seed + rounds, min(end - start, 1 << 20)).tobytes()
            ctypes.memmove(start, noise, len(noise))
            names.append(name)
    return sorted(set(names))


def truncate(node: State, pid: int) -> list[str]:
    """Try to truncate every memfd that process `pid` has open; returns the ones that let us."""
    harmed = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{entry}"
        try:
            name = os.readlink(path)
            if not name.startswith("/memfd:"):
                continue
            fd = os.open(path, os.O_RDWR)
        except OSError:
            continue
        for size in (0, 1 << 30):
            try:
                os.ftruncate(fd, size)
            except PermissionError:
                continue
            harmed.append(f"{name} to {size}")
        os.close(fd)
    return harmed


def exchange(source: Node, target: Node) -> None:
    """Check that a write works, to the byte."""
    source.region("src", 100_000, 7)
    descriptor = target.region("fresh", 100_000, 8)
    imm = target.counter("fresh count")
    source.write("src", descriptor, imm=imm)
    assert target.settled("fresh count", 1) == 1
    assert target.differs("fresh", 7) == ""
    target.call(commands.release, "fresh count")
    target.call(commands.deregister, "fresh")
    source.call(commands.deregister, "src")


def connect(a: Node, b: Node) -> None:
    """Let two nodes write to each other, to both kinds of memory."""
    for one, other in ((a, b), (b, a)):
        one.region("hostile src", 100_000, 1)
        for kind in ("alloc", "numpy"):
            one.write("hostile src", other.region(f"hostile {kind}", 100_000, 2, kind))


def test_nothing_shared_can_be_truncated(farm: Farm) -> None:
    a, b, c = farm("a"), farm("b"), farm("c")
    connect(a, b)
    assert a.call(truncate, a.pid) == []
    assert a.call(truncate, b.pid) == []
    exchange(c, b)
    exchange(a, b)


@pytest.mark.parametrize("busy", [False, True])
def test_scribbling_over_what_is_shared(farm: Farm, busy: bool, seed: int) -> None:
    a, b, c = (farm(name, peer_timeout=2.0) for name in "abc")
    connect(a, b)
    exchange(c, b)
    b.region("private", 1 << 20, 5)
    if busy:
        b.start(hammer, "hostile src", a.region("hammered", 100_000, 2), thread=True)
    scribbling = a.start(scribble, seed, thread=True)
    for _ in range(3):
        exchange(c, b)
        time.sleep(0.2)
    try:
        assert scribbling.result(), "found nothing to scribble over"
    finally:
        a.kill()
    b.call(disconnect_somehow, a.address)
    assert b.alive()
    assert b.differs("private", 5) == ""
    assert b.call(commands.changes, "hostile alloc", 0.2) == ""
    exchange(c, b)
    exchange(b, c)


def hammer(node: State, source: str, descriptor: bytes) -> str:
    """Write until the peer is gone; says how that ended."""
    deadline = time.monotonic() + 20.0
    try:
        while time.monotonic() < deadline:
            commands.write(node, source, descriptor, {})
    except fabric.FabricError as error:
        return type(error).__name__
    return "never"


def disconnect_somehow(node: State, address: bytes) -> None:
    """Fence a dead peer, which must work within seconds, whatever it left behind."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        with contextlib.suppress(fabric.FencePending):
            node.engine.disconnect(commands.peer(address))
            return
        time.sleep(0.05)
    node.engine.disconnect(commands.peer(address))
