"""NIXL: one agent a process, backend UCX, host memory.

As its documentation has it: memory is registered once, descriptor lists are prepared once for both
sides, transfers are made from them by index (`make_prepped_xfer` with numpy int32 indices), posted,
and polled (`check_xfer_state`) until DONE, which with UCX means flushed: remotely complete. A write
of the same bytes again posts its transfer again; pages in another order are another transfer. The
notification of a round trip is the transfer's own (``notif_msg``).

Without its progress thread NIXL goes on only where somebody calls it, so the target polls, as
NIXL's examples do; with the thread it need not, unless it waits for notifications.
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

NOTIFICATION = b"n"
DONE, UNDER_WAY = "DONE", "PROC"


class Nixl(Side):
    """One agent, one registration, descriptor lists of all slots."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        super().__init__(workload, options)
        if options.tls:
            os.environ["UCX_TLS"] = options.tls
        # Only now: UCX reads its environment when it is loaded.
        from nixl_cu12._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]

        self.progress = options.progress == "on"
        name = "target" if options.target else "initiator"
        config = nixl_agent_config(enable_prog_thread=self.progress, backends=[])
        self.agent = nixl_agent(name, config)
        errors = {"ucx_error_handling_mode": options.errors} if options.errors else {}
        self.agent.create_backend("UCX", errors)
        self.memory = np.zeros(workload.memory_bytes, np.uint8)
        self.memory.fill(0)  # touches it: zeros() leaves that to the first transfer
        self.address = self.memory.ctypes.data
        self.agent.register_memory([(self.address, workload.memory_bytes, 0, "")], "DRAM")
        self.setup = (
            f"nixl-cu12 {importlib.metadata.version('nixl-cu12')}, UCX,"
            f" progress thread {options.progress}, UCX_TLS {options.tls or 'unset'},"
            f" ucx_error_handling_mode {options.errors or 'unset'}"
        )

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add what differs between the variants."""
        parser.add_argument(
            "--progress", choices=("on", "off"), default="on", help="progress thread (shipped: on)"
        )
        parser.add_argument("--tls", help="UCX_TLS, e.g. tcp,self (shipped: UCX chooses)")
        parser.add_argument(
            "--errors", choices=("peer", "none"), help="ucx_error_handling_mode (shipped: peer)"
        )

    def describe(self) -> dict[str, Any]:
        """Return the agent's metadata and where the memory is."""
        return {"metadata": self.agent.get_agent_metadata().hex(), "address": self.address}

    def connect(self, other: dict[str, Any]) -> None:
        """Load the metadata, prepare the lists, and the transfers that are posted again."""
        peer = self.agent.add_remote_agent(bytes.fromhex(other["metadata"]))
        table = np.empty((self.workload.slots, 3), np.uint64)
        steps = np.arange(self.workload.slots, dtype=np.uint64) * np.uint64(self.workload.nbytes)
        table[:, 1], table[:, 2] = self.workload.nbytes, 0
        table[:, 0] = steps + np.uint64(self.address)
        self.local = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", table, "DRAM")
        table[:, 0] = steps + np.uint64(other["address"])
        self.remote = self.agent.prep_xfer_dlist(peer, table, "DRAM")
        self.transfers = []
        if not self.workload.paged:
            self.transfers = [self.transfer(slot, slot) for slot in range(self.workload.slots)]
        self.answer = self.transfer(0, 1) if self.workload.op == "roundtrip" else None

    def transfer(self, source: int, target: int) -> Any:
        """Make the transfer of one slot."""
        src, dst = np.array([source], np.int32), np.array([target], np.int32)
        return self.agent.make_prepped_xfer("WRITE", self.local, src, self.remote, dst)

    def post(self, slot: int) -> tuple[Any, str]:
        """Post a transfer, once more."""
        transfer = self.transfers[slot]
        return transfer, self.agent.transfer(transfer)

    def post_pages(self, call: int) -> tuple[Any, str]:
        """Make a transfer of these pages, and post it."""
        src, dst = self.workload.orders[call]
        transfer = self.agent.make_prepped_xfer("WRITE", self.local, src, self.remote, dst)
        return transfer, self.agent.transfer(transfer)

    def wait(self, posted: tuple[Any, str]) -> None:
        """Poll until it is done."""
        transfer, state = posted
        while state == UNDER_WAY:
            state = self.agent.check_xfer_state(transfer)
        if state != DONE:
            raise RuntimeError(f"the transfer ended as {state}")

    def wait_pages(self, posted: tuple[Any, str]) -> None:
        """Poll until it is done, and release it."""
        self.wait(posted)
        self.agent.release_xfer_handle(posted[0])

    def send(self, transfer: Any) -> None:
        """Post with a notification, which goes out when the transfer is seen to be done."""
        self.wait((transfer, self.agent.transfer(transfer, NOTIFICATION)))

    def roundtrip(self, _: int) -> None:
        """Write and notify; poll for the notification of the answer."""
        self.send(self.transfers[0])
        while not self.agent.get_new_notifs():
            pass

    def serve(self, running: Callable[[], bool]) -> None:
        """Poll, and answer each notification."""
        answers = self.workload.op == "roundtrip"
        if self.progress and not answers:
            return
        while running():
            if self.agent.get_new_notifs() and answers:
                self.send(self.answer)


if __name__ == "__main__":
    # A Python process that has made an agent of nixl-cu12 1.5.1 may end with SIGSEGV, in the exit
    # handlers of a libnl that is part of the wheel: it ends without them, once all is flushed.
    status = main(Nixl)
    sys.stderr.flush()
    os._exit(status)
