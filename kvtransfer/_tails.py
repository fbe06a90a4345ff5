"""Memory for tails, and the check of memory for pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric import InvalidArgument

from .pool import PagePool
from .request import MAX_TAIL_BYTES

if TYPE_CHECKING:
    from fabric import TransferEngine

    from .layout import KvLayout

#: Tails start at multiples of this.
TAIL_ALIGN = 64


def tail_stride(tail_bytes: int) -> int:
    """Distance of one tail from the next in a tail region."""
    return -(-tail_bytes // TAIL_ALIGN) * TAIL_ALIGN


def tail_pool(engine: TransferEngine, tail_bytes: int, count: int) -> PagePool | None:
    """A region of `count` tails, or None where there are no tails.

    Raises:
        InvalidArgument: a length or count out of bounds.
    """
    if not 0 <= tail_bytes <= MAX_TAIL_BYTES:
        raise InvalidArgument(f"tail_bytes: must be from 0 to {MAX_TAIL_BYTES}, not {tail_bytes}")
    if not tail_bytes:
        return None
    return PagePool(engine.alloc(tail_stride(tail_bytes) * count), count)


def check_region(layout: KvLayout, pool: PagePool) -> None:
    """Refuse a region that is too small for its pages."""
    length = pool.region.descriptor.nbytes
    need = layout.region_bytes(pool.capacity)
    if length < need:
        raise InvalidArgument(
            f"pool: {pool.capacity} pages need {need} bytes, the region has {length}"
        )
