"""What an engine has done and holds, as one snapshot."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ._errors import CLASSES, check, text_of
from ._native import ffi, lib

if TYPE_CHECKING:
    from ._core import Core

PEER_STATES = {
    lib.FAB_P_IDLE: "idle",
    lib.FAB_P_CONNECTING: "connecting",
    lib.FAB_P_UP: "up",
    lib.FAB_P_FENCING: "fencing",
    lib.FAB_P_DEAD: "dead",
}
LANE_STATES = {
    lib.FAB_L_FRESH: "fresh",
    lib.FAB_L_UP: "up",
    lib.FAB_L_BROKEN: "lost",
    lib.FAB_L_GONE: "closed",
    lib.FAB_L_OFFERED: "offered",
    lib.FAB_L_ANSWERED: "answered",
    lib.FAB_L_PROVING: "proving",
}
OPS = {
    lib.FAB_OP_WRITE: "write",
    lib.FAB_OP_PAGES: "pages",
    lib.FAB_OP_SCATTER: "scatter",
    lib.FAB_OP_IMM: "imm",
    lib.FAB_OP_MESSAGE: "message",
}
"""Kinds of transfers; `TransferEngine.barrier` and ``write_imm`` are ``imm``."""

BOUNDS_NS = tuple(
    i + 1 if i < 4 else (5 + i % 4) << (i // 4 - 1) for i in range(lib.FAB_BUCKETS - 1)
)
"""Where the buckets of a histogram end, in nanoseconds, all but the last, which does not."""


@dataclass(frozen=True)
class Histogram:
    """How long something took. Four buckets to an octave: what is read off is at most 25 % more.

    Attributes:
        count: how often it happened.
        sum: seconds, of all together.
        buckets: how many took less than the bound of the same index in `bounds`, and not less than
            the one before; one more for all that is longer.
    """

    count: int = 0
    sum: float = 0.0
    buckets: tuple[int, ...] = (0,) * lib.FAB_BUCKETS

    @property
    def bounds(self) -> tuple[float, ...]:
        """Seconds at which the buckets end; the last of `buckets` has no bound."""
        return tuple(bound / 1e9 for bound in BOUNDS_NS)

    @property
    def mean(self) -> float:
        """Seconds; 0 where nothing was counted."""
        return self.sum / self.count if self.count else 0.0

    def below(self, ns: int) -> int:
        """Return how many took less than this many nanoseconds, a power of two from 4 on."""
        return sum(n for n, bound in zip(self.buckets, BOUNDS_NS, strict=False) if bound <= ns)

    def percentile(self, percent: float) -> float:
        """Return the seconds that this percentage, 0 to 100, did not exceed; 0 where none counted.

        It is the end of a bucket: the true value, or up to a quarter more. Of what lies in the last
        bucket, from 2**40 nanoseconds (18 minutes) on, it is infinite.

        Raises:
            ValueError: not a percentage.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent: {percent!r}; 0 to 100 are possible")
        wanted = max(1, math.ceil(self.count * percent / 100))
        for number, bound in zip(self.buckets, BOUNDS_NS, strict=False):
            wanted -= number
            if wanted <= 0:
                return bound / 1e9
        return math.inf if self.count else 0.0


@dataclass(frozen=True)
class NicStats:
    """One NIC of the engine. What was sent counts once it was acknowledged."""

    name: str
    up: bool  # False of a closed engine
    tx_bytes: int
    tx_pieces: int  # work requests


@dataclass(frozen=True)
class LaneStats:
    """One lane of a peer. Counts are those of the peer's sessions so far."""

    index: int
    nic: str  # ours
    remote_nic: int  # the peer's, in the order of its address
    state: str  # fresh, up, lost, closed, offered, answered, proving: ARCHITECTURE.md, "Lane"
    tx_bytes: int  # acknowledged
    tx_pieces: int  # work requests, acknowledged
    outstanding: int  # work requests
    lost: int  # times that it broke while the session went on
    restored: int  # of these, times that it was opened again


@dataclass(frozen=True)
class PeerStats:
    """One peer. Counts are those of its sessions so far."""

    id: bytes
    label: str
    state: str  # idle, connecting, up, fencing (may still be inside a write), dead
    provider: str
    reason: str  # why it is dead
    lanes: int  # that are up
    tx_bytes: int
    tx_ranges: int
    tx_pieces: int
    rx_imms: int
    rx_frames: int
    tx_frames: int
    outstanding: int  # work requests
    queued: int  # transfers not yet wholly posted
    lane_stats: tuple[LaneStats, ...] = ()  # of this session, or the last one


@dataclass(frozen=True)
class EngineStats:
    """One engine. What was sent counts once it was acknowledged; sizes are bytes, times seconds."""

    tx_bytes: int
    tx_ranges: int
    tx_pieces: int  # work requests
    tx_messages: int
    rx_messages: int
    rx_imms: int  # immediates received and counted
    imm_stale: int  # dropped: released or foreign generation
    imm_overflow: int  # dropped: a peer's early ids overflowed
    transfers_done: int  # a scatter or barrier, and each of its parts
    transfers_failed: int
    transfers_cancelled: int
    transfers_live: int  # not yet released
    frames_rx: int
    frames_tx: int
    frames_refused: int  # malformed, stale or unknown
    handshakes_refused: int
    peers_up: int
    peers_lost: int
    lanes_lost: int  # broke while their session went on
    lanes_restored: int  # of these, opened again
    nics_lost: int  # times that a NIC of this engine went down
    regions: int
    counters: int
    remotes: int  # imported descriptors
    watches: int
    worker_turns: int
    worker_naps: int
    worker_sleeps: int
    helper_turns: int
    queue_full: int  # submissions that found a table full
    pieces_failed: int  # work requests that the provider reported as failed
    handshakes_resent: int  # for want of an answer
    frames_resent: int  # control frames that a lane lost, over another
    transfers_waiting: int  # not wholly posted
    transfers_posted: int  # wholly posted, not acknowledged
    messages_sending: int  # not yet held by the receiver's engine
    messages_waiting: int  # received, not yet taken by the application
    pieces_outstanding: int  # work requests posted, and not reported yet
    frames_waiting: int  # control frames that a lane lost, to be sent again
    commands_waiting: int  # submissions and cancellations that the worker has not seen yet
    failures: dict[str, int] = field(default_factory=dict)  # of transfers_failed, by error class
    latency: dict[str, Histogram] = field(default_factory=dict)  # submission to end, of those done
    waited: dict[str, Histogram] = field(default_factory=dict)  # to the first work request, of them
    nics: tuple[NicStats, ...] = ()
    peers: tuple[PeerStats, ...] = ()  # none of a closed engine

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain dicts and lists, e.g. for JSON; ids are hexadecimal."""
        result = asdict(self)
        result["peers"] = [{**peer, "id": peer["id"].hex()} for peer in result["peers"]]
        return result


_APART = ("failures", "latency", "waited", "nics", "peers")
_COUNTS = [field.name for field in fields(EngineStats) if field.name not in _APART]
_PEER_COUNTS = [field.name for field in fields(PeerStats)][5:-1]
_LANE_COUNTS = [field.name for field in fields(LaneStats)][4:]
_ERRORS = {code: kind.__name__ for code, kind in CLASSES.items()}


def snapshot(core: Core) -> EngineStats:
    """Read the counts of an engine and of all peers it knows."""
    stats = ffi.new("fab_stats *")
    check(lib.fab_engine_stats(core.ptr, stats))
    counts = {name: getattr(stats, name) for name in _COUNTS}
    failures = {_ERRORS[-i]: n for i, n in enumerate(stats.failures) if n and -i in _ERRORS}
    latency, waited = _times(core)
    return EngineStats(
        **counts,
        failures=failures,
        latency=latency,
        waited=waited,
        nics=_nics(core),
        peers=() if core.closed else _peers(core),
    )


def _times(core: Core) -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    whole, waited = ffi.new("fab_histogram *"), ffi.new("fab_histogram *")
    result: tuple[dict[str, Histogram], dict[str, Histogram]] = ({}, {})
    for op, name in OPS.items():
        check(lib.fab_engine_latency(core.ptr, op, whole, waited))
        for times, c in zip(result, (whole, waited), strict=True):
            times[name] = Histogram(c.count, c.sum / 1e9, tuple(c.buckets))
    return result


def _nics(core: Core) -> tuple[NicStats, ...]:
    out = ffi.new("fab_nic_stats[]", lib.FAB_MAX_NICS)
    count = check(lib.fab_engine_nic_stats(core.ptr, out, lib.FAB_MAX_NICS))
    return tuple(
        NicStats(text_of(nic.name), bool(nic.up), nic.tx_bytes, nic.tx_pieces)
        for nic in out[0:count]
    )


def _lanes(core: Core, peer: int) -> tuple[LaneStats, ...]:
    out = ffi.new("fab_lane_stats[]", lib.FAB_MAX_LANES)
    count = lib.fab_peer_lanes(core.ptr, peer, out, lib.FAB_MAX_LANES)
    return tuple(
        LaneStats(
            index=i,
            nic=text_of(lane.nic),
            remote_nic=lane.remote_nic,
            state=LANE_STATES.get(lane.state, str(lane.state)),
            **{name: getattr(lane, name) for name in _LANE_COUNTS},
        )
        for i, lane in enumerate(out[0 : max(0, count)])
    )


def _peers(core: Core) -> tuple[PeerStats, ...]:
    handles = ffi.new("int64_t[]", lib.FAB_MAX_PEERS)
    count = lib.fab_peer_list(core.ptr, handles, lib.FAB_MAX_PEERS)
    info = ffi.new("fab_peer_info *")
    result = []
    for handle in handles[0 : max(0, min(count, lib.FAB_MAX_PEERS))]:
        if lib.fab_peer_get_info(core.ptr, handle, info) == 0:  # else it was evicted meanwhile
            counts = {name: getattr(info, name) for name in _PEER_COUNTS}
            peer = PeerStats(
                id=bytes(info.id),
                label=text_of(info.label),
                state=PEER_STATES.get(info.state, str(info.state)),
                provider=text_of(info.provider),
                reason=text_of(info.text),
                lane_stats=_lanes(core, handle),
                **counts,
            )
            result.append(peer)
    return tuple(result)
