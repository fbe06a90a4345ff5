"""The wire format, written a second time: from ARCHITECTURE.md alone, with nothing but struct.

Shares no code with the engine, so that the two can contradict each other. Everything that may
change is in the tables at the top.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Values = dict[str, Any]


class BadBytes(Exception):
    """Bytes that the documents do not allow."""


class Layout:
    """Packed little-endian fields, as text: ``name:code``, codes of struct; ``-`` is padding."""

    def __init__(self, text: str) -> None:
        pairs = [item.split(":") for item in text.split()]
        self.names = [name for name, _ in pairs if name != "-"]
        self.codes = struct.Struct("<" + "".join(code for _, code in pairs))
        self.size = self.codes.size

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Return the fields as bytes."""
        return self.codes.pack(*(values[name] for name in self.names))

    def unpack(self, data: bytes, at: int = 0) -> Values:
        """Return the fields that begin at `at`."""
        if len(data) - at < self.size:
            raise BadBytes(f"{len(data) - at} bytes where {self.size} are needed")
        return dict(zip(self.names, self.codes.unpack_from(data, at), strict=True))


FRAME_MAGIC, DATAGRAM_MAGIC, VERSION = 0xFAB1, 0xFAB3, 1
FRAME_MAX, FRAGMENT_MAX, DATAGRAMS_MAX = 4352, 4096, 32
KIND_VERBS = 2
MAC_BYTES = 32
RANGE_IDS = 28  # an immediate is (pieces - 1) << 28 | id

HEADER = Layout("magic:H version:B type:B length:I session:Q")
LANE = Layout("from_nic:I to_nic:I length:I speed:I doorbell_address:Q doorbell_key:Q blob:128s")
BLOB = Layout(
    "version:B link:B mtu:B -:x lid:H -:2x gid:16s ud_qpn:I ud_qkey:I token:Q"
    " write_qpn:I write_psn:I frame_qpn:I frame_psn:I -:4x"
)
DATAGRAM = Layout(
    "magic:H version:B -:x serial:I source:Q token:Q number:H count:H length:H chunk:H"
)
HELLO = Layout(
    "source:16s target:16s session:Q answers:Q attempt:Q kind:I nics:I lane_count:I fragments:I"
    " contact:I peer_timeout:Q fence:Q nonce:16s cookie:16s label:64s"
)

FRAMES: dict[str, tuple[int, Layout, str]] = {
    "HELLO": (1, HELLO, "hello"),
    "CHALLENGE": (2, Layout("target:16s session:Q cookie:16s"), ""),
    "WELCOME": (3, HELLO, "hello"),
    "READY": (4, Layout(""), ""),
    "REFUSE": (5, Layout("refuser:16s session:Q code:i"), "text"),
    "BYE": (6, Layout("code:i"), "text"),
    "PING": (7, Layout("stamp:Q"), ""),
    "PONG": (8, Layout("stamp:Q"), ""),
    "MESSAGE": (9, Layout("number:I total:I offset:I"), "bytes"),
    "ACK": (10, Layout("held:I limit:I"), ""),
    "VOID": (11, Layout("number:I"), "ids"),
    "VOIDED": (12, Layout("number:I"), ""),
    "GRANT_REQ": (13, Layout("region:Q secret:Q number:I"), ""),
    "GRANT": (14, Layout("region:Q secret:Q number:I code:i pulled:I length:Q keys:I"), ""),
    "QUIESCE": (15, Layout("region:Q number:I"), ""),
    "QUIESCED": (16, Layout("region:Q number:I"), ""),
    "LANE_DOWN": (17, Layout("lane:I serial:I"), ""),
    "LANE_OPEN": (18, Layout("lane:I serial:I length:I blob:128s"), ""),
    "LANE_OPENED": (19, Layout("lane:I serial:I length:I blob:128s"), ""),
    "LANE_READY": (20, Layout("lane:I serial:I"), ""),
    "LANE_WANTED": (21, Layout("lane:I serial:I"), ""),
    "LANE_PROBE": (22, Layout("lane:I serial:I"), ""),
}
"""Name: type, fields of fixed size, and what follows them."""
KIND_NAMES = {number: name for name, (number, _, _) in FRAMES.items()}


# ---- frames ----


@dataclass
class Frame:
    """One control frame, taken apart."""

    kind: str
    session: int
    body: Values
    data: bytes = field(repr=False, default=b"")


def hello_body(values: Values) -> bytes:
    """Return the body of HELLO or WELCOME but for its mac; `lane_count` may lie."""
    lanes = values["lanes"]
    return HELLO.pack({"lane_count": len(lanes), **values}) + b"".join(map(LANE.pack, lanes))


def sign(kind: str, body: bytes, secret: bytes) -> bytes:
    """Return the mac of a hello, zeros without a secret."""
    if not secret:
        return bytes(MAC_BYTES)
    return hmac.digest(secret, f"fabric {kind.lower()} 1".encode() + body, hashlib.sha256)


def pack_tail(tail: str, values: Values) -> bytes:
    """Return what follows the fields of fixed size."""
    if tail == "text":
        text: bytes = values["text"].encode()
        return struct.pack("<H", len(text)) + text
    if tail == "ids":
        return struct.pack(f"<I{len(values['ids'])}I", len(values["ids"]), *values["ids"])
    return bytes(values["bytes"]) if tail == "bytes" else b""


def pack_frame(
    kind: str,
    session: int,
    values: Values,
    secret: bytes = b"",
    header: Mapping[str, int] | None = None,
) -> bytes:
    """Return a frame; `header` overrides fields of its header."""
    number, layout, tail = FRAMES[kind]
    if tail == "hello":
        body = hello_body(values)
        body += values.get("mac") or sign(kind, body, secret)
    else:
        body = layout.pack(values) + pack_tail(tail, values)
    head = {
        "magic": FRAME_MAGIC,
        "version": VERSION,
        "type": number,
        "length": HEADER.size + len(body),
        "session": session,
        **(header or {}),
    }
    return HEADER.pack(head) + body


def unpack_hello(data: bytes, at: int) -> tuple[Values, int]:
    """Return a hello's fields, lanes among them, and where it ends."""
    values = HELLO.unpack(data, at)
    at += HELLO.size
    values["lanes"] = []
    for _ in range(values["lane_count"]):
        values["lanes"].append(LANE.unpack(data, at))
        at += LANE.size
    values["mac"] = data[at : at + MAC_BYTES]
    return values, at + MAC_BYTES


def unpack_frame(data: bytes) -> Frame:
    """Take a frame apart; whatever the documents do not allow is an error."""
    head = HEADER.unpack(data)
    if head["magic"] != FRAME_MAGIC or head["version"] != VERSION:
        raise BadBytes(f"magic {head['magic']:#x}, version {head['version']}")
    if head["length"] != len(data) or len(data) > FRAME_MAX:
        raise BadBytes(f"a frame of {len(data)} bytes says that it has {head['length']}")
    kind = KIND_NAMES.get(head["type"])
    if kind is None:
        raise BadBytes(f"frame type {head['type']}")
    _, layout, tail = FRAMES[kind]
    if tail == "hello":
        values, end = unpack_hello(data, HEADER.size)
    else:
        values, end = layout.unpack(data, HEADER.size), HEADER.size + layout.size
    if tail == "text":
        (size,) = struct.unpack_from("<H", data, end)
        values["text"] = data[end + 2 : end + 2 + size].decode()
        end += 2 + size
    elif tail == "ids":
        (count,) = struct.unpack_from("<I", data, end)
        values["ids"] = list(struct.unpack_from(f"<{count}I", data, end + 4))
        end += 4 + 4 * count
    elif tail == "bytes":
        values["bytes"], end = data[end:], len(data)
    if end != len(data):
        raise BadBytes(f"{kind} of {len(data)} bytes; its fields end at {end}")
    return Frame(kind, head["session"], values, data)


def mac_holds(frame: Frame, secret: bytes) -> bool:
    """Return whether a HELLO or WELCOME was signed with this secret (or, without one, not)."""
    signed = frame.data[HEADER.size : -MAC_BYTES]
    return hmac.compare_digest(frame.body["mac"], sign(frame.kind, signed, secret))


# ---- blobs and datagrams ----


def unpack_blob(data: bytes) -> Values:
    """Take the address of a NIC or lane apart."""
    values = BLOB.unpack(data)
    if len(data) != BLOB.size or BLOB.pack(values) != data or values["version"] != VERSION:
        raise BadBytes(f"not a NIC's address: {data.hex()}")
    return values


def lane_blob(lane: Values) -> Values:
    """Return the blob of a lane entry of a hello, taken apart."""
    return unpack_blob(lane["blob"][: lane["length"]])


def cut(frame: bytes, serial: int, source: int, token: int, chunk: int) -> list[bytes]:
    """Cut a frame into datagrams that carry `chunk` bytes each."""
    count = -(-len(frame) // chunk)
    head = {"magic": DATAGRAM_MAGIC, "version": VERSION, "serial": serial, "source": source}
    head |= {"token": token, "count": count, "length": len(frame), "chunk": chunk}
    return [
        DATAGRAM.pack({**head, "number": i}) + frame[i * chunk : (i + 1) * chunk]
        for i in range(count)
    ]


class Joiner:
    """Puts datagrams together."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int, int], dict[int, bytes]] = {}

    def take(self, data: bytes) -> tuple[int, bytes] | None:
        """Take a datagram; returns (token, frame) when it was the last that was missing."""
        head = DATAGRAM.unpack(data)
        rest, number, count = data[DATAGRAM.size :], head["number"], head["count"]
        if head["magic"] != DATAGRAM_MAGIC or head["version"] != VERSION or data[3]:
            raise BadBytes(f"datagram header {data[: DATAGRAM.size].hex()}")
        last = head["length"] - (count - 1) * head["chunk"]
        if not number < count <= DATAGRAMS_MAX or len(rest) != (
            last if number == count - 1 else head["chunk"]
        ):
            raise BadBytes(f"datagram {number} of {count} with {len(rest)} bytes")
        key = (head["source"], head["serial"], head["token"])
        parts = self.parts.setdefault(key, {})
        parts[number] = rest
        if len(parts) < count:
            return None
        del self.parts[key]
        return head["token"], b"".join(parts[i] for i in range(count))


# ---- msgpack, as much of it as addresses need ----


def pack_value(value: Any) -> bytes:
    """Return a value as msgpack, in the shortest form."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        for limit, form in ((1 << 7, ">B"), (1 << 8, ">xB"), (1 << 16, ">xH"), (1 << 32, ">xI")):
            if value < limit:
                return put_tag({">xB": 0xCC, ">xH": 0xCD, ">xI": 0xCE}.get(form), form, value)
        return put_tag(0xCF, ">xQ", value)
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else bytes([0xD9, len(text)])) + text
    if isinstance(value, bytes):
        return bytes([0xC4, len(value)]) + value
    head = bytes([0x90 | len(value)]) if len(value) < 16 else struct.pack(">BH", 0xDC, len(value))
    return head + b"".join(map(pack_value, value))


def put_tag(tag: int | None, form: str, value: int) -> bytes:
    """Return an integer behind its tag, which is the padding of its form."""
    data = struct.pack(form, value)
    return data if tag is None else bytes([tag]) + data[1:]


SCALARS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
SIZES = {0xC4: ">B", 0xC5: ">H", 0xD9: ">B", 0xDA: ">H", 0xDC: ">H"}


def unpack_value(data: bytes, at: int = 0) -> tuple[Any, int]:
    """Return one msgpack value and where it ends."""
    tag = data[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag in (0xC2, 0xC3):
        return tag == 0xC3, at
    if form := SCALARS.get(tag):
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if form := SIZES.get(tag):
        size = struct.unpack_from(form, data, at)[0]
        at += struct.calcsize(form)
    elif tag & 0xF0 == 0x90:
        size = tag & 0x0F
    elif tag & 0xE0 == 0xA0:
        size = tag & 0x1F
    else:
        raise BadBytes(f"msgpack tag {tag:#x}")
    if tag == 0xDC or tag & 0xF0 == 0x90:
        items = []
        for _ in range(size):
            item, at = unpack_value(data, at)
            items.append(item)
        return items, at
    raw = data[at : at + size]
    return (raw if tag in (0xC4, 0xC5) else raw.decode()), at + size


# ---- addresses and descriptors ----


def whole_value(data: bytes, magic: str, length: int) -> list[Any]:
    """Read an array that begins with a magic text and version 1, with nothing behind it."""
    value, end = unpack_value(data)
    if end != len(data) or value[:2] != [magic, VERSION] or len(value) != length:
        raise BadBytes(f"not a {magic}: {value}")
    return list(value)


def read_address(data: bytes | str) -> Values:
    """Take the bytes or the text of an engine's address apart."""
    if isinstance(data, str):
        text = data.removeprefix("fab1.")
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    _, _, engine, label, nics = whole_value(data, "fabric-address", 5)
    names = ("kind", "blob", "doorbell", "max_write", "ordered")
    return {
        "id": engine,
        "label": label,
        "nics": [dict(zip(names, nic, strict=True)) for nic in nics],
    }


def write_address(engine: bytes, label: str, nics: list[Values]) -> bytes:
    """Return an address as bytes."""
    rows = [
        [nic["kind"], nic["blob"], nic["doorbell"], nic["max_write"], nic["ordered"]]
        for nic in nics
    ]
    return pack_value(["fabric-address", VERSION, engine, label, rows])


def read_descriptor(data: bytes) -> Values:
    """Take an engine's descriptor apart."""
    _, _, address, *rest = whole_value(data, "fabric-descriptor", 10)
    names = ("region", "offset", "length", "memory", "device", "keys", "secret")
    return {"address": read_address(pack_value(address)), **dict(zip(names, rest, strict=True))}


def write_descriptor(address: bytes, values: Values) -> bytes:
    """Return a descriptor of host memory as bytes."""
    nested, _ = unpack_value(address)
    return pack_value(
        [
            *("fabric-descriptor", VERSION, nested, values["region"], values["offset"]),
            *(values["length"], 0, 0, values["keys"], values["secret"]),
        ]
    )


# ---- for people and for JSON ----


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: bytes as hexadecimal text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def pieces_of(length: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of `count` pieces of about one size."""
    for i in range(count):
        yield length * i // count, length * (i + 1) // count
