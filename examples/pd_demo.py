#!/usr/bin/env python3
"""Prefill in one process, decode in another, the KV cache moved by one-sided writes.

Runs a small Llama with seeded weights: the prefill process writes each layer's KV pages into the
decode process as soon as they exist, the decode process waits on a counter and generates, and this
process checks that the tokens equal those of an undivided run. Exit status: 0 equal, 1 not equal
or failed, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable


NEEDED = ("fabric", "kvtransfer", "torch", "transformers", "matplotlib", "msgpack", "numpy")

Event = dict[str, Any]


class DemoError(Exception):
    """The demo could not run; the text says why."""


class Worker:
    """One worker process. Its events go to the `Stage` that it belongs to.

    It is a fork of this one, which has imported torch and transformers by then: that takes most of
    the demo's time, and is done once and not three times.
    """

    def __init__(
        self, role: str, options: str, events: queue.Queue[Event], patience: float
    ) -> None:
        self.role = role
        self._events = events
        self._patience = patience
        self._ended = threading.Event()
        theirs, commands = os.pipe()
        reports, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become(role, options, theirs, write)
        os.close(theirs)
        os.close(write)
        self._commands = os.fdopen(commands, "w")
        self._reports = os.fdopen(reports)

    def listen(self) -> None:
        """Begin to read events, once every worker was forked: a fork takes no threads along."""
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, **command: object) -> None:
        """Send one command. A worker that is gone is noticed by its last event."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(json.dumps(command) + "\n")
            self._commands.flush()

    def kill(self) -> None:
        """End the process and do not wait for it."""
        if not self._ended.is_set():
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for the end of the process."""
        self._ended.wait(self._patience)

    def _read(self) -> None:
        for line in self._reports:
            self._events.put({"role": self.role, **json.loads(line)})
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        self._ended.set()  # from now on nobody kills what may be another process
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._events.put({"role": self.role, "event": "end", "text": f"ended, status {status}"})


def _become(role: str, options: str, commands: int, reports: int) -> NoReturn:
    """Turn this fork into a worker with its pipes as stdin and stdout, and with no others."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(commands, 0)
        os.dup2(reports, 1)
        os.closerange(3, 256)  # else a worker that came before would not see that we are gone
        import _pd_roles

        status = _pd_roles.main(role, options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class Stage:
    """Both workers, and what they say. One that says nothing for `patience` seconds is stuck."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.workers: list[Worker] = []
        self._events: queue.Queue[Event] = queue.Queue()
        self._kept: list[Event] = []

    def start(self, role: str, options: str) -> Worker:
        """Start a worker."""
        worker = Worker(role, options, self._events, self.patience)
        self.workers.append(worker)
        return worker

    def expect(self, worker: Worker, kind: str) -> Event:
        """The worker's next event of this kind; other good ones are kept for later.

        Raises:
            DemoError: a worker failed, died, or nobody said anything for `patience` seconds.
        """
        for event in self._kept:
            if (event["role"], event["event"]) == (worker.role, kind):
                self._kept.remove(event)
                return event
        while True:
            try:
                event = self._events.get(timeout=self.patience)
            except queue.Empty:
                raise DemoError(f"{worker.role}: nothing for {self.patience:.0f} s") from None
            if event["event"] in {"error", "end"}:
                raise DemoError(f"{event['role']}: {event['text']}")
            if (event["role"], event["event"]) == (worker.role, kind):
                return event
            self._kept.append(event)

    def leave(self) -> None:
        """Let the workers close their engines and end, the decoder first."""
        for worker in reversed(self.workers):
            worker.tell(leave=True)
            self.expect(worker, "bye")
            worker.wait()
            self._events.get(timeout=self.patience)  # its end

    def kill(self) -> None:
        """End the workers, whatever they are doing, and do not wait for them."""
        for worker in self.workers:
            worker.kill()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pd_demo.py", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--provider", choices=("local", "tcp", "verbs", "efa"), default="local")
    parser.add_argument("--layers", type=_number(1, 64), default=8, metavar="N")
    parser.add_argument("--prompt-tokens", type=_number(1, 8192), default=1024, metavar="N")
    parser.add_argument(
        "--requests", type=_number(1, 64), default=1, metavar="N", help="concurrent requests"
    )
    parser.add_argument("--new-tokens", type=_number(2, 1024), default=24, metavar="N")
    parser.add_argument("--seed", type=_number(0, 2**31 - 1), default=1, metavar="N")
    parser.add_argument(
        "--patience",
        type=_number(1, 3600),
        default=90,
        metavar="SECONDS",
        help="how long a silent process may be busy (default: 90)",
    )
    parser.add_argument("--timeline", type=Path, default=Path("pd_demo.png"), metavar="FILE.png")
    parser.add_argument(
        "--corrupt",
        action="store_true",
        help="flip the signs of one layer's V before it is sent: the check must fail",
    )
    options = parser.parse_args(arguments)
    if options.timeline.suffix != ".png":
        parser.error(f"argument --timeline: {options.timeline} does not end in .png")
    if not options.timeline.resolve().parent.is_dir():
        parser.error(f"argument --timeline: {options.timeline.parent} is not a folder")
    return options


def _number(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return number


def workload(options: argparse.Namespace) -> dict[str, int]:
    """The options that all processes share."""
    names = ("layers", "prompt_tokens", "requests", "new_tokens", "seed")
    return {name: getattr(options, name) for name in names}


def run(options: argparse.Namespace, stage: Stage) -> list[Event]:
    """Run the two processes; returns one event a request."""
    shared = json.dumps(
        {
            "provider": options.provider,
            "corrupt": options.corrupt,
            "patience": options.patience * 2 / 3,  # the worker knows better what it waited for
            "workload": workload(options),
        }
    )
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    import _pd_report  # noqa: F401  (with torch behind it: the workers have it then, too)

    prefill, decode = stage.start("prefill", shared), stage.start("decode", shared)
    for worker in stage.workers:
        worker.listen()
    address = stage.expect(prefill, "ready")["address"]
    stage.expect(decode, "ready")
    decode.tell(prefiller=address)
    seen: list[Event] = [{} for _ in range(options.requests)]
    for worker, kind in ((decode, "decoded"), (prefill, "prefilled")):
        for _ in seen:
            event = stage.expect(worker, kind)
            seen[event["request"]] |= event
    stage.leave()
    return seen


def report(options: argparse.Namespace, events: list[Event], started: float) -> int:
    """Compare with the undivided run, print, save the picture. Returns the exit status."""
    from _pd_model import Workload, undivided
    from _pd_report import EQUAL, Run, draw, print_runs, print_totals, verdict

    shape = Workload(**workload(options))
    model = shape.model()
    expected = [undivided(model, prompt, options.new_tokens) for prompt in shape.prompts()]
    names = [field.name for field in dataclasses.fields(Run)]
    runs = [Run(**{name: event[name] for name in names}) for event in events]
    print_runs(runs, expected)
    print()
    print_totals(runs)
    draw(runs, f"prefill -> decode, {described(options)}", options.timeline)
    print(f"timeline     {options.timeline}\n")
    wrong = [i for i, run in enumerate(runs) if verdict(run, expected[i]) != EQUAL]
    if wrong:
        print(f"FAILED: not as in the undivided run: request {', '.join(map(str, wrong))}.")
        return 1
    print(f"OK: all tokens equal the undivided run's. {time.monotonic() - started:.1f} s in all.")
    return 0


def described(options: argparse.Namespace) -> str:
    """The options in words."""
    requests = f"{options.requests} request{'s' if options.requests > 1 else ''}"
    return (
        f"{options.provider}: {options.layers} layers, {requests} of up to "
        f"{options.prompt_tokens} tokens, seed {options.seed}"
        f"{', CORRUPTED on purpose' if options.corrupt else ''}"
    )


def end_with_signals(stage: Stage) -> None:
    """On Ctrl-C or SIGTERM, end the workers and this process at once.

    Not by an exception: imports of large packages swallow those.
    """

    def end(number: int, _: object) -> None:
        stage.kill()
        os.write(2, b"\npd_demo.py: interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def main() -> int:
    """Run the demo; returns the exit status."""
    options = parse()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"pd_demo.py: not installed: {', '.join(missing)}; run make demo", file=sys.stderr)
        return 1
    print(f"prefill -> decode, {described(options)}\n", flush=True)
    stage = Stage(options.patience)
    end_with_signals(stage)
    started = time.monotonic()
    try:
        return report(options, run(options, stage), started)
    except DemoError as error:
        print(f"pd_demo.py: {error}", file=sys.stderr)
        return 1
    finally:
        stage.kill()
        for worker in stage.workers:
            worker.wait()


if __name__ == "__main__":
    sys.exit(main())
