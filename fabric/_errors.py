"""Everything the library raises, and how the C core's codes become exceptions."""

from __future__ import annotations

from ._native import ffi, lib


class FabricError(Exception):
    """Base of all errors of this library. Raised itself where the operating system refused."""


class InvalidArgument(FabricError, ValueError):
    """A bad argument. Nothing was posted."""


class WireError(FabricError):
    """Malformed bytes from elsewhere: an address, a descriptor, a message."""


class QueueFull(FabricError):
    """A bounded table is full, and the caller would not wait."""


class WaitTimeout(FabricError, TimeoutError):
    """Not yet. What was waited for goes on.

    Attributes:
        phase: ``"running"``; or ``"draining"`` for a transfer that has failed or was cancelled
            and whose memory may still be touched; or ``"after"`` for an event that has not
            happened, so that nothing was submitted.
    """

    def __init__(self, text: str = "", *, phase: str = "running") -> None:
        super().__init__(text)
        self.phase = phase


class TransferFailed(FabricError):
    """A transfer ended without all its ranges being acknowledged.

    Attributes:
        nic: name of the NIC, or an empty text where none was involved.
        peer: label of the peer.
        status: what the provider said.
        acknowledged: ranges known to be visible at the receiver.
    """

    def __init__(
        self,
        text: str = "",
        *,
        nic: str = "",
        peer: str = "",
        status: str = "",
        acknowledged: int = 0,
    ) -> None:
        super().__init__(text)
        self.nic = nic
        self.peer = peer
        self.status = status or text
        self.acknowledged = acknowledged


class PeerUnreachable(TransferFailed):
    """The peer is gone, and fenced: nothing that it started lands here any more."""


class TransferCancelled(FabricError):
    """The transfer was cancelled, and nothing of it touches memory any more."""


class CounterVoid(FabricError):
    """A write under the counter's id failed: its count proves nothing. Use a fresh id."""


class FencePending(FabricError):
    """The peer may still be inside a write. The region stays as it is; try again later."""


class FenceUnsupported(FabricError):
    """This provider cannot keep the peer from writing."""


class EngineClosed(FabricError):
    """The engine is closed, or was opened by the parent process."""


class ProviderUnavailable(FabricError):
    """There is no such provider or NIC here; the text says why."""


CLASSES: dict[int, type[FabricError]] = {
    lib.FAB_E_INVALID: InvalidArgument,
    lib.FAB_E_FULL: QueueFull,
    lib.FAB_E_TIMEOUT: WaitTimeout,
    lib.FAB_E_DRAINING: WaitTimeout,
    lib.FAB_E_FAILED: TransferFailed,
    lib.FAB_E_UNREACHABLE: PeerUnreachable,
    lib.FAB_E_CANCELLED: TransferCancelled,
    lib.FAB_E_VOID: CounterVoid,
    lib.FAB_E_FENCE_PENDING: FencePending,
    lib.FAB_E_FENCE_UNSUPPORTED: FenceUnsupported,
    lib.FAB_E_CLOSED: EngineClosed,
    lib.FAB_E_UNAVAILABLE: ProviderUnavailable,
    lib.FAB_E_WIRE: WireError,
    lib.FAB_E_SYSTEM: FabricError,
}
"""The class of each code of fabric_abi.h."""


def text_of(cdata: object) -> str:
    """Return a C string (a pointer, or a char array inside a struct)."""
    return ffi.string(cdata).decode("utf-8", "replace")


def error_of(code: int, text: str | None = None) -> FabricError:
    """Return the exception for a code; its text is that of this thread's last C call."""
    text = text_of(lib.fab_error_text()) if text is None else text
    if code == lib.FAB_E_DRAINING:
        return WaitTimeout(text, phase="draining")
    return CLASSES.get(code, FabricError)(text)


def check(code: int) -> int:
    """Return a C function's result, or raise what its code stands for."""
    if code < 0:
        raise error_of(code)
    return code
