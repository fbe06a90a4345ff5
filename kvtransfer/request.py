"""What a decoder asks of a prefiller.

Every message of the protocol is one msgpack map with text keys, at most `MAX_MESSAGE` bytes, that
begins with ``v`` (version, 1) and ``kind``. A request has exactly these fields more:

===========  ========  =========================================================================
field        type      what
===========  ========  =========================================================================
id           bin(16)   random: the request's name in every later message
model        str       fingerprint of model and weights, at most 256 bytes
layout       map       ``layers``, ``kv_heads``, ``head_dim``, ``page_tokens`` (int), ``dtype``
                       (str), ``joined`` (bool): see `KvLayout`
decoder      bin       address that answers go to
kv           bin       descriptor of the decoder's KV region, for this prefiller
capacity     int       pages of that region
pages        bin       pages to fill in token order, int32 little-endian, no two alike
counter      int       id of the decoder's counter, 28 bits; every range adds one
tail         bin       descriptor of the decoder's tail region; empty: no tail
tail_offset  int       where in it the tail goes
tail_bytes   int       length of the tail; 0 exactly where there is none
prompt       bin       token ids, int32 little-endian; empty where ``payload`` says it all
payload      bin       the application's own
budget_ms    int       how long the prefiller may take, from when it gets the request
===========  ========  =========================================================================

The other kinds are in `kvtransfer._answers`.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from fabric import Address, Descriptor, InvalidArgument, WireError

from ._fields import Fields
from .layout import BOUNDS, MAX_CAPACITY, KvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")

VERSION = 1

#: Bounds of a request. The fabric carries messages of at most 64 KiB.
MAX_MESSAGE = 65536
ID_BYTES = 16
MAX_MODEL_BYTES = 256
MAX_ADDRESS_BYTES = 16384
MAX_PAGES = 12288
MAX_PROMPT = 12288
MAX_PAYLOAD = 49152
MAX_TAIL_BYTES = 1 << 30
MAX_BUDGET_MS = 24 * 3600 * 1000
MAX_COUNTER_ID = (1 << 28) - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that a prefiller needs to fill a decoder's pages.

    Attributes:
        id: 16 random bytes, the request's name in every later message.
        model: fingerprint of the model and its weights, compared as text.
        layout: how both sides' pages lie; they must agree.
        decoder: where answers go.
        kv: the decoder's KV region.
        capacity: pages of that region.
        pages: the pages to fill, in token order, each at most once.
        counter: id of the decoder's counter; every range adds one to it.
        tail: the decoder's tail region, or None without a tail.
        tail_offset, tail_bytes: where in it the tail goes. Zero bytes: no tail.
        prompt: token ids, or empty where `payload` says what to compute.
        payload: opaque to kvtransfer.
        budget_ms: how long the prefiller may take, from when it gets the request. A duration,
            because the clocks of two machines have nothing in common.
    """

    id: bytes
    model: str
    layout: KvLayout
    decoder: Address
    kv: Descriptor
    capacity: int
    pages: tuple[int, ...]
    counter: int
    tail: Descriptor | None
    tail_offset: int
    tail_bytes: int
    prompt: tuple[int, ...]
    payload: bytes
    budget_ms: int

    def to_bytes(self) -> bytes:
        """The message.

        Raises:
            InvalidArgument: a field is out of its bounds, or all of them together are larger
                than a message may be.
        """
        message = {
            "v": VERSION,
            "kind": "request",
            "id": self.id,
            "model": self.model,
            "layout": dataclasses.asdict(self.layout),
            "decoder": bytes(self.decoder),
            "kv": bytes(self.kv),
            "capacity": self.capacity,
            "pages": _packed("pages", self.pages),
            "counter": self.counter,
            "tail": b"" if self.tail is None else bytes(self.tail),
            "tail_offset": self.tail_offset,
            "tail_bytes": self.tail_bytes,
            "prompt": _packed("prompt", self.prompt),
            "payload": self.payload,
            "budget_ms": self.budget_ms,
        }
        try:
            raw: bytes = msgpack.packb(message)
            Request.from_bytes(raw)  # what we send passes the receiver's check
        except (WireError, OverflowError) as error:
            raise InvalidArgument(str(error)) from error
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> Request:
        """Read and check a whole message.

        Raises:
            WireError: names the field that is wrong.
        """
        fields = Fields.decode(raw, MAX_MESSAGE)
        kind = header(fields)
        if kind != "request":
            raise WireError(f"kind: a request was expected, not {kind!r}")
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Fields) -> Request:
        """Check the fields that follow the header of a message of the kind "request".

        Raises:
            WireError: names the field that is wrong.
        """
        request = cls(
            id=fields.data("id", ID_BYTES, low=ID_BYTES),
            model=fields.text("model", MAX_MODEL_BYTES),
            layout=_layout(fields.nested("layout")),
            decoder=_parsed(fields, "decoder", Address.from_bytes),
            kv=_parsed(fields, "kv", Descriptor.from_bytes),
            capacity=fields.integer("capacity", 1, MAX_CAPACITY),
            pages=_unpacked(fields, "pages", MAX_PAGES),
            counter=fields.integer("counter", 0, MAX_COUNTER_ID),
            tail=_tail(fields),
            tail_offset=fields.integer("tail_offset", 0, (1 << 63) - 1),
            tail_bytes=fields.integer("tail_bytes", 0, MAX_TAIL_BYTES),
            prompt=_unpacked(fields, "prompt", MAX_PROMPT),
            payload=fields.data("payload", MAX_PAYLOAD),
            budget_ms=fields.integer("budget_ms", 1, MAX_BUDGET_MS),
        )
        fields.end()
        request._check_pages()
        request._check_tail()
        request._check_owner()
        return request

    def _check_pages(self) -> None:
        if self.layout.parts * self.capacity > MAX_CAPACITY:
            raise WireError(f"capacity: {self.capacity} pages are more than a region can have")
        if not self.pages:
            raise WireError("pages: none")
        if not (min(self.pages) >= 0 and max(self.pages) < self.capacity):
            raise WireError(f"pages: an index is outside the region's {self.capacity} pages")
        if len(set(self.pages)) != len(self.pages):
            raise WireError("pages: a page is listed twice")
        if self.layout.region_bytes(self.capacity) > self.kv.nbytes:
            raise WireError(
                f"kv: {self.capacity} pages need {self.layout.region_bytes(self.capacity)} "
                f"bytes, the descriptor has {self.kv.nbytes}"
            )

    def _check_tail(self) -> None:
        if self.tail is None:
            if self.tail_bytes or self.tail_offset:
                raise WireError("tail: missing, but a tail is asked for")
        elif not self.tail_bytes:
            raise WireError("tail_bytes: zero, but there is a tail descriptor")
        elif self.tail_offset + self.tail_bytes > self.tail.nbytes:
            raise WireError(
                f"tail_offset: {self.tail_bytes} bytes at {self.tail_offset} are outside the "
                f"descriptor's {self.tail.nbytes}"
            )

    def _check_owner(self) -> None:
        for name, descriptor in (("kv", self.kv), ("tail", self.tail)):
            if descriptor is not None and descriptor.address != self.decoder:
                raise WireError(f"{name}: memory of another engine than the decoder's")


def header(fields: Fields) -> str:
    """Take the version and the kind that every message starts with.

    Raises:
        WireError: another version.
    """
    version = fields.integer("v", 0, (1 << 31) - 1)
    if version != VERSION:
        raise WireError(f"v: version {version} is not known here, only {VERSION}")
    return fields.text("kind", 32)


def _layout(fields: Fields) -> KvLayout:
    values: dict[str, Any] = {name: fields.integer(name, 1, high) for name, high in BOUNDS.items()}
    values["dtype"] = fields.text("dtype", 32)
    values["joined"] = fields.flag("joined")
    fields.end()
    try:
        return KvLayout(**values)
    except InvalidArgument as error:
        raise WireError(f"layout.{error}") from error


def _tail(fields: Fields) -> Descriptor | None:
    raw = fields.data("tail", MAX_ADDRESS_BYTES)
    return _parse("tail", raw, Descriptor.from_bytes) if raw else None


def _parsed(fields: Fields, name: str, parse: Callable[[bytes], _T]) -> _T:
    return _parse(name, fields.data(name, MAX_ADDRESS_BYTES), parse)


def _parse(name: str, raw: bytes, parse: Callable[[bytes], _T]) -> _T:
    try:
        return parse(raw)
    except (WireError, InvalidArgument) as error:
        raise WireError(f"{name}: {error}") from error


def _packed(name: str, values: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}i", *values)
    except struct.error as error:
        raise InvalidArgument(f"{name}: not 32-bit integers: {error}") from error


def _unpacked(fields: Fields, name: str, limit: int) -> tuple[int, ...]:
    raw = fields.data(name, 4 * limit)
    if len(raw) % 4:
        raise WireError(f"{name}: {len(raw)} bytes are not whole 32-bit numbers")
    return struct.unpack(f"<{len(raw) // 4}i", raw)
