"""Waiting for transfers and counters: threads, event loops, callbacks, timeouts, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric
from tests import commands
from tests.harness import Farm, Node, wait_until
from tests.scale import SLOW, patient, scaled

if TYPE_CHECKING:
    from tests.node import State

SIZE = scaled(1 << 20)
Pair = tuple[Node, Node]


def stuck_write(farm: Farm, **options: object) -> tuple[Node, Node, int]:
    """Begin a write "t" that cannot end, since the receiver is frozen and must be asked first."""
    a, b = farm("a", callbacks=True), farm("b")
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm)
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    b.pause()
    a.call(commands.begin_write, "t", "src", descriptor, {"imm": imm, **options})
    return a, b, imm


def test_a_wait_that_times_out_changes_nothing(farm: Farm) -> None:
    a, b, _ = stuck_write(farm)
    for timeout in (0.0, 0.3):
        begin = a.call(commands.clock)
        with pytest.raises(fabric.WaitTimeout) as caught:
            a.call(commands.transfer_wait, "t", timeout)
        assert timeout <= a.call(commands.clock) - begin < timeout + patient(0.5)
        assert caught.value.phase == "running"
        assert isinstance(caught.value, TimeoutError)
        assert not a.call(commands.transfer_done, "t")
    b.thaw()
    a.call(commands.transfer_wait, "t")
    assert a.call(commands.transfer_done, "t")
    a.call(commands.transfer_wait, "t", 0.0)
    assert b.settled("count", 2) == 2
    assert b.differs("dst", 1) == ""


def test_a_counter_that_is_not_reached(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    a.call(commands.write_imm, b.address, imm, 3)
    b.wait("count", 3)
    b.wait("count", 0, 0.0)
    for timeout in (0.0, 0.2):
        with pytest.raises(fabric.WaitTimeout, match=r"(?s)3.*4"):
            b.wait("count", 4, timeout)
    assert b.value("count") == 3


def test_cancel(farm: Farm) -> None:
    a, b, _ = stuck_write(farm)
    a.call(commands.transfer_cancel, "t")
    with pytest.raises(fabric.TransferCancelled):
        a.call(commands.transfer_wait, "t", 5.0)
    assert a.call(commands.transfer_done, "t")
    a.call(commands.transfer_cancel, "t")
    a.call(commands.deregister, "src")
    b.thaw()
    with pytest.raises(fabric.CounterVoid):
        b.wait("count", 2, 5.0)
    assert b.differs("dst", 2) == ""
    assert a.stats()["transfers_cancelled"] == 1
    still_works(a, b)


def still_works(a: Node, b: Node) -> None:
    """Check one good write."""
    a.region("good src", 5000, 3)
    descriptor = b.region("good dst", 5000, 4)
    imm = b.counter("good count")
    a.write("good src", descriptor, imm=imm)
    assert b.settled("good count", 1) == 1
    assert b.differs("good dst", 3) == ""


def test_cancel_in_the_middle(farm: Farm) -> None:
    """What had landed stays, nothing more comes, and the id can no longer be trusted."""
    a, b = farm("a"), farm("b")
    a.region("src", scaled(64 << 20), 1)
    descriptor = b.region("dst", scaled(64 << 20), 2)
    imm = b.counter("count")
    a.write("src", descriptor, length=1, imm=imm)
    with pytest.raises(fabric.TransferCancelled):
        a.call(cancel_the_last, descriptor, imm)
    with pytest.raises(fabric.CounterVoid):
        b.wait("count", 16 + CANCELLED_PAGES, 10.0)
    assert b.call(commands.changes, "dst", 0.3) == ""
    still_works(a, b)


CANCELLED_PAGES = 4096
"""More than any lane takes at once: those that it has taken are written, and counted."""


def cancel_the_last(node: State, descriptor: bytes, imm: int) -> None:
    """Begin many large writes, cancel the last, and wait for all; the last one raises."""
    remote, source = fabric.Descriptor.from_bytes(descriptor), node.things["src"]
    transfers = [node.engine.write(source, remote, imm=imm) for _ in range(15)]
    pages = np.arange(CANCELLED_PAGES, dtype=np.int32)
    size = source.nbytes // CANCELLED_PAGES
    transfers.append(
        node.engine.write_pages(source, remote, pages, pages, page_bytes=size, imm=imm)
    )
    transfers[-1].cancel()
    for transfer in transfers[:-1]:
        transfer.wait(timeout=30.0)
    transfers[-1].wait(timeout=30.0)


def test_cancel_of_what_is_done_changes_nothing(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    imm = b.counter("count")
    a.call(commands.begin_write, "t", "src", descriptor, {"imm": imm})
    a.call(commands.transfer_wait, "t")
    a.call(commands.transfer_cancel, "t")
    a.call(commands.transfer_wait, "t")
    assert b.settled("count", 1) == 1


def test_deadline(farm: Farm) -> None:
    a, b, _ = stuck_write(farm, deadline=0.5)
    begin = time.monotonic()
    with pytest.raises(fabric.TransferFailed, match="deadline"):
        a.call(commands.transfer_wait, "t", 8.0)
    assert time.monotonic() - begin < patient(2.0)
    b.thaw()
    with pytest.raises(fabric.CounterVoid):
        b.wait("count", 2, 5.0)
    assert b.differs("dst", 2) == ""
    still_works(a, b)


def test_a_deadline_that_is_kept(pair: Pair) -> None:
    a, b = pair
    a.region("src", SIZE, 1)
    a.write("src", b.region("dst", SIZE, 2), deadline=20.0)
    assert b.differs("dst", 1) == ""


# ---- threads ----


def wait_in_threads(node: State, targets: list[int]) -> list[int]:
    """Wait on one counter from many threads; returns its value as each thread woke."""
    counter = node.things["count"]
    values = [-1] * len(targets)

    def work(index: int) -> None:
        counter.wait(targets[index], timeout=20.0)
        values[index] = counter.value

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return values


def test_waits_from_many_threads(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    targets = [1, 5, 5, 20, 0, 13, 20, 2]
    waiting = b.start(wait_in_threads, targets, thread=True)
    for _ in range(20):
        a.call(commands.write_imm, b.address, imm)
    values = waiting.result()
    assert all(value >= target for value, target in zip(values, targets, strict=True)), values


def wait_for_one_in_threads(node: State, descriptor: bytes) -> None:
    """Wait for one transfer from many threads."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    for _ in range(50):
        transfer = node.engine.write(node.things["src"], remote)
        threads = [threading.Thread(target=transfer.wait, args=(10.0,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not transfer.done():
            raise AssertionError("a thread did not wait")


def test_one_transfer_awaited_by_many_threads(pair: Pair) -> None:
    a, b = pair
    a.region("src", SIZE, 1)
    a.call(wait_for_one_in_threads, b.region("dst", SIZE, 2))


def wait_and_say_so(node: State, name: str) -> None:
    """Wait for a counter in vain."""
    node.things["waiting"] = True
    node.things[name].wait(1, timeout=15.0)


def is_waiting(node: State) -> bool:
    """Return whether `wait_and_say_so` has begun."""
    return "waiting" in node.things


def test_keyboard_interrupt(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    waiting = b.start(wait_and_say_so, "count")
    wait_until(lambda: b.start(is_waiting, thread=True).result(), 10.0, "it does not wait")
    time.sleep(0.3)
    begin = time.monotonic()
    os.kill(b.pid, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        waiting.result()
    assert time.monotonic() - begin < patient(1.5)
    a.call(commands.write_imm, b.address, imm)
    assert b.settled("count", 1) == 1


def test_closing_a_counter_ends_its_waits(pair: Pair) -> None:
    _, b = pair
    b.counter("count")
    waiting = b.start(commands.counter_wait, "count", 1, 15.0, None, thread=True)
    time.sleep(0.2)
    b.call(commands.release, "count")
    with pytest.raises(fabric.FabricError, match="closed"):
        waiting.result(5.0)


# ---- event loops ----


def await_in_loops(node: State, target: int, loops: int) -> list[int]:
    """Await one counter on several event loops at once, each on its own thread."""
    counter = node.things["count"]
    values: list[int] = []

    async def work() -> None:
        reached = [counter.reached(target) for _ in range(10)]
        await asyncio.wait_for(asyncio.gather(*reached), 20.0)
        values.append(counter.value)

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return values


def test_await_on_two_loops(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    waiting = b.start(await_in_loops, 3, 2, thread=True)
    time.sleep(0.2)
    a.call(commands.write_imm, b.address, imm, 3)
    assert waiting.result() == [3, 3]


LOOKS = 100
NAP_SECONDS = 500e-6
"""What a worker leaves to those who helped just now."""


async def resume_times(looks: str) -> list[float]:
    """Return how long coroutines took that awaited an immediate, where somebody looked before."""
    with fabric.TransferEngine("local") as a, fabric.TransferEngine("local") as b:
        counter, other = b.counter(), b.counter()
        a.write_imm(b.address, counter.id).wait(10)
        times = []
        for target in range(2, LOOKS + 2):
            awaited = asyncio.ensure_future(counter.reached(target))
            if looks == "after":
                await asyncio.sleep(0)  # it has set its watch
            with contextlib.suppress(fabric.WaitTimeout):
                other.wait(1, timeout=0)
            await asyncio.sleep(0)
            begin = time.perf_counter()
            a.write_imm(b.address, counter.id)
            await awaited
            times.append(time.perf_counter() - begin)
        return times


@pytest.mark.skipif(SLOW, reason="a processor that is emulated is too slow to tell")
@pytest.mark.parametrize("looks", ["before", "after"])
def test_a_look_does_not_delay_who_awaits(looks: str) -> None:
    # The least of many: a busy machine delays some, a nap would delay all.
    assert min(asyncio.run(resume_times(looks))) < 0.8 * NAP_SECONDS


def await_one_after_the_other(node: State, descriptor: bytes, rounds: int) -> int:
    """Open and close event loops, each of which awaits a transfer; returns open descriptors."""
    remote = fabric.Descriptor.from_bytes(descriptor)

    async def work() -> None:
        await node.engine.write(node.things["src"], remote)

    for _ in range(rounds):
        asyncio.run(work())
    return len(commands.descriptors_open(node))


def test_loops_leave_nothing_behind(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    first = a.call(await_one_after_the_other, descriptor, 3)
    assert a.call(await_one_after_the_other, descriptor, 100) <= first


def abandon_awaits(node: State) -> str:
    """Time out while awaiting a counter, and go on using it."""

    async def work() -> str:
        counter = node.things["count"]
        for _ in range(100):
            try:
                await asyncio.wait_for(counter.reached(1), 0.001)
            except asyncio.TimeoutError:
                continue
            return "reached"
        task = asyncio.ensure_future(counter.reached(1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "abandoned"

    return asyncio.run(work())


def test_abandoned_awaits(pair: Pair) -> None:
    a, b = pair
    imm = b.counter("count")
    assert b.call(abandon_awaits) == "abandoned"
    a.call(commands.write_imm, b.address, imm)
    assert b.settled("count", 1) == 1
    assert b.call(abandon_awaits) == "reached"
    assert b.call(commands.held).get("watches") is None


def cancel_awaited(node: State) -> str:
    """Cancel the task that awaits a transfer; the transfer itself must have ended after that."""

    async def work() -> str:
        transfer = node.things["t"]

        async def wait() -> None:
            await transfer

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.1)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "done" if transfer.done() else "running"
        return "not cancelled"

    return asyncio.run(work())


def test_cancelling_the_task_that_awaits_a_transfer(farm: Farm) -> None:
    """The task does not leave the transfer alone with the memory: it has ended, or goes on."""
    a, b, _ = stuck_write(farm)
    outcome = a.call(cancel_awaited)
    b.thaw()
    assert outcome in ("done", "running")
    if outcome == "running":
        a.call(commands.transfer_wait, "t")
        assert b.differs("dst", 1) == ""
    still_works(a, b)


def await_failure(node: State) -> None:
    """Await a transfer that fails."""

    async def work() -> None:
        await asyncio.wait_for(asyncio.shield(as_task(node.things["t"])), 10.0)

    async def wait(transfer: fabric.Transfer) -> None:
        await transfer

    def as_task(transfer: fabric.Transfer) -> asyncio.Task[None]:
        return asyncio.ensure_future(wait(transfer))

    asyncio.run(work())


def test_await_raises_what_wait_raises(farm: Farm) -> None:
    a, b, _ = stuck_write(farm)
    a.call(commands.transfer_cancel, "t")
    with pytest.raises(fabric.TransferCancelled):
        a.call(await_failure)
    b.thaw()


# ---- callbacks ----


def collect_callbacks(node: State, descriptor: bytes) -> list[str]:
    """Add callbacks before and after the end; one of them raises."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    called: list[str] = []
    last = threading.Event()

    def note(name: str) -> None:
        called.append(name)
        if len(called) == 21:
            last.set()

    def bad(transfer: fabric.Transfer) -> None:
        note("bad")
        raise RuntimeError("this callback always raises")

    def good(transfer: fabric.Transfer) -> None:
        note("good" if transfer.done() else "too early")

    for _ in range(10):
        transfer = node.engine.write(node.things["src"], remote)
        transfer.add_done_callback(bad)
        transfer.add_done_callback(good)
    transfer.wait(timeout=10.0)
    transfer.add_done_callback(good)
    last.wait(10.0)
    time.sleep(0.05)
    return sorted(called)


def test_done_callbacks(farm: Farm) -> None:
    a, b = farm("a", callbacks=True), farm("b")
    a.region("src", SIZE, 1)
    descriptor = b.region("dst", SIZE, 2)
    assert a.call(collect_callbacks, descriptor) == ["bad"] * 10 + ["good"] * 11
    a.write("src", descriptor)


def call_back_when_cancelled(node: State) -> bool:
    """Return whether a callback comes for a transfer that is cancelled."""
    called = threading.Event()
    node.things["t"].add_done_callback(lambda transfer: called.set())
    node.things["t"].cancel()
    return called.wait(5.0)


def test_a_callback_of_a_cancelled_transfer(farm: Farm) -> None:
    a, b, _ = stuck_write(farm)
    assert a.call(call_back_when_cancelled)
    b.thaw()


# ---- counter blocks ----


def make_block(node: State, name: str, count: int) -> list[int]:
    """Make a block of counters; returns the ids."""
    block = node.engine.counter_block(count)
    node.things[name] = block
    return list(range(block.id, block.id + count))


def block_wait(node: State, name: str, targets: list[int], timeout: float) -> list[int]:
    """Wait for a whole block; returns the indices still missing."""
    return [int(index) for index in node.things[name].wait(targets, timeout)]


def test_a_block_names_the_missing(pair: Pair) -> None:
    a, b = pair
    ids = b.call(make_block, "block", 16)
    targets = [index % 3 for index in range(16)]
    for index, times in enumerate(targets):
        if index not in (4, 11):
            a.call(commands.write_imm, b.address, ids[index], times)
    assert b.call(block_wait, "block", targets, 0.3) == [4, 11]
    a.call(commands.write_imm, b.address, ids[4], 1)
    assert b.call(block_wait, "block", targets, 0.3) == [11]
    waiting = b.start(block_wait, "block", targets, 20.0, thread=True)
    a.call(commands.write_imm, b.address, ids[11], 2)
    assert waiting.result() == []


def test_a_closed_block_counts_for_nobody(pair: Pair) -> None:
    a, b = pair
    ids = b.call(make_block, "block", 8)
    b.call(commands.release, "block")
    stale = b.stats()["imm_stale"]
    for number in ids:
        a.call(commands.write_imm, b.address, number)
    fresh = b.call(make_block, "block", 8)
    assert not set(fresh) & set(ids)
    assert b.call(block_wait, "block", [1] * 8, 0.1) == list(range(8))
    assert b.stats()["imm_stale"] == stale + 8


# ---- after ----


def write_after(node: State, descriptor: bytes, seconds: float) -> list[float]:
    """Write once a callable says so, and change the source until then."""
    begin = time.monotonic()
    calls = []

    def ready() -> bool:
        calls.append(time.monotonic() - begin)
        return calls[-1] > seconds

    transfer = node.engine.write(
        node.things["src"], fabric.Descriptor.from_bytes(descriptor), after=ready
    )
    transfer.wait(timeout=10.0)
    return [calls[0], calls[-1], time.monotonic() - begin]


def test_a_write_after_an_event(pair: Pair) -> None:
    a, b = pair
    a.region("src", 1000, 1)
    descriptor = b.region("dst", 1000, 2)
    assert a.call(write_after, descriptor, 0.2)[2] >= 0.2
    assert b.differs("dst", 1) == ""
