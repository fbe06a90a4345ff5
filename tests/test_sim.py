"""The simulated world, and what it showed of the engine."""

from __future__ import annotations

import pytest

import fabric
from fabric import sim

KINDS = sorted(sim.KINDS)
SIZE = 1 << 16
TIMEOUT = 0.5


def descriptor(region: fabric.MemoryRegion) -> fabric.Descriptor:
    """Return a descriptor as a peer gets it."""
    return fabric.Descriptor.from_bytes(bytes(region.descriptor))


def story(seed: int, kind: str) -> tuple[int, str]:
    """Let two engines write, one of them die and come back; returns the history."""
    with sim.World(seed, kind=kind, slow_fences=0.3, lost_contacts=0.1) as world:
        a, b = world.engine("a", 2, peer_timeout=TIMEOUT), world.engine("b", peer_timeout=TIMEOUT)
        source, target, count = a.alloc(SIZE), b.alloc(SIZE), b.counter()
        source.numpy()[:] = 7
        for _ in range(20):
            a.write(source, descriptor(target), imm=count.id).wait(timeout=1.0)
        count.wait(20, timeout=1.0)
        assert (target.numpy() == 7).all()
        world.kill("a")
        c = world.engine("c", peer_timeout=TIMEOUT)
        c.write_imm(b.address, count.id).wait(timeout=1.0)
        with pytest.raises(fabric.PeerUnreachable):
            count.wait(22, timeout=10.0, peers=[a.address])
        return world.digest, world.history()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_is_the_same_history(kind: str, seed: int) -> None:
    first, text = story(seed, kind)
    assert story(seed, kind) == (first, text)
    assert story(seed + 1, kind)[0] != first
    assert "landed" in text


def test_a_world_is_alone() -> None:
    with sim.World(1) as world:
        with pytest.raises(fabric.InvalidArgument, match="this process for itself"):
            sim.World(2)
        world.engine("a")
        with pytest.raises(fabric.ProviderUnavailable, match="already"):
            world.engine("a")
        with pytest.raises(fabric.InvalidArgument, match="no engine called"):
            world.kill("b")
        with pytest.raises(fabric.InvalidArgument, match="lost_marbles"):
            world.set(lost_marbles=0.1)
    with pytest.raises(fabric.ProviderUnavailable, match="World"):
        fabric.TransferEngine("sim")
    with fabric.TransferEngine("local"), pytest.raises(fabric.InvalidArgument):
        sim.World(1)
    for wrong in ({"kind": "other"}, {"lost_writes": 1.1}, {"delay": 2.0}):
        with pytest.raises(fabric.InvalidArgument):
            sim.World(1, **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fence_cuts_off_what_waits_for_a_connection(kind: str) -> None:
    """Also where the receiver itself opens the connection afterwards (S9)."""
    with sim.World(1, kind=kind) as world:
        a, b = world.engine("a", peer_timeout=TIMEOUT), world.engine("b", peer_timeout=TIMEOUT)
        source, target = a.alloc(SIZE), b.alloc(SIZE)
        source.numpy()[:] = 7
        write = a.write(source, descriptor(target))
        b.disconnect(a.address, timeout=1.0)
        b.write_imm(a.address, 1).wait(timeout=1.0)
        with pytest.raises(fabric.TransferFailed, match="fenced"):
            write.wait(timeout=1.0)
        assert (target.numpy() == 0).all()
        a.write(source, descriptor(target)).wait(timeout=1.0)
        assert (target.numpy() == 7).all()


def burst_time(kind: str, hang: bool) -> float:
    """Write to thirty peers, and to one that takes nothing or its share; returns seconds."""
    with sim.World(3, kind=kind, jitter=20e-6) as world:
        sender = world.engine("s", peer_timeout=30.0)
        peers = [world.engine(f"p{i}", peer_timeout=30.0) for i in range(31)]
        source = sender.alloc(SIZE)
        targets = [descriptor(peer.alloc(SIZE)) for peer in peers]
        for target in targets:
            sender.write(source, target).wait(timeout=1.0)
        if hang:
            world.hang("p30")
            world.cut("s.0", "p30.0")
        begin = world.now
        first = [sender.write(source, targets[30]) for _ in range(100)]
        others = [sender.write(source, target) for _ in range(100) for target in targets[:30]]
        for transfer in others:
            transfer.wait(timeout=20.0)
        taken = world.now - begin
        if hang:
            world.cut("s.0", "p30.0", on=False)
            world.resume("p30")
        for transfer in [] if hang else first:
            transfer.wait(timeout=20.0)
        return taken


@pytest.mark.parametrize("kind", KINDS)
def test_one_peer_that_takes_nothing_slows_nobody(kind: str) -> None:
    usual, beside = burst_time(kind, hang=False), burst_time(kind, hang=True)
    assert beside < 1.1 * usual, f"{beside:.6f} s instead of {usual:.6f} s"
