"""GPUs: which functions of the PCI bus are some, and what CUDA or HIP call them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._pci import ADDRESS, PciDevice, read_pci
from ._reader import Reader

MAX_PCI = 8192
"""Functions of the PCI bus that are looked at."""

NVIDIA, AMD = 0x10DE, 0x1002
VENDORS = {NVIDIA: "NVIDIA", AMD: "AMD"}
_CLASSES = {
    NVIDIA: (0x0300, 0x0302),
    AMD: (0x0300, 0x0302, 0x0380, 0x1200),  # Instinct cards call themselves display or accelerator
}
_BUS = ("bus", "pci", "devices")
_PROC = ("proc", "driver", "nvidia", "gpus")
_UUID = re.compile(r"^GPU UUID:\s*(GPU-[0-9a-f-]{1,64})\s*$", re.ASCII | re.MULTILINE)
_MINOR = re.compile(r"^Device Minor:\s*([0-9]{1,4})\s*$", re.ASCII | re.MULTILINE)


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    pci: PciDevice
    ordinal: int | None  # among the GPUs of its vendor that this process may use; None: not one
    uuid: str | None  # as nvidia-smi prints it

    @property
    def vendor(self) -> str:
        """NVIDIA or AMD."""
        return VENDORS[self.pci.vendor]

    def __str__(self) -> str:
        number = "(hidden)" if self.ordinal is None else str(self.ordinal)
        return f"GPU {number} {self.pci.address}"


def read_gpus(reader: Reader) -> tuple[Gpu, ...]:
    """Return the GPUs of the PCI bus, by address."""
    names = reader.names(*_BUS, like=ADDRESS, limit=MAX_PCI)
    read = [read_pci(reader, *_BUS, name) for name in names if _is_gpu(reader, name)]
    found = sorted((pci for pci in read if pci), key=lambda pci: pci.order)
    beside = Reader(reader.root.parent)
    about = {pci: beside.text(*_PROC, pci.address, "information") or "" for pci in found}
    ordinals = {
        pci: ordinal
        for vendor in VENDORS
        for ordinal, pci in enumerate(_usable(beside, about, vendor))
    }
    return tuple(
        Gpu(pci=pci, ordinal=ordinals.get(pci), uuid=_first(_UUID, about[pci])) for pci in found
    )


def _is_gpu(reader: Reader, name: str) -> bool:
    classes = _CLASSES.get(reader.number(*_BUS, name, "vendor") or 0, ())
    if (reader.number(*_BUS, name, "class") or 0) >> 8 not in classes:
        return False
    return not reader.has(*_BUS, name, "physfn")  # a virtual function, for some guest


def _usable(beside: Reader, about: dict[PciDevice, str], vendor: int) -> list[PciDevice]:
    """Return the GPUs of a vendor that this process may use.

    A container sees all GPUs in sysfs. It may use those that NVIDIA's driver lists in /proc, which
    the container's runtime masks, and whose device file is there, which it does in any case.
    """
    found = [pci for pci in about if pci.vendor == vendor]
    if vendor != NVIDIA or not beside.has(*_PROC):
        return found
    listed = [pci for pci in found if about[pci]]
    return [pci for pci in listed if _has_file(beside, about[pci])] or listed


def _has_file(beside: Reader, about: str) -> bool:
    minor = _first(_MINOR, about)
    return minor is not None and beside.has("dev", f"nvidia{minor}")


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found[1] if found else None
