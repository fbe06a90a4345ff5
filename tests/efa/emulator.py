#!/usr/bin/env python3
"""The control file of the emulated EFA device: sets faults, reads counters.

    emulator.py make FILE devices=4 reorder_ns=2000000 ...    a new one
    emulator.py end FILE     shows its counters, removes what a killed process left in /dev/shm

README.md has the layout; emulator/control.c is the other side.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"EFAEMU1\0"
HEAD_BYTES, SLOT_BYTES, SLOTS = 4096, 256, 1024
HEAD = {
    "processes": (8, "I"),
    "faults": (12, "I"),
    "reorder_ns": (16, "Q"),
    "delay_ns": (24, "Q"),
    "lost_acks": (32, "I"),
    "lost_writes": (36, "I"),
    "gone": (40, "Q"),
    "gone_pid": (48, "I"),
    "cq_limit": (52, "I"),
    "seed": (56, "Q"),
    "devices": (64, "I"),
    "unresponsive_ms": (68, "I"),
    "old_opcodes": (72, "I"),
    "solicited": (76, "I"),
}
"""Fields of the head: offset and format, little-endian."""
COUNTERS = (
    "writes",
    "write_imms",
    "write_bytes",
    "sends",
    "send_bytes",
    "reads",
    "imms_unsolicited",
    "imms_solicited",
    "rnr",
    "cq_overruns",
    "cq_most",
    "bad_keys",
    "injected",
    "segments",
    "overtaken",
    "messages_overtaken",
    "mrs",
    "dmabuf_mrs",
)
EARLY_IMM, NO_RECEIVES = 1, 2
"""Bits of ``faults``."""
UNRESPONSIVE_MS = 2000
"""How long a device may be silent, where nobody says otherwise."""


class Emulator:
    """The control file of the run that this process belongs to, or of another."""

    def __init__(self, path: str | Path | None = None) -> None:
        with open(path or Path(os.environ["EFA_EMULATOR_DIR"]) / "control", "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), HEAD_BYTES + SLOTS * SLOT_BYTES)
        if self._memory[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} is no control file of the EFA emulator")

    def __getitem__(self, name: str) -> int:
        """Return a field of the head."""
        at, code = HEAD[name]
        value: int = struct.unpack_from("<" + code, self._memory, at)[0]
        return value

    def __setitem__(self, name: str, value: int) -> None:
        """Set a field of the head, for all processes at once."""
        at, code = HEAD[name]
        struct.pack_into("<" + code, self._memory, at, value)

    @contextlib.contextmanager
    def having(self, **fields: int) -> Iterator[None]:
        """Set fields for the block, and set them back."""
        before = {name: self[name] for name in fields}
        try:
            for name, value in fields.items():
                self[name] = value
            yield
        finally:
            for name, value in before.items():
                self[name] = value

    def processes(self) -> list[dict[str, int]]:
        """Return the counters of each process, with its ``pid``."""
        rows = []
        for index in range(min(self["processes"], SLOTS)):
            at = HEAD_BYTES + index * SLOT_BYTES
            values = struct.unpack_from(f"<II{len(COUNTERS)}Q", self._memory, at)
            rows.append({"pid": values[0], **dict(zip(COUNTERS, values[2:], strict=True))})
        return rows

    def counters(self) -> dict[str, int]:
        """Return the counters of all processes together; of ``cq_most`` the largest."""
        total = dict.fromkeys(COUNTERS, 0)
        for row in self.processes():
            for name in COUNTERS:
                both = (total[name], row[name])
                total[name] = max(both) if name == "cq_most" else sum(both)
        return total


def make(path: Path, fields: dict[str, int]) -> None:
    """Make a control file."""
    with path.open("xb") as file:
        file.write(MAGIC)
        file.truncate(HEAD_BYTES + SLOTS * SLOT_BYTES)
    emulator = Emulator(path)
    for name, value in {"unresponsive_ms": UNRESPONSIVE_MS, **fields}.items():
        emulator[name] = value


def left_by(pid: int) -> Iterator[Path]:
    """Return the files of libfabric 1.17's shm provider that a process left in /dev/shm.

    Its efa provider opens that for each endpoint, with FI_EFA_ENABLE_SHM_TRANSFER=0 as well, and
    names it by the GID; what is killed leaves it behind.
    """
    for index in range(16):
        gid = b"\xfe\x80" + bytes(6) + b"\x0e\0" + struct.pack("<I", pid) + bytes([0, index + 1])
        yield from Path("/dev/shm").glob(f"{ipaddress.IPv6Address(gid)}_*")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    if len(arguments) < 2 or arguments[0] not in ("make", "end"):
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[1])
    if arguments[0] == "make":
        make(path, {key: int(value) for key, _, value in (a.partition("=") for a in arguments[2:])})
    else:
        counters = Emulator(path).counters()
        text = ", ".join(f"{name} {value}" for name, value in counters.items() if value)
        print(f"emulated EFA counted: {text or 'nothing'}")
        for row in Emulator(path).processes():
            for file in left_by(row["pid"]):
                file.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
