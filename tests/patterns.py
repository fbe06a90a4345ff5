"""Bytes that can be told apart: what a region held before a test, and what it must hold after."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable

Bytes: TypeAlias = NDArray[np.uint8]
Copy: TypeAlias = tuple[int, int, int, int]
"""(offset in the destination, seed of the source, offset in the source, length)"""


def pattern(seed: int, nbytes: int) -> Bytes:
    """Return `nbytes` pseudo-random bytes; a shorter pattern is a prefix of a longer one."""
    words: NDArray[np.uint64] = np.random.PCG64(seed).random_raw((nbytes + 7) // 8 or 1)
    return words.view(np.uint8)[:nbytes]


def image(seed: int, nbytes: int, copies: Iterable[Copy]) -> Bytes:
    """Return pattern `seed` after `copies` were made into it, in order."""
    result: Bytes = pattern(seed, nbytes).copy()
    sources: dict[int, Bytes] = {}
    rows = list(copies)
    ends: dict[int, int] = {}
    for _, source, offset, length in rows:
        ends[source] = max(ends.get(source, 0), offset + length)
    for destination, source, offset, length in rows:
        if source not in sources:
            sources[source] = pattern(source, ends[source])
        result[destination : destination + length] = sources[source][offset : offset + length]
    return result


def difference(actual: Bytes, expected: Bytes) -> str:
    """Say in words how `actual` differs from `expected`; an empty text if it does not."""
    if actual.size != expected.size:
        return f"{actual.size} bytes instead of {expected.size}"
    if np.array_equal(actual, expected):
        return ""
    wrong = np.flatnonzero(actual != expected)
    first, last = int(wrong[0]), int(wrong[-1])
    return (
        f"{wrong.size} of {actual.size} bytes differ, from offset {first} to {last}; "
        f"at {first}: {int(actual[first])} instead of {int(expected[first])}"
    )
