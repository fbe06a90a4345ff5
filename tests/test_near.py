"""Which NICs an engine takes by itself: those of the one GPU that the process sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import fabric
from fabric import _near, topology
from fabric._nics import Nic
from tests.test_topology import Tree, dgx_h100, p5, rdmap

if TYPE_CHECKING:
    from pathlib import Path

    from fabric.topology import Topology


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def pretend(
    monkeypatch: pytest.MonkeyPatch, tree: Tree, shape: Topology, visible: str | None
) -> None:
    """Let this process run on such a machine, with these GPUs and all its NICs."""
    for name in ("CUDA_DEVICE_ORDER", "FABRIC_EFA_NIC", "FABRIC_VERBS_NIC"):
        monkeypatch.delenv(name, raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    read = topology.read
    monkeypatch.setattr(topology, "read", lambda: read(tree.root))
    nics = [Nic(nic.provider or "", "", nic.name, 0, 1, False, True) for nic in shape.nics]
    monkeypatch.setattr(_near, "list_nics", lambda kind: [nic for nic in nics if nic.kind == kind])


def test_the_efas_of_the_one_gpu(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tree, p5(tree), "7")
    mine = rdmap(198, 199, 200, 201)
    assert _near.near_nics("auto") == ("local,efa", mine)
    assert _near.near_nics("efa") == ("efa", mine)
    assert _near.near_nics("verbs") == ("verbs", None)
    assert _near.near_nics("tcp") == ("tcp", None)
    monkeypatch.setenv("FABRIC_EFA_NIC", "rdmap79s0-rdm")
    assert _near.near_nics("auto") == ("auto", None)


def test_the_rail_of_the_one_gpu(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tree, dgx_h100(tree), "3")
    assert _near.near_nics("auto") == ("local,verbs", ["mlx5_5"])


@pytest.mark.parametrize("visible", [None, "0,1", ""])
def test_no_gpu_or_several(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    pretend(monkeypatch, tree, p5(tree), visible)
    assert _near.near_nics("auto") == ("auto", None)


def test_nics_that_the_provider_does_not_have(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may show sysfs of devices that it was not given."""
    pretend(monkeypatch, tree, p5(tree), "0")
    monkeypatch.setattr(_near, "list_nics", lambda kind: [])
    assert _near.near_nics("auto") == ("auto", None)

    def missing(kind: str) -> list[Nic]:
        raise fabric.ProviderUnavailable(f"no {kind} here")

    monkeypatch.setattr(_near, "list_nics", missing)
    assert _near.near_nics("efa") == ("efa", None)
