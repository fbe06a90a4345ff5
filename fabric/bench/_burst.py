"""Immediates from another process: how does their receiver learn of the last one?"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from .._engine import TransferEngine
from .._errors import FabricError
from .._peer import Address
from ._link import Link, field
from ._program import await_end

END_SECONDS = 10.0
"""How long the process may take to end."""
_SEND = "from fabric.bench._burst import serve; serve()"


class Burst:
    """A process that sends immediates on request. To be closed.

    A thread of the receiver's would hold the interpreter's lock at the very moment when the event
    loop wakes: the time would be that of two threads of Python.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _SEND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._link = Link(ours)

    def begin(self, address: Address, imm: int, count: int) -> None:
        """Have `count` immediates sent, one by one."""
        self._link.send("burst", address=bytes(address), imm=imm, count=count)

    def last(self) -> int:
        """Return when the call began that sent the last one, by `time.monotonic_ns`.

        Raises:
            FabricError: the process failed.
        """
        return field(self._link.receive("sent"), "at", int)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(FabricError):
            self._link.send("bye")
        self._link.close()
        await_end(self._child, END_SECONDS)


def serve() -> None:
    """Be the process: the connection is an inherited file descriptor."""
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    link.patient()
    with TransferEngine("local") as engine:
        while (message := link.receive("burst", "bye"))["is"] == "burst":
            address = Address.from_bytes(field(message, "address", bytes))
            at = _send(engine, address, field(message, "imm", int), field(message, "count", int))
            link.send("sent", at=at)


def _send(engine: TransferEngine, address: Address, imm: int, count: int) -> int:
    now = time.monotonic_ns
    for _ in range(count):
        at = now()
        transfer = engine.write_imm(address, imm)
    transfer.wait(END_SECONDS)
    return at
