"""What the package promises as a package: what it imports, what its types say, who it refuses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fabric
from fabric import _errors, _stats
from fabric._native import ffi, lib

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *args: str, **env: str) -> str:
    """Run Python code in a fresh interpreter; returns what it printed."""
    result = subprocess.run(
        [sys.executable, *args, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_needs_neither_torch_nor_the_rdma_libraries() -> None:
    code = """
import sys, fabric
maps = open("/proc/self/maps").read()
print("torch" in sys.modules, "libfabric" in maps, "libibverbs" in maps)"""
    assert python(code) == "False False False"


def test_loading_the_rdma_libraries_leaves_signals_alone() -> None:
    """Some of what libfabric links takes SIGINT and others for itself."""
    code = """
from fabric import _cli
caught = lambda: [line for line in open("/proc/self/status") if line.startswith("SigCgt")]
before = caught()
print([_cli._library(name)["name"] for name in _cli.LIBRARIES], caught() == before)"""
    assert python(code) == "['libfabric', 'libibverbs'] True"


def test_the_version_is_one() -> None:
    assert metadata.version("llm-fabric") == fabric.__version__


def test_the_ssh_tool_is_refused_in_words(tmp_path: Path) -> None:
    info = tmp_path / "fabric-3.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fabric\nVersion: 3.2.3\n")
    code = "try: import fabric\nexcept ImportError as error: print(error)"
    said = python(code, PYTHONPATH=str(tmp_path))
    assert "fabric 3.2.3, the SSH tool from PyPI" in said
    assert "pip uninstall fabric" in said


def test_the_public_names() -> None:
    assert sorted(fabric.__all__) == fabric.__all__
    for name in fabric.__all__:
        if name != "__version__":
            assert getattr(fabric, name).__module__ == "fabric"
            assert getattr(fabric, name).__doc__


def test_every_code_has_one_class() -> None:
    codes = {name for name in dir(lib) if name.startswith("FAB_E_")}
    assert {getattr(lib, name) for name in codes} == set(_errors.CLASSES)
    assert issubclass(fabric.InvalidArgument, ValueError)
    assert issubclass(fabric.WaitTimeout, TimeoutError)
    assert issubclass(fabric.PeerUnreachable, fabric.TransferFailed)


def test_stats_have_the_fields_of_the_c_struct() -> None:
    wanted = [name for name, _ in ffi.typeof("fab_stats").fields]
    fields = [field.name for field in dataclasses.fields(fabric.EngineStats)]
    assert fields == [*wanted, "latency", "waited", "nics", "peers"]
    lane = [name for name, _ in ffi.typeof("fab_lane_stats").fields]
    assert set(_stats._LANE_COUNTS) <= set(lane)
    peer = {name for name, _ in ffi.typeof("fab_peer_info").fields}
    assert set(_stats._PEER_COUNTS) <= peer


def test_the_stub_agrees_with_the_header() -> None:
    header = (ROOT / "native/include/fabric_abi.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    tree = ast.parse((ROOT / "fabric/_native.pyi").read_text())
    stub = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Lib")
    constants = {
        node.target.id
        for node in stub.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    functions = {
        node.name: len(node.args.posonlyargs or node.args.args) - 1
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    assert constants == set(re.findall(r"#define (FAB_\w+)", header))
    declared = re.findall(r"^[\w *]*?\b(fab_\w+)\(([^)]*)\);", header, flags=re.MULTILINE)
    assert functions == {
        name: 0 if args == "void" else args.count(",") + 1 for name, args in declared
    }
    assert functions.keys() == {name for name in dir(lib) if name.startswith("fab_")}


def test_the_extension_uses_the_stable_abi_and_links_libc_only() -> None:
    path = Path(inspect.getfile(sys.modules["fabric._native"]))
    assert ".abi3." in path.name
    listed = subprocess.run(
        ["readelf", "-d", str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout)
    assert needed
    allowed = re.compile(r"lib(c|dl|pthread|m|asan|ubsan)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
    assert [name for name in needed if not allowed.fullmatch(name)] == []
