"""Whoever connects to an engine's ports and keeps silent harms nobody, then or later."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import commands
from tests.harness import wait_until
from tests.scale import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Farm, Node
    from tests.node import State

pytestmark = pytest.mark.only("tcp")

LISTENS = "0A"
SECONDS = 10.0
NOISE = b"\xa5" * 512
HALF = bytes.fromhex("03 00 00 08") + bytes(28)
"""The head of libfabric's first message on a connection, which promises eight bytes more."""


def sockets_of(pid: int) -> set[str]:
    """Return the inode of each socket that a process has open."""
    found = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/{pid}/fd/{entry}")
            if name.startswith("socket:["):
                found.add(name[len("socket:[") : -1])
    return found


def ports_of(pid: int) -> list[tuple[str, int]]:
    """Return the IPv4 addresses at which a process listens."""
    mine, found = sockets_of(pid), []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state, inode = (line.split()[i] for i in (1, 3, 9))
        if state == LISTENS and inode in mine:
            host, port = local.split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


@contextlib.contextmanager
def silent(node: Node) -> Iterator[dict[tuple[str, int], socket.socket]]:
    """Connect to all ports of a node, wait until it has accepted us, and say nothing."""
    before, ports = len(sockets_of(node.pid)), ports_of(node.pid)
    with contextlib.ExitStack() as stack:
        here = {at: stack.enter_context(socket.create_connection(at)) for at in ports}
        wait_until(lambda: len(sockets_of(node.pid)) >= before + len(ports), SECONDS, "no accept")
        yield here


def speak(strangers: dict[tuple[str, int], socket.socket]) -> None:
    """Say what no peer would."""
    for stranger in strangers.values():
        with contextlib.suppress(ConnectionError):
            stranger.sendall(NOISE)


def is_over(stranger: socket.socket) -> bool:
    """Wait until the other side has ended the connection."""
    stranger.settimeout(patient(SECONDS))
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def both_ways(a: Node, b: Node, fill: int) -> None:
    """Check that bytes and counts arrive in both directions, from `a` first."""
    for source, target in ((a, b), (b, a)):
        source.region("source", 100_000, fill)
        descriptor, imm = target.region("target", 100_000, 0), target.counter("count")
        source.write("source", descriptor, imm=imm)
        assert target.settled("count", 1) == 1
        assert target.differs("target", fill) == ""
        target.call(commands.release, "count")
        target.call(commands.deregister, "target")
        source.call(commands.deregister, "source")


def test_strangers_who_are_silent_until_the_lane_is_closed(farm: Farm) -> None:
    """Otherwise libfabric would write what they say into memory that it has freed."""
    a, b = farm("a"), farm("b")
    at_first = set(ports_of(b.pid))
    for turn in range(5):
        both_ways(a, b, turn)
        with silent(b) as strangers:
            lanes = [stranger for at, stranger in strangers.items() if at not in at_first]
            assert lanes, "no lane listens"
            b.call(commands.disconnect, a.address)
            for stranger in lanes:
                assert is_over(stranger), "it was forgotten"
            speak(strangers)
            both_ways(b, a, turn + 100)
            speak(strangers)
        both_ways(b, a, turn + 200)


def test_nothing_is_left_of_a_stranger(farm: Farm) -> None:
    a, b = farm("a"), farm.bare("b")
    before = b.call(commands.descriptors_open)
    b.open(farm.provider, farm.nics)
    both_ways(a, b, 1)
    with silent(b) as strangers:
        b.call(commands.close_engine)
        assert all(is_over(stranger) for stranger in strangers.values())
        assert b.call(commands.descriptors_open) == before
    b.open(farm.provider, farm.nics)


def test_more_strangers_than_anybody_has_patience_for(farm: Farm) -> None:
    """They stand in the queue of the listening socket while its lane closes."""
    a, b = farm("a"), farm("b")
    at_first = set(ports_of(b.pid))
    both_ways(a, b, 1)
    lane = next(at for at in ports_of(b.pid) if at not in at_first)
    with contextlib.ExitStack() as stack:
        b.freeze()
        crowd = [stack.enter_context(socket.create_connection(lane)) for _ in range(100)]
        b.thaw()
        b.call(commands.disconnect, a.address)
        assert all(is_over(stranger) for stranger in crowd)
        both_ways(b, a, 2)


def test_half_a_first_message(farm: Farm) -> None:
    """Libfabric waits for the rest of it, with every lock."""
    a, b = farm("a"), farm("b")
    both_ways(a, b, 1)
    with silent(b) as strangers:
        for stranger in strangers.values():
            stranger.sendall(HALF)
        begin = time.monotonic()
        both_ways(a, b, 2)
        b.call(commands.disconnect, a.address)
        both_ways(b, a, 3)
        assert time.monotonic() - begin < patient(SECONDS / 2)


def leave_no_descriptor(node: State) -> list[int]:
    """Forbid this process to open one more file; returns the old limits."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as lowest:
        free = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, old[1]))
    return list(old)


def restore_descriptors(node: State, old: list[int]) -> None:
    """Take that back."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (old[0], old[1]))


def test_no_descriptor_is_left_to_look_with(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    at_first = set(ports_of(b.pid))
    both_ways(a, b, 1)
    with silent(b) as strangers:
        lanes = [stranger for at, stranger in strangers.items() if at not in at_first]
        old = b.call(leave_no_descriptor)
        b.call(commands.disconnect, a.address)
        assert all(is_over(stranger) for stranger in lanes)
        b.call(restore_descriptors, old)
        both_ways(b, a, 2)
