"""msgpack maps whose every field is checked, with errors that name the field."""

from __future__ import annotations

from typing import Any

import msgpack

from fabric import WireError

MAX_ITEMS = 64
"""Of one map or array: more than any message has. Their heads say how many items follow, and
msgpack makes room for them before it looks: nested ones would take megabytes for each kilobyte."""


class Fields:
    """A decoded map from which each field is taken once; `end` refuses what is left.

    Raises:
        WireError: from every method, with the field's name in front.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    @classmethod
    def decode(cls, raw: bytes, limit: int) -> Fields:
        """Read one map of at most `limit` bytes."""
        if len(raw) > limit:
            raise WireError(f"message: {len(raw)} bytes, more than {limit}")
        try:
            values = msgpack.unpackb(
                raw,
                object_pairs_hook=_unique,
                max_map_len=MAX_ITEMS,
                max_array_len=MAX_ITEMS,
                max_ext_len=0,
            )
        except WireError:
            raise
        except (ValueError, msgpack.UnpackException) as error:
            raise WireError(f"message: not msgpack: {error or type(error).__name__}") from error
        if not isinstance(values, dict):
            raise WireError(f"message: a map was expected, not {type(values).__name__}")
        return cls(values)

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"an int from {low} to {high} was expected, not {_brief(value)}")
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if type(value) is not bool:
            raise self.error(name, f"a bool was expected, not {_brief(value)}")
        return value

    def text(self, name: str, limit: int) -> str:
        value = self._take(name)
        if type(value) is not str or len(value.encode(errors="replace")) > limit:
            raise self.error(
                name, f"text of at most {limit} bytes was expected, not {_brief(value)}"
            )
        return value

    def data(self, name: str, limit: int, low: int = 0) -> bytes:
        value = self._take(name)
        if type(value) is not bytes or not low <= len(value) <= limit:
            got = f"{len(value)} bytes" if isinstance(value, bytes) else _brief(value)
            raise self.error(name, f"from {low} to {limit} bytes were expected, not {got}")
        return value

    def nested(self, name: str) -> Fields:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self.error(name, f"a map was expected, not {_brief(value)}")
        return Fields(value, f"{self._prefix}{name}.")

    def end(self) -> None:
        if self._values:
            name = next(iter(self._values))
            short = len(name) <= 40 and name.isprintable()
            raise self.error(name if short else _brief(name), "unknown field")

    def _take(self, name: str) -> Any:
        try:
            return self._values.pop(name)
        except KeyError:
            raise self.error(name, "missing") from None

    def error(self, name: str, what: str) -> WireError:
        return WireError(f"{self._prefix}{name}: {what}")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if type(name) is not str:
            raise WireError(f"message: a field name is not text: {_brief(name)}")
        if name in values:
            raise WireError(f"{_brief(name)}: given twice")
        values[name] = value
    return values


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
