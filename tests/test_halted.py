"""A writer that is stopped inside one copy, and by that between the copies to somebody else.

Where it stops is no matter of chance. A page of its source cannot be read, and the signal that this
brings is handled by pause(2), so that the thread which copies stays where it is: inside a copy. It
has the engine's lock, so nothing more is done for anybody else either, whom it had begun with.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fabric
from tests import commands
from tests.harness import wait_until
from tests.test_death import exchange, fenced

if TYPE_CHECKING:
    from tests.harness import Farm, Node
    from tests.node import State

pytestmark = pytest.mark.only("local")
PAGE = commands.PAGE
CHUNK = 256 << 10  # bytes that the provider copies under one permit
SIZE = 4 * CHUNK
TRAP = CHUNK + CHUNK // 2  # offset of the page that cannot be read: in the middle of a chunk
PAGES = 32_768  # of `SIZE` each: seconds of work
MARK = 0xA5  # what the trap holds; its destination holds zeros
PROT_NONE = 0
TIMEOUT = 2.0  # peer_timeout, in seconds
AT_ONCE = 1.0  # seconds; a fence that has to wait takes TIMEOUT
libc: Any = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.signal.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def make_trap(node: State) -> None:
    """Make source "trap", of which one page cannot be read; who tries to waits in pause(2)."""
    mapping = mmap.mmap(-1, SIZE)
    view = np.frombuffer(mapping, np.uint8)
    view[:] = MARK
    node.things["trap"] = node.engine.register((view.ctypes.data, SIZE))
    node.things["trap.view"], node.things["trap.map"] = view, mapping
    signal.signal(signal.SIGUSR2, lambda *_: None)  # ends pause(2), and does nothing else
    libc.signal(signal.SIGSEGV, ctypes.cast(libc.pause, ctypes.c_void_p))
    protect(node, PROT_NONE)


def protect(node: State, protection: int) -> None:
    """Change what may be done with the page in the middle of the trap."""
    if libc.mprotect(node.things["trap.view"].ctypes.data + TRAP, PAGE, protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def keep_descriptor(node: State, descriptor: bytes) -> fabric.Descriptor:
    """Return a descriptor that is not dropped, as that would wait for the thread that is caught."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    node.things.setdefault("remotes", []).append(remote)
    return remote


def begin_long(node: State, descriptor: bytes, imm: int) -> None:
    """Begin what will not be over when the thread is caught: transfer "long"."""
    remote, pages = keep_descriptor(node, descriptor), np.zeros(PAGES, np.int32)
    node.things["long"] = node.engine.write_pages(
        node.things["src"], remote, pages, pages, page_bytes=SIZE, imm=imm
    )


def walk_into_trap(node: State, descriptor: bytes, imm: int) -> None:
    """Begin transfer "short" on a thread of its own, as submitting may be what does not return."""
    remote = keep_descriptor(node, descriptor)

    def work() -> None:
        node.things["short"] = node.engine.write(node.things["trap"], remote, imm=imm)

    node.things["thread"] = threading.Thread(target=work, daemon=True)
    node.things["thread"].start()


def free(node: State) -> None:
    """Let the page be read, and wake whichever thread waits in the signal's handler."""
    protect(node, mmap.PROT_READ | mmap.PROT_WRITE)
    for task in os.listdir("/proc/self/task"):
        libc.tgkill(os.getpid(), int(task), int(signal.SIGUSR2))
    node.things["thread"].join(20.0)


def how_they_ended(node: State) -> list[str]:
    """Return how both transfers ended."""
    return [commands.end_of(node.things[name]) for name in ("long", "short")]


def marks(node: State, name: str) -> list[int]:
    """Return how many bytes of each chunk of a region came from the trap."""
    chunks = commands.see(node, name).reshape(-1, CHUNK)
    return [int(count) for count in np.count_nonzero(chunks == MARK, axis=1)]


def caught(node: Node) -> bool:
    """Return whether a part of the second chunk has come: the writer is inside of its copy."""
    first, second, *rest = node.call(marks, "dst")
    return first == CHUNK and 0 < second < CHUNK and not any(rest)


def halt(farm: Farm, kind: str) -> tuple[Node, Node, Node]:
    """Return a writer that is stopped inside a copy to the last, having begun with the second."""
    a, b, c = (farm(name, peer_timeout=TIMEOUT) for name in "abc")
    exchange(b, c)
    a.region("src", SIZE, 1)
    a.call(make_trap)
    targets = [b.region("dst", SIZE, 2, kind), c.region("dst", SIZE, None)]
    ids = [node.counter("count") for node in (b, c)]
    for node, imm in zip((b, c), ids, strict=True):
        a.call(commands.write_imm, node.address, imm)
    a.write("src", targets[1], length=8)  # so that the trap is what the next copy is
    a.call(begin_long, targets[0], ids[0])
    b.wait("count", 3)
    a.call(walk_into_trap, targets[1], ids[1])
    wait_until(lambda: caught(c), 10.0, "the writer is not caught inside of a copy")
    wait_until(lambda: stands(b), 10.0, "the other transfer goes on")
    assert b.value("count") < PAGES, "it is over: the test shows nothing"
    a.freeze()
    return a, b, c


def stands(node: Node) -> bool:
    """Return whether a count stays where it is for a moment."""
    value = node.value("count")
    time.sleep(0.1)
    return node.value("count") == value


@pytest.mark.parametrize("end", ["goes on", "dies"])
@pytest.mark.parametrize("kind", ["alloc", "numpy"])
def test_a_writer_that_is_stopped(farm: Farm, kind: str, end: str) -> None:
    """Between copies it is fenced at once. Inside one the fence is pending, until it is not."""
    a, b, c = halt(farm, kind)
    # Between the copies to b.
    begin = time.monotonic()
    b.call(commands.disconnect, a.address)
    b.call(commands.deregister, "dst")
    assert time.monotonic() - begin < AT_ONCE
    # Inside of a copy to c.
    assert not c.call(fenced, a.address)
    for _ in range(2):
        with pytest.raises(fabric.FencePending):
            c.call(commands.deregister, "dst", 0.3)
    with pytest.raises(fabric.FencePending):
        c.wait("count", 2, 5.0, [a.address])
    assert caught(c)
    exchange(b, c)
    if end == "dies":
        a.kill()
    else:
        a.thaw()
        # It goes on, and is still inside: what follows is what the quarantine is for.
        assert not c.call(fenced, a.address)
        assert caught(c)
        a.call(free)
    wait_until(lambda: c.call(fenced, a.address), 5.0, "the fence stays pending")
    arrived = c.call(marks, "dst")
    assert c.call(commands.changes, "dst", 0.5) == ""
    assert c.value("count") == 1
    c.call(commands.deregister, "dst")
    exchange(b, c)
    if end == "goes on":
        assert arrived == [CHUNK, CHUNK, 0, 0], "of the copy it was in, all; of the next, nothing"
        assert a.call(how_they_ended) == ["PeerUnreachable"] * 2
