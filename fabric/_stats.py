"""What an engine has done and holds, as one snapshot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ._errors import check, text_of
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


@dataclass(frozen=True)
class PeerStats:
    """One peer. Counts are those of its sessions so far."""

    id: bytes
    label: str
    state: str  # idle, connecting, up, fencing (may still be inside a write), dead
    provider: str
    reason: str  # why it is dead
    lanes: int
    tx_bytes: int
    tx_ranges: int
    tx_pieces: int
    rx_imms: int
    rx_frames: int
    tx_frames: int
    outstanding: int  # work requests
    queued: int  # transfers not yet wholly posted


@dataclass(frozen=True)
class EngineStats:
    """One engine. What was sent counts once it was acknowledged; sizes are bytes."""

    tx_bytes: int
    tx_ranges: int
    tx_pieces: int  # work requests
    tx_messages: int
    rx_messages: int
    rx_imms: int  # immediates received and counted
    imm_stale: int  # dropped: released or foreign generation
    imm_overflow: int  # dropped: a peer's early ids overflowed
    transfers_done: int
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
    peers: tuple[PeerStats, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain dicts and lists, e.g. for JSON; ids are hexadecimal."""
        result = asdict(self)
        result["peers"] = [{**peer, "id": peer["id"].hex()} for peer in result["peers"]]
        return result


_COUNTS = [field.name for field in fields(EngineStats) if field.name != "peers"]
_PEER_COUNTS = [field.name for field in fields(PeerStats)][5:]


def snapshot(core: Core) -> EngineStats:
    """Read the counts of an engine and of all peers it knows."""
    stats = ffi.new("fab_stats *")
    check(lib.fab_engine_stats(core.ptr, stats))
    counts = {name: getattr(stats, name) for name in _COUNTS}
    return EngineStats(**counts, peers=() if core.closed else _peers(core))


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
                **counts,
            )
            result.append(peer)
    return tuple(result)
