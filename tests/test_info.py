"""The command `fabric`, as users run it: a process of its own, in some other directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fabric
from fabric import _env
from tests.test_topology import Tree, dgx_h100, laptop

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
PACKAGES = ("fabric", "kvtransfer")


def run(cwd: Path, *args: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `fabric` with these arguments; it must end with `status`."""
    result = subprocess.run(
        [sys.executable, "-m", "fabric", *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == status, result.stderr
    return result


def test_info(tmp_path: Path) -> None:
    lines = run(tmp_path, "info").stdout.splitlines()
    assert lines[0] == f"llm-fabric {fabric.__version__}"
    assert any(line.startswith("locked memory: ") for line in lines)
    assert "provider local:" in lines


def test_info_as_json_agrees(tmp_path: Path) -> None:
    facts = json.loads(run(tmp_path, "info", "--json").stdout)
    assert facts["version"] == fabric.__version__
    assert [library["name"] for library in facts["libraries"]] == ["libfabric", "libibverbs"]
    providers = {provider["name"]: provider for provider in facts["providers"]}
    assert providers["local"]["nics"][0]["up"] is True
    for provider in providers.values():
        assert bool(provider["nics"]) != bool(provider["reason"])


def test_the_topology_of_this_machine_is_shown(tmp_path: Path) -> None:
    lines = run(tmp_path, "info").stdout.splitlines()
    assert "topology:" in lines
    assert "proposals:" in lines
    facts = json.loads(run(tmp_path, "info", "--json").stdout)["topology"]
    assert facts["tree"] == fabric.topology.read().tree()
    assert facts["proposals"]


def test_a_recorded_machine_is_drawn_with_what_each_gpu_should_take(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "dgx")
    dgx_h100(tree)
    lines = run(tmp_path, "info", "--sysfs", str(tree.root)).stdout.splitlines()
    assert "    NUMA node 1, CPUs 56-111,168-223" in lines
    assert sum("  GPU " in line for line in lines) == 8 + 8  # in the tree and below it
    last = "GPU 7 0000:df:00.0: verbs mlx5_11, CPU 98"
    why = "1 of 1 NICs under the same PCIe switch; a CPU of NUMA node 1"
    assert lines[-1] == f"    {last} ({why})"
    facts = json.loads(run(tmp_path, "info", "--json", "--sysfs", str(tree.root)).stdout)
    machine = facts["topology"]
    assert machine["proposals"][2]["nics"] == ["mlx5_4"]
    assert machine["proposals"][2]["distance"] == "PIX"
    assert machine["gpus"][0]["pci"]["device"] == "2330"
    assert machine["nics"][0]["pci"]["path"][0] == "pci0000:15"
    assert machine["numa_nodes"][0]["cpus"] == "0-55,112-167"


def test_a_machine_with_nothing_is_drawn_as_well(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "laptop")
    laptop(tree)
    text = run(tmp_path, "info", "--sysfs", str(tree.root)).stdout
    assert "    no GPU, no RDMA device\n" in text
    assert "no NICs, CPU 1 (no RDMA device; a CPU of NUMA node 0)" in text


def test_what_is_no_sysfs_is_refused(tmp_path: Path) -> None:
    assert "no sysfs" in run(tmp_path, "info", "--sysfs", str(tmp_path), status=2).stderr


def test_a_missing_library_is_named_with_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.so")
    said = run(tmp_path, "info", "--json", FABRIC_LIBFABRIC=missing, FABRIC_LIBIBVERBS=missing)
    facts = json.loads(said.stdout)
    for library in facts["libraries"]:
        assert library["path"] is None
        assert missing in library["reason"]
    providers = {provider["name"]: provider for provider in facts["providers"]}
    assert providers["local"]["nics"]  # needs no library
    assert missing in providers["tcp"]["reason"]
    text = run(tmp_path, "info", FABRIC_LIBFABRIC=missing).stdout
    assert f"libfabric not loaded: {providers['tcp']['reason'][-20:]}"[:22] in text


def test_the_environment_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    text = run(tmp_path, "info", "--env", FABRIC_LOG_LEVEL="info").stdout
    assert "\nFABRIC_LOG_LEVEL=info\n" in text
    names = [line.lstrip("#").partition("=")[0] for line in text.splitlines() if line[:2] != "# "]
    assert names == [variable.name for variable in _env.VARIABLES]
    subprocess.run(["bash", "-c", text], check=True, timeout=10)


def test_every_variable_that_is_read_is_in_the_registry() -> None:
    known = {variable.name for variable in _env.VARIABLES}
    read = set()
    for source in [*NATIVE.glob("core/*.c"), *NATIVE.glob("providers/*.c")]:
        for word in source.read_text().split('"'):
            if word.startswith("FABRIC_") and word.replace("_", "").isalpha() and word.isupper():
                read.add(word)
    assert read <= known
    assert known - read == {"FABRIC_PROVIDER", "FABRIC_TRACE"}  # those that Python reads


def test_python_reads_no_variable_that_is_not_in_the_registry() -> None:
    known = {variable.name for variable in _env.VARIABLES}
    sources = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        names = set(re.findall(r"\bFABRIC_[A-Z][A-Z_]*[A-Z]\b", source.read_text()))
        assert names <= known, source


@pytest.mark.parametrize(
    "args", [(), ("inform",), ("info", "--nothing"), ("info", "--json", "--env")]
)
def test_wrong_arguments_get_the_usage(tmp_path: Path, args: tuple[str, ...]) -> None:
    assert "usage: fabric" in run(tmp_path, *args, status=2).stderr


def test_help_and_version(tmp_path: Path) -> None:
    assert "info" in run(tmp_path, "--help").stdout
    assert "Exit status" in run(tmp_path, "info", "--help").stdout
    assert run(tmp_path, "--version").stdout == f"llm-fabric {fabric.__version__}\n"
