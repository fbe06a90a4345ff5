"""Contracts of the engine, each in the one order of events in which it would be broken.

What tests/test_sim_histories.py finds by chance only, these make happen. The defects of
tests/mutants show that they do.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

import fabric
from fabric import sim
from fabric._peer import Address

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = sorted(sim.KINDS)
SIZE = 1 << 20
TIMEOUT = 0.5
PATIENT = 30.0


class Pair:
    """Two engines of a world, and memory from the one to the other."""

    def __init__(self, world: sim.World, nics: int, timeouts: tuple[float, float]) -> None:
        self.world = world
        self.a = world.engine("a", nics, peer_timeout=timeouts[0])
        self.b = world.engine("b", nics, peer_timeout=timeouts[1])
        self.source, self.target = self.a.alloc(SIZE), self.b.alloc(SIZE)
        self.remote = descriptor(self.target)
        self.count = self.b.counter()
        self.nics = nics

    def meet(self) -> None:
        """Open the session, and have the region granted."""
        self.a.write(self.source, self.remote, length=8).wait(timeout=1.0)

    def cut(self, *, on: bool = True) -> None:
        """Let nothing through in either direction, or mend that."""
        for one, other in (("a", "b"), ("b", "a")):
            for i in range(self.nics):
                self.world.cut(f"{one}.{i}", f"{other}.{i}", on=on)

    def whole(self) -> bool:
        """Return whether all lanes are up on both sides."""
        peers = [peer for engine in (self.a, self.b) for peer in engine.stats().peers]
        return [peer.lanes for peer in peers] == [self.nics] * 2

    def is_over(self) -> bool:
        """Return whether the second engine has no session any more."""
        return self.b.stats().peers_up == 0

    def refused(self) -> bool:
        """Return whether the first engine has refused the second."""
        return self.a.stats().handshakes_refused > 0

    def landed(self, value: int) -> int:
        """Return how many bytes of the target have this value."""
        return int((self.target.numpy() == value).sum())

    def under_way(self, value: int) -> fabric.Transfer:
        """Begin to write the whole memory; returns when a part of it has landed."""
        self.source.numpy()[:] = value
        transfer = self.a.write(self.source, self.remote, imm=self.count.id)
        assert self.world.run_until(lambda: self.landed(value) > 0, 1.0)
        assert self.landed(value) < SIZE, "nothing is under way any more"
        return transfer

    def begin_in_vain(self) -> fabric.Transfer:
        """Cut the link, and begin to write the whole memory; returns the transfer."""
        self.cut()
        self.source.numpy()[:] = 7
        return self.a.write(self.source, self.remote, imm=self.count.id)

    def lands_nowhere(self, transfer: fabric.Transfer) -> None:
        """Check that what `begin_in_vain` began fails, and nothing of it came."""
        with pytest.raises(fabric.TransferFailed):
            transfer.wait(timeout=PATIENT + 5.0)
        assert (self.landed(7), self.count.value) == (0, 0)

    def stays(self) -> None:
        """Check that the target stays as it is."""
        before = self.target.numpy().copy()
        self.world.run(2.0)
        assert (self.target.numpy() == before).all(), "a late write"


def descriptor(region: fabric.MemoryRegion) -> fabric.Descriptor:
    """Return a descriptor as a peer gets it."""
    return fabric.Descriptor.from_bytes(bytes(region.descriptor))


@contextlib.contextmanager
def pair(
    kind: str,
    nics: int = 1,
    *,
    seed: int = 1,
    timeouts: tuple[float, float] = (TIMEOUT, TIMEOUT),
    **options: float,
) -> Iterator[Pair]:
    """Open a world with two engines in it."""
    with sim.World(seed, kind=kind, **options) as world:
        yield Pair(world, nics, timeouts)


# ---- fences ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_a_fence_cuts_off_what_is_under_way(kind: str, slow: float) -> None:
    with pair(kind, 2, jitter=0.05, slow_fences=slow) as p:
        p.meet()
        transfer = p.under_way(7)
        p.b.disconnect(p.a.address, timeout=1.0)
        p.stays()
        assert p.landed(7) < SIZE
        with pytest.raises(fabric.TransferFailed):  # the fence, or a key that is not valid any more
            transfer.wait(timeout=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_deregistering_ends_what_is_under_way(kind: str) -> None:
    with pair(kind, 2, jitter=0.05) as p:
        p.meet()
        p.under_way(7)
        p.b.deregister(p.target, timeout=1.0)
        p.stays()
        # The writer was asked to stop, and heard; the session goes on.
        assert [engine.stats().peers_lost for engine in (p.a, p.b)] == [0, 0]
        assert p.whole()


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_that_a_nic_does_not_let_go_of_is_tried_again(kind: str) -> None:
    """It takes part in nothing meanwhile, and its memory is not free until that went well."""
    with pair(kind) as p:
        p.meet()
        p.world.set(stuck_regions=1.0)
        for _ in range(3):
            with pytest.raises(fabric.FabricError, match="do not free its memory"):
                p.b.deregister(p.target, timeout=1.0)
        with pytest.raises(fabric.TransferFailed, match="region"):
            p.a.write(p.source, p.remote).wait(timeout=1.0)
        p.world.set(stuck_regions=0.0)
        p.b.deregister(p.target, timeout=1.0)
        assert p.b.stats().regions == 0


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_told_that_a_peer_is_gone_has_fenced_it(kind: str) -> None:
    with pair(kind, slow_fences=1.0, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        back = p.b.write(p.target, descriptor(p.source))  # no grant comes: it is never posted
        p.cut()
        with pytest.raises(fabric.FencePending):
            p.b.disconnect(p.a.address, timeout=0)
        with pytest.raises(fabric.WaitTimeout):
            back.wait(timeout=0)
        p.b.disconnect(p.a.address, timeout=1.0)
        with pytest.raises(fabric.PeerUnreachable):
            back.wait(timeout=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_was_called_gone_stays_out(kind: str) -> None:
    """It did not notice, and goes on writing; until this side uses its address again."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        p.meet()
        p.cut()
        back = p.b.write(p.target, descriptor(p.source))
        with pytest.raises(fabric.PeerUnreachable):
            back.wait(timeout=2.0)
        p.cut(on=False)
        p.source.numpy()[:] = 7
        for _ in range(3):
            with pytest.raises(fabric.FabricError):
                p.a.write(p.source, p.remote, imm=p.count.id).wait(timeout=2.0)
        assert p.landed(7) == 0
        assert p.count.value == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("met", [False, True])
def test_a_retry_in_vain_does_not_let_it_in(kind: str, tries: int, met: bool) -> None:
    """It was told again: nothing that the peer had begun lands, not even what was the first."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        if met:
            p.meet()
        early = p.begin_in_vain()
        for _ in range(tries):
            with pytest.raises(fabric.PeerUnreachable):
                p.b.write(p.target, descriptor(p.source)).wait(timeout=2.0)
        p.cut(on=False)
        late = p.a.write(p.source, p.remote, imm=p.count.id)
        p.lands_nowhere(early)
        p.lands_nowhere(late)
        with pytest.raises(fabric.TransferFailed, match="begin it anew"):  # a was told, too
            p.b.write(p.target, descriptor(p.source)).wait(timeout=1.0)  # which lets it in
        p.b.write(p.target, descriptor(p.source)).wait(timeout=1.0)
        p.a.write(p.source, p.remote).wait(timeout=1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("met", [False, True])
def test_a_wait_that_was_told_keeps_the_peer_out(kind: str, met: bool) -> None:
    """Also a peer that was never here: its first write is under way when the wait gives it up."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        if met:
            p.meet()
        early = p.begin_in_vain()
        with pytest.raises(fabric.PeerUnreachable):
            p.count.wait(1, timeout=5.0, peers=[p.a.address])
        p.cut(on=False)
        p.lands_nowhere(early)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_on_one_that_left_before_keeps_it_out(kind: str) -> None:
    """Nobody was told when the session ended; who waits afterwards is, at once."""
    with pair(kind, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        p.a.disconnect(p.b.address, timeout=1.0)
        assert p.world.run_until(lambda: p.b.stats().peers[0].state == "dead", 1.0)
        with pytest.raises(fabric.PeerUnreachable):
            p.count.wait(1, timeout=1.0, peers=[p.a.address])
        p.source.numpy()[:] = 7
        with pytest.raises(fabric.PeerUnreachable, match="has to use our address again"):
            p.a.write(p.source, p.remote, imm=p.count.id).wait(timeout=1.0)
        assert (p.landed(7), p.count.value) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_that_begins_while_a_fence_is_slow_keeps_the_peer_out(kind: str) -> None:
    """An awaited one, which looks only once its loop comes round."""
    assert sum(asyncio.run(late_wait(kind, seed)) for seed in range(10)) > 2


async def late_wait(kind: str, seed: int) -> bool:
    """Return whether the fence was slow; see the test above."""
    with pair(kind, seed=seed, slow_fences=1.0, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        p.a.disconnect(p.b.address, timeout=1.0)
        assert p.world.run_until(p.is_over, 1.0)
        if p.b.stats().peers[0].state != "fencing":
            return False
        waiting = asyncio.ensure_future(p.count.reached(1, peers=[p.a.address]))
        for _ in range(3):
            await asyncio.sleep(0)
        p.world.run(0.2)
        assert p.b.stats().peers[0].state == "dead"
        p.source.numpy()[:] = 7
        with pytest.raises(fabric.PeerUnreachable):
            p.a.write(p.source, p.remote).wait(timeout=1.0)
        with pytest.raises(fabric.PeerUnreachable):
            await waiting
        assert p.landed(7) == 0
        return True


def test_who_was_disconnected_stays_out_when_its_entry_is_reused() -> None:
    """The number of the fence goes with the entry in the table of peers."""
    with pair("ordered", timeouts=(3000.0, TIMEOUT)) as p:
        early = p.begin_in_vain()
        p.b.disconnect(p.a.address, timeout=1.0)
        with pytest.raises(fabric.TransferFailed):
            p.b.write_imm(p.a.address, 1, deadline=0.1).wait(timeout=2.0)
        p.world.run(1.0)
        for number in range(1030):
            id_ = number.to_bytes(16, "big")
            p.b.disconnect(Address(id_, "other", p.a.address.nics), timeout=0)
        assert "a" not in [peer.label for peer in p.b.stats().peers]
        p.cut(on=False)
        p.lands_nowhere(early)


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_for_something_else_lets_in_nothing_of_before(kind: str) -> None:
    """They never met; its first write waits for a session, and this side's retry begins one."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        other = p.b.alloc(8)
        early = p.begin_in_vain()
        with pytest.raises(fabric.PeerUnreachable):
            p.b.write(p.target, descriptor(p.source)).wait(timeout=2.0)
        p.cut(on=False)
        p.b.write(other, descriptor(p.source), length=8).wait(timeout=5.0)
        p.lands_nowhere(early)


def caller(p: Pair) -> fabric.Peer:
    """Let the first engine call the second, which knows no address of it; returns the name."""
    p.a.send(p.b.address, b"hello").wait(timeout=1.0)
    return p.b.recv(timeout=1.0)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("up", [False, True])
def test_one_without_an_address_is_fenced_and_comes_again(kind: str, up: bool) -> None:
    """We cannot use its address to let it in again, so a number keeps out what it had begun."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        name = caller(p)
        if not up:
            p.a.disconnect(p.b.address, timeout=1.0)
            assert p.world.run_until(p.is_over, 1.0)
        early = p.begin_in_vain()
        with pytest.raises(fabric.PeerUnreachable):
            p.b.send(name, b"an answer").wait(timeout=2.0)
        p.cut(on=False)
        p.lands_nowhere(early)
        for _ in range(2):
            with contextlib.suppress(fabric.TransferFailed):
                p.a.write(p.source, p.remote).wait(timeout=5.0)
        assert p.landed(7) == SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_were_told_come_together_again(kind: str) -> None:
    """Each uses the other's address once, in turn; a refusal bars nobody."""
    with pair(kind) as p:
        p.meet()
        p.cut()
        both = [
            p.a.write(p.source, p.remote),
            p.b.write(p.target, descriptor(p.source)),
        ]
        for transfer in both:
            with pytest.raises(fabric.PeerUnreachable):
                transfer.wait(timeout=5.0)
        p.cut(on=False)
        with pytest.raises(fabric.PeerUnreachable, match="has to use our address again"):
            p.a.write(p.source, p.remote).wait(timeout=1.0)
        with pytest.raises(fabric.TransferFailed, match="begin it anew"):
            p.b.write(p.target, descriptor(p.source)).wait(timeout=1.0)
        p.b.write(p.target, descriptor(p.source)).wait(timeout=1.0)
        p.a.write(p.source, p.remote).wait(timeout=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_refusal_crosses_does_not_land(kind: str) -> None:
    """The peer uses our address again after it has refused us, and before we hear of that."""
    crossed = 0
    for seed in range(30):
        with pair(kind, seed=seed, jitter=0.02, timeouts=(PATIENT, PATIENT)) as p:
            p.meet()
            p.a.disconnect(p.b.address, timeout=1.0)  # a bars b
            if not p.world.run_until(p.is_over, 1.0):
                continue
            told = p.b.write(p.target, descriptor(p.source))
            if not p.world.run_until(p.refused, 1.0):
                continue
            p.source.numpy()[:] = 7
            late = p.a.write(p.source, p.remote)
            assert p.world.run_until(told.done, 5.0)
            try:
                told.wait(timeout=0)
            except fabric.PeerUnreachable:
                crossed += 1
                before = p.landed(7)
                p.world.run(2.0)
                assert p.landed(7) == before, "a late write"
            except fabric.TransferFailed:
                pass
            with contextlib.suppress(fabric.TransferFailed):
                late.wait(timeout=1.0)
    assert crossed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_while_a_fence_is_slow_is_told_as_well(kind: str) -> None:
    """Nobody was told of the end itself; who calls before the fence is through is."""
    slow = 0
    for seed in range(20):
        with pair(kind, seed=seed, slow_fences=1.0, timeouts=(PATIENT, PATIENT)) as p:
            p.meet()
            p.a.disconnect(p.b.address, timeout=1.0)
            assert p.world.run_until(p.is_over, 1.0)
            if p.b.stats().peers[0].state != "fencing":
                continue
            slow += 1
            with pytest.raises(fabric.PeerUnreachable):
                p.b.write(p.target, descriptor(p.source)).wait(timeout=1.0)
            p.source.numpy()[:] = 7
            with pytest.raises(fabric.FabricError):
                p.a.write(p.source, p.remote).wait(timeout=1.0)
            assert p.landed(7) == 0
    assert slow > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_frame_of_an_attempt_in_vain_disturbs_nobody(kind: str, seed: int) -> None:
    """A copy comes when a later attempt has come up."""
    with pair(kind, seed=seed, double_contacts=1.0) as p:
        p.world.cut("a.0", "b.0")
        with pytest.raises(fabric.PeerUnreachable):
            p.a.write(p.source, p.remote).wait(timeout=2.0)
        p.world.cut("a.0", "b.0", on=False)
        for number in range(1, 300):
            p.a.write(p.source, p.remote, length=8, imm=p.count.id).wait(timeout=1.0)
            p.count.wait(number, timeout=1.0, peers=[p.a.address])
            p.world.run(0.01)
        assert [engine.stats().peers_lost for engine in (p.a, p.b)] == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_frame_of_before_they_met_the_other_way_round(kind: str, seed: int) -> None:
    """What its peer began came up; then its own first frame of before comes.

    One that comes before is believed: a session begins that nobody wants, and ends in vain.
    """
    with pair(kind, seed=seed, double_contacts=1.0) as p:
        p.world.cut("a.0", "b.0")
        p.a.write_imm(p.b.address, p.count.id).cancel()
        p.world.run(2 * TIMEOUT)
        p.world.cut("a.0", "b.0", on=False)
        for _ in range(5):
            with contextlib.suppress(fabric.PeerUnreachable):
                p.b.write_imm(p.a.address, 1).wait(timeout=2.0)
                break
        lost = [engine.stats().peers_lost for engine in (p.a, p.b)]
        p.count.close()
        p.count = p.b.counter()
        for number in range(1, 300):
            p.a.write(p.source, p.remote, length=8, imm=p.count.id).wait(timeout=1.0)
            p.count.wait(number, timeout=1.0, peers=[p.a.address])
            p.world.run(0.01)
        assert [engine.stats().peers_lost for engine in (p.a, p.b)] == lost


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_first_frame_disturbs_nobody(kind: str, seed: int) -> None:
    """A copy comes when its session is over: nothing is opened, and the present one goes on."""
    with pair(kind, seed=seed, double_contacts=1.0) as p:
        for _ in range(3):
            p.meet()
            p.b.disconnect(p.a.address, timeout=1.0)
            p.b.write_imm(p.a.address, 1).wait(timeout=1.0)
        for number in range(1, 300):
            p.a.write(p.source, p.remote, length=8, imm=p.count.id).wait(timeout=1.0)
            p.count.wait(number, timeout=1.0)
            p.world.run(0.01)
        assert sum(engine.stats().peers_lost for engine in (p.a, p.b)) == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_a_fence_of_one_peer_is_nothing_to_the_others(kind: str, slow: float) -> None:
    with pair(kind, 2, jitter=0.005, slow_fences=slow) as p:
        p.meet()
        c = p.world.engine("c", 2, peer_timeout=TIMEOUT)
        source, target, count = c.alloc(SIZE), p.b.alloc(SIZE), p.b.counter()
        source.numpy()[:] = 9
        writes = [c.write(source, descriptor(target), imm=count.id) for _ in range(50)]
        p.under_way(7)
        p.b.disconnect(p.a.address, timeout=1.0)
        writes += [c.write(source, descriptor(target), imm=count.id) for _ in range(50)]
        for transfer in writes:
            transfer.wait(timeout=5.0)
        count.wait(len(writes), timeout=1.0)
        assert (target.numpy() == 9).all()
        assert c.stats().peers_lost == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_of_one_peer_is_fenced_alone(kind: str) -> None:
    """What it was given ends; what it and others hold besides goes on."""
    with pair(kind, 2, jitter=0.05) as p:
        c = p.world.engine("c", peer_timeout=TIMEOUT)
        other, number = c.alloc(8), p.b.counter()
        p.meet()
        shown = p.target.descriptor_for(p.a.address)
        p.remote = fabric.Descriptor.from_bytes(bytes(shown))
        transfer = p.under_way(7)
        p.b.deregister(shown, timeout=1.0)
        p.stays()
        with contextlib.suppress(fabric.TransferFailed):
            transfer.wait(timeout=1.0)
        with pytest.raises(fabric.TransferFailed, match="region"):
            p.a.write(p.source, p.remote).wait(timeout=1.0)
        for engine, source in ((p.a, p.source), (c, other)):
            engine.write(source, descriptor(p.target), length=8, imm=number.id).wait(timeout=1.0)
        number.wait(2, timeout=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_connect_at_once(kind: str) -> None:
    """Also when first frames are lost, doubled and late: one session, and nothing is lost."""
    for seed in range(50):
        faults = {"lost_contacts": 0.3, "double_contacts": 0.5, "jitter": 0.02}
        with pair(kind, 2, seed=seed, timeouts=(5.0, 5.0), **faults) as p:
            back = p.a.counter()
            transfers = [
                p.a.write(p.source, p.remote, imm=p.count.id),
                p.b.write(p.target, descriptor(p.source), imm=back.id),
                p.a.send(p.b.address, b"from a"),
                p.b.send(p.a.address, b"from b"),
            ]
            for transfer in transfers:
                transfer.wait(timeout=5.0)
            p.count.wait(1, timeout=1.0)
            back.wait(1, timeout=1.0)
            assert bytes(p.a.recv(timeout=1.0)[1]) == b"from b"
            assert bytes(p.b.recv(timeout=1.0)[1]) == b"from a"
            p.world.run(3.0)
            assert [e.stats().peers_lost for e in (p.a, p.b)] == [0, 0]
            assert [e.stats().peers_up for e in (p.a, p.b)] == [1, 1]


def test_a_lane_of_the_handshake_breaks() -> None:
    """Answers get lost on one lane, which is closed as soon as the session is up over the other."""
    for seed in range(200):
        faults = {"lost_contacts": 0.3, "double_contacts": 0.5, "jitter": 0.1}
        with pair("ordered", 2, seed=seed, timeouts=(5.0, 5.0), **faults) as p:
            begun = p.a.write_imm(p.b.address, p.count.id)
            p.world.run(seed % 20 / 100)
            ends = (f"b.{seed % 2}", f"a.{seed % 2}")
            p.world.cut(*ends)
            p.world.run(seed % 7 / 2)
            p.world.cut(*ends, on=False)
            p.world.run(2.0)
            with contextlib.suppress(fabric.TransferFailed):
                begun.wait(timeout=10.0)
            assert p.count.value == (begun.state == "done")


# ---- counting ----


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_there(kind: str) -> None:
    with pair(kind, 2, jitter=0.01) as p:
        for number in range(1, 30):
            p.source.numpy()[:] = number
            p.a.write(p.source, p.remote, imm=p.count.id)
            p.count.wait(number, timeout=1.0)
            assert p.landed(number) == SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_before_the_end_counts(kind: str) -> None:
    """Its NIC took the writes of a peer that is gone while this process stood still."""
    count = 500
    with pair(kind) as p:
        p.meet()
        p.world.hang("b")
        for transfer in [p.a.write_imm(p.b.address, p.count.id) for _ in range(count)]:
            transfer.wait(timeout=1.0)
        p.world.kill("a")
        p.world.run(3 * TIMEOUT)
        p.world.resume("b")
        with pytest.raises(fabric.PeerUnreachable):
            p.count.wait(count + 1, timeout=5.0, peers=[p.a.address])
        assert p.count.value == count


def goodbye(seed: int, kind: str, first: int) -> int:
    """Let a peer count on one NIC, and say goodbye on the other; returns whether that came."""
    count = 300
    with pair(kind, 2, seed=seed, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        p.world.hang("b")
        for number in range(2 * count):
            if number % 2 == first:
                p.a.write_imm(p.b.address, p.count.id).wait(timeout=1.0)
            else:
                p.a.write(p.source, p.remote, length=8).wait(timeout=1.0)
        p.a.close()
        p.world.run(0.01)
        p.world.resume("b")
        p.world.run(1.0)
        assert p.count.value == count
        return p.b.stats().peers_lost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1])
def test_what_another_lane_took_counts_after_a_goodbye(kind: str, first: int) -> None:
    """It is read first: the immediates wait in the other NIC's queue, for many turns."""
    assert sum(goodbye(seed, kind, first) for seed in range(6)) > 0, "no goodbye came"


@pytest.mark.parametrize("step", range(0, 60, 3))
def test_a_lane_that_takes_over_counts_once(step: int) -> None:
    """The sender finds all answers there when its NIC goes down: nothing was under way."""
    pages = list(range(1000))
    with pair("ordered", 2, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        transfer = p.a.write_pages(p.source, p.remote, pages, pages, page_bytes=256, imm=p.count.id)
        for _ in range(step):
            p.world.step()
        p.world.hang("a")
        p.world.run(0.1)
        p.world.resume("a")
        p.world.link("a.1", up=False)
        transfer.wait(timeout=5.0)
        p.world.run(0.5)
        assert p.count.value == len(pages)


# ---- transfers that fail ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_receiver_hears_of_a_cancellation(kind: str) -> None:
    pages = list(range(1000))
    with pair(kind, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        transfer = p.a.write_pages(p.source, p.remote, pages, pages, page_bytes=256, imm=p.count.id)
        assert p.world.run_until(lambda: p.count.value > 0, 1.0)
        transfer.cancel()
        with pytest.raises(fabric.TransferCancelled):
            transfer.wait(timeout=1.0)
        with pytest.raises(fabric.CounterVoid):
            p.count.wait(len(pages), timeout=1.0)
        p.stays()


@pytest.mark.parametrize("kind", KINDS)
def test_all_cancellations_are_heard_of(kind: str) -> None:
    """Also of those that fail while the receiver is told of one before."""
    with pair(kind, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        counts = [p.b.counter() for _ in range(20)]
        pages = list(range(1000))
        transfers = [
            p.a.write_pages(p.source, p.remote, pages, pages, page_bytes=8, imm=count.id)
            for count in counts
        ]
        for transfer in transfers:
            transfer.cancel()
            p.a.progress()
        for transfer, count in zip(transfers, counts, strict=True):
            with pytest.raises(fabric.TransferCancelled):
                transfer.wait(timeout=1.0)
            with pytest.raises(fabric.CounterVoid):
                count.wait(len(pages), timeout=1.0)


def is_void(count: fabric.ImmCounter) -> bool:
    """Return whether a wait would be told so now."""
    try:
        count.wait(1, timeout=0)
    except fabric.CounterVoid:
        return True
    except fabric.WaitTimeout:
        pass
    return False


def late_writes(seed: int) -> tuple[int, int]:
    """Let lanes break under small writes; returns how many were void, and how many of them came."""
    size, frozen, counts = 1024, {}, []
    with pair("ordered", 3, seed=seed, jitter=0.1, slow_fences=1.0) as p:
        p.meet()
        p.world.set(lost_answers=0.02)
        p.source.numpy()[:] = 7
        slots = p.target.numpy().reshape(-1, size)
        for number in range(120):
            if number < 100:
                counts.append(p.b.counter())
                place = {"dst_offset": number * size, "length": size}
                p.a.write(p.source, p.remote, imm=counts[-1].id, **place)
            p.world.run(0.005)
            for i, count in enumerate(counts):
                if i not in frozen and is_void(count):
                    frozen[i] = slots[i].tobytes()
        p.world.run(0.5)
        return len(frozen), sum(slots[i].tobytes() != kept for i, kept in frozen.items())


def test_no_id_is_void_while_a_write_may_land() -> None:
    """The lane that broke is closed slowly, and what had left the NIC comes late."""
    seen = [late_writes(seed) for seed in range(40)]
    assert sum(void for void, _ in seen) > 100
    assert [late for _, late in seen] == [0] * len(seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writes", [False, True])
def test_silence_is_noticed(kind: str, writes: bool) -> None:
    """Its NIC takes all that is sent, and acknowledges; that is no word of its process."""
    with pair(kind, timeouts=(PATIENT, TIMEOUT)) as p:
        p.meet()
        back = descriptor(p.source)
        p.b.write(p.target, back, length=8).wait(timeout=1.0)
        p.world.hang("a")
        begin, told = p.world.now, ""
        while not told and p.world.now < begin + 5.0:
            if writes:
                p.b.write(p.target, back, length=8)
            try:
                p.count.wait(1, timeout=0.05, peers=[p.a.address])
            except fabric.WaitTimeout:
                pass
            except fabric.PeerUnreachable as error:
                told = str(error)
        assert "silent" in told
        assert 0.9 * TIMEOUT < p.world.now - begin < 2 * TIMEOUT


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_ends_a_transfer(kind: str) -> None:
    """Also where it waits for a grant that does not come."""
    with pair(kind, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        p.cut()
        begin = p.world.now
        transfer = p.b.write(p.target, descriptor(p.source), deadline=0.1)
        with pytest.raises(fabric.TransferFailed, match="deadline"):
            transfer.wait(timeout=5.0)
        assert 0.1 <= p.world.now - begin < 0.2


# ---- messages ----


def test_messages_outlive_the_lanes_that_carry_them(seed: int) -> None:
    """Lanes break again and again; every message comes, once, and in order."""
    with pair("ordered", 2, seed=seed, jitter=0.002, timeouts=(PATIENT, PATIENT)) as p:
        p.meet()
        sent: list[fabric.Transfer] = []
        come: list[int] = []

        def receive() -> None:
            with contextlib.suppress(fabric.WaitTimeout):
                while True:
                    come.append(int.from_bytes(p.b.recv(timeout=0)[1][:8], "little"))

        for number in range(200):
            size = 8 + number % 7 * 1000
            sent.append(p.a.send(p.b.address, number.to_bytes(8, "little") + bytes(size)))
            if number % 20 == 10:
                p.world.link(f"b.{number // 20 % 2}", up=False)
            if number % 20 == 19:
                p.world.run(0.3)
                for i in range(2):
                    p.world.link(f"b.{i}", up=True)
                assert p.world.run_until(p.whole, 30.0)
            p.world.run(0.001)
            receive()
        p.world.run(2.0)
        receive()
        for transfer in sent:
            transfer.wait(timeout=0)
        assert come == list(range(200))


@pytest.mark.parametrize("kind", KINDS)
def test_a_newcomer_has_idle_peers_looked_at(kind: str) -> None:
    """One that died without a word is given up; one that only had no business is not."""
    with pair(kind) as p:
        p.meet()
        idle = p.world.engine("idle", peer_timeout=TIMEOUT)
        idle.write(idle.alloc(8), p.remote, length=8).wait(timeout=1.0)
        p.world.kill("a")
        p.world.run(10 * TIMEOUT)
        assert p.b.stats().peers_up == 2, "idle engines are to leave each other alone"
        frames = idle.stats().frames_rx
        p.world.run(10 * TIMEOUT)
        assert idle.stats().frames_rx == frames
        late = p.world.engine("late", peer_timeout=TIMEOUT)
        late.write(late.alloc(8), p.remote, length=8).wait(timeout=1.0)
        p.world.run(2 * TIMEOUT)
        assert [peer.label for peer in p.b.stats().peers if peer.state == "up"] == ["idle", "late"]
        assert idle.stats().peers_lost == 0
        frames = idle.stats().frames_rx
        p.world.run(10 * TIMEOUT)
        assert idle.stats().frames_rx == frames
