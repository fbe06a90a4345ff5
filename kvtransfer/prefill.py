"""The side that computes KV pages and writes them to decoders."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from fabric import (
    EngineClosed,
    FabricError,
    InvalidArgument,
    PeerUnreachable,
    WaitTimeout,
    WireError,
)

from . import _answers
from ._tails import check_region, tail_pool, tail_stride
from .errors import PoolExhausted, RequestCancelled, RequestFailed
from .plan import layer_write
from .request import Request

if TYPE_CHECKING:
    from types import TracebackType

    from fabric import Peer, Transfer, TransferEngine

    from .layout import KvLayout
    from .pool import PagePool

log = logging.getLogger(__name__)

#: How often the serving thread looks at its jobs while there are any, and while there are none.
BUSY_SECONDS = 0.005
IDLE_SECONDS = 0.2

TIME_IS_UP = "the request's time is up"


class PrefillJob:
    """One request that is being computed. Made by `Prefiller.next`; use it as a context manager.

    The computing thread fills the job's source pages and says so, layer by layer. Leaving the
    ``with`` block lets go of the pages, and fails the request where it was not finished; they
    return to the pool once no write reads them any more.

    Attributes:
        request: what the decoder asked for.
        pages: source pages in the prefiller's region, one for each of ``request.pages``.
    """

    def __init__(self, prefiller: Prefiller, request: Request) -> None:
        self.request = request
        self.pages: tuple[int, ...] = ()
        self._slot: tuple[int, ...] = ()
        self._prefiller = prefiller
        self._deadline = time.monotonic() + request.budget_ms / 1000
        self._announced = [0] * request.layout.layers
        self._transfers: collections.deque[Transfer] = collections.deque()
        self._posting = threading.Lock()  # held while posting; guards what is above
        self._stop: tuple[str, str] | None = None  # (kind, reason) of an end before the last byte
        self._cancelled_transfers = False
        self._finished = False
        self._let_go = False
        self._ended = threading.Event()  # nothing of this job is in flight, and nothing will be

    def __repr__(self) -> str:
        state = "ended" if self._ended.is_set() else "finishing" if self._finished else "running"
        if self._stop is not None:
            state += f", {self._stop[0]}: {self._stop[1]}"
        return f"<PrefillJob {self.request.id.hex()[:8]} [{len(self.pages)} pages, {state}]>"

    def __enter__(self) -> PrefillJob:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self.fail("the prefiller gave up" if error is None else repr(error))
        self._let_go = True
        self._prefiller._settle(self)

    def layer_ready(self, layer: int, pages: int | None = None) -> Transfer:
        """Start to write a layer's pages: those of the first `pages` that were not written yet.

        Args:
            layer: which layer.
            pages: how many pages from the request's start are final in this layer; all of them
                by default. A chunked prefill calls this with growing numbers.

        Returns:
            The transfer, for whoever wants to watch it. The job keeps it as well.

        Raises:
            InvalidArgument: no such layer, or fewer pages than were announced before.
            QueueFull: no room for the write in the request's time.
            RequestCancelled: the decoder withdrew the request. Stop computing.
            RequestFailed: a write failed or the time is up. Stop computing.
        """
        end = len(self.pages) if pages is None else pages
        if not 0 <= layer < len(self._announced):
            raise InvalidArgument(f"layer: {layer} is not one of {len(self._announced)}")
        with self._posting:
            self._check()
            first = self._announced[layer]
            if not first <= end <= len(self.pages):
                raise InvalidArgument(
                    f"pages: {end} of layer {layer}, where {first} of {len(self.pages)} were ready"
                )
            transfer = self._prefiller._write_layer(self, layer, first, end)
            self._announced[layer] = end
            self._transfers.append(transfer)
        return transfer

    def finish(self, tail: bytes | memoryview = b"") -> Transfer | None:
        """Write the tail; every layer has been announced. Does not wait for the writes.

        Args:
            tail: ``request.tail_bytes`` bytes.

        Returns:
            The tail's transfer, or None without a tail.

        Raises:
            InvalidArgument: a layer is missing, or the tail has another length.
            RequestCancelled, RequestFailed: as from `layer_ready`.
        """
        size = memoryview(tail).nbytes
        if size != self.request.tail_bytes:
            raise InvalidArgument(f"tail: {size} bytes, not {self.request.tail_bytes}")
        with self._posting:
            self._check()
            for layer, ready in enumerate(self._announced):
                if ready != len(self.pages):
                    raise InvalidArgument(
                        f"layer {layer}: {ready} of {len(self.pages)} pages are ready"
                    )
            transfer = self._prefiller._write_tail(self, tail) if size else None
            if transfer is not None:
                self._transfers.append(transfer)
            self._finished = True
        return transfer

    def fail(self, reason: str) -> None:
        """Stop the request: nothing more is written, and the decoder is told once that holds."""
        self._stop_with("failed", reason)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the request has ended: all of it is at the decoder, or none will follow.

        Args:
            timeout: seconds; the rest of the request's time by default.

        Raises:
            WaitTimeout: not yet.
            RequestCancelled, RequestFailed: it ended before its last byte.
        """
        end = self._deadline if timeout is None else time.monotonic() + timeout
        with self._posting:
            transfers = list(self._transfers) if self._finished else []
        for transfer in transfers:
            with contextlib.suppress(FabricError):  # how it ended is for _drained() to find
                transfer.wait(max(0.0, end - time.monotonic()))
        self._prefiller._settle(self)
        if not self._ended.wait(max(0.0, end - time.monotonic())):
            raise WaitTimeout(f"{self!r} has not ended")
        self._raise_stop()

    def _check(self) -> None:
        """Refuse to post more where the job is over; notice writes that failed."""
        while self._transfers and self._transfers[0].done():
            self._end_of(self._transfers.popleft())
        if time.monotonic() > self._deadline:
            self._stop_with("failed", TIME_IS_UP)
        self._raise_stop()
        if self._finished:
            raise InvalidArgument("the job is finished")

    def _limits(self) -> dict[str, float]:
        """What is left of the request's time, for the room in the queue and for the write."""
        left = max(0.001, self._deadline - time.monotonic())
        return {"timeout": left, "deadline": left}

    def _end_of(self, transfer: Transfer) -> None:
        try:
            transfer.wait(0)
        except PeerUnreachable as error:
            self._stop_with("unreachable", str(error))
        except FabricError as error:
            self._stop_with("failed", str(error))

    def _stop_with(self, kind: str, reason: str) -> None:
        with self._prefiller._lock:
            if self._stop is None and not self._ended.is_set():
                self._stop = (kind, reason)

    def _raise_stop(self) -> None:
        if self._stop is not None:
            kind, reason = self._stop
            raise RequestCancelled(reason) if kind == "cancelled" else RequestFailed(reason)

    def _drained(self) -> bool:
        """Whether no write of the job is outstanding and none will be posted. Never blocks."""
        if self._stop is None and time.monotonic() > self._deadline:
            self._stop_with("failed", TIME_IS_UP)
        if self._stop is None and not self._finished:
            return False
        if not self._posting.acquire(blocking=False):
            return False  # a layer is being posted; look again later
        try:
            if self._stop is not None and not self._cancelled_transfers:
                for transfer in self._transfers:
                    transfer.cancel()
                self._cancelled_transfers = True
            while self._transfers and self._transfers[0].done():
                self._end_of(self._transfers.popleft())
            return not self._transfers
        finally:
            self._posting.release()


class Prefiller:
    """Takes requests from decoders and writes what the computing thread makes of them.

    The engine's messages belong to the prefiller: nobody else may call ``engine.recv``. Requests
    are started in the order in which they came; one that needs more pages than are free waits,
    and those behind it with it.

    Args:
        engine: an open engine, which must outlive the prefiller.
        layout: how the pages lie. A request with another layout is refused.
        pool: source pages, and the region that holds them.
        model: fingerprint of model and weights. A request with another one is refused.
        tail_bytes: length of the tail that follows the pages; 0 for none.
        max_jobs: requests waiting, running and draining together. One more is refused.

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
        max_jobs: int = 64,
    ) -> None:
        check_region(layout, pool)
        self.engine = engine
        self.layout = layout
        self.pool = pool
        self.model = model
        self.tail_bytes = tail_bytes
        self.max_jobs = max_jobs
        self._tails = tail_pool(engine, tail_bytes, max_jobs)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: collections.deque[PrefillJob] = collections.deque()
        self._live: dict[bytes, PrefillJob] = {}  # started, not yet out of our hands
        self._sent: collections.deque[Transfer] = collections.deque(maxlen=1024)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-prefiller", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        with self._lock:
            return f"<Prefiller [{len(self._waiting)} waiting, {len(self._live)} live]>"

    def __enter__(self) -> Prefiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self, timeout: float | None = None) -> PrefillJob:
        """The next request, with source pages for it.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            WaitTimeout: there was none, or not enough pages for it.
            EngineClosed: the prefiller or its engine was closed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                if self._closing.is_set():
                    raise EngineClosed("the prefiller is closed")
                job = self._start()
                if job is not None:
                    return job
                left = IDLE_SECONDS if end is None else min(IDLE_SECONDS, end - time.monotonic())
                if left <= 0:
                    raise WaitTimeout(f"no request in {timeout} s")
                self._changed.wait(left)

    def close(self, timeout: float = 10.0) -> None:
        """Fail what is not finished, let it drain, tell the decoders.

        Args:
            timeout: seconds for all of it.

        Raises:
            WaitTimeout: a write is still reading source pages. They stay held.
        """
        end = time.monotonic() + timeout
        with self._changed:
            for job in [*self._waiting, *self._live.values()]:
                if not job._finished:
                    job.fail("the prefiller is closing")
            self._changed.notify_all()
        self._closing.set()
        self._thread.join(timeout)
        with self._lock:
            jobs = list(self._live.values())
        while not all(job._ended.is_set() for job in jobs) and time.monotonic() < end:
            self._settle_all()
            time.sleep(BUSY_SECONDS)
        if not all(job._ended.is_set() for job in jobs):
            raise WaitTimeout("a write is still reading source pages")
        for transfer in list(self._sent):
            with contextlib.suppress(FabricError):
                transfer.wait(max(0.0, end - time.monotonic()))
        if self._tails is not None:
            self.engine.deregister(self._tails.region)
            self._tails = None

    # ---- the computing thread

    def _start(self) -> PrefillJob | None:
        if not self._waiting:
            return None
        job = self._waiting[0]
        try:
            job.pages = self.pool.take(len(job.request.pages))
        except PoolExhausted:
            return None
        self._waiting.popleft()
        if self._tails is not None:
            job._slot = self._tails.take(1)  # never exhausted: one for each of max_jobs
        self._live[job.request.id] = job
        return job

    def _write_layer(self, job: PrefillJob, layer: int, first: int, end: int) -> Transfer:
        plan = layer_write(job.request, layer, job.pages, self.pool.capacity, first, end)
        return self.engine.write_pages(
            self.pool.region,
            job.request.kv,
            plan.src_rows,
            plan.dst_rows,
            page_bytes=plan.row_bytes,
            src_stride=plan.row_bytes,
            dst_stride=plan.row_bytes,
            src_offset=plan.src_offset,
            dst_offset=plan.dst_offset,
            imm=job.request.counter,
            **job._limits(),
        )

    def _write_tail(self, job: PrefillJob, tail: bytes | memoryview) -> Transfer:
        request = job.request
        assert self._tails is not None  # a request with a tail is refused where there is none
        assert request.tail is not None
        offset = job._slot[0] * tail_stride(self.tail_bytes)
        staged = self._tails.region.numpy()[offset : offset + request.tail_bytes]
        staged[:] = np.frombuffer(tail, dtype=np.uint8)
        return self.engine.write(
            self._tails.region,
            request.tail,
            src_offset=offset,
            dst_offset=request.tail_offset,
            length=request.tail_bytes,
            imm=request.counter,
            **job._limits(),
        )

    # ---- the serving thread

    def _serve(self) -> None:
        while not self._closing.is_set():
            busy = self._live or self._waiting
            try:
                sender, raw = self.engine.recv(timeout=BUSY_SECONDS if busy else IDLE_SECONDS)
            except WaitTimeout:
                pass
            except EngineClosed:
                self._closing.set()
                return
            else:
                self._take(sender, raw)
            self._settle_all()

    def _take(self, sender: Peer, raw: bytes) -> None:
        try:
            message = _answers.decode(raw)
        except WireError as error:
            log.warning("malformed message from %s: %s", sender, error)
            name = _answers.peek_id(raw)
            if name is not None:
                field, _, reason = str(error).partition(": ")
                self._answer(sender, _answers.Ended(name, "refused", field, reason))
            return
        if isinstance(message, Request):
            self._admit(message)
        elif isinstance(message, _answers.Cancel):
            self._cancel(sender, message.id)
        else:
            log.warning("a decoder's address sent us an answer: %s", sender)

    def _admit(self, request: Request) -> None:
        with self._changed:
            refusal = self._refusal(request)
            if refusal is None:
                self._waiting.append(PrefillJob(self, request))
                self._changed.notify_all()
        if refusal is not None:
            field, reason = refusal
            self._answer(request.decoder, _answers.Ended(request.id, "refused", field, reason))

    def _refusal(self, request: Request) -> tuple[str, str] | None:
        """Name of the field that speaks against the request, and why."""
        field = self.layout.difference(request.layout)
        if field is not None:
            ours, theirs = getattr(self.layout, field), getattr(request.layout, field)
            return f"layout.{field}", f"{ours} here, {theirs} asked for"
        if request.model != self.model:
            return "model", f"{self.model!r} here, {request.model!r} asked for"
        if request.tail_bytes != self.tail_bytes:
            return "tail_bytes", f"{self.tail_bytes} here, {request.tail_bytes} asked for"
        if len(request.pages) > self.pool.capacity:
            return "pages", f"{len(request.pages)}, more than the {self.pool.capacity} here"
        known = [job.request.id for job in self._waiting] + list(self._live)
        if request.id in known:
            return "id", "known already"
        if len(known) >= self.max_jobs or self._closing.is_set():
            return "load", f"{len(known)} requests already"
        return None

    def _cancel(self, sender: Peer, name: bytes) -> None:
        with self._lock:
            for job in [*self._waiting, *self._live.values()]:
                if job.request.id == name and not job._ended.is_set():
                    job._stop_with("cancelled", "the decoder withdrew the request")
                    return
        # Nothing of it is in flight: it was never taken, or has ended.
        self._answer(sender, _answers.Ended(name, "cancelled", "", "nothing was in flight"))

    def _settle_all(self) -> None:
        with self._lock:
            jobs = [*self._waiting, *self._live.values()]
        for job in jobs:
            self._settle(job)
        with self._lock:
            while self._sent and self._sent[0].done():
                self._sent.popleft()

    def _settle(self, job: PrefillJob) -> None:
        """Bring a job's end about as far as it goes now."""
        if not job._ended.is_set() and job._drained():
            with self._lock:
                first = not job._ended.is_set()
                job._ended.set()
            if first and job._stop is not None:
                self._tell(job, *job._stop)
        if job._ended.is_set():
            self._release(job)

    def _tell(self, job: PrefillJob, kind: str, reason: str) -> None:
        log.info("%r", job)
        if kind != "unreachable":
            self._answer(job.request.decoder, _answers.Ended(job.request.id, kind, "", reason))

    def _release(self, job: PrefillJob) -> None:
        """Return the pages of a job that has ended, once the computing thread let go of them."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job._let_go and self._live.pop(job.request.id, None) is not None:
                self.pool.give_back(job.pages)
                if self._tails is not None:
                    self._tails.give_back(job._slot)
                self._changed.notify_all()

    def _answer(self, address: Peer, message: _answers.Ended) -> None:
        try:
            self._sent.append(self.engine.send(address, _answers.encode(message), timeout=0))
        except FabricError as error:
            # The decoder's own time-out and fence cover a lost answer.
            log.warning("no answer to %s: %s", address, error)
