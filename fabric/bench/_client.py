"""The side that writes: it runs a case for some seconds at a time."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import FabricError
from .._transfer import Transfer
from ._case import ROUND_TRIPS, Case
from ._ends import End
from ._result import Result, microseconds

if TYPE_CHECKING:
    from .._engine import TransferEngine
    from ._link import Link

END_SECONDS = 60.0
"""How long one iteration may take."""
SAMPLES = 200_000
"""Latencies of one run that are kept: the first ones."""

Call = Callable[[], Transfer]


class Client:
    """A case, set up on both sides.

    Raises:
        FabricError: the server refuses, or something fails.
    """

    def __init__(self, link: Link, engine: TransferEngine, case: Case) -> None:
        self._link = link
        self._end = end = End(engine, case)
        link.send("case", case=case.pack(), **end.offer())
        end.meet(link.receive("offer"))
        if case.check:
            end.paint()
        self._call = self._calls()
        self._calls_made = 0
        self._answered = 0

    def close(self) -> None:
        """Give back this side's memory."""
        self._end.close()

    def run(self, seconds: float = 0.0, iters: int = 0) -> Result:
        """Run for so many seconds, or so many iterations, and let the server check what came.

        Raises:
            FabricError: a transfer failed, the server found something wrong, or is gone.
        """
        self._link.send("begin")
        self._link.receive("begun")
        result = Result()
        until = time.perf_counter_ns() + int(seconds * 1e9) if seconds else None
        loop = self._round_trips if self._end.case.op in ROUND_TRIPS else self._one_way
        loop(result, until, iters)
        self._link.send("end", ranges=self._calls_made * self._end.case.call_pages)
        wrong = self._link.receive("ended")["wrong"]
        if wrong:
            raise FabricError(f"{wrong} pages at the receiver are not what was sent")
        return result

    # ---- one iteration ----

    def _calls(self) -> Call:
        end, case = self._end, self._end.case
        engine, imm = end.engine, end.far_id
        if case.op == "messages":
            payload = bytes(case.nbytes)
            return lambda: engine.send(end.address, payload)
        if case.op == "imm":
            return lambda: engine.write_imm(end.address, imm)
        if case.op == "barrier":
            return lambda: engine.barrier((end.address,), imm)
        if case.op == "scatter":
            return self._scatter_calls()
        if case.op == "pages" or case.call_pages > 1:
            return self._page_calls()
        return self._write_calls()

    def _write_calls(self) -> Call:
        end, nbytes = self._end, self._end.case.nbytes
        write, region, far, imm = end.engine.write, end.region, end.far, end.far_id
        size, at = end.case.size, 0

        def call() -> Transfer:
            nonlocal at
            offset = at
            at = at + nbytes if at + nbytes < size else 0
            return write(region, far, src_offset=offset, dst_offset=offset, length=nbytes, imm=imm)

        return call

    def _page_calls(self) -> Call:
        end, count = self._end, self._end.case.call_pages
        write, region, far, imm = end.engine.write_pages, end.region, end.far, end.far_id
        nbytes = end.case.nbytes
        sources, destinations = end.case.order(0), end.case.order(1)
        batches = [
            (sources[at : at + count].copy(), destinations[at : at + count].copy())
            for at in range(0, len(sources), count)
        ]
        turn = 0

        def call() -> Transfer:
            nonlocal turn
            source, destination = batches[turn]
            turn = turn + 1 if turn + 1 < len(batches) else 0
            return write(region, far, source, destination, page_bytes=nbytes, imm=imm)

        return call

    def _scatter_calls(self) -> Call:
        end, count, nbytes = self._end, self._end.case.call_pages, self._end.case.nbytes
        places = list(zip(end.case.order(0).tolist(), end.case.order(1).tolist(), strict=True))
        rows = [(end.far, s * nbytes, d * nbytes, nbytes) for s, d in places]
        batches = [rows[at : at + count] for at in range(0, len(rows), count)]
        turn = 0

        def call() -> Transfer:
            nonlocal turn
            batch = batches[turn]
            turn = turn + 1 if turn + 1 < len(batches) else 0
            return end.engine.scatter(end.region, batch, imm=end.far_id)

        return call

    # ---- loops ----

    def _one_way(self, result: Result, until: int | None, iters: int) -> None:
        call, window, now = self._call, self._end.case.window, time.perf_counter_ns
        under_way: collections.deque[tuple[Transfer, int]] = collections.deque()
        submits: list[int] = []
        latencies: list[int] = []
        begin = clock = now()
        while (clock < until) if until else (result.iters < iters):
            before = now()
            transfer = call()
            if len(submits) < SAMPLES:
                submits.append(now() - before)
            under_way.append((transfer, before))
            result.iters += 1
            self._calls_made += 1
            if len(under_way) == window:
                clock = self._take(under_way, latencies)
        while under_way:
            clock = self._take(under_way, latencies)
        self._fill(result, clock - begin, latencies, submits)

    def _take(self, under_way: Any, latencies: list[int]) -> int:
        transfer, before = under_way.popleft()
        transfer.wait(END_SECONDS)
        clock = time.perf_counter_ns()
        if len(latencies) < SAMPLES:
            latencies.append(clock - before)
        return clock

    def _round_trips(self, result: Result, until: int | None, iters: int) -> None:
        call, wait, now = self._call, self._end.counter.wait, time.perf_counter_ns
        latencies: list[int] = []
        transfer = None
        begin = clock = now()
        while (clock < until) if until else (result.iters < iters):
            before = clock
            transfer = call()
            result.iters += 1
            self._calls_made += 1
            wait(self._answered + result.iters, END_SECONDS)
            clock = now()
            if len(latencies) < SAMPLES:
                latencies.append(clock - before)
        self._answered += result.iters
        if transfer is not None:
            transfer.wait(END_SECONDS)
        self._fill(result, clock - begin, latencies, [])

    def _fill(self, result: Result, spent: int, latencies: list[int], submits: list[int]) -> None:
        result.seconds = spent / 1e9
        result.nbytes = result.iters * self._end.case.payload
        result.p50_us = microseconds(latencies, 0.5)
        result.p99_us = microseconds(latencies, 0.99)
        result.p999_us = microseconds(latencies, 0.999)
        result.submit_us = microseconds(submits, 0.5)
