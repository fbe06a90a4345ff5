"""Who one talks to: peers, and the addresses that name them on the wire.

An address is this msgpack array, at most `MAX_ADDRESS_BYTES` long:

====  =======  ==========================================================================
item  type     what
====  =======  ==========================================================================
0     str      ``"fabric-address"``
1     int      version, 1
2     bin(16)  engine id: random, new at every start of an engine
3     str      label, at most 63 bytes of UTF-8 that print
4     array    1 to 32 NICs, each ``[kind, blob, doorbell, max_write, ordered]``
====  =======  ==========================================================================

``kind`` int, one of FAB_KIND_*; ``blob`` bin of at most 128 bytes, the provider's own address of
the NIC; ``doorbell`` ``[addr, rkey]``, both unsigned 64-bit; ``max_write`` int, 1 to 2**64 - 1,
bytes of one work request; ``ordered`` bool, whether a lane keeps order.

As text it is ``fab1.`` and the bytes in URL-safe base64 without padding.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, NamedTuple

from . import _wire
from ._errors import WireError
from ._native import ffi, lib

ID_BYTES: int = lib.FAB_ENGINE_ID_BYTES
MAX_ADDRESS_BYTES = 8192
TEXT_PREFIX = "fab1."
MAGIC = "fabric-address"
VERSION = 1

KINDS = {
    lib.FAB_KIND_LOCAL: "local",
    lib.FAB_KIND_VERBS: "verbs",
    lib.FAB_KIND_OFI_TCP: "tcp",
    lib.FAB_KIND_OFI_EFA: "efa",
    lib.FAB_KIND_OFI_RXM: "rxm",
    lib.FAB_KIND_SIM: "sim",
}
"""Names of the kinds of provider."""


class Peer:
    """An engine, ours or another. Equal to everything that names the same incarnation of it.

    Messages can come from an engine whose address nobody gave us; a `Peer` is then all that is
    known, and can be answered while the engine that received it is open.

    Attributes:
        id: 16 bytes, random at every start.
        label: for humans; the engine's own words, so not to be trusted.
    """

    __slots__ = ("id", "label")

    def __init__(self, id: bytes, label: str) -> None:  # noqa: A002 - the field's word
        self.id = id
        self.label = label

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Peer) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label or '?'} {self.id.hex()[:8]}>"


class NicAddress(NamedTuple):
    """One NIC of an engine, as far as peers need it."""

    kind: int
    blob: bytes
    doorbell_addr: int
    doorbell_rkey: int
    max_write: int
    ordered: bool


class Address(Peer):
    """How an engine is reached: bytes to send to others. Immutable.

    ``bytes(address)`` and `from_bytes` go over a wire; ``str(address)`` and `parse` over a command
    line. An address names one incarnation: an engine that restarted has another.

    Attributes:
        nics: the engine's NICs.
    """

    __slots__ = ("_bytes", "_c", "nics")

    def __init__(self, id: bytes, label: str, nics: tuple[NicAddress, ...]) -> None:  # noqa: A002
        super().__init__(id, label)
        self.nics = nics
        self._bytes = _wire.pack(fields_of(self))
        self._c: tuple[Any, ...] | None = None

    def __bytes__(self) -> bytes:
        return self._bytes

    def __str__(self) -> str:
        return TEXT_PREFIX + base64.urlsafe_b64encode(self._bytes).rstrip(b"=").decode("ascii")

    def __repr__(self) -> str:
        kinds = ",".join(sorted({KINDS[nic.kind] for nic in self.nics}))
        return f"<Address {self.label or '?'} {self.id.hex()[:8]} {kinds}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Address.from_bytes, (self._bytes,)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Address:
        """Decode what ``bytes(address)`` made.

        Raises:
            WireError: malformed; the text names the field.
        """
        return decode(_wire.unpack("address", data, MAX_ADDRESS_BYTES), "address")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Decode what ``str(address)`` made.

        Raises:
            WireError: malformed; the text names the field.
        """
        if not isinstance(text, str) or not text.startswith(TEXT_PREFIX):
            raise WireError(f"address: the text does not begin with {TEXT_PREFIX!r}")
        body = text[len(TEXT_PREFIX) :]
        if len(body) > MAX_ADDRESS_BYTES * 4 // 3 + 4:
            raise WireError(f"address: more than {MAX_ADDRESS_BYTES} bytes")
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise WireError("address: not URL-safe base64") from None
        return cls.from_bytes(data)

    def as_c(self) -> Any:
        """Return a pointer to a fab_peer_address that lives as long as this object."""
        if self._c is None:
            nics = ffi.new("fab_nic_info[]", len(self.nics))
            for out, nic in zip(nics, self.nics, strict=True):
                out.kind = nic.kind
                out.blob = nic.blob
                out.blob_len = len(nic.blob)
                out.doorbell.addr = nic.doorbell_addr
                out.doorbell.rkey = nic.doorbell_rkey
                out.max_write = nic.max_write
                out.ordered = nic.ordered
            label = ffi.new("char[]", self.label.encode())
            struct = ffi.new(
                "fab_peer_address *",
                {"id": self.id, "label": label, "nic_count": len(self.nics), "nics": nics},
            )
            self._c = (struct, nics, label)
        return self._c[0]


def fields_of(address: Address) -> list[Any]:
    """Return what `decode` takes: the array of the wire format."""
    nics = [
        [nic.kind, nic.blob, [nic.doorbell_addr, nic.doorbell_rkey], nic.max_write, nic.ordered]
        for nic in address.nics
    ]
    return [MAGIC, VERSION, address.id, address.label, nics]


def decode(value: Any, name: str) -> Address:
    """Decode an address out of a message; `name` is what its errors begin with.

    Raises:
        WireError: malformed.
    """
    items = _wire.versioned(name, value, MAGIC, VERSION, 5)
    engine = _wire.binary(f"{name}.id", items[2], ID_BYTES, ID_BYTES)
    if not any(engine):
        raise WireError(f"{name}.id: no engine has the id zero")
    label = _wire.label(f"{name}.label", items[3])
    rows = _wire.array(f"{name}.nics", items[4], 1, lib.FAB_MAX_NICS)
    nics = tuple(_decode_nic(f"{name}.nics[{i}]", row) for i, row in enumerate(rows))
    return Address(engine, label, nics)


def _decode_nic(name: str, value: Any) -> NicAddress:
    row = _wire.array(name, value, 5, 5)
    kind = _wire.integer(f"{name}.kind", row[0], 1, 255)
    if kind not in KINDS:
        raise WireError(f"{name}.kind: {kind} is unknown")
    doorbell = _wire.array(f"{name}.doorbell", row[2], 2, 2)
    return NicAddress(
        kind,
        _wire.binary(f"{name}.blob", row[1], 0, lib.FAB_BLOB_MAX),
        _wire.integer(f"{name}.doorbell.addr", doorbell[0]),
        _wire.integer(f"{name}.doorbell.rkey", doorbell[1]),
        _wire.integer(f"{name}.max_write", row[3], 1),
        _wire.boolean(f"{name}.ordered", row[4]),
    )
