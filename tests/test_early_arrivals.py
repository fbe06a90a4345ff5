"""Counts that come before anybody asks, after nobody asks any more, and too many of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands
from tests.harness import Farm, Node, wait_until

if TYPE_CHECKING:
    from tests.node import State

EARLY_IDS = 4096  # FAB_MAX_EARLY_IDS: what a receiver keeps for one peer
Pair = tuple[Node, Node]


def raise_ids(node: State, address: bytes, first: int, count: int) -> None:
    """Raise `count` user ids, one after the other."""
    target = commands.peer(address)
    under_way: list[fabric.Transfer] = []
    for number in range(first, first + count):
        under_way.append(node.engine.write_imm(target, number))
        if len(under_way) == 512:
            for transfer in under_way:
                transfer.wait(timeout=20.0)
            under_way.clear()
    for transfer in under_way:
        transfer.wait(timeout=20.0)


@pytest.mark.parametrize("kind", ["alloc", "numpy"])
def test_writes_before_the_counter_exists_are_counted(pair: Pair, kind: str) -> None:
    a, b = pair
    a.region("src", 50_000, 2)
    descriptor = b.region("dst", 50_000, 1, kind)
    for start in range(0, 50_000, 10_000):
        options = {"src_offset": start, "dst_offset": start, "length": 10_000, "imm": 4711}
        a.write("src", descriptor, **options)
    b.counter("late", 4711)
    b.wait("late", 5)
    assert b.differs("dst", 2) == ""
    a.call(commands.write_imm, b.address, 4711)
    assert b.settled("late", 6) == 6


def test_early_counts_are_of_their_own_id(pair: Pair) -> None:
    a, b = pair
    for number, times in ((50_000, 3), (50_001, 1), (134_217_727, 2), (0, 1)):
        a.call(commands.write_imm, b.address, number, times)
    for number, times in ((134_217_727, 2), (50_000, 3), (0, 1), (50_001, 1), (50_002, 0)):
        b.counter(f"late {number}", number)
        assert b.settled(f"late {number}", times) == times


def test_a_straggler_counts_for_nobody(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, 2)
    descriptor = b.region("dst", 1000, 1)
    old = b.counter("old")
    stale = b.stats()["imm_stale"]
    b.call(commands.release, "old")
    fresh = [b.counter(f"fresh {i}") for i in range(64)]
    assert old not in fresh
    a.write("src", descriptor, imm=old)
    a.call(commands.write_imm, b.address, old)
    a.call(commands.write_imm, b.address, fresh[0])
    assert b.settled("fresh 0", 1) == 1
    assert [b.value(f"fresh {i}") for i in range(1, 64)] == [0] * 63
    assert b.stats()["imm_stale"] == stale + 2


def test_an_id_that_was_never_given_out_counts_for_nobody(pair: Pair) -> None:
    a, b = pair
    a.call(commands.write_imm, b.address, 1 << 27 | 3 << 16 | 9)
    known = b.counter("known")
    a.call(commands.write_imm, b.address, known)
    assert b.settled("known", 1) == 1
    assert b.stats()["imm_stale"] >= 1


def test_as_many_early_ids_as_the_table_holds(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.call(raise_ids, b.address, 0, EARLY_IDS)
    for number in (0, 1234, EARLY_IDS - 1):
        b.counter(f"early {number}", number)
        assert b.settled(f"early {number}", 1) == 1
    assert b.stats()["imm_overflow"] == 0


@pytest.mark.fences
def test_too_many_early_ids_void_the_user_ids_of_that_peer(farm: Farm) -> None:
    a, b, c = farm("a"), farm("b"), farm("c")
    chosen = b.counter("chosen")
    c.call(commands.write_imm, b.address, 900_000)
    a.call(raise_ids, b.address, 0, EARLY_IDS + 1)
    wait_until(lambda: b.stats()["imm_overflow"] > 0, 10.0, "nothing overflows")
    b.counter("early", 17)
    with pytest.raises(fabric.CounterVoid, match=str(EARLY_IDS)):
        b.wait("early", 1)
    b.counter("later", 800_000)
    with pytest.raises(fabric.CounterVoid, match=str(EARLY_IDS)):
        b.wait("later", 1)
    # The engine goes on: its own ids count, and so do all ids once that session is over.
    a.call(commands.write_imm, b.address, chosen)
    assert b.settled("chosen", 1) == 1
    b.call(commands.release, "early")
    b.call(commands.release, "later")
    b.call(commands.disconnect, a.address)
    b.counter("after", 700_000)
    c.call(commands.write_imm, b.address, 700_000)
    assert b.settled("after", 1) == 1


def test_closed_counters_of_user_ids_keep_nothing(pair: Pair) -> None:
    a, b = pair
    b.counter("first", 31337)
    a.call(commands.write_imm, b.address, 31337, 3)
    b.wait("first", 3)
    b.call(commands.release, "first")
    b.counter("second", 31337)
    a.call(commands.write_imm, b.address, 31337)
    assert b.settled("second", 1) == 1
