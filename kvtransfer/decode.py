"""The side that asks for KV pages and counts their arrival."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

from fabric import (
    Address,
    CounterVoid,
    EngineClosed,
    FabricError,
    FencePending,
    InvalidArgument,
    PeerUnreachable,
    QueueFull,
    WaitTimeout,
    WireError,
)

from . import _answers
from ._tails import check_region, tail_pool, tail_stride
from .errors import KvTransferError, PoolExhausted, RequestCancelled, RequestFailed, RequestRefused
from .plan import expected_ranges
from .request import ID_BYTES, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric import ImmCounter, Transfer, TransferEngine

    from .layout import KvLayout
    from .pool import PagePool

log = logging.getLogger(__name__)

#: How often a waiter looks whether the prefiller answered instead of writing.
SLICE_SECONDS = 0.02

#: What a fence may take, for each of its two steps.
FENCE_SECONDS = 10.0

#: How much longer than the request's time `Arrival.wait` waits for an answer.
GRACE_SECONDS = 1.0

#: How long the message thread sleeps before it looks whether it should end.
IDLE_SECONDS = 0.2


class _State(enum.Enum):
    WAITING = enum.auto()  # the prefiller writes
    ARRIVED = enum.auto()  # every byte is there; the pages are the caller's until release()
    GIVEN_UP = enum.auto()  # nobody waits, but writes may still land: quarantined
    OVER = enum.auto()  # the pages are free again


class Arrival:
    """One request under way. Made by `Decoder.submit`; use it as a context manager.

    Its pages return to the pool when no write can reach them any more: after `release` of what
    has arrived, after the prefiller said that it has drained, or after it was fenced.

    Attributes:
        request: what was sent.
        pages: pages of the decoder's region that the request fills, in token order.
        expected: ranges that the counter waits for.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefiller: Address,
        request: Request,
        counter: ImmCounter,
        slot: tuple[int, ...],
    ) -> None:
        self.prefiller = prefiller
        self.request = request
        self.pages = request.pages
        self.expected = expected_ranges(request)
        self._decoder = decoder
        self._counter = counter
        self._slot = slot
        self._sent: Transfer | None = None
        self._deadline = time.monotonic() + request.budget_ms / 1000
        self._state = _State.WAITING
        self._error: FabricError | None = None
        self._over = threading.Event()

    def __repr__(self) -> str:
        return (
            f"<Arrival {self.request.id.hex()[:8]} [{self._state.name.lower()}, "
            f"{len(self.pages)} pages]>"
        )

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        if self._state is _State.WAITING:
            self.cancel()
        elif self._state is _State.ARRIVED:
            self.release()

    @property
    def tail(self) -> memoryview:
        """The tail's bytes, in place. Gone after `release`.

        Raises:
            InvalidArgument: nothing has arrived, or it was released.
        """
        if self._state is not _State.ARRIVED:
            raise InvalidArgument(f"tail: {self!r}")
        return self._decoder._tail(self._slot, self.request.tail_bytes)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every byte has arrived.

        Args:
            timeout: seconds; by default the rest of the request's time, and a little more for the
                prefiller to say that it is up.

        Raises:
            WaitTimeout: not yet. The prefiller may still write: wait again, or cancel.
            RequestRefused, RequestFailed, RequestCancelled: it never will, and the pages are free.
            FencePending, FenceUnsupported: the prefiller is gone, but its writes may still land.
                The pages are in quarantine; `Decoder.fence` tries again.
        """
        end = self._end(timeout)
        while not self._has_arrived():
            pause = self._pause(end)
            try:
                self._counter.wait(self.expected, timeout=pause, peers=[self.prefiller])
                self._arrive()
            except FabricError as error:
                if (reason := self._gone(error)) is not None:
                    self._decoder._lost(self, reason)
                elif isinstance(error, CounterVoid):
                    self._over.wait(pause)

    async def arrived(self, timeout: float | None = None) -> None:
        """Like `wait`, for asyncio."""
        end = self._end(timeout)
        while not self._has_arrived():
            pause = self._pause(end)
            try:
                counted = self._counter.reached(self.expected, peers=[self.prefiller])
                await asyncio.wait_for(counted, pause)
                self._arrive()
            except asyncio.TimeoutError:
                if (reason := self._unsent()) is not None:
                    await asyncio.to_thread(self._decoder._lost, self, reason)
            except FabricError as error:
                if (reason := self._gone(error)) is not None:
                    await asyncio.to_thread(self._decoder._lost, self, reason)
                elif isinstance(error, CounterVoid):
                    await asyncio.sleep(pause)

    def cancel(self, timeout: float = 5.0) -> None:
        """Withdraw the request and wait until nothing of it can land any more.

        Returns when the prefiller acknowledged that it has drained, or was fenced, or when
        everything has arrived in the meantime. The pages are free then.

        Args:
            timeout: seconds to wait for that.

        Raises:
            WaitTimeout: the prefiller is there but did not answer. The pages are in quarantine
                until it does, or until `Decoder.fence`.
            FencePending, FenceUnsupported: as from `wait`.
        """
        self._decoder._cancel(self, timeout)
        end = time.monotonic() + timeout
        while not self._over.is_set():
            pause = min(SLICE_SECONDS, end - time.monotonic())
            if pause <= 0:
                self._decoder._give_up(self)
                raise WaitTimeout(f"no answer to the cancellation in {timeout} s: {self!r}")
            try:
                self._counter.wait(self.expected, timeout=pause, peers=[self.prefiller])
                self._decoder._finish(self, None)
            except FabricError as error:
                if (reason := self._gone(error)) is not None:
                    self._decoder._lost(self, reason)
                elif isinstance(error, CounterVoid):
                    self._over.wait(pause)

    def release(self) -> None:
        """Give back the pages of what has arrived.

        Raises:
            InvalidArgument: it has not, or was released before.
        """
        if self._state is not _State.ARRIVED:
            raise InvalidArgument(f"release: {self!r}")
        self._decoder._finish(self, None)

    def _end(self, timeout: float | None) -> float:
        return self._deadline + GRACE_SECONDS if timeout is None else time.monotonic() + timeout

    def _has_arrived(self) -> bool:
        if self._state is _State.ARRIVED:
            return True
        if self._state is not _State.WAITING:
            raise self._error or RequestCancelled(f"{self!r} was let go of")
        return False

    def _pause(self, end: float) -> float:
        left = end - time.monotonic()
        if left <= 0:
            raise WaitTimeout(f"{self._counter.value} of {self.expected} ranges: {self!r}")
        return min(SLICE_SECONDS, left)

    def _is_complete(self) -> bool:
        with contextlib.suppress(FabricError):
            self._counter.wait(self.expected, timeout=0)
            self._arrive()
        return self._state is _State.ARRIVED

    def _arrive(self) -> None:
        with self._decoder._lock:
            if self._state is _State.WAITING:
                self._state = _State.ARRIVED

    def _gone(self, error: FabricError) -> str | None:
        """Why a wait ended, if that is because there is no prefiller.

        Errors that mean neither that nor "look again" are raised.
        """
        if self._over.is_set() or isinstance(error, CounterVoid):
            return None
        if isinstance(error, PeerUnreachable | FencePending):
            return str(error)
        if not isinstance(error, WaitTimeout):
            raise error
        return self._unsent()

    def _unsent(self) -> str | None:
        """Why our last message failed, if it did: then nobody may ever answer."""
        if self._sent is None or not self._sent.done():
            return None
        try:
            self._sent.wait(0)
        except FabricError as error:
            return str(error)
        return None


class Decoder:
    """Asks prefillers for KV pages.

    The engine's messages belong to the decoder: nobody else may call ``engine.recv``. Any thread
    may call any method.

    Args:
        engine: an open engine, which must outlive the decoder.
        layout: how the pages lie; the prefiller's must be the same.
        pool: pages to fill, and the region that holds them.
        model: fingerprint of model and weights; the prefiller's must be the same.
        tail_bytes: length of the tail that follows the pages; 0 for none.
        max_requests: requests under way or arrived and not released, together.

    Raises:
        InvalidArgument: the pool's region is too small for its pages.
    """

    def __init__(
        self,
        engine: TransferEngine,
        layout: KvLayout,
        pool: PagePool,
        *,
        model: str = "",
        tail_bytes: int = 0,
        max_requests: int = 64,
    ) -> None:
        check_region(layout, pool)
        self.engine = engine
        self.layout = layout
        self.pool = pool
        self.model = model
        self.tail_bytes = tail_bytes
        self._tails = tail_pool(engine, tail_bytes, max_requests)
        self._max_requests = max_requests
        self._lock = threading.RLock()
        self._arrivals: dict[bytes, Arrival] = {}
        self._granted: set[Address] = set()  # who has keys of ours
        self._fencing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="kv-decoder", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Decoder [{len(self._arrivals)} requests, {self.pool!r}]>"

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prefiller: Address,
        prompt: Sequence[int] = (),
        *,
        payload: bytes = b"",
        pages: int | None = None,
        timeout: float = 30.0,
    ) -> Arrival:
        """Ask for the KV pages of a prompt. Does not wait for them.

        Args:
            prefiller: address of its engine.
            prompt: token ids.
            payload: bytes for the prefiller's application, opaque here.
            pages: how many pages to fill; as many as the prompt needs by default.
            timeout: seconds that the prefiller may take, and the default of ``Arrival.wait``.

        Raises:
            PoolExhausted: not enough free pages, or `max_requests` are under way.
            InvalidArgument: a field is out of its bounds, or the request is too large.
            QueueFull: the prefiller does not take its messages.
        """
        count = self.layout.pages_for(len(prompt)) if pages is None else pages
        with self._lock:
            if self._closing.is_set():
                raise EngineClosed("the decoder is closed")
            if len(self._arrivals) >= self._max_requests:
                raise PoolExhausted(f"{len(self._arrivals)} requests are under way")
            arrival = self._prepare(prefiller, prompt, payload, count, timeout)
        try:
            arrival._sent = self.engine.send(prefiller, arrival.request.to_bytes(), timeout=0)
        except BaseException:
            self._finish(arrival, None)  # never sent, so nobody writes
            raise
        return arrival

    def fence(self, prefiller: Address, timeout: float = FENCE_SECONDS) -> None:
        """End the session with a prefiller and free the pages of all requests to it.

        Needed where it is alive but does not answer; done by itself where it is gone.

        Args:
            prefiller: address of its engine.
            timeout: seconds for each of the two steps, the session's end and the keys'.

        Raises:
            FencePending, FenceUnsupported: its writes may still land. The pages are in
                quarantine; try again.
        """
        with self._fencing:
            self._fence(prefiller, timeout, "by this decoder")

    def _lost(self, arrival: Arrival, reason: str) -> None:
        """Fence a prefiller that is gone, once for all who find out."""
        with self._fencing:
            if not arrival._over.is_set():
                self._fence(arrival.prefiller, FENCE_SECONDS, reason)

    def _fence(self, prefiller: Address, timeout: float, reason: str) -> None:
        with self._lock:
            fenced = [a for a in self._arrivals.values() if a.prefiller == prefiller]
        try:
            self.engine.disconnect(prefiller, timeout)
            self._revoke(prefiller, timeout)
        except FabricError as error:
            for arrival in fenced:
                self._give_up(arrival, error)
            raise
        for arrival in fenced:
            if not arrival._is_complete():
                self._finish(arrival, RequestFailed(f"the prefiller was fenced: {reason}"))

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what is under way and stop.

        Args:
            timeout: seconds for all of it.

        Raises:
            WaitTimeout, FencePending, FenceUnsupported: a prefiller did not answer, or could not
                be fenced; its pages stay in quarantine.
        """
        end = time.monotonic() + timeout
        with self._lock:
            open_ = [a for a in self._arrivals.values() if a._state is not _State.ARRIVED]
        for arrival in open_:
            self._cancel(arrival, timeout=0)
        failure: FabricError | None = None
        for arrival in open_:
            try:
                arrival.cancel(max(SLICE_SECONDS, end - time.monotonic()))
            except FabricError as error:
                failure = error
        self._closing.set()
        self._thread.join()
        if self._tails is not None:
            self.engine.deregister(self._tails.region)
            self._tails = None
        if failure is not None:
            raise failure

    def _prepare(
        self,
        prefiller: Address,
        prompt: Sequence[int],
        payload: bytes,
        count: int,
        timeout: float,
    ) -> Arrival:
        with contextlib.ExitStack() as undo:
            pages = self.pool.take(count)
            undo.callback(self.pool.give_back, pages)
            slot = () if self._tails is None else self._tails.take(1)
            if self._tails is not None:
                undo.callback(self._tails.give_back, slot)
            counter = self.engine.counter()
            undo.callback(counter.close)
            request = Request(
                id=secrets.token_bytes(ID_BYTES),
                model=self.model,
                layout=self.layout,
                decoder=self.engine.address,
                kv=self.pool.region.descriptor_for(prefiller),
                capacity=self.pool.capacity,
                pages=pages,
                counter=counter.id,
                tail=None if self._tails is None else self._tails.region.descriptor_for(prefiller),
                tail_offset=slot[0] * tail_stride(self.tail_bytes) if slot else 0,
                tail_bytes=self.tail_bytes,
                prompt=tuple(prompt),
                payload=payload,
                budget_ms=max(1, round(timeout * 1000)),
            )
            arrival = Arrival(self, prefiller, request, counter, slot)
            self._arrivals[request.id] = arrival
            self._granted.add(prefiller)
            undo.pop_all()
        return arrival

    def _revoke(self, prefiller: Address, timeout: float) -> None:
        """Take back the prefiller's keys.

        A session can be opened again; without this, a prefiller that was only slow could then go
        on writing with the descriptors of requests whose pages are free.
        """
        if prefiller not in self._granted:
            return
        self.engine.deregister(self.pool.region.descriptor_for(prefiller), timeout)
        if self._tails is not None:
            self.engine.deregister(self._tails.region.descriptor_for(prefiller), timeout)
        self._granted.discard(prefiller)

    def _tail(self, slot: tuple[int, ...], size: int) -> memoryview:
        if self._tails is None:
            return memoryview(b"")
        start = slot[0] * tail_stride(size)
        return self._tails.region.numpy()[start : start + size].data.toreadonly()

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                sender, raw = self.engine.recv(timeout=IDLE_SECONDS)
            except WaitTimeout:
                continue
            except EngineClosed:
                return
            try:
                message = _answers.decode(raw)
            except WireError as error:
                log.warning("malformed message from %s: %s", sender, error)
                continue
            if isinstance(message, _answers.Ended):
                self._take(message)
            else:
                log.warning("a prefiller's address sent us a request: %s", sender)

    def _take(self, message: _answers.Ended) -> None:
        arrival = self._arrivals.get(message.id)
        if arrival is None or arrival._state is _State.ARRIVED:
            return  # late: everything was there, or was let go of
        log.info("%r: %s: %s", arrival, message.kind, message.reason)
        error: KvTransferError
        if message.kind == "refused":
            error = RequestRefused(message.field, message.reason)
        elif message.kind == "cancelled":
            error = RequestCancelled(message.reason)
        else:
            error = RequestFailed(message.reason)
        self._finish(arrival, error)

    def _cancel(self, arrival: Arrival, timeout: float) -> None:
        """Send the cancellation. Where that fails, waiting for the answer finds out why."""
        if arrival._state is _State.ARRIVED:
            raise InvalidArgument(f"cancel: {arrival!r}")
        if arrival._state is not _State.OVER:
            with contextlib.suppress(PeerUnreachable, QueueFull):
                raw = _answers.encode(_answers.Cancel(arrival.request.id))
                arrival._sent = self.engine.send(arrival.prefiller, raw, timeout=timeout)

    def _give_up(self, arrival: Arrival, error: FabricError | None = None) -> None:
        """Nobody waits any more, but writes may still land."""
        with self._lock:
            if arrival._state is _State.WAITING:
                arrival._state = _State.GIVEN_UP
                arrival._error = error
                self.pool.quarantine(arrival.pages)
                if self._tails is not None:
                    self._tails.quarantine(arrival._slot)

    def _finish(self, arrival: Arrival, error: FabricError | None) -> None:
        """Free the pages: nothing can land in them any more, and the caller is done with them."""
        with self._lock:
            state, arrival._state = arrival._state, _State.OVER
            if state is _State.OVER:
                return
            del self._arrivals[arrival.request.id]
            arrival._error = error
            quarantined = state is _State.GIVEN_UP
            (self.pool.restore if quarantined else self.pool.give_back)(arrival.pages)
            if self._tails is not None:
                (self._tails.restore if quarantined else self._tails.give_back)(arrival._slot)
            arrival._over.set()  # before the counter goes: its waiters look here
            arrival._counter.close()
