"""Page indices, as users give them, as C takes them: int32 in a row, no object for each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._errors import InvalidArgument
from ._native import ffi

INDEX_MAX = (1 << 31) - 1
_INT32 = np.dtype(np.int32)


def page_indices(name: str, pages: Any) -> tuple[Any, int]:
    """Return an ``int32_t *`` that keeps its memory alive, and how many indices it has.

    Args:
        name: of the argument, for errors.
        pages: contiguous int32 arrays are used as they are; other integers are converted.

    Raises:
        InvalidArgument: not one-dimensional, not integers, negative, or above `INDEX_MAX`.
    """
    if type(pages) is not np.ndarray or pages.dtype != _INT32 or not pages.flags.c_contiguous:
        pages = _converted(name, pages)
    if pages.ndim != 1:
        raise InvalidArgument(f"{name}: one dimension is needed, not {pages.ndim}")
    return ffi.from_buffer("int32_t[]", pages), len(pages)


def _converted(name: str, pages: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    try:
        array = np.asarray(pages)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidArgument(f"{name}: not an array of integers: {error}") from None
    if array.size == 0:
        return np.empty(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        raise InvalidArgument(f"{name}: integers are needed, not {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > INDEX_MAX:
        wrong = low if low < 0 else high
        raise InvalidArgument(f"{name}: {wrong} is not in 0..{INDEX_MAX}")
    return np.ascontiguousarray(array, dtype=np.int32)
