"""What is moved: one memory of equal slots on each side, and the order in which they are written.

Everything follows from the options, so that all contenders, and both of their processes, agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Numbers: TypeAlias = NDArray[np.int32]

OPS = {
    "write": "one write in flight, until it is remotely complete",
    "window": "16 writes in flight; the oldest is waited for before the next is begun",
    "pages": "pages in random order, one call in flight, until all are remotely complete",
    "roundtrip": "a write and its notification to the other application, which writes back",
    "submit": "as pages, but only the call or calls that begin the transfer are timed",
}
WINDOW = 16
COLD_BYTES = 256 << 20
"""More than the last-level caches of most hosts."""
HOT_ORDERS = 16
TILE = 1_048_573
"""A prime: the pattern of no page is that of another."""


@dataclass(frozen=True)
class Workload:
    """One operation on slots of `nbytes` bytes; `pages` of them a call where it moves pages."""

    op: str
    nbytes: int
    pages: int = 1
    cold: bool = False

    @property
    def paged(self) -> bool:
        """Whether a call moves several slots, by number."""
        return self.op in ("pages", "submit")

    @cached_property
    def slots(self) -> int:
        """Slots of each side's memory: as few as the operation needs, or `COLD_BYTES`.

        A round trip has two: bytes go out in the first, and come back into the second.
        """
        if self.op == "roundtrip":
            return 2
        least = {"write": 1, "window": WINDOW}.get(self.op, self.pages)
        cold = -(-COLD_BYTES // (self.nbytes * least)) * least if self.cold else 0
        return max(least, cold)

    @property
    def memory_bytes(self) -> int:
        """Bytes of each side's memory."""
        return self.slots * self.nbytes

    @property
    def call_bytes(self) -> int:
        """Payload of one iteration; a round trip's goes both ways."""
        return self.nbytes * (self.pages if self.paged else 2 if self.op == "roundtrip" else 1)

    @cached_property
    def orders(self) -> list[tuple[Numbers, Numbers]]:
        """Slots to read and to write for each call, shape ``(pages,)``, none of them twice.

        Cold: the calls share all slots out among them. Hot: each call moves every slot anew.
        """
        random = np.random.default_rng(20)

        def permutation() -> Numbers:
            return random.permutation(self.slots).astype(np.int32)

        drawn = [(permutation(), permutation()) for _ in range(1 if self.cold else HOT_ORDERS)]
        cuts = range(0, self.slots, self.pages)
        return [(s[i : i + self.pages], d[i : i + self.pages]) for s, d in drawn for i in cuts]

    @property
    def iterations(self) -> range:
        """Numbers of the iterations that differ: a slot, or a call of `orders`."""
        if self.op == "roundtrip":
            return range(1)
        return range(len(self.orders)) if self.paged else range(self.slots)

    @property
    def first_pass(self) -> range:
        """The iterations after which every slot of the target was written once."""
        return range(self.slots // self.pages) if self.paged else self.iterations

    def source(self) -> Bytes:
        """Bytes that the initiator's memory holds to begin with."""
        tile = np.random.default_rng(24).integers(1, 256, TILE, np.uint8)
        memory = np.resize(tile, self.memory_bytes)
        if self.op == "roundtrip":
            memory[self.nbytes :] = 0
        return memory

    def expected(self) -> Bytes:
        """Bytes that the target's memory, zero before, must hold after the first pass."""
        memory = self.source()
        if not self.paged:
            return memory
        source, target = memory.reshape(self.slots, -1), np.zeros_like(memory)
        for src, dst in (self.orders[i] for i in self.first_pass):
            target.reshape(self.slots, -1)[dst] = source[src]
        return target
