"""A forked child: the engine is the parent's, and the child's handles say so."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import fabric
from tests import commands
from tests.scale import scaled
from tests.test_bad_input import refusals, uses

if TYPE_CHECKING:
    from tests.harness import Farm
    from tests.node import State

SIZE = 65536
REFUSED = 9


def use_in_child(node: State, descriptor: bytes, address: bytes) -> tuple[dict[str, str], int]:
    """Use everything in a forked child; returns what went wrong and how the child left."""
    calls = uses(node, descriptor, address)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        wrong = refusals(calls)
        try:
            node.engine.close()
        except BaseException as error:
            wrong["close"] = repr(error)
        with open(writer, "w") as out:
            json.dump(wrong, out)
        sys.exit(7)  # the long way round: exit handlers and all
    os.close(writer)
    with open(reader) as replies:
        wrong = json.load(replies)
    return wrong, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_use_after_fork(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    b.counter("five", 5)
    wrong, status = a.call(use_in_child, descriptor, b.address)
    assert wrong == {}
    assert status == 7
    assert b.value("five") == 0
    assert b.differs("dst", 2) == ""
    # The parent noticed nothing.
    a.write("src", descriptor, imm=5)
    assert b.settled("five", 1) == 1
    assert b.differs("dst", 1) == ""


def test_forks_under_load(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", scaled(1 << 20), 1)
    descriptor = b.region("dst", scaled(1 << 20), 2)
    imm = b.counter("count")
    writing = a.start(write_many, descriptor, imm, 400, thread=True)
    for _ in range(10):
        assert a.call(fork_and_leave) == 0
        time.sleep(0.01)
    writing.result()
    assert b.settled("count", 400) == 400
    assert b.differs("dst", 1) == ""


def write_many(node: State, descriptor: bytes, imm: int, count: int) -> None:
    """Write the whole source again and again."""
    for _ in range(count):
        commands.write(node, "src", descriptor, {"imm": imm})


def fork_and_leave(node: State) -> int:
    """Fork a child that leaves at once; returns its status."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_engine_of_the_childs_own(farm: Farm) -> None:
    """A child that opens an engine for itself can use it like any other process.

    Not on efa, where libfabric cannot: there it is refused in words.
    """
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    imm = b.counter("count")
    a.write("src", descriptor)
    b.refill("dst", 2)
    if farm.provider == "efa":
        assert a.call(write_in_child, descriptor, imm) == REFUSED
        a.write("src", descriptor, imm=imm)
        assert b.differs("dst", 1) == ""
        return
    assert a.call(write_in_child, descriptor, imm) == 0
    assert b.settled("count", 1) == 1
    assert b.differs("dst", 3) == ""
    a.write("src", descriptor, imm=imm)
    assert b.settled("count", 2) == 2
    assert b.differs("dst", 1) == ""


def write_in_child(node: State, descriptor: bytes, imm: int) -> int:
    """Fork a child, open an engine there and write; returns the child's status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            commands.open_engine(node, "child", node.provider, node.nics, {})
            commands.make_region(node, "src", SIZE, 3, "alloc")
            commands.write(node, "src", descriptor, {"imm": imm})
            node.engine.close()
            status = 0
        except fabric.ProviderUnavailable as error:
            status = REFUSED if "forked" in str(error) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
