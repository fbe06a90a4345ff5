"""``fabric bench``: what this library does on this machine, beside what nothing can beat.

A *contender* is anything that runs a workload for some seconds and says what it did: our engine
(`Client` with a `Server` in another process), or a program without an engine (`Program`).
Contenders take turns, so that noise hits all of them.
"""

from ._case import OPS, Case
from ._result import Result

__all__ = ["OPS", "Case", "Result"]
