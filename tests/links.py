"""The network interfaces of the SoftRoCE guest: v0 carries rxe0, and so on (tests/softroce/run)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fabric

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.node import State

MIB = 1 << 20

needs_guest = pytest.mark.skipif(
    "SOFTROCE" not in os.environ, reason="needs the SoftRoCE guest: tests/softroce/run"
)


def count() -> int:
    """Return how many NICs the guest has (``tests/softroce/run -n``)."""
    return len(list(Path("/sys/class/infiniband").glob("rxe*")))


def needs(nics: int) -> pytest.MarkDecorator:
    """Skip where the guest has fewer NICs."""
    return pytest.mark.skipif(
        "SOFTROCE" in os.environ and count() < nics,
        reason=f"needs {nics} NICs: tests/softroce/run -n {nics}",
    )


def begin_slow(node: State, name: str, source: str, descriptor: bytes, imm: int, mib: int) -> None:
    """Begin a write of so many pages of 1 MiB; emulated NICs move some twenty of them a second."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    sources = np.zeros(mib, np.int32)
    targets = (np.arange(mib) % (len(remote) // MIB)).astype(np.int32)
    node.things[name] = node.engine.write_pages(
        node.things[source], remote, sources, targets, page_bytes=MIB, imm=imm
    )


def take_down(link: str) -> None:
    """Take a link down: its NIC's port is in error at once."""
    subprocess.run(["ip", "link", "set", link, "down"], check=True)


def bring_up(link: str) -> None:
    """Bring a link up again."""
    subprocess.run(["ip", "link", "set", link, "up"], check=True)


@contextlib.contextmanager
def down(link: str) -> Iterator[None]:
    """Take a link down for the block."""
    take_down(link)
    try:
        yield
    finally:
        bring_up(link)


@contextlib.contextmanager
def disturbed(*links: str, how: str) -> Iterator[None]:
    """Disturb what these links send: `how` is netem's, e.g. ``loss 1% delay 1ms``."""
    for link in links:
        subprocess.run(
            ["tc", "qdisc", "add", "dev", link, "root", "netem", *how.split()], check=True
        )
    try:
        yield
    finally:
        for link in links:
            subprocess.run(["tc", "qdisc", "del", "dev", link, "root"], check=True)


def bytes_sent(link: str) -> int:
    """Return how many bytes a link sent so far."""
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text())


def packets_lost(link: str) -> int:
    """Return how many packets the disturbance of a link has dropped."""
    text = subprocess.run(
        ["tc", "-s", "qdisc", "show", "dev", link], check=True, capture_output=True, text=True
    ).stdout
    return int(text.partition("(dropped ")[2].partition(",")[0])
