"""What a process of tests/soak.py leaves behind even if it is killed: its figures, and a log.

The figures are a mapped file of 64-bit integers for each process, so that the killer can read them
afterwards, and see in the meantime which call of which thread should have returned by now.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.scale import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

SLACK = patient(3.0)
"""By how many seconds a call may outlive its timeout: the machine has few cores, and others."""

FIGURES = (
    "rounds",  # that a receiver began
    "reached",  # counts that came whole, whose bytes were then compared
    "fenced",  # peers that were cut off in the middle on purpose
    "unreachable",  # waits that ended with PeerUnreachable
    "void",  # ... with CounterVoid
    "late",  # ... with WaitTimeout
    "pending",  # ... with FencePending
    "full",  # requests for which there was no room
    "quarantines",  # memory set aside as a fence was pending
    "partial",  # transfers that were cut off after some of their bytes had come
    "verified_bytes",  # that a count had promised, and that were compared
    "done",  # transfers, as their sender saw them
    "failed",
    "cancelled",
    "sent_bytes",  # of those done
    "messages",
    "deregistered",
    "sessions",
)
STOPPED_NS = len(FIGURES)  # written by the killer: how long the process stood still
LONGEST_NS = STOPPED_NS + 1  # by which a call outlived its timeout
CALLS = LONGEST_NS + 1  # when each thread's call must have returned; 0: it is in none
THREADS = 16
SIZE = CALLS + THREADS


def now() -> float:
    """Return CLOCK_MONOTONIC, which all processes of a machine share."""
    return time.monotonic()


@dataclass
class Places:
    """Where the processes of one run keep what they share."""

    folder: str

    @property
    def roster(self) -> Path:
        """The folder with the address of every process that is ready, each in a file."""
        return Path(self.folder) / "roster"

    @property
    def log(self) -> Path:
        """The file that all append to."""
        return Path(self.folder) / "log"

    def make(self) -> None:
        """Make what is there at the start."""
        self.roster.mkdir(parents=True)
        self.log.touch()


class Tally:
    """The figures of one process, and its hand on the log."""

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.places = Places(folder)
        path = Path(folder) / f"tally-{name}"
        if not path.exists():
            path.write_bytes(bytes(8 * SIZE))
        self.cells: Any = np.memmap(path, np.int64, "r+", shape=(SIZE,))
        self.lock = threading.Lock()
        self.threads: dict[int, int] = {}

    def add(self, figure: str, amount: int = 1) -> None:
        """Add to a figure."""
        with self.lock:
            self.cells[FIGURES.index(figure)] += amount

    def put(self, figure: str, value: int) -> None:
        """Set a figure."""
        self.cells[FIGURES.index(figure)] = value

    def figures(self) -> dict[str, int]:
        """Return all figures by name."""
        return {name: int(self.cells[index]) for index, name in enumerate(FIGURES)}

    def write(self, **line: Any) -> None:
        """Append a line to the log: at once, as this process may be killed at any moment."""
        text = json.dumps({"node": self.name, "at": now(), **line}) + "\n"
        fd = os.open(self.places.log, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def violation(self, text: str) -> None:
        """Report that a contract does not hold."""
        self.write(violation=text)

    def stopped(self) -> float:
        """Return for how many seconds this process stood still so far."""
        return int(self.cells[STOPPED_NS]) / 1e9

    @contextlib.contextmanager
    def bounded(self, what: str, seconds: float) -> Iterator[None]:
        """Check that the calls in the block return within their timeout.

        The killer sees one that does not return at all by `overdue`.
        """
        with self.lock:
            cell = CALLS + self.threads.setdefault(threading.get_ident(), len(self.threads))
        begin, stood = now(), self.stopped()
        self.cells[cell] = int((begin + seconds) * 1e9)
        try:
            yield
        finally:
            self.cells[cell] = 0
            over = now() - begin - (self.stopped() - stood) - seconds
            if over * 1e9 > self.cells[LONGEST_NS]:
                self.cells[LONGEST_NS] = int(over * 1e9)
            if over > SLACK:
                self.violation(f"{what} took {over:.1f} s longer than its {seconds:.1f} s")

    def overdue(self) -> float:
        """Return by how many seconds the worst call that has not returned is late."""
        ends = [int(cell) for cell in self.cells[CALLS:] if cell]
        return now() - min(ends) / 1e9 if ends else 0.0
