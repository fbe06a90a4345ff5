"""A snapshot of a machine, and what it proposes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import InvalidArgument
from .._values import integer
from . import _facts, _propose, _tree
from ._cpus import MAX_CPU, NumaNode, read_cores, read_nodes
from ._device import Device, Place, place_of
from ._gpus import Gpu, read_gpus
from ._nics import Nic, read_nics
from ._pci import Distance, distance
from ._reader import Reader

if TYPE_CHECKING:
    from ._propose import Proposal

SYSFS = Path("/sys")


@dataclass(frozen=True)
class Topology:
    """GPUs, NICs, NUMA nodes and cores of a machine, when it was read."""

    gpus: tuple[Gpu, ...]  # by PCI address
    nics: tuple[Nic, ...]  # ports of RDMA devices, by PCI address; software devices come last
    nodes: tuple[NumaNode, ...]  # none where the kernel has no NUMA
    cores: tuple[tuple[int, ...], ...]  # online CPUs, the threads of a core together
    notes: tuple[str, ...]  # what could not be read, in words

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs that are online."""
        return frozenset(cpu for core in self.cores for cpu in core)

    def distance(self, gpu: Gpu, nic: Nic) -> Distance:
        """Return how far apart a GPU and a NIC are; a software device is far from everything."""
        if nic.pci is None:
            return Distance.SYS
        return distance(gpu.pci, nic.pci, one_node=len(self.nodes) <= 1)

    def nics_for(
        self, device: Device, count: int | None = None, *, allowed: Iterable[int] | None = None
    ) -> tuple[Nic, ...]:
        """Return the NICs for a device: those nearest to it that are active, shared fairly.

        NICs that this process cannot open, for a container has other devices' files, are left out.
        For a GPU the nearest common PCIe ancestor decides, then the NUMA node. Of NICs equally near
        the fastest are taken, of one kind. GPUs with the same nearest NICs divide them equally: 32
        for 8 GPUs are 4 each, 4 for 8 are one for every two. For ``"numa:1"`` they are those of
        that node, for ``"cpu"`` those of the node whose CPUs are allowed, or all if there are
        several or it has no NIC.

        Args:
            device: see `Device`.
            count: at most so many; None: the device's whole share.
            allowed: CPUs that the caller may use; None: those of its affinity.

        Raises:
            InvalidArgument: there is no such device, or the count is below 1.
        """
        most = len(self.nics) if count is None else integer("count", count, 1)
        place = self._place(device, self._allowed(allowed))
        return tuple(_propose.nics_for(self, place)[:most])

    def cpu_for(self, device: Device, *, allowed: Iterable[int] | None = None) -> int | None:
        """Return a CPU for the worker thread of a device's engine; None if none is allowed.

        It is for ``TransferEngine(cpu=...)`` and nothing else. A CPU that runs one of the engine's
        threads makes a bad home for a busy thread of the application: pinning both to it costs ten
        times the throughput.

        It is of the device's NUMA node, or if none of its CPUs is allowed, of the nearest node that
        has one. Different GPUs of a node get different cores as far as there are enough.

        Args:
            device: see `Device`.
            allowed: CPUs to choose from; None: those of the caller's affinity. CPUs that are not
                online do not count.

        Raises:
            InvalidArgument: there is no such device.
        """
        chosen = self._allowed(allowed)
        return _propose.cpu_for(self, self._place(device, chosen), chosen)

    def propose(self, device: Device, *, allowed: Iterable[int] | None = None) -> Proposal:
        """Return `nics_for` and `cpu_for` a device, with the reasons.

        Raises:
            InvalidArgument: there is no such device.
        """
        chosen = self._allowed(allowed)
        return _propose.propose(self, self._place(device, chosen), chosen)

    def tree(self) -> str:
        """Return a picture of the machine, in lines of text."""
        return _tree.tree(self)

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return _facts.facts(self)

    def _allowed(self, allowed: Iterable[int] | None) -> frozenset[int]:
        if allowed is None:
            chosen = frozenset(os.sched_getaffinity(0))
        else:
            chosen = frozenset(integer("allowed", cpu, 0, MAX_CPU) for cpu in allowed)
        return chosen & self.cpus if self.cpus else chosen

    def _place(self, device: Device, allowed: frozenset[int]) -> Place:
        place = place_of(device, self.gpus)
        if place.gpu:
            return place
        nodes = [node.index for node in self.nodes]
        if place.numa_node is not None:
            if place.numa_node not in nodes:
                raise InvalidArgument(f"device: {device!r}: the NUMA nodes here are {nodes}")
            return place
        homes = [node.index for node in self.nodes if node.cpus & allowed]
        return Place(numa_node=homes[0]) if len(homes) == 1 else place


def read(root: str | os.PathLike[str] = SYSFS) -> Topology:
    """Return a snapshot of the machine.

    What is missing, unreadable or odd is left out; tables are bounded, and what is left out of one
    for that is in `Topology.notes`. UUIDs of GPUs, and which devices a container may use, come from
    ``proc/driver/nvidia`` and ``dev`` beside the root.

    Args:
        root: sysfs, or a copy of one that has its symbolic links.

    Raises:
        InvalidArgument: the root is no sysfs. At ``/sys`` there may be none: then nothing is here.
    """
    reader = Reader(Path(root).absolute())
    if not reader.root.joinpath("devices").is_dir():
        if Path(root) != SYSFS:
            raise InvalidArgument(f"root: {os.fspath(root)}: no sysfs, it has no folder devices")
        reader.notes.append(f"{SYSFS}: sysfs is not mounted")
    nodes = read_nodes(reader)
    return Topology(
        gpus=read_gpus(reader),
        nics=read_nics(reader),
        nodes=nodes,
        cores=read_cores(reader, nodes),
        notes=tuple(reader.notes),
    )
