"""Contenders under way: started together, run in turn for a slice each, ended together."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from others import QUIET_PROCESSORS, Others, wait_for_quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READY_SECONDS = 60
RUN_SECONDS = 30
"""What a slice may take beyond the seconds that were asked for."""
END_SECONDS = 15
QUIET_SECONDS = 60
"""How long a round waits for others to be quiet."""
ATTEMPTS = 4
"""Of each round, on average: one in which others were not quiet is played again. At the end those
that were disturbed the least are taken."""


class Failed(Exception):
    """A contender said why it cannot go on, or said nothing for too long."""


@dataclass(frozen=True)
class Entry:
    """A contender of a case.

    Attributes:
        name: column of the table.
        command: program and arguments, without the workload's.
        spins: its processes poll also when nothing runs: they are stopped while others have a turn.
    """

    name: str
    command: tuple[str, ...]
    spins: bool = False


@dataclass
class Outcome:
    """What became of a contender: its slices, or why there are none."""

    setup: str = ""
    slices: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""


class Process:
    """A contender's process, with its line protocol."""

    def __init__(self, entry: Entry, args: Sequence[str]) -> None:
        self.entry = entry
        self.outcome = Outcome()
        self.pids: list[int] = []
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.child = subprocess.Popen(
            [*entry.command, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
        )
        self.answers = bytearray()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the next line that it prints."""
        assert self.child.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            while b"\n" not in self.answers:
                if not selector.select(end - time.monotonic()) and time.monotonic() >= end:
                    raise Failed(f"no answer within {seconds:.0f} s")
                part = os.read(self.child.stdout.fileno(), 1 << 16)
                if not part:
                    raise Failed(self.last_words())
                self.answers += part
        line, _, self.answers = self.answers.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def last_words(self) -> str:
        """Return the last line of its stderr."""
        self.child.wait(END_SECONDS)
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self.child.returncode}"

    def await_ready(self) -> None:
        """Wait until it is set up and its bytes are verified."""
        message = self.answer(READY_SECONDS)
        self.outcome.setup, self.pids = message["ready"], message["pids"]
        self.pause()

    def pause(self) -> None:
        """Stop what would otherwise take the processors from the others."""
        for pid in self.pids if self.entry.spins else []:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        for pid in self.pids if self.entry.spins else []:
            os.kill(pid, signal.SIGCONT)

    def run(self, seconds: float) -> dict[str, Any]:
        """Give it a turn."""
        assert self.child.stdin is not None
        self.resume()
        try:
            self.child.stdin.write(f"run {seconds}\n".encode())
            self.child.stdin.flush()
            return self.answer(seconds + RUN_SECONDS)
        except BrokenPipeError:
            raise Failed(self.last_words()) from None
        finally:
            if self.child.poll() is None:
                self.pause()

    def close(self) -> None:
        """End it by the end of its stdin; by force where it does not end."""
        if self.child.poll() is None:
            self.resume()
        with contextlib.suppress(BrokenPipeError):
            self.child.communicate(timeout=END_SECONDS)
        if self.child.poll() is None:  # its target ends with it
            self.child.kill()
            self.child.wait()
        self.log.close()


@contextlib.contextmanager
def guarded(process: Process) -> Iterator[None]:
    """Keep why a contender failed; the others go on."""
    try:
        yield
    except Failed as failure:
        process.outcome.failure = str(failure)
        process.outcome.slices.clear()


def take_turns(processes: Sequence[Process], seconds: float) -> tuple[float, list[dict[str, Any]]]:
    """Run a slice of each; returns the processors of others, and what each of them did."""
    pids = [pid for process in processes for pid in process.pids]
    wait_for_quiet(pids, QUIET_SECONDS)
    others = Others(pids)
    results: list[dict[str, Any]] = []
    for process in processes:
        with guarded(process):
            results.append(process.run(seconds))
    return (others.processors(), results) if len(results) == len(processes) else (0.0, [])


def play(processes: Sequence[Process], rounds: int, seconds: float) -> float:
    """Play rounds until enough were quiet; returns the processors of others in the worst taken."""
    played: list[tuple[float, list[tuple[Process, dict[str, Any]]]]] = []
    for number in range(-1, rounds * ATTEMPTS):  # the first round is a warm-up
        going = [process for process in processes if not process.outcome.failure]
        order = going[:: 1 if number % 2 == 0 else -1]
        others, results = take_turns(order, seconds)
        if number >= 0 and results:
            played.append((others, list(zip(order, results, strict=True))))
        if sum(others <= QUIET_PROCESSORS for others, _ in played) == rounds:
            break
    best = sorted(played, key=lambda one: one[0])[:rounds]
    for _, pairs in best:
        for process, result in pairs:
            if not process.outcome.failure:
                process.outcome.slices.append(result)
    return best[-1][0] if best else 0.0


def compete(
    entries: Sequence[Entry], args: Sequence[str], rounds: int, seconds: float
) -> tuple[float, list[Outcome]]:
    """Run contenders in turn, a slice each, in reverse order every second round.

    Returns:
        Processors that others kept busy in the worst of these rounds, and what became of each.
    """
    processes: list[Process] = []
    try:
        for entry in entries:  # one after the other: some spin as soon as they are there
            processes.append(Process(entry, args))
            with guarded(processes[-1]):
                processes[-1].await_ready()
        disturbance = play(processes, rounds, seconds)
    finally:
        for process in processes:
            process.close()
    return disturbance, [process.outcome for process in processes]
