"""Whatever happens in whatever order: the contracts of DESIGN hold, on simulated NICs.

A history is a schedule of writes, cancellations, deadlines, hangs, deaths, restarts, links that go
down, partitions and fences among a few engines. After each step, and at the end when all has been
mended and enough time has passed:

- a transfer ends once, and the end stays what it was;
- a counter never exceeds the ranges that were begun under its id, and reaches them if none failed;
- whoever was told that a transfer is done finds its bytes there, and those that the source held;
- after a fence, a void id, a cancellation, or deregistering, the bytes of the destination stay as
  they are;
- what a peer had begun when somebody was told that it is unreachable never lands there, whichever
  of them comes to the other again;
- messages come in order, none twice, and all that are done;
- no wait outlives its timeout, no transfer its deadline and two peer timeouts;
- engines that live hold nothing at the end that was not asked for.

``FABRIC_SIM_HISTORIES`` says how many there are (default: 300; `make test-sim`: 5000). Hypothesis
shrinks what fails, unless ``FABRIC_SIM_SHRINK=0``.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fabric
from fabric import sim

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

HISTORIES = int(os.environ.get("FABRIC_SIM_HISTORIES", "300"))
SHRINK = os.environ.get("FABRIC_SIM_SHRINK") != "0"
TIMEOUT = 0.5  # peer_timeout, in simulated seconds
PATIENT = 4 * TIMEOUT  # of every third engine: it waits when others have given up
SLOT = 1021  # bytes; odd, so that the cuts of a large write leave remainders
SLOTS = 320  # of a region; each takes part in one transfer
PAGES = 8  # slots of a paged write, at most
BIG = 160  # slots of a large write, of which each lane takes a part, in many work requests
POISON = 0xEE  # what a source holds once its transfer has ended
BLANK = 0
SLACK = 0.02  # of a wait: the step in which its time runs out
TRIES = 4  # of two engines to come together again
CHANCE = st.sampled_from([0.0, 0.0, 0.01, 0.2])


@dataclass
class Machine:
    """An engine and its memory."""

    name: str
    engine: fabric.TransferEngine
    source: fabric.MemoryRegion
    target: fabric.MemoryRegion
    state: str = "up"
    taken: int = 0  # slots of `target`
    used: int = 0  # slots of `source`
    heard: dict[bytes, list[int]] = field(default_factory=dict)  # messages, by their sender
    private: list[fabric.Descriptor] = field(default_factory=list)  # of `target`, not taken back


@dataclass
class Count:
    """A counter, and what was begun under its id."""

    owner: Machine
    counter: fabric.ImmCounter
    ranges: int = 0
    fenced: bool = (
        False  # its owner fenced one that it counts: what it had not looked at is cut off
    )
    moves: list[Move] = field(default_factory=list)


@dataclass
class Move:
    """A transfer, and where its bytes go."""

    transfer: fabric.Transfer
    sender: Machine
    receiver: Machine
    count: Count
    value: int
    target: fabric.MemoryRegion
    slots: range  # of the target
    sources: range
    until: float  # it has ended by then
    private: fabric.Descriptor | None = None  # made for its sender alone
    end: str = ""
    frozen: bytes | None = None  # what the target holds from now on


@dataclass
class Mail:
    """A message."""

    transfer: fabric.Transfer
    sender: Machine
    receiver: Machine
    number: int
    end: str = ""


def outcome(transfer: fabric.Transfer) -> str:
    """Return how a transfer ended, or an empty text."""
    try:
        transfer.wait(timeout=0)
    except fabric.WaitTimeout:
        return ""
    except fabric.FabricError as error:
        return type(error).__name__
    return "done"


class Histories(RuleBasedStateMachine):
    """See the text of the module."""

    world: sim.World

    @initialize(
        seed=st.integers(0, 2**32),
        kind=st.sampled_from(sorted(sim.KINDS)),
        nics=st.integers(1, 2),
        jitter=st.sampled_from([0.0, 1e-4, 5e-3]),
        lost=CHANCE,
        contacts=CHANCE,
        slow=CHANCE,
    )
    def begin(
        self,
        seed: int,
        kind: str,
        nics: int,
        jitter: float,
        lost: float,
        contacts: float,
        slow: float,
    ) -> None:
        self.world = sim.World(
            seed,
            kind=kind,
            jitter=jitter,
            lost_writes=lost,
            lost_answers=lost,
            lost_contacts=contacts,
            double_contacts=contacts,
            slow_lanes=slow,
            slow_fences=slow,
        )
        self.nics = nics
        self.born = 0
        self.machines = [self.machine() for _ in range(3)]
        self.moves: list[Move] = []
        self.counts: list[Count] = []
        self.mail: list[Mail] = []
        self.cuts: list[tuple[str, str]] = []
        self.down: list[str] = []

    def machine(self) -> Machine:
        """Start an engine."""
        self.born += 1
        name = f"m{self.born}"
        timeout = PATIENT if self.born % 3 == 0 else TIMEOUT
        engine = self.world.engine(name, self.nics, peer_timeout=timeout)
        return Machine(name, engine, engine.alloc(SLOTS * SLOT), engine.alloc(SLOTS * SLOT))

    def pick(self, number: int) -> Machine:
        """Return one of the engines that can be called."""
        ready = [machine for machine in self.machines if machine.state == "up"]
        return ready[number % len(ready)]

    # ---- what may happen ----

    @rule(
        a=st.integers(0, 2),
        b=st.integers(0, 2),
        fresh=st.booleans(),
        size=st.sampled_from([0, 1, 3, PAGES, BIG]),
        pages=st.booleans(),
        deadline=st.sampled_from([None, None, 0.001, 0.1]),
        private=st.booleans(),
    )
    def write(
        self,
        a: int,
        b: int,
        fresh: bool,
        size: int,
        pages: bool,
        deadline: float | None,
        private: bool,
    ) -> None:
        self.begin_write(self.pick(a), self.machines[b], fresh, size, pages, deadline, private)

    def begin_write(
        self,
        sender: Machine,
        receiver: Machine,
        fresh: bool,
        size: int,
        pages: bool = False,
        deadline: float | None = None,
        private: bool = False,
    ) -> None:
        """Begin a transfer, if there is room for it."""
        if receiver is sender or receiver.taken + size > SLOTS or sender.used + size > SLOTS:
            return
        count = self.count(receiver, fresh)
        if count is None:
            return
        slots = range(receiver.taken, receiver.taken + size)
        sources = range(sender.used, sender.used + size)
        receiver.taken += size
        sender.used += size
        value = 1 + len(self.moves) % 200
        view(sender.source, sources)[:] = value
        alone = private and receiver.state == "up"
        shown = self.private(receiver, sender) if alone else None
        descriptor = fabric.Descriptor.from_bytes(bytes(shown or receiver.target.descriptor))
        transfer, ranges = self.submit(sender, descriptor, slots, sources, count, pages, deadline)
        count.ranges += ranges
        until = self.world.now + min(deadline or 60.0, 2 * PATIENT) + 2 * PATIENT + SLACK
        target = receiver.target
        move = Move(transfer, sender, receiver, count, value, target, slots, sources, until, shown)
        self.moves.append(move)
        count.moves.append(move)

    def private(self, owner: Machine, peer: Machine) -> fabric.Descriptor:
        """Return a descriptor of an engine's memory for one peer, which this takes back alone."""
        result = owner.target.descriptor_for(peer.engine.address)
        if result not in owner.private:
            owner.private.append(result)
        return result

    def submit(
        self,
        sender: Machine,
        descriptor: fabric.Descriptor,
        slots: range,
        sources: range,
        count: Count,
        pages: bool,
        deadline: float | None,
    ) -> tuple[fabric.Transfer, int]:
        """Begin a transfer; returns it, and its number of ranges."""
        common: dict[str, Any] = {"imm": count.counter.id, "deadline": deadline}
        if pages and slots and len(slots) <= PAGES:
            transfer = sender.engine.write_pages(
                sender.source, descriptor, list(sources), list(slots), page_bytes=SLOT, **common
            )
            return transfer, len(slots)
        transfer = sender.engine.write(
            sender.source,
            descriptor,
            src_offset=sources.start * SLOT,
            dst_offset=slots.start * SLOT,
            length=len(slots) * SLOT,
            **common,
        )
        return transfer, 1

    def count(self, owner: Machine, fresh: bool) -> Count | None:
        """Return a counter of an engine, where it can be asked for one a fresh one."""
        mine = [count for count in self.counts if count.owner is owner]
        if (fresh or not mine) and owner.state == "up":
            # Every other id is the user's own; each is used once.
            number = len(self.counts) if len(self.counts) % 2 else None
            mine.append(Count(owner, owner.engine.counter(number)))
            self.counts.append(mine[-1])
        return mine[-1] if mine else None

    @precondition(lambda self: self.moves)
    @rule(number=st.integers(0, 1000))
    def cancel(self, number: int) -> None:
        move = self.moves[number % len(self.moves)]
        if move.sender.state == "up":
            move.transfer.cancel()

    @rule(a=st.integers(0, 2), b=st.integers(0, 2), size=st.sampled_from([8, 100, 20_000]))
    def send(self, a: int, b: int, size: int) -> None:
        sender, receiver = self.pick(a), self.machines[b]
        if sender is receiver:
            return
        payload = len(self.mail).to_bytes(8, "little") + bytes(size - 8)
        transfer = sender.engine.send(receiver.engine.address, payload)
        self.mail.append(Mail(transfer, sender, receiver, len(self.mail)))

    @rule()
    def receive(self) -> None:
        """Messages of one sender come in order, and none comes twice."""
        for machine in self.machines:
            while machine.state == "up":
                try:
                    sender, payload = machine.engine.recv(timeout=0)
                except fabric.WaitTimeout:
                    break
                heard = machine.heard.setdefault(sender.id, [])
                heard.append(int.from_bytes(payload[:8], "little"))
                assert heard == sorted(set(heard)), "out of order, or twice"
                assert payload.count(0, 8) == len(payload) - 8

    @rule(a=st.integers(0, 2), timeout=st.sampled_from([0.0, 0.01, 1.0]))
    def deregister(self, a: int, timeout: float) -> None:
        """Memory that was taken back is not written to any more."""
        machine = self.pick(a)
        old = machine.target
        for shown in list(machine.private):
            if not self.take_back(machine, shown, timeout):
                return
        told = self.timed(timeout, lambda: machine.engine.deregister(old, timeout=timeout))
        assert told in ("", "WaitTimeout", "FencePending"), told
        if told == "":
            machine.target, machine.taken = machine.engine.alloc(SLOTS * SLOT), 0
            self.freeze([move for move in self.moves if move.target is old])

    def take_back(self, machine: Machine, shown: fabric.Descriptor, timeout: float) -> bool:
        """Take a descriptor back that was made for one peer; returns whether that went well."""
        told = self.timed(timeout, lambda: machine.engine.deregister(shown, timeout=timeout))
        assert told in ("", "WaitTimeout", "FencePending"), told
        if told == "":
            machine.private.remove(shown)
            self.freeze([move for move in self.moves if move.private == shown])
        return told == ""

    @rule(a=st.integers(0, 2), number=st.integers(0, 9), timeout=st.sampled_from([0.0, 0.01, 1.0]))
    def fence_a_descriptor(self, a: int, number: int, timeout: float) -> None:
        """Only what one peer was given ends, and that all of it."""
        machine = self.pick(a)
        if machine.private:
            shown = machine.private[number % len(machine.private)]
            self.take_back(machine, shown, timeout)

    @rule(steps=st.integers(1, 30))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule(seconds=st.sampled_from([0.001, 0.05, TIMEOUT, 3 * TIMEOUT]))
    def run(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(a=st.integers(0, 2))
    def hang(self, a: int) -> None:
        if sum(machine.state == "up" for machine in self.machines) > 1:
            machine = self.pick(a)
            machine.state = "hung"
            self.world.hang(machine.name)

    @rule()
    def resume(self) -> None:
        for machine in self.machines:
            if machine.state == "hung":
                machine.state = "up"
                self.world.resume(machine.name)

    @rule(a=st.integers(0, 2))
    def restart(self, a: int) -> None:
        """An engine dies, and another takes its place."""
        self.world.kill(self.machines[a].name)
        self.machines[a].state = "dead"
        self.machines[a] = self.machine()

    @rule(a=st.integers(0, 2), nic=st.integers(0, 1))
    def link_down(self, a: int, nic: int) -> None:
        machine = self.pick(a)
        name = f"{machine.name}.{nic % self.nics}"
        self.down.append(name)
        self.world.link(name, up=False)

    @rule(a=st.integers(0, 2), b=st.integers(0, 2), nic=st.integers(0, 1))
    def partition(self, a: int, b: int, nic: int) -> None:
        ends = [f"{self.machines[i].name}.{nic % self.nics}" for i in (a, b)]
        self.cuts.append((ends[0], ends[1]))
        self.world.cut(*ends)

    @rule(a=st.integers(0, 2), b=st.integers(0, 2), tries=st.integers(1, 2), size=st.integers(0, 3))
    def lose_touch(self, a: int, b: int, tries: int, size: int) -> None:
        """Two do not reach each other; both have begun something, and one goes on trying."""
        here, there = self.pick(a), self.machines[b]
        if here is there or there.state != "up":
            return
        for nic in range(self.nics):
            ends = [f"{machine.name}.{nic}" for machine in (here, there)]
            for pair in (ends, ends[::-1]):
                self.cuts.append((pair[0], pair[1]))
                self.world.cut(*pair)
        self.begin_write(there, here, True, size)
        for _ in range(tries):
            self.begin_write(here, there, True, size)
            self.world.run(1.2 * TIMEOUT)
            self.ends_are_final()

    @rule()
    def mend(self) -> None:
        dead = {f"{move.name}." for move in self.every() if move.state in ("dead", "hung")}
        for name in self.down:
            if not any(name.startswith(prefix) for prefix in dead):
                self.world.link(name, up=True)
        for ends in self.cuts:
            self.world.cut(*ends, on=False)
        self.down, self.cuts = [], []

    def every(self) -> list[Machine]:
        """Return all engines that ever were."""
        seen = {id(m): m for m in self.machines}
        for move in self.moves:
            seen.update({id(m): m for m in (move.sender, move.receiver)})
        return list(seen.values())

    @rule(a=st.integers(0, 2), b=st.integers(0, 2), timeout=st.sampled_from([0.0, 0.01, 1.0]))
    def disconnect(self, a: int, b: int, timeout: float) -> None:
        """After a fence nothing that the peer began lands any more."""
        here, there = self.pick(a), self.machines[b]
        if here is there:
            return
        begun = list(self.moves)
        for count in self.counts:
            count.fenced |= any(m.sender is there and count.owner is here for m in count.moves)
        fenced = self.timed(timeout, lambda: here.engine.disconnect(there.engine.address, timeout))
        if fenced != "FencePending":
            assert fenced == ""
            self.freeze([m for m in begun if m.receiver is here and m.sender is there])

    @precondition(lambda self: self.counts)
    @rule(
        number=st.integers(0, 1000), timeout=st.sampled_from([0.0, 0.01, 1.0]), named=st.booleans()
    )
    def wait(self, number: int, timeout: float, named: bool) -> None:
        """A wait ends in time. Who is told that an id is void may use the memory again."""
        count = self.counts[number % len(self.counts)]
        if count.owner.state != "up":
            return
        peers = [m.sender.engine.address for m in count.moves] if named else None
        told = self.timed(
            timeout, lambda: count.counter.wait(count.ranges, timeout=timeout, peers=peers)
        )
        assert told in ("", "WaitTimeout", "CounterVoid", "PeerUnreachable"), told
        if told == "PeerUnreachable":
            gone = next(m.sender for m in count.moves if f"peer {m.sender.name} is" in self.told)
            self.cut_off(count.owner, gone)
        if told == "":
            self.landed(count)
        if told == "CounterVoid":
            self.freeze([m for m in count.moves if m.end and m.end != "done"])

    def timed(self, timeout: float, call: Callable[[], None]) -> str:
        """Call; returns the class of what was raised. It must not take longer than `timeout`."""
        begin = self.world.now
        told = self.told = ""
        try:
            call()
        except fabric.FabricError as error:
            told, self.told = type(error).__name__, str(error)
        assert self.world.now - begin <= timeout + SLACK, "a wait outlived its timeout"
        return told

    # ---- what must hold ----

    def freeze(self, moves: list[Move]) -> None:
        """From now on the targets of these stay as they are."""
        for move in moves:
            if move.frozen is None:
                move.frozen = view(move.target, move.slots).tobytes()

    def cut_off(self, here: Machine, gone: Machine) -> None:
        """Somebody was told that a peer is unreachable: what that had begun lands no more."""
        self.freeze([m for m in self.moves if m.receiver is here and m.sender is gone])

    def landed(self, count: Count) -> None:
        """All ranges were counted, so all bytes are there."""
        for move in count.moves:
            assert (view(move.target, move.slots) == move.value).all(), "counted, and not there"

    @invariant()
    def ends_are_final(self) -> None:
        for move in self.moves if hasattr(self, "moves") else []:
            if move.sender.state != "up":
                continue
            end = outcome(move.transfer)
            assert not move.end or end == move.end, f"it was {move.end}, and now it is {end}"
            if end and not move.end:
                self.ended(move, end)
            assert end or self.world.now <= move.until or not self.fair, "it does not end"
        for mail in self.mail if hasattr(self, "mail") else []:
            if mail.sender.state == "up" and not mail.end:
                mail.end = outcome(mail.transfer)
                if mail.end == "PeerUnreachable":
                    self.cut_off(mail.sender, mail.receiver)

    fair = False  # at the end, when nobody hangs or is cut off

    def ended(self, move: Move, end: str) -> None:
        """A transfer has ended: its source is free, and where it is done its bytes are there."""
        move.end = end
        bytes_there = view(move.target, move.slots)
        if end == "done" and move.receiver.state != "dead":
            assert (bytes_there == move.value).all(), "done, and its bytes are not there"
            if move.frozen is None:
                move.frozen = bytes_there.tobytes()
        view(move.sender.source, move.sources)[:] = POISON
        if end == "PeerUnreachable":
            self.cut_off(move.sender, move.receiver)

    @invariant()
    def counts_are_exact(self) -> None:
        for count in self.counts if hasattr(self, "counts") else []:
            if count.owner.state == "up":
                assert count.counter.value <= count.ranges, "more was counted than written"

    @invariant()
    def memory_is_whole(self) -> None:
        for move in self.moves if hasattr(self, "moves") else []:
            target = view(move.target, move.slots)
            known = (target == move.value) | (target == BLANK)
            assert known.all(), "bytes that were never written"
            assert move.frozen is None or target.tobytes() == move.frozen, "a late write"

    # ---- the end ----

    def teardown(self) -> None:
        if not hasattr(self, "machines"):
            return
        try:
            self.settle()
        finally:
            self.world.close()

    def settle(self) -> None:
        """Mend all, wait, and look at everything once more."""
        self.resume()
        self.mend()
        self.world.set(lost_writes=0, lost_answers=0, lost_contacts=0)
        for _ in range(8):
            self.receive()  # who takes no messages is sent no more
            self.world.run(PATIENT)
        self.receive()
        self.fair = True
        self.ends_are_final()
        self.counts_are_exact()
        self.memory_is_whole()
        for count in self.counts:
            whole = not count.fenced and all(move.end == "done" for move in count.moves)
            if count.owner.state == "up" and whole:
                assert count.counter.value == count.ranges, "all is done, and not all is counted"
            count.counter.close() if count.owner.state == "up" else None
        self.mail_arrived()
        living = [machine for machine in self.machines if machine.state == "up"]
        self.moves.clear()
        self.mail.clear()
        for machine in living:
            totals = machine.engine.stats()
            assert totals.transfers_live == 0, totals
            assert totals.counters == 0, totals
        self.exchange(living)

    def mail_arrived(self) -> None:
        """Every message that is done was received."""
        for mail in self.mail:
            both = mail.sender.state == mail.receiver.state == "up"
            if both and outcome(mail.transfer) == "done":
                heard = mail.receiver.heard.get(mail.sender.engine.address.id, [])
                assert mail.number in heard, "a message is done, and was not received"

    def exchange(self, living: list[Machine]) -> None:
        """Those that live work with each other again.

        Who was told that a peer is gone keeps it out until it uses its address again; so it may
        take some tries of both until both were told, and both have used it.
        """
        for one, other in itertools.combinations(living, 2):
            for _ in range(TRIES):
                both = [
                    sender.engine.write_imm(receiver.engine.address, 1)
                    for sender, receiver in ((one, other), (other, one))
                ]
                self.world.run(2 * PATIENT)
                if all(outcome(transfer) == "done" for transfer in both):
                    break
            else:
                raise AssertionError("they do not come together again")


def view(region: fabric.MemoryRegion, slots: range) -> np.ndarray[Any, Any]:
    """Return the bytes of some slots."""
    return region.numpy()[slots.start * SLOT : slots.stop * SLOT]


def test_histories(seed: int) -> None:
    run_state_machine_as_test(
        hypothesis.seed(seed)(Histories),
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=list(Phase) if SHRINK else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
    print(f"{HISTORIES} histories")
