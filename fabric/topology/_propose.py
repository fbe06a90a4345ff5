"""Which NICs and which CPU a device gets, so that all the devices of a machine get fair shares."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .._native import lib
from ._cpus import NumaNode, text_of_cpus
from ._pci import Distance, shared_steps

if TYPE_CHECKING:
    from ._device import Place
    from ._gpus import Gpu
    from ._nics import Nic
    from ._topology import Topology

MAX_NICS: int = lib.FAB_MAX_NICS
"""NICs that an engine can open."""

Nearness: TypeAlias = tuple[int, int]
"""Less is nearer. Below a host bridge the depth of the nearest common ancestor decides."""


@dataclass(frozen=True)
class Proposal:
    """NICs and a worker CPU for the engine of one device."""

    device: str  # what it is for
    nics: tuple[str, ...]  # for TransferEngine(nics=...); may be empty
    provider: str | None  # verbs or efa; None: there are no NICs
    cpu: int | None  # for TransferEngine(cpu=...); None: no CPU is allowed
    distance: Distance | None  # of the NICs from the GPU
    reason: str  # why these, or why none

    def facts(self) -> dict[str, Any]:
        """Return it as JSON has it; the distance by its name."""
        distance = None if self.distance is None else self.distance.name
        return {**dataclasses.asdict(self), "nics": list(self.nics), "distance": distance}


def nearness(topology: Topology, gpu: Gpu, nic: Nic) -> Nearness:
    """Return how near a NIC is to a GPU."""
    distance = topology.distance(gpu, nic)
    if nic.pci is None or distance >= Distance.PHB:
        return distance, 0
    # PIX and PXB differ in the steps below the common ancestor, such as a switch inside a card.
    return Distance.PIX, -shared_steps(gpu.pci, nic.pci)


def usable(nics: Sequence[Nic]) -> list[Nic]:
    """Return the NICs that could be opened."""
    return [nic for nic in nics if nic.provider and nic.active and not nic.hidden]


def alike(nics: Sequence[Nic]) -> list[Nic]:
    """Return the fastest NICs of one kind.

    Every lane of a transfer carries the same share, so the slowest NIC sets the pace; and an
    Ethernet port for storage does not reach where the InfiniBand ports do.
    """
    kinds = Counter((nic.provider, nic.transport, nic.speed_bps) for nic in nics)
    best = max(kinds, key=lambda kind: (kind[2], kinds[kind]), default=None)
    return [nic for nic in nics if (nic.provider, nic.transport, nic.speed_bps) == best]


def nearest(topology: Topology, gpu: Gpu) -> tuple[Nearness, list[Nic]]:
    """Return the best NICs for a GPU if it had the machine alone, and how near they are."""
    near = [(nearness(topology, gpu, nic), nic) for nic in usable(topology.nics)]
    best = min((how for how, _ in near), default=(0, 0))
    return best, alike([nic for how, nic in near if how == best])


def share_of(topology: Topology, gpu: Gpu) -> list[Nic]:
    """Return a GPU's share of the NICs nearest to it.

    The GPUs to which the same NICs are nearest get equal parts of them, in the order of PCI
    addresses, or take turns where there are fewer NICs than GPUs. A GPU that has no NIC of its own
    is content with as many as it would get if those who are nearer had their part too.
    """
    best, near = nearest(topology, gpu)
    if not near:
        return []
    rivals = _rivals(topology, gpu)
    peers = [other for other in rivals if nearest(topology, other) == (best, near)]
    claims = [
        other for other in rivals if min(nearness(topology, other, nic) for nic in near) <= best
    ]
    begin = peers.index(gpu) * len(near) // len(peers)
    return near[begin : begin + max(1, len(near) // len(claims))]


def _rivals(topology: Topology, gpu: Gpu) -> list[Gpu]:
    """Return the GPUs that NICs are shared with, itself among them.

    Those of other containers are not, if this one was given NICs that they were not.
    """
    if not any(nic.hidden for nic in topology.nics):
        return list(topology.gpus)
    return [other for other in topology.gpus if other.ordinal is not None or other == gpu]


def nics_for(topology: Topology, place: Place) -> list[Nic]:
    """Return the NICs for a device."""
    if place.gpu:
        return share_of(topology, place.gpu)[:MAX_NICS]
    found = usable(topology.nics)
    local = [nic for nic in found if nic.pci and nic.pci.numa_node == place.numa_node]
    return alike(local if local and place.numa_node is not None else found)[:MAX_NICS]


def cpu_for(topology: Topology, place: Place, allowed: frozenset[int]) -> int | None:
    """Return a CPU for the worker of a device's engine, out of `allowed`; None if that is empty.

    The first core is where processes and interrupts begin, so it is taken last; the others are
    dealt out to the GPUs of the node, one thread of a core each.
    """
    node = place.gpu.pci.numa_node if place.gpu else place.numa_node
    pool = _near_cpus(topology.nodes, node, allowed)
    threads = [[cpu for cpu in core if cpu in pool] for core in topology.cores]
    cores = [core[0] for core in threads if core] or sorted(pool)
    if not cores:
        return None
    rest = cores[1:] or cores
    if not place.gpu:
        return rest[0]
    peers = [gpu for gpu in topology.gpus if gpu.pci.numa_node == node]
    return rest[peers.index(place.gpu) * len(rest) // len(peers)]


def _near_cpus(
    nodes: Sequence[NumaNode], index: int | None, allowed: frozenset[int]
) -> frozenset[int]:
    """Return the allowed CPUs of a node, or of the one nearest to it that has any."""
    own = next((node for node in nodes if node.index == index), None)
    if own is None:
        return allowed
    far = own.distances if len(own.distances) == len(nodes) else (0,) * len(nodes)
    ranked = sorted(zip(nodes, far, strict=True), key=lambda pair: (pair[0] != own, pair[1]))
    return next((node.cpus & allowed for node, _ in ranked if node.cpus & allowed), allowed)


def propose(topology: Topology, place: Place, allowed: frozenset[int]) -> Proposal:
    """Return NICs and a CPU for a device, with the reasons."""
    nics = nics_for(topology, place)
    cpu = cpu_for(topology, place, allowed)
    gpu = place.gpu
    return Proposal(
        device=str(gpu or ("cpu" if place.numa_node is None else f"numa:{place.numa_node}")),
        nics=tuple(nic.name for nic in nics),
        provider=nics[0].provider if nics else None,
        cpu=cpu,
        distance=topology.distance(gpu, nics[0]) if gpu and nics else None,
        reason=f"{_why_nics(topology, place, nics)}; {_why_cpu(topology, place, cpu)}",
    )


_WHERE = {
    Distance.PIX: "under the same PCIe switch",
    Distance.PXB: "under a common PCIe bridge",
    Distance.PHB: "at the same host bridge",
    Distance.NODE: "in the same NUMA node",
    Distance.SYS: "somewhere in the machine",
}


def _why_nics(topology: Topology, place: Place, nics: Sequence[Nic]) -> str:
    if not topology.nics:
        return "no RDMA device"
    if not nics:
        states = (f"{nic.name} is {nic.transport}, {nic.condition}" for nic in topology.nics[:4])
        return "no RDMA port can be used: " + ", ".join(states)
    if not place.gpu:
        return f"{len(nics)} of {len(topology.nics)} NICs"
    _, near = nearest(topology, place.gpu)
    where = _WHERE[topology.distance(place.gpu, nics[0])]
    return f"{len(nics)} of {len(near)} NICs {where}"


def _why_cpu(topology: Topology, place: Place, cpu: int | None) -> str:
    if cpu is None:
        return "no CPU is allowed"
    index = place.gpu.pci.numa_node if place.gpu else place.numa_node
    own = next((node for node in topology.nodes if node.index == index), None)
    if own is None:
        return "any CPU that is allowed"
    if cpu in own.cpus:
        return f"a CPU of NUMA node {index}"
    return f"no CPU of NUMA node {index} ({text_of_cpus(own.cpus)}) is allowed"
