"""One-sided RDMA writes between processes, counted by their receivers.

An engine opens the NICs of one GPU or NUMA node. Memory is registered or allocated, described to
peers in bytes, and written by them; the receiver waits for a count of the ranges that arrived::

    with fabric.TransferEngine() as engine:
        mr = engine.alloc(1 << 20)
        done = engine.counter()
        ...                                       # send bytes(mr.descriptor) and done.id to a peer
        done.wait(1, timeout=10)                  # which does: engine.write(src, d, imm=done.id)

Nothing depends on order, no thread of the library enters Python, and every wait takes a timeout.
"""

from ._guard import refuse_other_fabric

refuse_other_fabric()

from . import _realize as _realize  # noqa: E402 - only once nothing is in the way
from . import topology as topology  # noqa: E402
from ._counter import CounterBlock, ImmCounter  # noqa: E402
from ._descriptor import Descriptor  # noqa: E402
from ._engine import TransferEngine  # noqa: E402
from ._errors import (  # noqa: E402
    CounterVoid,
    EngineClosed,
    FabricError,
    FencePending,
    FenceUnsupported,
    InvalidArgument,
    PeerUnreachable,
    ProviderUnavailable,
    QueueFull,
    TransferCancelled,
    TransferFailed,
    WaitTimeout,
    WireError,
    text_of,
)
from ._memory import MemoryRegion  # noqa: E402
from ._messages import Messages  # noqa: E402
from ._native import lib  # noqa: E402
from ._nics import Nic  # noqa: E402
from ._peer import Address, Peer  # noqa: E402
from ._stats import EngineStats, Histogram, LaneStats, NicStats, PeerStats  # noqa: E402
from ._transfer import Transfer  # noqa: E402

__version__ = text_of(lib.fab_version())

__all__ = [
    "Address",
    "CounterBlock",
    "CounterVoid",
    "Descriptor",
    "EngineClosed",
    "EngineStats",
    "FabricError",
    "FencePending",
    "FenceUnsupported",
    "Histogram",
    "ImmCounter",
    "InvalidArgument",
    "LaneStats",
    "MemoryRegion",
    "Messages",
    "Nic",
    "NicStats",
    "Peer",
    "PeerStats",
    "PeerUnreachable",
    "ProviderUnavailable",
    "QueueFull",
    "Transfer",
    "TransferCancelled",
    "TransferEngine",
    "TransferFailed",
    "WaitTimeout",
    "WireError",
    "__version__",
]

for _name in __all__[:-1]:
    globals()[_name].__module__ = __name__  # what users see in reprs and tracebacks
del _name
