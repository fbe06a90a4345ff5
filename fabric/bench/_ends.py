"""What client and server have in common: an engine, its memory, and what the other side needs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .._descriptor import Descriptor
from .._engine import TransferEngine
from .._errors import FabricError, InvalidArgument
from .._nics import list_nics
from .._peer import Address
from ._case import Case, paint
from ._link import field

if TYPE_CHECKING:
    from .._counter import ImmCounter
    from .._memory import MemoryRegion


@dataclasses.dataclass(frozen=True)
class Set:
    """How an engine is opened.

    Args:
        provider: as `TransferEngine` takes it.
        lanes: NICs to open, the first ones; 0: the provider's choice.
        nic: the one NIC to open; None: see `lanes`.
        spin_us: how long a waiter polls before it sleeps.
        cpu: CPU that this process is to run on; None: any.
        foreign: receive into memory that is not from `TransferEngine.alloc`.
    """

    provider: str = "auto"
    lanes: int = 0
    spin_us: int = 50
    cpu: int | None = None
    foreign: bool = False
    nic: str | None = None

    def open(self) -> TransferEngine:
        """Open the engine; the process runs on its CPU from now on.

        Raises:
            InvalidArgument: there is no such CPU here, or there are not so many NICs.
        """
        if self.cpu is not None:
            try:
                os.sched_setaffinity(0, {self.cpu})
            except OSError as error:
                raise InvalidArgument(f"cannot run on CPU {self.cpu}: {error}") from None
        return TransferEngine(self.provider, self._nics(), spin_us=self.spin_us)

    def _nics(self) -> list[str] | None:
        if self.nic is not None:
            return [self.nic]
        if not self.lanes:
            return None
        names = [nic.name for nic in list_nics(self.provider)]
        if len(names) < self.lanes:
            raise InvalidArgument(
                f"{self.lanes} lanes need as many NICs; {self.provider} has {', '.join(names)}"
            )
        return names[: self.lanes]


class End:
    """One side of one case: memory, a counter, and the other side's.

    The memory is released by `close`.
    """

    def __init__(self, engine: TransferEngine, case: Case, foreign: bool = False) -> None:
        self.engine = engine
        self.case = case
        self.region: MemoryRegion = (
            engine.register(np.zeros(case.size, np.uint8)) if foreign else engine.alloc(case.size)
        )
        self.counter: ImmCounter = engine.counter()
        self.far: Descriptor
        self.far_id = 0
        self.address: Address

    def offer(self) -> dict[str, Any]:
        """Return what the other side needs."""
        return {
            "address": bytes(self.engine.address),
            "descriptor": bytes(self.region.descriptor),
            "counter": self.counter.id,
        }

    def meet(self, offer: dict[str, Any]) -> None:
        """Take what the other side offered.

        Raises:
            WireError: it is malformed.
        """
        self.address = Address.from_bytes(field(offer, "address", bytes))
        self.far = Descriptor.from_bytes(field(offer, "descriptor", bytes))
        self.far_id = field(offer, "counter", int)

    def words(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return the memory as 64-bit words."""
        return np.frombuffer(memoryview(self.region), np.uint64)

    def paint(self) -> None:
        """Fill the memory with the pattern."""
        paint(self.words(), self.case.nbytes)

    def close(self) -> None:
        """Give memory and counter back."""
        self.counter.close()
        with contextlib.suppress(FabricError):  # then close() of the engine does it
            self.engine.deregister(self.region, timeout=5)
