"""The side that is written to: it counts, answers, and verifies."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import FabricError, WaitTimeout
from ._case import ROUND_TRIPS, VERIFIED, Case, wrong_pages
from ._ends import End, Set
from ._link import Link, field

if TYPE_CHECKING:
    from .._engine import TransferEngine
    from .._transfer import Transfer

NEVER = 1 << 40
"""A count that no case reaches."""
LOOK_SECONDS = 0.02
"""How often the connection is looked at while nothing arrives."""
END_SECONDS = 30.0
"""How long ranges that were acknowledged may take to be counted."""


class Server:
    """Serves one client after the other."""

    def __init__(self, settings: Set) -> None:
        self._settings = settings

    def serve_forever(self, listener: socket.socket) -> None:
        """Serve clients until interrupted; what one of them did wrong is printed."""
        while True:
            sock, where = listener.accept()
            print(f"client {where[0]}", file=sys.stderr)
            try:
                self.serve(Link(sock))
            except FabricError as error:
                print(f"client {where[0]}: {error}", file=sys.stderr)

    def serve(self, link: Link) -> None:
        """Serve one client until it says goodbye.

        Raises:
            FabricError: the client is gone, or something failed; it was told.
        """
        try:
            with self._settings.open() as engine:
                self._cases(link, engine)
        except FabricError as error:
            with contextlib.suppress(FabricError):  # it may be gone
                link.send("failed", why=str(error))
            raise
        finally:
            link.close()

    def _cases(self, link: Link, engine: TransferEngine) -> None:
        end: End | None = None
        try:
            while True:
                message = link.receive("case", "begin", "bye")
                if message["is"] == "bye":
                    return
                if message["is"] == "case":
                    if end is not None:
                        end.close()
                    end = End(engine, Case.unpack(message.get("case")), self._settings.foreign)
                    end.meet(message)
                    activity = Activity(end)
                    link.send("offer", **end.offer())
                    link.patient()  # from now on it may do something else between two runs
                elif end is not None:
                    link.send("begun")
                    activity.until(link.waiting)
                    link.send("ended", wrong=activity.finish(link.receive("end")))
        finally:
            if end is not None:
                end.close()


class Activity:
    """What the server does for one case while its client is at work."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._seen = 0
        self._last: Transfer | None = None

    def until(self, over: Callable[[], bool]) -> None:
        """Do it until `over` says so at a moment when nothing arrives."""
        step = self._messages if self._end.case.op == "messages" else self._counts
        if self._end.case.op in ROUND_TRIPS:
            step = self._answers
        while not over():
            step()

    def _counts(self) -> None:
        try:
            self._end.counter.wait(NEVER, timeout=LOOK_SECONDS)
        except WaitTimeout:
            return

    def _answers(self) -> None:
        end, back, wait = self._end, self._answer(), self._end.counter.wait
        try:
            while True:
                wait(self._seen + 1, timeout=LOOK_SECONDS)
                self._seen += 1
                self._last = back()
        except WaitTimeout:
            if self._last is not None:
                self._last.wait(end.case.nbytes / 1e6 + END_SECONDS)

    def _answer(self) -> Callable[[], Transfer]:
        end = self._end
        engine, region, far, imm = end.engine, end.region, end.far, end.far_id
        if end.case.op == "barrier":
            return lambda: engine.barrier((end.address,), imm)
        nbytes = end.case.nbytes
        return lambda: engine.write(region, far, length=nbytes, imm=imm)

    def _messages(self) -> None:
        try:
            while True:
                self._end.engine.recv(timeout=LOOK_SECONDS)
                self._seen += 1
        except WaitTimeout:
            return

    def finish(self, message: dict[str, Any]) -> int:
        """Wait for all that the client did; returns how many pages are found to be wrong.

        Raises:
            WaitTimeout: something that was acknowledged has not been counted.
        """
        end, ranges = self._end, field(message, "ranges", int)
        if end.case.op == "messages":
            while self._seen < ranges:
                end.engine.recv(timeout=END_SECONDS)
                self._seen += 1
            return 0
        end.counter.wait(ranges, timeout=END_SECONDS)
        checked = end.case.check and end.case.op in VERIFIED
        return wrong_pages(end.case, end.words(), ranges) if checked else 0
