"""The engine: the NICs of one GPU or NUMA node, and everything that is done with them."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from ._core import Core
from ._counter import CounterBlock, ImmCounter
from ._descriptor import Descriptor
from ._env import PROVIDER
from ._errors import InvalidArgument, QueueFull, WaitTimeout, check, error_of, text_of
from ._memory import MemoryRegion, Span, new_region, span_of
from ._messages import Messages, receive
from ._native import ffi, lib
from ._near import near_nics
from ._nics import Nic, nic_of
from ._pages import page_indices
from ._peer import Address, NicAddress, Peer
from ._queue import Acceptor, Dispatcher
from ._stats import EngineStats, snapshot
from ._trace import EVENTS, begin_by_environment, end_by_environment, traced
from ._transfer import AT_ONCE, AtOnce, Transfer, transfer_of
from ._values import (
    FOREVER,
    IMM_MAX,
    U64_MAX,
    bounded_ns,
    deadline_ns,
    immediate,
    integer,
    nanoseconds,
    needs,
    refuse,
)
from ._wire import LABEL_BYTES

if TYPE_CHECKING:
    from types import TracebackType

P = ParamSpec("P")
log = logging.getLogger("fabric")

SUBMIT_LOOK_SECONDS = 0.001
"""How often `TransferEngine.submit` looks for room in a full table, and at an event."""
AFTER_LOOK_SECONDS = 0.00005
"""How often a blocking submission looks at an ``after`` that is not ready."""

_engines: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


def open_engines() -> list[TransferEngine]:
    """Return the engines of this process that are open, in the order of their labels."""
    return sorted(_engines, key=lambda engine: (engine.address.label, engine.address.id))


def _close_all() -> None:
    """Stop every engine before the interpreter is torn down."""
    for engine in list(_engines):
        try:
            engine.close()
        except Exception:
            log.exception("closing %r at exit", engine)


atexit.register(_close_all)

_PLAIN = {int}
_write = lib.fab_write
_imm = lib.fab_imm
_write_pages = lib.fab_write_pages
_PAGE_FIELDS = ("page_bytes", "src_stride", "dst_stride", "src_offset", "dst_offset")


class TransferEngine:
    """NICs, one worker thread in C, and the memory and peers they serve.

    Everything may be called from any thread. Submitting returns a `Transfer`; wait for it with
    ``t.wait()`` in threads and ``await t`` in asyncio.

    Keyword arguments that several methods share:

    - ``imm``: counter id of the receiver, which counts one for each range; None: uncounted.
    - ``deadline``: seconds from now after which the transfer fails instead of going on.
    - ``after``: what must have happened before the source is read: an event with ``query()`` and
      ``synchronize()`` such as ``torch.cuda.Event``, or a callable that returns True or None when
      it has, False while it has not. It is waited for before anything is submitted.
    - ``timeout``: seconds to wait for room where a table is full, and for ``after``: None waits
      for ever, 0 raises `QueueFull` (or `WaitTimeout`) at once. In asyncio use `submit`.
    """

    def __init__(
        self,
        provider: str = "auto",
        nics: Sequence[str] | None = None,
        *,
        spin_us: int = 50,
        cpu: int | None = None,
        peer_timeout: float = 10.0,
        secret: bytes | None = None,
        accept: Callable[[Peer], bool] | None = None,
        callbacks: bool = False,
        label: str | None = None,
    ) -> None:
        """Open an engine.

        Args:
            provider: ``"auto"``, one of ``"local"``, ``"tcp"``, ``"efa"``, or several
                with commas between. ``"auto"`` is what FABRIC_PROVIDER says, if it is set.
            nics: names of the provider's NICs, see ``fabric info``; None takes those of the GPU,
                where this process sees exactly one (`fabric.topology`), else the provider's choice.
            spin_us: microseconds that a waiter polls before it sleeps.
            cpu: CPU of the worker thread; None leaves it to the kernel.
            peer_timeout: seconds of silence after which a peer is unreachable.
            secret: 1 to 64 bytes that both sides must know; None admits without.
            accept: asked about each newcomer, on a thread of its own; what is not true refuses.
            callbacks: start the thread that `Transfer.add_done_callback` needs.
            label: shown in peers' errors; ``host:pid`` by default.

        Raises:
            InvalidArgument: a bad argument.
            ProviderUnavailable: no such provider or NIC here.
        """
        self._open = False
        self._regions: dict[int, MemoryRegion] = {}
        self._shared: dict[tuple[int, int, int, int], MemoryRegion] = {}
        self._acceptor: Acceptor | None = None
        self._dispatcher: Dispatcher | None = None
        self._peer_timeout = peer_timeout
        config = _config(provider, nics, spin_us, cpu, peer_timeout, secret, label, accept)
        ptr = lib.fab_engine_open(config[0])
        if ptr == ffi.NULL:
            raise error_of(lib.fab_error_code())
        self._core = core = Core(ptr)
        self._open = True
        self._nics = _read_nics(core)
        core.address = _read_address(core)
        _engines.add(self)
        self._traced = begin_by_environment(core)
        if callbacks:
            self._dispatcher = Dispatcher(core)
        if accept is not None:
            self._acceptor = Acceptor(core, accept)

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False) and not self._core.forked:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
            self.close(0)

    def __repr__(self) -> str:
        state = "open" if self._open and not self._core.closed else "closed"
        names = ", ".join(nic.name for nic in self._nics)
        return f"<TransferEngine {self.address.label} [{state}, {names}]>"

    @property
    def address(self) -> Address:
        """Where peers reach this engine."""
        return self._core.address

    @property
    def nics(self) -> tuple[Nic, ...]:
        """The NICs that are open."""
        return self._nics

    def close(self, timeout: float | None = None) -> None:
        """Finish what is under way, say goodbye to peers, stop the worker. May be called again.

        Afterwards all methods raise `EngineClosed`; transfers still tell how they ended.

        Args:
            timeout: seconds for what is under way, which then fails; by default `peer_timeout`.
        """
        if not self._open:
            return
        limit = bounded_ns("timeout", self._peer_timeout if timeout is None else timeout)
        self._open = False
        _engines.discard(self)
        if self._core.forked:
            return
        try:
            self._core.close(limit)
        finally:
            if self._acceptor is not None:
                self._acceptor.close()
            if self._dispatcher is not None:
                self._dispatcher.close()
            self._regions.clear()
            self._shared.clear()
            if self._traced:
                end_by_environment(self._core)

    # ---- memory ----

    def register(self, memory: Any) -> MemoryRegion:
        """Register memory, so that it can be written from and to. It is kept alive meanwhile.

        Registering the same memory again gives the same region; each call needs a `deregister`.

        Args:
            memory: a writable C-contiguous buffer (bytearray, memoryview, numpy array), a
                contiguous torch tensor on the CPU or a CUDA device, or ``(pointer, nbytes)``,
                which the caller keeps alive.

        Raises:
            InvalidArgument: not contiguous, read-only, empty, or not memory.
            QueueFull: too many regions.
        """
        self._core.check_open()
        span = span_of(memory)
        with self._core.lock:
            region = self._shared.get(span.key)
            if region is None:
                region = self._shared[span.key] = self._register(span)
            else:
                region._uses += 1
            if span.keep is not None and not region._keeps:  # one keeps all of it
                region._keeps.append(span.keep)
        return region

    def _register(self, span: Span) -> MemoryRegion:
        handle = check(
            lib.fab_region_register(self._core.ptr, span.ptr, span.nbytes, span.kind, span.device)
        )
        return self._new_region(handle)

    def alloc(
        self,
        nbytes: int,
        *,
        huge: bool = False,
        numa: int | None = None,
        populate: bool = True,
    ) -> MemoryRegion:
        """Allocate zeroed memory that peers on this host can map: the fastest there is for `local`.

        Args:
            nbytes: at least 1.
            huge: use huge pages of 2 MiB, which the system must have reserved.
            numa: node to take the memory from; None leaves it to the kernel.
            populate: touch it now, not in the first transfer.

        Raises:
            InvalidArgument: a bad size or node.
            FabricError: the system has no such memory.
        """
        self._core.check_open()
        size = integer("nbytes", nbytes, 1)
        node = -1 if numa is None else integer("numa", numa, 0, 1023)
        handle = check(lib.fab_region_alloc(self._core.ptr, size, bool(huge), node, bool(populate)))
        return self._new_region(handle)

    def _new_region(self, handle: int) -> MemoryRegion:
        try:
            region = new_region(self._core, handle)
        except BaseException:
            lib.fab_region_deregister(self._core.ptr, handle, 0)
            raise
        self._regions[handle] = region
        return region

    def deregister(self, memory: MemoryRegion | Descriptor, timeout: float | None = None) -> None:
        """Take memory back: peers that may write to it are asked to stop, or fenced.

        When this returns nothing lands in the memory any more. Views of it stay good: the region
        object goes on keeping it alive. A region that was registered several times is released by
        the last call.

        Args:
            memory: a region, or a descriptor that `MemoryRegion.descriptor_for` made: then only
                the peer it was made for loses access.
            timeout: seconds that transfers and peers get; by default `peer_timeout`. Peers that do
                not answer by then are disconnected. Cannot be interrupted.

        Raises:
            WaitTimeout: transfers still read from it. It stays registered.
            FencePending: a peer may still be inside a write. It stays registered: try again.
            InvalidArgument: it is not registered here.
            FabricError: a NIC does not let go of it. Nobody can use it any more; try again.
        """
        limit = nanoseconds("timeout", timeout)
        if isinstance(memory, Descriptor):
            self._take_back(memory, limit)
            return
        self._check_region(memory)
        handle = memory._live_handle()
        with self._core.lock:
            if memory._uses > 1:
                memory._uses -= 1
                return
            keys = self._unshare(memory)  # who registers it from now on gets another region
        try:
            for alias, _ in list(memory._aliases.values()):
                self._take_back_alias(memory, alias, limit)
            check(lib.fab_region_deregister(self._core.ptr, handle, limit))
        except BaseException:
            with self._core.lock:
                for key in keys if memory._usable() else ():
                    self._shared.setdefault(key, memory)
            raise
        with self._core.lock:
            memory._handle = 0
            self._regions.pop(handle, None)
            self._unshare(memory)  # another thread may have failed to deregister it meanwhile

    def _unshare(self, memory: MemoryRegion) -> list[tuple[int, int, int, int]]:
        keys = [key for key, region in self._shared.items() if region is memory]
        for key in keys:
            del self._shared[key]
        return keys

    def _take_back(self, descriptor: Descriptor, limit: int) -> None:
        for region in list(self._regions.values()):
            for alias, known in list(region._aliases.values()):
                if known == descriptor:
                    self._take_back_alias(region, alias, limit)
                    return
        raise InvalidArgument(f"{descriptor!r} was not made by descriptor_for() of this engine")

    def _take_back_alias(self, region: MemoryRegion, alias: int, limit: int) -> None:
        check(lib.fab_region_deregister(self._core.ptr, alias, limit))
        for peer, (handle, _) in list(region._aliases.items()):
            if handle == alias:
                region._aliases.pop(peer, None)

    def _check_region(self, memory: Any) -> None:
        needs("mr", memory, MemoryRegion)
        if memory._core is not self._core:
            raise InvalidArgument(f"{memory!r} belongs to another engine")

    # ---- counters ----

    def counter(self, id: int | None = None) -> ImmCounter:  # noqa: A002 - the field's word
        """Open a counter.

        Args:
            id: 0 to 2**27 - 1, chosen by the user; what came under it before is counted. By
                default the engine chooses, and counts of earlier owners of the slot are dropped.

        Raises:
            InvalidArgument: the id is out of range.
            QueueFull: too many counters.
        """
        self._core.check_open()
        return ImmCounter(self._core, id)

    def counter_block(self, n: int) -> CounterBlock:
        """Open `n` counters with consecutive ids.

        Raises:
            InvalidArgument: `n` is out of range.
            QueueFull: no `n` counters in a row are free.
        """
        self._core.check_open()
        return CounterBlock(self._core, n)

    # ---- transfers ----

    def write(
        self,
        mr: MemoryRegion,
        d: Descriptor,
        *,
        src_offset: int = 0,
        dst_offset: int = 0,
        length: int | None = None,
        imm: int | None = None,
        deadline: float | None = None,
        after: Any = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Write from a region to what a descriptor names: one range.

        Args:
            mr: source, of this engine.
            d: destination.
            src_offset: byte of `mr` to begin at.
            dst_offset: byte of `d` to begin at.
            length: bytes; by default what is left of the shorter side.
            imm, deadline, after, timeout: see the class.

        Raises:
            InvalidArgument: outside of the region or the descriptor; or a wrong type.
            QueueFull: no room within `timeout`.
            EngineClosed: the engine is closed.
        """
        if type(src_offset) is not int:
            src_offset = integer("src_offset", src_offset)
        if type(dst_offset) is not int:
            dst_offset = integer("dst_offset", dst_offset)
        core = self._core
        try:
            if type(length) is not int:
                if length is not None:
                    length = integer("length", length)
                else:
                    length = min(mr.nbytes - src_offset, d.nbytes - dst_offset)
            if mr._core is not core:
                self._check_region(mr)
            if after is not None:
                _wait_for(after, timeout)
            # Written out for speed: a helper or a tuple of arguments takes as long as C does.
            source, ptr, last = mr._handle, core.ptr, d._last
            remote = last[1] if last[0] is ptr else d._handle_in(core)
            if type(imm) is not int or not 0 <= imm <= IMM_MAX:
                imm = immediate(imm)
            limit = 0 if deadline is None else deadline_ns(deadline)
            handle = _write(ptr, source, src_offset, remote, dst_offset, length, imm, limit, 0)
            if handle == AT_ONCE and self._dispatcher is None:
                return AtOnce()
            if handle < 0:
                args = (source, src_offset, remote, dst_offset, length, imm, limit)
                handle = self._again(_write, args, timeout, handle)
            return transfer_of(core, handle, self._dispatcher)
        except (TypeError, OverflowError, AttributeError) as error:
            size = 0 if length is None else length
            self._explain(error, mr, d, src_offset=src_offset, dst_offset=dst_offset, length=size)

    def write_pages(
        self,
        mr: MemoryRegion,
        d: Descriptor,
        src_pages: Any,
        dst_pages: Any,
        *,
        page_bytes: int,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        imm: int | None = None,
        deadline: float | None = None,
        after: Any = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Write pages: page i is one range of its own.

        It goes from ``src_offset + src_pages[i] * src_stride`` in `mr` to
        ``dst_offset + dst_pages[i] * dst_stride`` in `d`. No pages: done at once.

        Args:
            mr: source, of this engine.
            d: destination.
            src_pages: page numbers, shape ``(n,)``. Contiguous int32 arrays are used as they
                are, other integers are converted. They may be changed once this returns.
            dst_pages: page numbers, shape ``(n,)``.
            page_bytes: bytes of each page.
            src_stride: bytes from one page to the next; `page_bytes` by default.
            dst_stride: the same for the destination.
            src_offset: byte of `mr` where page 0 begins.
            dst_offset: byte of `d` where page 0 begins.
            imm, deadline, after, timeout: see the class.

        Raises:
            InvalidArgument: unequal lengths, a page outside of the region or the descriptor, or
                a wrong type.
            QueueFull: no room within `timeout`.
            EngineClosed: the engine is closed.
        """
        src_stride = page_bytes if src_stride is None else src_stride
        dst_stride = page_bytes if dst_stride is None else dst_stride
        where: tuple[int, ...] = (page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        if {*map(type, where)} != _PLAIN:
            where = tuple(map(integer, _PAGE_FIELDS, where))
        try:
            if mr._core is not self._core:
                self._check_region(mr)
            src, count = page_indices("src_pages", src_pages)
            dst, other = page_indices("dst_pages", dst_pages)
            if count != other:
                raise InvalidArgument(f"src_pages has {count} pages, dst_pages {other}")
            if after is not None:
                _wait_for(after, timeout)
            ends = (mr._handle, d._handle_in(self._core), src, dst, count)
            limit = 0 if deadline is None else deadline_ns(deadline)
            args = (*ends, *where, immediate(imm), limit)
            return self._submit(_write_pages, args, timeout)
        except (TypeError, OverflowError, AttributeError) as error:
            self._explain(error, mr, d, **dict(zip(_PAGE_FIELDS, where, strict=True)))

    def scatter(
        self,
        mr: MemoryRegion,
        targets: Iterable[tuple[Descriptor, int, int, int]],
        *,
        imm: int | None = None,
        deadline: float | None = None,
        after: Any = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Write parts of one region to several places: each row is one range.

        Args:
            mr: source, of this engine.
            targets: rows of ``(descriptor, src_offset, dst_offset, length)``.
            imm, deadline, after, timeout: see the class.

        Raises:
            InvalidArgument: a row outside of its region or descriptor, or of a wrong type.
            QueueFull: no room within `timeout`.
            EngineClosed: the engine is closed.
        """
        self._check_region(mr)
        core = self._core
        rows = []
        held = []  # descriptors that the caller may have made on the fly
        try:
            for number, (d, src_offset, dst_offset, length) in enumerate(targets):
                needs(f"targets[{number}]", d, Descriptor)
                held.append(d)
                remote = d._handle_in(core)
                parts = (src_offset, dst_offset, length)
                rows.append((remote, *(integer(f"targets[{number}]", part) for part in parts)))
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(
                "targets: rows of (descriptor, src_offset, dst_offset, length) are needed"
            ) from None
        if after is not None:
            _wait_for(after, timeout)
        args = (
            mr._handle,
            ffi.new("fab_target[]", rows),
            len(rows),
            immediate(imm),
            deadline_ns(deadline),
        )
        return self._submit(lib.fab_scatter, args, timeout)

    def write_imm(
        self,
        address: Peer,
        imm: int,
        *,
        deadline: float | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Count one at a peer, without bytes.

        Raises:
            InvalidArgument: not an address, or not an id.
            QueueFull: no room within `timeout`.
            EngineClosed: the engine is closed.
        """
        core = self._core
        if deadline is None and type(imm) is int and 0 <= imm <= IMM_MAX:
            handle = _imm(core.ptr, (core.peer(address),), 1, imm, 0, 0)
            if handle == AT_ONCE and self._dispatcher is None:
                return AtOnce()
            if handle >= 0:
                return transfer_of(core, handle, self._dispatcher)
        # Refused, for good or for now: the way that says why, and tries again.
        return self.barrier((address,), imm, deadline=deadline, timeout=timeout)

    def barrier(
        self,
        addresses: Iterable[Peer],
        imm: int,
        *,
        deadline: float | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Count one at each of several peers, without bytes. No peers: done at once.

        Raises:
            InvalidArgument: not addresses, or not an id.
            QueueFull: no room within `timeout`.
            EngineClosed: the engine is closed.
        """
        number = integer("imm", imm, 0, IMM_MAX)
        self._core.check_open()
        peers = (addresses,) if isinstance(addresses, Peer) else tuple(addresses)
        limit = deadline_ns(deadline)

        def submit(*args: Any) -> int:
            array, count = self._core.peers(peers)
            return lib.fab_imm(args[0], array, count, number, limit, args[1])

        return self._submit_to(peers, submit, timeout)

    def _submit_to(
        self, peers: tuple[Peer, ...], function: Callable[..., int], timeout: float | None
    ) -> Transfer:
        """Submit by peer handles, of which the C core may have reused some."""
        return self._core.with_peers(peers, lambda: self._submit(function, (), timeout))

    def _submit(
        self, function: Callable[..., int], args: tuple[Any, ...], timeout: float | None
    ) -> Transfer:
        core = self._core
        handle = function(core.ptr, *args, 0)
        if handle < 0:
            handle = self._again(function, args, timeout, handle)
        return transfer_of(core, handle, self._dispatcher)

    def _again(
        self,
        function: Callable[..., int],
        args: tuple[Any, ...],
        timeout: float | None,
        code: int,
    ) -> int:
        """Submit what was refused once more, where that was for want of room; return a handle."""
        core = self._core
        if code == lib.FAB_E_FULL and timeout != 0:
            wait = FOREVER if timeout is None else nanoseconds("timeout", timeout)
            code = core.submit_slowly(function, args, wait)
        if code < 0:
            if core.closed:
                core.check_open()
            raise error_of(code)
        return code

    def _explain(self, error: Exception, mr: Any, d: Any, **integers: Any) -> NoReturn:
        """Say which argument made Python or cffi raise; raise that itself if none of them did."""
        self._check_region(mr)
        needs("d", d, Descriptor)
        refuse(error, **integers)

    async def submit(
        self, method: Callable[P, Transfer], /, *args: P.args, **kwargs: P.kwargs
    ) -> Transfer:
        """Submit from asyncio: where a table is full, or ``after`` has not happened, await it.

        ``t = await engine.submit(engine.write, mr, d, imm=7)`` is ``engine.write(mr, d, imm=7)``
        that never blocks the event loop. ``timeout=`` bounds the wait, as there.

        Raises:
            QueueFull, WaitTimeout: not within `timeout`.
            FabricError: as from `method`.
        """
        timeout: Any = kwargs.pop("timeout", None)
        wait = nanoseconds("timeout", timeout)
        end = math.inf if wait == FOREVER else time.monotonic() + wait / 1e9
        kwargs["timeout"] = 0
        while True:
            try:
                return method(*args, **kwargs)
            except (QueueFull, WaitTimeout):
                if time.monotonic() >= end:
                    raise
            self._core.sweep()
            await asyncio.sleep(SUBMIT_LOOK_SECONDS)

    # ---- messages ----

    def send(self, address: Peer, payload: Any, *, timeout: float | None = None) -> Transfer:
        """Send a message of up to 64 KiB; done when the peer's engine holds it.

        Args:
            address: of the peer, or the sender of a message that came here.
            payload: bytes, or any contiguous buffer; copied.
            timeout: see the class.

        Raises:
            InvalidArgument: not an address, not bytes, or too long.
            QueueFull: the peer's application does not take its messages.
            EngineClosed: the engine is closed.
        """
        try:
            data = ffi.from_buffer("uint8_t[]", payload)
        except (TypeError, ValueError, BufferError) as error:
            raise InvalidArgument(f"payload: bytes are needed: {error}") from None
        self._core.check_open()

        def submit(*args: Any) -> int:
            return lib.fab_send(args[0], self._core.peer(address), data, len(data), args[1])

        return self._submit_to((address,), submit, timeout)

    def recv(self, timeout: float | None = None) -> tuple[Peer, bytes]:
        """Wait for a message.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Returns:
            The sender, which can be answered, and the payload. Where the sender's `Address` was
            ever used here, it is that.

        Raises:
            WaitTimeout: none came.
            EngineClosed: the engine is closed.
        """
        return receive(self._core, timeout)

    def messages(self) -> Messages:
        """Return an asynchronous iterator of messages, as `recv` returns them."""
        self._core.check_open()
        return Messages(self._core)

    # ---- peers ----

    def disconnect(self, address: Peer, timeout: float | None = None) -> None:
        """Fence a peer: when this returns, nothing it started lands here any more.

        It cannot come back by itself; using its address again opens a new session. If it has tried
        meanwhile, it was told that this engine is unreachable, and believes its memory safe: then
        the first write to it fails once (`TransferFailed`), and has to be begun anew.

        Args:
            address: of the peer.
            timeout: seconds; by default `peer_timeout`.

        Raises:
            FencePending: it may still be inside a write: leave its destinations alone, call again.
            FenceUnsupported: this provider cannot keep it from finishing what it began.
        """
        self._core.check_open()
        core = self._core
        limit = bounded_ns("timeout", self._peer_timeout if timeout is None else timeout)
        core.with_peers(
            (address,),
            lambda: check(lib.fab_disconnect(core.ptr, core.peer(address), limit)),
        )

    def stats(self) -> EngineStats:
        """Return what this engine has done and holds. A closed engine still tells."""
        return snapshot(self._core)

    def trace(
        self, path: str | os.PathLike[str], *, events: int = EVENTS
    ) -> AbstractContextManager[None]:
        """Trace what happens meanwhile, and write it to a file that https://ui.perfetto.dev opens.

        ``with engine.trace("trace.json"): ...`` records when each transfer was submitted, first and
        last posted, and acknowledged, and what became of lanes, peers and counters. To trace an
        engine from its first day to its last, set FABRIC_TRACE.

        Args:
            path: of a JSON file in the trace event format; overwritten.
            events: how many are kept, 1 to 2**20, of 200 bytes each. A transfer takes four. When
                there are more the oldest make room; the file says how many.

        Raises:
            InvalidArgument: too many events, or the engine is traced already.
        """
        return traced(self._core, path, integer("events", events, 1, lib.FAB_MAX_TRACE))

    def progress(self) -> int:
        """Do one turn of the worker's work on this thread; returns how much happened."""
        return check(lib.fab_engine_progress(self._core.ptr))


def _wait_for(after: Any, timeout: float | None) -> None:
    """Wait for an event or a callable; see `TransferEngine`."""
    query = getattr(after, "query", None)
    if query is not None and timeout is None:
        after.synchronize()
        return
    if query is None and not callable(after):
        raise InvalidArgument(f"after: an event or a callable is needed, not {after!r}")
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (happened := (query or after)()) is not None and not happened:
        if time.monotonic() >= end:
            raise WaitTimeout("what the transfer comes after has not happened", phase="after")
        time.sleep(AFTER_LOOK_SECONDS)


def _config(
    provider: str,
    nics: Sequence[str] | None,
    spin_us: int,
    cpu: int | None,
    peer_timeout: float,
    secret: bytes | None,
    label: str | None,
    accept: object,
) -> tuple[Any, list[Any]]:
    """Return a fab_engine_config and what it points to."""
    needs("provider", provider, str)
    if provider == "auto":
        provider = PROVIDER.value or provider
    if nics is not None and not _names(nics):
        raise InvalidArgument(f"nics: None or a list of names is needed, not {nics!r}")
    if nics is None:
        provider, nics = near_nics(provider)
    if not isinstance(peer_timeout, int | float) or not 0 < peer_timeout < math.inf:
        raise InvalidArgument(f"peer_timeout: seconds are needed, not {peer_timeout!r}")
    if accept is not None and not callable(accept):
        raise InvalidArgument("accept: a callable is needed")
    if label is not None and not (
        isinstance(label, str)
        and label.isprintable()
        and 0 < len(label.encode("utf-8", "surrogatepass")) <= LABEL_BYTES
    ):
        raise InvalidArgument(f"label: 1 to {LABEL_BYTES} bytes of text that prints are needed")
    if secret is not None and not isinstance(secret, bytes):
        raise InvalidArgument("secret: bytes are needed")
    if secret is not None and not 0 < len(secret) <= lib.FAB_MAX_SECRET:
        raise InvalidArgument(
            f"secret: {len(secret)} bytes; 1 to {lib.FAB_MAX_SECRET} are possible"
        )
    names = [ffi.new("char[]", name.encode()) for name in nics or ()]
    held = [ffi.new("char[]", provider.encode()), ffi.new("char *[]", names), names]
    config = ffi.new("fab_engine_config *")
    config.provider = held[0]
    config.nics = held[1] if names else ffi.NULL
    config.nic_count = len(names)
    config.spin_us = integer("spin_us", spin_us, 0, 1_000_000)
    config.cpu = -1 if cpu is None else integer("cpu", cpu, 0, 1 << 20)
    config.ask_accept = accept is not None
    config.peer_timeout_ns = nanoseconds("peer_timeout", peer_timeout)
    if secret is not None:
        held.append(ffi.new("uint8_t[]", secret))
        config.secret = held[-1]
        config.secret_len = len(secret)
    if label is not None:
        held.append(ffi.new("char[]", label.encode()))
        config.label = held[-1]
    return config, held


def _names(nics: Any) -> bool:
    return (
        isinstance(nics, Sequence)
        and not isinstance(nics, str)
        and len(nics) > 0
        and all(isinstance(name, str) and name for name in nics)
    )


def _read_nics(core: Core) -> tuple[Nic, ...]:
    info = ffi.new("fab_engine_info *")
    check(lib.fab_engine_get_info(core.ptr, info))
    return tuple(nic_of(_read_nic(core, i)) for i in range(info.nic_count))


def _read_nic(core: Core, index: int) -> Any:
    nic = ffi.new("fab_nic_info *")
    check(lib.fab_engine_nic(core.ptr, index, nic))
    return nic


def _read_address(core: Core) -> Address:
    info = ffi.new("fab_engine_info *")
    check(lib.fab_engine_get_info(core.ptr, info))
    rows = [_read_nic(core, i) for i in range(info.nic_count)]
    nics = tuple(
        NicAddress(
            row.kind,
            ffi.buffer(row.blob, row.blob_len)[:],
            row.doorbell.addr,
            row.doorbell.rkey,
            min(row.max_write, U64_MAX),
            bool(row.ordered),
        )
        for row in rows
    )
    return Address(bytes(info.id), text_of(info.label), nics)
