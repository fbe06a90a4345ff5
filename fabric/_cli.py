"""The command ``fabric``: what this machine has, for people and for scripts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, topology
from ._doctor import Finding, examine_efa
from ._env import VARIABLES
from ._errors import FabricError, InvalidArgument, text_of
from ._native import ffi, lib
from ._nics import PROVIDERS, Nic, list_nics
from .bench._command import add_arguments as add_bench_arguments
from .bench._command import run as run_bench

LIBRARIES = ("libfabric", "libibverbs")
_TEXT_BYTES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="fabric", description="Tools of llm-fabric: one-sided RDMA writes for LLM serving."
    )
    parser.add_argument("--version", action="version", version=f"llm-fabric {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    info = commands.add_parser(
        "info",
        help="libraries, providers, NICs and topology of this machine",
        description="Say which libraries were loaded, which providers work here with which NICs, "
        "and why others do not; draw the machine's GPUs and NICs as a tree, and propose NICs and "
        "a CPU for each GPU. Exit status: 0 if any provider works, 1 if none does.",
    )
    info.add_argument(
        "--sysfs",
        metavar="ROOT",
        help="take the tree from a copy of another machine's sysfs",
    )
    shape = info.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument(
        "--env", action="store_true", help="print the environment variables that are read"
    )
    doctor = commands.add_parser(
        "doctor",
        help="whether this machine can do what a provider needs",
        description="Check what a provider needs, one line for each condition, with what to do "
        "where it does not hold. Opens an engine for a moment. Exit status: 0 if all do, else 1.",
    )
    doctor.add_argument("--efa", action="store_true", required=True, help="the provider efa")
    bench = commands.add_parser(
        "bench",
        help="bandwidth, latency and the cost of calls",
        description="Measure. Without a host this is the server, with one its client; --loopback is"
        " both. Each row is run in slices, in turns with a baseline where there is one: memcpy()"
        " for local, a loop over libfabric for tcp. Percentiles are the medians of the slices'.",
    )
    add_bench_arguments(bench)
    options = parser.parse_args(argv)
    if options.command == "bench":
        return run_bench(options, bench)
    if options.command == "doctor":
        return print_findings(examine_efa())
    if options.env:
        print_env()
        return 0
    try:
        facts = gather(options.sysfs)
    except InvalidArgument as error:
        info.error(str(error))
    if options.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        print_facts(facts)
    return 0 if any(provider["nics"] for provider in facts["providers"]) else 1


def print_findings(findings: list[Finding]) -> int:
    """Print what a doctor found; returns the exit status."""
    for finding in findings:
        print(finding)
    return 0 if all(finding.good for finding in findings) else 1


def gather(sysfs: str | None = None) -> dict[str, Any]:
    """Return everything that ``fabric info`` prints, as JSON has it.

    Raises:
        InvalidArgument: the root is no sysfs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "memlock_bytes": {"soft": _limit(soft), "hard": _limit(hard)},
        "providers": [_provider(name) for name in PROVIDERS],
        "libraries": [_library(name) for name in LIBRARIES],
        "topology": _topology(sysfs),
        "environment": {variable.name: variable.value for variable in VARIABLES},
    }


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _library(name: str) -> dict[str, Any]:
    path, version = ffi.new("char[]", _TEXT_BYTES), ffi.new("char[]", _TEXT_BYTES)
    code = lib.fab_library(name.encode(), path, _TEXT_BYTES, version, _TEXT_BYTES)
    reason = None if code == 0 else text_of(lib.fab_error_text())
    return {
        "name": name,
        "path": text_of(path) if code == 0 else None,
        "version": text_of(version) if code == 0 else None,
        "reason": reason,
    }


def _provider(name: str) -> dict[str, Any]:
    nics: list[Nic] = []
    reason = None
    try:
        nics = list_nics(name)
    except FabricError as error:
        reason = str(error)
    return {"name": name, "nics": [dataclasses.asdict(nic) for nic in nics], "reason": reason}


def _topology(sysfs: str | None) -> dict[str, Any]:
    machine = topology.read() if sysfs is None else topology.read(sysfs)
    allowed = None if sysfs is None else machine.cpus  # our own affinity says nothing of those
    proposals = [machine.propose(device, allowed=allowed) for device in machine.gpus or ("cpu",)]
    return {
        **machine.facts(),
        "tree": machine.tree(),
        "proposals": [proposal.facts() for proposal in proposals],
    }


def print_facts(facts: dict[str, Any]) -> None:
    """Print what `gather` returned, one fact to a line."""
    print(f"llm-fabric {facts['version']}")
    print(f"python {facts['python']}, Linux {facts['kernel']} {facts['machine']}")
    for library in facts["libraries"]:
        if library["reason"] is None:
            print(f"{library['name']} {library['version']}: {library['path']}")
        else:
            print(f"{library['name']} not loaded: {library['reason']}")
    print(f"locked memory: {_memlock(facts['memlock_bytes'])}")
    for provider in facts["providers"]:
        print(f"provider {provider['name']}:" + ("" if provider["nics"] else " none"))
        for nic in provider["nics"]:
            print(f"    {_nic(nic)}")
        if provider["reason"]:
            print(f"    {provider['reason']}")
    print_topology(facts["topology"])


def print_topology(facts: dict[str, Any]) -> None:
    """Print the tree, and what each GPU should take."""
    print("topology:")
    for line in facts["tree"].splitlines():
        print(f"    {line}")
    print("proposals:")
    for proposal in facts["proposals"]:
        print(f"    {_proposal(proposal)}")


def _proposal(proposal: dict[str, Any]) -> str:
    nics = f"{proposal['provider']} {','.join(proposal['nics'])}" if proposal["nics"] else "no NICs"
    cpu = "no CPU" if proposal["cpu"] is None else f"CPU {proposal['cpu']}"
    return f"{proposal['device']}: {nics}, {cpu} ({proposal['reason']})"


def _memlock(limits: dict[str, int | None]) -> str:
    soft = limits["soft"]
    if soft is None:
        return "unlimited"
    return f"{soft >> 10} KiB; NICs may need more, see `ulimit -l`"


def _nic(nic: dict[str, Any]) -> str:
    speed = f"{nic['speed_bps'] / 1e9:g} Gb/s" if nic["speed_bps"] else "speed unknown"
    order = "ordered" if nic["ordered"] else "unordered"
    return f"{nic['name']}  [{nic['provider']}, {'up' if nic['up'] else 'down'}, {speed}, {order}]"


def print_env() -> None:
    """Print the registry of environment variables, as lines that a shell can read."""
    for variable in VARIABLES:
        print(f"# {variable.meaning} (default: {variable.default})")
        value = variable.value
        print(f"#{variable.name}=" if value is None else f"{variable.name}={value}")
