"""The quick part of the Python suite on a build with AddressSanitizer and UBSan (`make sanitize`).

The library is built as an extension with both in a copy of the tree, and the sanitizer's runtime is
loaded before Python. A finding ends the process that made it, and so fails the test. Leaks are not
looked for here, as Python itself leaves much behind: the C tests do that, and valgrind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tree import ROOT, Tree

WORK = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
QUICK = (
    "tests/test_transfers.py",
    "tests/test_messages.py",
    "tests/test_waits.py",
    "tests/test_early_arrivals.py",
    "tests/test_fence.py",
    "tests/test_death.py",
    "tests/test_bad_input.py",
    "tests/test_hostile.py",
    "tests/test_sim.py",
    "tests/test_sim_contracts.py",
    "tests/test_sim_histories.py",
)


CHECK = """
import ctypes, fabric
from pathlib import Path
module = Path(fabric._native.__file__)
assert "build/sanitize" in str(module), module
assert b"__asan_init" in module.read_bytes() and b"__ubsan" in module.read_bytes()
ctypes.CDLL(None).__asan_init
"""
"""That what is tested is the build with the sanitizers, and that their runtime is there."""


def runtime(name: str) -> str:
    """Return the path of a sanitizer's runtime library."""
    found = subprocess.run(
        ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"sanitize: the compiler has no {name}: install its sanitizers (libasan)")
    return found


def main() -> int:
    """Build, and run pytest; its arguments instead of `QUICK`."""
    tree = Tree(WORK, "-DCMAKE_BUILD_TYPE=Debug", f"-DFABRIC_SANITIZE={SANITIZERS}")
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FABRIC_LOG_LEVEL": "error",
    }
    subprocess.run([str(tree.python), "-c", CHECK], cwd=tree.path, env=env, check=True)
    options = ["-q", "-p", "no:cacheprovider", "--durations", "5"]
    command = [str(tree.python), "-m", "pytest", *options, *(sys.argv[1:] or QUICK)]
    return subprocess.run(command, cwd=tree.path, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
