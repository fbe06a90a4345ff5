"""Short writes on `local` that are done before their submission returns: as good as any other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import pickle
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fabric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT = 10.0
SIZE = 1 << 20


class Pair:
    """Two engines of this process; the first one has written to the second, twice."""

    def __init__(self, callbacks: bool = True) -> None:
        self.a = fabric.TransferEngine("local", callbacks=callbacks)
        self.b = fabric.TransferEngine("local")
        self.src, self.dst = self.a.alloc(SIZE), self.b.alloc(SIZE)
        self.src.numpy()[:] = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
        self.d = self.dst.descriptor
        self.counter = self.b.counter()
        self.count = 0
        for _ in range(2):  # the first connects, the second one is timed
            self.write(8)

    def write(self, length: int = 8, **options: object) -> fabric.Transfer:
        self.count += 1
        imm = self.counter.id
        t = self.a.write(self.src, self.d, length=length, imm=imm, **options)  # type: ignore[arg-type]
        t.wait(WAIT)
        self.counter.wait(self.count, WAIT)
        return t


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    both = Pair(getattr(request, "param", True))
    yield both
    both.a.close(5)
    both.b.close(5)


def at_once(submit: Callable[[], fabric.Transfer]) -> fabric.Transfer:
    """Submit until that was done at once: the worker may have the lock, and one in 64 is timed."""
    for _ in range(200):
        t = submit()
        if t._handle == 0:
            return t
        t.wait(WAIT)
    raise AssertionError("none of 200 was done at submission")


def write_imm(pair: Pair) -> fabric.Transfer:
    pair.count += 1
    return pair.a.write_imm(pair.b.address, pair.counter.id)


@pytest.mark.parametrize("pair", [True, False], ids=["callbacks", "none"], indirect=True)
@pytest.mark.parametrize("submit", [Pair.write, write_imm])
def test_such_a_transfer_is_done_in_every_way(
    pair: Pair, submit: Callable[[Pair], fabric.Transfer], request: pytest.FixtureRequest
) -> None:
    t = at_once(lambda: submit(pair))
    other = at_once(lambda: submit(pair))
    assert len({t, other}) == 2  # each is one of its own, as those that take longer
    assert weakref.ref(t)() is t
    assert isinstance(t, fabric.Transfer)
    assert t.done()
    assert t.state == "done"
    t.wait(0)
    t.cancel()
    assert t.state == "done"
    assert "done" in repr(t)

    async def awaited() -> None:
        await t

    asyncio.run(awaited())
    if request.node.callspec.params["pair"] is False:
        with pytest.raises(fabric.InvalidArgument, match="callbacks=True"):
            t.add_done_callback(print)
        return
    called = threading.Event()
    t.add_done_callback(lambda _: called.set())
    assert called.wait(WAIT)


@pytest.mark.parametrize("length", [1, 7, 8, 63, 4096, 16383, 16384])
def test_its_bytes_and_its_count(pair: Pair, length: int) -> None:
    for offset in (0, 1, 4095):
        pair.dst.numpy()[:] = 0

        def submit(offset: int = offset) -> fabric.Transfer:
            return pair.write(length, src_offset=offset, dst_offset=2 * offset)

        at_once(submit)
        got = pair.dst.numpy()
        assert (got[2 * offset : 2 * offset + length] == pair.src.numpy()[offset:][:length]).all()
        assert not got[: 2 * offset].any()
        assert not got[2 * offset + length :].any()
    assert pair.counter.value == pair.count


def test_pages(pair: Pair) -> None:
    rng = np.random.default_rng(2)
    for page_bytes, n in ((8, 1024), (100, 1000), (4096, 64), (16384, 16), (1, 1)):
        src = rng.permutation(SIZE // page_bytes)[:n].astype(np.int32)
        dst = rng.permutation(SIZE // page_bytes)[:n].astype(np.int32)
        pair.dst.numpy()[:] = 0

        def submit(src: object = src, dst: object = dst, size: int = page_bytes) -> fabric.Transfer:
            imm = pair.counter.id
            pair.count += len(src)  # type: ignore[arg-type]
            d = pair.dst.descriptor
            return pair.a.write_pages(pair.src, d, src, dst, page_bytes=size, imm=imm)

        at_once(submit)
        pair.counter.wait(pair.count, WAIT)
        whole = SIZE // page_bytes * page_bytes
        expected = np.zeros(whole, np.uint8).reshape(-1, page_bytes)
        expected[dst] = pair.src.numpy()[:whole].reshape(-1, page_bytes)[src]
        assert (pair.dst.numpy()[:whole] == expected.ravel()).all()
    assert pair.counter.value == pair.count


def test_immediates(pair: Pair) -> None:
    for _ in range(2):
        write_imm(pair).wait(WAIT)
    at_once(lambda: write_imm(pair))
    pair.counter.wait(pair.count, WAIT)
    assert pair.counter.value == pair.count


def test_an_immediate_that_is_refused_says_why(pair: Pair) -> None:
    write_imm(pair).wait(WAIT)
    address = pair.b.address
    wrong: tuple[Any, ...] = (-1, 1 << 28, True, None, "7")
    for imm in wrong:
        with pytest.raises(fabric.InvalidArgument, match="imm"):
            pair.a.write_imm(address, imm)
    with pytest.raises(fabric.InvalidArgument, match="own"):
        pair.a.write_imm(pair.a.address, 1)
    with pytest.raises(fabric.InvalidArgument, match="deadline"):
        pair.a.write_imm(address, 1, deadline=-1)
    of_numpy: Any = np.int32(pair.counter.id)
    pair.a.write_imm(address, of_numpy, deadline=WAIT).wait(WAIT)
    pair.counter.wait(pair.count + 1, WAIT)
    pair.a.close(5)
    with pytest.raises(fabric.EngineClosed):
        pair.a.write_imm(address, 1)


def test_a_descriptor_of_two_engines(pair: Pair) -> None:
    with fabric.TransferEngine("local") as c:
        source = c.alloc(8)
        for turn in range(4):
            source.numpy()[:] = turn
            pair.write(8, dst_offset=8)
            c.write(source, pair.d, length=8, imm=pair.counter.id).wait(WAIT)
            pair.count += 1
            pair.counter.wait(pair.count, WAIT)
            assert (pair.dst.numpy()[:8] == turn).all()
            assert (pair.dst.numpy()[8:16] == pair.src.numpy()[:8]).all()


def test_engines_that_meet_at_a_new_descriptor(pair: Pair) -> None:
    """Each keeps what it imported, whoever else does so at the same moment."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(fabric.TransferEngine("local")) for _ in range(4)]
        sources = [engine.alloc(8) for engine in engines]
        for _ in range(20):
            fresh = fabric.Descriptor.from_bytes(bytes(pair.d))
            start = threading.Barrier(len(engines))

            def write(
                i: int, fresh: fabric.Descriptor = fresh, start: threading.Barrier = start
            ) -> None:
                start.wait(WAIT)
                for _ in range(3):
                    engines[i].write(sources[i], fresh, length=8).wait(WAIT)

            with concurrent.futures.ThreadPoolExecutor(len(engines)) as pool:
                list(pool.map(write, range(len(engines))))
            assert len(fresh._imports) == len(engines)


def test_a_transfer_is_neither_copied_nor_pickled(pair: Pair) -> None:
    transfer = pair.a.write(pair.src, pair.d, length=8)
    for way in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to its engine"):
            way(transfer)
    transfer.wait(WAIT)


def test_it_counts_in_the_statistics(pair: Pair) -> None:
    before, begun = pair.a.stats(), pair.count
    for _ in range(500):
        pair.write(100)
    after = pair.a.stats()
    assert pair.count - begun == 500
    assert after.transfers_done - before.transfers_done == 500
    assert after.tx_ranges - before.tx_ranges == 500
    assert after.tx_bytes - before.tx_bytes == 50_000
    assert after.transfers_live == 0
    assert after.latency["write"].count - before.latency["write"].count == 500


def test_bad_arguments_are_told_as_ever(pair: Pair) -> None:
    at_once(pair.write)
    d, imm = pair.dst.descriptor, pair.counter.id
    pages = np.zeros(4, np.int32)
    for bad in (SIZE, SIZE - 4, -1):
        with pytest.raises(fabric.InvalidArgument):
            pair.a.write(pair.src, d, src_offset=bad, length=8, imm=imm)
        with pytest.raises(fabric.InvalidArgument):
            pair.a.write(pair.src, d, dst_offset=bad, length=8, imm=imm)
    for bad_page in (-1, SIZE // 8, 2**31 - 1):
        wrong = pages.copy()
        wrong[2] = bad_page
        with pytest.raises(fabric.InvalidArgument, match="page"):
            pair.a.write_pages(pair.src, d, wrong, pages, page_bytes=8, imm=imm)
        with pytest.raises(fabric.InvalidArgument, match="page"):
            pair.a.write_pages(pair.src, d, pages, wrong, page_bytes=8, imm=imm)
    assert pair.counter.value == pair.count


def test_a_region_that_was_deregistered_on_either_side(pair: Pair) -> None:
    at_once(pair.write)
    pair.b.deregister(pair.dst, timeout=WAIT)
    with pytest.raises(fabric.TransferFailed, match="deregistered"):
        pair.write()
    other = pair.b.alloc(SIZE)
    pair.a.write(pair.src, other.descriptor, length=8).wait(WAIT)
    pair.a.deregister(pair.src, timeout=WAIT)
    with pytest.raises(fabric.InvalidArgument):
        pair.a.write(pair.src, other.descriptor, length=8)


def test_after_a_fence_nothing_lands(pair: Pair) -> None:
    at_once(pair.write)
    pair.b.disconnect(pair.a.address, timeout=WAIT)
    pair.dst.numpy()[:] = 0

    def write_on() -> None:
        for _ in range(100):
            pair.a.write(pair.src, pair.d, length=8).wait(WAIT)

    with pytest.raises(fabric.TransferFailed):
        write_on()
    assert not pair.dst.numpy().any()


def test_threads_that_write_at_once(pair: Pair) -> None:
    """Those that find the lock taken go the ordinary way; nothing is lost or counted twice."""
    each, threads = 2000, 4
    d, imm = pair.dst.descriptor, pair.counter.id

    def run() -> None:
        for k in range(each):
            pair.a.write(pair.src, d, length=64, src_offset=64 * k, imm=imm)

    group = [threading.Thread(target=run) for _ in range(threads)]
    for thread in group:
        thread.start()
    for thread in group:
        thread.join()
    pair.counter.wait(pair.count + each * threads, WAIT)
    assert pair.counter.value == pair.count + each * threads
    assert pair.a.stats().transfers_live == 0


def moved(descriptor: fabric.Descriptor, address: int) -> fabric.Descriptor:
    """Return a descriptor whose keys begin elsewhere, as one that was tampered with."""
    copy = fabric.Descriptor.from_bytes(bytes(descriptor))
    copy._keys = tuple((address, rkey) for _, rkey in copy._keys)
    copy._bytes = None
    return fabric.Descriptor.from_bytes(bytes(copy))


@pytest.mark.parametrize("page", [0, 1, 3, 1000])
@pytest.mark.parametrize("address", [SIZE - 64, SIZE, SIZE + 4096, 2**64 - 64])
def test_keys_that_were_tampered_with_reach_nothing(pair: Pair, address: int, page: int) -> None:
    """Wherever they say that page 0 lies: no page beyond the mapping is written, or counted."""
    evil = moved(pair.d, address)
    src, dst = np.zeros(1, np.int32), np.full(1, page, np.int32)
    pair.dst.numpy()[:] = 0
    place = (address + 64 * page) % 2**64  # addresses wrap, into what may be written anyway
    legal = place <= SIZE - 64
    for deadline in (None, 60.0):  # at once, and the ordinary way
        t = pair.a.write_pages(
            pair.src, evil, src, dst, page_bytes=64, imm=pair.counter.id, deadline=deadline
        )
        if legal:
            t.wait(WAIT)
            pair.count += 1
            pair.counter.wait(pair.count, WAIT)
            continue
        with pytest.raises(fabric.TransferFailed):
            t.wait(WAIT)
    assert pair.counter.value == pair.count
    written = pair.dst.numpy().nonzero()[0]
    assert len(written) == 0 or (legal and place <= written[0] and written[-1] < place + 64)
