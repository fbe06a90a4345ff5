"""Defects that are put into the core on purpose, one at a time: the C and sim tests must see each.

Each file of tests/mutants is a patch of one line of native/core, and says in front what goes wrong
with it. A copy of the tree is built with the patch, and then tests run until the first one fails:
those of the simulator, test_core, `HISTORIES` histories of a fixed seed, test_engine. A defect that
none of them has seen after `LIMIT_SECONDS` is an error; so is a patch that does not fit any more,
and a failure without any patch. ``make mutants ARGS="shard-remainder-dropped"`` tries one.
"""

from __future__ import annotations

import argparse
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.tree import ROOT, Tree, TreeError, run

PATCHES = ROOT / "tests" / "mutants"
WORK = ROOT / "build" / "mutants"
LEAST = 15
"""How many patches there have to be."""
LIMIT_SECONDS = 60.0
HISTORIES = 600
SEED = 20261126
JOBS = 2
PASSED = "all tests passed"
TESTS_SIM = ("tests/test_sim.py", "tests/test_sim_contracts.py")
TESTS_HISTORIES = "tests/test_sim_histories.py"


@dataclass(frozen=True)
class Verdict:
    """What became of one patch; `by` is empty where nothing saw it."""

    name: str
    by: str
    seconds: float
    text: str = ""


def first_failure(tree: Tree, limit: float) -> tuple[str, str]:
    """Run the tests until one fails; returns its name and what it printed, or no name."""
    deadline = time.monotonic() + limit
    checks = [
        ("sim", pytest(tree, *TESTS_SIM)),
        ("test_core", [str(tree.build / "test_core")]),
        ("histories", pytest(tree, TESTS_HISTORIES)),
        ("test_engine", [str(tree.build / "test_engine")]),
    ]
    env = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "FABRIC_LOG_LEVEL": "error",
        "FABRIC_SIM_HISTORIES": str(HISTORIES),
        "FABRIC_SIM_SHRINK": "0",
    }
    for name, command in checks:
        left = deadline - time.monotonic()
        if left <= 0:
            return "", f"{name}: not looked at within {limit:.0f} s"
        text = run(command, tree.path, left, env)
        if text:
            return ("" if time.monotonic() >= deadline else name), text
    return "", PASSED


def pytest(tree: Tree, *files: str) -> list[str]:
    """Return the command that runs a file of tests."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout", "50", f"--seed={SEED}"]
    return [str(tree.python), "-m", "pytest", *options, *files]


def is_one_line(patch: Path) -> bool:
    """Return whether a patch takes one line away and adds at most one."""
    lines = patch.read_text().splitlines()
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    return len(removed) == 1 and len(added) <= 1


def look(tree: Tree, patch: Path) -> Verdict:
    """Build with a patch and test."""
    tree.patch(patch)
    try:
        tree.make()
        begin = time.monotonic()
        by, text = first_failure(tree, LIMIT_SECONDS)
        return Verdict(patch.stem, by, time.monotonic() - begin, text)
    finally:
        tree.patch(patch, back=True)


def look_at_all(patches: list[Path]) -> list[Verdict]:
    """Try every patch, `JOBS` at a time; each tree is built and tested without a patch first."""
    trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for number in range(JOBS):
        trees.put(Tree(WORK / str(number), "-DCMAKE_BUILD_TYPE=RelWithDebInfo"))
    tree = trees.get()
    begin = time.monotonic()
    by, text = first_failure(tree, 2 * LIMIT_SECONDS)
    if text != PASSED:
        raise TreeError(f"without any patch {by or 'the tests'} failed:\n{text}")
    print(f"{'(no patch)':32} {'passed':10} {time.monotonic() - begin:5.1f} s", flush=True)
    trees.put(tree)

    def one(patch: Path) -> Verdict:
        tree = trees.get()
        try:
            verdict = look(tree, patch)
        finally:
            trees.put(tree)
        seen = verdict.by or "NOT SEEN"
        print(f"{verdict.name:32} {seen:10} {verdict.seconds:5.1f} s", flush=True)
        return verdict

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(one, patches))


def main() -> int:
    """Try all patches, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", help="patches of tests/mutants (default: all)")
    parser.add_argument("--text", action="store_true", help="print what the failing test said")
    options = parser.parse_args()
    every = {patch.stem: patch for patch in sorted(PATCHES.glob("*.patch"))}
    if unknown := set(options.names) - set(every):
        parser.error(f"no such patch: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    bad = [name for name, patch in every.items() if not is_one_line(patch)]
    if bad or len(every) < LEAST:
        print(f"mutants: {len(every)} patches ({LEAST} wanted), not of one line: {bad}")
        return 1
    try:
        verdicts = look_at_all([every[name] for name in options.names or every])
    except TreeError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 1
    for verdict in verdicts if options.text else []:
        print(f"\n==== {verdict.name}\n{verdict.text}")
    unseen = [verdict for verdict in verdicts if not verdict.by]
    for verdict in unseen:
        print(f"\n==== {verdict.name} was not seen\n{verdict.text[-1000:]}")
    print(f"mutants: {len(verdicts) - len(unseen)} of {len(verdicts)} seen, seed {SEED}")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
