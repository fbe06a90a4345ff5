"""Topology, on trees with the links and files of a real sysfs, of machines that are known.

Sources of the shapes. DGX H100: NVIDIA's user guide, the table of network modules (which ConnectX
belongs to which GPU, and the bus numbers, in the names of the interfaces); the bridges in between
are ours. p5en: the hwloc recording in the tests of aws-ofi-nccl. p5 and p4d: the topology files of
aws-ofi-nccl; p5, which p5e is like, with the bridges of p5en. p6: numbers and speeds as commonly
given, not verified.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fabric import InvalidArgument, topology
from fabric.topology import Distance, Topology
from fabric.topology import _topology as topology_module

H100, H200, A100, B200 = 0x2330, 0x2335, 0x20B0, 0x2901
ALL = range(192)


class Tree:
    """A sysfs in the making, with /proc and /dev beside it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / "sys"
        self.devices = 0  # of RDMA
        (self.root / "devices").mkdir(parents=True)

    def write(self, path: str, text: str) -> None:
        """Write a file, given from the top: sys/..., proc/... or dev/..."""
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def link(self, path: str, target: Path) -> None:
        """Link to `target` as sysfs does, relative."""
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, link.parent))

    def pci(self, *path: str, ids: tuple[int, int], code: int, node: int, driver: str = "") -> Path:
        """Add a function and the bridges on its path, which begins with the host bridge."""
        folder = self.root / "devices"
        for step, name in enumerate(path):
            folder /= name
            if step:
                self.link(f"bus/pci/devices/{name}", folder)
            if 0 < step < len(path) - 1:
                self._function(folder, (0x1000, 0xC030), 0x0604, node)
        self._function(folder, ids, code, node)
        self.write(self.of(folder / "current_link_speed"), "32.0 GT/s PCIe")
        self.write(self.of(folder / "current_link_width"), "16")
        if driver:
            (self.root / f"bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            self.link(self.of(folder / "driver")[4:], self.root / f"bus/pci/drivers/{driver}")
        return folder

    def of(self, file: Path) -> str:
        """Return a path from the top."""
        return str(file.relative_to(self.top))

    def _function(self, folder: Path, ids: tuple[int, int], code: int, node: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"vendor": ids[0], "device": ids[1], "class": code << 8}
        for name, value in facts.items():
            self.write(self.of(folder / name), f"{value:#06x}")
        self.write(self.of(folder / "numa_node"), str(node))

    def gpu(self, *path: str, model: int = H100, node: int = 0) -> Path:
        """Add a GPU of NVIDIA."""
        return self.pci(*path, ids=(0x10DE, model), code=0x0302, node=node, driver="nvidia")

    def rdma(
        self,
        name: str,
        parent: Path | None,
        *,
        gbps: float = 400,
        layer: str = "InfiniBand",
        states: tuple[str, ...] = ("4: ACTIVE",),
        kind: str = "1: CA",
        netdev: str = "",
    ) -> None:
        """Add an RDMA device; without a parent it is a virtual one."""
        home = parent or self.root / "devices" / "virtual"
        folder = home / "infiniband" / name
        self.write(self.of(folder / "node_type"), kind)
        for port, state in enumerate(states, 1):
            files = {
                "state": state,
                "phys_state": "5: LinkUp" if "ACTIVE" in state else "3: Disabled",
                "rate": f"{gbps:g} Gb/sec (4X NDR)",
                "link_layer": layer,
            }
            if netdev and layer == "Ethernet":
                files["gid_attrs/ndevs/0"] = netdev
            for file, text in files.items():
                self.write(self.of(folder / "ports" / str(port) / file), text)
        self.link(f"class/infiniband/{name}", folder)
        verbs = home / "infiniband_verbs" / f"uverbs{self.devices}"
        self.write(self.of(verbs / "ibdev"), name)
        self.link(f"class/infiniband_verbs/{verbs.name}", verbs)
        self.devices += 1
        if parent:
            self.link(self.of(folder / "device")[4:], parent)
            if netdev:
                (parent / "net" / netdev).mkdir(parents=True)

    def mlx5(self, name: str, *path: str, node: int = 0, **facts: Any) -> None:
        """Add a ConnectX-7."""
        code = 0x0200 if facts.get("layer") == "Ethernet" else 0x0207
        ids = (0x15B3, 0x1021)
        self.rdma(name, self.pci(*path, ids=ids, code=code, node=node, driver="mlx5_core"), **facts)

    def efa(self, *path: str, node: int = 0, gbps: float) -> None:
        """Add an EFA; udev names it by its bus and slot."""
        bus, slot = int(path[-1][5:7], 16), int(path[-1][8:10], 16)
        parent = self.pci(*path, ids=(0x1D0F, 0xEFA2), code=0x0200, node=node, driver="efa")
        name = f"rdmap{bus}s{slot}"
        self.rdma(name, parent, gbps=gbps, layer="Unknown", kind="7: unspecified")

    def cpus(self, *lists: str, siblings: int = 0) -> None:
        """Add a NUMA node for each list of CPUs; CPU n and CPU n + `siblings` are one core."""
        for node, text in enumerate(lists):
            folder = f"sys/devices/system/node/node{node}"
            self.write(f"{folder}/cpulist", text)
            distances = ["10" if other == node else "21" for other in range(len(lists))]
            self.write(f"{folder}/distance", " ".join(distances))
        for cpu in range(siblings):
            for thread in (cpu, cpu + siblings):
                folder = f"sys/devices/system/cpu/cpu{thread}/topology"
                self.write(f"{folder}/thread_siblings_list", f"{cpu},{cpu + siblings}")

    def driver_lists(self, address: str, minor: int, uuid: str, device_file: bool = True) -> None:
        """Let NVIDIA's driver list a GPU."""
        text = f"Model: \t NVIDIA H100\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}"
        self.write(f"proc/driver/nvidia/gpus/{address}/information", text)
        if device_file:
            self.write(f"dev/nvidia{minor}", "")

    def read(self) -> Topology:
        """Read it."""
        return topology.read(self.root)


DGX = {  # bus of the NIC: its name, bus of the GPU, NUMA node
    0x18: ("mlx5_0", 0x1B, 0),
    0x40: ("mlx5_3", 0x43, 0),
    0x4F: ("mlx5_4", 0x52, 0),
    0x5E: ("mlx5_5", 0x61, 0),
    0x9A: ("mlx5_6", 0x9D, 1),
    0xC0: ("mlx5_9", 0xC3, 1),
    0xCE: ("mlx5_10", 0xD1, 1),
    0xDC: ("mlx5_11", 0xDF, 1),
}
RAILS = [name for name, _, _ in DGX.values()]


def dgx_h100(tree: Tree, down: tuple[str, ...] = ()) -> Topology:
    """Eight GPUs, each with a ConnectX-7 under the same switch, and two dual NICs for storage."""
    tree.cpus("0-55,112-167", "56-111,168-223", siblings=112)
    for bus, (name, gpu, node) in DGX.items():
        top = f"pci0000:{bus - 3:02x}"
        switch = (top, f"0000:{bus - 3:02x}:01.0", f"0000:{bus - 2:02x}:00.0")
        states = ("1: DOWN",) if name in down else ("4: ACTIVE",)
        port = (*switch, f"0000:{bus - 1:02x}:00.0")
        tree.mlx5(
            name,
            *(*port, f"0000:{bus:02x}:00.0"),
            node=node,
            netdev=f"ibp{bus}s0",
            states=states,
        )
        tree.gpu(*switch, f"0000:{bus - 1:02x}:02.0", f"0000:{gpu:02x}:00.0", node=node)
    for bus, first, node in ((0x29, 1, 0), (0xAA, 7, 1)):
        for function in (0, 1):
            path = (f"pci0000:{bus - 1:02x}", f"0000:{bus - 1:02x}:01.0")
            name, netdev = f"mlx5_{first + function}", f"enp{bus}s0f{function}"
            address = f"0000:{bus:02x}:00.{function}"
            tree.mlx5(name, *path, address, node=node, gbps=200, layer="Ethernet", netdev=netdev)
    return tree.read()


def aws(
    tree: Tree, tops: list[int], efas: list[int], gpus: list[int], gbps: float, model: int
) -> None:
    """Add a switch for each top bus, with EFAs and GPUs at these offsets from it."""
    for index, top in enumerate(tops):
        node = index * 2 // len(tops)
        path = (f"pci0000:{top:02x}", f"0000:{top:02x}:00.0", f"0000:{top + 1:02x}:00.0")
        for offset in efas + gpus:
            port = f"0000:{top + 2:02x}:{offset >> 3:02x}.{offset & 7}"
            whole = (*path, port, f"0000:{top + offset:02x}:00.0")
            if offset in efas:
                tree.efa(*whole, node=node, gbps=gbps)
            else:
                tree.gpu(*whole, node=node, model=model)


def p5(tree: Tree) -> Topology:
    tree.cpus("0-47,96-143", "48-95,144-191", siblings=96)
    tops = [0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB]
    aws(tree, tops, [11, 12, 13, 14], [15], 100, H100)
    return tree.read()


def p5en(tree: Tree) -> Topology:
    tree.cpus("0-47,96-143", "48-95,144-191", siblings=96)
    aws(tree, [0x44, 0x5D, 0x76, 0x8F], [17, 18, 19, 20], [21, 22], 200, H200)
    return tree.read()


def p4d(tree: Tree) -> Topology:
    """The switches are hidden: two GPUs and an EFA sit on a bus of their own."""
    tree.cpus("0-23,48-71", "24-47,72-95", siblings=48)
    for bus, node in (("10", 0), ("20", 0), ("90", 1), ("a0", 1)):
        for slot in ("1c", "1d"):
            tree.gpu(f"pci0000:{bus}", f"0000:{bus}:{slot}.0", node=node, model=A100)
        tree.efa(f"pci0000:{bus}", f"0000:{bus}:1b.0", node=node, gbps=100)
    return tree.read()


def p6_b200(tree: Tree) -> Topology:
    """One EFA of 400 Gb/s for each of eight GPUs; the bridges are those of p5."""
    tree.cpus("0-47,96-143", "48-95,144-191", siblings=96)
    tops = [0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB]
    aws(tree, tops, [11], [15], 400, B200)
    return tree.read()


def p6_b300(tree: Tree) -> Topology:
    """Two EFAs of 400 Gb/s for each of eight GPUs; as above."""
    tree.cpus("0-47,96-143", "48-95,144-191", siblings=96)
    tops = [0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB]
    aws(tree, tops, [11, 12], [15], 400, B200)
    return tree.read()


def laptop(tree: Tree) -> Topology:
    """An integrated GPU of Intel, and wifi."""
    tree.cpus("0-7")
    tree.pci("pci0000:00", "0000:00:02.0", ids=(0x8086, 0x9A49), code=0x0300, node=-1)
    tree.pci("pci0000:00", "0000:00:14.3", ids=(0x8086, 0xA0F0), code=0x0280, node=-1)
    return tree.read()


def softroce(tree: Tree) -> Topology:
    """A guest with virtio and two rxe."""
    tree.cpus("0-1")
    for number in (0, 1):
        address = f"0000:00:0{number + 3}.0"
        tree.pci("pci0000:00", address, ids=(0x1AF4, 0x1041), code=0x0200, node=-1)
        tree.rdma(f"rxe{number}", None, gbps=2.5, layer="Ethernet", netdev=f"eth{number}")
    return tree.read()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return Tree(tmp_path)


def shares(machine: Topology) -> list[list[str]]:
    """Return the names of the NICs of each GPU."""
    return [[nic.name for nic in machine.nics_for(gpu)] for gpu in machine.gpus]


def rdmap(*buses: int) -> list[str]:
    return [f"rdmap{bus}s0-rdm" for bus in buses]


def test_dgx_h100_gives_each_gpu_its_rail(tree: Tree) -> None:
    machine = dgx_h100(tree)
    assert [gpu.pci.order[1] for gpu in machine.gpus] == [gpu for _, gpu, _ in DGX.values()]
    assert shares(machine) == [[name] for name in RAILS]
    proposal = machine.propose(3, allowed=range(224))
    assert (proposal.nics, proposal.provider) == (("mlx5_5",), "verbs")
    assert proposal.distance is Distance.PIX
    assert proposal.reason == "1 of 1 NICs under the same PCIe switch; a CPU of NUMA node 0"


def test_what_is_read_of_a_nic_and_a_gpu(tree: Tree) -> None:
    machine = dgx_h100(tree)
    nic = machine.nics[0]
    assert (nic.name, nic.device, nic.port, nic.transport) == ("mlx5_0", "mlx5_0", 1, "InfiniBand")
    assert (nic.state, nic.phys_state, nic.speed_bps) == ("ACTIVE", "LinkUp", 400_000_000_000)
    assert nic.netdevs == ("ibp24s0",)
    assert nic.pci is not None
    assert (nic.pci.driver, nic.pci.numa_node) == ("mlx5_core", 0)
    gpu = machine.gpus[4]
    assert (gpu.vendor, gpu.pci.device, gpu.ordinal, gpu.uuid) == ("NVIDIA", H100, 4, None)
    assert (gpu.pci.link_gts, gpu.pci.link_width) == (32.0, 16)
    steps = ["0000:97:01.0", "0000:98:00.0", "0000:99:02.0", "0000:9d:00.0"]
    assert gpu.pci.path == ("pci0000:97", *steps)


def test_distances_have_the_names_of_nccl(tree: Tree) -> None:
    machine = dgx_h100(tree)
    seen = {nic.name: machine.distance(machine.gpus[0], nic) for nic in machine.nics}
    assert seen["mlx5_0"] is Distance.PIX
    assert {seen[name] for name in ("mlx5_1", "mlx5_2", *RAILS[1:4])} == {Distance.NODE}
    assert {seen[name] for name in ("mlx5_7", "mlx5_8", *RAILS[4:])} == {Distance.SYS}


def test_a_gpu_whose_nic_is_down_borrows_one_of_the_fast_ones_nearby(tree: Tree) -> None:
    machine = dgx_h100(tree, down=("mlx5_0",))
    first, *others = shares(machine)
    assert first == ["mlx5_3"]  # not storage's, and not all of the node's
    assert others == [[name] for name in RAILS[1:]]


def test_p5_gives_each_gpu_the_four_efas_of_its_switch(tree: Tree) -> None:
    machine = p5(tree)
    assert len(machine.nics) == 32
    assert {nic.provider for nic in machine.nics} == {"efa"}
    assert machine.gpus[0].pci.address == "0000:53:00.0"
    assert shares(machine)[0] == rdmap(79, 80, 81, 82)
    assert shares(machine)[7] == rdmap(198, 199, 200, 201)
    proposal = machine.propose("cuda:0", allowed=ALL)
    assert (proposal.provider, proposal.distance) == ("efa", Distance.PIX)


def test_p5en_divides_the_four_efas_of_a_switch_between_two_gpus(tree: Tree) -> None:
    machine = p5en(tree)
    assert len(machine.nics) == 16
    assert shares(machine)[:4] == [rdmap(85, 86), rdmap(87, 88), rdmap(110, 111), rdmap(112, 113)]
    dealt = [name for share in shares(machine) for name in share]
    assert dealt == [nic.name for nic in machine.nics]


def test_p4d_lets_two_gpus_use_one_efa(tree: Tree) -> None:
    machine = p4d(tree)
    names = [f"rdmap{bus}s27-rdm" for bus in (16, 32, 144, 160)]
    assert shares(machine) == [[name] for name in names for _ in range(2)]
    assert machine.propose(0, allowed=ALL).distance is Distance.PHB


@pytest.mark.parametrize(("shape", "each"), [(p6_b200, 1), (p6_b300, 2)])
def test_p6_gives_each_gpu_the_efas_of_its_switch(tree: Tree, shape: Any, each: int) -> None:
    machine = shape(tree)
    assert [len(share) for share in shares(machine)] == [each] * 8
    assert shares(machine)[0] == rdmap(79, 80)[:each]
    assert [name for share in shares(machine) for name in share] == [
        nic.name for nic in machine.nics
    ]
    assert {nic.speed_bps for nic in machine.nics} == {400_000_000_000}
    assert machine.propose("cuda:7", allowed=ALL).distance is Distance.PIX


@pytest.mark.parametrize("shape", [dgx_h100, p5, p5en, p4d, p6_b200, p6_b300])
def test_gpus_share_fairly_and_get_cores_of_their_own(tree: Tree, shape: Any) -> None:
    machine = shape(tree)
    assert len({len(share) for share in shares(machine)}) == 1
    threads = {cpu: core for core in machine.cores for cpu in core}
    cpus = [machine.cpu_for(gpu, allowed=machine.cpus) for gpu in machine.gpus]
    assert len({threads[cpu] for cpu in cpus if cpu is not None}) == len(machine.gpus)
    for gpu, cpu in zip(machine.gpus, cpus, strict=True):
        assert cpu in machine.nodes[gpu.pci.numa_node or 0].cpus
        assert cpu not in (machine.cores[0][0], min(machine.nodes[1].cpus))


def test_a_laptop_has_no_gpu_no_nic_and_says_so(tree: Tree) -> None:
    machine = laptop(tree)
    assert not machine.gpus
    assert not machine.nics
    proposal = machine.propose("cpu", allowed=range(8))
    assert (proposal.nics, proposal.provider, proposal.cpu) == ((), None, 1)
    assert proposal.reason.startswith("no RDMA device")
    assert machine.tree() == "NUMA node 0, CPUs 0-7\nno GPU, no RDMA device"


def test_softroce_devices_are_far_from_all_and_usable(tree: Tree) -> None:
    machine = softroce(tree)
    assert [nic.name for nic in machine.nics_for("cpu", allowed=[0, 1])] == ["rxe0", "rxe1"]
    assert {(nic.provider, nic.transport, nic.pci) for nic in machine.nics} == {
        ("verbs", "RoCE", None)
    }
    assert machine.nics[0].netdevs == ("eth0",)
    assert machine.tree().splitlines()[1:] == [
        "no PCI device",
        "  NIC rxe0  RoCE  2.5 Gb/s  ACTIVE  (eth0)",
        "  NIC rxe1  RoCE  2.5 Gb/s  ACTIVE  (eth1)",
        "no GPU",
    ]


def test_a_vm_that_hides_pcie_deals_by_numa_node(tree: Tree) -> None:
    """As on Azure: each function is in a PCI domain of its own, below a folder of VMBus."""
    tree.cpus("0-3", "4-7")
    for number in range(4):
        node = number // 2
        bridge = f"pci000{number + 1}:00"
        home = "LNXSYSTM:00/VMBUS:00/47505500"
        tree.gpu(home, bridge, f"000{number + 1}:00:00.0", node=node)
        tree.mlx5(f"mlx5_{number}", f"pci010{number + 1}:00", f"010{number + 1}:00:00.0", node=node)
    tree.mlx5("mlx5_an0", "pcie000:00", "e000:00:02.0", node=0, gbps=80, layer="Ethernet")
    machine = tree.read()
    assert machine.gpus[0].pci.path == ("pci0001:00", "0001:00:00.0")
    assert shares(machine) == [["mlx5_0"], ["mlx5_1"], ["mlx5_2"], ["mlx5_3"]]


def test_gpus_without_a_nic_in_their_node_take_turns(tree: Tree) -> None:
    tree.cpus("0-3", "4-7")
    for number in range(4):
        bus = f"{number + 1}0"
        tree.gpu(f"pci0000:{bus}", f"0000:{bus}:00.0", node=number // 2)
    for number in range(2):
        tree.mlx5(f"mlx5_{number}", f"pci0000:a{number}", f"0000:a{number}:00.0", node=0)
    assert shares(tree.read()) == [["mlx5_0"], ["mlx5_1"], ["mlx5_0"], ["mlx5_1"]]


def test_the_nearest_common_ancestor_wins_within_a_tree_of_switches(tree: Tree) -> None:
    tree.cpus("0-3")
    top = ("pci0000:00", "0000:00:01.0", "0000:01:00.0")
    for number in (0, 1):
        below = (*top, f"0000:02:0{number}.0", f"0000:{number + 3}0:00.0")
        tree.gpu(*below, f"0000:{number + 3}1:00.0", f"0000:{number + 3}2:00.0")
        tree.mlx5(f"mlx5_{number}", *below, f"0000:{number + 3}1:01.0", f"0000:{number + 3}3:00.0")
    machine = tree.read()
    assert shares(machine) == [["mlx5_0"], ["mlx5_1"]]
    assert machine.distance(machine.gpus[0], machine.nics[1]) is Distance.PXB
    picture = [line.split("  NVIDIA")[0] for line in machine.tree().splitlines()]
    assert picture[:5] == [
        "NUMA node 0, CPUs 0-3",
        "  host bridge 0000:00",
        "    bridge 0000:01:00.0",
        "      bridge 0000:30:00.0",
        "        GPU 0 0000:32:00.0",
    ]


def test_ports_are_named_where_there_are_several(tree: Tree) -> None:
    tree.cpus("0-3")
    tree.gpu("pci0000:00", "0000:00:01.0")
    tree.mlx5("mlx4_0", "pci0000:00", "0000:00:02.0", states=("4: ACTIVE", "4: ACTIVE", "1: DOWN"))
    machine = tree.read()
    assert [nic.name for nic in machine.nics] == ["mlx4_0:1", "mlx4_0:2", "mlx4_0:3"]
    assert shares(machine) == [["mlx4_0:1", "mlx4_0:2"]]
    assert machine.nics_for(0, 1)[0].name == "mlx4_0:1"
    with pytest.raises(InvalidArgument, match="count"):
        machine.nics_for(0, 0)


def test_what_no_provider_can_open_is_shown_and_not_proposed(tree: Tree) -> None:
    tree.cpus("0-3")
    tree.rdma("siw0", None, layer="Ethernet", kind="4: RNIC", netdev="eth0")
    tree.rdma("smi1", None, kind="2: switch")
    tree.rdma("rxe0", None, layer="Ethernet", states=("1: DOWN",))
    machine = tree.read()
    proposal = machine.propose("cpu", allowed=[0])
    assert proposal.nics == ()
    assert "rxe0 is RoCE, DOWN, siw0 is iWARP, ACTIVE, no provider" in proposal.reason
    assert "NIC siw0  iWARP  400 Gb/s  ACTIVE, no provider  (eth0)" in machine.tree()


def test_an_old_rxe_over_amazons_ethernet_is_no_efa(tree: Tree) -> None:
    tree.cpus("0-3")
    ena = tree.pci("pci0000:00", "0000:00:05.0", ids=(0x1D0F, 0xEC20), code=0x0200, node=-1)
    tree.rdma("rxe0", ena, layer="Ethernet")
    assert tree.read().nics[0].provider == "verbs"


def test_nics_of_a_numa_node(tree: Tree) -> None:
    machine = dgx_h100(tree)
    assert [nic.name for nic in machine.nics_for("numa:1")] == RAILS[4:]
    on_node_1 = machine.nics_for("cpu", allowed=[60, 61])
    assert [nic.name for nic in on_node_1] == RAILS[4:]
    assert [nic.name for nic in machine.nics_for("cpu", allowed=[0, 60])] == RAILS
    with pytest.raises(InvalidArgument, match=r"NUMA nodes here are \[0, 1\]"):
        machine.nics_for("numa:7")


class Torch(SimpleNamespace):
    """What a torch.device looks like."""


@pytest.mark.parametrize(
    "name",
    [
        2,
        "cuda:2",
        "0000:52:00.0",
        "00000000:52:00.0",
        "52:00.0",
        Torch(type="cuda", index=2),
    ],
)
def test_names_of_a_gpu(tree: Tree, name: Any) -> None:
    machine = dgx_h100(tree)
    assert machine.nics_for(name) == machine.nics_for(machine.gpus[2])


def test_a_torch_device_may_be_the_cpu(tree: Tree) -> None:
    machine = dgx_h100(tree)
    device = Torch(type="cpu", index=None)
    assert machine.nics_for(device, allowed=[0]) == machine.nics_for("numa:0")


@pytest.mark.parametrize(
    "name",
    [8, -1, "cuda:8", "cuda", "gpu0", "", "0000:18:00.0", "zz:00.0", None, True, 1.0, b"cpu",
     Torch(type="cuda", index=None), Torch(type="meta", index=None)],
)  # fmt: skip
def test_names_of_nothing(tree: Tree, name: Any) -> None:
    machine = dgx_h100(tree)
    for call in (machine.nics_for, machine.cpu_for, machine.propose):
        with pytest.raises(InvalidArgument, match="device"):
            call(name)


def test_a_gpu_of_another_machine_is_refused(tree: Tree, tmp_path: Path) -> None:
    other = dgx_h100(Tree(tmp_path / "other"))
    with pytest.raises(InvalidArgument, match="another machine"):
        p5(tree).nics_for(other.gpus[0])


@pytest.mark.parametrize(
    ("value", "buses"),
    [
        ("3,1", ["61", "43"]),
        ("GPU-5", ["9d"]),
        (" 2 , GPU-00,", ["52", "1b"]),
        ("6,-1,2", ["d1"]),
        ("1,99,2", ["43"]),
        ("", []),
    ],
)
def test_cuda_visible_devices(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, value: str, buses: list[str]
) -> None:
    for index, (_, gpu, _) in enumerate(DGX.values()):
        uuid = f"GPU-{'00' if index == 0 else index + 1}ab-cd"
        tree.driver_lists(f"0000:{gpu:02x}:00.0", index, uuid)
    machine = dgx_h100(tree)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    for ordinal, bus in enumerate(buses):
        assert machine.nics_for(ordinal) == machine.nics_for(f"{bus}:00.0")
    with pytest.raises(InvalidArgument, match=f"of {len(buses)} GPUs"):
        machine.nics_for(len(buses))


@pytest.mark.parametrize("value", ["GPU-ffff", "MIG-1234", "NoDevFiles", "all"])
def test_a_gpu_that_nobody_knows_is_named(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    machine = dgx_h100(tree)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(InvalidArgument, match=f"CUDA_VISIBLE_DEVICES: '{value}'"):
        machine.nics_for(0)
    assert machine.nics_for("1b:00.0")  # needs none of it


@pytest.mark.parametrize("masked", [True, False])
def test_a_container_counts_the_gpus_that_it_was_given(tree: Tree, masked: bool) -> None:
    """Its runtime masks the driver's list, or gives it only some device files."""
    for index, (_, bus, _) in enumerate(DGX.values()):
        given = index in (3, 6)
        if given or not masked:
            address = f"0000:{bus:02x}:00.0"
            tree.driver_lists(address, index, f"GPU-{index}", device_file=given)
    machine = dgx_h100(tree)
    assert [gpu.ordinal for gpu in machine.gpus] == [None, None, None, 0, None, None, 1, None]
    assert [nic.name for nic in machine.nics_for(1)] == ["mlx5_10"]
    assert "GPU (hidden) 0000:1b:00.0" in machine.tree()


def test_a_pod_is_proposed_the_nics_that_it_was_given(tree: Tree) -> None:
    """EFA's device plugin gives it files, and sysfs shows it all 32."""
    for number in (2, 3, 8):
        tree.write(f"dev/infiniband/uverbs{number}", "")
    machine = p5(tree)
    assert shares(machine)[0] == rdmap(81, 82)
    assert shares(machine)[2] == rdmap(113)
    assert "rdmap79s0-rdm  0000:4f:00.0  EFA  100 Gb/s  ACTIVE, hidden" in machine.tree()


def test_a_pods_own_nics_are_not_shared_with_the_gpus_of_others(tree: Tree) -> None:
    dgx_h100(tree)
    tree.driver_lists("0000:1b:00.0", 0, "GPU-0")
    for number in (1, 2):  # of mlx5_3 and mlx5_4
        tree.write(f"dev/infiniband/uverbs{number}", "")
    assert shares(tree.read())[0] == ["mlx5_3", "mlx5_4"]


def test_of_different_models_the_order_is_not_guessed(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.gpu("pci0000:00", "0000:00:01.0", model=0x1FB0)
    tree.gpu("pci0000:00", "0000:00:02.0", model=A100)
    machine = tree.read()
    with pytest.raises(InvalidArgument, match="CUDA_DEVICE_ORDER"):
        machine.propose(0)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert machine.propose(1, allowed=[0]).device == "GPU 1 0000:00:02.0"


def test_amd_gpus_are_counted_as_hip_does(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.cpus("0-3")
    for slot in range(4):
        ids = (0x1002, 0x74A1)
        tree.pci("pci0000:00", f"0000:00:0{slot}.0", ids=ids, code=0x1200, node=0, driver="amdgpu")
    machine = tree.read()
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "3,2,1")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,0")
    assert machine.propose("cuda:0", allowed=[0]).device == "GPU 1 0000:00:01.0"
    assert machine.propose("cuda:1", allowed=[0]).device == "GPU 3 0000:00:03.0"


def test_the_cpu_is_never_one_that_is_excluded(tree: Tree) -> None:
    machine = dgx_h100(tree)
    for allowed in ([5], [5, 6], [56, 57], range(100, 120), range(0, 224, 7), [168]):
        for gpu in machine.gpus:
            assert machine.cpu_for(gpu, allowed=allowed) in allowed
    own = os.sched_getaffinity(0)
    assert machine.cpu_for(0) in own
    assert machine.propose(0).cpu in own


def test_where_a_node_is_excluded_the_nearest_is_taken(tree: Tree) -> None:
    tree.cpus("0-1", "2-3", "4-5")
    tree.write("sys/devices/system/node/node0/distance", "10 31 21")
    tree.gpu("pci0000:00", "0000:00:01.0", node=0)
    machine = tree.read()
    assert machine.cpu_for(0, allowed=[2, 3, 4, 5]) == 5
    assert machine.cpu_for(0, allowed=[2]) == 2
    assert "no CPU of NUMA node 0 (0-1) is allowed" in machine.propose(0, allowed=[2]).reason
    assert machine.cpu_for(0, allowed=[]) is None
    assert machine.cpu_for(0, allowed=[6, 7]) is None  # not online
    with pytest.raises(InvalidArgument, match="allowed"):
        machine.cpu_for(0, allowed=[-1])


def test_the_tree_of_a_switch(tree: Tree) -> None:
    lines = p5en(tree).tree().splitlines()
    assert lines[:4] == [
        "NUMA node 0, CPUs 0-47,96-143",
        "  host bridge 0000:44",
        "    bridge 0000:45:00.0",
        "      NIC rdmap85s0-rdm  0000:55:00.0  EFA  200 Gb/s  ACTIVE  PCIe 32 GT/s x16",
    ]
    assert lines[7] == "      GPU 0 0000:59:00.0  NVIDIA 10de:2335  PCIe 32 GT/s x16"
    assert sum("GPU" in line for line in lines) == 8


def test_a_root_that_is_no_sysfs_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing", str(tmp_path / "a\udcff")):
        with pytest.raises(InvalidArgument, match="no sysfs"):
            topology.read(root)


def test_a_machine_without_sysfs_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_module, "SYSFS", tmp_path / "sys")
    machine = topology.read(tmp_path / "sys")
    assert machine.notes == (f"{tmp_path}/sys: sysfs is not mounted",)
    assert machine.propose("cpu").cpu in os.sched_getaffinity(0)


def test_this_machine() -> None:
    machine = topology.read()
    assert machine.tree()
    assert machine.propose("cpu").cpu in os.sched_getaffinity(0)
