"""A machine as a tree of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ._cpus import text_of_cpus
from ._pci import HOST_BRIDGE, PciDevice

if TYPE_CHECKING:
    from ._gpus import Gpu
    from ._nics import Nic
    from ._topology import Topology

_INDENT = "  "
_Item: TypeAlias = "tuple[PciDevice, str]"


def tree(topology: Topology) -> str:
    """Return the tree: NUMA nodes, host bridges, bridges that fork, GPUs and NICs."""
    items = _items(topology)
    lines: list[str] = []
    for node in topology.nodes:
        lines.append(f"NUMA node {node.index}, CPUs {text_of_cpus(node.cpus) or 'none'}")
        lines += _below([item for item in items if item[0].numa_node == node.index], 0, 1)
    indices = {node.index for node in topology.nodes}
    strays = [item for item in items if item[0].numa_node not in indices]
    if strays:
        lines.append("NUMA node unknown" if topology.nodes else "no NUMA")
        lines += _below(strays, 0, 1)
    software = [nic for nic in topology.nics if nic.pci is None]
    if software:
        lines.append("no PCI device")
        lines += [_INDENT + nic_line(nic) for nic in software]
    if not topology.gpus or not topology.nics:
        lacks = ["no GPU"] * (not topology.gpus) + ["no RDMA device"] * (not topology.nics)
        lines.append(", ".join(lacks))
    return "\n".join([*lines, *(f"note: {note}" for note in topology.notes)])


def _items(topology: Topology) -> list[_Item]:
    items = [(gpu.pci, gpu_line(gpu)) for gpu in topology.gpus]
    items += [(nic.pci, nic_line(nic)) for nic in topology.nics if nic.pci]
    return sorted(items, key=lambda item: item[0].order)


def _below(items: Sequence[_Item], step: int, depth: int) -> Iterator[str]:
    """Yield the lines of the devices that have `step` steps of their paths in common."""
    for name, group in _forks(items, step).items():
        if any(len(pci.path) <= step + 1 for pci, _ in group):
            yield from (_INDENT * depth + text for _, text in group)
        elif HOST_BRIDGE.fullmatch(name):
            yield f"{_INDENT * depth}host bridge {name.removeprefix('pci')}"
            yield from _below(group, step + 1, depth + 1)
        elif len(group) > 1 and len(_forks(group, step + 1)) > 1:
            yield f"{_INDENT * depth}bridge {name}"
            yield from _below(group, step + 1, depth + 1)
        else:
            yield from _below(group, step + 1, depth)


def _forks(items: Sequence[_Item], step: int) -> dict[str, list[_Item]]:
    forks: dict[str, list[_Item]] = {}
    for item in items:
        forks.setdefault(item[0].path[step], []).append(item)
    return forks


def gpu_line(gpu: Gpu) -> str:
    """Return a line about a GPU."""
    return f"{gpu}  {gpu.vendor} {gpu.pci.vendor:04x}:{gpu.pci.device:04x}{_link(gpu.pci)}"


def nic_line(nic: Nic) -> str:
    """Return a line about a NIC."""
    speed = f"{nic.speed_bps / 1e9:g} Gb/s" if nic.speed_bps else "speed unknown"
    where = nic.pci.address if nic.pci else ""
    facts = [f"NIC {nic.name}", where, nic.transport, speed, nic.condition]
    facts.append(f"({', '.join(nic.netdevs)})" if nic.netdevs else "")
    return "  ".join(filter(None, facts)) + (_link(nic.pci) if nic.pci else "")


def _link(pci: PciDevice) -> str:
    known = pci.link_gts and pci.link_width
    return f"  PCIe {pci.link_gts:g} GT/s x{pci.link_width}" if known else ""
