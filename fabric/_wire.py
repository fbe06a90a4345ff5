"""Strict reading of msgpack: every malformed field is refused with an error that names it."""

from __future__ import annotations

from typing import Any

import msgpack

from ._errors import WireError
from ._native import lib

U64_MAX = (1 << 64) - 1
LABEL_BYTES: int = lib.FAB_NAME_MAX - 1
ARRAY_MAX = 64
"""Items of an array: more than any field has. Its head says how many follow, and msgpack makes
room for them before it looks: nested ones would take megabytes for each kilobyte."""


def pack(value: Any) -> bytes:
    """Return `value` as msgpack."""
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def unpack(name: str, data: bytes | bytearray | memoryview, limit: int) -> Any:
    """Decode one msgpack value of at most `limit` bytes, with nothing behind it.

    Raises:
        WireError: it is not that.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise WireError(f"{name}: bytes are needed, not {type(data).__name__}")
    data = bytes(data)
    if len(data) > limit:
        raise WireError(f"{name}: {len(data)} bytes; the limit is {limit}")
    try:
        return msgpack.unpackb(
            data, raw=False, max_map_len=0, max_ext_len=0, max_array_len=ARRAY_MAX
        )
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"{name}: not one msgpack value: {reason}") from None


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def versioned(name: str, value: Any, magic: str, version: int, length: int) -> list[Any]:
    """Check an array that begins with a magic text and a version.

    Raises:
        WireError: another kind of thing, another version, or another length.
    """
    if not isinstance(value, list) or len(value) < 2 or value[0] != magic:
        raise WireError(f"{name}: does not begin with {magic!r}")
    if type(value[1]) is not int or value[1] != version:
        raise WireError(f"{name}.version: {_brief(value[1])} is unknown; this is version {version}")
    return array(name, value, length, length)


def array(name: str, value: Any, low: int, high: int) -> list[Any]:
    """Check an array's length.

    Raises:
        WireError: not an array of ``low..high`` items.
    """
    if not isinstance(value, list):
        raise WireError(f"{name}: an array is needed, not {type(value).__name__}")
    if not low <= len(value) <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise WireError(f"{name}: {len(value)} items; there must be {expected}")
    return value


def integer(name: str, value: Any, low: int = 0, high: int = U64_MAX) -> int:
    """Check an integer.

    Raises:
        WireError: not an integer in ``low..high``.
    """
    if type(value) is not int:
        raise WireError(f"{name}: an integer is needed, not {type(value).__name__}")
    if not low <= value <= high:
        raise WireError(f"{name}: {value} is not in {low}..{high}")
    return value


def boolean(name: str, value: Any) -> bool:
    """Check a boolean.

    Raises:
        WireError: not a boolean.
    """
    if type(value) is not bool:
        raise WireError(f"{name}: a boolean is needed, not {type(value).__name__}")
    return value


def binary(name: str, value: Any, low: int, high: int) -> bytes:
    """Check a byte string's length.

    Raises:
        WireError: not ``low..high`` bytes.
    """
    if not isinstance(value, bytes):
        raise WireError(f"{name}: bytes are needed, not {type(value).__name__}")
    if not low <= len(value) <= high:
        raise WireError(f"{name}: {len(value)} bytes; there must be {low} to {high}")
    return value


def label(name: str, value: Any) -> str:
    """Check a text for humans: short, and all of it prints.

    Raises:
        WireError: it is not.
    """
    if not isinstance(value, str):
        raise WireError(f"{name}: a text is needed, not {type(value).__name__}")
    if len(value.encode("utf-8", "surrogatepass")) > LABEL_BYTES:
        raise WireError(f"{name}: more than {LABEL_BYTES} bytes")
    if not value.isprintable():
        raise WireError(f"{name}: has characters that do not print")
    return value
