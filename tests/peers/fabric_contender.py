"""llm-fabric, by its public API.

Memory comes from `engine.alloc`. `Transfer.wait` returns when the bytes are visible at the target.
A round trip is a write that the receiver counts (``imm``), and one that counts the answer. No
option of the engine is set, but for tcp the NIC: loopback, as both processes are on this host. The
target's process sleeps meanwhile, as an application may; its engine wakes up for what arrives.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from contender import Side, main

import fabric

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from workload import Workload

REPLY_SECONDS = 10


class Fabric(Side):
    """One engine, one region, one counter."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        super().__init__(workload, options)
        nics = ["lo"] if options.provider == "tcp" else None
        self.engine = fabric.TransferEngine(provider=options.provider, nics=nics)
        self.region = self.engine.alloc(workload.memory_bytes)
        self.memory = self.region.numpy()
        self.counter = self.engine.counter()
        self.counted = 0
        polls = ", target polls" if options.poll else ""
        self.setup = f"llm-fabric {fabric.__version__}, provider {options.provider}{polls}"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the provider, and whether the target polls."""
        parser.add_argument("--provider", choices=("local", "tcp"), default="local")
        parser.add_argument(
            "--poll", action="store_true", help="the target polls, as NIXL's must, and never sleeps"
        )

    def describe(self) -> dict[str, Any]:
        """Return descriptor and counter id."""
        return {"descriptor": bytes(self.region.descriptor).hex(), "imm": self.counter.id}

    def connect(self, other: dict[str, Any]) -> None:
        """Import the descriptor; the engine connects when it writes for the first time."""
        self.remote = fabric.Descriptor.from_bytes(bytes.fromhex(other["descriptor"]))
        self.imm = other["imm"]

    def post(self, slot: int) -> fabric.Transfer:
        """Begin one write."""
        nbytes = self.workload.nbytes
        at = slot * nbytes
        return self.engine.write(
            self.region, self.remote, src_offset=at, dst_offset=at, length=nbytes
        )

    def post_pages(self, call: int) -> fabric.Transfer:
        """Begin one paged write, by page numbers."""
        src, dst = self.workload.orders[call]
        return self.engine.write_pages(
            self.region, self.remote, src, dst, page_bytes=self.workload.nbytes
        )

    def wait(self, posted: fabric.Transfer) -> None:
        """Wait until the transfer is done."""
        posted.wait()

    def send(self, source: int, target: int) -> None:
        """Write one slot, and count it at the receiver."""
        nbytes = self.workload.nbytes
        self.engine.write(
            self.region,
            self.remote,
            src_offset=source * nbytes,
            dst_offset=target * nbytes,
            length=nbytes,
            imm=self.imm,
        )

    def roundtrip(self, _: int) -> None:
        """Write, and wait for the count of the answer: then both writes are done."""
        self.send(0, 0)
        self.counted += 1
        self.counter.wait(self.counted, timeout=REPLY_SECONDS)

    def serve(self, running: Callable[[], bool]) -> None:
        """Answer each round trip; other targets have nothing to do, but may poll."""
        while self.options.poll and self.workload.op != "roundtrip" and running():
            self.engine.progress()
        while self.workload.op == "roundtrip" and running():
            try:
                self.counter.wait(self.counted + 1, timeout=0.05)
            except fabric.WaitTimeout:
                continue
            self.counted += 1
            self.send(0, 1)

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


if __name__ == "__main__":
    sys.exit(main(Fabric))
