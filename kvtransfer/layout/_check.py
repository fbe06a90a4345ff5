"""The one text for a number that is out of its bounds."""

from __future__ import annotations

from fabric import InvalidArgument


def check(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is not an int from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidArgument(f"{name}: must be an int from {low} to {high}, not {value!r}")
