"""NUMA nodes, their CPUs, and which CPUs are threads of one core."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._pci import MAX_NODE

if TYPE_CHECKING:
    from ._reader import Reader

MAX_CPU = 8191
"""The highest CPU that any Linux can have."""

_NODE = re.compile(r"node[0-9]{1,4}", re.ASCII)
_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node."""

    index: int
    cpus: frozenset[int]  # that are online
    distances: tuple[int, ...]  # to the nodes that there are, in their order; 10 is itself


def cpus_of(text: str | None) -> frozenset[int]:
    """Return the CPUs of a kernel list such as ``0-3,8``; what is no list has none."""
    cpus: set[int] = set()
    for part in (text or "").split(","):
        if span := _SPAN.fullmatch(part.strip()):
            low, high = int(span[1]), int(span[2] or span[1])
            cpus.update(range(low, min(high, MAX_CPU) + 1))
    return frozenset(cpus)


def text_of_cpus(cpus: Iterable[int]) -> str:
    """Return CPUs as the kernel writes them: ``0-3,8``."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and spans[-1][1] == cpu - 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def read_nodes(reader: Reader) -> tuple[NumaNode, ...]:
    """Return the NUMA nodes. A kernel without NUMA has none."""
    folder = ("devices", "system", "node")
    names = reader.names(*folder, like=_NODE, limit=MAX_NODE + 1)
    nodes = [
        NumaNode(
            index=int(name[4:]),
            cpus=cpus_of(reader.text(*folder, name, "cpulist")),
            distances=_numbers(reader.text(*folder, name, "distance")),
        )
        for name in names
    ]
    return tuple(sorted(nodes, key=lambda node: node.index))


def _numbers(text: str | None) -> tuple[int, ...]:
    parts = (text or "").split()
    return tuple(int(part) for part in parts) if all(map(str.isdecimal, parts)) else ()


def read_cores(reader: Reader, nodes: tuple[NumaNode, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the online CPUs, those that are threads of one core together, lowest first."""
    folder = ("devices", "system", "cpu")
    online = cpus_of(reader.text(*folder, "online")).union(*(node.cpus for node in nodes))
    cores: list[tuple[int, ...]] = []
    left = set(online)
    for cpu in sorted(online):
        if cpu not in left:
            continue
        text = reader.text(*folder, f"cpu{cpu}", "topology", "thread_siblings_list")
        core = (cpus_of(text) & left) | {cpu}
        left -= core
        cores.append(tuple(sorted(core)))
    return tuple(cores)
