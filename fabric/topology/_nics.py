"""NICs: the ports of the RDMA devices."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from ._pci import PciDevice, read_pci
from ._reader import Reader

MAX_DEVICES = 1024
MAX_PORTS = 16  # of a device
MAX_NETDEVS = 4  # of a port

_AMAZON = 0x1D0F
_CLASS = ("class", "infiniband")
_VERBS = ("class", "infiniband_verbs")
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_UVERBS = re.compile(r"uverbs[0-9]{1,4}", re.ASCII)
_PORT = re.compile(r"[1-9][0-9]{0,2}", re.ASCII)
_STATE = re.compile(r"[0-9]+: ([A-Za-z_]{1,32})", re.ASCII)
_RATE = re.compile(r"([0-9]{1,5}(?:\.[0-9]{1,3})?) Gb/sec", re.ASCII)
_NODE_TYPE = re.compile(r"([0-9]+):", re.ASCII)
_CA, _RNIC = 1, 4  # enum rdma_node_type of the kernel
_LINK_LAYERS = {"InfiniBand": "InfiniBand", "Ethernet": "RoCE"}
_PROVIDERS = {"EFA": "efa", "iWARP": None, "other": None}


@dataclass(frozen=True)
class Nic:
    """A port of an RDMA device."""

    name: str  # what TransferEngine(nics=[...]) takes
    provider: str | None  # that can open it: verbs or efa; None: none can
    device: str  # the RDMA device, as `rdma link` and ibv_devices have it
    port: int  # of that device, from 1
    transport: str  # InfiniBand, RoCE, iWARP, EFA, other or unknown
    state: str  # of the port: ACTIVE, DOWN, INIT, ARMED or unknown
    phys_state: str  # LinkUp, Polling, Disabled or unknown
    speed_bps: int  # bits per second; 0: unknown
    netdevs: tuple[str, ...]  # network interfaces of the port, as far as known
    pci: PciDevice | None  # None: a software device, such as rxe
    hidden: bool  # the container has other devices' files, and not this one's

    @property
    def condition(self) -> str:
        """The state, and whatever else keeps it from being used."""
        lacks = [] if self.provider else ["no provider"]
        return ", ".join([self.state, *lacks, *["hidden"] * self.hidden])

    @property
    def active(self) -> bool:
        """Whether the port can carry traffic."""
        return self.state == "ACTIVE"

    @property
    def order(self) -> tuple[bool, tuple[int, ...], str, int]:
        """Sorts by PCI address and port; software devices come last."""
        return (self.pci is None, self.pci.order if self.pci else (), self.device, self.port)


def read_nics(reader: Reader) -> tuple[Nic, ...]:
    """Return the ports of all RDMA devices, by PCI address."""
    nics: list[Nic] = []
    hidden = _hidden(reader)
    for device in reader.names(*_CLASS, like=_NAME, limit=MAX_DEVICES):
        nics += _ports(reader, device, hidden=device in hidden)
    return tuple(sorted(nics, key=lambda nic: nic.order))


def _hidden(reader: Reader) -> set[str]:
    """Return the devices that a container sees in sysfs and was not given.

    The device plugins of Kubernetes give a pod the files of its devices and show it all of sysfs.
    """
    beside = Reader(reader.root.parent)
    if not beside.has("dev", "infiniband"):
        return set()
    files = reader.names(*_VERBS, like=_UVERBS, limit=MAX_DEVICES)
    lacking = [file for file in files if not beside.has("dev", "infiniband", file)]
    return {reader.text(*_VERBS, file, "ibdev") or "" for file in lacking}


def _ports(reader: Reader, device: str, *, hidden: bool) -> list[Nic]:
    ports = reader.names(*_CLASS, device, "ports", like=_PORT, limit=MAX_PORTS)
    pci = read_pci(reader, *_CLASS, device, "device")
    transport = _transport(reader, device, pci)
    nics = [_port(reader, device, int(port), len(ports), transport, pci) for port in ports]
    return [dataclasses.replace(nic, hidden=hidden) for nic in nics]


def _transport(reader: Reader, device: str, pci: PciDevice | None) -> str | None:
    """Return what the device speaks, or None where that depends on the port."""
    # By id as well: a recorded tree may lack the link to the driver. Only the ids of EFA, as an
    # old kernel's rxe gives its Ethernet device, which may be Amazon's, for its parent.
    if pci and (pci.driver == "efa" or (pci.vendor == _AMAZON and pci.device >> 4 == 0xEFA)):
        return "EFA"
    kind = _NODE_TYPE.match(reader.text(*_CLASS, device, "node_type") or "")
    if kind is None or int(kind[1]) == _CA:
        return None
    return "iWARP" if int(kind[1]) == _RNIC else "other"  # a switch's own port, or usNIC


def _port(
    reader: Reader, device: str, port: int, ports: int, transport: str | None, pci: PciDevice | None
) -> Nic:
    folder = (*_CLASS, device, "ports", str(port))
    layer = reader.text(*folder, "link_layer") or ""
    transport = transport or _LINK_LAYERS.get(layer, "unknown")
    rate = _RATE.match(reader.text(*folder, "rate") or "")
    return Nic(
        name=_name(device, port, ports, transport),
        # iWARP is out: it has no write with an immediate.
        provider=_PROVIDERS.get(transport, "verbs"),
        device=device,
        port=port,
        transport=transport,
        state=_word(reader.text(*folder, "state")),
        phys_state=_word(reader.text(*folder, "phys_state")),
        speed_bps=round(float(rate[1]) * 1e9) if rate else 0,
        netdevs=_netdevs(reader, device, port),
        pci=pci,
        hidden=False,
    )


def _name(device: str, port: int, ports: int, transport: str) -> str:
    if transport == "EFA":
        return f"{device}-rdm"  # libfabric's name of the domain
    return device if ports == 1 else f"{device}:{port}"


def _word(text: str | None) -> str:
    found = _STATE.match(text or "")
    return found[1] if found else "unknown"


def _netdevs(reader: Reader, device: str, port: int) -> tuple[str, ...]:
    folder = (*_CLASS, device, "ports", str(port), "gid_attrs", "ndevs")
    found = [reader.text(*folder, str(index)) or "" for index in range(MAX_NETDEVS)]
    named = [name for name in dict.fromkeys(found) if _NAME.fullmatch(name)]
    if not named:  # InfiniBand has GIDs of no interface
        named = reader.names(*_CLASS, device, "device", "net", like=_NAME, limit=MAX_NETDEVS)
    return tuple(named)
