"""`TransferEngine.stats`: times, depths, failures by kind, lanes and NICs; and the log's lines."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import fabric
from fabric import _stats, sim
from fabric._native import lib
from tests.harness import wait_until

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 16
TIMEOUT = 0.5
PATIENT = 30.0


def descriptor(region: fabric.MemoryRegion) -> fabric.Descriptor:
    """Return a descriptor as a peer gets it."""
    return fabric.Descriptor.from_bytes(bytes(region.descriptor))


def histogram(*nanoseconds: int) -> fabric.Histogram:
    """Return what the C core would have of these."""
    buckets = [0] * lib.FAB_BUCKETS
    for ns in nanoseconds:
        buckets[sum(bound <= ns for bound in _stats.BOUNDS_NS)] += 1
    return fabric.Histogram(len(nanoseconds), sum(nanoseconds) / 1e9, tuple(buckets))


def test_bounds_are_a_quarter_of_an_octave_apart() -> None:
    bounds = _stats.BOUNDS_NS
    assert len(bounds) == lib.FAB_BUCKETS - 1
    assert bounds[:6] == (1, 2, 3, 4, 5, 6)
    assert all(low < high <= low * 1.25 for low, high in itertools.pairwise(bounds[3:]))
    assert {1 << exponent for exponent in range(2, 41)} <= set(bounds)


def test_percentiles() -> None:
    empty = histogram()
    assert (empty.percentile(50), empty.mean) == (0.0, 0.0)
    times = histogram(*range(1000, 2000))
    assert times.mean == pytest.approx(1.4995e-6)
    for percent in (0, 1, 50, 90, 99, 100):
        true = (1000 + 10 * percent) * 1e-9
        assert true * 0.99 <= times.percentile(percent) <= true * 1.26
    assert histogram(1 << 50).percentile(50) == math.inf
    assert times.below(1024) == 24
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match="percent"):
            times.percentile(wrong)


@pytest.mark.parametrize("kind", sorted(sim.KINDS))
def test_times_are_those_of_the_network(kind: str) -> None:
    """Every kind of transfer is timed as the one call that it was."""
    with sim.World(1, kind=kind, delay=1e-3, jitter=0.0) as world:
        a, b = world.engine("a"), world.engine("b")
        source, target, count = a.alloc(SIZE), b.alloc(SIZE), b.counter()
        d = descriptor(target)
        a.write(source, d).wait(timeout=PATIENT)
        for _ in range(9):
            a.write(source, d, length=8, imm=count.id).wait(timeout=PATIENT)
        a.write_pages(source, d, [0, 1], [1, 0], page_bytes=4096).wait(timeout=PATIENT)
        a.scatter(source, [(d, 0, 0, 8), (d, 8, 8, 8)]).wait(timeout=PATIENT)
        a.write_imm(b.address, count.id).wait(timeout=PATIENT)
        a.send(b.address, b"hello").wait(timeout=PATIENT)
        stats = a.stats()
        ends = {name: times.count for name, times in stats.latency.items()}
        assert ends == {"write": 10, "pages": 1, "scatter": 1, "imm": 1, "message": 1}
        assert {name: times.count for name, times in stats.waited.items()} == ends
        writes = stats.latency["write"]
        assert 2e-3 <= writes.percentile(50) <= 3e-3  # there and back
        assert writes.percentile(100) > 3e-3  # the first one waited for a session
        assert stats.waited["write"].percentile(50) < 1e-3
        assert stats.waited["write"].percentile(100) > 2e-3
        assert stats.latency["scatter"].mean == pytest.approx(2e-3, rel=0.5)
        json.dumps(stats.as_dict())


def test_depths_and_lanes_of_two_nics() -> None:
    with sim.World(1, kind="ordered") as world:
        a, b = world.engine("a", 2, peer_timeout=PATIENT), world.engine("b", 2)
        source, d = a.alloc(4 * SIZE), descriptor(b.alloc(4 * SIZE))
        a.write(source, d).wait(timeout=PATIENT)
        world.run(0.1)
        transfers = [a.write(source, d) for _ in range(300)]
        stats = a.stats()
        assert stats.transfers_waiting + stats.transfers_posted == 300
        assert stats.pieces_outstanding == stats.peers[0].outstanding > 0
        assert stats.pieces_outstanding == sum(
            lane.outstanding for lane in stats.peers[0].lane_stats
        )
        for transfer in transfers:
            transfer.wait(timeout=PATIENT)
        b.stats()
        stats = a.stats()
        assert stats.transfers_waiting == stats.transfers_posted == stats.pieces_outstanding == 0
        peer = stats.peers[0]
        assert [(lane.index, lane.nic, lane.state) for lane in peer.lane_stats] == [
            (0, "a.0", "up"),
            (1, "a.1", "up"),
        ]
        assert sum(lane.tx_bytes for lane in peer.lane_stats) == peer.tx_bytes == 301 * 4 * SIZE
        assert sum(nic.tx_bytes for nic in stats.nics) == stats.tx_bytes == peer.tx_bytes
        assert sum(nic.tx_pieces for nic in stats.nics) == stats.tx_pieces == peer.tx_pieces
        assert min(nic.tx_bytes for nic in stats.nics) > 100 * 4 * SIZE


def test_a_lane_that_breaks_and_comes_back() -> None:
    with sim.World(1, kind="ordered") as world:
        a, b = world.engine("a", 2), world.engine("b", 2)
        source, d = a.alloc(SIZE), descriptor(b.alloc(SIZE))
        a.write(source, d).wait(timeout=PATIENT)
        world.run(0.1)
        world.link("a.1", up=False)
        world.run(0.1)
        stats = a.stats()
        assert stats.peers[0].lane_stats[0].state == "up"
        assert [lane.lost for lane in stats.peers[0].lane_stats] == [0, 1]
        assert [nic.up for nic in stats.nics] == [True, False]
        world.link("a.1", up=True)
        assert world.run_until(lambda: a.stats().peers[0].lanes == 2, PATIENT)
        assert [lane.restored for lane in a.stats().peers[0].lane_stats] == [0, 1]


def test_failures_are_told_apart() -> None:
    with sim.World(1, lost_contacts=1.0) as world:
        a, b = world.engine("a", peer_timeout=TIMEOUT), world.engine("b", peer_timeout=TIMEOUT)
        source, d = a.alloc(SIZE), descriptor(b.alloc(SIZE))
        with pytest.raises(fabric.PeerUnreachable):
            a.write(source, d).wait(timeout=PATIENT)
        assert a.stats().handshakes_resent >= 3
        world.set(lost_contacts=0.0)
        a.write(source, d).wait(timeout=PATIENT)
        world.set(lost_writes=1.0)
        with pytest.raises(fabric.TransferFailed):
            a.write(source, d).wait(timeout=PATIENT)
        stats = a.stats()
        assert sum(stats.failures.values()) == stats.transfers_failed == 2
        assert stats.failures["PeerUnreachable"] >= 1
        assert stats.pieces_failed >= 1
        assert stats.latency["write"].count == 1


def test_a_nic_keeps_what_it_carried_for_a_peer_that_is_forgotten() -> None:
    """The table of peers is full, and the entry of one that is gone is given to another."""
    with fabric.TransferEngine("local") as a:
        with fabric.TransferEngine("local", label="b") as b:
            source, d = a.alloc(SIZE), descriptor(b.alloc(SIZE))
            a.write(source, d).wait(timeout=PATIENT)
        wait_until(lambda: a.stats().peers_up == 0, PATIENT, "b is still there")
        known = b.address
        del d, b
        for i in range(lib.FAB_MAX_PEERS):
            a.disconnect(fabric.Address(i.to_bytes(16, "little"), "c", known.nics))
        stats = a.stats()
        assert len(stats.peers) == lib.FAB_MAX_PEERS
        assert sum(peer.tx_bytes for peer in stats.peers) == 0
        assert stats.nics[0].tx_bytes == stats.tx_bytes == SIZE
        assert stats.nics[0].tx_pieces == stats.tx_pieces == 1


def test_quick_writes_are_all_counted() -> None:
    """On `local` only some of them are timed; a closed engine still tells."""
    with fabric.TransferEngine("local") as a, fabric.TransferEngine("local") as b:
        source, d = a.alloc(SIZE), b.alloc(SIZE).descriptor
        for _ in range(1000):
            a.write(source, d, length=8).wait(timeout=PATIENT)
        times = a.stats().latency["write"]
        assert times.count == sum(times.buckets) == 1000
        assert 0 < times.percentile(10) < 1e-3
        a.write(source, d).wait(timeout=PATIENT)
    stats = a.stats()
    assert stats.latency["write"].count == 1001
    assert stats.peers == ()
    assert [nic.up for nic in stats.nics] == [False]


LOG = """
from fabric import sim
with sim.World(1, kind="ordered") as world:
    a, b = world.engine("a", 2), world.engine("b", 2)
    a.write_imm(b.address, 1).wait(timeout=10.0)
    world.run(0.1)
    world.link("a.1", up=False)
    world.run(0.1)
    world.link("a.1", up=True)
    assert world.run_until(lambda: a.stats().peers[0].lanes == 2, 30.0)
"""


@pytest.mark.parametrize(("level", "lines"), [("warn", 2), ("info", 6)])
def test_one_line_for_each_change_of_a_lane(tmp_path: Path, level: str, lines: int) -> None:
    """Opened, lost and why, restored, closed."""
    log = tmp_path / "log"
    subprocess.run(
        [sys.executable, "-c", LOG],
        env={"FABRIC_LOG_FILE": str(log), "FABRIC_LOG_LEVEL": level},
        check=True,
        timeout=60,
    )
    said = [line for line in log.read_text().splitlines() if "peer b: lane" in line]
    assert all(" fabric " in line for line in said)
    texts = [line.partition("peer b: ")[2] for line in said]
    lost = "lane 1 over a.1: lost: a.1: it went down"
    restored = "lane 1 over a.1: up: restored"
    assert len(texts) == lines
    assert [text for text in texts if text in (lost, restored)] == [lost, restored]
    if level == "info":
        assert texts[:2] == ["lane 0 over a.0: up", "lane 1 over a.1: up"]
        assert all(": closed: " in text for text in texts[-2:])
