"""Transfers: what was submitted, until and after it has ended."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NoReturn

from ._errors import (
    CLASSES,
    EngineClosed,
    FabricError,
    TransferFailed,
    WaitTimeout,
    error_of,
    text_of,
)
from ._native import ffi, lib
from ._values import SLICE_NS, in_slices, nanoseconds

if TYPE_CHECKING:
    from ._core import Core
    from ._queue import Dispatcher

STATES = {
    lib.FAB_T_RUNNING: "running",
    lib.FAB_T_DRAINING: "draining",
    lib.FAB_T_DONE: "done",
    lib.FAB_T_FAILED: "failed",
    lib.FAB_T_CANCELLED: "cancelled",
}
AT_ONCE: int = lib.FAB_DONE
"""Instead of a handle: the transfer was done before its submission returned."""
_DONE = 0
_RUNNING = lib.FAB_E_TIMEOUT
_DRAINING = lib.FAB_E_DRAINING
_NOT_YET = (_RUNNING, _DRAINING)
_CLOSED = lib.FAB_E_CLOSED
_INVALID = lib.FAB_E_INVALID
_wait = lib.fab_transfer_wait


class Transfer:
    """A write, a page write, a scatter, an immediate, a barrier or a message under way.

    It ends once: done (everything is visible at the receiver), failed or cancelled; and only when
    none of its work touches memory any more. Until then its source must stay as it is. Dropping
    the object changes nothing of that.
    """

    __slots__ = ("__weakref__", "_core", "_dispatcher", "_failure", "_handle", "_outcome")

    _core: Core
    _dispatcher: Dispatcher | None
    _failure: dict[str, Any] | None
    _handle: int
    _outcome: int | None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a transfer belongs to its engine: it is neither copied nor pickled")

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the transfer is done.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Raises:
            WaitTimeout: not yet. Where its phase is ``"draining"`` the transfer will not succeed,
                but the source may still be read.
            TransferFailed: it failed; `PeerUnreachable` where the peer is gone.
            TransferCancelled: it was cancelled.
            EngineClosed: the engine belongs to the parent process.
        """
        if timeout is None:
            code = self._code(SLICE_NS)
            while code in _NOT_YET:
                code = self._code(SLICE_NS)
        else:
            code = in_slices(self._code, nanoseconds("timeout", timeout), _NOT_YET)
        self._finish(code)

    def __await__(self) -> Generator[Any, None, None]:
        return self._reached().__await__()

    async def _reached(self) -> None:
        code = self._code(0)
        if code in _NOT_YET:
            watch = functools.partial(self._watch, self._handle)
            event = await self._core.loop_queue().wait(watch)
            code = self._code(0)
            if code in _NOT_YET:  # the engine closes; it has not said yet how this ended
                code = event
        self._finish(code)

    def _watch(self, handle: int, queue: int, tag: int) -> int:
        code = lib.fab_watch_transfer(self._core.ptr, queue, handle, tag)
        return 0 if code == _INVALID and self._outcome is not None else code

    def done(self) -> bool:
        """Return whether the transfer has ended, in whatever way. Never blocks."""
        return self._code(0) not in _NOT_YET

    def cancel(self) -> None:
        """Stop posting. The transfer ends when what was posted has ended; `wait` says so.

        A transfer that has ended stays as it is.
        """
        if self._outcome is None:
            code = lib.fab_transfer_cancel(self._core.ptr, self._handle)
            if code < 0 and self._outcome is None and code != _CLOSED:
                raise error_of(code)

    def add_done_callback(self, callback: Callable[[Transfer], Any]) -> None:
        """Call ``callback(transfer)`` once the transfer has ended.

        It runs on the engine's dispatcher thread, or at once where the transfer has ended. What
        it raises is logged.

        Raises:
            InvalidArgument: the engine was not opened with ``callbacks=True``.
            QueueFull: too many waits are pending.
        """
        if self._dispatcher is None:
            raise CLASSES[_INVALID]("callbacks need TransferEngine(..., callbacks=True)")
        self._dispatcher.add(self, self._handle, callback)

    @property
    def state(self) -> str:
        """``"running"``, ``"draining"``, ``"done"``, ``"failed"`` or ``"cancelled"``."""
        code = self._code(0)
        if code == _CLOSED:
            return "unknown"
        if code in _NOT_YET:
            return "running" if code == _RUNNING else "draining"
        if code == _DONE:
            return "done"
        return "cancelled" if code == lib.FAB_E_CANCELLED else "failed"

    def __repr__(self) -> str:
        if self._handle == AT_ONCE:
            return "<Transfer done>"
        info = ffi.new("fab_transfer_info *")
        if lib.fab_transfer_get_info(self._core.ptr, self._handle, info) < 0:
            failure = self._failure
            return f"<Transfer {self.state}{': ' + failure['text'] if failure else ''}>"
        peer = text_of(info.peer)
        return (
            f"<Transfer {STATES.get(info.state, info.state)}"
            f" [{info.acknowledged} of {info.ranges} ranges, {info.bytes} bytes]"
            f"{' to ' + peer if peer else ''}>"
        )

    def _code(self, timeout: int) -> int:
        """Return the code of the end, or of not yet, after waiting `timeout` nanoseconds."""
        outcome = self._outcome
        if outcome is not None:
            return outcome
        code = _wait(self._core.ptr, self._handle, timeout)
        if code == _CLOSED:
            code = self._end_at_close()
        if code in _NOT_YET or code == _CLOSED:
            return code
        # Our slot was given back while we looked at it: whoever did so left the outcome.
        if code == _INVALID and self._outcome is not None:
            return self._outcome
        self._settle(code)
        return code

    def _end_at_close(self) -> int:
        """Return how the transfer ended: a closed engine still tells, but waits no more."""
        info = ffi.new("fab_transfer_info *")
        code = lib.fab_transfer_get_info(self._core.ptr, self._handle, info)
        if code < 0:
            return code
        ended = info.state not in (lib.FAB_T_RUNNING, lib.FAB_T_DRAINING)
        return int(info.code) if ended else _CLOSED

    def _settle(self, code: int) -> None:
        """Keep how the transfer ended, and give back its slot in the C core's table."""
        core = self._core
        if code != _DONE:
            with core.lock:
                if self._failure is None:
                    self._failure = self._read_failure()
        self._outcome = code
        if core.live.pop(self._handle, None) is not None:
            lib.fab_transfer_release(core.ptr, self._handle)

    def _read_failure(self) -> dict[str, Any]:
        info = ffi.new("fab_transfer_info *")
        lib.fab_transfer_get_info(self._core.ptr, self._handle, info)
        return {
            "text": text_of(info.text),
            "nic": text_of(info.nic),
            "peer": text_of(info.peer),
            "acknowledged": info.acknowledged,
            "ranges": info.ranges,
        }

    def _finish(self, code: int) -> None:
        """Return if the transfer is done, raise what its code says otherwise."""
        if code != _DONE:
            raise self._error(code)

    def _error(self, code: int) -> FabricError:
        if code == _CLOSED:
            self._core.check_open()
            return EngineClosed("the engine was closed during the transfer")
        if code in _NOT_YET:
            phase = "running" if code == _RUNNING else "draining"
            return WaitTimeout(f"not done yet: {self!r}", phase=phase)
        failure = self._failure
        kind = CLASSES.get(code, FabricError)
        if failure is None:
            return error_of(code)
        status = failure["text"]
        if not issubclass(kind, TransferFailed):
            return kind(status or "the transfer was cancelled")
        return kind(
            _sentence(failure),
            nic=failure["nic"],
            peer=failure["peer"],
            status=status,
            acknowledged=failure["acknowledged"],
        )


class Submitted(Transfer):
    """A transfer that holds a slot in the C core's table until its end has been seen."""

    __slots__ = ()

    def __init__(self, core: Core, handle: int, dispatcher: Dispatcher | None) -> None:
        self._core = core
        self._handle = handle
        self._dispatcher = dispatcher
        self._failure = None
        self._outcome = None
        core.live[handle] = weakref.ref(self)

    def __del__(self, release: Any = lib.fab_transfer_release) -> None:
        core = self._core
        if core.live.pop(self._handle, None) is not None and not core.forked:
            release(core.ptr, self._handle)


class AtOnce(Transfer):
    """A transfer that was done before its submission returned: C knows nothing of it.

    Most short writes are. So what all of them have in common is the class's, not to be stored in
    each, and there is nothing to be given back: one takes a quarter of the time of the others.
    """

    __slots__ = ()

    _dispatcher: Dispatcher | None = None
    _failure = None
    _handle = AT_ONCE
    _outcome = _DONE


class AtOnceCalling(AtOnce):
    """The same of an engine with callbacks."""

    __slots__ = ("_dispatcher",)

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher


def transfer_of(core: Core, handle: int, dispatcher: Dispatcher | None) -> Transfer:
    """Return the transfer that a submission's handle stands for."""
    if handle != AT_ONCE:
        return Submitted(core, handle, dispatcher)
    return AtOnce() if dispatcher is None else AtOnceCalling(dispatcher)


def _sentence(failure: dict[str, Any]) -> str:
    where = [f"peer {failure['peer']}"] if failure["peer"] else []
    where += [f"NIC {failure['nic']}"] if failure["nic"] else []
    where += [f"{failure['acknowledged']} of {failure['ranges']} ranges were acknowledged"]
    return f"{failure['text']} ({', '.join(where)})"
