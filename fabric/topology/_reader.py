"""Bounded reads of a folder of small files, such as sysfs or /proc.

In containers and virtual machines anything may be missing, unreadable or odd: that is an answer,
None or nothing, and never an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import re
FILE_BYTES = 4096
"""Of a file no more is read: an attribute of sysfs is at most a page."""


class Reader:
    """Reads under one root, and notes what it had to leave out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    def text(self, *parts: str) -> str | None:
        """Return a file's text without the spaces around it; None if it cannot be read."""
        try:
            # A recorded tree may hold anything; a FIFO in it must not stop us.
            fd = os.open(self.root.joinpath(*parts), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.read(fd, FILE_BYTES).decode("utf-8", "replace").strip()
        except OSError:
            return None
        finally:
            os.close(fd)

    def number(self, *parts: str) -> int | None:
        """Return a file's integer, decimal or 0x; None if there is none."""
        try:
            return int(self.text(*parts) or "", 0)
        except ValueError:
            return None

    def names(self, *parts: str, like: re.Pattern[str], limit: int) -> list[str]:
        """Return the sorted names in a folder that are `like`, at most `limit` of them."""
        folder = self.root.joinpath(*parts)
        try:
            found = sorted(path.name for path in folder.iterdir() if like.fullmatch(path.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.notes.append(f"{folder}: {error.strerror}")
            return []
        if len(found) > limit:
            self.notes.append(f"{folder}: only {limit} of {len(found)} entries were read")
        return found[:limit]

    def real(self, *parts: str) -> str:
        """Return where a path leads when its links are followed, as far as they go."""
        return os.path.realpath(self.root.joinpath(*parts))

    def has(self, *parts: str) -> bool:
        """Return whether there is such an entry, be it a link to nowhere."""
        return os.path.lexists(self.root.joinpath(*parts))
