"""Layout, planner and request: the pure parts of kvtransfer, against brute force."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fabric
from fabric import InvalidArgument, WireError
from kvtransfer import (
    KvLayout,
    Request,
    expected_ranges,
    layer_write,
    payload_bytes,
)
from kvtransfer._answers import Cancel, Ended, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=4, page_tokens=4, dtype="float16")
CAPACITY = 9
TAIL_BYTES = 40

layouts = st.builds(
    KvLayout,
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    page_tokens=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "float16", "uint8"]),
    joined=st.booleans(),
)


@pytest.fixture(scope="module")
def request_() -> Iterator[Request]:
    """A valid request with real descriptors."""
    with fabric.TransferEngine(provider="local") as engine:
        kv = engine.alloc(LAYOUT.region_bytes(CAPACITY))
        tail = engine.alloc(4096)
        yield Request(
            id=bytes(range(16)),
            model="model",
            layout=LAYOUT,
            decoder=engine.address,
            kv=kv.descriptor,
            capacity=CAPACITY,
            pages=(3, 0, 8),
            counter=1 << 27,
            tail=tail.descriptor,
            tail_offset=64,
            tail_bytes=TAIL_BYTES,
            prompt=(1, 2, 3),
            payload=b"payload",
            budget_ms=1000,
        )


# ---- layout


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("layers", 1025),
        ("kv_heads", -1),
        ("head_dim", 2.0),
        ("head_dim", True),
        ("page_tokens", 1 << 40),
        ("dtype", "float31"),
        ("joined", 1),
    ],
)
def test_a_layout_names_its_bad_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}:"):
        dataclasses.replace(LAYOUT, **{field: value})


@given(layouts, layouts)
def test_a_fingerprint_tells_layouts_apart(one: KvLayout, other: KvLayout) -> None:
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert (one.difference(other) is None) == (one == other)


@given(layouts, st.integers(1, 7))
def test_the_shape_is_the_region(layout: KvLayout, capacity: int) -> None:
    size = int(np.prod(layout.shape(capacity))) * np.dtype(layout.dtype).itemsize
    assert size == layout.region_bytes(capacity)
    assert layout.layers * layout.layer_bytes(capacity) == size


@given(st.integers(0, 100), st.integers(1, 9))
def test_pages_hold_the_tokens(tokens: int, page_tokens: int) -> None:
    pages = dataclasses.replace(LAYOUT, page_tokens=page_tokens).pages_for(tokens)
    assert (pages - 1) * page_tokens < tokens <= pages * page_tokens or pages == tokens == 0


# ---- planner


@st.composite
def transfers(draw: st.DrawFn) -> dict[str, Any]:
    """Layout, capacities, pages on both sides, and where each layer's chunks end."""
    layout = draw(layouts)
    count = draw(st.integers(1, 6))
    capacities = [draw(st.integers(count, 9)) for _ in range(2)]
    pages = [tuple(draw(st.permutations(range(size)))[:count]) for size in capacities]
    ends = [sorted(draw(st.lists(st.integers(0, count), max_size=3))) for _ in range(layout.layers)]
    return {
        "layout": layout,
        "capacities": capacities,
        "pages": pages,
        "chunks": [list(itertools.pairwise([0, *layer, count])) for layer in ends],
    }


@settings(deadline=None)
@given(case=transfers(), tail=st.integers(0, 9), seed=st.integers(0, 1 << 30))
def test_the_plan_is_a_copy(request_: Request, case: dict[str, Any], tail: int, seed: int) -> None:
    """Whatever the chunks: the right bytes, each once, in as many ranges as were promised."""
    layout, (here, there) = case["layout"], case["capacities"]
    source_pages, target_pages = case["pages"]
    wanted = dataclasses.replace(
        request_, layout=layout, capacity=there, pages=target_pages, tail_bytes=tail
    )
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, layout.region_bytes(here), dtype=np.uint8)
    target = np.zeros(layout.region_bytes(there), dtype=np.uint8)
    written = np.zeros(layout.region_bytes(there), dtype=np.int32)
    ranges = 0
    for layer, chunks in enumerate(case["chunks"]):
        for first, end in chunks:
            plan = layer_write(wanted, layer, source_pages, here, first, end)
            ranges += len(plan.dst_rows)
            for src, dst in zip(plan.src_rows, plan.dst_rows, strict=True):
                start = plan.dst_offset + int(dst) * plan.row_bytes
                origin = plan.src_offset + int(src) * plan.row_bytes
                target[start : start + plan.row_bytes] = source[origin : origin + plan.row_bytes]
                written[start : start + plan.row_bytes] += 1

    page_axis = 1 if layout.joined else 2
    dtype = np.dtype(layout.dtype)
    brute = np.zeros(layout.region_bytes(there), dtype=np.uint8)
    into = np.moveaxis(brute.view(dtype).reshape(layout.shape(there)), page_axis, 0)
    out_of = np.moveaxis(source.view(dtype).reshape(layout.shape(here)), page_axis, 0)
    for src, dst in zip(source_pages, target_pages, strict=True):
        into[dst] = out_of[src]
    assert np.array_equal(target, brute)
    assert written.max() == 1
    assert ranges + (1 if tail else 0) == expected_ranges(wanted)
    assert int(written.sum()) + tail == payload_bytes(wanted)


# ---- messages


@settings(deadline=None)
@given(
    pages=st.permutations(range(CAPACITY)).flatmap(
        lambda order: st.integers(1, CAPACITY).map(lambda n: tuple(order[:n]))
    ),
    prompt=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=20).map(tuple),
    payload=st.binary(max_size=50),
    model=st.text(max_size=20),
    with_tail=st.booleans(),
)
def test_a_request_survives_the_wire(
    request_: Request,
    pages: tuple[int, ...],
    prompt: tuple[int, ...],
    payload: bytes,
    model: str,
    with_tail: bool,
) -> None:
    sent = dataclasses.replace(
        request_,
        pages=pages,
        prompt=prompt,
        payload=payload,
        model=model.encode("utf-8", "ignore").decode(),
        tail=request_.tail if with_tail else None,
        tail_offset=request_.tail_offset if with_tail else 0,
        tail_bytes=request_.tail_bytes if with_tail else 0,
    )
    got = decode(sent.to_bytes())
    assert isinstance(got, Request)
    for field in dataclasses.fields(Request):
        mine, theirs = getattr(sent, field.name), getattr(got, field.name)
        if field.name in {"decoder", "kv", "tail"}:
            mine, theirs = bytes(mine or b""), bytes(theirs or b"")
        assert mine == theirs, field.name
    assert expected_ranges(got) == expected_ranges(sent)


def _pages(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


BAD_FIELDS: list[tuple[str, Any]] = [
    ("v", 2),
    ("v", "1"),
    ("kind", "requests"),
    ("kind", 1),
    ("id", bytes(15)),
    ("id", "0123456789abcdef"),
    ("model", b"model"),
    ("model", "m" * 257),
    ("layout", []),
    ("layout.layers", 0),
    ("layout.layers", "2"),
    ("layout.kv_heads", True),
    ("layout.head_dim", 1 << 63),
    ("layout.page_tokens", -1),
    ("layout.dtype", "float31"),
    ("layout.joined", 0),
    ("layout.colour", 1),
    ("decoder", b""),
    ("decoder", b"\x00" * 64),
    ("decoder", 7),
    ("kv", b"\xff"),
    ("kv", b""),
    ("capacity", 0),
    ("capacity", CAPACITY + 1),
    ("capacity", 1 << 30),
    ("pages", b""),
    ("pages", b"\x00\x00\x00"),
    ("pages", _pages(0, 0)),
    ("pages", _pages(-1)),
    ("pages", _pages(CAPACITY)),
    ("pages", [1]),
    ("counter", -1),
    ("counter", 1 << 28),
    ("tail", b"\x01"),
    ("tail", b""),
    ("tail_offset", -1),
    ("tail_offset", 4096 - TAIL_BYTES + 1),
    ("tail_offset", (1 << 63) - 1),
    ("tail_bytes", 0),
    ("tail_bytes", -1),
    ("tail_bytes", 1 << 31),
    ("prompt", b"\x00"),
    ("prompt", None),
    ("payload", "text"),
    ("payload", bytes(49153)),
    ("budget_ms", 0),
    ("budget_ms", 1.5),
    ("extra", 1),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_field_is_named(request_: Request, field: str, value: object) -> None:
    message = msgpack.unpackb(request_.to_bytes())
    outer, _, inner = field.partition(".")
    if inner:
        message[outer][inner] = value
    else:
        message[outer] = value
    blamed = "kv" if (field, value) == ("capacity", CAPACITY + 1) else field
    blamed = "kind|id" if field == "kind" else blamed
    with pytest.raises(WireError, match=f"^({blamed}):"):
        decode(msgpack.packb(message))


def test_a_missing_field_is_named(request_: Request) -> None:
    whole = msgpack.unpackb(request_.to_bytes())
    for field in whole:
        rest = {name: value for name, value in whole.items() if name != field}
        with pytest.raises(WireError, match=f"^{field}: missing"):
            decode(msgpack.packb(rest))


def test_what_cannot_be_received_is_not_sent(request_: Request) -> None:
    for changes in (
        {"pages": ()},
        {"pages": (1, 1)},
        {"prompt": (1 << 40,)},
        {"prompt": (1.5,)},
        {"counter": 1 << 70},
        {"payload": bytes(49152), "prompt": (1,) * 12000},  # each fits, together they do not
    ):
        with pytest.raises(InvalidArgument):
            dataclasses.replace(request_, **changes).to_bytes()


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(WireError, match="twice"):
        decode(b"\x82\xa1v\x01\xa1v\x01")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    with pytest.raises(WireError):
        decode(raw)


@settings(deadline=None)
@given(data=st.data())
def test_damaged_requests_are_refused_in_words(request_: Request, data: st.DataObject) -> None:
    raw = bytearray(request_.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with contextlib.suppress(WireError):
        decode(bytes(raw))


@given(
    st.binary(min_size=16, max_size=16),
    st.sampled_from(["refused", "failed", "cancelled"]),
    st.text(max_size=80),
    st.text(max_size=2000),
)
def test_answers_survive_the_wire(name: bytes, kind: str, field: str, reason: str) -> None:
    assert decode(encode(Cancel(name))) == Cancel(name)
    got = decode(encode(Ended(name, kind, field, reason)))
    assert isinstance(got, Ended)
    assert (got.id, got.kind) == (name, kind)
    assert reason.encode(errors="replace").startswith(got.reason.encode())


@given(data=st.data())
def test_a_request_that_was_tampered_with(request_: Request, data: st.DataObject) -> None:
    """It is refused in words, or it is another request that is whole."""
    raw = bytearray(request_.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        message = decode(bytes(raw))
    except WireError:
        return
    assert isinstance(message, Request)
    assert decode(message.to_bytes()) == message
