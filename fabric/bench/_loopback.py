"""Client and server on one machine: the server is a child process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from .._errors import FabricError
from ._client import Client
from ._ends import Set
from ._link import Link
from ._program import await_end
from ._server import Server

if TYPE_CHECKING:
    from ._case import Case
    from ._result import Result

END_SECONDS = 10.0
"""How long the child may take to end."""
_SERVE = "from fabric.bench._loopback import serve; serve()"


class Loopback:
    """Two engines of this machine, one of them in another process. To be closed.

    Args:
        near: how this process's engine is opened.
        far: how the other one is; as `near` by default.
    """

    def __init__(self, near: Set, far: Set | None = None) -> None:
        ours, theirs = socket.socketpair()
        self._cpus = os.sched_getaffinity(0)  # `near` may change them for this process
        self._client: Client | None = None
        with theirs:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _SERVE,
                    str(theirs.fileno()),
                    json.dumps(dataclasses.asdict(far or near)),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._link = Link(ours)
        try:
            self._engine = near.open()
        except BaseException:
            self._stop()
            raise

    def set_up(self, case: Case) -> None:
        """Prepare a case on both sides; the one before it is put away."""
        if self._client is not None:
            self._client.close()
        self._client = Client(self._link, self._engine, case)

    def run(self, seconds: float = 0.0, iters: int = 0) -> Result:
        """Run the case for so many seconds or iterations.

        Raises:
            FabricError: something failed on either side.
        """
        if self._client is None:
            raise FabricError("no case was set up")
        return self._client.run(seconds, iters)

    def close(self) -> None:
        """End both sides."""
        with contextlib.suppress(FabricError):
            self._link.send("bye")
        self._engine.close(1)
        self._stop()

    def _stop(self) -> None:
        self._link.close()
        os.sched_setaffinity(0, self._cpus)
        await_end(self._child, END_SECONDS)


def serve() -> None:
    """Be the child: the connection is an inherited file descriptor."""
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        Server(Set(**json.loads(sys.argv[2]))).serve(link)
    except FabricError as error:
        sys.exit(f"fabric bench, server: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
