"""Processes for tests: each `Node` is a Python process of its own that owns one engine.

A test runs functions in it: ``node.call(function, *args)`` waits for the result, ``node.start``
returns a `Pending`. An exception over there is raised here with its class, text and plain
attributes; the traceback of the other process is its cause. The processes are forked by one that
has imported what they need (`ForkServer`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fabric
from tests import commands
from tests.efa.emulator import UNRESPONSIVE_MS, Emulator
from tests.scale import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tests.node import Failure
    from tests.patterns import Copy

ROOT = Path(__file__).resolve().parent.parent
CALL_SECONDS = patient(60.0)
"""How long a command may take where the test does not say otherwise."""
EXIT_SECONDS = patient(20.0)
IMPORTS = ("tests.commands", "tests.harness", "kvtransfer")
"""What the nodes of all tests import; the modules of tests themselves come with the commands."""
REPLY_BYTES = 64
PAUSE_MS = 30_000
"""Longer than any pause of a node."""


class ForkServer:
    """A process that has imported modules, and forks nodes. It ends when this one does.

    It ignores SIGINT and sees this process's end by its socket; then it kills what it has forked.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.node", str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                # Without threads of these libraries: only the thread that forks is in the child.
                env={**environment(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )

    def fork(self, connection: socket.socket, env: dict[str, str]) -> Process:
        """Fork a node that serves `connection` and has our stdout and stderr."""
        fds = [connection.fileno(), 1, 2]
        return Process(self, self.ask({"environment": {**environment(), **env}}, fds))

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> int:
        """Send a request; returns the answer."""
        socket.send_fds(self.control, [json.dumps(request).encode()], fds)
        reply = self.control.recv(REPLY_BYTES)
        if not reply:
            raise NodeDiedError(f"the fork server ended with {self.process.wait(EXIT_SECONDS)}")
        result: int = json.loads(reply)
        return result

    def close(self) -> None:
        """Let it end, which kills every node that is still there."""
        self.control.close()
        self.process.wait(EXIT_SECONDS)


_fork_servers: dict[tuple[str, ...], ForkServer] = {}


def fork_server(modules: tuple[str, ...] = ()) -> ForkServer:
    """Return the fork server that has imported these modules as well; one for each combination."""
    if modules not in _fork_servers:
        _fork_servers[modules] = ForkServer((*IMPORTS, *modules))
    return _fork_servers[modules]


def close_fork_servers() -> None:
    """End what `fork_server` made."""
    while _fork_servers:
        _fork_servers.popitem()[1].close()


class Process:
    """A child of a fork server, with the methods of a `subprocess.Popen` that tests need."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server = server
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)  # the server reaps it only when told to

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        with contextlib.suppress(TimeoutError):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float) -> int:
        """Wait for the end of the process and reap it; returns the exit status."""
        if self.returncode is None:
            watch = select.poll()
            watch.register(self._pidfd, select.POLLIN)
            if not watch.poll(timeout * 1000):
                raise TimeoutError(f"process {self.pid} runs after {timeout} s")
            self.returncode = self.server.ask({"reap": self.pid})
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL the process."""
        self.send_signal(signal.SIGKILL)


class NodeDiedError(Exception):
    """The process of a node ended while a test waited for it."""


class RemoteTracebackError(Exception):
    """The traceback of the other process, as the cause of what is raised here."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def rebuild(failure: Failure) -> BaseException:
    """Make an exception of the class that was raised in the other process."""
    kind: Any = importlib.import_module(failure.module)
    for part in failure.name.split("."):
        kind = getattr(kind, part)
    error: BaseException = kind.__new__(kind)
    error.args = (failure.text,)
    with contextlib.suppress(AttributeError):
        vars(error).update(failure.attributes)
    error.__cause__ = RemoteTracebackError(failure.traceback)
    return error


class Pending:
    """The result of a command that is under way."""

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.number = number

    def done(self) -> bool:
        """Return whether the command has ended."""
        self.node.pump(0.0)
        return self.number in self.node.replies

    def result(self, timeout: float = CALL_SECONDS) -> Any:
        """Return what the command returned, or raise what it raised."""
        deadline = time.monotonic() + timeout
        while self.number not in self.node.replies:
            left = deadline - time.monotonic()
            if left <= 0:
                self.node.signal(signal.SIGUSR1)  # prints where its threads are
                raise TimeoutError(f"{self.node.name}: no answer within {timeout} s")
            self.node.pump(left)
        good, value = self.node.replies.pop(self.number)
        if good:
            return value
        raise rebuild(value)


class Node:
    """A process that owns one engine. The methods below are what most tests need."""

    def __init__(
        self, name: str, env: dict[str, str] | None = None, modules: tuple[str, ...] = ()
    ) -> None:
        ours, theirs = socket.socketpair()
        self.name = name
        self.number = 0
        self.replies: dict[int, tuple[bool, Any]] = {}
        self.connection = Connection(ours.detach())
        with theirs:
            self.process = fork_server(modules).fork(theirs, env or {})
        self.pid = self.process.pid
        self.address = b""

    def start(
        self, function: Callable[..., Any], *args: Any, thread: bool = False, **kwargs: Any
    ) -> Pending:
        """Begin a command; with `thread` it runs beside those that came before."""
        self.number += 1
        try:
            self.connection.send((self.number, thread, function, args, kwargs))
        except OSError as error:
            raise NodeDiedError(f"{self.name} is gone: {self.process.poll()}") from error
        return Pending(self, self.number)

    def call(
        self, function: Callable[..., Any], *args: Any, within: float = CALL_SECONDS, **kwargs: Any
    ) -> Any:
        """Run a command on the node's main thread and return its result."""
        return self.start(function, *args, **kwargs).result(within)

    def pump(self, timeout: float) -> None:
        """Take one reply, if there is one within `timeout` seconds."""
        try:
            if self.connection.poll(timeout):
                number, good, value = self.connection.recv()
                self.replies[number] = (good, value)
        except (EOFError, OSError) as error:
            code = self.process.wait(EXIT_SECONDS)
            raise NodeDiedError(f"{self.name} ended with {code} while a command ran") from error

    def signal(self, number: int) -> None:
        """Send a signal to the node's process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the node and reap it, if that has not been done."""
        self.process.kill()
        self.process.wait(EXIT_SECONDS)
        self.connection.close()

    def freeze(self) -> None:
        """SIGSTOP the node; returns when it has stopped."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", 5.0, f"{self.name} does not stop")

    def pause(self) -> None:
        """Freeze the node for a moment, after which all that was under way goes on.

        An emulated device stands still with its process, where a real one would not: until the
        farm closes, nobody takes it for dead meanwhile.
        """
        let_devices_be_silent()
        self.freeze()

    def thaw(self) -> None:
        """Let a frozen node go on."""
        self.signal(signal.SIGCONT)

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def leave(self) -> None:
        """Ask the node to close its engine and leave; `join` waits for that."""
        self.thaw()
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def join(self) -> int:
        """Wait for the end of the node; returns its exit status."""
        try:
            return self.process.wait(EXIT_SECONDS)
        finally:
            self.kill()

    # What most tests do with an engine.

    @property
    def id(self) -> bytes:
        """The id of the engine, by which senders of messages are known."""
        return fabric.Address.from_bytes(self.address).id

    def open(self, provider: str, nics: Sequence[str] | None = None, **options: Any) -> Node:
        """Open the engine of this node."""
        self.address = self.call(commands.open_engine, self.name, provider, nics, options)
        return self

    def region(self, name: str, nbytes: int, fill: int | None = 0, kind: str = "alloc") -> bytes:
        """Make a region filled with pattern `fill` (zeros when None); returns its descriptor."""
        result: bytes = self.call(commands.make_region, name, nbytes, fill, kind)
        return result

    def refill(self, name: str, fill: int) -> None:
        """Fill a region with another pattern."""
        self.call(commands.refill, name, fill)

    def differs(self, name: str, fill: int, copies: Iterable[Copy] = ()) -> str:
        """Compare a whole region with what it should hold; an empty text is good."""
        result: str = self.call(commands.differs, name, fill, list(copies))
        return result

    def counter(self, name: str, number: int | None = None) -> int:
        """Make a counter; returns its id."""
        result: int = self.call(commands.make_counter, name, number)
        return result

    def value(self, name: str) -> int:
        """Return the value of a counter."""
        result: int = self.call(commands.counter_value, name)
        return result

    def wait(
        self, name: str, target: int, timeout: float = 20.0, peers: Sequence[bytes] | None = None
    ) -> None:
        """Wait for a counter."""
        self.call(commands.counter_wait, name, target, timeout, peers)

    def settled(self, name: str, target: int) -> int:
        """Wait for a counter, give more counts the time to come, and return the value."""
        result: int = self.call(commands.counter_settled, name, target)
        return result

    def write(self, source: str, descriptor: bytes, **options: Any) -> None:
        """Write and wait for the end."""
        self.call(commands.write, source, descriptor, options)

    def stats(self) -> dict[str, int]:
        """Return the engine's totals."""
        result: dict[str, int] = self.call(commands.totals)
        return result

    def settle(self) -> dict[str, int]:
        """Release all that tests made here; returns what the engine still holds, by name."""
        result: dict[str, int] = self.call(commands.settle)
        return result


class Farm:
    """Makes nodes, and sees to it that all of them end."""

    def __init__(
        self, provider: str, turns: Sequence[list[str] | None], strict: bool = False
    ) -> None:
        self.provider = provider
        self.turns = turns
        self.strict = strict
        self.nodes: list[Node] = []
        self.strangers: list[int] = []

    @property
    def nics(self) -> list[str] | None:
        """The NICs of the node that is made next: its turn."""
        return self.turns[len(self.nodes) % len(self.turns)]

    def bare(
        self, name: str, env: dict[str, str] | None = None, modules: tuple[str, ...] = ()
    ) -> Node:
        """Return a node that has no engine yet."""
        node = Node(name, env, modules)
        self.nodes.append(node)
        return node

    def __call__(
        self,
        name: str,
        env: dict[str, str] | None = None,
        modules: tuple[str, ...] = (),
        **options: Any,
    ) -> Node:
        """Return a node with an engine of the provider under test; skip where there is none.

        What the node needs and is slow to import belongs into `modules`: all nodes share it.
        """
        nics = options.pop("nics", self.nics)
        node = self.bare(name, env, modules)
        try:
            return node.open(self.provider, nics, **options)
        except BaseException as error:
            node.kill()
            if self.strict or not isinstance(error, fabric.ProviderUnavailable):
                raise
            pytest.skip(f"provider {self.provider}: {error}")

    def adopt(self, pid: int) -> None:
        """Kill process `pid`, a child that a node forked, when the test is over."""
        self.strangers.append(pid)

    def kill_strangers(self) -> None:
        """Kill the adopted processes now."""
        while self.strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.strangers.pop(), signal.SIGKILL)

    def close(self) -> None:
        """End every process. A node that is alive must leave cleanly, with status 0."""
        codes = {}
        self.kill_strangers()
        let_devices_be_silent(UNRESPONSIVE_MS)
        try:
            living = [node for node in self.nodes if node.alive()]
            for node in living:
                node.leave()
            for node in living:
                if code := node.join():
                    codes[node.name] = code
        finally:
            for node in self.nodes:
                node.kill()
        assert not codes, f"nodes that did not leave cleanly: {codes}"


def let_devices_be_silent(milliseconds: int = PAUSE_MS) -> None:
    """Say how long a device of emulated EFA may be silent, until the farm closes.

    A device is emulated by its own process, which may be starved by all that is sent to it.
    """
    if "EFA_EMULATOR" in os.environ:
        Emulator()["unresponsive_ms"] = milliseconds


def environment() -> dict[str, str]:
    """Return our environment, for a Python that imports from this tree."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def wait_until(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    """Poll until `condition` holds; fail with `complaint` after `patient(timeout)` seconds."""
    deadline = time.monotonic() + patient(timeout)
    while not condition():
        assert time.monotonic() < deadline, f"{complaint} (within {patient(timeout)} s)"
        time.sleep(0.01)


def process_state(pid: int) -> str:
    """Return the state letter of a process: R, S, T, Z, or an empty text if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def shared_memory() -> set[str]:
    """Return the names in /dev/shm, but for libfabric 1.17's, which tests/efa/run removes."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("fe80::e00:")}


@contextlib.contextmanager
def nothing_left_in_shm() -> Iterator[None]:
    """Check that what comes into /dev/shm in the block goes again."""
    before = shared_memory()
    yield
    wait_until(
        lambda: not shared_memory() - before, 5.0, f"left in /dev/shm: {shared_memory() - before}"
    )
