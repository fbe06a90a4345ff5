"""Mooncake's transfer engine, protocol tcp, metadata by P2PHANDSHAKE (no server needed).

Its TCP writes are acknowledged: complete means applied at the target. Writes and pages use the
synchronous calls, as the connectors of vLLM and SGLang do; a window and `submit` need the
asynchronous ones. The lists of addresses that a batch takes are made beforehand, untimed, though
an application would have to make them from its page numbers.

There is no notification by write. What comes nearest is ``transfer_sync(..., notify=...)``: after
the write it sends a message to the peer's handshake port, which `get_notifies` returns there.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from contender import Side, main

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from workload import Workload

# Read when the library is loaded. By default it logs a line for each asynchronous batch.
os.environ["MC_LOG_LEVEL"] = "ERROR"

from mooncake.engine import (  # type: ignore[import-not-found]
    TransferEngine,
    TransferNotify,
    TransferOpcode,
)

HOST = "127.0.0.1"
PACKAGE = "mooncake-transfer-engine-non-cuda"
UNDER_WAY, DONE = 0, 1


def check(code: int) -> None:
    """Raise what an engine returned as a number."""
    if code:
        raise RuntimeError(f"Mooncake returned {code}")


class Mooncake(Side):
    """One engine, one registration."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        super().__init__(workload, options)
        self.engine = TransferEngine()
        check(self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""))
        self.memory = np.zeros(workload.memory_bytes, np.uint8)
        self.memory.fill(0)  # touches it: zeros() leaves that to the first transfer
        self.address = self.memory.ctypes.data
        check(self.engine.register_memory(self.address, workload.memory_bytes))
        self.notification = TransferNotify("n", "n")
        self.setup = (
            f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, tcp on loopback, MC_LOG_LEVEL=ERROR"
        )

    def describe(self) -> dict[str, Any]:
        """Return the name of the segment and where the memory is."""
        return {"name": f"{HOST}:{self.engine.get_rpc_port()}", "address": self.address}

    def connect(self, other: dict[str, Any]) -> None:
        """Compute the addresses of all calls."""
        self.peer: str = other["name"]
        self.remote: int = other["address"]
        nbytes, orders = self.workload.nbytes, self.workload.orders if self.workload.paged else []
        self.sources = [
            (self.address + src.astype(np.int64) * nbytes).tolist() for src, _ in orders
        ]
        self.targets = [(self.remote + dst.astype(np.int64) * nbytes).tolist() for _, dst in orders]
        self.lengths = [nbytes] * self.workload.pages

    def write(self, slot: int) -> None:
        """Write one slot."""
        at, nbytes = slot * self.workload.nbytes, self.workload.nbytes
        check(
            self.engine.transfer_sync_write(self.peer, self.address + at, self.remote + at, nbytes)
        )

    def post(self, slot: int) -> int:
        """Begin one write."""
        at, nbytes = slot * self.workload.nbytes, self.workload.nbytes
        batch: int = self.engine.transfer_submit_write(
            self.peer, self.address + at, self.remote + at, nbytes
        )
        return batch

    def wait(self, posted: int) -> None:
        """Poll until it is done."""
        while (status := self.engine.transfer_check_status(posted)) == UNDER_WAY:
            pass
        if status != DONE:
            raise RuntimeError(f"the transfer ended as {status}")

    def write_pages(self, call: int) -> None:
        """Write a batch."""
        check(
            self.engine.batch_transfer_sync_write(
                self.peer, self.sources[call], self.targets[call], self.lengths
            )
        )

    def post_pages(self, call: int) -> int:
        """Begin a batch."""
        batch: int = self.engine.batch_transfer_async_write(
            self.peer, self.sources[call], self.targets[call], self.lengths
        )
        return batch

    def wait_pages(self, posted: int) -> None:
        """Wait for a batch."""
        check(self.engine.get_batch_transfer_status([posted]))

    def send(self, source: int, target: int) -> None:
        """Write one slot, and notify."""
        nbytes = self.workload.nbytes
        check(
            self.engine.transfer_sync(
                self.peer,
                self.address + source * nbytes,
                self.remote + target * nbytes,
                nbytes,
                TransferOpcode.Write,
                self.notification,
            )
        )

    def roundtrip(self, _: int) -> None:
        """Write and notify; poll for the notification of the answer."""
        self.send(0, 0)
        while not self.engine.get_notifies():
            pass

    def serve(self, running: Callable[[], bool]) -> None:
        """Answer each round trip; other targets have nothing to do."""
        while self.workload.op == "roundtrip" and running():
            if self.engine.get_notifies():
                self.send(0, 1)


if __name__ == "__main__":
    sys.exit(main(Mooncake))
