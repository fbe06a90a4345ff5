"""A contender: two processes that move the same bytes with one library, and time it.

The skeleton that all share. A script defines a `Side` and calls `main` with it; run as
``PYTHON script.py --op OP --bytes N ...`` it starts its target as a process of its own, lets both
get to know each other, writes every slot once and has the target verify the bytes, and prints
``{"ready": ..., "pids": [...]}``. For each line ``run SECONDS`` on stdin it prints one of
``{"iters": n, "seconds": s, "bytes": b, "p50_us": x, "p99_us": y}``. At the end of stdin both
processes end. An error is one line on stderr and exit status 1.

It runs in the peers' virtual environments: the standard library and numpy, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from workload import OPS, WINDOW, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

clock = time.perf_counter_ns
PR_SET_PDEATHSIG = 1
END_SECONDS = 10


class Side:
    """One process of a contender. The same class is the initiator in one and the target in another.

    Attributes:
        memory: uint8 array of ``workload.memory_bytes``, zeroed, that the other side may write to.
        setup: how the library is set up, for the reader.
    """

    memory: Any
    setup: str

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        self.workload = workload
        self.options = options

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of this contender."""

    def describe(self) -> dict[str, Any]:
        """Return what the other side must know, as JSON holds it."""
        raise NotImplementedError

    def connect(self, other: dict[str, Any]) -> None:
        """Take what the other side said, and prepare whatever may be prepared beforehand."""
        raise NotImplementedError

    def post(self, slot: int) -> Any:
        """Begin to write one slot to the same slot of the target; returns what `wait` takes."""
        raise NotImplementedError

    def post_pages(self, call: int) -> Any:
        """Begin to write the pages ``workload.orders[call]``; returns what `wait_pages` takes."""
        raise NotImplementedError

    def wait(self, posted: Any) -> None:
        """Return when that write is complete at the target."""
        raise NotImplementedError

    def wait_pages(self, posted: Any) -> None:
        """Return when those pages are complete at the target."""
        self.wait(posted)

    def write(self, slot: int) -> None:
        """Write one slot, until it is complete at the target."""
        self.wait(self.post(slot))

    def write_pages(self, call: int) -> None:
        """Write the pages of a call, until all are complete at the target."""
        self.wait_pages(self.post_pages(call))

    def roundtrip(self, _: int) -> None:
        """Write slot 0 and notify; return when the other side, notified, wrote it to slot 1."""
        raise NotImplementedError

    def serve(self, running: Callable[[], bool]) -> None:
        """Do what the target's application has to, while the initiator runs: by default nothing."""

    def close(self) -> None:
        """Give everything back."""


class Link:
    """What the two processes tell each other: lines of JSON, and a flag in memory they share.

    The flag is for a target that polls its library: looking at it costs it nothing.
    """

    def __init__(self, connection: socket.socket, flag: int) -> None:
        self.flag = mmap.mmap(flag, mmap.PAGESIZE)
        self.stream = connection.makefile("rw", encoding="utf-8")
        connection.close()  # once the stream is, too
        os.close(flag)

    def send(self, **message: Any) -> None:
        """Tell the other process."""
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next message; an EOFError when the other process is gone."""
        line = self.stream.readline()
        if not line:
            raise EOFError("the other process of this contender is gone")
        message: dict[str, Any] = json.loads(line)
        return message

    def running(self) -> bool:
        """Whether the initiator runs its workload."""
        return self.flag[0] == 1

    def set_running(self, running: bool) -> None:
        """Say so; by the initiator."""
        self.flag[0] = running


def timed(step: Callable[[int], None], numbers: Iterator[int], end: int) -> tuple[int, list[int]]:
    """Do steps until it is `end`; returns how many, and the nanoseconds of each."""
    times = []
    before = clock()
    for number in numbers:
        step(number)
        after = clock()
        times.append(after - before)
        before = after
        if after >= end:
            break
    return len(times), times


def windowed(side: Side, numbers: Iterator[int], end: int) -> tuple[int, list[int]]:
    """Keep `WINDOW` writes in flight until it is `end`, and wait for them all."""
    flying: deque[Any] = deque()
    iters = 0
    for slot in numbers:
        if len(flying) == WINDOW:
            side.wait(flying.popleft())
        flying.append(side.post(slot))
        iters += 1
        if clock() >= end:
            break
    for posted in flying:
        side.wait(posted)
    return iters, []


def submitted(side: Side, numbers: Iterator[int], end: int) -> tuple[int, list[int]]:
    """Move pages until it is `end`, timing only what begins each transfer."""
    times = []
    for call in numbers:
        begin = clock()
        posted = side.post_pages(call)
        times.append(clock() - begin)
        side.wait_pages(posted)
        if clock() >= end:
            break
    return len(times), times


def percentiles_us(times: Sequence[int]) -> tuple[float | None, float | None]:
    """Return the median and the 99th percentile of nanoseconds, in microseconds."""
    if not times:
        return None, None
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    return round(float(p50), 3), round(float(p99), 3)


class Initiator:
    """The process that writes: it starts the other one, and does what stdin asks for."""

    def __init__(self, side: Side, link: Link) -> None:
        self.side = side
        self.link = link
        self.numbers = itertools.cycle(side.workload.iterations)

    def introduce(self) -> None:
        """Let both sides get to know each other."""
        self.side.memory[:] = self.side.workload.source()
        self.link.send(**self.side.describe())
        self.side.connect(self.link.receive())

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Have the target serve meanwhile."""
        self.link.set_running(True)
        self.link.send(do="serve")
        self.link.receive()
        yield
        self.link.set_running(False)
        self.link.receive()

    def steps(self, numbers: Iterator[int], end: int) -> tuple[int, list[int]]:
        """Run the workload until it is `end`; returns iterations and nanoseconds of each."""
        side, op = self.side, self.side.workload.op
        if op == "window":
            return windowed(side, numbers, end)
        if op == "submit":
            return submitted(side, numbers, end)
        step = {"write": side.write, "pages": side.write_pages, "roundtrip": side.roundtrip}[op]
        return timed(step, numbers, end)

    def verify(self) -> None:
        """Write every slot once, and have the target compare the bytes with what they must be."""
        workload = self.side.workload
        with self.served():
            self.steps(iter(workload.first_pass), sys.maxsize)
        self.link.send(do="verify")
        wrong = self.link.receive()["wrong"]
        if workload.op == "roundtrip":
            out, back = np.split(self.side.memory, 2)
            wrong += int(np.count_nonzero(out != back))
        if wrong:
            raise RuntimeError(f"{wrong} of {workload.memory_bytes} bytes did not arrive as sent")

    def run(self, seconds: float) -> dict[str, Any]:
        """Run the workload for about so many seconds."""
        with self.served():
            begin = clock()
            iters, times = self.steps(self.numbers, begin + int(seconds * 1e9))
            spent = (clock() - begin) / 1e9
        p50, p99 = percentiles_us(times)
        moved = iters * self.side.workload.call_bytes
        return {"iters": iters, "seconds": spent, "bytes": moved, "p50_us": p50, "p99_us": p99}


def serve_target(side: Side, link: Link) -> None:
    """Be the target, until the initiator is gone."""
    workload = side.workload
    link.send(**side.describe())
    side.connect(link.receive())
    with contextlib.suppress(EOFError):
        while True:
            todo = link.receive()["do"]
            if todo == "verify":
                expected = workload.expected()
                link.send(wrong=int(np.count_nonzero(expected != side.memory)))
                continue
            link.send(serving=True)
            side.serve(link.running)
            link.send(stopped=True)


@contextlib.contextmanager
def target_process() -> Iterator[tuple[Link, int]]:
    """Start this script once more, as the target; end it."""
    mine, theirs = socket.socketpair()
    flag = os.memfd_create("running")
    os.ftruncate(flag, mmap.PAGESIZE)
    fds = (theirs.fileno(), flag)
    command = [sys.executable, *sys.argv, "--target", ",".join(map(str, fds))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds)
    theirs.close()
    link = Link(mine, flag)
    try:
        yield link, process.pid
    finally:
        link.set_running(False)
        link.stream.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def protocol_stream() -> TextIO:
    """Return what was stdout; whatever else is printed there, by libraries, goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def obey(initiator: Initiator, answers: TextIO) -> None:
    """Do what stdin asks for, until it ends."""
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        try:
            seconds = float(rest)
        except ValueError:
            seconds = 0.0
        if word != "run" or not 0 < seconds < float("inf"):
            raise ValueError(f"stdin: 'run SECONDS' is needed, not {line.strip()!r}")
        print(json.dumps(initiator.run(seconds)), file=answers, flush=True)


def positive(text: str) -> int:
    """Parse an integer above zero, for argparse."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {(1 << 31) - 1}")
    return int(text)


def parse(side: type[Side], args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options of the skeleton and of one contender."""
    parser = argparse.ArgumentParser(
        description=sys.modules[side.__module__].__doc__,
        epilog="; ".join(f"{op}: {text}" for op, text in OPS.items()),
    )
    parser.add_argument("--op", choices=OPS, required=True, help="what is done, see below")
    parser.add_argument(
        "--bytes", type=positive, required=True, dest="nbytes", help="of one write or one page"
    )
    parser.add_argument("--pages", type=positive, help="of one call of pages or submit")
    parser.add_argument(
        "--cold", action="store_true", help="walk 256 MiB, not a memory as small as possible"
    )
    parser.add_argument("--target", help=argparse.SUPPRESS)
    side.add_options(parser)
    options = parser.parse_args(args)
    paged = options.op in ("pages", "submit")
    if paged != (options.pages is not None):
        parser.error(f"--op {options.op} {'needs' if paged else 'takes no'} --pages")
    if options.cold and options.op == "roundtrip":
        parser.error("--op roundtrip takes no --cold")
    return options


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def play(kind: type[Side], options: argparse.Namespace, answers: TextIO) -> None:
    """Be the target, or the initiator with a target of its own."""
    workload = Workload(options.op, options.nbytes, options.pages or 1, options.cold)
    end_with_parent()
    if options.target:
        connection, flag = map(int, options.target.split(","))
        link = Link(socket.socket(fileno=connection), flag)
        side = kind(workload, options)
        serve_target(side, link)
        side.close()
        return
    with target_process() as (link, pid):
        side = kind(workload, options)
        initiator = Initiator(side, link)
        initiator.introduce()
        initiator.verify()
        ready = {"ready": side.setup, "pids": [os.getpid(), pid]}
        print(json.dumps(ready), file=answers, flush=True)
        obey(initiator, answers)
        side.close()


def main(kind: type[Side]) -> int:
    """Be a contender; returns the exit status."""
    options = parse(kind)
    try:
        play(kind, options, protocol_stream())
    except (Exception, KeyboardInterrupt) as error:
        who = "target" if options.target else "initiator"
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{os.path.basename(sys.argv[0])}: {who}: {text}", file=sys.stderr, flush=True)
        return 1
    return 0
