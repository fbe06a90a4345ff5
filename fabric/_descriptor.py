"""Descriptors: what a peer needs to write to a region.

A descriptor is this msgpack array, at most `MAX_DESCRIPTOR_BYTES` long:

====  ======  ===========================================================================
item  type    what
====  ======  ===========================================================================
0     str     ``"fabric-descriptor"``
1     int     version, 1
2     array   address of the region's engine, see `fabric._peer`
3     int     number of the region in its engine, u64
4     int     offset of this descriptor in the region, u64
5     int     length of this descriptor in bytes, u64; offset + length <= 2**63
6     int     kind of memory: 0 host, 1 CUDA
7     int     device number, 0 to 65535; 0 for host memory
8     array   one ``[addr, rkey]``, both u64, for each NIC of the address, in its order
9     int     the region's secret, u64: the engine grants the region to who shows it
====  ======  ===========================================================================
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from typing import TYPE_CHECKING, Any, SupportsIndex

from . import _wire
from ._errors import InvalidArgument, WireError, check
from ._native import ffi, lib
from ._peer import Address, decode, fields_of

if TYPE_CHECKING:
    from ._core import Core

MAX_DESCRIPTOR_BYTES = 16384
MAGIC = "fabric-descriptor"
VERSION = 1
LENGTH_MAX = 1 << 63
DEVICE_MAX = 65535
MEMORY_KINDS = {lib.FAB_MEM_HOST: "host", lib.FAB_MEM_CUDA: "cuda"}


class _Import:
    """A descriptor that one engine has imported; released when it is dropped."""

    __slots__ = ("core", "handle")

    def __init__(self, core: Core, handle: int) -> None:
        self.core = weakref.ref(core)
        self.handle = handle

    def __del__(self, release: Any = lib.fab_remote_release) -> None:
        core = self.core()
        if core is not None and not core.forked:
            release(core.ptr, self.handle)


class Descriptor:
    """The right to write to a region, or to a part of it. Immutable; bytes to send to others.

    ``d[a:b]`` describes a part: bytes `a` to `b`. That protects the rest of the region from
    mistakes, not from a hostile peer.

    Attributes:
        address: the engine that owns the region.
        nbytes: length, also ``len(d)``.
        kind: ``"host"`` or ``"cuda"``.
        device: CUDA device number; 0 for host memory.
    """

    __slots__ = (
        "_bytes",
        "_imports",
        "_keys",
        "_kind",
        "_last",
        "_offset",
        "_region",
        "_secret",
        "address",
        "device",
        "nbytes",
    )

    def __init__(
        self,
        address: Address,
        region: int,
        secret: int,
        offset: int,
        nbytes: int,
        kind: int,
        device: int,
        keys: tuple[tuple[int, int], ...],
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self.device = device
        self._region = region
        self._secret = secret
        self._offset = offset
        self._kind = kind
        self._keys = keys
        self._bytes: bytes | None = None
        self._imports: list[_Import] = []
        self._last: tuple[Any, int] = (None, 0)  # a core's `ptr`, and the handle in that engine

    @property
    def kind(self) -> str:
        """The kind of memory: ``"host"`` or ``"cuda"``."""
        return MEMORY_KINDS[self._kind]

    def _identity(self) -> tuple[Any, ...]:
        return self.address.id, self._region, self._secret, self._offset, self.nbytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Descriptor):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __len__(self) -> int:
        return self.nbytes

    def __bool__(self) -> bool:
        return True  # also one of zero bytes: it is not nothing

    def __repr__(self) -> str:
        place = self.kind if self._kind == lib.FAB_MEM_HOST else f"cuda:{self.device}"
        return (
            f"<Descriptor {self.nbytes} bytes at {self._offset} of region {self._region:#x}"
            f" [{place}] of {self.address.label or '?'} {self.address.id.hex()[:8]}>"
        )

    def __getitem__(self, part: slice) -> Descriptor:
        """Return the descriptor of a part, given as a slice of bytes.

        Raises:
            InvalidArgument: not a slice, or one with a step, or one that reaches outside.
        """
        if not isinstance(part, slice):
            raise InvalidArgument("a descriptor takes slices: d[a:b]")
        if part.step not in (None, 1):
            raise InvalidArgument(f"d[a:b:step]: there are no steps, not {part.step!r}")
        begin = self._bound(part.start, 0)
        end = self._bound(part.stop, self.nbytes)
        if end < begin:
            raise InvalidArgument(f"d[{begin}:{end}]: the end lies before the beginning")
        return Descriptor(
            self.address,
            self._region,
            self._secret,
            self._offset + begin,
            end - begin,
            self._kind,
            self.device,
            self._keys,
        )

    def _bound(self, value: SupportsIndex | None, default: int) -> int:
        if value is None:
            return default
        try:
            number = operator.index(value)
        except TypeError:
            raise InvalidArgument(f"d[a:b]: an integer is needed, not {value!r}") from None
        place = number + self.nbytes if number < 0 else number
        # Not clipped as Python's sequences do: who asks for bytes that are not there is mistaken.
        if not 0 <= place <= self.nbytes:
            raise InvalidArgument(f"d[a:b]: {number} is outside of {self.nbytes} bytes")
        return place

    def __bytes__(self) -> bytes:
        if self._bytes is None:
            self._bytes = _wire.pack(
                [
                    MAGIC,
                    VERSION,
                    fields_of(self.address),
                    self._region,
                    self._offset,
                    self.nbytes,
                    self._kind,
                    self.device,
                    [list(key) for key in self._keys],
                    self._secret,
                ]
            )
        return self._bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return Descriptor.from_bytes, (bytes(self),)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Descriptor:
        """Decode what ``bytes(descriptor)`` made.

        Raises:
            WireError: malformed; the text names the field.
        """
        name = "descriptor"
        items = _wire.unpack(name, data, MAX_DESCRIPTOR_BYTES)
        items = _wire.versioned(name, items, MAGIC, VERSION, 10)
        address = decode(items[2], f"{name}.address")
        offset = _wire.integer(f"{name}.offset", items[4], 0, LENGTH_MAX)
        length = _wire.integer(f"{name}.length", items[5], 0, LENGTH_MAX - offset)
        kind = _wire.integer(f"{name}.kind", items[6], 0, 255)
        if kind not in MEMORY_KINDS:
            raise WireError(f"{name}.kind: {kind} is unknown")
        device_max = DEVICE_MAX if kind == lib.FAB_MEM_CUDA else 0
        count = len(address.nics)
        keys = _wire.array(f"{name}.keys", items[8], count, count)
        return cls(
            address,
            _wire.integer(f"{name}.region", items[3]),
            _wire.integer(f"{name}.secret", items[9]),
            offset,
            length,
            kind,
            _wire.integer(f"{name}.device", items[7], 0, device_max),
            tuple(_decode_key(f"{name}.keys[{i}]", key) for i, key in enumerate(keys)),
        )

    def _handle_in(self, core: Core) -> int:
        """Return the handle of this descriptor in an engine, which imports it on first use.

        `_last` has the engine that asked last: a look at it takes a third of this call's time. It
        is never stale: what a living engine imported stays in `_imports`.
        """
        for imported in tuple(self._imports):
            if imported.core() is core:
                self._last = core.ptr, imported.handle
                return imported.handle
        with core.lock:
            for imported in tuple(self._imports):  # another thread was faster
                if imported.core() is core:
                    return imported.handle
            imported = _Import(core, self._import_into(core))
            self._imports.append(imported)  # one step: engines share no lock
        for other in tuple(self._imports):
            if other.core() is None:
                with contextlib.suppress(ValueError):
                    self._imports.remove(other)
        self._last = core.ptr, imported.handle
        return imported.handle

    def _import_into(self, core: Core) -> int:
        keys = ffi.new("fab_key[]", [{"addr": addr, "rkey": rkey} for addr, rkey in self._keys])
        struct = ffi.new(
            "fab_descriptor *",
            {
                "region": self._region,
                "secret": self._secret,
                "offset": self._offset,
                "length": self.nbytes,
                "kind": self._kind,
                "device": self.device,
                "key_count": len(self._keys),
                "keys": keys,
            },
        )

        def add() -> int:
            return check(lib.fab_remote_add(core.ptr, core.peer(self.address), struct))

        return core.with_peers((self.address,), add)


def _decode_key(name: str, value: Any) -> tuple[int, int]:
    pair = _wire.array(name, value, 2, 2)
    return _wire.integer(f"{name}.addr", pair[0]), _wire.integer(f"{name}.rkey", pair[1])
