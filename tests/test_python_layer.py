"""What Python adds to the C core: loops, threads, integers, buffers and descriptors of files."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fabric
from tests import commands
from tests.commands import background
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Farm
    from tests.node import State

SIZE = 4096
THREADS = 4
LONG = 32 << 20  # bytes that take a while
Engines = tuple[fabric.TransferEngine, fabric.TransferEngine]


@pytest.fixture
def engines() -> Iterator[Engines]:
    with fabric.TransferEngine("local") as a, fabric.TransferEngine("local") as b:
        yield a, b


def leave_a_wait(engine: fabric.TransferEngine) -> asyncio.Task[None]:
    """Close a loop in which a task still waits for a counter."""

    async def wait() -> None:
        await engine.counter().reached(1)

    async def begin() -> asyncio.Task[None]:
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0.01)
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(begin())
    loop.close()
    task.get_loop().set_exception_handler(lambda *_: None)  # it is destroyed while it waits
    return task


def test_a_loop_that_was_closed_with_a_wait() -> None:
    """Neither another loop nor closing the engine trips over it."""
    engine = fabric.TransferEngine("local")
    held = [leave_a_wait(engine)]

    async def another() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.counter().reached(1), 0.01)

    asyncio.run(another())
    held.append(leave_a_wait(engine))
    engine.close()
    assert not any(task.done() for task in held)


def register_meanwhile(node: State, name: str) -> bool:
    """Register memory again while it is being taken back; returns whether that region is alive."""
    old = node.things[name]
    with background(lambda: node.engine.deregister(old)):
        threading.Event().wait(0.3)
        new = node.engine.register(commands.see(node, name))
    assert "deregistered" in repr(old)
    return new is not old and new.descriptor.nbytes == old.nbytes


@pytest.mark.only("local")
def test_register_while_it_is_deregistered(farm: Farm) -> None:
    """A region that is going away is not what the same memory gets."""
    a, b = farm("a"), farm("b", peer_timeout=1.0)
    a.region("src", SIZE, 1)
    a.write("src", b.region("dst", SIZE, 0, "numpy"))
    a.freeze()
    assert b.call(register_meanwhile, "dst")


def ask_at_once(region: fabric.MemoryRegion, address: fabric.Address) -> list[fabric.Descriptor]:
    """Return what `THREADS` threads get that ask for a peer's descriptor at the same time."""
    barrier = threading.Barrier(THREADS)
    found: list[fabric.Descriptor] = []

    def ask() -> None:
        barrier.wait()
        found.append(region.descriptor_for(address))

    threads = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == THREADS
    return found


def test_descriptors_for_one_peer_from_threads(engines: Engines) -> None:
    """All threads get the same descriptor, and taking the region back finds it."""
    a, b = engines
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(100):
            region = a.alloc(SIZE)
            assert len(set(ask_at_once(region, b.address))) == 1
            a.deregister(region, timeout=5.0)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_integers_of_numpy(engines: Engines, kind: Any) -> None:
    """They are as good as Python's own, however narrow their arithmetic."""
    a, b = engines
    source, target = a.register(np.arange(SIZE, dtype=np.uint16)), b.alloc(2 * SIZE)
    d, got = target.descriptor, target.numpy()
    a.write(source, d, src_offset=kind(200), dst_offset=kind(100)).wait(5.0)
    assert bytes(got[100:]) == (bytes(memoryview(source))[200:] + bytes(100))
    part, size = kind(0), kind(128)
    a.write(source, d, src_offset=part, dst_offset=part, length=size).wait(5.0)
    a.write_pages(source, d, [1], [2], page_bytes=size, src_offset=size, dst_offset=size).wait(5.0)
    a.scatter(source, [(d, size, size, size)]).wait(5.0)
    assert bytes(got[:256]) == bytes(memoryview(source))[:256]
    assert bytes(got[384:512]) == bytes(memoryview(source))[256:384]


@pytest.mark.parametrize("value", [np.float32(8.5), 8.0, True, "8", np.int8(-1), np.array([1, 2])])
@pytest.mark.parametrize("name", ["src_offset", "dst_offset", "length"])
def test_what_is_not_a_size(engines: Engines, name: str, value: Any) -> None:
    """The error names the argument; nothing is rounded."""
    a, b = engines
    source, d = a.alloc(SIZE), b.alloc(SIZE).descriptor
    wrong = {name: value}
    with pytest.raises(fabric.InvalidArgument, match=name):
        a.write(source, d, **wrong)
    with pytest.raises(fabric.InvalidArgument, match="page_bytes"):
        a.write_pages(source, d, [0], [0], page_bytes=value)
    with pytest.raises(fabric.InvalidArgument, match="targets"):
        a.scatter(source, [(d, 0, value, 8)])


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[ns]", [("Offset", "i4"), ("When", "M8[s]")], "f2"])
def test_arrays_of_any_plain_dtype(engines: Engines, dtype: Any) -> None:
    a, b = engines
    array = np.zeros((4, 4), dtype)
    region = a.register(array)
    assert (region.ptr, region.nbytes) == (array.ctypes.data, array.nbytes)
    source = b.alloc(array.nbytes)
    source.numpy()[:] = 1
    b.write(source, region.descriptor).wait(5.0)
    assert array.tobytes() == b"\1" * array.nbytes


@pytest.mark.parametrize("dtype", ["O", [("Offset", "i4"), ("it", "O")]])
def test_arrays_of_references(engines: Engines, dtype: Any) -> None:
    with pytest.raises(fabric.InvalidArgument, match="references"):
        engines[0].register(np.zeros(4, dtype))


def test_arrays_with_gaps(engines: Engines) -> None:
    for array in (np.zeros((4, 4), "M8[s]")[:, 1], np.zeros((4, 4), "f4").T):
        with pytest.raises(fabric.InvalidArgument, match="memory"):
            engines[0].register(array)


def close_from_a_callback() -> None:
    """Close an engine on its own dispatcher thread, and wait for the end of that."""
    with fabric.TransferEngine("local") as b:
        a = fabric.TransferEngine("local", callbacks=True)
        threads: list[threading.Thread] = []

        def close(_: fabric.Transfer) -> None:
            threads.append(threading.current_thread())
            a.close()

        transfer = a.write(a.alloc(LONG), b.alloc(LONG).descriptor)  # ends after the call
        transfer.add_done_callback(close)
        transfer.wait(5.0)
        wait_until(lambda: bool(threads), 5.0, "the callback did not run")
        if threads[0] is not threading.current_thread():
            threads[0].join(5.0)


def test_an_engine_that_its_callback_closes() -> None:
    """It gives back all descriptors."""
    close_from_a_callback()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        close_from_a_callback()
    assert len(os.listdir("/proc/self/fd")) == before
