"""An engine that has nothing to do does nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests import commands
from tests.scale import busy

if TYPE_CHECKING:
    from tests.harness import Farm

SECONDS = 5.0
SHARE = busy(0.01)  # of one core


@pytest.mark.parametrize("waiting", [False, True])
def test_idle_engines_sleep(farm: Farm, waiting: bool) -> None:
    """One engine that nobody knows, and two that are connected: idle, or one waiting."""
    nodes = [farm(name) for name in "abc"]
    a, b, _ = nodes
    imm = b.counter("count")
    for one, other in ((a, b), (b, a)):
        one.region("src", 1 << 20, 1)
        one.write("src", other.region("dst", 1 << 20, 2))
    a.call(commands.write_imm, b.address, imm)
    if waiting:
        pending = b.start(commands.counter_wait, "count", 2, 60.0, [a.address], thread=True)
    time.sleep(0.5)
    before = [node.call(commands.cpu_seconds) for node in nodes]
    begin = time.monotonic()
    time.sleep(SECONDS)
    elapsed = time.monotonic() - begin
    after = [node.call(commands.cpu_seconds) for node in nodes]
    shares = [(end - start) / elapsed for start, end in zip(before, after, strict=True)]
    assert max(shares) < SHARE, f"shares of a core: {shares}"
    if waiting:
        a.call(commands.write_imm, b.address, imm)
        pending.result(5.0)
