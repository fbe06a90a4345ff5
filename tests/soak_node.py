"""A process of tests/soak.py: it lets others write into its memory, and writes into theirs.

Each of its *lines* (threads) goes round and round: pick a peer and memory, send the peer a request,
wait for the count, compare every byte. When a wait fails, the peer is fenced, and then the memory
must keep what it has until somebody else is asked to write there: a single byte that comes late is
a violation. One more thread carries out the requests.

Whom this side fenced and lets in again may still hold descriptors of ours, and use them: that is no
late write. So there are two kinds of pairs. In a *strict* one only one of the two ever asks, with
one request at a time, and never again after one has failed: what was written to is given to others
at once, behind nothing but the fence. In all other pairs each request carries a descriptor made for
that peer, which is taken back before the memory is used again.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

import fabric
from tests import commands
from tests.patterns import Bytes, difference, pattern
from tests.scale import patient, scaled
from tests.soak_tally import SLACK, Tally, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.node import State

PEER_TIMEOUT = patient(2.0)
WAIT_SECONDS = 2.5 * PEER_TIMEOUT  # of a line, for a count
CALL_SECONDS = 2 * PEER_TIMEOUT  # the timeout of everything else
LONGEST_STOP = 1.5 * PEER_TIMEOUT
SLOT_BYTES = scaled(1 << 20)
LONG_BYTES = scaled(16 << 20)  # of a write that is long enough to be cut off
PAGE = 4096
PARTS = 8  # of a slot, with at most one range in each
BASE = pattern(2026, 2 * SLOT_BYTES)
"""What every process writes from: a range is known by where in it it begins."""
LINES = 3
SLOTS = 3  # of each line
REST_SECONDS = 0.5  # for which memory is watched after a failure
KINDS = ("write", "pages", "scatter", "long", "imms", "message")
SPOILS = ("cancel", "deadline")
Row = tuple[int, int, int]  # offset in BASE, offset in the slot, length


@dataclass
class Order:
    """What a receiver asks for. Both sides draw the same ranges from its seed."""

    kind: str
    seed: int
    spoil: str = ""

    def rows(self) -> list[Row]:
        """Return the ranges with bytes; their destinations are disjoint."""
        rng = random.Random(self.seed)
        if self.kind in ("imms", "message"):
            return []
        if self.kind in ("pages", "long"):
            pages = SLOT_BYTES // PAGE
            count = rng.randrange(1, pages // 2 + 1)
            sources = rng.sample(range(2 * pages), count)
            targets = rng.sample(range(pages), count)
            return [(s * PAGE, t * PAGE, PAGE) for s, t in zip(sources, targets, strict=True)]
        part, rows = SLOT_BYTES // PARTS, []
        for number in range(rng.randrange(1, PARTS + 1)):
            length = rng.choice([0, 1, rng.randrange(part // 16), rng.randrange(part)])
            start = number * part + rng.randrange(part - length)
            rows.append((rng.randrange(SLOT_BYTES), start, length))
        return rows

    def times(self) -> int:
        """Return how often each range is written."""
        return max(1, LONG_BYTES // (len(self.rows()) * PAGE)) if self.kind == "long" else 1

    def ranges(self) -> int:
        """Return what the counter must say in the end."""
        if self.kind == "imms":
            return 1 + self.seed % 200
        return len(self.rows()) * self.times() or 1

    def text(self) -> Row:
        """Return where in BASE the message of this order is, as a range without destination."""
        rng = random.Random(self.seed)
        return rng.randrange(SLOT_BYTES // 2), 0, rng.randrange(min(60_000, SLOT_BYTES // 2))


@dataclass
class Slot:
    """Memory for one writer at a time. `mirror` is what it must hold while nobody may write."""

    region: fabric.MemoryRegion
    view: Bytes
    mirror: Bytes
    rest_until: float = 0.0
    counter: fabric.ImmCounter | None = None  # of the order that failed: it must stay where it is
    value: int = 0
    fence: Callable[[], None] | None = None  # what is to be tried again, in quarantine
    since: float = 0.0
    order: Order | None = None
    strict: bool = False
    about: str = ""


@dataclass
class Job:
    """What a request made this process do."""

    transfers: list[fabric.Transfer]
    bytes: int
    begin: float
    stood: float
    name: str
    then: Callable[[], list[fabric.Transfer]] | None = None


@dataclass
class Member:
    """The state of one process."""

    node: State
    tally: Tally
    seed: int
    corrupt: str
    stop: threading.Event = field(default_factory=threading.Event)  # of the lines
    over: threading.Event = field(default_factory=threading.Event)  # nobody asks any more
    threads: list[threading.Thread] = field(default_factory=list)
    replies: dict[int, bytes] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    banned: set[str] = field(default_factory=set)
    known: dict[str, fabric.Address] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    serial: int = 0

    @property
    def engine(self) -> fabric.TransferEngine:
        """The engine of this process."""
        engine: fabric.TransferEngine = self.node.engine
        return engine

    def forget_all_but(self, names: list[str]) -> None:
        """Drop what is known of processes that are gone; others may still be looking at it."""
        with self.lock:
            for name in [name for name in self.known if name not in names]:
                del self.known[name]

    def next_number(self) -> int:
        """Return a number that no other request of this process has."""
        with self.lock:
            self.serial += 1
            return self.serial


def is_strict(one: str, other: str) -> bool:
    """Return whether a pair is strict. Those that are never killed must get on with each other."""
    if one[0] == other[0] == "s":
        return False
    return zlib.crc32("".join(sorted([one, other])).encode()) % 2 == 0


def may_ask(one: str, other: str) -> bool:
    """Return whether the first may ask the second: in a strict pair, one of them."""
    lot = zlib.crc32("+".join(sorted([one, other])).encode()) % 2 == 0
    return not is_strict(one, other) or (one < other) == lot


# ---- lines ----


class Line:
    """One thread that asks others to write, and checks that they did, or could not."""

    def __init__(self, member: Member, number: int) -> None:
        self.member = member
        self.tally = member.tally
        self.rng = random.Random(f"{member.seed} {member.tally.name} {number}")
        self.address: Any = None  # of the peer that was chosen last
        self.slots = [self.new_slot() for _ in range(SLOTS)]

    def new_slot(self) -> Slot:
        """Make memory that is ours, or memory as torch allocates it."""
        engine = self.member.engine
        if self.rng.random() < 0.6:
            region = engine.alloc(SLOT_BYTES)
            view = region.numpy()
        else:
            view = np.zeros(SLOT_BYTES, np.uint8)
            region = engine.register(view)
        view[:] = BASE[self.rng.randrange(SLOT_BYTES) :][:SLOT_BYTES]
        return Slot(region, view, view.copy())

    def run(self) -> None:
        """Go round until told to stop; then only until no fence is pending."""
        try:
            while not self.member.stop.is_set():
                slot, peer = self.free_slot(), self.peer()
                if slot is None or not peer:
                    time.sleep(0.005)
                if peer:
                    try:
                        if slot is not None:
                            self.round(slot, peer)
                    finally:
                        self.member.claimed.discard(peer)
            self.finish()
        except fabric.EngineClosed:
            raise
        except BaseException as error:
            self.tally.violation(f"a line ended with {type(error).__name__}: {error}")
            raise

    def finish(self) -> None:
        """Wait until all memory is ours again, compare it once more, and take it back."""
        while self.slots:
            slot = self.slots[0]
            if not self.is_free(slot):
                time.sleep(0.01)
                continue
            self.compare(slot, slot.mirror, "at the end")
            # A peer that stands still inside a write keeps a fence pending until it goes on.
            with self.tally.bounded("deregister", CALL_SECONDS + LONGEST_STOP):
                while not self.deregistered(slot):
                    time.sleep(0.01)
            self.slots.pop(0)

    def deregistered(self, slot: Slot) -> bool:
        """Take memory back; False while a fence is pending."""
        try:
            self.member.engine.deregister(slot.region, timeout=CALL_SECONDS)
        except fabric.FencePending:
            return False
        self.tally.add("deregistered")
        return True

    def peer(self) -> str:
        """Choose a peer for one round, and claim it where the pair is strict; "" if none."""
        member, me = self.member, self.tally.name
        names = [path.name for path in self.tally.places.roster.iterdir()]
        member.forget_all_but(names)
        self.rng.shuffle(names)
        for name in names:
            if name == me or name in member.banned or not may_ask(me, name):
                continue
            try:
                data = (self.tally.places.roster / name).read_bytes()
            except FileNotFoundError:
                continue
            with member.lock:
                if is_strict(me, name):
                    if name in member.claimed or name in member.banned:
                        continue
                    member.claimed.add(name)
                if name not in member.known:
                    member.known[name] = fabric.Address.from_bytes(data)
                self.address = member.known[name]
            return name
        return ""

    def free_slot(self) -> Slot | None:
        """Return memory that is ours and has rested, if there is any."""
        free = [slot for slot in self.slots if self.is_free(slot)]
        return self.rng.choice(free) if free else None

    def is_free(self, slot: Slot) -> bool:
        """Go on with what keeps memory from being used; return whether nothing does."""
        if slot.fence is not None:
            self.try_fence(slot)
            return False
        if slot.rest_until > now():
            return False
        if slot.rest_until:
            slot.rest_until = 0.0
            self.compare(slot, slot.mirror, f"late, {REST_SECONDS} s after {slot.about}")
            self.check_counter(slot)
        return True

    def compare(self, slot: Slot, expected: Bytes, what: str) -> None:
        """Compare memory with what it must hold."""
        if text := difference(slot.view, expected):
            self.tally.violation(f"{what}: {text}; last: {slot.about}")
            slot.mirror = slot.view.copy()

    def check_counter(self, slot: Slot) -> None:
        """See that a counter has not moved since the fence, and close it.

        Outside of strict pairs a peer that came back may count what it begins only then.
        """
        if slot.counter is None:
            return
        if slot.strict and slot.counter.value != slot.value:
            self.tally.violation(
                f"a count went from {slot.value} to {slot.counter.value} after {slot.about}"
            )
        slot.counter.close()
        slot.counter = None

    def draw(self) -> Order:
        """Choose what to ask for."""
        spoil = self.rng.choice(SPOILS) if self.rng.random() < 0.05 else ""
        return Order(self.rng.choice(KINDS), self.rng.randrange(1 << 31), spoil)

    def round(self, slot: Slot, name: str) -> None:
        """Ask once, and see how it ends."""
        member, order, engine = self.member, self.draw(), self.member.engine
        address, strict = self.address, is_strict(self.tally.name, name)
        slot.order, slot.about = order, f"{order} of {name}{' (strict)' if strict else ''}"
        counter, number = engine.counter(), member.next_number()
        self.tally.add("rounds")
        with self.tally.bounded("descriptor_for", CALL_SECONDS):
            descriptor = slot.region.descriptor
            if not strict:
                descriptor = slot.region.descriptor_for(address)
        request = {
            "number": number,
            "kind": order.kind,
            "seed": order.seed,
            "spoil": order.spoil,
            "imm": counter.id,
            "to": bytes(descriptor),
            "from": self.tally.name,
        }
        begin = now()
        how = self.ask_and_wait(address, counter, request, order)
        if how in ("unreachable", "pending"):
            self.tally.write(lost=name, begin=begin, how=how)
        self.tally.add(how)
        slot.counter, slot.strict = counter, strict
        if strict and how not in ("reached", "full"):
            member.banned.add(name)

        def fence() -> None:
            if not strict:
                with self.tally.bounded("deregister of a descriptor", CALL_SECONDS):
                    engine.deregister(descriptor, timeout=CALL_SECONDS)
            elif how not in ("reached", "full", "unreachable"):
                with self.tally.bounded("disconnect", CALL_SECONDS):
                    engine.disconnect(address, timeout=CALL_SECONDS)

        if how == "reached":
            self.accept(slot, number)
        slot.fence, slot.since = fence, now()
        if how == "full":
            slot.order = None
        self.try_fence(slot, how == "reached")

    def ask_and_wait(
        self, address: fabric.Address, counter: fabric.ImmCounter, request: Any, order: Order
    ) -> str:
        """Send a request and wait for what it brings; returns how that ended."""
        engine, target = self.member.engine, order.ranges()
        try:
            with self.tally.bounded("send", CALL_SECONDS):
                sending = engine.send(address, msgpack.packb(request), timeout=CALL_SECONDS)
        except fabric.QueueFull:
            return "full"
        cut = self.rng.random() < 0.05
        try:
            with self.tally.bounded("wait", WAIT_SECONDS):
                counter.wait(1 if cut else target, timeout=WAIT_SECONDS, peers=[address])
            if cut and counter.value < target:
                with self.tally.bounded("disconnect", CALL_SECONDS):
                    engine.disconnect(address, timeout=CALL_SECONDS)
                return "fenced"
            if cut:
                counter.wait(target, timeout=0)
        except fabric.PeerUnreachable:
            return "unreachable"
        except fabric.FencePending:
            return "pending"
        except fabric.CounterVoid:
            return "void"
        except fabric.WaitTimeout:
            return "late"
        del sending
        return "reached"

    def accept(self, slot: Slot, number: int) -> None:
        """Compare what came whole with what was asked for."""
        order, counter = slot.order, slot.counter
        assert order is not None
        assert counter is not None
        expected = slot.mirror.copy()
        for source, start, length in order.rows():
            expected[start : start + length] = BASE[source : source + length]
        self.compare(slot, expected, "a count was reached")
        if counter.value != order.ranges():
            self.tally.violation(f"{counter.value} counts of {order.ranges()}: {slot.about}")
        slot.mirror = expected
        self.tally.add("verified_bytes", sum(row[2] for row in order.rows()))
        if order.kind == "message":
            self.accept_message(order, number)

    def accept_message(self, order: Order, number: int) -> None:
        """See that a message is there, which its sender knew to be, before it raised a count."""
        deadline, stood = now() + CALL_SECONDS, self.tally.stopped()
        while number not in self.member.replies:
            if now() - (self.tally.stopped() - stood) > deadline + SLACK:
                self.tally.violation(f"the message of {order} was acknowledged and is not there")
                return
            time.sleep(0.002)
        source, _, length = order.text()
        if self.member.replies.pop(number) != BASE[source : source + length].tobytes():
            self.tally.violation(f"the message of {order} has other bytes")
        self.tally.add("messages")

    def try_fence(self, slot: Slot, whole: bool = False) -> None:
        """Make memory ours again; where that is not possible yet, it stays in quarantine."""
        assert slot.fence is not None
        try:
            slot.fence()
        except fabric.FencePending:
            self.stay_pending(slot)
            return
        slot.fence = None
        if whole or slot.order is None:
            self.compare(slot, slot.mirror, "after a whole count")
            assert slot.counter is not None
            slot.value = slot.counter.value
            self.check_counter(slot)
            return
        self.judge(slot)

    def stay_pending(self, slot: Slot) -> None:
        """Count a quarantine, which must end when the peer goes on or dies."""
        if not slot.rest_until:
            self.tally.add("quarantines")
        slot.rest_until = now()
        if now() - slot.since > LONGEST_STOP + 2 * PEER_TIMEOUT + SLACK:
            self.tally.violation(f"a fence is pending for {now() - slot.since:.1f} s: {slot.about}")
            slot.since = now()

    def judge(self, slot: Slot) -> None:
        """After a fence: each byte is the old or the new one, and from now on none changes."""
        assert slot.counter is not None
        slot.value = slot.counter.value
        before, slot.mirror = slot.mirror, slot.view.copy()
        expected = before.copy()
        for source, start, length in slot.order.rows() if slot.order else ():
            expected[start : start + length] = BASE[source : source + length]
        foreign = (slot.mirror != before) & (slot.mirror != expected)
        if foreign.any():
            text = f"{np.count_nonzero(foreign)} bytes, from {np.flatnonzero(foreign)[0]}"
            self.tally.violation(f"neither old nor new: {text}; {slot.about}")
        changed = bool((slot.mirror != before).any())
        if changed and bool((slot.mirror != expected).any()):
            self.tally.add("partial")
        if self.member.corrupt == "late" and changed:
            slot.view[SLOT_BYTES // 2] ^= 1  # as if a write had come after the fence
        if self.rng.random() < 0.5:
            slot.rest_until = now() + REST_SECONDS
            return
        # Used again in a moment: only what comes at once, or into a gap of the next, is seen.
        self.compare(slot, slot.mirror, "after a fence")
        self.check_counter(slot)


# ---- the thread that carries out requests ----


def serve(member: Member) -> None:
    """Take messages and carry out what they ask for, until nobody asks any more."""
    jobs: list[Job] = []
    try:
        while jobs or not member.over.is_set():
            try:
                with member.tally.bounded("recv", 0.1):
                    peer, payload = member.engine.recv(timeout=0.003 if jobs else 0.1)
                take(member, jobs, peer, payload)
            except fabric.WaitTimeout:
                pass
            jobs = [job for job in jobs if not is_over(member, job)]
            stats = member.engine.stats()
            member.tally.put("sessions", stats.peers_lost + stats.peers_up)
    except fabric.EngineClosed:
        raise
    except BaseException as error:
        member.tally.violation(f"the server ended with {type(error).__name__}: {error}")
        raise


def take(member: Member, jobs: list[Job], peer: Any, payload: bytes) -> None:
    """Begin what a message asks for, or keep the bytes it brings."""
    message = msgpack.unpackb(payload)
    if "bytes" in message:
        member.replies[message["number"]] = message["bytes"]
        return
    if member.corrupt == "hang":
        with member.tally.bounded("nothing", 0.0):
            time.sleep(600.0)
    stood = member.tally.stopped()
    try:
        with member.tally.bounded("submit", CALL_SECONDS):
            job = begin_job(member, peer, message)
    except (fabric.TransferFailed, fabric.QueueFull):
        member.tally.add("failed")
        return
    job.begin, job.stood = now(), stood
    jobs.append(job)


def begin_job(member: Member, peer: Any, message: Any) -> Job:
    """Submit the transfers of a request."""
    engine, source = member.engine, member.node.things["source"]
    order = Order(message["kind"], message["seed"], message["spoil"])
    imm, name = message["imm"], message["from"]
    target = fabric.Descriptor.from_bytes(message["to"])
    options = {"imm": imm, "timeout": CALL_SECONDS}
    if order.spoil == "deadline":
        options["deadline"] = 0.001
    rows, size = order.rows(), sum(row[2] for row in order.rows()) * order.times()
    then = None
    if order.kind == "message":
        start, _, length = order.text()
        answer = {"number": message["number"], "bytes": BASE[start : start + length].tobytes()}
        transfers = [engine.send(peer, msgpack.packb(answer), timeout=CALL_SECONDS)]

        def then() -> list[fabric.Transfer]:
            return [engine.write_imm(peer, imm, timeout=CALL_SECONDS)]
    elif order.kind == "imms":
        transfers = [engine.write_imm(peer, **options) for _ in range(order.ranges())]
    elif order.kind == "scatter":
        transfers = [engine.scatter(source, [(target, *row) for row in rows], **options)]
    elif order.kind == "write":
        transfers = [
            engine.write(source, target, src_offset=s, dst_offset=d, length=n, **options)
            for s, d, n in rows
        ]
    else:
        pages = [np.tile(np.array([row[i] // PAGE for row in rows]), order.times()) for i in (0, 1)]
        transfers = [engine.write_pages(source, target, *pages, page_bytes=PAGE, **options)]
    if order.spoil == "cancel":
        transfers[-1].cancel()
    if member.corrupt == "count":
        transfers.append(engine.write_imm(peer, imm))
    return Job(transfers, size, 0.0, 0.0, name, then)


def is_over(member: Member, job: Job) -> bool:
    """See how far a request got; True when there is nothing left of it."""
    tally = member.tally
    if not all(transfer.done() for transfer in job.transfers):
        # At worst the peer stands still inside a copy out of our memory, until it goes on.
        limit = 2 * PEER_TIMEOUT + LONGEST_STOP + SLACK
        if now() - job.begin - (tally.stopped() - job.stood) > limit:
            tally.violation(f"a transfer to {job.name} has not ended after {limit:.1f} s")
            job.begin = now()
        return False
    lost, good = False, True
    for transfer in job.transfers:
        try:
            transfer.wait(timeout=0)
            tally.add("done")
        except fabric.TransferCancelled:
            tally.add("cancelled")
            good = False
        except fabric.TransferFailed as error:
            tally.add("failed")
            lost, good = lost or isinstance(error, fabric.PeerUnreachable), False
    if lost:
        tally.write(lost=job.name, begin=job.begin, how="transfer")
    if good:
        tally.add("sent_bytes", job.bytes)
    if good and job.then is not None:
        try:
            job.transfers, job.then = job.then(), None
        except (fabric.TransferFailed, fabric.QueueFull):
            return True
        return False
    return True


# ---- commands ----


def begin(
    node: State, provider: str, nics: list[str] | None, name: str, options: dict[str, Any]
) -> bytes:
    """Open the engine and start the threads; others see this process from now on."""
    address = b""
    if not node.has_engine:
        address = commands.open_engine(node, name, provider, nics, {"peer_timeout": PEER_TIMEOUT})
    tally = Tally(options["folder"], name)
    member = Member(node, tally, options["seed"], options["corrupt"])
    node.things["source"] = source = member.engine.alloc(BASE.size)
    source.numpy()[:] = BASE
    lines = [Line(member, number) for number in range(options["lines"])]
    works = [*(line.run for line in lines), lambda: serve(member)]
    for number, work in enumerate(works):
        thread = threading.Thread(target=work, name=f"{name} {number}", daemon=True)
        member.threads.append(thread)
        thread.start()
    node.things["member"] = member
    ready = tally.places.roster / name
    hidden = ready.parent.parent / f"ready-{name}"
    hidden.write_bytes(bytes(member.engine.address))
    hidden.rename(ready)
    return address


def join(member: Member, threads: list[threading.Thread]) -> None:
    """Wait for the end of threads."""
    for thread in threads:
        thread.join(finish_seconds())
        if thread.is_alive():
            member.tally.violation(f"thread {thread.name} does not end")


def finish_lines(node: State) -> None:
    """Let the lines come to their end; requests are still carried out."""
    member = node.things["member"]
    member.stop.set()
    join(member, member.threads[:-1])


def finish(node: State) -> dict[str, int]:
    """Let the last thread end and release everything; returns what is still held."""
    member = node.things.pop("member")
    member.over.set()
    join(member, member.threads)
    if member.corrupt == "leak":
        LEAKED.append(open("/dev/null"))  # noqa: SIM115 - that is the point
    member.threads.clear()
    del member
    return commands.settle(node)


LEAKED: list[Any] = []


def finish_seconds() -> float:
    """Return how long the threads may take to come to an end: a wait, a fence, a rest."""
    return WAIT_SECONDS + 2 * CALL_SECONDS + LONGEST_STOP + SLACK


def leftovers(node: State) -> dict[str, Any]:
    """Return what this process holds of the system: descriptors, threads, mappings, memory."""
    with open("/proc/self/maps") as maps:
        shared = [line.split(None, 5)[5].strip() for line in maps if "memfd:" in line]
    return {
        "fds": commands.descriptors_open(node),
        "threads": commands.thread_count(node),
        "shared mappings": len(shared),
        "resident MiB": commands.resident_bytes(node) / (1 << 20),
        "sessions so far": commands.totals(node)["peers_lost"],
    }
