"""Which bytes of one shard go where in another: the planner of unequal layouts.

It is a pure function of what a request says, and both sides call it: the one that writes posts its
runs, the one that waits counts them. The runs of one layer serve for every layer.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fabric import InvalidArgument

from ._check import check
from .shard import SEQUENCE, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

Offsets = npt.NDArray[np.int64]

#: Most pieces that one plan may look at; two million take about a second.
MAX_ITEMS = 1 << 23

#: Longest sequence; far beyond what fits into `MAX_ITEMS`.
MAX_TOKENS = 1 << 31


@dataclasses.dataclass(frozen=True)
class Span:
    """The tokens `first` up to `end` of a sequence, and how runs are cut.

    Attributes:
        first: the first token to move; those before it are there already (a cached prefix).
        end: the one after the last.
        cut: no run holds tokens of both sides of a multiple of `cut`, so that none waits for
            tokens far behind it; 0: they are never cut. Part of the request, as the number of
            runs depends on it. A state is never cut.
    """

    first: int
    end: int
    cut: int = 0

    def __post_init__(self) -> None:
        check("end", self.end, 0, MAX_TOKENS)
        check("first", self.first, 0, self.end)
        check("cut", self.cut, 0, MAX_TOKENS)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of bytes within one layer, in the order in which they can be written.

    Attributes:
        src, dst: where each starts, in bytes from the layer's start; int64 arrays of one length.
        length: bytes of each; int64.
        ready: how many tokens of the sequence must be final before it is written; int64, never
            falling, at most `Span.end`: what lies behind that in the last granule goes along.
            What a prefill of `n` tokens so far makes ready is
            ``np.searchsorted(ready, n, side="right")`` runs.
    """

    src: Offsets
    dst: Offsets
    length: Offsets
    ready: Offsets

    def __len__(self) -> int:
        return len(self.src)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs together."""
        return int(self.length.sum())


def plan_runs(
    src: Shard,
    dst: Shard,
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    span: Span,
    turn: int = 0,
) -> Runs:
    """Map the tokens of a sequence from one rank's shard onto another's.

    Runs never overlap in the destination, never leave either shard, and are as long as both
    layouts and `span.cut` allow. Over all ranks of the source side each byte of the destination
    comes exactly once: of ranks that hold the same heads one is chosen, by the destination's
    rank and `turn`.

    Args:
        src, dst: shards of the same tensor.
        src_pages, dst_pages: their pages of the sequence from its first token on, in token order.
        span: which tokens.
        turn: spreads the load where several ranks could be the source: any number that both
            sides know, such as one that counts requests.

    Returns:
        The runs of one layer; none where `src` is not the source of any head of `dst`.

    Raises:
        InvalidArgument: the shards are of different tensors, or share no layer; pages are missing,
            repeated or out of range; or the span does not fit the tensor's granule. The text
            starts with what is wrong.
    """
    _check_pair(src, dst)
    _check_pages("src_pages", src, src_pages, span.end)
    _check_pages("dst_pages", dst, dst_pages, span.end)
    bounds = _segments(src, dst, span)
    heads = _heads(src, dst, turn)
    if not len(heads) or not len(bounds):
        none = np.empty(0, np.int64)
        return Runs(none, none, none, none)
    runs = _merged(*_items(src, dst, src_pages, dst_pages, heads, bounds), span)
    if src.tensor.granule == SEQUENCE:  # a state is final with the last token
        return dataclasses.replace(runs, ready=np.full(len(runs), span.end, np.int64))
    return runs


def _check_pair(src: Shard, dst: Shard) -> None:
    for field in dataclasses.fields(src.tensor):
        ours, theirs = getattr(src.tensor, field.name), getattr(dst.tensor, field.name)
        if ours != theirs:
            raise InvalidArgument(f"{field.name}: {ours!r} of the source, {theirs!r} of the other")
    if not set(src.layer_range) & set(dst.layer_range):
        raise InvalidArgument(f"layers: {src.layer_range} and {dst.layer_range} share none")


def _check_pages(name: str, shard: Shard, pages: Sequence[int], end: int) -> None:
    needed = shard.pages_for(end)
    if len(pages) != needed:
        raise InvalidArgument(
            f"{name}: {len(pages)} pages of {shard.page_tokens} tokens, where {end} tokens of "
            f"{shard.tensor.name} have {needed}"
        )
    if not all(isinstance(page, numbers.Integral) for page in pages):
        raise InvalidArgument(f"{name}: a page is not an integer")
    if needed and not 0 <= min(pages) <= max(pages) < shard.capacity:
        raise InvalidArgument(f"{name}: a page is not one of {shard.capacity}")
    if len(set(pages)) != len(pages):
        raise InvalidArgument(f"{name}: a page is listed twice")


def _heads(src: Shard, dst: Shard, turn: int) -> range:
    """The heads that `src` sends to `dst`, by their number in the model."""
    if (dst.rank + turn) % src.copies != src.copy:
        return range(0)
    return range(max(src.heads[0], dst.heads[0]), 1 + min(src.heads[-1], dst.heads[-1]))


def _segments(src: Shard, dst: Shard, span: Span) -> Offsets:
    """Spans of tokens that lie together for each head on both sides: rows of (first, end)."""
    granule = src.tensor.granule
    if span.first == span.end:
        return np.empty((0, 2), np.int64)
    if granule == SEQUENCE:
        return np.array([(0, 1)], np.int64)
    if span.first % granule:
        raise InvalidArgument(
            f"first: {span.first} is no multiple of the {granule} tokens of {src.tensor.name} "
            "that can move only together"
        )
    if span.cut % granule:
        raise InvalidArgument(f"cut: {span.cut} is no multiple of {granule} tokens")
    end = -(-span.end // granule) * granule  # what is in the last granule behind the end goes along
    lengths = {src.page_tokens, dst.page_tokens, span.cut or end}
    if src.token_major or dst.token_major:
        lengths = {1}
    _check_count(sum((end - span.first) // n for n in lengths))
    steps = [np.arange(span.first - span.first % n, end, n) for n in lengths]
    steps.append(np.array([span.first, end]))
    marks = np.unique(np.concatenate(steps).astype(np.int64))
    marks = marks[(marks >= span.first) & (marks <= end)]
    return np.stack([marks[:-1], marks[1:]], axis=1)


def _check_count(count: int) -> None:
    if count > MAX_ITEMS:
        raise InvalidArgument(f"end: {count} pieces in a layer, more than {MAX_ITEMS}")


def _items(
    src: Shard,
    dst: Shard,
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    heads: range,
    bounds: Offsets,
) -> tuple[Offsets, Offsets, Offsets, Offsets]:
    """Source, destination, length and tokens (first, end) of what lies together on both sides."""
    item = src.tensor.item_bytes
    # Only where both have a token's heads together does more than one of them go at once.
    group = len(heads) if src.token_major and dst.token_major else 1
    units = np.arange(heads[0], heads[-1] + 1, group)
    _check_count(src.tensor.parts * len(units) * len(bounds))
    offsets = []
    for shard, pages in ((src, src_pages), (dst, dst_pages)):
        index = np.asarray(pages, np.int64)
        first = bounds[:, 0]
        places = index[first // shard.page_tokens] * shard.page_stride
        places = places + first % shard.page_tokens * shard.token_stride
        parts = np.arange(src.tensor.parts) * shard.part_stride
        own = (units - shard.heads[0]) * shard.head_stride
        offsets.append((parts[:, None, None] + own[None, :, None] + places).reshape(-1))
    shape = (src.tensor.parts, len(units), len(bounds))
    lengths = np.broadcast_to((bounds[:, 1] - bounds[:, 0]) * item * group, shape).reshape(-1)
    tokens = np.broadcast_to(bounds, (*shape, 2)).reshape(-1, 2)
    return offsets[0], offsets[1], lengths, tokens


def _merged(src: Offsets, dst: Offsets, length: Offsets, tokens: Offsets, span: Span) -> Runs:
    """Join what is adjacent on both sides, unless a cut is in between; sort by when it is ready."""
    order = np.argsort(src, kind="stable")
    src, dst, length, tokens = src[order], dst[order], length[order], tokens[order]
    piece = tokens[:, 0] // span.cut if span.cut else np.zeros(len(src), np.int64)
    starts = np.ones(len(src), bool)
    starts[1:] = (
        (src[1:] != src[:-1] + length[:-1])
        | (dst[1:] != dst[:-1] + length[:-1])
        | (piece[1:] != piece[:-1])
    )
    at = np.flatnonzero(starts)
    ready = np.minimum(np.maximum.reduceat(tokens[:, 1], at), span.end)
    by_ready = np.argsort(ready, kind="stable")
    return Runs(
        src=src[at][by_ready],
        dst=dst[at][by_ready],
        length=np.add.reduceat(length, at)[by_ready],
        ready=ready[by_ready],
    )
