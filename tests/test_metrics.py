"""Prometheus metrics, read as a server reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import fabric
import fabric.metrics
from fabric import sim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

SIZE = 1 << 16
PATIENT = 30.0
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "observability.md"
Engines = tuple[fabric.TransferEngine, fabric.TransferEngine]


@pytest.fixture
def engines() -> Iterator[Engines]:
    """Two engines, of which a has written to b."""
    with fabric.TransferEngine("local", label="a") as a, fabric.TransferEngine("local") as b:
        source, d, count = a.alloc(SIZE), b.alloc(SIZE).descriptor, b.counter()
        for _ in range(100):
            a.write(source, d, imm=count.id).wait(timeout=PATIENT)
        count.wait(100, timeout=PATIENT)
        yield a, b


def scrape(*engines: fabric.TransferEngine, peers: bool = False) -> dict[str, Metric]:
    """Return all families by name."""
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(fabric.metrics.Collector(*engines, peers=peers))
    return read(registry)


def read(registry: prometheus_client.CollectorRegistry) -> dict[str, Metric]:
    """Return what a server reads."""
    text = prometheus_client.generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    result = {family.name: family for family in families}
    assert len(result) == len(families)
    return result


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """Return the one sample with this name and these labels."""
    samples = [sample for family in families.values() for sample in family.samples]
    found = [
        sample.value
        for sample in samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels)
    return found[0]


def test_counts(engines: Engines) -> None:
    families = scrape(*engines)
    b = engines[1].address.label
    assert value(families, "fabric_tx_bytes_total", engine="a") == 100 * SIZE
    assert value(families, "fabric_nic_tx_bytes_total", engine="a", nic="local0") == 100 * SIZE
    assert value(families, "fabric_rx_immediates_total", engine=b) == 100
    assert value(families, "fabric_transfers_total", engine="a", status="done") == 100
    assert value(families, "fabric_transfers_total", engine="a", status="failed") == 0
    assert value(families, "fabric_peers", engine="a") == 1
    assert not any(name.startswith(("fabric_peer_", "fabric_lane_")) for name in families)


def test_the_histogram_is_one(engines: Engines) -> None:
    family = scrape(engines[0])["fabric_transfer_duration_seconds"]
    assert family.type == "histogram"
    samples = [sample for sample in family.samples if sample.labels["kind"] == "write"]
    buckets = {
        float(sample.labels["le"]): sample.value
        for sample in samples
        if sample.name.endswith("_bucket")
    }
    assert list(buckets) == sorted(buckets)
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets[float("inf")] == 100
    rest = {sample.name.rpartition("_")[2]: sample.value for sample in samples}
    assert rest["count"] == 100
    assert 0 < rest["sum"] < 10.0


def test_names_follow_the_rules_and_are_documented() -> None:
    """A unit at the end, _total for what only grows, a text for each; also without any engine."""
    document = DOCUMENT.read_text()
    collector = fabric.metrics.Collector(peers=True)
    described = list(collector.describe())
    assert len(described) == len({family.name for family in described}) > 40
    for family in described:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name.startswith("fabric_")
        assert family.documentation.endswith(".")
        assert f"`{name}`" in document, name
        words = family.name.split("_")
        assert not {"ns", "ms", "us", "milliseconds", "kib"} & set(words)


def test_peers_and_lanes() -> None:
    with sim.World(1, kind="ordered") as world:
        a, b = world.engine("a", 2), world.engine("b", 2)
        source, d = a.alloc(SIZE), fabric.Descriptor.from_bytes(bytes(b.alloc(SIZE).descriptor))
        a.write(source, d).wait(timeout=PATIENT)
        world.run(0.1)
        families = scrape(a, peers=True)
        assert value(families, "fabric_peer_tx_bytes_total", engine="a", peer="b") == SIZE
        labels = {"engine": "a", "peer": "b", "lane": "1", "nic": "a.1"}
        assert value(families, "fabric_lane_up", **labels) == 1
        world.link("a.1", up=False)
        world.run(0.1)
        families = scrape(a, peers=True)
        assert value(families, "fabric_lane_up", **labels) == 0
        assert value(families, "fabric_lane_lost_total", **labels) == 1
        assert value(families, "fabric_nic_up", engine="a", nic="a.1") == 0
        world.set(lost_writes=1.0)
        with pytest.raises(fabric.TransferFailed):
            a.write(source, d).wait(timeout=PATIENT)
        failures = scrape(a)["fabric_transfer_failures"].samples
        assert sum(sample.value for sample in failures) == 1


def test_all_engines_of_the_process_and_equal_labels() -> None:
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(fabric.metrics.Collector())
    assert read(registry)["fabric_tx_bytes"].samples == []
    with fabric.TransferEngine("local", label="x"), fabric.TransferEngine("local", label="x"):
        labels = [sample.labels["engine"] for sample in read(registry)["fabric_tx_bytes"].samples]
        assert len(set(labels)) == 2
        assert all(label.startswith("x") for label in labels)
    assert read(registry)["fabric_tx_bytes"].samples == []


def test_a_closed_engine_tells_its_last_counts(engines: Engines) -> None:
    a, _ = engines
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(fabric.metrics.Collector(a, peers=True))
    a.close()
    assert value(read(registry), "fabric_tx_bytes_total", engine="a") == 100 * SIZE


def test_an_engine_that_is_gone_has_no_series() -> None:
    engine = fabric.TransferEngine("local")
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(fabric.metrics.Collector(engine))
    engine.close()
    del engine
    assert read(registry)["fabric_tx_bytes"].samples == []


def test_wrong_engines() -> None:
    with pytest.raises(fabric.InvalidArgument, match="engines"):
        fabric.metrics.Collector("a")  # type: ignore[arg-type]


def test_without_the_package_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["prometheus_client"] = None
import fabric.metrics
try:
    fabric.metrics.Collector()
except ImportError as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'llm-fabric[metrics]'" in said.stdout
