"""What is measured: an operation, its sizes, and the memory that it goes through."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .._errors import InvalidArgument, WireError
from .._native import lib

OPS = {
    "write": "one range of BYTES for each call, counted",
    "pages": "PAGES ranges of BYTES for each call, in random order, each counted",
    "scatter": "PAGES ranges of BYTES for each call, each to a place of its own, counted",
    "barrier": "an immediate there and one back",
    "imm": "an immediate without bytes for each call",
    "latency": "BYTES with an immediate there, and the same back",
    "submit": "as pages (write, where PAGES is 1): look at the cost of submitting",
    "messages": "a message of BYTES for each call",
}
"""Operations, and what one iteration of each is."""

ROUND_TRIPS = ("barrier", "latency")
VERIFIED = ("write", "pages", "scatter", "submit")
MAX_BYTES = 1 << 34
MAX_WALK = 1 << 36
MAX_WINDOW = 4096
PATTERN = 0x9E3779B1


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Args:
        op: a key of `OPS`.
        nbytes: payload bytes of one range, at least 8.
        pages: ranges of one call, for pages, scatter and submit.
        window: calls under way at once.
        walk: bytes of the buffers that calls go through in turn; as large as one call at least,
            which is what it means when it is 0.
        check: verify what was written to the receiver, by write, pages, scatter and submit.

    Raises:
        InvalidArgument: a value outside of its limits.
    """

    op: str
    nbytes: int = 8
    pages: int = 1
    window: int = 1
    walk: int = 0
    check: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise InvalidArgument(f"op is {self.op!r}; it takes {', '.join(OPS)}")
        most = lib.FAB_MAX_MESSAGE if self.op == "messages" else MAX_BYTES
        most_pages = lib.FAB_MAX_TARGETS if self.op == "scatter" else lib.FAB_MAX_PAGES
        for name, value, low, high in (
            ("bytes", self.nbytes, 8, most),
            ("pages", self.pages, 1, most_pages),
            ("window", self.window, 1, MAX_WINDOW),
            ("walk", self.walk, 0, MAX_WALK),
        ):
            if type(value) is not int or not low <= value <= high:
                raise InvalidArgument(f"{name} is {value!r}; it must be from {low} to {high}")
        if self.nbytes % 8:
            raise InvalidArgument(f"bytes is {self.nbytes}; it must be a multiple of 8")
        if self.size > MAX_WALK:
            raise InvalidArgument(
                f"{self.pages} pages of {self.nbytes} bytes are {self.size} bytes a call; the"
                f" limit is {MAX_WALK}"
            )

    @property
    def call_pages(self) -> int:
        """Ranges of one call."""
        return self.pages if self.op in ("pages", "scatter", "submit") else 1

    @property
    def size(self) -> int:
        """Bytes of the buffer on either side, a whole number of calls."""
        call = self.nbytes * self.call_pages
        return max(1, self.walk // call) * call

    @property
    def payload(self) -> int:
        """Bytes that one iteration moves."""
        if self.op in ("barrier", "imm"):
            return 0
        return self.nbytes * self.call_pages * (2 if self.op in ROUND_TRIPS else 1)

    def order(self, side: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the pages of the buffer of one side (0: source) in the order of their use."""
        count = self.size // self.nbytes
        if self.op not in ("pages", "scatter") and not (self.op == "submit" and self.pages > 1):
            return np.arange(count, dtype=np.int32)
        return np.random.default_rng(side).permutation(count).astype(np.int32)

    def pack(self) -> dict[str, Any]:
        """Return the fields as msgpack takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def unpack(cls, fields: Any) -> Case:
        """Return what `pack` packed.

        Raises:
            WireError: it is something else.
        """
        try:
            return cls(**fields)
        except (TypeError, InvalidArgument) as error:
            raise WireError(f"the other side's case: {error}") from None


def salt_of(page: int) -> np.uint64:
    """Return what tells the words of this page from those of others."""
    return np.uint64((page + 1) * PATTERN << 20 & (1 << 64) - 1)


def paint(memory: np.ndarray[Any, np.dtype[np.uint64]], nbytes: int) -> None:
    """Fill each page with words that no other page has: page number and word number, mixed."""
    words = nbytes // 8
    columns = np.arange(words, dtype=np.uint64)
    for page, row in enumerate(memory.reshape(-1, words)):
        np.add(columns, salt_of(page), out=row)


def wrong_pages(case: Case, memory: np.ndarray[Any, np.dtype[np.uint64]], written: int) -> int:
    """Return how many of the first `written` pages to be written differ from their source."""
    words = case.nbytes // 8
    columns = np.arange(words, dtype=np.uint64)
    rows = memory.reshape(-1, words)
    sources, destinations = case.order(0), case.order(1)
    wrong = 0
    for index in range(min(written, len(sources))):
        expected = columns + salt_of(int(sources[index]))
        wrong += not np.array_equal(rows[destinations[index]], expected)
    return wrong
