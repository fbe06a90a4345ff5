"""PCI functions, their paths down from the host bridge, and how far apart two of them are."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._reader import Reader

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.ASCII)
HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}", re.ASCII)
MAX_DEPTH = 64
"""Steps of a path. A switch is two; the deepest machines have about ten."""
MAX_WIDTH = 32
"""Lanes of a PCIe link. A function that is powered off reports 63."""
MAX_NODE = 1023

_GTS = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,2})?) GT/s", re.ASCII)


class Distance(enum.IntEnum):
    """How far apart two devices are, by what lies between; the names are NCCL's. Less is nearer."""

    PIX = 1  # at most one PCIe switch
    PXB = 2  # several PCIe bridges, and no host bridge
    PHB = 3  # a host bridge, which is in the CPU
    NODE = 4  # different host bridges of one NUMA node
    SYS = 5  # different NUMA nodes, or nobody knows


@dataclass(frozen=True)
class PciDevice:
    """One function of the PCI bus."""

    address: str  # domain:bus:device.function in hexadecimal
    vendor: int  # PCI vendor id; 0: unknown
    device: int  # PCI device id
    class_code: int  # base class and subclass: 0x0302
    driver: str | None  # that is bound to it
    numa_node: int | None  # None: not known
    path: tuple[str, ...]  # from the host bridge ("pci0000:15") through bridges to the function
    link_gts: float  # gigatransfers per second of each lane of its PCIe link; 0: unknown
    link_width: int  # lanes of that link; 0: unknown

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts by address."""
        return tuple(int(part, 16) for part in re.split("[:.]", self.address))


def path_of(real: str) -> tuple[str, ...]:
    """Return the part of a device's real path that is PCI, from the host bridge down.

    Domains behind Intel VMD or Hyper-V nest a host bridge in something else; auxiliary devices
    and the class folders lie below the function and are cut off.
    """
    steps: list[str] = []
    for part in real.split("/"):
        if HOST_BRIDGE.fullmatch(part) or (steps and ADDRESS.fullmatch(part)):
            steps.append(part)
        elif steps:
            break
    return tuple(steps) if len(steps) <= MAX_DEPTH else ()


def read_pci(reader: Reader, *folder: str) -> PciDevice | None:
    """Return the function that a folder of sysfs stands for; None if it is of another bus."""
    real = reader.real(*folder)
    path = path_of(real) or (real.rpartition("/")[2],)
    address = path[-1]
    if not ADDRESS.fullmatch(address):
        return None
    node = reader.number(*folder, "numa_node")
    speed = _GTS.match(reader.text(*folder, "current_link_speed") or "")
    width = reader.number(*folder, "current_link_width") or 0
    driver = reader.real(*folder, "driver").rpartition("/")[2]
    return PciDevice(
        address=address,
        vendor=(reader.number(*folder, "vendor") or 0) & 0xFFFF,
        device=(reader.number(*folder, "device") or 0) & 0xFFFF,
        class_code=(reader.number(*folder, "class") or 0) >> 8 & 0xFFFF,
        driver=driver if reader.has(*folder, "driver") else None,
        numa_node=node if node is not None and 0 <= node <= MAX_NODE else None,
        path=path,
        link_gts=float(speed[1]) if speed else 0.0,
        link_width=width if 0 < width <= MAX_WIDTH else 0,
    )


def shared_steps(a: PciDevice, b: PciDevice) -> int:
    """Return how many steps from the host bridge down two paths have in common."""
    count = 0
    for one, other in zip(a.path, b.path, strict=False):
        if one != other:
            break
        count += 1
    return count


def distance(a: PciDevice, b: PciDevice, *, one_node: bool) -> Distance:
    """Return how far apart two functions are.

    Args:
        a: a function.
        b: another one.
        one_node: the machine has one NUMA node, so that all is on it whatever sysfs says.
    """
    shared = shared_steps(a, b)
    if shared == 0:
        near = one_node or (a.numa_node is not None and a.numa_node == b.numa_node)
        return Distance.NODE if near else Distance.SYS
    if shared == 1:
        return Distance.PHB
    # A switch is an upstream port, which both have in common, and one downstream port for each.
    bridges = max(len(a.path), len(b.path)) - shared - 1
    return Distance.PIX if bridges <= 1 else Distance.PXB
