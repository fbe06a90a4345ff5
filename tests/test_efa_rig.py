"""The rig of emulated EFA devices (tests/efa/run): its errors, its counters, its status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.efa.emulator import Emulator, make
from tests.harness import ROOT, environment

RUN = str(ROOT / "tests" / "efa" / "run")
WRONG = [
    (["--devices", "17", "--", "true"], "--devices 17: 1 to 16"),
    (["--devices", "x", "--", "true"], "--devices x: 1 to 16"),
    (["--reorder", "2", "--", "true"], "--reorder 2: a time such as 2ms"),
    (["--delay", "ms", "--", "true"], "--delay ms: a time such as 2ms"),
    (["--seed", "-1", "--", "true"], "--seed -1: a number"),
    (["--devices", "2", "--numa", "3", "--", "true"], "--numa 3: 1 to the number of devices, 2"),
    (["--seed"], "option --seed needs a value"),
    (["--frob", "--", "true"], "unknown option --frob"),
    (["--libfabric", "/nonexistent.so", "--", "true"], "--libfabric /nonexistent.so: no such file"),
    ([], "usage: tests/efa/run"),
]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the rig."""
    return subprocess.run(
        [RUN, *arguments],
        env={**environment(), **(env or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("arguments", "text"), WRONG)
def test_a_wrong_argument(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 125
    assert text in done.stderr, done.stderr


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "emulator" in done.stdout


def test_the_command_runs_with_devices_and_nothing_is_left(tmp_path: Path) -> None:
    """Its status is passed on, it sees the devices' sysfs, and the folder is gone afterwards."""
    script = (
        'ls "$SYSFS_PATH/class/infiniband"; cat "$SYSFS_PATH"/class/infiniband/*/device/numa_node'
    )
    done = run(
        *("--devices", "2", "--numa", "2", "--seed", "5", "--libfabric", "system"),
        *("--", "sh", "-c", f"{script}; exit 7"),
        env={"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["rdmap16s0", "rdmap17s0", "0", "1"]
    assert "--seed 5" in done.stderr
    assert "emulated EFA counted: nothing" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_control_file(tmp_path: Path) -> None:
    make(tmp_path / "control", {"devices": 3, "seed": 9})
    emulator = Emulator(tmp_path / "control")
    assert (emulator["devices"], emulator["seed"], emulator["processes"]) == (3, 9, 0)
    with emulator.having(reorder_ns=5, gone=2):
        assert (emulator["reorder_ns"], emulator["gone"]) == (5, 2)
    assert (emulator["reorder_ns"], emulator["gone"]) == (0, 0)
    assert set(emulator.counters().values()) == {0}
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    with pytest.raises(ValueError, match="no control file"):
        Emulator(tmp_path / "other")


def test_the_doctor_says_what_is_missing() -> None:
    """This machine has no EFA: every line says whether it holds, and the status is 1."""
    done = subprocess.run(
        [sys.executable, "-m", "fabric", "doctor", "--efa"],
        env={**environment(), "FABRIC_LIBFABRIC": "/nonexistent/libfabric.so.1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert all(line.startswith(("ok   ", "BAD  ")) for line in lines)
    assert lines[0].startswith("BAD  libfabric: ")
    assert "/nonexistent/libfabric.so.1" in lines[0]
