"""Prometheus metrics of this process's engines, for the package ``prometheus_client``.

::

    import fabric.metrics, prometheus_client

    prometheus_client.REGISTRY.register(fabric.metrics.Collector())
    prometheus_client.start_http_server(9400)

Nothing is counted here: a scrape reads `TransferEngine.stats`. The names are listed in
docs/observability.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ._engine import TransferEngine, open_engines
from ._errors import FabricError
from ._values import needs

if TYPE_CHECKING:
    from ._stats import EngineStats, Histogram, PeerStats

BOUNDS_NS = tuple(1 << exponent for exponent in range(10, 37, 2))
"""Where the buckets of the histograms end, in nanoseconds: from a microsecond to 69 seconds."""

_COUNTERS = {
    "fabric_tx_bytes": ("tx_bytes", "Payload bytes that were acknowledged."),
    "fabric_tx_ranges": ("tx_ranges", "Ranges that were acknowledged."),
    "fabric_tx_work_requests": ("tx_pieces", "Work requests that were acknowledged."),
    "fabric_work_requests_failed": ("pieces_failed", "Work requests that a provider failed."),
    "fabric_tx_messages": ("tx_messages", "Messages that receivers' engines hold."),
    "fabric_rx_messages": ("rx_messages", "Messages received."),
    "fabric_rx_immediates": ("rx_imms", "Immediates received and counted."),
    "fabric_tx_frames": ("frames_tx", "Control frames sent."),
    "fabric_rx_frames": ("frames_rx", "Control frames received."),
    "fabric_frames_refused": ("frames_refused", "Control frames dropped: malformed or stale."),
    "fabric_frames_resent": ("frames_resent", "Control frames that a lane lost, sent again."),
    "fabric_handshakes_refused": ("handshakes_refused", "Peers that were not let in."),
    "fabric_handshakes_resent": ("handshakes_resent", "Handshakes sent again unanswered."),
    "fabric_peers_lost": ("peers_lost", "Sessions that are over."),
    "fabric_lanes_lost": ("lanes_lost", "Lanes that broke while their session went on."),
    "fabric_lanes_restored": ("lanes_restored", "Lanes that were opened again."),
    "fabric_nics_lost": ("nics_lost", "Times that a NIC went down."),
    "fabric_submissions_refused": ("queue_full", "Submissions that found a table full."),
    "fabric_worker_turns": ("worker_turns", "Turns of the worker thread."),
    "fabric_worker_sleeps": ("worker_sleeps", "Times that the worker thread went to sleep."),
    "fabric_helper_turns": ("helper_turns", "Turns of threads that waited."),
}
_GAUGES = {
    "fabric_peers": ("peers_up", "Peers whose session is up."),
    "fabric_transfers_waiting": ("transfers_waiting", "Transfers not wholly posted."),
    "fabric_transfers_posted": ("transfers_posted", "Transfers posted and not acknowledged."),
    "fabric_transfers_held": ("transfers_live", "Transfers that are not released."),
    "fabric_work_requests_outstanding": ("pieces_outstanding", "Work requests under way."),
    "fabric_messages_sending": ("messages_sending", "Messages that no receiver holds yet."),
    "fabric_messages_waiting": ("messages_waiting", "Messages the application did not take yet."),
    "fabric_frames_waiting": ("frames_waiting", "Control frames that are to be sent again."),
    "fabric_commands_waiting": ("commands_waiting", "Submissions the worker has not seen yet."),
    "fabric_regions": ("regions", "Registered regions."),
    "fabric_counters": ("counters", "Open counters."),
    "fabric_remotes": ("remotes", "Imported descriptors."),
}
_ENDS = ("done", "failed", "cancelled")


class Collector:
    """Metrics of engines, for ``prometheus_client``'s registries.

    Every series has the label ``engine``. An engine that was closed goes on telling its last counts
    as long as somebody holds it; then its series end.

    Args:
        engines: those to tell of; none: all that are open in this process when it is asked, one
            collector for all of them. What is closed is not among these.
        peers: also tell of each peer and lane. The label ``peer`` has as many values as an engine
            knows labels of peers, at most 1024; where they restart, each takes another.

    Raises:
        ImportError: there is no ``prometheus_client``.
        InvalidArgument: not an engine.
    """

    def __init__(self, *engines: TransferEngine, peers: bool = False) -> None:
        try:
            from prometheus_client import core
        except ImportError:
            raise ImportError(
                "fabric.metrics needs prometheus_client: pip install 'llm-fabric[metrics]'"
            ) from None
        for engine in engines:
            needs("engines", engine, TransferEngine)
        self._core: Any = core
        self._peers = peers
        self._engines = [weakref.ref(engine) for engine in engines] or None

    def describe(self) -> Iterable[Any]:
        """Name all metrics, for the registry, without asking an engine."""
        return self._families({})

    def collect(self) -> Iterator[Any]:
        """Read all engines; what cannot be read is left out."""
        return iter(self._families(self._read()))

    def _read(self) -> dict[str, EngineStats]:
        """Return what the engines tell, by a label that is theirs alone."""
        if self._engines is None:
            engines = open_engines()
        else:
            engines = [engine for ref in self._engines if (engine := ref()) is not None]
        result: dict[str, EngineStats] = {}
        for engine in engines:
            label = engine.address.label
            if label in result:  # of one process, without labels of their own
                label = f"{label}/{engine.address.id.hex()[:8]}"
            try:
                result[label] = engine.stats()
            except FabricError:  # it belongs to the process that this one was forked from
                continue
        return result

    def _families(self, read: dict[str, EngineStats]) -> list[Any]:
        families = [*self._plain(read), *self._ends(read), *self._nics(read), *self._times(read)]
        return families + (self._of_peers(read) if self._peers else [])

    def _plain(self, read: dict[str, EngineStats]) -> Iterator[Any]:
        kinds = (
            (self._core.CounterMetricFamily, _COUNTERS),
            (self._core.GaugeMetricFamily, _GAUGES),
        )
        for kind, metrics in kinds:
            for name, (field, text) in metrics.items():
                family = kind(name, text, labels=["engine"])
                for engine, stats in read.items():
                    family.add_metric([engine], getattr(stats, field))
                yield family

    def _ends(self, read: dict[str, EngineStats]) -> Iterator[Any]:
        counter = self._core.CounterMetricFamily
        ends = counter("fabric_transfers", "Transfers that ended.", labels=["engine", "status"])
        failures = counter(
            "fabric_transfer_failures", "Transfers that failed.", labels=["engine", "error"]
        )
        dropped = counter(
            "fabric_rx_immediates_dropped", "Immediates dropped.", labels=["engine", "reason"]
        )
        for engine, stats in read.items():
            for status in _ENDS:
                ends.add_metric([engine, status], getattr(stats, f"transfers_{status}"))
            for error, number in stats.failures.items():
                failures.add_metric([engine, error], number)
            for reason in ("stale", "overflow"):
                dropped.add_metric([engine, reason], getattr(stats, f"imm_{reason}"))
        yield from (ends, failures, dropped)

    def _nics(self, read: dict[str, EngineStats]) -> Iterator[Any]:
        labels = ["engine", "nic"]
        up = self._core.GaugeMetricFamily("fabric_nic_up", "1: the link is up.", labels=labels)
        sent = self._core.CounterMetricFamily(
            "fabric_nic_tx_bytes", "Payload bytes acknowledged over this NIC.", labels=labels
        )
        requests = self._core.CounterMetricFamily(
            "fabric_nic_tx_work_requests", "Work requests acknowledged.", labels=labels
        )
        for engine, stats in read.items():
            for name, nics in _by(stats.nics, lambda nic: nic.name).items():
                up.add_metric([engine, name], int(any(nic.up for nic in nics)))
                sent.add_metric([engine, name], sum(nic.tx_bytes for nic in nics))
                requests.add_metric([engine, name], sum(nic.tx_pieces for nic in nics))
        yield from (up, sent, requests)

    def _times(self, read: dict[str, EngineStats]) -> Iterator[Any]:
        texts = {
            "fabric_transfer_duration_seconds": (
                "latency",
                "From submission to the end, of transfers that were done.",
            ),
            "fabric_transfer_wait_seconds": (
                "waited",
                "From submission to the first work request, of transfers that were done.",
            ),
        }
        for name, (field, text) in texts.items():
            family = self._core.HistogramMetricFamily(name, text, labels=["engine", "kind"])
            for engine, stats in read.items():
                for op, times in getattr(stats, field).items():
                    family.add_metric([engine, op], _buckets(times), sum_value=times.sum)
            yield family

    def _of_peers(self, read: dict[str, EngineStats]) -> list[Any]:
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        peer = {"labels": ["engine", "peer"]}
        lane = {"labels": ["engine", "peer", "lane", "nic"]}
        families = [
            gauge("fabric_peer_up", "1: the session is up.", **peer),
            counter("fabric_peer_tx_bytes", "Payload bytes acknowledged by the peer.", **peer),
            counter("fabric_peer_rx_immediates", "Immediates of the peer.", **peer),
            gauge("fabric_peer_work_requests_outstanding", "Work requests under way.", **peer),
            gauge("fabric_peer_transfers_waiting", "Transfers not wholly posted.", **peer),
            gauge("fabric_lane_up", "1: the lane works.", **lane),
            counter("fabric_lane_tx_bytes", "Payload bytes acknowledged over the lane.", **lane),
            counter("fabric_lane_tx_work_requests", "Work requests acknowledged.", **lane),
            gauge("fabric_lane_work_requests_outstanding", "Work requests under way.", **lane),
            counter("fabric_lane_lost", "Times that the lane broke.", **lane),
            counter("fabric_lane_restored", "Times that it was opened again.", **lane),
        ]
        for engine, stats in read.items():
            # A peer that restarts may keep its label: one series for both.
            for label, peers in _by(stats.peers, lambda peer: peer.label).items():
                _add(families[:5], [engine, label], _peer_values(peers))
                lanes = [lane for peer in peers for lane in peer.lane_stats]
                for (index, nic), same in _by(lanes, lambda lane: (lane.index, lane.nic)).items():
                    _add(families[5:], [engine, label, str(index), nic], _lane_values(same))
        return families


def _by(things: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


def _add(families: list[Any], labels: list[str], values: list[int]) -> None:
    for family, value in zip(families, values, strict=True):
        family.add_metric(labels, value)


def _peer_values(peers: list[PeerStats]) -> list[int]:
    fields = ("tx_bytes", "rx_imms", "outstanding", "queued")
    up = int(any(peer.state == "up" for peer in peers))
    return [up, *(sum(getattr(peer, field) for peer in peers) for field in fields)]


def _lane_values(lanes: list[Any]) -> list[int]:
    fields = ("tx_bytes", "tx_pieces", "outstanding", "lost", "restored")
    up = int(any(lane.state == "up" for lane in lanes))
    return [up, *(sum(getattr(lane, field) for lane in lanes) for field in fields)]


def _buckets(times: Histogram) -> list[tuple[str, float]]:
    inner = [(str(bound / 1e9), float(times.below(bound))) for bound in BOUNDS_NS]
    return [*inner, ("+Inf", float(times.count))]
