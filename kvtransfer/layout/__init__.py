"""How KV caches lie in memory, and which bytes go where between two that differ.

`KvLayout` is the shape that both sides of a `Request` share. `CacheTensor` and `Shard` describe
caches that are cut differently (tensor and pipeline parallelism, page sizes, order of heads and
tokens), and `plan_runs` maps one onto the other; requests do not carry them yet.
"""

from .pages import BOUNDS, ITEM_BYTES, MAX_CAPACITY, KvLayout
from .runs import Runs, Span, plan_runs
from .shard import SEQUENCE, CacheTensor, Shard

__all__ = [
    "BOUNDS",
    "ITEM_BYTES",
    "MAX_CAPACITY",
    "SEQUENCE",
    "CacheTensor",
    "KvLayout",
    "Runs",
    "Shard",
    "Span",
    "plan_runs",
]
