"""What the SoftRoCE rig says before it boots anything: options, and what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RIG = Path(__file__).resolve().parent / "softroce" / "run"
NO_GUEST = 125

# What the script itself runs before it looks for its tools.
BASICS = ("bash", "cat", "dirname", "uname", "ldd")


def rig(*args: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "/bin/bash", str(RIG), *args],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_help_is_no_error() -> None:
    result = rig("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for word in ("-C DIR", "-m MEM", "-t SECONDS", "-n LINKS", "--install", "SOFTROCE_OUT"):
        assert word in result.stdout


@pytest.mark.parametrize("args", [(), ("--",), ("-n", "3"), ("-t", "5", "--")])
def test_no_command_prints_the_usage(args: tuple[str, ...]) -> None:
    result = rig(*args)
    assert result.returncode == NO_GUEST
    assert result.stdout == ""
    assert "usage: tests/softroce/run" in result.stderr


@pytest.mark.parametrize("option", ["--nonsense", "-z"])
def test_an_unknown_option_is_named(option: str) -> None:
    result = rig(option, "--", "true")
    assert result.returncode == NO_GUEST
    assert f"unknown option {option}" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-n", "1"),
        ("-n", "65"),
        ("-t", "0"),
        ("-t", "soon"),
        ("-m", "much"),
        ("-C", "/nonexistent"),
    ],
)
def test_a_bad_value_is_named(option: str, value: str) -> None:
    result = rig(option, value, "--", "true")
    assert result.returncode == NO_GUEST
    assert f"{option} {value}" in result.stderr


def test_an_option_without_its_value_is_named() -> None:
    result = rig("-m")
    assert result.returncode == NO_GUEST
    assert "option -m needs a value" in result.stderr


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    for name in BASICS:
        found = shutil.which(name)
        assert found, name
        (tmp_path / name).symlink_to(found)
    result = rig("--", "true", path=str(tmp_path))
    assert result.returncode == NO_GUEST
    assert result.stdout == ""
    said = "tests/softroce/run: qemu-system-x86_64 is missing: apt-get install qemu-system-x86\n"
    assert said in result.stderr
    for package in ("busybox-static", "cpio"):
        assert f"apt-get install {package}\n" in result.stderr
