"""`make bench-peers`: the skeleton that all contenders share, and ours. No peer is needed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

PEERS = Path(__file__).resolve().parent / "peers"
OURS = PEERS / "fabric_contender.py"

# A contender that moves nothing.
LAZY = """
import sys
import numpy as np
from contender import Side, main

class Lazy(Side):
    setup = "lazy"
    def __init__(self, workload, options):
        super().__init__(workload, options)
        self.memory = np.zeros(workload.memory_bytes, np.uint8)
    def describe(self):
        return {}
    def connect(self, other):
        pass
    def write(self, slot):
        print("a library that prints")

sys.exit(main(Lazy))
"""

WORKLOADS: list[tuple[str, ...]] = [
    ("write", "--bytes", "4096"),
    ("write", "--bytes", "1048576", "--cold"),
    ("window", "--bytes", "4096"),
    ("pages", "--bytes", "4096", "--pages", "7"),
    ("pages", "--bytes", "65536", "--pages", "100", "--cold"),
    ("roundtrip", "--bytes", "8"),
    ("submit", "--bytes", "4096", "--pages", "64"),
]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of tests/peers, which are no package: they run as scripts, in other venvs."""
    monkeypatch.syspath_prepend(str(PEERS))
    names = ("workload", "contender", "slices", "bench_peers", "others")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def lazy(tmp_path: Path) -> Path:
    script = tmp_path / "lazy.py"
    script.write_text(LAZY)
    return script


def contend(script: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *args],
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(PEERS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answers(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("args", WORKLOADS, ids=" ".join)
def test_ours_runs_and_leaves_nothing(args: tuple[str, ...]) -> None:
    ready, *runs = answers(contend(OURS, "--op", *args, stdin="run 0.05\nrun 0.05\n"))
    assert ready["ready"].startswith("llm-fabric ")
    assert len(runs) == 2
    for run in runs:
        assert run["iters"] > 0
        assert run["seconds"] >= 0.05
        assert run["bytes"] % run["iters"] == 0
        assert (run["p50_us"] is None) == (args[0] == "window")
    for pid in ready["pids"]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ours_over_tcp() -> None:
    args = ("--op", "roundtrip", "--bytes", "8", "--provider", "tcp")
    ready, run = answers(contend(OURS, *args, stdin="run 0.05\n"))
    assert "provider tcp" in ready["ready"]
    assert run["p50_us"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--op, --bytes"),
        (("--op", "read", "--bytes", "8"), "--op: invalid choice: 'read'"),
        (("--op", "write", "--bytes", "0"), "--bytes: '0' is not a number from 1"),
        (("--op", "write", "--bytes", "8", "--pages", "2"), "--op write takes no --pages"),
        (("--op", "pages", "--bytes", "8"), "--op pages needs --pages"),
        (("--op", "roundtrip", "--bytes", "8", "--cold"), "--op roundtrip takes no --cold"),
        (("--op", "write", "--bytes", "8", "--provider", "x"), "arguments: --provider x"),
    ],
)
def test_bad_arguments(lazy: Path, args: tuple[str, ...], words: str) -> None:
    result = contend(lazy, *args)
    assert result.returncode == 2
    assert words in result.stderr


@pytest.mark.parametrize("line", ["walk 1", "run nan"])
def test_a_bad_line_is_an_error(line: str) -> None:
    result = contend(OURS, "--op", "write", "--bytes", "8", stdin=line + "\n")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"fabric_contender.py: initiator: stdin: 'run SECONDS' is needed, not {line!r}"
    ]


def test_bytes_that_did_not_arrive_are_noticed(lazy: Path) -> None:
    result = contend(lazy, "--op", "write", "--bytes", "64")
    assert (result.returncode, result.stdout) == (1, "")
    said, error = result.stderr.splitlines()
    assert said == "a library that prints"
    assert error == "lazy.py: initiator: 64 of 64 bytes did not arrive as sent"


def test_the_first_pass_covers_every_slot(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules["workload"], "COLD_BYTES", 4 << 20)
    workload_class = modules["workload"].Workload
    for args in [("pages", 4096, 7), ("submit", 1 << 12, 25, True), ("window", 4096)]:
        workload = workload_class(*args)
        assert workload.memory_bytes == workload.slots * args[1]
        if args[-1] is True:
            assert workload.memory_bytes >= 4 << 20
        if workload.paged:
            assert all(len(src) == len(dst) == args[2] for src, dst in workload.orders)
            for side in zip(*(workload.orders[i] for i in workload.first_pass), strict=True):
                assert sorted(np.concatenate(side)) == list(range(workload.slots))
        source, expected = (np.bincount(b) for b in (workload.source(), workload.expected()))
        assert np.array_equal(source, expected)


def test_percentiles_and_ratios(modules: dict[str, ModuleType]) -> None:
    contender, slices, bench = (modules[n] for n in ("contender", "slices", "bench_peers"))
    assert contender.percentiles_us([]) == (None, None)
    assert contender.percentiles_us([1000, 3000, 2000]) == (2.0, 2.98)
    fast = {"bytes": 600, "seconds": 1.0, "p50_us": 2.0, "p99_us": 3.0}
    slow = {"bytes": 100, "seconds": 1.0, "p50_us": 8.0, "p99_us": 9.0}
    ours, theirs = (slices.Outcome(slices=[one] * 3) for one in (fast, slow))
    assert bench.ratio(bench.Case("pages", 4096, 64), ours, theirs) == 6
    assert bench.ratio(bench.Case("roundtrip", 8), ours, theirs) == 4
    assert bench.ratio(bench.Case("roundtrip", 8), ours, slices.Outcome(failure="x")) is None


def test_contenders_take_turns_and_failures_are_told(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = modules["slices"]
    monkeypatch.setattr(slices, "QUIET_SECONDS", 0)
    command = (sys.executable, str(OURS))
    entries = [
        slices.Entry("ours", command),
        slices.Entry("wrong", (*command, "--provider", "none")),
        slices.Entry("stopped meanwhile", command, spins=True),
    ]
    args = ["--op", "write", "--bytes", "4096"]
    _, (ours, wrong, stopped) = slices.compete(entries, args, rounds=2, seconds=0.02)
    assert [len(outcome.slices) for outcome in (ours, wrong, stopped)] == [2, 0, 2]
    assert "invalid choice: 'none'" in wrong.failure


def test_what_others_do_is_seen(modules: dict[str, ModuleType]) -> None:
    others = modules["others"]
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        mine, theirs = others.Others([process.pid]), others.Others([])
        time.sleep(0.5)
        more = theirs.processors() - mine.processors()
        process.kill()
    assert more > 0.1  # 1 where nobody else is there
