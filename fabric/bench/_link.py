"""The control connection between client and server: msgpack maps over TCP, each with its length."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, TypeVar

import msgpack

from .._errors import FabricError, WireError

VERSION = 1
PORT = 18515
"""Where a server listens by default, as perftest's do."""
MAX_BYTES = 1 << 20
"""Of one map."""
PATIENCE_SECONDS = 60.0
"""How long the other side may take for an answer."""
IDLE_SECONDS = 3600.0
"""How long a client may do something else, such as a baseline, before its server gives it up."""
T = TypeVar("T")


class Link:
    """A connection; each side sends maps with the key ``"is"``, which names what it is."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(PATIENCE_SECONDS)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def waiting(self) -> bool:
        """Return whether something can be read, or the other side is gone."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def patient(self) -> None:
        """Wait for `IDLE_SECONDS` from now on."""
        self._socket.settimeout(IDLE_SECONDS)

    def send(self, kind: str, **fields: Any) -> None:
        """Send a map.

        Raises:
            FabricError: the other side is gone.
        """
        data = msgpack.packb({"is": kind, "v": VERSION, **fields})
        try:
            self._socket.sendall(struct.pack("<I", len(data)) + data)
        except OSError as error:
            raise FabricError(f"the other side is gone: {error}") from None

    def receive(self, *kinds: str) -> dict[str, Any]:
        """Return the next map.

        Raises:
            FabricError: the other side is gone, or has failed.
            WireError: it is of no kind that is expected, or malformed.
        """
        (length,) = struct.unpack("<I", self._read(4))
        if length > MAX_BYTES:
            raise WireError(f"the other side announces {length} bytes; the limit is {MAX_BYTES}")
        try:
            fields = msgpack.unpackb(self._read(length))
            kind, version = fields["is"], fields["v"]
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            raise WireError("the other side does not speak fabric bench") from None
        if version != VERSION:
            raise WireError(f"the other side speaks version {version!r}, this one {VERSION}")
        if kind == "failed":
            raise FabricError(f"the other side failed: {str(fields.get('why'))[:500]}")
        if kind not in kinds:
            raise WireError(
                f"the other side sent {str(kind)[:50]!r}; expected {' or '.join(kinds)}"
            )
        return dict(fields)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        try:
            while len(data) < count:
                part = self._socket.recv(count - len(data))
                if not part:
                    raise FabricError("the other side has closed the connection")
                data += part
        except OSError as error:
            raise FabricError(f"the other side is gone: {error}") from None
        return bytes(data)


def field(message: dict[str, Any], name: str, kind: type[T]) -> T:
    """Return a field of a map.

    Raises:
        WireError: it is missing, or of another type.
    """
    value = message.get(name)
    if type(value) is not kind:
        raise WireError(f"the other side's {name} is {str(value)[:50]!r}, not a {kind.__name__}")
    return value


def dial(host: str, port: int) -> Link:
    """Connect to a server.

    Raises:
        FabricError: nobody answers there.
    """
    try:
        return Link(socket.create_connection((host, port), timeout=PATIENCE_SECONDS))
    except OSError as error:
        raise FabricError(f"no server at {host} port {port}: {error}") from None


def listen(port: int, host: str = "") -> socket.socket:
    """Open the socket that clients connect to; port 0 takes a free one.

    Raises:
        FabricError: the port cannot be had.
    """
    try:
        if host:
            return socket.create_server((host, port))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise FabricError(f"cannot listen on port {port}: {error}; --port names another") from None
