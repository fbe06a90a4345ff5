"""Regions: registered local memory, and how buffers of all kinds become it."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ._descriptor import MEMORY_KINDS, Descriptor
from ._errors import InvalidArgument, check
from ._native import ffi, lib
from ._owner import MappingOwner
from ._peer import Peer
from ._values import integer, needs

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike, NDArray

    from ._core import Core


class MemoryRegion:
    """Registered memory: the source of writes, and through its descriptor their destination.

    Made by `TransferEngine.alloc` and `TransferEngine.register`. ``memoryview(mr)`` shows host
    memory without copying, and so does whatever takes a buffer. Memory from ``alloc`` stays mapped
    as long as the region object or any view of it is alive, also after deregistering or closing
    the engine: it is then plain memory. Likewise the region object keeps alive what was registered.

    Attributes:
        ptr: address of the first byte.
        nbytes: length, also ``len(mr)``.
        kind: ``"host"`` or ``"cuda"``.
        device: CUDA device number; 0 for host memory.
    """

    _core: Core
    _handle: int
    _uses: int
    ptr: int
    nbytes: int
    device: int

    if TYPE_CHECKING:  # what the ctypes array underneath does, see _host_class()

        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __init__(self) -> None:
        raise TypeError("regions are made by TransferEngine.alloc() and TransferEngine.register()")

    def _open(self, core: Core, handle: int, info: Any) -> None:
        self._core = core
        self._handle = handle
        self._uses = 1  # calls of register() that deregister() has not taken back
        self._kind: int = info.kind
        self._keeps: list[Any] = []
        self._descriptor: Descriptor | None = None
        self._aliases: dict[bytes, tuple[int, Descriptor]] = {}
        self.ptr = info.base
        self.nbytes = info.length
        self.device = info.device

    @property
    def kind(self) -> str:
        """The kind of memory: ``"host"`` or ``"cuda"``."""
        return MEMORY_KINDS[self._kind]

    def __len__(self) -> int:
        return self.nbytes

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        place = self.kind if self._kind == lib.FAB_MEM_HOST else f"cuda:{self.device}"
        state = "" if self._handle else ", deregistered"
        return f"<MemoryRegion {self.nbytes} bytes at {self.ptr:#x} [{place}{state}]>"

    @property
    def descriptor(self) -> Descriptor:
        """What any peer needs to write here.

        Raises:
            InvalidArgument: the region is deregistered.
            EngineClosed: its engine is closed.
        """
        if self._descriptor is None or not self._handle or self._core.closed:
            self._descriptor = describe(self._core, self._live_handle())
        return self._descriptor

    def descriptor_for(self, address: Peer) -> Descriptor:
        """Return a descriptor with a key of its own, granted to one peer only.

        That peer can be fenced alone: ``engine.deregister(d)`` takes this descriptor back, and
        the others go on.

        Raises:
            InvalidArgument: not a peer, or the region is deregistered.
            EngineClosed: the engine is closed.
        """
        needs("address", address, Peer)
        handle = self._live_handle()
        with self._core.lock:
            known = self._aliases.get(address.id)
            if known is None:
                engine_id = ffi.from_buffer("uint8_t[]", address.id)
                alias = check(lib.fab_region_alias(self._core.ptr, handle, engine_id))
                known = self._aliases[address.id] = alias, describe(self._core, alias)
        return known[1]

    def numpy(
        self, dtype: DTypeLike = np.uint8, shape: int | Sequence[int] | None = None
    ) -> NDArray[Any]:
        """Return the memory as an array, without copying.

        Args:
            dtype: of the elements.
            shape: of the array, beginning at the first byte; all of the memory by default.

        Raises:
            InvalidArgument: CUDA memory, or a shape that does not fit.
        """
        flat = np.frombuffer(self._host_bytes(), np.uint8)
        item = np.dtype(dtype).itemsize
        array = flat[: self._span(item, shape)].view(dtype)
        return array if shape is None else array.reshape(shape)

    def tensor(
        self, dtype: torch.dtype | None = None, shape: int | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the memory as a CPU tensor, without copying.

        Args:
            dtype: of the elements; ``torch.uint8`` by default.
            shape: of the tensor, beginning at the first byte; all of the memory by default.

        Raises:
            ImportError: torch is not installed.
            InvalidArgument: CUDA memory, or a shape that does not fit.
        """
        import torch

        dtype = torch.uint8 if dtype is None else dtype
        buffer = self._host_bytes()
        nbytes = self._span(dtype.itemsize, shape)
        if nbytes == 0:
            return torch.empty(0 if shape is None else shape, dtype=dtype)
        tensor = torch.frombuffer(buffer, dtype=dtype, count=nbytes // dtype.itemsize)
        return tensor if shape is None else tensor.reshape(shape)

    def _host_bytes(self) -> Any:
        if self._kind != lib.FAB_MEM_HOST:
            raise InvalidArgument(f"{self!r} is not host memory: use the tensor it came from")
        return self

    def _span(self, item: int, shape: int | Sequence[int] | None) -> int:
        """Return how many bytes a view of this shape covers."""
        if shape is None:
            if self.nbytes % item:
                raise InvalidArgument(f"dtype: {self.nbytes} bytes are no multiple of {item}")
            return self.nbytes
        sides = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = item
        for side in sides:
            nbytes *= integer("shape", side)
        if nbytes > self.nbytes:
            raise InvalidArgument(f"shape: {shape} needs {nbytes} of {self.nbytes} bytes")
        return nbytes

    def _usable(self) -> bool:
        """Return whether the core still takes it, also where deregistering it has failed."""
        info = ffi.new("fab_region_info *")
        return bool(lib.fab_region_get_info(self._core.ptr, self._handle, info) == 0)

    def _live_handle(self) -> int:
        self._core.check_open()
        if not self._handle:
            raise InvalidArgument(f"{self!r} is deregistered")
        return self._handle


def describe(core: Core, handle: int) -> Descriptor:
    """Return the descriptor of a whole region."""
    info = region_info(core, handle)
    keys = tuple((info.keys[i].addr, info.keys[i].rkey) for i in range(info.key_count))
    return Descriptor(
        core.address, info.region, info.secret, 0, info.length, info.kind, info.device, keys
    )


def region_info(core: Core, handle: int) -> Any:
    """Return a region's fab_region_info."""
    info = ffi.new("fab_region_info *")
    check(lib.fab_region_get_info(core.ptr, handle, info))
    return info


def new_region(core: Core, handle: int) -> MemoryRegion:
    """Return the object for a region of the C core."""
    info = region_info(core, handle)
    if info.kind == lib.FAB_MEM_HOST:
        mr = _host_class(info.length).from_address(info.base)
    else:
        mr = MemoryRegion.__new__(MemoryRegion)
    region = cast("MemoryRegion", mr)
    region._open(core, handle, info)
    if info.mapped:
        region._keeps.append(MappingOwner(info.base, info.mapped))
    return region


class _Byte(ctypes.Union):
    """A byte whose arrays have the format ``B``; that of c_ubyte is ``<B``, which nothing reads."""

    _fields_ = (("value", ctypes.c_ubyte),)


def _host_class(nbytes: int) -> Any:
    """Return a MemoryRegion whose instances are buffers.

    Python code can make buffers from version 3.12 on only, but a ctypes array is one, with the
    array as the owner of each view. Its length is part of its type.
    """
    parts: tuple[type, ...] = (MemoryRegion, _Byte * nbytes)
    return type("MemoryRegion", parts, {"__module__": __name__, "__doc__": MemoryRegion.__doc__})


class Span:
    """A stretch of memory that somebody wants registered, and the objects that keep it alive."""

    __slots__ = ("device", "keep", "kind", "nbytes", "ptr")

    def __init__(self, ptr: int, nbytes: int, kind: int, device: int, keep: Any) -> None:
        self.ptr = ptr
        self.nbytes = nbytes
        self.kind = kind
        self.device = device
        self.keep = keep

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What registrations are shared by: all of it, for the same address can be longer."""
        return self.ptr, self.nbytes, self.kind, self.device


def span_of(source: Any) -> Span:
    """Return the memory of a buffer, a torch tensor, or a pair ``(pointer, nbytes)``.

    Raises:
        InvalidArgument: none of these; or not contiguous, or read-only.
    """
    if isinstance(source, MemoryRegion):
        raise InvalidArgument(f"{source!r} is registered already")
    if isinstance(source, tuple):
        if len(source) != 2:
            raise InvalidArgument(f"memory: (pointer, nbytes) is needed, not {len(source)} items")
        ptr = integer("pointer", source[0], 1)
        return Span(ptr, integer("nbytes", source[1], 1), lib.FAB_MEM_HOST, 0, None)
    torch = sys.modules.get("torch")  # an object of a module that nobody imported does not exist
    if torch is not None and isinstance(source, torch.Tensor):
        return _span_of_tensor(source)
    return _span_of_buffer(source)


def _span_of_tensor(tensor: Any) -> Span:
    if not tensor.is_contiguous():
        raise InvalidArgument("tensor: not contiguous; register tensor.contiguous() or its base")
    kinds = {"cpu": lib.FAB_MEM_HOST, "cuda": lib.FAB_MEM_CUDA}
    if tensor.device.type not in kinds:
        raise InvalidArgument(f"tensor: memory of {tensor.device} cannot be registered")
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        raise InvalidArgument("tensor: it is empty")
    device = tensor.device.index or 0
    return Span(tensor.data_ptr(), nbytes, kinds[tensor.device.type], device, tensor)


_FIELD_NAME = re.compile(":[^:]*:")
"""A name in the format of a buffer: the rest of it says what the elements are."""


def _as_bytes(source: Any) -> Any:
    """Return an array as one of bytes, for dtypes that buffers have no format for."""
    if isinstance(source, np.ndarray) and source.flags.c_contiguous and not source.dtype.hasobject:
        return source.reshape(-1).view(np.uint8)
    return source


def _span_of_buffer(source: Any) -> Span:
    try:
        view = memoryview(_as_bytes(source))
    except TypeError:
        raise InvalidArgument(
            f"memory: a buffer, a tensor or (pointer, nbytes) is needed, not "
            f"{type(source).__name__}"
        ) from None
    except (ValueError, BufferError) as error:
        raise InvalidArgument(f"memory: {error}") from None
    if view.readonly:
        raise InvalidArgument(
            "memory: the buffer is read-only, and peers could write to a registered region"
        )
    if not view.c_contiguous:
        raise InvalidArgument("memory: the buffer is not contiguous")
    if not view.nbytes:
        raise InvalidArgument("memory: the buffer is empty")
    if "O" in _FIELD_NAME.sub("", view.format):
        raise InvalidArgument("memory: the buffer holds references to Python objects")
    held = ffi.from_buffer("uint8_t[]", view)  # keeps a bytearray from moving
    return Span(int(ffi.cast("uintptr_t", held)), view.nbytes, lib.FAB_MEM_HOST, 0, (held, source))
