"""Disturbs the links of the SoftRoCE guest while tests/soak.py runs there."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from typing import TYPE_CHECKING

from tests import links

if TYPE_CHECKING:
    from collections.abc import Sequence

DOWN = "down"
HOWS = (
    DOWN,
    DOWN,
    "loss 1% delay 1ms",
    "loss 5%",
    "delay 2ms 1ms reorder 5%",
    "loss 2% duplicate 2% delay 500us",
    "loss 100%",
)
LONGEST = 3.0  # seconds that a link is disturbed
PAUSE = 1.5  # at most, between two disturbances


class Disturber:
    """A thread that disturbs one or two links at a time, and leaves them as they were."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.names = list(names)
        self.rng = random.Random(f"{seed} links")
        self.done: Counter[str] = Counter()
        self.thread: threading.Thread | None = None
        self.over = threading.Event()

    def start(self) -> None:
        """Begin, if there are links to disturb."""
        if self.names:
            self.over.clear()
            self.thread = threading.Thread(target=self.run, name="links", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """End; afterwards all links are as they were."""
        self.over.set()
        if self.thread is not None:
            self.thread.join(60.0)
            if self.thread.is_alive():
                raise TimeoutError("the links are not restored after 60 s")
            self.thread = None

    def run(self) -> None:
        """Disturb, wait, restore, wait, until told to stop."""
        while not self.over.is_set():
            names = self.rng.sample(self.names, min(len(self.names), self.rng.choice([1, 1, 2])))
            with contextlib.ExitStack() as stack:
                for name in names:
                    how = self.rng.choice(HOWS)
                    if how == DOWN:
                        stack.enter_context(links.down(name))
                    else:
                        stack.enter_context(links.disturbed(name, how=how))
                    self.done[how] += 1
                self.over.wait(self.rng.uniform(0.2, LONGEST))
            self.over.wait(self.rng.uniform(0.1, PAUSE))

    def summary(self) -> str:
        """Say what was done, and how often."""
        return ", ".join(f"{count} x {how}" for how, count in sorted(self.done.items()))
