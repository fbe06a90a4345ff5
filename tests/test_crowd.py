"""Sixteen engines in four processes connect all to all at the same moment."""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING

import fabric
from tests import commands
from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.harness import Farm, Node
    from tests.node import State

PROCESSES = 4
ENGINES = 4  # in each process
ALL = PROCESSES * ENGINES
IMM = 5  # of everybody


def open_engines(node: State, provider: str, turns: list[list[str] | None]) -> list[bytes]:
    """Open several engines, with the NICs in turns; returns their addresses."""
    for i in range(ENGINES):
        engine = fabric.TransferEngine(
            provider=provider, nics=turns[i % len(turns)], peer_timeout=30.0
        )
        node.things[f"engine {i}"] = engine
        node.things[f"counter {i}"] = engine.counter(IMM)
    return [bytes(node.things[f"engine {i}"].address) for i in range(ENGINES)]


def greet_all(node: State, addresses: list[bytes], at: float) -> list[str]:
    """From every engine of this process, at the moment `at`, raise an immediate at all others."""
    errors: list[str] = []

    def greet(engine: fabric.TransferEngine, counter: fabric.ImmCounter) -> None:
        others = [commands.peer(a) for a in addresses if a != bytes(engine.address)]
        time.sleep(max(0.0, at - time.monotonic()))
        try:
            engine.barrier(others, IMM).wait(timeout=60.0)
            counter.wait(len(others), timeout=60.0, peers=others)
            if counter.value != len(others):
                errors.append(f"{counter.value} counts of {len(others)}")
        except fabric.FabricError as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [
        threading.Thread(
            target=greet, args=(node.things[f"engine {i}"], node.things[f"counter {i}"])
        )
        for i in range(ENGINES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def lanes_of_all(node: State) -> list[list[int]]:
    """Return, for each engine, the lanes of each of its peers that is up."""
    return [
        sorted(
            peer.lanes for peer in node.things[f"engine {i}"].stats().peers if peer.state == "up"
        )
        for i in range(ENGINES)
    ]


def close_engines(node: State) -> None:
    """Close all engines of this process."""
    for i in range(ENGINES):
        node.things.pop(f"counter {i}").close()
        node.things.pop(f"engine {i}").close()


def all_up(node: Node, expected: list[list[int]]) -> bool:
    """Return whether all engines of a process have these lanes."""
    found: list[list[int]] = node.call(lanes_of_all)
    return found == expected


def test_all_to_all_at_once(farm: Farm) -> None:
    """Handshakes collide, every lane comes up, and every count is exact."""
    nodes = [farm.bare(f"p{i}") for i in range(PROCESSES)]
    turns = list(farm.turns)
    addresses = [a for node in nodes for a in node.call(open_engines, farm.provider, turns)]
    at = nodes[0].call(commands.clock) + 0.5
    greeting = [node.start(greet_all, addresses, at) for node in nodes]
    assert [pending.result(120.0) for pending in greeting] == [[]] * PROCESSES
    width = len(turns[0] or [""])
    every_lane = [[width] * (ALL - 1)] * ENGINES
    for node in nodes:
        wait_until(
            functools.partial(all_up, node, every_lane),
            30.0,
            f"{node.name}: not every lane came up",
        )
    for node in nodes:
        node.call(close_engines)
