"""What users call a device, and which GPU or NUMA node that is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from .._errors import InvalidArgument
from ._gpus import AMD, NVIDIA, Gpu
from ._pci import ADDRESS

Device: TypeAlias = Any
"""A `Gpu`; an ordinal as CUDA counts, 3 or ``"cuda:3"``; a ``torch.device``; a PCI address such as
``"0000:19:00.0"``; ``"cpu"``; or ``"numa:1"``.

Ordinals are of the GPUs that this process may use, in the order of their PCI addresses, as selected
by CUDA_VISIBLE_DEVICES (HIP: ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES). A PCI address is free
of all that; ``torch.cuda.get_device_properties`` has its parts.
"""

_SELECTORS = {
    NVIDIA: ("CUDA_VISIBLE_DEVICES",),
    AMD: ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
}
_CUDA = re.compile(r"cuda:([0-9]{1,4})", re.ASCII)
_NUMA = re.compile(r"numa:([0-9]{1,4})", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True)
class Place:
    """What a device's name stands for: a GPU, a NUMA node, or (neither) the CPUs of the caller."""

    gpu: Gpu | None = None
    numa_node: int | None = None


def place_of(device: Device, gpus: Sequence[Gpu]) -> Place:
    """Return what a device's name stands for.

    Raises:
        InvalidArgument: nothing that is here.
    """
    if isinstance(device, Gpu):
        return Place(device if device in gpus else _unknown(device, "of another machine"))
    if isinstance(device, int) and not isinstance(device, bool):
        return Place(_by_ordinal(device, gpus))
    name = device if isinstance(device, str) else _torch_name(device)
    if name == "cpu":
        return Place()
    if found := _NUMA.fullmatch(name):
        return Place(numa_node=int(found[1]))
    if found := _CUDA.fullmatch(name):
        return Place(_by_ordinal(int(found[1]), gpus))
    if name == "cuda":
        _unknown(device, "which one is meant depends on the thread; say cuda:0")
    return Place(_by_address(name, gpus))


def _unknown(device: Device, why: str) -> NoReturn:
    raise InvalidArgument(f"device: {device!r}: {why}")


def _torch_name(device: Any) -> str:
    """Return the name of a torch.device without importing torch."""
    kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if not isinstance(kind, str):
        _unknown(device, "a GPU, an ordinal, a PCI address or a name is needed")
    return kind if index is None or kind == "cpu" else f"{kind}:{index}"


def _by_address(name: str, gpus: Sequence[Gpu]) -> Gpu:
    """Find a GPU by its address, also as nvidia-smi (domain of 8 digits) or lspci (none) has it."""
    text = name.lower()
    text = text if text.count(":") == 2 else f"0000:{text}"
    if not ADDRESS.fullmatch(text):
        _unknown(name, "neither an address such as 0000:19:00.0 nor cuda:N, numa:N or cpu")
    domain, _, rest = text.partition(":")
    for gpu in gpus:
        own_domain, _, own_rest = gpu.pci.address.partition(":")
        if rest == own_rest and int(domain, 16) == int(own_domain, 16):
            return gpu
    _unknown(name, f"no GPU there; {_list(gpus)}")


def _list(gpus: Sequence[Gpu]) -> str:
    return "there are " + ", ".join(map(str, gpus)) if gpus else "there is none"


def _by_ordinal(ordinal: int, gpus: Sequence[Gpu]) -> Gpu:
    seen = visible(gpus, os.environ)
    if not 0 <= ordinal < len(seen):
        _unknown(ordinal, f"of {len(seen)} GPUs that are visible to this process; {_list(gpus)}")
    return seen[ordinal]


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """Return the GPUs that a process with this environment sees, in the order of their ordinals.

    Raises:
        InvalidArgument: that cannot be told.
    """
    seen = [gpu for gpu in gpus if gpu.ordinal is not None]
    vendor = NVIDIA if any(gpu.pci.vendor == NVIDIA for gpu in seen) else AMD
    seen = [gpu for gpu in seen if gpu.pci.vendor == vendor]
    selectors = [variable for variable in _SELECTORS[vendor] if variable in environ]
    if not selectors:
        _check_order(seen, environ)
    for variable in selectors:  # each counts what the one before has left
        seen = _select(variable, environ[variable], seen, environ)
    return seen


def _check_order(seen: Sequence[Gpu], environ: Mapping[str, str]) -> None:
    """Refuse to guess: among different models CUDA's default order is by speed."""
    models = {gpu.pci.device for gpu in seen}
    if len(models) > 1 and seen[0].pci.vendor == NVIDIA:
        if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return
        raise InvalidArgument(
            "device: the GPUs here are of different models, which CUDA orders by speed: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give the PCI address"
        )


def _select(
    variable: str, value: str, gpus: Sequence[Gpu], environ: Mapping[str, str]
) -> list[Gpu]:
    selected: list[Gpu] = []
    for token in filter(None, (part.strip() for part in value.split(","))):
        if _INTEGER.fullmatch(token):
            _check_order(gpus, environ)
            if not 0 <= int(token) < len(gpus):
                break  # as CUDA does: what follows an index that is not there is hidden
            selected.append(gpus[int(token)])
        else:
            selected.append(_by_uuid(variable, token, gpus))
    return selected


def _by_uuid(variable: str, token: str, gpus: Sequence[Gpu]) -> Gpu:
    """Find a GPU by its UUID, of which CUDA takes a beginning that is unique."""
    found = [gpu for gpu in gpus if gpu.uuid and gpu.uuid.startswith(token)]
    if len(found) == 1 and token.startswith("GPU-"):
        return found[0]
    raise InvalidArgument(
        f"{variable}: {token!r} is {'not unique' if found else 'no GPU that the driver lists'}; "
        "give the PCI address of the device"
    )
