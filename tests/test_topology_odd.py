"""Topology, where sysfs is odd: nothing raises, everything is bounded, and the answer is usable."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric import topology
from fabric.topology import Topology, _cpus, _gpus, _nics, _pci, _reader
from tests.test_topology import RAILS, Tree, dgx_h100, shares

GARBAGE = ["", "-1", "0x", "9" * 4096, "4: ", "\0", "\udcff\udcfe", "a,b-", "7-3", "nan Gb/sec"]


def sound(machine: Topology) -> None:
    """Ask for everything that there is."""
    assert machine.tree()
    machine.facts()
    own = os.sched_getaffinity(0)
    for device in (*machine.gpus, "cpu"):
        proposal = machine.propose(device, allowed=own)
        assert proposal.cpu in own | {None}
        assert set(proposal.nics) <= {nic.name for nic in machine.nics if nic.active}


def spoil(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("text", GARBAGE)
@pytest.mark.parametrize(
    "name",
    ["numa_node", "class", "state", "rate", "link_layer", "node_type", "cpulist", "distance"],
)
def test_garbage_in_one_kind_of_file(tmp_path: Path, name: str, text: str) -> None:
    tree = Tree(tmp_path)
    tree.cpus("0-1", "2-3")
    tree.gpu("pci0000:00", "0000:00:01.0")
    tree.mlx5("mlx5_0", "pci0000:00", "0000:00:02.0")
    for file in tree.root.glob(f"devices/**/{name}"):
        spoil(file, text)
    sound(tree.read())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_file_may_be_anything(tmp_path: Path, data: st.DataObject) -> None:
    """Files and folders of a small machine are spoilt, removed, or turned into something else."""
    top = tmp_path / "machine"
    shutil.rmtree(top, ignore_errors=True)
    tree = Tree(top)
    tree.cpus("0-1", "2-3", siblings=2)
    for number in (0, 1):
        bridge = (f"pci0000:{number}0", f"0000:{number}0:01.0")
        tree.gpu(*bridge, f"0000:{number}1:00.0", node=number)
        tree.mlx5(f"mlx5_{number}", *bridge, f"0000:{number}2:00.0", node=number, netdev="ib0")
    paths = sorted(path for path in tree.root.rglob("*") if path != tree.root / "devices")
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=8, unique=True)):
        if not os.path.lexists(path):
            continue
        how = data.draw(st.sampled_from(["text", "gone", "loop", "folder", "fifo"]))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        if how == "text":
            path.write_bytes(data.draw(st.binary(max_size=64)))
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
    sound(tree.read())


def test_without_numa_nodes_all_is_one_node(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("sys/devices/system/cpu/online", "0-3")
    tree.gpu("pci0000:00", "0000:00:01.0", node=-1)
    tree.mlx5("mlx5_0", "pci0000:40", "0000:40:01.0", node=-1)
    machine = tree.read()
    assert machine.distance(machine.gpus[0], machine.nics[0]) is topology.Distance.NODE
    assert machine.cpu_for(0, allowed=range(8)) == 1
    assert machine.tree().splitlines()[0] == "no NUMA"


def test_a_device_that_knows_no_node_is_far(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.cpus("0-1", "2-3")
    tree.gpu("pci0000:00", "0000:00:01.0", node=-1)
    tree.mlx5("mlx5_0", "pci0000:40", "0000:40:01.0", node=1)
    machine = tree.read()
    assert machine.distance(machine.gpus[0], machine.nics[0]) is topology.Distance.SYS
    assert shares(machine) == [["mlx5_0"]]
    assert "NUMA node unknown" in machine.tree()


def test_a_class_without_a_pci_bus(tmp_path: Path) -> None:
    """A container may have the one and not the other."""
    dgx_h100(Tree(tmp_path))
    shutil.rmtree(tmp_path / "sys/bus")
    machine = topology.read(tmp_path / "sys")
    assert not machine.gpus
    assert [nic.name for nic in machine.nics_for("numa:0")] == [*RAILS[:4]]


def test_copied_without_links_only_numa_nodes_are_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    dgx_h100(tree)
    flat = tmp_path / "flat/sys"
    (flat / "devices").mkdir(parents=True)
    shutil.copytree(tree.root / "devices/system", flat / "devices/system")
    for device in (tree.root / "bus/pci/devices").iterdir():
        (flat / "bus/pci/devices" / device.name).mkdir(parents=True)
        for name in ("class", "vendor", "device", "numa_node"):
            if (device / name).exists():
                shutil.copy(device / name, flat / "bus/pci/devices" / device.name / name)
    machine = topology.read(flat)
    assert len(machine.gpus) == 8
    assert machine.gpus[0].pci.path == ("0000:1b:00.0",)
    sound(machine)


def test_domains_behind_vmd_and_of_five_digits(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.cpus("0-3")
    vmd = ("pci0000:00", "0000:00:0e.0", "pci10000:e0")
    tree.gpu(*vmd, "10000:e0:01.0", "10000:e1:00.0")
    tree.mlx5("mlx5_0", *vmd, "10000:e0:01.0", "10000:e2:00.0")
    machine = tree.read()
    assert machine.gpus[0].pci.order == (0x10000, 0xE1, 0, 0)
    assert machine.distance(machine.gpus[0], machine.nics[0]) is topology.Distance.PIX
    sound(machine)


def test_links_that_lead_nowhere_near(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.cpus("0-1")
    tree.rdma("mlx5_0", None)
    (tree.root / "devices/virtual/infiniband/mlx5_0/device").symlink_to("/")
    assert tree.read().nics[0].pci is None


def test_virtual_functions_of_a_gpu_are_none(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    physical = tree.gpu("pci0000:00", "0000:00:01.0")
    virtual = tree.gpu("pci0000:00", "0000:00:01.4")
    (virtual / "physfn").symlink_to(physical)
    assert len(tree.read().gpus) == 1


def test_tables_are_bounded_and_say_what_they_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dgx_h100(Tree(tmp_path))
    monkeypatch.setattr(_nics, "MAX_DEVICES", 3)
    monkeypatch.setattr(_gpus, "MAX_PCI", 2)
    machine = topology.read(tmp_path / "sys")
    assert len(machine.nics) == 3
    assert not machine.gpus  # the first two functions are a bridge and a switch
    assert any("class/infiniband: only 3 of 12" in note for note in machine.notes)
    assert any("bus/pci/devices: only 2 of" in note for note in machine.notes)
    assert machine.tree().count("note: ") == 2


def test_a_folder_that_may_not_be_read_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dgx_h100(Tree(tmp_path))

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    machine = topology.read(tmp_path / "sys")
    assert not machine.nics
    assert f"{tmp_path}/sys/class/infiniband: Permission denied" in machine.notes


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,8", {0, 1, 2, 3, 8}),
        (" 1 , 3-3\n", {1, 3}),
        ("", set()),
        (None, set()),
        ("5-2", set()),
        ("0-", set()),
        ("\u0663", set()),
        ("8190-999999999", {8190, 8191}),
        ("999999999-999999999", set()),
    ],
)
def test_lists_of_cpus(text: str | None, cpus: set[int]) -> None:
    assert _cpus.cpus_of(text) == cpus


@given(st.sets(st.integers(0, _cpus.MAX_CPU), max_size=64))
def test_lists_of_cpus_read_back(cpus: set[int]) -> None:
    assert _cpus.cpus_of(_cpus.text_of_cpus(cpus)) == cpus


def test_a_path_is_cut_to_what_is_pci() -> None:
    path = "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
    steps = ("pci0000:00", "0000:00:01.0", "0000:01:00.0")
    assert _pci.path_of(path) == steps
    assert _pci.path_of(f"{path}/mlx5_core.rdma.0/infiniband/mlx5_0") == steps
    assert _pci.path_of("/sys/devices/virtual/infiniband/rxe0") == ()
    assert _pci.path_of("/pci0000:00" * (_pci.MAX_DEPTH + 1)) == ()


def test_of_a_file_a_page_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * (_reader.FILE_BYTES + 1))
    text = _reader.Reader(tmp_path).text("file")
    assert text is not None
    assert len(text) == _reader.FILE_BYTES


def test_a_large_machine_is_read_in_a_moment(tmp_path: Path) -> None:
    """Hundreds of virtual functions for the pods of a node."""
    tree = Tree(tmp_path)
    tree.cpus("0-1", "2-3")
    for number in range(8):
        tree.gpu(f"pci0000:{number}0", f"0000:{number}0:01.0", node=number // 4)
        for function in range(32):
            address = f"0000:{number}1:{function >> 3:02x}.{function & 7}"
            name = f"mlx5_{number * 32 + function}"
            tree.mlx5(name, f"pci0000:{number}0", f"0000:{number}0:02.0", address, node=number // 4)
    begin = time.process_time()
    machine = tree.read()
    assert [len(share) for share in shares(machine)] == [32] * 8
    assert time.process_time() - begin < 10
