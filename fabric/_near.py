"""The NICs of the one GPU that a process works with, where the caller names none."""

from __future__ import annotations

import os

from . import topology
from ._errors import FabricError, InvalidArgument
from ._nics import list_nics

_NAMED = {"efa": "FABRIC_EFA_NIC", "verbs": "FABRIC_VERBS_NIC"}
"""Providers whose NICs sysfs tells, and the variable that names another choice."""


def _of_the_only_gpu(machine: topology.Topology) -> topology.Proposal | None:
    """Return what is proposed for cuda:0 if there is no cuda:1."""
    if not machine.gpus:
        return None
    try:
        proposal = machine.propose("cuda:0")
    except InvalidArgument:
        return None  # none is visible
    try:
        machine.nics_for("cuda:1")
    except InvalidArgument:
        return proposal
    return None


def near_nics(provider: str) -> tuple[str, list[str] | None]:
    """Return the provider and the NICs that an engine should open.

    Where exactly one GPU is visible to this process (CUDA_VISIBLE_DEVICES and the like), those are
    that GPU's share of the machine's NICs (`fabric.topology`), if the provider has them all.
    Otherwise what came in, and None: the provider's own choice.

    Args:
        provider: ``"auto"``, ``"efa"`` or ``"verbs"``; others have no NICs near a GPU.
    """
    if provider != "auto" and provider not in _NAMED:
        return provider, None
    proposal = _of_the_only_gpu(topology.read())
    kind = proposal.provider if proposal else None
    if (
        proposal is None
        or kind not in _NAMED
        or os.environ.get(_NAMED[kind])
        or provider not in ("auto", kind)
    ):
        return provider, None
    try:
        there = {nic.name for nic in list_nics(kind)}
    except FabricError:
        return provider, None
    if not there.issuperset(proposal.nics):
        return provider, None
    return f"local,{kind}" if provider == "auto" else kind, list(proposal.nics)
