"""A copy of the sources with a build of its own: with a defect in it, or with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("native", "fabric", "kvtransfer", "tests", "pyproject.toml", "README.md")
BUILD_SECONDS = 600.0
TAIL = 6000
"""Characters of the output of a command that failed."""


class TreeError(Exception):
    """The copy could not be made, built or patched."""


def run(command: list[str], cwd: Path, timeout: float, env: dict[str, str] | None = None) -> str:
    """Run a command; returns an empty text, or the end of what it printed when it failed."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]}: not finished after {timeout:.0f} s"
    return "" if done.returncode == 0 else done.stdout[-TAIL:] or f"status {done.returncode}"


class Tree:
    """The tracked and the new files of the working tree, built with CMake `options`.

    `python` is an interpreter that imports the copy, and the packages of this environment.
    """

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path / "tree"
        self.build = path / "build"
        self.copy()
        configure = ["cmake", "-G", "Ninja", "-S", str(self.path / "native"), "-B", str(self.build)]
        self.do([*configure, "-DFABRIC_EXTENSION=ON", *options])
        self.make()
        self.python = self.interpreter(path / "venv")

    def do(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Run a command that has to succeed."""
        if text := run(command, self.path, BUILD_SECONDS, env):
            raise TreeError(text)

    def copy(self) -> None:
        """Take what differs from the original, so that a second build has little to do."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        names = {name for name in listed.decode().split("\0") if (ROOT / name).is_file()}
        for name in names:
            source, target = ROOT / name, self.path / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for file in self.path.rglob("*"):
            is_source = file.is_file() and file.suffix in {".c", ".h", ".py"}
            if is_source and str(file.relative_to(self.path)) not in names:
                file.unlink()

    def make(self) -> None:
        """Build the C tests and the extension."""
        self.do(["cmake", "--build", str(self.build)])
        for module in self.build.glob("_native*.so"):
            shutil.copyfile(module, self.path / "fabric" / module.name)

    def interpreter(self, path: Path) -> Path:
        """Make an environment without the editable install, whose finder would come first."""
        venv.create(path, symlinks=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        here = path / "lib" / version / "site-packages" / "tree.pth"
        # The .pth files of a folder that is named in one are not read.
        here.write_text(f"{self.path}\n{sysconfig.get_path('purelib')}\n")
        return path / "bin" / "python"

    def patch(self, patch: Path, *, back: bool = False) -> None:
        """Apply a patch, or take it out again."""
        # Not the repository in which this copy lies: without one, paths are relative to here.
        env = {"GIT_CEILING_DIRECTORIES": str(self.path.parent)}
        try:
            self.do(["git", "apply", *(["--reverse"] if back else []), str(patch)], env)
        except TreeError as error:
            raise TreeError(f"{patch.name} does not fit any more: {error}") from None
