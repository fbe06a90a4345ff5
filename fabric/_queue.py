"""Completion queues of the C core, as event loops and threads read them.

No C thread ever enters Python. The C core writes {tag, code} records into a bounded ring and one
eventfd for each queue; whoever owns the queue takes at most `BATCH` of them at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import select
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._errors import check
from ._native import ffi, lib
from ._peer import Peer

if TYPE_CHECKING:
    from ._core import Core
    from ._transfer import Transfer

log = logging.getLogger("fabric")
log.addHandler(logging.NullHandler())

BATCH = 256
"""Events taken in one turn of a loop, so that completions never starve what else it does."""

_EVENT = struct.Struct("=Qii")


class CompletionQueue:
    """One queue of an engine, with a file descriptor of our own.

    The descriptor is a duplicate of C's: an event loop may look at it until we say so, whatever
    becomes of the engine meanwhile.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.fd = -1
        self.handle = check(lib.fab_queue_open(core.ptr))
        try:
            self.fd = os.dup(check(lib.fab_queue_fd(core.ptr, self.handle)))
        except BaseException:
            lib.fab_queue_close(core.ptr, self.handle)
            raise
        self._events = ffi.new("fab_event[]", BATCH)
        self._bytes = ffi.buffer(self._events)

    def drain(self) -> list[tuple[int, int]]:
        """Take up to `BATCH` events: pairs of tag and code."""
        count = lib.fab_queue_drain(self.core.ptr, self.handle, self._events, BATCH)
        if count <= 0:
            return []
        rows = _EVENT.iter_unpack(self._bytes[: count * _EVENT.size])
        return [(tag, code) for tag, code, _ in rows]

    def release(self) -> None:
        """Give back the queue and the descriptor; harmless to call again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            lib.fab_queue_close(self.core.ptr, self.handle)
            os.close(fd)


class LoopQueue(CompletionQueue):
    """The queue of one event loop: resolves futures. Used on the loop's thread only."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(core)
        self._tags = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[int]] = {}
        loop.add_reader(self.fd, self._on_events)

    def __del__(self) -> None:
        # The loop is gone: while it lives it refers to us.
        self.release()

    async def wait(self, watch: Callable[[int, int], int]) -> int:
        """Wait for an event.

        Args:
            watch: asks the C core for the event; takes the queue and a tag, and returns the handle
                of a watch, 0 when there is nothing to wait for, or a code.

        Returns:
            The code that the event brought. Cancelling drops the watch and nothing else.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        tag = next(self._tags)
        self._waiting[tag] = future
        handle = 0
        try:
            handle = watch(self.handle, tag)
            return check(handle) if handle <= 0 else await future
        finally:
            if self._waiting.pop(tag, None) is not None and handle > 0:
                lib.fab_unwatch(self.core.ptr, handle)

    def _on_events(self) -> None:
        # What is left keeps the descriptor readable: the loop calls again in its next turn.
        for tag, code in self.drain():
            future = self._waiting.pop(tag, None)
            if future is not None and not future.done():
                future.set_result(code)

    def close(self) -> None:
        """End all waits and give the queue back; the loop no longer looks at it."""
        waiting, self._waiting = self._waiting, {}
        try:
            for future in waiting.values():
                # Where the loop was closed first nobody waits any more.
                if not future.done() and not future.get_loop().is_closed():
                    future.set_result(lib.FAB_E_CLOSED)
        finally:
            self.release()

    def close_from(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close from any thread: what touches the loop is done on the loop's own."""
        if self.core.forked:
            return  # the loop's epoll is shared with the parent, which still needs its entry
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if loop is running:
            self._leave(loop)
            return
        try:
            loop.call_soon_threadsafe(self._leave, loop)
        except RuntimeError:  # closed meanwhile
            self.close()

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        while events := self.drain():
            for tag, code in events:
                future = self._waiting.pop(tag, None)
                if future is not None and not future.done():
                    future.set_result(code)
        if self.fd >= 0:
            loop.remove_reader(self.fd)
        self.close()


class Dispatcher:
    """The opt-in thread that runs done-callbacks of transfers."""

    def __init__(self, core: Core) -> None:
        self._queue = CompletionQueue(core)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tags = itertools.count(1)
        self._waiting: dict[int, tuple[Transfer, Callable[[Transfer], Any]]] = {}
        self._thread = threading.Thread(target=self._run, name="fabric callbacks", daemon=True)
        self._thread.start()

    def add(self, transfer: Transfer, handle: int, callback: Callable[[Transfer], Any]) -> None:
        """Call back when a transfer has ended: at once, on this thread, if it has."""
        tag = next(self._tags)
        self._waiting[tag] = transfer, callback
        watch = lib.fab_watch_transfer(self._queue.core.ptr, self._queue.handle, handle, tag)
        if watch > 0:
            return
        del self._waiting[tag]
        if watch < 0 and not transfer.done():
            check(watch)
        run_callback(transfer, callback)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._queue.fd, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            events = self._queue.drain()
            for tag, _ in events:
                run_callback(*self._waiting.pop(tag))
            if self._wake in ready and not events:
                break
        self._release()

    def _release(self) -> None:
        """Give back what the thread used; harmless to call again."""
        self._queue.release()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def close(self) -> None:
        """Run what the closing engine has ended, then stop the thread."""
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:  # a callback closes the engine
            self._thread.join()
            self._release()  # had a callback ended the thread


def run_callback(transfer: Transfer, callback: Callable[[Transfer], Any]) -> None:
    """Call a user's callback; whatever it raises is logged and changes nothing."""
    try:
        callback(transfer)
    except Exception:
        log.exception("callback %r of %r raised", callback, transfer)


class Acceptor:
    """The thread that asks the application about newcomers."""

    LOOK_NS = 500_000_000
    """How long C waits for a newcomer at a time; closing the engine wakes it at once."""

    def __init__(self, core: Core, ask: Callable[[Any], bool]) -> None:
        self._core = core
        self._ask = ask
        self._thread = threading.Thread(target=self._run, name="fabric accept", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        newcomer = ffi.new("fab_newcomer *")
        while not self._core.closed:
            code = lib.fab_accept_next(self._core.ptr, newcomer, self.LOOK_NS)
            if code == lib.FAB_E_CLOSED:
                return
            if code < 0:
                continue
            admit = self._admits(newcomer)
            lib.fab_accept_reply(self._core.ptr, newcomer.token, admit)

    def _admits(self, newcomer: Any) -> bool:
        peer = Peer(bytes(newcomer.id), ffi.string(newcomer.label).decode("utf-8", "replace"))
        try:
            return bool(self._ask(peer))
        except Exception:
            log.exception("accept callback raised about %r, which is refused", peer)
            return False

    def close(self) -> None:
        """Wait for the thread, which ends when the engine is closed."""
        if threading.current_thread() is not self._thread:
            self._thread.join()
