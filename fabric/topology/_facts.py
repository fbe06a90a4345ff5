"""A machine as JSON has it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ._cpus import text_of_cpus

if TYPE_CHECKING:
    from ._pci import PciDevice
    from ._topology import Topology


def facts(topology: Topology) -> dict[str, Any]:
    """Return everything that a topology knows. CPUs are lists as the kernel writes them."""
    return {
        "numa_nodes": [
            {
                "index": node.index,
                "cpus": text_of_cpus(node.cpus),
                "distances": list(node.distances),
            }
            for node in topology.nodes
        ],
        "cores": [text_of_cpus(core) for core in topology.cores],
        "gpus": [
            {"ordinal": gpu.ordinal, "uuid": gpu.uuid, "vendor": gpu.vendor, "pci": _pci(gpu.pci)}
            for gpu in topology.gpus
        ],
        "nics": [
            {**dataclasses.asdict(nic), "netdevs": list(nic.netdevs), "pci": _pci(nic.pci)}
            for nic in topology.nics
        ],
        "notes": list(topology.notes),
    }


def _pci(pci: PciDevice | None) -> dict[str, Any] | None:
    if pci is None:
        return None
    ids = {"vendor": f"{pci.vendor:04x}", "device": f"{pci.device:04x}"}
    code = {"class_code": f"{pci.class_code:04x}"}
    return {**dataclasses.asdict(pci), **ids, **code, "path": list(pci.path)}
