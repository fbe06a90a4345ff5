"""How much a test does, and for how long it is willing to wait, where everything is slow.

The SoftRoCE guest (tests/softroce/run) has an emulated processor, fifteen times slower than the
one that emulates it. Every case of every test runs there as it does elsewhere, but with smaller
sizes, with fewer repetitions, and with more patience. Elsewhere these functions change nothing.
"""

from __future__ import annotations

import os

SLOW = os.environ.get("SOFTROCE") == "1"
LESS = 16
LONGER = 2.5  # most of what takes long is waiting, which is as fast as elsewhere
SLOWER = 15


def scaled(amount: int, least: int = 1, less: int = LESS) -> int:
    """Return a size or a number of repetitions: a part of `amount`, but not less than `least`."""
    return max(amount // less, min(amount, least)) if SLOW else amount


def patient(seconds: float) -> float:
    """Return a timeout, or a bound on how long something may take."""
    return seconds * LONGER if SLOW else seconds


def busy(share: float) -> float:
    """Return a bound on the share of a processor that something may take."""
    return share * SLOWER if SLOW else share
