"""Contenders that are programs: started once, they run on request (native/bench/raw.h)."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import subprocess
from collections.abc import Sequence
from typing import Any

from .. import _native
from .._errors import FabricError
from ._result import Result

START_SECONDS = 60.0
END_SECONDS = 10.0


def raw_program() -> pathlib.Path:
    """Return where our programs without an engine are: beside the extension module."""
    return pathlib.Path(str(_native.__file__)).with_name("_raw")


class Program:
    """A program that answers ``run SECONDS`` on standard input with a line of JSON. To be closed.

    Raises:
        FabricError: it cannot be started, or says why it cannot run.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        except OSError as error:
            raise FabricError(f"cannot start {command[0]}: {error}") from None
        try:
            self.about = str(self._answer(START_SECONDS)["ready"])
        except BaseException:
            self.close()
            raise

    def run(self, seconds: float) -> Result:
        """Run for so many seconds.

        Raises:
            FabricError: the program failed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"run {seconds:.6f}\n")
            self._process.stdin.flush()
        except OSError:
            raise FabricError(self._last_words()) from None
        answer = self._answer(seconds + START_SECONDS)
        return Result(
            iters=answer["iters"],
            seconds=answer["seconds"],
            nbytes=answer["bytes"],
            p50_us=answer.get("p50_us"),
            p99_us=answer.get("p99_us"),
            p999_us=answer.get("p999_us"),
        )

    @property
    def status(self) -> int | None:
        """Its exit status; None: it has not ended."""
        return self._process.poll()

    def resident(self) -> int:
        """Return the bytes of its memory that are there, those shared with others included.

        Raises:
            FabricError: the system does not tell.
        """
        try:
            path = pathlib.Path(f"/proc/{self._process.pid}/smaps_rollup")
            lines = path.read_text(encoding="ascii").splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        except (OSError, StopIteration):
            raise FabricError(f"no memory of process {self._process.pid} in /proc") from None

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        await_end(self._process, END_SECONDS)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            raise FabricError(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise FabricError(self._last_words())
        try:
            return dict(json.loads(line))
        except ValueError:
            raise FabricError(f"not an answer: {line[:200]!r}") from None

    def _last_words(self) -> str:
        try:
            _, said = self._process.communicate(timeout=END_SECONDS)
        except (subprocess.TimeoutExpired, ValueError):
            return "it said no more, and did not end"
        lines = said.strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._process.returncode}"


def await_end(process: subprocess.Popen[Any], seconds: float) -> None:
    """Wait so many seconds for a process that was told to end, then kill it."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def mock_nic() -> dict[str, str]:
    """Return an environment in which `verbs` has one NIC, which costs next to nothing.

    Raises:
        FabricError: this is no editable install of a checkout, which alone has it.
    """
    path = raw_program().with_name("libmock_verbs.so")
    if not path.exists():
        raise FabricError("the mock NIC is part of a checkout (make setup) only")
    return {**os.environ, "FABRIC_LIBIBVERBS": str(path)}


def raw(
    kind: str, op: str, nbytes: int, *, env: dict[str, str] | None = None, **options: Any
) -> Program:
    """Start one of our programs: without an engine (memcpy, ofi), or without Python (the others).

    Args:
        kind: the program.
        op: what it runs.
        nbytes: of one write or page.
        env: its environment; None: ours.
        options: as the program's arguments; True for a flag, None and False for none.

    Raises:
        FabricError: it is not here, or cannot do that.
    """
    program = raw_program()
    if not program.exists():
        raise FabricError(f"{program.name} was not built beside the extension module")
    command = [str(program), kind, "--op", op, "--bytes", str(nbytes)]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not None and value is not False:
            command += [f"--{name}", str(value)]
    return Program(command, env)
