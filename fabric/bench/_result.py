"""What a contender did in some seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class Result:
    """Iterations, and how long they took.

    Latencies are of one iteration, from submission to its end; submit is the time inside the
    submitting call alone. Both in microseconds; None where they were not measured.
    """

    iters: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    errors: int = 0
    p50_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None
    submit_us: float | None = None

    @property
    def gbps(self) -> float:
        """Payload in 10^9 bytes for each second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def rate(self) -> float:
        """Iterations for each second."""
        return self.iters / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """Return the fields, as JSON has them."""
        return dataclasses.asdict(self)


def percentile(ordered: Sequence[float], part: float) -> float | None:
    """Return the value that `part` of an ascending sequence does not exceed; None: it is empty."""
    return ordered[math.ceil(part * len(ordered)) - 1] if ordered else None


def microseconds(nanoseconds: list[int], part: float) -> float | None:
    """Return a percentile of times in nanoseconds, in microseconds."""
    value = percentile(sorted(nanoseconds), part)
    return None if value is None else value / 1e3


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def total(slices: Sequence[Result]) -> Result:
    """Return all slices as one; percentiles are the medians of theirs."""

    def middle(name: str) -> float | None:
        values = [value for one in slices if (value := getattr(one, name)) is not None]
        return median(values) if values else None

    return Result(
        iters=sum(one.iters for one in slices),
        seconds=sum(one.seconds for one in slices),
        nbytes=sum(one.nbytes for one in slices),
        errors=sum(one.errors for one in slices),
        p50_us=middle("p50_us"),
        p99_us=middle("p99_us"),
        p999_us=middle("p999_us"),
        submit_us=middle("submit_us"),
    )
