"""The process behind `tests.harness.Node`: owns one engine and runs what the test sends it.

Run as ``python -m tests.node FD``; FD is one end of a socketpair. A command names a function
that this process can import; it gets the `State` first. Commands run one after the other on the
main thread, or each on a thread of its own where the test asks for that.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

Command = tuple[int, bool, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass
class State:
    """What the commands of one process share."""

    name: str = ""
    provider: str = ""
    nics: list[str] | None = None
    things: dict[str, Any] = field(default_factory=dict)
    _engine: Any = None

    @property
    def engine(self) -> Any:
        """The engine of this process, or an error if there is none."""
        if self._engine is None:
            raise RuntimeError("this node has no engine")
        return self._engine

    @engine.setter
    def engine(self, engine: Any) -> None:
        self._engine = engine

    @property
    def has_engine(self) -> bool:
        """Whether this process owns an engine."""
        return self._engine is not None


@dataclass
class Failure:
    """An exception on its way to the test."""

    module: str
    name: str
    text: str
    attributes: dict[str, Any]
    traceback: str


def describe(error: BaseException) -> Failure:
    """Take an exception apart into what crosses a pipe."""
    plain = (int, float, str, bool, type(None))
    return Failure(
        type(error).__module__,
        type(error).__qualname__,
        str(error),
        {key: value for key, value in vars(error).items() if isinstance(value, plain)},
        "".join(traceback.format_exception(error)),
    )


class Server:
    """Reads commands on one thread, runs them on the main one or on their own."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.state = State()
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.write_lock = threading.Lock()

    def read(self) -> None:
        """Take commands until the test goes away; then so does this process."""
        while True:
            try:
                command: Command | None = self.connection.recv()
            except (EOFError, OSError):
                os.kill(os.getpid(), signal.SIGKILL)
                return
            if command is None or not command[1]:
                self.commands.put(command)
                if command is None:
                    return
            else:
                threading.Thread(target=self.run, args=(command,), daemon=True).start()

    def run(self, command: Command) -> None:
        """Run one command and send what came of it."""
        number, _, function, args, kwargs = command
        try:
            reply = (number, True, function(self.state, *args, **kwargs))
        except SystemExit:
            raise
        except BaseException as error:
            reply = (number, False, describe(error))
        with self.write_lock:
            self.connection.send(reply)

    def serve(self) -> None:
        """Run commands on the main thread until told to leave."""
        threading.Thread(target=self.read, name="commands", daemon=True).start()
        while (command := self.commands.get()) is not None:
            self.run(command)


def main() -> None:
    """Serve the test at the other end of the socketpair named on the command line."""
    faulthandler.register(signal.SIGUSR1)  # for the harness, when a command takes too long
    server = Server(Connection(int(sys.argv[1])))
    server.serve()
    if server.state.has_engine:
        server.state.engine.close()


if __name__ == "__main__":
    # The commands import this file by its name: there must be one State, not two.
    from tests.node import main as _main

    _main()
