"""NICs: what a provider can open here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._errors import check, text_of
from ._native import ffi, lib
from ._peer import KINDS

PROVIDERS = ("local", "tcp", "efa", "verbs", "rxm")
"""Providers by the names that `TransferEngine` takes."""


@dataclass(frozen=True)
class Nic:
    """One device port that a provider can open."""

    kind: str  # of provider: local, tcp, efa or rxm
    provider: str  # as its library calls it
    name: str  # what TransferEngine(nics=[...]) takes
    speed_bps: int  # bits per second; 0: unknown
    max_write: int  # bytes of one work request
    ordered: bool  # a lane keeps the order of its work requests
    up: bool


def nic_of(info: Any) -> Nic:
    """Return what a fab_nic_info says."""
    return Nic(
        kind=KINDS.get(info.kind, str(info.kind)),
        provider=text_of(info.provider),
        name=text_of(info.name),
        speed_bps=info.speed_bps,
        max_write=info.max_write,
        ordered=bool(info.ordered),
        up=bool(info.up),
    )


def list_nics(provider: str) -> list[Nic]:
    """Return the NICs that a provider could open here.

    Raises:
        ProviderUnavailable: there are none; the text says why.
        InvalidArgument: no such provider.
    """
    out = ffi.new("fab_nic_info[]", lib.FAB_MAX_NICS)
    count = check(lib.fab_list_nics(provider.encode(), out, lib.FAB_MAX_NICS))
    return [nic_of(out[i]) for i in range(min(count, lib.FAB_MAX_NICS))]
