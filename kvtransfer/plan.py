"""Which bytes of a request go where: the one text that both sides read.

The ranges follow from the request alone: each part of each page of each layer is one range, and
the tail is one more. How the prefiller cuts its prefill into chunks changes when they are written,
never how many there are.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import KvLayout
    from .request import Request


@dataclasses.dataclass(frozen=True)
class LayerWrite:
    """One paged write: row i of `src_rows` goes to row i of `dst_rows`.

    Attributes:
        src_rows, dst_rows: int32 arrays of equal length, in units of `row_bytes` from the
            layer's start.
        row_bytes: length of a range, and the stride from row to row on both sides.
        src_offset, dst_offset: where the layer starts in either region, in bytes.
    """

    src_rows: npt.NDArray[np.int32]
    dst_rows: npt.NDArray[np.int32]
    row_bytes: int
    src_offset: int
    dst_offset: int


def page_rows(layout: KvLayout, pages: Sequence[int], capacity: int) -> npt.NDArray[np.int32]:
    """Rows of `pages` within a layer: those of their K, then those of their V (or both at once).

    Returns:
        int32 array of length ``layout.parts * len(pages)``.
    """
    index = np.asarray(pages, dtype=np.int32)
    starts = np.arange(layout.parts, dtype=np.int32) * np.int32(capacity)
    rows: npt.NDArray[np.int32] = (starts[:, None] + index[None, :]).reshape(-1)
    return rows


def layer_write(
    request: Request,
    layer: int,
    src_pages: Sequence[int],
    src_capacity: int,
    first: int = 0,
    end: int | None = None,
) -> LayerWrite:
    """The write of pages `first` up to `end` (of the request's list) of one layer.

    Args:
        request: says where the pages go.
        layer: which layer.
        src_pages: where the prefiller keeps them, one for each page of the request.
        src_capacity: pages of the prefiller's region.
        first: the first page, counted in the request's list.
        end: the one after the last; None for the list's end.
    """
    layout = request.layout
    return LayerWrite(
        src_rows=page_rows(layout, src_pages[first:end], src_capacity),
        dst_rows=page_rows(layout, request.pages[first:end], request.capacity),
        row_bytes=layout.page_bytes,
        src_offset=layer * layout.layer_bytes(src_capacity),
        dst_offset=layer * layout.layer_bytes(request.capacity),
    )


def expected_ranges(request: Request) -> int:
    """What the decoder's counter stands at when everything has arrived."""
    layout = request.layout
    tail = 1 if request.tail_bytes else 0
    return layout.layers * layout.parts * len(request.pages) + tail


def payload_bytes(request: Request) -> int:
    """Bytes that the prefiller writes for the request."""
    layout = request.layout
    return (
        layout.layers * layout.parts * len(request.pages) * layout.page_bytes + request.tail_bytes
    )
