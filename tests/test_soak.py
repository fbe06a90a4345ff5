"""The soak of tests/soak.py: a short one, and that it notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT, environment

SECONDS = 10.0
LIMIT = 170.0
CONTROLS = {
    "late": ("late, ", "after a fence: "),
    "count": (" counts of ", "a count went from ", "a count was reached: "),
    "leak": ("fds: ",),
    "hang": ("a call is ",),
}
"""What a run must say that breaks a contract on purpose: one of these."""


def soak(*arguments: str) -> subprocess.Popen[str]:
    """Start a run."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    """Wait for the end of a run; returns what it printed."""
    try:
        return run.communicate(timeout=LIMIT)[0]
    finally:
        run.kill()
        run.wait()


@pytest.mark.timeout(int(LIMIT) + 10)
@pytest.mark.only("local", "tcp")
def test_a_short_soak(provider: str, seed: int) -> None:
    common = ("--providers", provider, "--seconds", str(SECONDS), "--seed")
    run = soak(*common, str(seed))
    text = finish(run)
    print(text)
    assert run.returncode == 0
    assert "violations: 0" in text
    assert "transfers: 0 done" not in text


def test_a_soak_that_must_fail(seed: int) -> None:
    """A byte after the fence, an immediate too many, an open descriptor, a thread that hangs."""
    common = ("--providers", "local", "--seconds", "6", "--seed", str(seed), "--corrupt")
    runs = {name: soak(*common, name) for name in CONTROLS}
    texts = {name: finish(run) for name, run in runs.items()}
    for name, words in CONTROLS.items():
        assert runs[name].returncode == 1, texts[name]
        found = [line for line in texts[name].splitlines() if "VIOLATION" in line]
        assert any(word in line for line in found for word in words), texts[name]
    assert "Thread 0x" in texts["hang"], "a run that hangs does not say where"


def test_help() -> None:
    run = soak("--help")
    text = finish(run)
    assert run.returncode == 0
    for word in ("--providers", "--seconds", "--kill-every", "--nodes", "--seed", "--corrupt"):
        assert word in text
