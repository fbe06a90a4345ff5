"""Prefill to decode: KV-cache pages written by one process straight into another's.

The decoder reserves pages, opens a counter and sends a `Request`; the prefiller writes each
layer's pages as soon as they are computed; the decoder waits until the counter shows that every
range has arrived. See `Decoder` and `Prefiller`.
"""

from .decode import Arrival, Decoder
from .errors import (
    KvTransferError,
    PoolExhausted,
    RequestCancelled,
    RequestFailed,
    RequestRefused,
)
from .layout import SEQUENCE, CacheTensor, KvLayout, Runs, Shard, Span, plan_runs
from .plan import LayerWrite, expected_ranges, layer_write, page_rows, payload_bytes
from .pool import PagePool
from .prefill import Prefiller, PrefillJob
from .request import Request

__all__ = [
    "SEQUENCE",
    "Arrival",
    "CacheTensor",
    "Decoder",
    "KvLayout",
    "KvTransferError",
    "LayerWrite",
    "PagePool",
    "PoolExhausted",
    "PrefillJob",
    "Prefiller",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "RequestRefused",
    "Runs",
    "Shard",
    "Span",
    "expected_ranges",
    "layer_write",
    "page_rows",
    "payload_bytes",
    "plan_runs",
]
