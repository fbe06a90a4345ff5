"""Functions that tests run inside nodes; the first argument is the node's `State`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fabric
from tests.patterns import Bytes, Copy, difference, image, pattern
from tests.scale import scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.node import State

PAGE = os.sysconf("SC_PAGE_SIZE")
KINDS = ("alloc", "bytearray", "memoryview", "numpy", "pointer")
LONG_PAGE = scaled(1 << 20, less=256)
"""Bytes of a page of `begin_long`."""
SETTLE_SECONDS = 0.05
"""How long a count that must not come is given to come."""


# ---- engine ----


def open_engine(
    node: State, name: str, provider: str, nics: list[str] | None, options: dict[str, Any]
) -> bytes:
    """Open the engine of the node; returns its address."""
    node.name, node.provider, node.nics = name, provider, nics
    options = {"peer_timeout": 10.0, **options}
    node.engine = fabric.TransferEngine(provider=provider, nics=nics, **options)
    return bytes(node.engine.address)


def close_engine(node: State) -> None:
    """Close the engine and forget it."""
    node.engine.close()
    node.things.clear()
    node.engine = None


def peer(address: bytes) -> fabric.Address:
    """Return an address from its bytes."""
    return fabric.Address.from_bytes(address)


def totals(node: State) -> dict[str, int]:
    """Return stats() without its lists."""
    return {
        key: value for key, value in asdict(node.engine.stats()).items() if isinstance(value, int)
    }


def settle(node: State) -> dict[str, int]:
    """Release everything that tests made; returns what the engine still holds."""
    for thing in list(node.things.values()):
        if isinstance(thing, fabric.MemoryRegion):
            node.engine.deregister(thing, timeout=10.0)
        elif hasattr(thing, "close"):
            thing.close()
    node.things.clear()
    if not node.has_engine:
        return {}
    with contextlib.suppress(fabric.WaitTimeout):
        while True:
            node.engine.recv(timeout=0)
    return held(node)


def held(node: State) -> dict[str, int]:
    """Return the live handles of the engine by name, only those that are not zero."""
    deadline = time.monotonic() + 2.0
    names = ("transfers_live", "regions", "counters", "watches", "remotes")
    while True:
        gc.collect()
        stats = totals(node)
        left = {name: stats[name] for name in names if stats[name]}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


# ---- memory ----


def foreign(kind: str, nbytes: int) -> tuple[Any, Any]:
    """Return memory that is not the engine's: what to register, and what to see it by."""
    if kind == "bytearray":
        buffer = bytearray(nbytes)
        return buffer, buffer
    if kind == "memoryview":
        view = memoryview(bytearray(nbytes))
        return view, view
    if kind == "numpy":
        array = np.zeros(nbytes, np.uint8)
        return array, array
    if kind == "torch":
        import torch

        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        return tensor, tensor.numpy()
    if kind == "pointer":
        mapping = mmap.mmap(-1, nbytes)
        mapped = np.frombuffer(mapping, np.uint8)
        return (mapped.ctypes.data, nbytes), mapped
    raise ValueError(f"no such kind of memory: {kind}")


def make_region(node: State, name: str, nbytes: int, fill: int | None, kind: str) -> bytes:
    """Make region `name`, filled with pattern `fill`; returns its descriptor."""
    if kind == "alloc":
        region = node.engine.alloc(nbytes)
        view: Any = memoryview(region)
    else:
        buffer, view = foreign(kind, nbytes)
        region = node.engine.register(buffer)
    node.things[name] = region
    node.things[f"{name}.view"] = np.frombuffer(view, np.uint8)
    if fill is not None:
        see(node, name)[:] = pattern(fill, nbytes)
    return bytes(region.descriptor)


def see(node: State, name: str) -> Bytes:
    """Return the bytes of a region."""
    view: Bytes = node.things[f"{name}.view"]
    return view


def refill(node: State, name: str, fill: int) -> None:
    """Fill a region with another pattern."""
    view = see(node, name)
    view[:] = pattern(fill, view.size)


def differs(node: State, name: str, fill: int, copies: list[Copy]) -> str:
    """Compare a region with pattern `fill` after `copies`."""
    view = see(node, name)
    return difference(view, image(fill, view.size, copies))


def deregister(node: State, name: str, timeout: float | None = 10.0) -> None:
    """Deregister a region."""
    node.engine.deregister(node.things[name], timeout=timeout)
    del node.things[name], node.things[f"{name}.view"]


def changes(node: State, name: str, seconds: float) -> str:
    """Watch a region for `seconds`; says what changed, or nothing."""
    view = see(node, name)
    before = view.copy()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if text := difference(view, before):
            return text
        time.sleep(0.01)
    return ""


# ---- counters ----


def drop(node: State, name: str) -> None:
    """Forget a thing."""
    del node.things[name]


def make_counter(node: State, name: str, number: int | None) -> int:
    """Make a counter; returns its id."""
    node.things[name] = node.engine.counter(number) if number is not None else node.engine.counter()
    result: int = node.things[name].id
    return result


def counter_value(node: State, name: str) -> int:
    """Return the value of a counter."""
    result: int = node.things[name].value
    return result


def counter_wait(
    node: State, name: str, target: int, timeout: float | None, peers: Sequence[bytes] | None
) -> float:
    """Wait for a counter; returns the time of CLOCK_MONOTONIC when it was reached."""
    named = None if peers is None else [peer(address) for address in peers]
    node.things[name].wait(target, timeout=timeout, peers=named)
    return time.monotonic()


def counter_settled(node: State, name: str, target: int) -> int:
    """Wait for a counter, give more counts the time to come, and return the value."""
    counter = node.things[name]
    counter.wait(target, timeout=20.0)
    time.sleep(SETTLE_SECONDS)
    result: int = counter.value
    return result


def release(node: State, name: str) -> None:
    """Close a counter, a block or whatever else can be closed."""
    node.things.pop(name).close()


# ---- transfers ----


def write(node: State, source: str, descriptor: bytes, options: dict[str, Any]) -> None:
    """Write from a region and wait for the end."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    node.engine.write(node.things[source], remote, **options).wait(timeout=30.0)


def begin_write(
    node: State, name: str, source: str, descriptor: bytes, options: dict[str, Any]
) -> None:
    """Begin a write, kept as transfer `name`."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    node.things[name] = node.engine.write(node.things[source], remote, **options)


def transfer_wait(node: State, name: str, timeout: float | None = 30.0) -> None:
    """Wait for the end of a transfer."""
    node.things[name].wait(timeout=timeout)


def end_of(transfer: fabric.Transfer) -> str:
    """Wait for a transfer; returns "done", or the name of the exception."""
    try:
        transfer.wait(timeout=30.0)
    except fabric.FabricError as error:
        return type(error).__name__
    return "done"


def transfer_end(node: State, name: str) -> str:
    """Wait for a transfer by name; returns "done", or the name of the exception."""
    return end_of(node.things[name])


def transfer_done(node: State, name: str) -> bool:
    """Return whether a transfer has ended."""
    result: bool = node.things[name].done()
    return result


def transfer_cancel(node: State, name: str) -> None:
    """Cancel a transfer."""
    node.things[name].cancel()


def write_pages(
    node: State,
    source: str,
    descriptor: bytes,
    pages: tuple[Sequence[int], Sequence[int]],
    options: dict[str, Any],
) -> None:
    """Write pages and wait for the end."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    src_pages, dst_pages = (np.asarray(side, np.int32) for side in pages)
    node.engine.write_pages(node.things[source], remote, src_pages, dst_pages, **options).wait(30.0)


def begin_long(
    node: State, name: str, source: str, descriptor: bytes, imm: int, pages: int
) -> None:
    """Begin a write of many pages of `LONG_PAGE`, all of them the first page of a region."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    sources = np.zeros(pages, np.int32)
    targets = (np.arange(pages) % (len(remote) // LONG_PAGE)).astype(np.int32)
    node.things[name] = node.engine.write_pages(
        node.things[source], remote, sources, targets, page_bytes=LONG_PAGE, imm=imm
    )


def scatter(
    node: State, source: str, rows: Sequence[tuple[bytes, int, int, int]], imm: int | None
) -> None:
    """Scatter to rows of (descriptor, src_offset, dst_offset, length) and wait for the end."""
    targets = [(fabric.Descriptor.from_bytes(row[0]), *row[1:]) for row in rows]
    node.engine.scatter(node.things[source], targets, imm=imm).wait(timeout=30.0)


def write_imm(node: State, address: bytes, imm: int, times: int = 1) -> None:
    """Raise an immediate at a peer, some times, and wait for the end of all."""
    target = peer(address)
    for transfer in [node.engine.write_imm(target, imm) for _ in range(times)]:
        transfer.wait(timeout=30.0)


def barrier(node: State, addresses: Sequence[bytes], imm: int) -> None:
    """Raise an immediate at all peers and wait for the end."""
    node.engine.barrier([peer(address) for address in addresses], imm).wait(timeout=30.0)


def disconnect(node: State, address: bytes) -> float:
    """Fence a peer; returns the time of CLOCK_MONOTONIC when that was done."""
    node.engine.disconnect(peer(address))
    return time.monotonic()


# ---- the process ----


def clock(node: State) -> float:
    """Return CLOCK_MONOTONIC of this machine."""
    return time.monotonic()


def cpu_seconds(node: State) -> float:
    """Return the CPU time of all threads of this process."""
    return time.process_time()


def descriptors_open(node: State) -> list[str]:
    """Return what the file descriptors of this process point to, sorted."""
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}").partition(":[")[0])
    return sorted(name for name in found if not name.startswith("/proc/"))


def thread_count(node: State) -> int:
    """Return how many threads this process has, those of C included."""
    return len(os.listdir("/proc/self/task"))


def resident_bytes(node: State) -> int:
    """Return the resident memory of this process that is its own (not shared memory)."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * PAGE


def fork_python(node: State, seconds: float) -> int:
    """Fork a child that sleeps; returns its pid."""
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(0)
    return pid


def fork_raw(node: State) -> int:
    """Fork behind Python's and libc's back: no handler runs, every descriptor stays open."""
    libc = ctypes.PyDLL(None)  # keeps the GIL: the child has no other thread to get it from
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    pid: int = libc.syscall(clone, 17, 0, 0, 0, 0)
    if pid == 0:
        libc.pause()
        libc._exit(0)
    return pid


@contextlib.contextmanager
def background(work: Callable[[], None]) -> Iterator[None]:
    """Run `work` on a thread during the block; its exception is raised at the end."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        thread.join(60.0)
    if errors:
        raise errors[0]
