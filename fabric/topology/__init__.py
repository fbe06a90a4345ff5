"""What this machine looks like: GPUs, NICs, NUMA nodes and the PCIe between, as sysfs tells it.

`read` takes a snapshot. From it `Topology.propose` takes the NICs and the worker CPU for a device::

    proposal = fabric.topology.read().propose("cuda:3")
    engine = fabric.TransferEngine(
        proposal.provider or "auto", list(proposal.nics) or None, cpu=proposal.cpu
    )

Nothing is opened, loaded or kept, and no GPU library is asked.
"""

from ._cpus import NumaNode
from ._device import Device
from ._gpus import Gpu
from ._nics import Nic
from ._pci import Distance, PciDevice
from ._propose import Proposal
from ._topology import Topology, read

__all__ = [
    "Device",
    "Distance",
    "Gpu",
    "Nic",
    "NumaNode",
    "PciDevice",
    "Proposal",
    "Topology",
    "read",
]
