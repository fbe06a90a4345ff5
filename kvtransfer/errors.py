"""What a KV transfer can raise beyond the errors of `fabric`."""

from __future__ import annotations

from fabric import FabricError


class KvTransferError(FabricError):
    """Base of the errors below."""


class PoolExhausted(KvTransferError):
    """Not enough free pages now."""


class RequestRefused(KvTransferError):
    """The prefiller did not take the request.

    Attributes:
        field: name of the field it objects to, or "load" where it has too many requests.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"the prefiller refused the request: {field}: {reason}")
        self.field = field


class RequestFailed(KvTransferError):
    """The transfer of this request ended before its last byte. Nothing more of it lands."""


class RequestCancelled(KvTransferError):
    """The decoder withdrew the request."""
