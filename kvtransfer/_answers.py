"""The short messages that follow a request.

==========  =================  ======================  =========================================
kind        from               fields                  meaning
==========  =================  ======================  =========================================
cancel      decoder            id                      stop, drain, and say so
refused     prefiller          id, field, reason       nothing was written, and nothing will be
failed      prefiller          id, field, reason       what was under way has ended, and ...
cancelled   prefiller          id, field, reason       ... nothing more of it will land
==========  =================  ======================  =========================================

``id`` bin(16); ``field`` str of at most 64 bytes, the field of the request that was refused and
empty otherwise; ``reason`` str of at most 1024 bytes, for people. Success has no message: the
decoder counts.
"""

from __future__ import annotations

import dataclasses

import msgpack

from fabric import WireError

from ._fields import Fields
from .request import ID_BYTES, MAX_MESSAGE, VERSION, Request, header

MAX_REASON_BYTES = 1024
MAX_FIELD_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Decoder to prefiller: stop, drain, and say so."""

    id: bytes


@dataclasses.dataclass(frozen=True)
class Ended:
    """Prefiller to decoder: nothing more of this request will land.

    Attributes:
        kind: "refused" (nothing was written), "failed", or "cancelled" (as asked).
        field: of the request that was refused; empty otherwise.
        reason: in words.
    """

    id: bytes
    kind: str
    field: str
    reason: str


ENDINGS = ("refused", "failed", "cancelled")


def encode(message: Cancel | Ended) -> bytes:
    """The message's bytes; a reason that is too long is cut."""
    values: dict[str, object] = {"v": VERSION, "id": message.id}
    if isinstance(message, Cancel):
        values["kind"] = "cancel"
    else:
        values["kind"] = message.kind
        values["field"] = _cut(message.field, MAX_FIELD_BYTES)
        values["reason"] = _cut(message.reason, MAX_REASON_BYTES)
    raw: bytes = msgpack.packb(values)
    return raw


def decode(raw: bytes) -> Request | Cancel | Ended:
    """Any message of the protocol.

    Raises:
        WireError: names the field that is wrong.
    """
    fields = Fields.decode(raw, MAX_MESSAGE)
    kind = header(fields)
    if kind == "request":
        return Request.from_fields(fields)
    name = fields.data("id", ID_BYTES, low=ID_BYTES)
    if kind in ENDINGS:
        field = fields.text("field", MAX_FIELD_BYTES)
        message: Cancel | Ended = Ended(name, kind, field, fields.text("reason", MAX_REASON_BYTES))
    elif kind == "cancel":
        message = Cancel(name)
    else:
        raise fields.error("kind", f"unknown: {kind!r}")
    fields.end()
    return message


def peek_id(raw: bytes) -> bytes | None:
    """The request id of a message that is otherwise malformed, where it has one."""
    try:
        return Fields.decode(raw, MAX_MESSAGE).data("id", ID_BYTES, low=ID_BYTES)
    except WireError:
        return None


def _cut(text: str, limit: int) -> str:
    return text.encode(errors="replace")[:limit].decode(errors="ignore")
