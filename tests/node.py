"""The processes behind `tests.harness.Node`: each owns one engine and runs what the test sends it.

Run as ``python -m tests.node FD MODULE...``, this imports the modules and then forks a node
whenever it is asked to over the socket FD: starting Python for each would take longer than most
tests do. It has no engine and no thread, so that a node is as good as a process of its own.

A node gets commands over another socket. A command names a function that this process can import;
it gets the `State` first. Commands run one after the other on the main thread, or each on a thread
of its own where the test asks for that.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tests.scale import SLOW

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


REQUEST_BYTES = 1 << 17
"""Of the longest request to the fork server, most of which is an environment."""


def serve_forks(control: socket.socket) -> Connection | None:
    """Fork and reap on request, until the other end is closed; returns there and in every child.

    A child is reaped only on request, so that until then its pid is nobody else's.
    """
    children: set[int] = set()
    while True:
        text, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
        if not text:
            break
        request = json.loads(text)
        if "reap" in request:
            pid, status = os.waitpid(request["reap"], 0)
            children.remove(pid)
            control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        if (pid := os.fork()) == 0:
            control.close()
            return become_node(fds, request["environment"])
        children.add(pid)
        for fd in fds:
            os.close(fd)
        control.send(json.dumps(pid).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # also one that is stopped, and cannot see that it is alone
    return None


def become_node(fds: list[int], environment: dict[str, str]) -> Connection:
    """Take over what the test process gave: the end of a socket, stdout, stderr, environment."""
    connection, *outputs = fds
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # for the harness, when a command takes too long
    return Connection(connection)


def main() -> None:
    """Be the fork server of the test process, and in each child a node."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process decides, by closing the socket
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that has objects
    with socket.socket(fileno=int(sys.argv[1])) as control:
        connection = serve_forks(control)
    if connection is None:
        return
    server = Server(connection)
    server.serve()
    if server.state.has_engine:
        server.state.engine.close()
    if SLOW:
        # Python's own end copies every page that is shared with the fork server: half a second.
        os._exit(0)


if __name__ == "__main__":
    # The commands import this file by its name: there must be one State, not two.
    from tests.node import main as _main

    _main()
