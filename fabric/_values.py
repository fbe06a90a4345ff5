"""Checks of arguments, shared by all modules: whoever is wrong is told which argument, and why."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

from ._errors import InvalidArgument
from ._native import lib

NO_IMM = lib.FAB_NO_IMM
IMM_MAX = (1 << 28) - 1
U64_MAX = (1 << 64) - 1
FOREVER = -1
_LONGEST_NS = 1 << 62


def integer(name: str, value: Any, low: int = 0, high: int = U64_MAX) -> int:
    """Return `value` as an int, if it is one in ``low..high``.

    Raises:
        InvalidArgument: it is not.
    """
    if isinstance(value, bool):
        raise InvalidArgument(f"{name}: an integer is needed, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{name}: an integer is needed, not {_kind(value)}") from None
    if not low <= number <= high:
        raise InvalidArgument(f"{name}: {number} is not in {low}..{high}")
    return number


def refuse(error: Exception, **values: Any) -> NoReturn:
    """Say which of these integers made a C call raise; re-raise what it raised if none did."""
    for name, value in values.items():
        integer(name, value)
    raise error


def needs(name: str, value: Any, kind: type) -> None:
    """Check an argument's type.

    Raises:
        InvalidArgument: it is of another.
    """
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name}: a {kind.__name__} is needed, not {_kind(value)}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def immediate(imm: Any) -> int:
    """Return what C takes for a counter id or None."""
    if imm is None:
        return NO_IMM
    if type(imm) is int and 0 <= imm <= IMM_MAX:
        return imm
    return integer("imm", imm, 0, IMM_MAX)


def nanoseconds(name: str, seconds: float | None) -> int:
    """Return a timeout for C: None waits for ever; zero and less do not wait."""
    if seconds is None:
        return FOREVER
    try:
        if seconds <= 0:
            return 0
        return min(int(seconds * 1e9), _LONGEST_NS)
    except OverflowError:  # infinity
        return FOREVER
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name}: seconds are needed, not {seconds!r}") from None


def bounded_ns(name: str, seconds: float) -> int:
    """Return a timeout for a C function that does not wait for ever."""
    limit = nanoseconds(name, seconds)
    return _LONGEST_NS if limit == FOREVER else limit


def deadline_ns(seconds: float | None) -> int:
    """Return the point of CLOCK_MONOTONIC `seconds` from now, for C; 0 for none."""
    if seconds is None:
        return 0
    if not isinstance(seconds, int | float) or not seconds > 0 or math.isnan(seconds):
        raise InvalidArgument(f"deadline: seconds from now are needed, not {seconds!r}")
    return 0 if math.isinf(seconds) else lib.fab_time_ns() + nanoseconds("deadline", seconds)


SLICE_NS = 100_000_000
"""How long C waits at a time. In between Python looks at signals, so that Ctrl-C works."""


def in_slices(
    call: Callable[[int], int], timeout: int, again: tuple[int, ...] = (lib.FAB_E_TIMEOUT,)
) -> int:
    """Call a C function that waits, until it returns something else than `again`.

    Args:
        call: takes a timeout in nanoseconds and returns a code.
        timeout: nanoseconds in all; below zero: for ever.
        again: codes that mean "not yet".
    """
    if timeout < 0:
        while (code := call(SLICE_NS)) in again:
            pass
        return code
    if timeout <= SLICE_NS:
        return call(timeout)
    end = lib.fab_time_ns() + timeout
    while True:
        code = call(max(0, min(SLICE_NS, end - lib.fab_time_ns())))
        if code not in again or lib.fab_time_ns() >= end:
            return code
