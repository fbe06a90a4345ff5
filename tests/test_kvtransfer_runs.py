"""The planner of unequal layouts against a copy of one item after the other."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fabric import InvalidArgument
from kvtransfer import SEQUENCE, CacheTensor, Runs, Shard, Span, plan_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CASES = int(os.environ.get("FABRIC_EXAMPLES", "2000"))
TENSOR = CacheTensor("kv", layers=4, heads=4, item_bytes=6)
SHARD = Shard(TENSOR, page_tokens=4, capacity=8)
MARGIN = 7  # bytes of a region behind its last layer, which nobody may touch


def items(shard: Shard, layer: int, pages: Sequence[int], tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield (part, head, token, byte of the region) of each item that the shard has of a sequence.

    By the shape that the docstring of `Shard` gives, and by nothing that the planner uses.
    """
    tensor = shard.tensor
    heads = len(shard.heads)
    page = (shard.page_tokens, heads) if shard.token_major else (heads, shard.page_tokens)
    outer = (shard.capacity, tensor.parts) if shard.joined else (tensor.parts, shard.capacity)
    shape = (*outer, *page, tensor.item_bytes)
    start = shard.offset + (layer - shard.first_layer) * shard.layer_stride
    for part, head, token in itertools.product(range(tensor.parts), range(heads), range(tokens)):
        at, within = pages[token // shard.page_tokens], token % shard.page_tokens
        outside = (at, part) if shard.joined else (part, at)
        inside = (within, head) if shard.token_major else (head, within)
        place = np.ravel_multi_index((*outside, *inside, 0), shape)
        yield part, shard.heads[head], token, start + int(place)


def region_bytes(shard: Shard) -> int:
    """Return the length of a region that holds the shard."""
    return shard.offset + shard.layers * shard.layer_stride + MARGIN


@dataclasses.dataclass
class Case:
    """Two sides of one tensor, each with all its ranks, and a sequence."""

    sources: list[Shard]
    targets: list[Shard]
    src_pages: list[int]
    dst_pages: list[int]
    span: Span
    turn: int

    def plan(self, src: Shard, dst: Shard) -> Runs:
        return plan_runs(src, dst, self.src_pages, self.dst_pages, self.span, self.turn)


def ranks_for(heads: int) -> st.SearchStrategy[int]:
    """Choose a number of ranks that can share so many heads: fewer, as many, or more."""
    fitting = [n for n in range(1, 9) if heads % n == 0 or n % heads == 0]
    return st.sampled_from(fitting)


@st.composite
def sides(draw: st.DrawFn, tensor: CacheTensor, tokens: int) -> tuple[list[Shard], list[int]]:
    """Choose the shards of one side, and the pages of the sequence on it."""
    granule = tensor.granule
    page_tokens = 1 if granule == SEQUENCE else granule * draw(st.integers(1, 5))
    ranks = draw(ranks_for(tensor.heads))
    first = draw(st.integers(0, tensor.layers - 1))
    layers = draw(st.integers(1, tensor.layers - first))
    count = min(1, tokens) if granule == SEQUENCE else -(-tokens // page_tokens)
    capacity = count + draw(st.integers(0 if count else 1, 3))
    # Neighbouring pages must happen often, as they do in a fresh cache.
    pages = draw(st.permutations(range(capacity)) | st.just(list(range(capacity))))[:count]
    shard = Shard(
        tensor,
        page_tokens=page_tokens,
        capacity=capacity,
        ranks=ranks,
        joined=draw(st.booleans()),
        token_major=granule <= 1 and draw(st.booleans()),
        first_layer=first,
        layers=layers,
        offset=draw(st.integers(0, 40)),
    )
    stride = shard.layer_bytes + draw(st.sampled_from([0, 0, 5]))
    return [dataclasses.replace(shard, rank=r, layer_stride=stride) for r in range(ranks)], pages


@st.composite
def cases(draw: st.DrawFn) -> Case:
    granule = draw(st.sampled_from([1, 1, 1, 4, SEQUENCE]))
    tensor = CacheTensor(
        "kv",
        layers=draw(st.integers(1, 3)),
        heads=draw(st.sampled_from([1, 2, 3, 4, 6])),
        item_bytes=draw(st.integers(1, 5)),
        parts=draw(st.integers(1, 2)),
        granule=granule,
    )
    end = draw(st.integers(0, 17))
    step = max(1, granule)
    first = draw(st.integers(0, end // step)) * step
    cut = draw(st.sampled_from([0, 1, 2, 5])) * step
    sources, src_pages = draw(sides(tensor, end))
    targets, dst_pages = draw(sides(tensor, end))
    assume(set(sources[0].layer_range) & set(targets[0].layer_range))
    turn = draw(st.integers(0, 9))
    return Case(sources, targets, src_pages, dst_pages, Span(first, end, cut), turn)


def wanted(case: Case, dst: Shard, layer: int, tokens: int) -> dict[tuple[int, ...], int]:
    """Where each item of the span must go: byte of the region by (part, head, token)."""
    first = 0 if dst.tensor.granule == SEQUENCE and case.span.end > case.span.first else None
    first = case.span.first if first is None else first
    found = items(dst, layer, case.dst_pages, tokens)
    return {(part, head, token): at for part, head, token, at in found if token >= first}


def moved_tokens(case: Case) -> int:
    """Tokens that move, with those of the last granule behind the end."""
    granule = case.targets[0].tensor.granule
    if granule == SEQUENCE:
        return min(1, case.span.end - case.span.first)
    return -(-case.span.end // granule) * granule


@settings(max_examples=CASES, deadline=None)
@given(cases(), st.integers(0, 1 << 32))
def test_every_item_arrives_once_and_nothing_else_changes(case: Case, noise: int) -> None:
    rng = np.random.default_rng(noise)
    regions = [rng.integers(0, 256, region_bytes(s), np.uint8) for s in case.sources]
    shared = sorted(set(case.sources[0].layer_range) & set(case.targets[0].layer_range))
    layer, tokens = int(rng.choice(shared)), moved_tokens(case)
    # Ranks that hold the same heads hold the same bytes.
    values: dict[tuple[int, ...], bytes] = {}
    size = case.targets[0].tensor.item_bytes
    for region, shard in zip(regions, case.sources, strict=True):
        for part, head, token, at in items(shard, layer, case.src_pages, tokens):
            known = values.setdefault((part, head, token), region[at : at + size].tobytes())
            region[at : at + size] = np.frombuffer(known, np.uint8)
    for dst in case.targets:
        before = rng.integers(0, 256, region_bytes(dst), np.uint8)
        after, expected, touched = before.copy(), before.copy(), np.zeros(len(before), np.uint8)
        for key, at in wanted(case, dst, layer, tokens).items():
            expected[at : at + size] = np.frombuffer(values[key], np.uint8)
        for region, src in zip(regions, case.sources, strict=True):
            runs = case.plan(src, dst)
            for s, d, n in zip(runs.src, runs.dst, runs.length, strict=True):
                a, b = src.layer_offset(layer) + s, dst.layer_offset(layer) + d
                assert 0 <= s <= src.layer_bytes - n
                assert 0 <= d <= dst.layer_bytes - n
                after[b : b + n] = region[a : a + n]
                touched[b : b + n] += 1
        assert touched.max(initial=0) <= 1, "a byte is written twice"
        assert touched.sum() == size * len(wanted(case, dst, layer, tokens))
        assert (after == expected).all()


@settings(max_examples=CASES // 4, deadline=None)
@given(cases())
def test_runs_are_as_long_as_they_can_be_and_ready_in_order(case: Case) -> None:
    span, granule = case.span, case.targets[0].tensor.granule
    for src, dst in itertools.product(case.sources, case.targets):
        runs = case.plan(src, dst)
        assert (np.diff(runs.ready) >= 0).all()
        assert ((runs.ready > span.first) & (runs.ready <= span.end)).all()
        if granule == SEQUENCE:
            assert (runs.ready == span.end).all()
            continue
        pieces = runs.ready - 1  # its last token names the piece between two cuts
        pieces = pieces // span.cut if span.cut else pieces * 0
        starts = {(s, d, p) for s, d, p in zip(runs.src, runs.dst, pieces, strict=True)}
        for s, d, n, p in zip(runs.src, runs.dst, runs.length, pieces, strict=True):
            assert (s + n, d + n, p) not in starts, "two runs could be one"


@settings(max_examples=CASES // 4, deadline=None)
@given(cases(), st.integers(0, 17))
def test_a_run_is_not_called_ready_too_early(case: Case, done: int) -> None:
    """What a prefill has not yet written does not leave."""
    if case.targets[0].tensor.granule == SEQUENCE:
        return
    layer = min(set(case.sources[0].layer_range) & set(case.targets[0].layer_range))
    for src, dst in itertools.product(case.sources, case.targets):
        runs = case.plan(src, dst)
        count = int(np.searchsorted(runs.ready, done, side="right"))
        late = {
            at - src.layer_offset(layer)
            for _, _, token, at in items(src, layer, case.src_pages, case.span.end)
            if token >= done
        }
        for s, n in zip(runs.src[:count], runs.length[:count], strict=True):
            assert not late & set(range(int(s), int(s + n)))


# ---- what a reader may want to see in numbers


def test_equal_layouts_with_neighbouring_pages_are_one_run_for_k_and_one_for_v() -> None:
    runs = plan_runs(SHARD, SHARD, [2, 3, 4], [5, 6, 7], Span(0, 12))
    page = 4 * 4 * 6
    assert runs.length.tolist() == [3 * page, 3 * page]
    assert runs.src.tolist() == [2 * page, (8 + 2) * page]
    assert runs.dst.tolist() == [5 * page, (8 + 5) * page]


def test_scattered_pages_are_a_run_each_and_a_partial_page_is_one_for_each_head() -> None:
    runs = plan_runs(SHARD, SHARD, [2, 0, 5], [5, 1, 3], Span(0, 9))
    assert runs.ready.tolist() == [4] * 2 + [8] * 2 + [9] * 8
    assert runs.length.tolist() == [4 * 4 * 6] * 4 + [6] * 8


def test_a_cut_bounds_what_a_run_waits_for() -> None:
    runs = plan_runs(SHARD, SHARD, [2, 3, 4, 5], [2, 3, 4, 5], Span(0, 16, cut=8))
    assert runs.ready.tolist() == [8, 8, 16, 16]


def test_token_major_pages_of_equal_ranks_move_whole() -> None:
    shard = dataclasses.replace(SHARD, token_major=True, joined=True)
    runs = plan_runs(shard, shard, [0, 1], [6, 7], Span(0, 8))
    assert runs.length.tolist() == [2 * 2 * 4 * 4 * 6]


def test_a_cached_prefix_is_not_sent() -> None:
    runs = plan_runs(SHARD, SHARD, [0, 1, 2], [0, 1, 2], Span(8, 12))
    assert runs.nbytes == 2 * 4 * 4 * 6
    assert len(plan_runs(SHARD, SHARD, [0, 1, 2], [0, 1, 2], Span(12, 12))) == 0


@pytest.mark.parametrize(("sources", "targets"), [(1, 2), (2, 4), (4, 2), (8, 2), (2, 8), (8, 8)])
def test_copies_of_a_head_share_the_work(sources: int, targets: int) -> None:
    """MLA, and more ranks than heads: over some requests each rank sends the same."""
    latent = CacheTensor("latent", layers=1, heads=1, item_bytes=16, parts=1)
    sent = np.zeros(sources, int)
    for turn in range(sources):
        for d, s in itertools.product(range(targets), range(sources)):
            src = Shard(latent, page_tokens=4, capacity=1, rank=s, ranks=sources)
            dst = Shard(latent, page_tokens=4, capacity=1, rank=d, ranks=targets)
            sent[s] += plan_runs(src, dst, [0], [0], Span(0, 4), turn).nbytes
    assert (sent == targets * 64).all()


def test_vllm_on_a_cpu_moves_blocks_whole() -> None:
    """A block of vLLM's CPU backend is packed in a way of its own: [heads][tokens * 2 * dim]."""
    packed = CacheTensor("kv", layers=1, heads=2, item_bytes=2 * 64 * 4, parts=1, granule=32)
    one = Shard(packed, page_tokens=32, capacity=8)
    two = [Shard(packed, page_tokens=32, capacity=8, rank=r, ranks=2) for r in range(2)]
    for rank, dst in enumerate(two):
        runs = plan_runs(one, dst, [3, 1], [0, 1], Span(0, 40))
        assert runs.length.tolist() == [32 * 512, 32 * 512]
        assert runs.src.tolist() == [(2 * 3 + rank) * 32 * 512, (2 * 1 + rank) * 32 * 512]
        assert runs.ready.tolist() == [32, 40]


# ---- refusals


def refused(word: str, *arguments: Any) -> None:
    with pytest.raises(InvalidArgument, match=word):
        plan_runs(*arguments)


def test_refusals_name_what_is_wrong() -> None:
    other = dataclasses.replace(TENSOR, item_bytes=8)
    span = Span(0, 8)
    refused(
        "^item_bytes: 6 .* 8",
        SHARD,
        dataclasses.replace(SHARD, tensor=other, layer_stride=0),
        [0, 1],
        [0, 1],
        span,
    )
    refused("^src_pages: 1 pages of 4 tokens, where 8 tokens", SHARD, SHARD, [0], [0, 1], span)
    refused("^dst_pages: a page is not one of 8", SHARD, SHARD, [0, 1], [0, 8], span)
    refused("^dst_pages: a page is listed twice", SHARD, SHARD, [0, 1], [1, 1], span)
    early = dataclasses.replace(SHARD, layers=2, layer_stride=0)
    late = dataclasses.replace(SHARD, first_layer=2, layers=2, layer_stride=0)
    refused("^layers: .* share none", early, late, [0, 1], [0, 1], span)
    refused("^src_pages: a page is not an integer", SHARD, SHARD, [0.5, 1], [0, 1], span)
    refused("^src_pages: 2 pages", SHARD, SHARD, [0, 1], [0, 1], Span(0, 1 << 30))  # and at once
    token_major = Shard(TENSOR, page_tokens=4096, capacity=4096, token_major=True)
    pages = range(3000)
    refused("^end: 12288000 pieces", token_major, token_major, pages, pages, Span(0, 3000 * 4096))
    packed = dataclasses.replace(SHARD, tensor=dataclasses.replace(TENSOR, granule=4))
    assert len(plan_runs(packed, packed, [0, 1], [0, 1], Span(7, 7))) == 0
    refused("^first: 2 is no multiple of the 4", packed, packed, [0, 1], [0, 1], Span(2, 8))
    refused("^cut: 6 is no multiple of 4", packed, packed, [0, 1], [0, 1], Span(0, 8, 6))


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("page_tokens", {"page_tokens": 0}),
        ("capacity", {"capacity": 1 << 31}),
        ("rank", {"rank": 2, "ranks": 2}),
        ("ranks: 4 heads of kv cannot be shared evenly by 3", {"ranks": 3}),
        ("first_layer", {"first_layer": 4, "layers": 1}),
        ("layer_stride", {"layer_stride": 1}),
        ("offset", {"offset": -1}),
        (
            "page_tokens: 4 is no multiple of the 3",
            {"tensor": dataclasses.replace(TENSOR, granule=3)},
        ),
        ("page_tokens: a state", {"tensor": dataclasses.replace(TENSOR, granule=SEQUENCE)}),
        (
            "token_major",
            {"tensor": dataclasses.replace(TENSOR, granule=4), "token_major": True},
        ),
    ],
)
def test_a_shard_that_cannot_be(word: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"^{word}"):
        dataclasses.replace(SHARD, **{"layer_stride": 0, **change})


def test_a_tensor_that_cannot_be() -> None:
    for field in ("layers", "heads", "item_bytes", "parts"):
        change: dict[str, Any] = {field: 0}
        with pytest.raises(InvalidArgument, match=f"^{field}"):
            dataclasses.replace(TENSOR, **change)
    with pytest.raises(InvalidArgument, match=r"^granule"):
        dataclasses.replace(TENSOR, granule=-1)
    for word, bad in (
        ("first", (-1, 4)),
        ("first", (5, 4)),
        ("end", (0, np.uint8(4))),
        ("end", (0, 1 << 40)),
        ("cut", (0, 4, 1 << 63)),
        ("cut", (0, 4, "a")),
    ):
        with pytest.raises(InvalidArgument, match=f"^{word}"):
            Span(*bad)
