"""``fabric doctor``: whether this machine can do what a provider needs, one line a condition."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from . import topology
from ._engine import TransferEngine
from ._errors import FabricError, text_of
from ._native import ffi, lib
from ._nics import list_nics

_MEMLOCK_LEAST = 1 << 30
_HIDDEN_PATHS = ("FI_EFA_USE_DEVICE_RDMA", "FI_EFA_ENABLE_SHM_TRANSFER", "FI_EFA_CQ_SIZE")
"""Variables of libfabric that change what is measured."""


@dataclass(frozen=True)
class Finding:
    """One condition, whether it holds, and what to do where it does not."""

    condition: str
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'BAD '} {self.condition}: {self.text}"


def examine_efa() -> list[Finding]:
    """Look at everything that the provider ``efa`` needs here; opens an engine for a moment."""
    findings = [_library(), _devices()]
    if findings[-1].good:
        findings.append(_device_writes())
    return [*findings, _locked_memory(), _sysfs(), _variables()]


def _library() -> Finding:
    path, version = ffi.new("char[]", 4096), ffi.new("char[]", 4096)
    if lib.fab_library(b"libfabric", path, 4096, version, 4096):
        return Finding("libfabric", False, _why_no_device())
    number = tuple(int(part) for part in text_of(version).split(".")[:2])
    good = number >= (1, 18)
    way_out = "" if good else "; 1.18 or later is needed: set FABRIC_LIBFABRIC"
    return Finding("libfabric", good, f"{text_of(version)}, {text_of(path)}{way_out}")


def _why_no_device() -> str:
    try:
        list_nics("efa")
    except FabricError as error:
        return str(error)
    return "it cannot be loaded"


def _devices() -> Finding:
    try:
        nics = list_nics("efa")
    except FabricError as error:
        return Finding("devices", False, str(error))
    speeds = sum(nic.speed_bps for nic in nics) / 1e9
    return Finding("devices", True, f"{len(nics)}, {speeds:g} Gb/s together: {nics[0].name} ...")


def _device_writes() -> Finding:
    """Whether writes with immediate are the device's: an engine is refused where they are not."""
    try:
        with TransferEngine(provider="efa") as engine:
            name = engine.nics[0].name
    except FabricError as error:
        return Finding("device writes", False, str(error))
    if os.environ.get("FABRIC_EFA_ALLOW_EMULATED") == "1":
        text = "not known, as FABRIC_EFA_ALLOW_EMULATED=1 permits others"
        return Finding("device writes", False, text)
    return Finding("device writes", True, f"{name} writes with immediates itself")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", True, "unlimited")
    good = soft >= _MEMLOCK_LEAST
    return Finding(
        "locked memory", good, f"{soft >> 20} MiB; regions are pinned: ulimit -l unlimited"
    )


def _sysfs() -> Finding:
    machine = topology.read()
    nics = [nic for nic in machine.nics if nic.provider == "efa"]
    nodes = sorted({nic.pci.numa_node for nic in nics if nic.pci and nic.pci.numa_node is not None})
    text = f"{len(nics)} EFA devices on NUMA nodes {nodes}, {len(machine.gpus)} GPUs"
    return Finding("topology", bool(nics) or not Path("/sys/class/infiniband").exists(), text)


def _variables() -> Finding:
    found = [f"{name}={os.environ[name]}" for name in _HIDDEN_PATHS if name in os.environ]
    return Finding("environment", True, ", ".join(found) or "no variable of libfabric's efa is set")
