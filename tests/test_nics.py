"""Several NICs: who carries what, and what happens when a NIC goes down and comes back.

On SoftRoCE, where a link can really be taken down (tests/softroce/run).
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fabric
from tests import commands, links
from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.harness import Farm, Node
    from tests.node import State

pytestmark = [links.needs_guest, links.needs(4), pytest.mark.only("verbs")]
OLD, NEW = 11, 12
SIZE = 8 << 20
PAGE, PAGES = 16384, 512
TIMEOUT = 10.0  # peer_timeout of these tests
SHARES = [
    (["rxe0"], ["rxe1", "rxe2"]),
    (["rxe0", "rxe1"], ["rxe2"]),
    (["rxe0", "rxe1", "rxe2"], ["rxe1", "rxe0"]),
]
"""NICs of the two sides; no lane joins a NIC to itself, which would not use its link."""


def two(farm: Farm, ours: list[str], theirs: list[str]) -> tuple[Node, Node]:
    """Return two nodes with these NICs."""
    a = farm("a", nics=ours, peer_timeout=TIMEOUT)
    b = farm("b", nics=theirs, peer_timeout=TIMEOUT)
    return a, b


def lanes(node: Node) -> int:
    """Return how many lanes of the node's one peer work."""
    result: int = node.call(count_lanes)
    return result


def count_lanes(node: State) -> int:
    """Return how many lanes to the first peer work."""
    result: int = node.engine.stats().peers[0].lanes
    return result


def carried(names: list[str]) -> dict[str, int]:
    """Return what each of these NICs' links has sent."""
    return {name: links.bytes_sent(f"v{name[3:]}") for name in names}


@pytest.mark.parametrize(("ours", "theirs"), SHARES)
def test_unequal_numbers_of_nics(farm: Farm, ours: list[str], theirs: list[str]) -> None:
    """Every NIC carries its part; counts and bytes do not depend on how many there are."""
    a, b = two(farm, ours, theirs)
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    most = max(len(ours), len(theirs))
    wait_until(lambda: lanes(a) == lanes(b) == most, 10.0, "not every lane came up")
    before = carried(ours)
    a.write("src", descriptor, imm=imm)
    pages = (list(range(PAGES)), list(range(PAGES)))
    a.call(commands.write_pages, "src", descriptor, pages, {"page_bytes": PAGE, "imm": imm})
    a.call(
        commands.scatter, "src", [(descriptor, i * 4096, i * 4096, 4096) for i in range(64)], imm
    )
    a.call(commands.write_imm, b.address, imm, 30)
    assert b.settled("count", 2 + PAGES + 64 + 30) == 2 + PAGES + 64 + 30
    assert b.differs("dst", NEW) == ""
    after = carried(ours)
    moved = [after[name] - before[name] for name in ours]
    assert min(moved) > 2 * SIZE // len(ours) // 2, moved
    reply = b.region("back src", SIZE, NEW + 1)
    assert reply
    target = a.region("back", SIZE, OLD)
    b.write("back src", target)
    assert a.differs("back", NEW + 1) == ""


def flood(node: State, descriptor: bytes, ids: list[int], seconds: float, seed: int) -> list[Any]:
    """Write pages under each id in turn, several at a time; returns [id, ranges, how it ended]."""
    rng = random.Random(seed)
    remote = fabric.Descriptor.from_bytes(descriptor)
    deadline = time.monotonic() + seconds
    result: list[Any] = []
    under_way: list[Any] = []

    def end_first() -> None:
        number, pages, transfer = under_way.pop(0)
        try:
            transfer.wait(timeout=4 * TIMEOUT)
            result.append((number, pages, "done", ""))
        except fabric.FabricError as error:
            result.append((number, pages, type(error).__name__, getattr(error, "nic", "")))

    while ids and time.monotonic() < deadline:
        pages = np.asarray(rng.sample(range(PAGES), 96), np.int32)
        number = ids.pop(0)
        transfer = node.engine.write_pages(
            node.things["src"], remote, pages, pages, page_bytes=PAGE, imm=number
        )
        under_way.append((number, len(pages), transfer))
        if len(under_way) == 4:
            end_first()
    while under_way:
        end_first()
    return result


def open_counters(node: State, count: int) -> list[int]:
    """Open counters "c0", "c1", ...; returns their ids."""
    for i in range(count):
        node.things[f"c{i}"] = node.engine.counter()
    return [node.things[f"c{i}"].id for i in range(count)]


def outcome(node: State, number: int, target: int) -> str:
    """Wait for a count; returns "exact", or how it ended."""
    counter = node.things[f"c{number}"]
    try:
        counter.wait(target, timeout=3.0)
    except fabric.FabricError as error:
        return type(error).__name__
    return "exact" if counter.value == target else str(counter.value)


@pytest.mark.parametrize("victim", ["v0", "v1", "v2", "v3"])
def test_a_nic_goes_down_and_comes_back(farm: Farm, victim: str, seed: int) -> None:
    """Whichever NIC of the four it is: of the sender or the receiver, of control frames or not."""
    a, b = two(farm, ["rxe0", "rxe1"], ["rxe2", "rxe3"])
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    ids = b.call(open_counters, 400)
    a.write("src", descriptor, length=1)
    wait_until(lambda: lanes(a) == lanes(b) == 2, 10.0, "not every lane came up")
    flooding = a.start(flood, descriptor, ids, 3.0, seed, thread=True)
    time.sleep(1.0)
    with links.down(victim):
        ended = flooding.result()
        assert lanes(a) == lanes(b) == 1
    check_outcomes(b, ids, ended, victim)
    talk(a, b)
    wait_until(lambda: lanes(a) == lanes(b) == 2, 10.0, "the NIC is not taken back")
    stats = [node.stats() for node in (a, b)]
    assert [s["lanes_lost"] for s in stats] == [s["lanes_restored"] for s in stats] == [1, 1]
    assert sum(s["nics_lost"] for s in stats) == 1
    imm = b.counter("count")
    b.refill("dst", OLD)
    a.write("src", descriptor, imm=imm)
    assert b.settled("count", 1) == 1
    assert b.differs("dst", NEW) == ""
    assert sum(s["peers_lost"] for s in (a.stats(), b.stats())) == 0


def check_outcomes(b: Node, ids: list[int], ended: list[Any], victim: str) -> None:
    """What is done is counted exactly; what failed names the NIC, and its id is void."""
    failed = [row for row in ended if row[2] != "done"]
    assert len(ended) > len(failed)
    for row in ended:
        how = b.call(outcome, ids.index(row[0]), row[1])
        if row[2] == "done":
            assert how == "exact", row
        else:
            assert row[2] == "TransferFailed", row
            assert row[3] in ("rxe0", "rxe1"), row
            assert how in ("CounterVoid", "exact"), (row, how)
    print(f"{victim} down: {len(failed)} of {len(ended)} transfers failed")


def talk(a: Node, b: Node) -> None:
    """Messages go both ways, whatever lane is left."""
    for one, other in ((a, b), (b, a)):
        one.call(send, other.address, b"x" * 20_000)
        assert other.call(receive) == b"x" * 20_000


def send(node: State, address: bytes, payload: bytes) -> None:
    """Send a message and wait until the peer holds it."""
    node.engine.send(commands.peer(address), payload)


def receive(node: State) -> bytes:
    """Return the next message."""
    result: bytes = node.engine.recv(timeout=10.0)[1]
    return result


@pytest.mark.parametrize("victim", ["v0", "v1", "v2"])
def test_a_path_that_dies_without_a_word(farm: Farm, victim: str, seed: int) -> None:
    """All ports stay up, and one NIC's packets vanish: its lane is given up, and comes back.

    rdma_rxe retransmits for ever, so nothing but the silence tells.
    """
    a, b = two(farm, ["rxe0", "rxe1"], ["rxe2", "rxe3"])
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    ids = b.call(open_counters, 400)
    a.write("src", descriptor, length=1)
    wait_until(lambda: lanes(a) == lanes(b) == 2, 10.0, "not every lane came up")
    flooding = a.start(flood, descriptor, ids, 3.0, seed, thread=True)
    time.sleep(1.0)
    with links.disturbed(victim, how="loss 100%"):
        begin = time.monotonic()
        ended = flooding.result()
        assert time.monotonic() - begin < TIMEOUT + 3.0
        wait_until(lambda: lanes(a) == lanes(b) == 1, 10.0, "the lane is not given up")
        check_outcomes(b, ids, ended, victim)
        assert any(row[2] != "done" for row in ended), "the lane carried nothing: it shows nothing"
        talk(a, b)
    wait_until(lambda: lanes(a) == lanes(b) == 2, 20.0, "the lane does not come back")
    imm = b.counter("count")
    b.refill("dst", OLD)
    a.write("src", descriptor, imm=imm)
    assert b.settled("count", 1) == 1
    assert b.differs("dst", NEW) == ""
    assert sum(s["peers_lost"] for s in (a.stats(), b.stats())) == 0


@pytest.mark.parametrize("victim", ["v0", "v2"])
def test_new_peers_connect_while_a_nic_is_down(farm: Farm, victim: str) -> None:
    """First contact does not depend on the first NIC of either side."""
    with links.down(victim):
        a, b = two(farm, ["rxe0", "rxe1"], ["rxe2", "rxe3"])
        a.region("src", 100_000, NEW)
        descriptor = b.region("dst", 100_000, OLD)
        assert a.call(first_write, "src", descriptor) == "done"
        assert b.differs("dst", NEW) == ""
    wait_until(lambda: lanes(a) == lanes(b) == 2, 10.0, "the NIC is not taken in")


def first_write(node: State, source: str, descriptor: bytes) -> str:
    """Write again and again until it works: lanes whose NIC is down fail what they carry."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    deadline = time.monotonic() + 4 * TIMEOUT
    while True:
        how = commands.end_of(node.engine.write(node.things[source], remote))
        if how == "done" or time.monotonic() > deadline:
            return how


def test_all_nics_down_ends_in_time(farm: Farm) -> None:
    """No lane is left: transfers fail within the peer timeout, and a later one works again."""
    a, b = two(farm, ["rxe0", "rxe1"], ["rxe2", "rxe3"])
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    imm = b.counter("count")
    a.write("src", descriptor, length=4096, imm=imm)
    wait_until(lambda: lanes(a) == lanes(b) == 2, 10.0, "not every lane came up")
    a.call(links.begin_slow, "t", "src", descriptor, imm, 128)
    b.wait("count", 3)
    with links.down("v0"), links.down("v1"):
        begin = time.monotonic()
        assert a.call(commands.transfer_end, "t") in ("TransferFailed", "PeerUnreachable")
        assert time.monotonic() - begin < 2 * TIMEOUT
    assert a.call(first_write, "src", descriptor) == "done"
    assert b.differs("dst", NEW) == ""
