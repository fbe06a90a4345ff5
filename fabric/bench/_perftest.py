"""``ib_write_bw`` of perftest as a contender: same NICs and size, as many writes under way.

It ends with each run and starts anew with the next one; what it tells is the time between its first
work request and its last completion.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
import time

from .._errors import FabricError
from ._result import Result

PROGRAM = "ib_write_bw"
START_SECONDS = 60.0
RUN_SECONDS = 300.0
LOOK_SECONDS = 0.02
LEAST_WRITES = 16
"""Of a run; the program refuses fewer than five."""
MIB = 1 << 20
BY_RATE = 64 << 10
"""Below this size its message rate has more digits than its bandwidth."""
DEVICES = pathlib.Path("/sys/class/infiniband")
LISTENING = "0A"


class WriteBandwidth:
    """Runs ``ib_write_bw`` between two NICs of this machine.

    Args:
        near: name of the NIC that writes.
        far: name of the other one; may be the same.
        nbytes: of a write.
        depth: writes under way.
    """

    def __init__(self, near: str, far: str, nbytes: int, depth: int) -> None:
        self._near = near
        self._far = far
        self._nbytes = nbytes
        self._depth = depth
        self._rate = 0.0
        """Writes for each second of the last run; 0: there was none."""

    def run(self, seconds: float) -> Result:
        """Run for about so many seconds; the first run is as short as it can be.

        Raises:
            FabricError: perftest is missing, or it failed.
        """
        writes = max(LEAST_WRITES, self._depth, int(self._rate * seconds))
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        common = ["-s", str(self._nbytes), "-n", str(writes), "-t", str(self._depth), "-F"]
        common += ["-p", str(port)]
        server = _start([*_device(self._far), *common])
        try:
            _wait_for(server, port)
            client = _start([*_device(self._near), *common, "localhost"])
            said = _end(client, RUN_SECONDS)
            _end(server, START_SECONDS)
        finally:
            server.kill()
            server.communicate()
        result = parse(said, self._nbytes)
        self._rate = result.rate
        return result


def parse(said: str, nbytes: int) -> Result:
    """Return what its last row says: bytes, iterations, peak, MiB/s, million writes/s.

    Raises:
        FabricError: there is no such row.
    """
    rows = [line.split() for line in said.splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[0] == str(nbytes)]
    try:
        _, iters, _, mib, million = map(float, rows[-1])
        rate = million * 1e6 if nbytes < BY_RATE else mib * MIB / nbytes
        return Result(iters=int(iters), seconds=iters / rate, nbytes=int(iters) * nbytes)
    except (IndexError, ValueError, ZeroDivisionError):
        raise FabricError(f"{PROGRAM} printed no result: {said[-200:]!r}") from None


def gid_index(device: str, devices: pathlib.Path = DEVICES) -> int | None:
    """Return the first GID of port 1 that is RoCE v2 and an IPv4 address; None: there is none."""
    port = devices / device / "ports" / "1"
    found = []
    for kind in (port / "gid_attrs" / "types").glob("*"):
        with contextlib.suppress(OSError):  # an entry that is not used cannot be read
            gid = (port / "gids" / kind.name).read_text(encoding="ascii")
            is_ipv4 = gid.startswith("0000:0000:0000:0000:0000:ffff:")
            if is_ipv4 and kind.read_text(encoding="ascii").strip() == "RoCE v2":
                found.append(int(kind.name))
    return min(found, default=None)


def _device(name: str) -> list[str]:
    index = gid_index(name)
    return ["-d", name, *([] if index is None else ["-x", str(index)])]


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        raise FabricError(f"{PROGRAM} (Debian package perftest): {error.strerror}") from None


def _wait_for(server: subprocess.Popen[str], port: int) -> None:
    """Wait until it listens: a client that comes before gives up at once."""
    until = time.monotonic() + START_SECONDS
    while not _listens(port):
        if server.poll() is not None:
            _end(server, 0)
            raise FabricError(f"{PROGRAM}: the server ended before anybody came")
        if time.monotonic() > until:
            raise FabricError(f"{PROGRAM} does not listen after {START_SECONDS:.0f} s")
        time.sleep(LOOK_SECONDS)


def _listens(port: int) -> bool:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = pathlib.Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()
            for _, local, _, state, *_ in map(str.split, lines[1:]):
                if state == LISTENING and int(local.rsplit(":", 1)[1], 16) == port:
                    return True
    return False


def _end(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise FabricError(f"{PROGRAM} did not end within {seconds:.0f} s") from None
    if process.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise FabricError(f"{PROGRAM}: {last} (status {process.returncode})")
    return said
