"""Refuses to run over the remains of another package of the same import name.

PyPI's ``fabric`` (remote commands over SSH) installs a package of the same name. pip merges the
files of both into one folder and says nothing.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def refuse_other_fabric() -> None:
    """Look for the SSH tool's distribution, or its files beside ours.

    Raises:
        ImportError: it is installed in this environment.
    """
    try:
        found = f"fabric {metadata.version('fabric')}"
    except metadata.PackageNotFoundError:
        if not Path(__file__).with_name("connection.py").exists():
            return
        found = "files of fabric"
    raise ImportError(
        f"{found}, the SSH tool from PyPI, is installed in this environment and owns the import "
        "name `fabric` too: run `pip uninstall fabric`, then reinstall llm-fabric, or give each "
        "its own virtual environment",
        name="fabric",
    )
