"""Processes that write into each other's memory for minutes, while others of them are killed.

Run as ``python -m tests.soak --help``. Some processes live to the end, the others are killed at
random and replaced by new ones that reuse nothing; some are stopped for a while; with ``--links``
the links of the SoftRoCE guest (tests/softroce/run) go down, lose, delay and reorder packets, too.
What the processes do and check is in tests/soak_node.py. It is checked here that

- every call returns within its timeout, and that who waits on a process that was killed is told
  in time; a run that hangs prints where all threads are;
- the processes that live have as many file descriptors, threads and shared mappings at the end as
  after the first seconds, no transfer, region or counter, and hardly more memory;
- nothing is left in /dev/shm, and no process ends that was not told to.

Prints figures. The exit status is 0 if every contract held.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fabric
from tests import commands, soak_links, soak_node
from tests.conftest import SETUPS
from tests.harness import Node, close_fork_servers, shared_memory, wait_until
from tests.scale import patient
from tests.soak_node import LONGEST_STOP, PEER_TIMEOUT
from tests.soak_tally import SLACK, STOPPED_NS, Tally, now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness import Pending

MODULES = ("tests.soak_node",)
SURVIVORS = 2
STOPPED_AT_ONCE = 2
MOST_VIOLATIONS = 20  # after so many the run ends
OVERDUE = 2 * SLACK  # how late a call may be before the run counts as hung
START_SECONDS = patient(20.0)  # of a process, from its fork until it takes part
GROWTH_MIB = 32.0  # of a process that lives, with a table of 1024 peers that fills meanwhile
LATE_GROWTH_MIB = 16.0  # of that, in the second half, if it began after SETTLED_SECONDS
SETTLED_SECONDS = 60.0
POOLS_MIB = {"tcp": 32.0}
"""What a process may grow besides: libfabric's pools of buffers follow the greatest number of
connections at one time, which takes about a minute (300 s of kills: 77 MiB at first, 96 after 13 s,
105 after a minute, and 110 to 116 from then on)."""
LEAK_MIB = {"tcp": 8 / 1024}
"""What a session may cost: libfabric 1.17 keeps 2 KiB of each endpoint that was closed, which makes
5.5 KiB of the heap (seen with 3000 peers that come and go one by one; native/tests/lsan.supp)."""
WARM_UP = 4.0  # seconds before the level of the start is taken


@dataclass
class Mortal:
    """A process that will be killed."""

    node: Node
    ready: Pending
    tally: Tally
    born: float
    stopped_at: float = 0.0
    go_on_at: float = 0.0


@dataclass
class Outcome:
    """What is known at the end of a run on one provider."""

    provider: str
    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


class Soak:
    """One run on one provider."""

    def __init__(self, provider: str, options: argparse.Namespace, folder: str) -> None:
        self.setup, self.options, self.folder = provider, options, folder
        self.provider, self.turns = SETUPS[provider]
        self.turns = options.nics or self.turns
        self.rng = random.Random(f"{options.seed} {provider}")
        self.outcome = Outcome(provider)
        self.places = Tally(folder, "killer").places
        self.mortals: list[Mortal] = []
        self.living: list[Node] = []
        self.killed: dict[str, float] = {}
        self.kills = self.stops = self.born = 0
        self.totals: dict[str, int] = {}
        self.log_offset = 0
        self.losses: list[dict[str, Any]] = []
        self.longest = 0.0
        self.disturber = soak_links.Disturber(options.links, options.seed)

    # ---- processes ----

    def node(self, name: str) -> tuple[Node, list[str] | None]:
        """Fork a process; returns it, and the NICs whose turn it is."""
        nics = self.turns[self.born % len(self.turns)]
        self.born += 1
        return Node(name, {"FABRIC_LOG_LEVEL": "error"}, MODULES), nics

    def settings(self) -> dict[str, Any]:
        """Return what every process is told."""
        return {
            "folder": self.folder,
            "seed": self.options.seed,
            "lines": self.options.lines,
            "corrupt": self.options.corrupt,
        }

    def start_mortal(self) -> None:
        """Start a process that is to be killed, without waiting until it takes part."""
        name = f"m{self.born}"
        node, nics = self.node(name)
        ready = node.start(soak_node.begin, self.provider, nics, name, self.settings())
        self.mortals.append(Mortal(node, ready, Tally(self.folder, name), now()))

    def start_survivors(self) -> None:
        """Start the processes that live to the end."""
        for number in range(SURVIVORS):
            node, nics = self.node(f"s{number}")
            self.living.append(node)
            address = node.call(soak_node.begin, self.provider, nics, node.name, self.settings())
            node.address = address

    def kill(self, mortal: Mortal) -> None:
        """SIGKILL a process, take its figures, and forget it."""
        name = mortal.node.name
        if not mortal.node.alive():
            self.violation(f"{name} ended by itself with {mortal.node.process.poll()}")
        self.killed[name] = now()
        mortal.node.kill()
        (self.places.roster / name).unlink(missing_ok=True)
        self.mortals.remove(mortal)
        self.kills += 1
        self.collect(mortal.tally)
        Path(self.folder, f"tally-{name}").unlink()

    def collect(self, tally: Tally) -> None:
        """Add a process's figures to those of all."""
        for name, value in tally.figures().items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.longest = max(self.longest, int(tally.cells[STOPPED_NS + 1]) / 1e9)

    def stop(self, mortal: Mortal) -> None:
        """SIGSTOP a process for a while."""
        mortal.node.freeze()
        mortal.stopped_at = now()
        mortal.go_on_at = now() + self.rng.uniform(0.05, LONGEST_STOP)
        self.stops += 1

    def go_on(self, mortal: Mortal) -> None:
        """Let a stopped process go on, which is told for how long it stood still; or kill it."""
        if self.rng.random() < 0.3:
            self.kill(mortal)
            self.start_mortal()
            return
        # A moment more than it will have been, as it may go on late.
        mortal.tally.cells[STOPPED_NS] += int((now() - mortal.stopped_at + 0.05) * 1e9)
        mortal.stopped_at = 0.0
        mortal.node.thaw()

    def strike(self) -> None:
        """Kill somebody and start a successor; or stop somebody."""
        ready = [m for m in self.mortals if m.ready.done() and not m.stopped_at]
        stopped = sum(bool(m.stopped_at) for m in self.mortals)
        if ready and stopped < STOPPED_AT_ONCE and self.rng.random() < self.options.stops:
            self.stop(self.rng.choice(ready))
            return
        if running := [m for m in self.mortals if not m.stopped_at]:
            self.kill(self.rng.choice(running))
            self.start_mortal()

    # ---- what is looked at all the time ----

    def violation(self, text: str) -> None:
        """Note that a contract does not hold."""
        print(f"soak: {self.setup}: VIOLATION: {text}", file=sys.stderr, flush=True)
        self.outcome.violations.append(text)

    def look(self) -> None:
        """Read the log, let stopped processes go on, and look for what hangs or has ended."""
        for mortal in list(self.mortals):
            if mortal.stopped_at and now() >= mortal.go_on_at:
                self.go_on(mortal)
        self.read_log()
        everyone = [(m.node, m.tally, m.stopped_at) for m in self.mortals]
        everyone += [(node, Tally(self.folder, node.name), 0.0) for node in self.living]
        for node, tally, stopped_at in everyone:
            if stopped_at:
                continue
            if not node.alive():
                raise HungError(f"{node.name} ended by itself with {node.process.poll()}")
            late = tally.overdue() - int(tally.cells[STOPPED_NS]) / 1e9
            if late > OVERDUE:
                raise HungError(f"{node.name}: a call is {late:.1f} s late")
        for mortal in self.mortals:
            if mortal.ready.done():
                continue
            if now() - mortal.born > START_SECONDS and not mortal.stopped_at:
                raise HungError(f"{mortal.node.name} does not take part")

    def read_log(self) -> None:
        """Take what the processes have written since."""
        with open(self.places.log) as log:
            log.seek(self.log_offset)
            for text in log:
                line = json.loads(text)
                if "violation" in line:
                    self.violation(f"{line['node']}: {line['violation']}")
                else:
                    self.losses.append(line)
            self.log_offset = log.tell()

    # ---- the run ----

    def phase(self, seconds: float) -> list[dict[str, Any]]:
        """Let all run and be killed for a time; returns what each survivor holds afterwards."""
        while len(self.mortals) < self.options.nodes - SURVIVORS:
            self.start_mortal()
        end, next_strike = now() + seconds, now() + self.options.kill_every
        self.disturber.start()
        while now() < end and len(self.outcome.violations) < MOST_VIOLATIONS:
            time.sleep(max(0.0, min(next_strike - now(), 0.05)))
            self.look()
            if now() >= next_strike:
                self.strike()
                # Where a strike takes longer than that, the next one waits for its turn.
                next_strike = max(next_strike + self.options.kill_every, now())
        self.disturber.stop()
        for mortal in list(self.mortals):
            self.kill(mortal)
        self.finish_survivors()
        return [node.call(soak_node.leftovers) for node in self.living]

    def finish_survivors(self) -> None:
        """Let the survivors come to an end, and see that they hold nothing and still work."""
        ends = [node.start(soak_node.finish_lines) for node in self.living]
        for end in ends:
            self.watched(end)
        for node in self.living:
            if held := self.watched(node.start(soak_node.finish)):
                self.violation(f"{node.name} still holds {held}")
            (self.places.roster / node.name).unlink()
        self.read_log()
        self.part()

    def watched(self, pending: Pending) -> Any:
        """Return what a command returns, and look for what hangs in the meantime."""
        deadline = now() + 2 * soak_node.finish_seconds()
        while not pending.done() and now() < deadline:
            time.sleep(0.05)
            self.look()
        return pending.result(1.0)

    def part(self) -> None:
        """See that no session is left, not even one with a process that died while it was idle.

        Nobody asks for those but when a session begins, so the survivors begin some.
        """
        deadline = now() + 2 * PEER_TIMEOUT + SLACK
        while True:
            self.talk()
            for node in self.living:
                node.call(disconnect_all, [other.address for other in self.living if other != node])
            time.sleep(PEER_TIMEOUT / 4)
            left = [node.stats()["peers_up"] for node in self.living]
            if not any(left):
                return
            if now() > deadline:
                self.violation(f"sessions with processes that are dead are still up: {left}")
                return

    def talk(self) -> None:
        """Check that the survivors get on with each other: each has fenced the other just now."""
        one, other = self.living[:2]
        for source, target in ((one, other), (other, one)):
            target.counter("hello", 5)
            deadline = now() + 2 * PEER_TIMEOUT + SLACK
            while (how := source.call(greet, target.address)) != "done":
                other_way = target.call(greet, source.address)
                if now() > deadline:
                    self.violation(f"{source.name} cannot reach {target.name}: {how}, {other_way}")
                    break
            target.call(commands.release, "hello")

    def run(self) -> Outcome:
        """Make the run; returns what came of it."""
        begin, shm = now(), shared_memory()
        try:
            self.start_survivors()
            levels = [self.phase(min(WARM_UP, self.options.seconds / 4))]
            for _ in range(2):
                for node in self.living:
                    node.call(soak_node.begin, self.provider, None, node.name, self.settings())
                levels.append(self.phase(self.options.seconds / 2))
            self.compare(levels)
        except (HungError, TimeoutError) as error:
            self.violation(f"{type(error).__name__}: {error}")
            self.dump()
        finally:
            self.disturber.stop()
            self.end()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not shared_memory() - shm, 5.0, "left in /dev/shm")
        if left := shared_memory() - shm:
            self.violation(f"left in /dev/shm: {left}")
        self.notices()
        self.report(now() - begin)
        return self.outcome

    def end(self) -> None:
        """End every process; those that live must leave cleanly."""
        for mortal in list(self.mortals):
            self.kill(mortal)
        for node in self.living:
            self.collect(Tally(self.folder, node.name))
            with contextlib.suppress(OSError):
                node.leave()
            try:
                if code := node.join():
                    self.violation(f"{node.name} left with status {code}")
            except TimeoutError:
                self.violation(f"{node.name} does not leave")
                node.kill()

    def dump(self) -> None:
        """Print where the threads of all processes are."""
        for node in [*(m.node for m in self.mortals), *self.living]:
            print(f"soak: threads of {node.name}:", file=sys.stderr, flush=True)
            node.thaw()
            node.signal(signal.SIGUSR1)
            time.sleep(0.3)  # or they would all be mixed up
            for task in sorted(Path(f"/proc/{node.pid}/task").glob("*")):
                with contextlib.suppress(OSError):
                    where = (task / "wchan").read_text(), (task / "syscall").read_text().strip()
                    print(f"soak:   {task.name}: {where}", file=sys.stderr, flush=True)

    # ---- figures ----

    def compare(self, levels: list[list[dict[str, Any]]]) -> None:
        """Compare what each survivor held at the start, in the middle, and at the end."""
        rows = []
        for node, (start, middle, end) in zip(self.living, zip(*levels, strict=True), strict=True):
            for name in ("fds", "threads", "shared mappings"):
                if not start[name] == middle[name] == end[name]:
                    self.violation(f"{node.name}: {name}: {start[name]} became {end[name]}")
            each = LEAK_MIB.get(self.provider, 0.0)
            memory = [
                level["resident MiB"] - each * level["sessions so far"]
                for level in (start, middle, end)
            ]
            most = GROWTH_MIB + POOLS_MIB.get(self.provider, 0.0)
            late = LATE_GROWTH_MIB if self.options.seconds / 2 > SETTLED_SECONDS else most
            if memory[2] - memory[0] > most or memory[2] - memory[1] > late:
                self.violation(f"{node.name}: its memory grew, in MiB: {memory}")
            rows.append([{**level, "fds": len(level["fds"])} for level in (start, middle, end)])
        self.outcome.figures["survivors"] = rows

    def notices(self) -> None:
        """See how long it took until those who waited on a process knew that it was dead."""
        times = []
        for line in self.losses:
            killed = self.killed.get(line["lost"], 0.0)
            if killed and line["at"] > killed and line["node"] not in self.killed:
                times.append((line["at"] - max(killed, line["begin"]), line))
        limit = (1.0 if self.provider == "local" else PEER_TIMEOUT) + SLACK
        for seconds, line in times:
            if seconds > limit:
                self.violation(f"{line} came {seconds:.1f} s after the kill")
        ordered = sorted(row[0] for row in times)
        self.outcome.figures["notices"] = len(ordered)
        self.outcome.figures["median"] = ordered[len(ordered) // 2] if ordered else 0.0
        self.outcome.figures["slowest"] = ordered[-1] if ordered else 0.0

    def report(self, seconds: float) -> None:
        """Print what happened."""
        t, f = self.totals, self.outcome.figures
        print(f"soak: {self.setup}: {seconds:.0f} s, seed {self.options.seed}")
        print(f"  kills {self.kills}, stops {self.stops}, processes {self.born}")
        if self.disturber.done:
            print(f"  links: {self.disturber.summary()}")
        print(f"  sessions {t['sessions']}, messages {t['messages']}")
        print(
            f"  transfers: {t['done']} done, {t['failed']} failed, {t['cancelled']} cancelled;"
            f" {t['sent_bytes'] / 1e9:.2f} GB sent"
        )
        print(
            f"  rounds: {t['rounds']}: {t['reached']} whole, {t['unreachable']} peer gone,"
            f" {t['void']} void, {t['fenced']} cut off, {t['late']} timed out,"
            f" {t['pending'] + t['quarantines']} in quarantine, {t['full']} not sent"
        )
        print(
            f"  bytes compared: {t['verified_bytes'] / 1e9:.3f} GB that a count had promised;"
            f" {t['partial']} transfers cut off between their first and their last byte"
        )
        print(
            f"  a death was noticed {f['notices']} times, after {f['median'] * 1e3:.0f} ms (median)"
            f" and {f['slowest'] * 1e3:.0f} ms (longest)"
        )
        print(f"  the longest that a call outlived its timeout: {self.longest * 1e3:.0f} ms")
        for number, rows in enumerate(f.get("survivors", ())):
            for name in rows[0]:
                print(f"  s{number}: {name}: {' -> '.join(f'{row[name]:.4g}' for row in rows)}")
        print(f"  violations: {len(self.outcome.violations)}", flush=True)


class HungError(Exception):
    """Something does not come to its end: the run is over."""


def greet(node: Any, address: bytes) -> str:
    """Raise an immediate at a peer, which lets it in again where it was fenced."""
    target = fabric.Address.from_bytes(address)
    return commands.end_of(node.engine.write_imm(target, 5, deadline=2 * PEER_TIMEOUT))


def disconnect_all(node: Any, addresses: list[bytes]) -> None:
    """Fence these peers, so that nothing of their sessions is left."""
    for address in addresses:
        node.engine.disconnect(fabric.Address.from_bytes(address), timeout=2 * PEER_TIMEOUT)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--providers", default="local,tcp", help=f"of {', '.join(SETUPS)} (default: local,tcp)")
    add("--seconds", type=float, default=300.0, help="on each provider (default: 300)")
    add("--kill-every", type=float, default=0.2, metavar="SECONDS", help="default: 0.2")
    add("--nodes", type=int, default=6, help=f"processes, {SURVIVORS} of which live (default: 6)")
    add("--lines", type=int, default=soak_node.LINES, help="transfers a process asks for at once")
    add("--stops", type=float, default=0.15, help="share of strikes that only stop (default: 0.15)")
    add("--links", default="", help="links to disturb, in the SoftRoCE guest: v0,v1")
    add("--nics", default="", help="of the processes in turns, such as rxe0+rxe1,rxe2+rxe3")
    add("--seed", type=int, default=None, help="of all choices (default: random, and printed)")
    add(
        "--corrupt",
        choices=["late", "count", "leak", "hang"],
        default="",
        help="break a contract on purpose: the run must fail",
    )
    options = parser.parse_args(arguments)
    if options.nodes <= SURVIVORS:
        parser.error(f"--nodes: more than {SURVIVORS} are needed")
    options.links = [name for name in options.links.split(",") if name]
    options.nics = [names.split("+") for names in options.nics.split(",") if names]
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on each provider; returns the exit status."""
    options = parse(arguments)
    # Read when the server starts that all are forked from. Each arena that threads are given makes
    # a process grow, until all are in use.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    print(f"soak: --seed {options.seed}", flush=True)
    violations = 0
    for provider in options.providers.split(","):
        # Whatever hangs in this process itself: its threads are printed, and their children die.
        limit = 3 * options.seconds + patient(180.0)
        faulthandler.dump_traceback_later(limit, exit=True)
        with tempfile.TemporaryDirectory(prefix="fabric-soak-") as folder:
            Tally(folder, "killer").places.make()
            violations += len(Soak(provider, options, folder).run().violations)
        faulthandler.cancel_dump_traceback_later()
    close_fork_servers()
    return 1 if violations else 0


if __name__ == "__main__":
    # Commands name functions of this module, which must be the same one here and there.
    from tests.soak import main as _main

    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    sys.exit(_main())
