"""Loss, delay, reordering and short outages of a link, on SoftRoCE: exact, or failed in time."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING

import pytest

import fabric
from tests import commands, links

if TYPE_CHECKING:
    from tests.harness import Farm, Node
    from tests.node import State

pytestmark = [links.needs_guest, pytest.mark.only("verbs")]
OLD, NEW = 21, 22
SIZE = 2 << 20
PAGE = 4096
TIMEOUT = 10.0
OUTAGE = 2.0


def mixed(node: State, descriptor: bytes, address: bytes, imm: int, seed: int) -> int:
    """Make writes, paged writes, scatters and immediates of random sizes; returns their ranges."""
    rng = random.Random(seed)
    remote = fabric.Descriptor.from_bytes(descriptor)
    source, engine = node.things["src"], node.engine
    under_way, ranges = [], 0
    for _ in range(60):
        offset = rng.randrange(SIZE - 70_000)
        under_way.append(
            engine.write(
                source,
                remote,
                src_offset=offset,
                dst_offset=offset,
                length=rng.choice([0, 1, 100, 5000, 70_000]),
                imm=imm,
            )
        )
        pages = rng.sample(range(SIZE // PAGE), rng.randrange(1, 9))
        under_way.append(engine.write_pages(source, remote, pages, pages, page_bytes=PAGE, imm=imm))
        under_way.append(engine.write_imm(commands.peer(address), imm))
        ranges += 2 + len(pages)
    for transfer in under_way:
        transfer.wait(timeout=4 * TIMEOUT)
    engine.write(source, remote, imm=imm).wait(timeout=4 * TIMEOUT)
    return ranges + 1


def pair_of(farm: Farm) -> tuple[Node, Node, bytes, int]:
    """Return two nodes on two NICs, a descriptor and a counter id of the second."""
    a = farm("a", nics=["rxe0"], peer_timeout=TIMEOUT)
    b = farm("b", nics=["rxe1"], peer_timeout=TIMEOUT)
    a.region("src", SIZE, NEW)
    return a, b, b.region("dst", SIZE, OLD), b.counter("count")


@pytest.mark.parametrize("how", ["loss 1% delay 1ms", "loss 3%", "delay 1ms reorder 2%"])
def test_a_bad_link(farm: Farm, how: str, seed: int) -> None:
    """The handshake, frames and writes of both directions survive; counts and bytes are exact."""
    with links.disturbed("v0", "v1", how=how):
        a, b, descriptor, imm = pair_of(farm)
        ranges = a.call(mixed, descriptor, b.address, imm, seed, within=120.0)
        b.wait("count", ranges, 30.0)
        assert b.settled("count", ranges) == ranges
        assert b.differs("dst", NEW) == ""
        lost = links.packets_lost("v0") + links.packets_lost("v1")
    if "loss" in how:
        assert lost > 0, "the link lost nothing: the test shows nothing"


def test_handshakes_on_a_very_bad_link(farm: Farm) -> None:
    """First frames are datagrams: lost ones are sent again, doubled ones change nothing."""
    with links.disturbed("v0", "v1", how="loss 20% duplicate 20%"):
        a, b, descriptor, imm = pair_of(farm)
        a.write("src", descriptor, length=1000, imm=imm)
        b.wait("count", 1, 30.0)
        assert b.settled("count", 1) == 1
        assert a.stats()["peers_up"] == b.stats()["peers_up"] == 1


@pytest.mark.parametrize("victim", ["v0", "v1"])
def test_a_link_goes_down_for_two_seconds(farm: Farm, victim: str) -> None:
    """In the middle of a transfer on the only NIC: it goes on, or fails in time; never a hang."""
    a, b, descriptor, imm = pair_of(farm)
    a.write("src", descriptor, length=1, imm=imm)
    a.call(links.begin_slow, "t", "src", descriptor, imm, 48)
    b.wait("count", 3)
    begin = time.monotonic()
    with links.down(victim):
        time.sleep(OUTAGE)
    end = a.call(commands.transfer_end, "t")
    assert time.monotonic() - begin < OUTAGE + TIMEOUT
    print(f"{victim} was down for {OUTAGE} s: the transfer ended {end}")
    if end == "done":
        assert b.settled("count", 49) == 49
    else:
        assert end in ("TransferFailed", "PeerUnreachable")
        with pytest.raises((fabric.CounterVoid, fabric.PeerUnreachable)):
            b.wait("count", 49, 2 * TIMEOUT, [a.address])
        # Both were told that the other is gone: each keeps it out until its address is used here.
        # What is begun before one has heard that the other was refused fails once more.
        for _ in range(2):
            with contextlib.suppress(fabric.TransferFailed):
                a.call(commands.write_imm, b.address, 7)
            with contextlib.suppress(fabric.TransferFailed):
                b.call(commands.write_imm, a.address, 7)
    fresh = b.counter("fresh")
    a.write("src", descriptor, imm=fresh)
    assert b.settled("fresh", 1) == 1
    assert b.differs("dst", NEW) == ""
