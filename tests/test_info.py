"""The command `fabric`, as users run it: a process of its own, in some other directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fabric
from fabric import _env

NATIVE = Path(__file__).resolve().parent.parent / "native"


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
    assert known - read == {"FABRIC_PROVIDER"}  # the one that Python reads


@pytest.mark.parametrize(
    "args", [(), ("inform",), ("info", "--nothing"), ("info", "--json", "--env")]
)
def test_wrong_arguments_get_the_usage(tmp_path: Path, args: tuple[str, ...]) -> None:
    assert "usage: fabric" in run(tmp_path, *args, status=2).stderr


def test_help_and_version(tmp_path: Path) -> None:
    assert "info" in run(tmp_path, "--help").stdout
    assert "Exit status" in run(tmp_path, "info", "--help").stdout
    assert run(tmp_path, "--version").stdout == f"llm-fabric {fabric.__version__}\n"
