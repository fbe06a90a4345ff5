"""llm-fabric beside NIXL and Mooncake, on this machine, by turns; `make bench-peers` runs it.

All contenders of a case are set up at once, and run in slices in turn, so that whatever else the
machine does meets them all; rounds in which other processes did much are repeated. Ratios are
medians over the rounds of what ours did in a round by what theirs did in the same: above 1 ours is
faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from others import QUIET_PROCESSORS
from slices import Entry, Outcome, compete

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / "build" / "peers"
KIB, MIB = 1 << 10, 1 << 20


def fabric_entry(provider: str, name: str = "", *options: str) -> Entry:
    """Ours."""
    script = str(HERE / "fabric_contender.py")
    command = (sys.executable, script, "--provider", provider, *options)
    return Entry(f"llm-fabric, {provider}{name}", command)


def nixl_entry(name: str, *options: str) -> Entry:
    """A variant of NIXL; its progress thread polls all the time."""
    python, script = str(PEERS / "nixl" / "bin" / "python"), str(HERE / "nixl_contender.py")
    return Entry(name, (python, script, *options), spins="on" in options)


MOONCAKE = Entry(
    "Mooncake, tcp",
    (str(PEERS / "mooncake" / "bin" / "python"), str(HERE / "mooncake_contender.py")),
)
TCP = ("--tls", "tcp,self")
FIELDS = {
    "host": [
        fabric_entry("local"),
        nixl_entry("NIXL, progress thread", "--progress", "on"),
        nixl_entry("NIXL, no thread", "--progress", "off"),
        nixl_entry("NIXL, no thread, errors none", "--progress", "off", "--errors", "none"),
        MOONCAKE,
    ],
    "tcp": [
        fabric_entry("tcp"),
        fabric_entry("tcp", ", target polls", "--poll"),
        nixl_entry("NIXL, tcp, progress thread", "--progress", "on", *TCP),
        nixl_entry("NIXL, tcp, no thread", "--progress", "off", *TCP),
        nixl_entry(
            "NIXL, tcp, no thread, errors none", "--progress", "off", "--errors", "none", *TCP
        ),
        MOONCAKE,
    ],
}
"""Who meets whom: whatever one host offers, and TCP over loopback. The first is ours."""


@dataclass(frozen=True)
class Case:
    """A workload, one row of each table."""

    op: str
    nbytes: int
    pages: int = 0
    cold: bool = False

    @property
    def title(self) -> str:
        """What the row is called."""
        size = f"{self.nbytes // MIB} MiB" if self.nbytes >= MIB else f"{self.nbytes // KIB} KiB"
        size = size if self.nbytes >= KIB else f"{self.nbytes} B"
        number = f"{self.pages} x " if self.pages else ""
        return f"{self.op} {number}{size}{', cold' if self.cold else ''}"

    @property
    def args(self) -> list[str]:
        """Arguments of a contender."""
        pages = ["--pages", str(self.pages)] if self.pages else []
        cold = ["--cold"] if self.cold else []
        return ["--op", self.op, "--bytes", str(self.nbytes), *pages, *cold]

    @property
    def by_time(self) -> bool:
        """Whether the median time counts, not the rate."""
        return self.op in ("roundtrip", "submit")

    def speed(self, result: dict[str, Any]) -> float:
        """Return what is compared: more is better."""
        if self.by_time:
            return 1e6 / float(result["p50_us"])
        return float(result["bytes"] / result["seconds"])

    def text(self, slices: Sequence[dict[str, Any]]) -> str:
        """Return the medians of a contender's slices."""
        p50, p99 = (
            median(s[key] for s in slices) if slices[0][key] else None
            for key in ("p50_us", "p99_us")
        )
        if self.by_time:
            mean = median(s["seconds"] / s["iters"] * 1e6 for s in slices)
            more = f"mean {time_text(mean)}, " if self.op == "roundtrip" else ""
            return f"{time_text(p50)} ({more}p99 {time_text(p99)})"
        rate = f"{median(map(self.speed, slices)) / 1e9:.3g} GB/s"
        return f"{rate} ({time_text(p50)})" if self.op == "write" else rate


NOTES = """\
- Complete means complete at the target: llm-fabric `Transfer.wait`, NIXL DONE (UCX flushes),
  Mooncake an acknowledgement of its TCP transport. Before anything was timed, each target verified
  its bytes.
- cold: 256 MiB are walked; otherwise memory is as small as the operation allows.
- submit: the call or calls that begin the transfer. On one host llm-fabric and NIXL copy all or
  part of the bytes in them.
- roundtrip: llm-fabric counts a write's immediate; NIXL sends a notification after the transfer;
  Mooncake has none but a message to the peer's handshake port. The peers poll for theirs.
- Without NIXL's progress thread both its processes poll all the time, as they must; with it the
  threads do, and are stopped while others have their turns. llm-fabric's target sleeps where it is
  not said to poll.
- The peers' memory is numpy's, which has huge pages where the kernel gives some; llm-fabric's comes
  from `alloc`, without."""


def time_text(microseconds: float | None) -> str:
    """Return a time of three digits, with its unit."""
    if microseconds is None:
        return "?"
    if microseconds < 1e3:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1e3:.3g} ms"


CASES = [
    *(Case("write", n) for n in (4 * KIB, 64 * KIB, MIB)),
    *(Case("write", n, cold=True) for n in (64 * KIB, MIB, 32 * MIB)),
    *(Case("window", n) for n in (4 * KIB, 64 * KIB, MIB)),
    *(Case("pages", n, pages=1024, cold=True) for n in (4 * KIB, 16 * KIB, 64 * KIB)),
    Case("roundtrip", 8),
    *(Case("submit", 16 * KIB, pages=n, cold=True) for n in (1, 64, 1024)),
]


def ratio(case: Case, ours: Outcome, theirs: Outcome) -> float | None:
    """Return the median over the rounds of our speed by theirs."""
    if not ours.slices or not theirs.slices:
        return None
    pairs = zip(ours.slices, theirs.slices, strict=True)
    return median(case.speed(mine) / case.speed(other) for mine, other in pairs)


class Table:
    """Markdown, printed row by row, and what stands below it."""

    def __init__(self, title: str, entries: Sequence[Entry]) -> None:
        self.notes: list[str] = []
        print(f"\n| {title} |", " | ".join(entry.name for entry in entries), "|")
        print("|---" * (len(entries) + 1) + "|", flush=True)

    def cell(self, case: Case, ours: Outcome, outcome: Outcome) -> str:
        """Return what a contender did, and how many times as fast ours was."""
        if outcome.failure:
            self.notes.append(f"{case.title}: {outcome.failure}")
            return f"none [{len(self.notes)}]"
        text = case.text(outcome.slices)
        times = None if outcome is ours else ratio(case, ours, outcome)
        return text if times is None else f"{text}, x{times:.2f}"

    def row(self, case: Case, outcomes: Sequence[Outcome], others: float) -> None:
        """Print a case."""
        title = case.title
        if others > QUIET_PROCESSORS:
            self.notes.append(f"{title}: other processes kept up to {others:.1f} CPUs busy")
            title += f" [{len(self.notes)}]"
        cells = [self.cell(case, outcomes[0], outcome) for outcome in outcomes]
        print(f"| {title} |", " | ".join(cells), "|", flush=True)

    def end(self, setups: dict[str, str]) -> None:
        """Print how the contenders were set up, and why some did not run."""
        print()
        for name, setup in setups.items():
            print(f"- {name}: {setup}")
        for number, note in enumerate(self.notes, 1):
            print(f"- [{number}] {note}")


def machine() -> str:
    """Say where and when this was measured."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else model
    now = datetime.datetime.now().astimezone()
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    kernel, python = platform.release(), platform.python_version()
    return (
        f"{now:%Y-%m-%d %H:%M}, {os.cpu_count()} CPUs ({model}), Linux {kernel},"
        f" Python {python}; load average {load}"
    )


def bench(field: str, cases: Sequence[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cases of one table; returns everything that was measured."""
    entries, records, setups = FIELDS[field], [], {}
    title = {"host": "on one host", "tcp": "TCP on loopback"}[field]
    table = Table(title, entries)
    for case in cases:
        others, outcomes = compete(entries, case.args, options.rounds, options.seconds)
        table.row(case, outcomes, others)
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome.setup:
                setups[entry.name] = outcome.setup
            times = ratio(case, outcomes[0], outcome)
            named = {"field": field, "case": case.title, "contender": entry.name, "ratio": times}
            records.append({**named, "others": others, **asdict(outcome)})
    table.end(setups)
    return records


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all slices there as well")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cases whose 'table: row' contains TEXT"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (9)")
    parser.add_argument("--seconds", type=float, help="of a turn (0.3)")
    parser.add_argument("--quick", action="store_true", help="3 turns of 0.1 s")
    options = parser.parse_args(args)
    if options.rounds is None:
        options.rounds = 3 if options.quick else 9
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 0.3
    if options.rounds < 1 or not 0 < options.seconds <= 60:
        parser.error("--rounds from 1, --seconds above 0 and up to 60 are needed")
    options.cases = {field: [] for field in FIELDS}
    for field, cases in options.cases.items():
        for case in CASES:
            name = f"{field}: {case.title}"
            if not options.only or any(text in name for text in options.only):
                cases.append(case)
    if not any(options.cases.values()):
        parser.error(f"no case contains {' or '.join(map(repr, options.only))}")
    return options


def main() -> int:
    """Run the benchmark; returns the exit status."""
    options = parse()
    missing = [name for name in ("nixl", "mooncake") if not (PEERS / name / "bin/python").exists()]
    if missing:
        print(f"bench-peers: run scripts/peers first: no {' or '.join(missing)}", file=sys.stderr)
        return 1
    where = machine()
    print(f"{where}; {options.rounds} turns of {options.seconds:g} s each.")
    print("Behind a peer's value: how many times as fast ours was (above x1 ours is ahead).")
    records = []
    for field, cases in options.cases.items():
        if cases:
            records += bench(field, cases, options)
    print("\n" + NOTES)
    print(f"\nLoad average at the end: {' '.join(f'{x:.2f}' for x in os.getloadavg())}")
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "records": records}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
