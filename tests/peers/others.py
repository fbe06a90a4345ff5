"""The processor time that others took meanwhile: what a benchmark on a shared machine must know."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

QUIET_PROCESSORS = 0.1
"""What others may keep busy, on average: more disturbs."""
LOOK_SECONDS = 0.3
TICK = 1 / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Return the processor seconds of all processes since boot, without interrupts."""
    with open("/proc/stat", encoding="ascii") as lines:
        user, nice, system = map(int, next(lines).split()[1:4])
    return (user + nice + system) * TICK


def spent_seconds(pids: Iterable[int]) -> float:
    """Return the processor seconds of some processes since they began."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as text:
            fields = text.read().rpartition(")")[2].split()  # a name may hold anything
        ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK


class Others:
    """How many processors others kept busy, on average, since this was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = [os.getpid(), *pids]
        self.begin = self.readings()

    def readings(self) -> tuple[float, float]:
        """Return the time, and the processor seconds of others."""
        return time.monotonic(), busy_seconds() - spent_seconds(self.pids)

    def processors(self) -> float:
        """Return their number so far."""
        (before, past), (now, present) = self.begin, self.readings()
        return max(0.0, present - past) / max(now - before, TICK)


def wait_for_quiet(pids: Iterable[int], seconds: float) -> None:
    """Wait until others are quiet, so long at most."""
    end, pids = time.monotonic() + seconds, list(pids)
    while time.monotonic() < end:
        others = Others(pids)
        time.sleep(LOOK_SECONDS)
        if others.processors() <= QUIET_PROCESSORS:
            return
