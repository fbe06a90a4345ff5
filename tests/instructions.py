"""Instructions of the hot paths, each against a bound: seen is a slower core, not a busy machine.

The workloads of native/bench/instructions.c run under callgrind, which counts the instructions of
the calling thread in the library and in libc. Those of the kernel, and of the mock libibverbs that
stands in for a NIC (native/bench/mock_verbs.c), are not among them. Two runs count the same.

A count above its bound is an error: either the core has become slower, or ``--update`` raises the
bound and the commit says what the instructions are spent for. A count far below its bound asks for
``--update``, too. New bounds are a tenth above the count, which is room for another release of the
compiler or libc, not for other code. On a kind of machine without bounds nothing is compared.
``callgrind_annotate build/instructions/local-write.out`` takes a count apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "dev"
OUT = ROOT / "build" / "instructions"
BOUNDS = Path(__file__).with_suffix(".json")
"""Bounds by kind of machine (`platform.machine()`), and by name of the workload."""
MOCK = "libmock_verbs.so"
SLACK = 1.10
"""What a new bound is, of the count."""
LOOSE = 0.80
"""A count below this part of its bound no longer needs it."""
BUILD_SECONDS = 600.0
RUN_SECONDS = 60.0


class CountError(Exception):
    """Nothing could be counted."""


@dataclass(frozen=True)
class Workload:
    """One workload of native/bench/instructions.c, `rounds` times."""

    provider: str
    name: str
    rounds: int
    each: str
    """What is counted."""

    @property
    def title(self) -> str:
        """Its name in the table and among the bounds."""
        return f"{self.provider} {self.name}"


WORKLOADS = (
    Workload("local", "write", 5000, "write of 8 bytes and an immediate: submit, wait, release"),
    Workload("local", "write-uncounted", 5000, "the same without an immediate"),
    Workload("local", "pages", 50, "page of 8 bytes, of a write_pages of 1024, done and released"),
    Workload("local", "take-one", 5000, "immediate, taken by a turn of its own"),
    Workload("local", "take-burst", 200, "immediate of 64 that wait"),
    Workload("local", "counter-wait", 5000, "counter_wait that holds already"),
    Workload("local", "counter-value", 5000, "counter_value"),
    Workload("verbs", "write", 5000, "write of 8 bytes and an immediate: submit, wait, release"),
    Workload("verbs", "pages", 50, "page of 8 bytes, of a write_pages of 1024, done and released"),
    Workload("verbs", "post", 200, "work request from write_pages of 128 to ibv_post_send"),
    Workload("verbs", "complete", 200, "work request of 128 that are found completed"),
    Workload("verbs", "take-one", 5000, "immediate, taken by a turn of its own"),
    Workload("verbs", "take-burst", 200, "immediate of 64 that wait"),
)


def do(command: list[str], seconds: float, env: dict[str, str] | None = None) -> str:
    """Run a command that has to succeed; returns what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT / "native",
            env={**os.environ, **(env or {})},
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CountError(f"{command[0]}: not finished after {seconds:.0f} s") from None
    if done.returncode:
        raise CountError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def build() -> None:
    """Build what is counted, with the optimisation of the shipped library, and get valgrind."""
    do([str(ROOT / "scripts" / "install-valgrind")], BUILD_SECONDS)
    do(["cmake", "--preset", "dev"], BUILD_SECONDS)
    target = ["--target", "instructions", "mock_verbs"]
    do(["cmake", "--build", "--preset", "dev", *target], BUILD_SECONDS)
    cache = (BUILD / "CMakeCache.txt").read_text()
    if "CMAKE_BUILD_TYPE:STRING=RelWithDebInfo\n" not in cache:
        raise CountError("the preset `dev` does not build with optimisation any more")


def count_in(profile: str) -> int:
    """Return the instructions of a callgrind profile, less those under calls of the mock."""
    here, callee, total, mocked = "", "", 0, 0
    lines = iter(profile.splitlines())
    for line in lines:
        key, _, value = line.partition("=")
        if key == "ob":
            here = callee = value
        elif key == "fn":
            callee = here
        elif key == "cob":
            callee = value
        elif key == "calls":
            inclusive = int(next(lines).split()[1])
            if callee.endswith(MOCK) and not here.endswith(MOCK):
                mocked += inclusive
            callee = here
        elif line.startswith("totals:"):
            total = int(line.split()[1])
    return total - mocked


def count(workload: Workload) -> float:
    """Return how many instructions one operation of a workload takes."""
    out = OUT / f"{workload.provider}-{workload.name}.out"
    callgrind = [
        "valgrind",
        "--tool=callgrind",
        "--toggle-collect=counted",
        "--compress-strings=no",
        "--compress-pos=no",
        f"--callgrind-out-file={out}",
    ]
    program = [str(BUILD / "instructions"), workload.provider, workload.name, str(workload.rounds)]
    env = {"FABRIC_LIBIBVERBS": str(BUILD / MOCK), "FABRIC_LOG_LEVEL": "error"}
    operations = int(do([*callgrind, *program], RUN_SECONDS, env))
    instructions = count_in(out.read_text())
    if instructions < operations:
        raise CountError(f"{workload.title}: {instructions} instructions of {operations} calls")
    return instructions / operations


def verdict(value: float, bound: int | None) -> str:
    """Return what is to be said of a count."""
    if bound is None:
        return "no bound"
    if value > bound:
        return "ABOVE ITS BOUND"
    return "bound is loose: --update" if value < LOOSE * bound else "ok"


def look(workloads: list[Workload], bounds: dict[str, int], *, update: bool) -> list[str]:
    """Count, compare and print; returns the titles of those that do not keep to a bound."""
    bad = []
    print(f"{'workload':22} {'each':>8} {'bound':>6}  {'result':22} of what")
    for workload in workloads:
        value = count(workload)
        if update:
            bounds[workload.title] = math.ceil(value * SLACK)
        bound = bounds.get(workload.title)
        if bound is None or value > bound:
            bad.append(workload.title)
        row = f"{workload.title:22} {value:8.1f} {bound or '-':>6}  {verdict(value, bound):22}"
        print(row, workload.each, flush=True)
    return bad


def main() -> int:
    """Count all workloads, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.instructions", description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 'local write' (default: all)")
    parser.add_argument("--update", action="store_true", help="store bounds for what is counted")
    options = parser.parse_args()
    every = {workload.title: workload for workload in WORKLOADS}
    if unknown := set(options.names) - set(every):
        parser.error(
            f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(every)}"
        )
    stored: dict[str, dict[str, int]] = json.loads(BOUNDS.read_text())
    bounds = stored.get(platform.machine(), {})
    comparing = bool(bounds) or options.update
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        build()
        bad = look([every[name] for name in options.names or every], bounds, update=options.update)
    except CountError as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 1
    if options.update:
        stored[platform.machine()] = bounds
        BOUNDS.write_text(json.dumps(stored, indent=4) + "\n")
    if bad and comparing:
        print(f"instructions: above the bound, or without one: {', '.join(bad)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
