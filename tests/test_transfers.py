"""Bytes between two processes: all of them, nothing else, and counted exactly once."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric
from tests import commands
from tests.harness import Farm, Node
from tests.scale import scaled

if TYPE_CHECKING:
    from tests.node import State
    from tests.patterns import Copy

SIZES = [0, 1, 4095, 16385, 1 << 20, scaled(64 << 20, 4 << 20)]
OLD, NEW = 11, 12  # patterns: what the destination held, and what the source holds
BEFORE, AFTER = 77, 4211  # bytes of the destination that must stay as they were
Pair = tuple[Node, Node]
Trio = tuple[Node, Node, Node]


def move(pair: Pair, size: int, source: str, destination: str) -> None:
    """Write `size` bytes into the middle of a region and check all of it."""
    a, b = pair
    a.region("src", size + 5, NEW, source)
    descriptor = b.region("dst", BEFORE + size + AFTER, OLD, destination)
    imm = b.counter("count")
    a.write("src", descriptor, src_offset=5, dst_offset=BEFORE, length=size, imm=imm)
    assert b.settled("count", 1) == 1
    assert b.differs("dst", OLD, [(BEFORE, NEW, 5, size)]) == ""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("destination", ["alloc", "numpy"])
@pytest.mark.parametrize("source", ["alloc", "numpy"])
def test_write(pair: Pair, size: int, source: str, destination: str) -> None:
    move(pair, size, source, destination)


@pytest.mark.parametrize("kind", commands.KINDS)
def test_any_contiguous_memory(pair: Pair, kind: str) -> None:
    move(pair, 300_001, kind, kind)


def test_memory_of_torch(farm: Farm, torch: tuple[str, ...]) -> None:
    a, b = (farm(name, modules=torch) for name in "ab")
    move((a, b), 300_001, "torch", "torch")


@pytest.mark.only("local")
@pytest.mark.parametrize("method", ["vm", "staging"])
@pytest.mark.parametrize("source", ["alloc", "numpy"])
def test_pull(farm: Farm, method: str, source: str) -> None:
    env = {"FABRIC_LOCAL_PULL": method}
    a, b = farm("a", env), farm("b", env)
    for size in SIZES:
        move((a, b), size, source, "numpy")
        assert a.settle() == b.settle() == {}


def test_both_directions_at_once(pair: Pair) -> None:
    size = scaled(8 << 20)
    for node, fill in zip(pair, (21, 22), strict=True):
        node.region("src", size, fill)
    descriptors = [node.region("dst", size, OLD) for node in pair]
    ids = [node.counter("count") for node in pair]
    running = [
        node.start(commands.write, "src", descriptors[1 - i], {"imm": ids[1 - i]})
        for i, node in enumerate(pair)
    ]
    for pending in running:
        pending.result()
    for node, fill in zip(pair, (22, 21), strict=True):
        assert node.settled("count", 1) == 1
        assert node.differs("dst", OLD, [(0, fill, 0, size)]) == ""


def test_length_defaults_to_the_rest_of_the_source(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, NEW)
    descriptor = b.region("dst", 1000, OLD)
    a.write("src", descriptor, src_offset=900, dst_offset=3)
    assert b.differs("dst", OLD, [(3, NEW, 900, 100)]) == ""


def test_sub_range_of_a_descriptor(pair: Pair) -> None:
    a, b = pair
    a.region("src", 4096, NEW)
    whole = fabric.Descriptor.from_bytes(b.region("dst", 1 << 16, OLD))
    part = whole[1000:9000][500:4000]
    imm = b.counter("count")
    a.write("src", bytes(part), dst_offset=100, length=3400, imm=imm)
    a.write("src", bytes(whole[65535:65536]), length=1, imm=imm)
    a.write("src", bytes(whole[65536:65536]), length=0, imm=imm)
    assert b.settled("count", 3) == 3
    assert b.differs("dst", OLD, [(1600, NEW, 0, 3400), (65535, NEW, 0, 1)]) == ""


def test_uncounted_write(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1 << 20, NEW)
    descriptor = b.region("dst", 1 << 20, OLD)
    b.counter("count")
    counted = b.stats()["rx_imms"]
    a.write("src", descriptor)
    assert b.differs("dst", OLD, [(0, NEW, 0, 1 << 20)]) == ""
    assert b.value("count") == 0
    assert b.stats()["rx_imms"] == counted


def test_the_same_range_again_and_again(pair: Pair) -> None:
    """A count covers the bytes of the write it belongs to, not of an older one."""
    a, b = pair
    descriptor = b.region("dst", 100_000, OLD)
    a.region("src", 100_000, None)
    imm = b.counter("count")
    for number in range(20):
        a.refill("src", 100 + number)
        a.call(commands.begin_write, "t", "src", descriptor, {"imm": imm})
        b.wait("count", number + 1)
        assert b.differs("dst", 100 + number) == ""
        a.call(commands.transfer_wait, "t")


# ---- pages ----


def copies_of(
    pages: tuple[list[int], list[int]],
    page_bytes: int,
    strides: tuple[int, int],
    offsets: tuple[int, int],
) -> list[Copy]:
    """Return what `write_pages` must have done."""
    return [
        (offsets[1] + dst * strides[1], NEW, offsets[0] + src * strides[0], page_bytes)
        for src, dst in zip(*pages, strict=True)
    ]


@pytest.mark.parametrize("count", [0, 1, 1023])
@pytest.mark.parametrize("destination", ["alloc", "numpy"])
def test_pages(pair: Pair, count: int, destination: str, seed: int) -> None:
    a, b = pair
    rng = random.Random(seed)
    pages = (rng.sample(range(1100), count), rng.sample(range(1200), count))
    page_bytes, strides, offsets = 1000, (1024, 1501), (13, 29)
    a.region("src", 13 + 1100 * 1024, NEW)
    descriptor = b.region("dst", 29 + 1200 * 1501, OLD, destination)
    imm = b.counter("count")
    options = {
        "page_bytes": page_bytes,
        "src_stride": strides[0],
        "dst_stride": strides[1],
        "src_offset": offsets[0],
        "dst_offset": offsets[1],
        "imm": imm,
    }
    a.call(commands.write_pages, "src", descriptor, pages, options)
    assert b.settled("count", count) == count
    assert b.differs("dst", OLD, copies_of(pages, page_bytes, strides, offsets)) == ""


def test_pages_without_strides_lie_next_to_each_other(pair: Pair) -> None:
    a, b = pair
    pages = ([3, 0, 1], [0, 2, 3])
    a.region("src", 4 * 4096, NEW)
    descriptor = b.region("dst", 4 * 4096, OLD)
    a.call(commands.write_pages, "src", descriptor, pages, {"page_bytes": 4096})
    assert b.differs("dst", OLD, copies_of(pages, 4096, (4096, 4096), (0, 0))) == ""


def test_one_source_page_to_many(pair: Pair) -> None:
    a, b = pair
    pages = ([2] * 64, list(range(64)))
    a.region("src", 4 * 4096, NEW)
    descriptor = b.region("dst", 64 * 4096, OLD)
    imm = b.counter("count")
    a.call(commands.write_pages, "src", descriptor, pages, {"page_bytes": 4096, "imm": imm})
    assert b.settled("count", 64) == 64
    assert b.differs("dst", OLD, copies_of(pages, 4096, (4096, 4096), (0, 0))) == ""


def test_large_pages(pair: Pair, seed: int) -> None:
    a, b = pair
    size = scaled(1 << 20) + 1
    pages = (list(range(16)), random.Random(seed).sample(range(16), 16))
    a.region("src", 16 * size, NEW)
    descriptor = b.region("dst", 16 * size, OLD)
    imm = b.counter("count")
    a.call(commands.write_pages, "src", descriptor, pages, {"page_bytes": size, "imm": imm})
    assert b.settled("count", 16) == 16
    assert b.differs("dst", OLD, copies_of(pages, size, (size, size), (0, 0))) == ""


# ---- scatter, imm, barrier ----


def test_scatter_over_two_peers(trio: Trio) -> None:
    a, b, c = trio
    a.region("src", 200_000, NEW)
    first, second = b.region("dst", 100_000, OLD), b.region("more", 5000, OLD, "numpy")
    third = c.region("dst", 100_000, OLD)
    imm = b.counter("count", 4242)
    assert c.counter("count", 4242) == imm
    rows = [
        (first, 0, 10, 70_001),
        (second, 70_001, 0, 5000),
        (third, 5, 0, 100_000),
        (first, 199_999, 99_999, 1),
        (third, 0, 50, 0),
    ]
    a.call(commands.scatter, "src", rows, imm)
    assert b.settled("count", 3) == 3
    assert c.settled("count", 2) == 2
    assert b.differs("dst", OLD, [(10, NEW, 0, 70_001), (99_999, NEW, 199_999, 1)]) == ""
    assert b.differs("more", OLD, [(0, NEW, 70_001, 5000)]) == ""
    assert c.differs("dst", OLD, [(0, NEW, 5, 100_000)]) == ""


def test_scatter_of_nothing(pair: Pair) -> None:
    a, _ = pair
    a.region("src", 100, NEW)
    a.call(commands.scatter, "src", [], 7)


def test_scatter_to_many_targets(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, NEW)
    descriptor = b.region("dst", 1000, OLD)
    imm = b.counter("count")
    a.call(commands.scatter, "src", [(descriptor, i, 999 - i, 1) for i in range(1000)], imm)
    assert b.settled("count", 1000) == 1000
    assert b.differs("dst", OLD, [(999 - i, NEW, i, 1) for i in range(1000)]) == ""


def test_write_imm(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm, 100)
    assert b.settled("count", 100) == 100


def test_barrier(trio: Trio) -> None:
    a, b, c = trio
    b.counter("count", 77)
    c.counter("count", 77)
    a.call(commands.barrier, [], 77)
    assert (b.value("count"), c.value("count")) == (0, 0)
    a.call(commands.barrier, [b.address], 77)
    assert b.settled("count", 1) == 1
    assert c.value("count") == 0
    a.call(commands.barrier, [c.address, b.address], 77)
    assert b.settled("count", 2) == 2
    assert c.settled("count", 1) == 1


# ---- lanes ----


@pytest.mark.only("tcp")
@pytest.mark.parametrize("counts", [(2, 2), (2, 1), (1, 2), (3, 2)])
def test_several_lanes(farm: Farm, counts: tuple[int, int]) -> None:
    """A range counts once, whatever the number of NICs on either side."""
    a, b = farm("a", nics=["lo"] * counts[0]), farm("b", nics=["lo"] * counts[1])
    for size in (0, 1, 4095, 16385, scaled(8 << 20)):
        move((a, b), size, "alloc", "numpy")
        assert a.settle() == b.settle() == {}
    test_pages((a, b), 1023, "alloc", 5)


# ---- who was a descriptor made for ----


def make_descriptor_for(node: State, name: str, address: bytes) -> bytes:
    """Return a descriptor of a region for one peer only."""
    return bytes(node.things[name].descriptor_for(commands.peer(address)))


def test_descriptor_for_one_peer(trio: Trio) -> None:
    a, b, c = trio
    for node in (a, c):
        node.region("src", 1000, NEW)
    b.region("dst", 1000, OLD)
    descriptor = b.call(make_descriptor_for, "dst", a.address)
    imm = b.counter("count")
    with pytest.raises(fabric.TransferFailed, match="region"):
        c.write("src", descriptor, imm=imm)
    assert b.differs("dst", OLD) == ""
    a.write("src", descriptor, length=500)
    assert b.differs("dst", OLD, [(0, NEW, 0, 500)]) == ""


def test_a_region_is_registered_once(pair: Pair) -> None:
    """Registering is cached, but not by the base address alone."""
    a, b = pair
    a.region("src", 1 << 16, NEW)
    lengths, whole = b.call(register_parts)
    assert lengths == [4096, 1 << 16, 4096]
    a.write("src", whole)
    assert b.differs("dst", NEW) == ""


def register_parts(node: State) -> tuple[list[int], bytes]:
    """Register a piece of an array, all of it, and the piece again."""
    array = np.zeros(1 << 16, np.uint8)
    parts = [node.engine.register(piece) for piece in (array[:4096], array, array[:4096])]
    node.things.update({f"part {index}": part for index, part in enumerate(parts)})
    node.things["dst.view"] = array
    return [len(part.descriptor) for part in parts], bytes(parts[1].descriptor)
