"""The C engine as everything made from a `TransferEngine` holds it.

A `Core` outlives its `TransferEngine` while memory, transfers or counters of it are alive: closing
the engine makes the C functions refuse, and the last reference to the core frees what is left.
"""

from __future__ import annotations

import asyncio
import collections
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ._errors import EngineClosed, InvalidArgument, check, error_of
from ._native import ffi, lib
from ._owner import EngineOwner
from ._peer import Address, Peer
from ._queue import LoopQueue
from ._values import SLICE_NS, needs

if TYPE_CHECKING:
    from ._transfer import Transfer

T = TypeVar("T")
MAX_PEERS: int = lib.FAB_MAX_PEERS
_SENDERS_KEPT = 2 * MAX_PEERS
_BUFFERS_KEPT = 8

_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for core in list(_cores):
        core.forked = core.closed = True


os.register_at_fork(after_in_child=_after_fork_in_child)


def listed(peers: Iterable[Peer] | Peer | None) -> tuple[Peer, ...]:
    """Return the peers that a user names: one, several or none.

    Raises:
        InvalidArgument: it cannot be iterated.
    """
    if peers is None:
        return ()
    if isinstance(peers, Peer):
        return (peers,)
    try:
        return tuple(peers)
    except TypeError:
        raise InvalidArgument(f"addresses: an iterable is needed, not {peers!r}") from None


class Core:
    """What the objects of one engine share.

    Attributes:
        ptr: the ``fab_engine *``; valid as long as this object.
        address: of this engine.
        closed: the engine was closed, or belongs to the parent process.
        forked: this is a child of the process that opened the engine.
        live: transfers that hold a slot in C, by handle.
        lock: guards what is made on first use. Never held while C waits.
    """

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr
        self._owner = EngineOwner(ptr)
        self.address: Address
        self.closed = False
        self.forked = False
        self.live: dict[int, weakref.ref[Transfer]] = {}
        self.lock = threading.RLock()  # a finaliser may close the engine inside of it
        self._peers: dict[bytes, int] = {}  # by engine id, those whose address we were given
        self._met: dict[bytes, int] = {}  # those that came to us
        self._senders: dict[int, Peer] = {}
        self._buffers: collections.deque[Any] = collections.deque(maxlen=_BUFFERS_KEPT)
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopQueue] = (
            weakref.WeakKeyDictionary()
        )
        _cores.add(self)

    def check_open(self) -> None:
        """Refuse to go on with a closed engine.

        Raises:
            EngineClosed: it is closed, or belongs to the parent process.
        """
        if self.forked:
            raise EngineClosed("the engine belongs to the parent process: open another after fork")
        if self.closed:
            raise EngineClosed("the engine is closed")

    # ---- peers ----

    def peer(self, peer: Peer) -> int:
        """Return the C handle of a peer; an address that is new is added.

        Raises:
            InvalidArgument: not a peer, or one that only another engine knows.
        """
        handle = self._peers.get(peer.id) if isinstance(peer, Peer) else None
        return self._add_peer(peer) if handle is None else handle

    def _add_peer(self, peer: Peer) -> int:
        needs("address", peer, Peer)
        if not isinstance(peer, Address):
            if peer.id in self._met:
                return self._met[peer.id]
            raise InvalidArgument(
                f"address: {peer!r} is not known to this engine, and is not an Address"
            )
        handle = check(lib.fab_peer_add(self.ptr, peer.as_c()))
        self._remember(handle, peer)
        return handle

    def peers(self, peers: Iterable[Peer] | Peer | None) -> tuple[Any, int]:
        """Return an array of handles for C and how many there are.

        Raises:
            InvalidArgument: too many, or as from `peer`.
        """
        if peers is None or peers == ():
            return ffi.NULL, 0
        handles = [self.peer(peer) for peer in listed(peers)]
        return ffi.new("int64_t[]", handles), len(handles)

    def with_peers(self, peers: Iterable[Peer], function: Callable[[], T]) -> T:
        """Call what looks up handles of peers: again if the C core had reused one's entry.

        Raises:
            InvalidArgument: as from `function`, where that was not the reason.
        """
        try:
            return function()
        except InvalidArgument:
            if not self.forget_stale(peers):
                raise
            return function()

    def forget_stale(self, peers: Iterable[Peer]) -> bool:
        """Add again those whose entry the C core reused; returns whether there were any."""
        stale = False
        for peer in peers:
            if isinstance(peer, Address):
                handle = self._peers.get(peer.id)
                stale |= handle != self._add_peer(peer)
        return stale

    def sender(self, handle: int) -> Peer:
        """Return who a C handle stands for."""
        known = self._senders.get(handle)
        if known is not None:
            return known
        info = ffi.new("fab_peer_info *")
        check(lib.fab_peer_get_info(self.ptr, handle, info))
        peer = Peer(bytes(info.id), ffi.string(info.label).decode("utf-8", "replace"))
        self._remember(handle, peer)
        return peer

    def _remember(self, handle: int, peer: Peer) -> None:
        if len(self._senders) >= _SENDERS_KEPT:
            self._forget_evicted()
        self._senders[handle] = peer
        (self._peers if isinstance(peer, Address) else self._met)[peer.id] = handle

    def _forget_evicted(self) -> None:
        out = ffi.new("int64_t[]", MAX_PEERS)
        count = check(lib.fab_peer_list(self.ptr, out, MAX_PEERS))
        kept = set(ffi.unpack(out, min(count, MAX_PEERS)))
        for handle in set(self._senders) - kept:
            gone = self._senders.pop(handle, None)
            for known in (self._peers, self._met):
                if gone is not None and known.get(gone.id) == handle:
                    del known[gone.id]

    # ---- submission ----

    def sweep(self) -> None:
        """Give back the slots of transfers that have ended and that somebody still holds."""
        for ref in list(self.live.values()):
            transfer = ref()
            if transfer is not None:
                transfer.done()

    def submit_slowly(self, function: Callable[..., int], args: tuple[Any, ...], wait: int) -> int:
        """Submit what was refused because a table is full: make room, and wait for it.

        Args:
            function: of the C core; takes the engine, `args` and how long to wait.
            args: its arguments.
            wait: nanoseconds; below zero: for ever.
        """
        end = lib.fab_time_ns() + wait
        while True:
            self.sweep()
            left = SLICE_NS if wait < 0 else min(SLICE_NS, end - lib.fab_time_ns())
            handle = function(self.ptr, *args, max(0, left))
            if handle != lib.FAB_E_FULL or (wait >= 0 and lib.fab_time_ns() >= end):
                return handle

    # ---- messages ----

    def receive(self, timeout: int) -> tuple[int, bytes]:
        """Take a message; returns the sender's handle and the payload, or (code, b"")."""
        try:
            buffer, sender = self._buffers.pop()
        except IndexError:
            buffer, sender = ffi.new("uint8_t[]", lib.FAB_MAX_MESSAGE), ffi.new("int64_t *")
        length = lib.fab_recv(self.ptr, buffer, lib.FAB_MAX_MESSAGE, sender, timeout)
        result = (length, b"") if length < 0 else (sender[0], ffi.buffer(buffer, length)[:])
        self._buffers.append((buffer, sender))
        return result

    # ---- event loops ----

    def loop_queue(self) -> LoopQueue:
        """Return the completion queue of the running event loop."""
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        return self._open_queue(loop) if queue is None else queue

    def _open_queue(self, loop: asyncio.AbstractEventLoop) -> LoopQueue:
        self.check_open()
        with self.lock:
            for other in [other for other in self._queues if other.is_closed()]:
                self._queues.pop(other).close()
        queue = LoopQueue(self, loop)
        with self.lock:
            self._queues[loop] = queue
        return queue

    def close(self, timeout: int) -> None:
        """Close the C engine and wake everybody who waits in Python.

        Raises:
            FabricError: the C core could not do all of it within `timeout` nanoseconds.
        """
        with self.lock:
            self.closed = True
        code = lib.fab_engine_close(self.ptr, timeout)
        error = error_of(code) if code < 0 and code != lib.FAB_E_CLOSED else None
        with self.lock:
            queues, self._queues = self._queues, weakref.WeakKeyDictionary()
        for loop, queue in list(queues.items()):
            queue.close_from(loop)
        if error is not None:
            raise error
