"""Bytes from elsewhere that are parsed in Python: they are understood, or refused in words.

Valid addresses, descriptors and messages of kvtransfer are spoilt, in their bytes and in their
structure. What is understood comes back the same; what is not is refused with a `WireError` of one
short line that begins with the field's name. ``FABRIC_FUZZ_SECONDS`` is how long each test looks
(default 1); ``--seed`` repeats a run.
"""

from __future__ import annotations

import copy
import os
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import hypothesis
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fabric
from kvtransfer import KvLayout, Request
from kvtransfer._answers import Cancel, Ended, decode, encode
from tests.test_wire import ADDRESS, DESCRIPTOR

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = float(os.environ.get("FABRIC_FUZZ_SECONDS", "1"))
TEXT_MAX = 300
"""Of an error's text: one that quotes all it was sent would fill logs."""
PEAK_BYTES = 2 << 20
"""That refusing a message may take, which has 64 KiB at most."""

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=4, page_tokens=4, dtype="float16")
KV = fabric.Descriptor.from_bytes(msgpack.packb([*DESCRIPTOR[:5], 1 << 20, *DESCRIPTOR[6:]]))
REQUEST = Request(
    id=bytes(range(16)),
    model="model",
    layout=LAYOUT,
    decoder=KV.address,
    kv=KV,
    capacity=9,
    pages=(3, 0, 8),
    counter=1 << 27,
    tail=KV,
    tail_offset=64,
    tail_bytes=40,
    prompt=(1, 2, 3),
    payload=b"payload",
    budget_ms=1000,
)
MESSAGES = [
    REQUEST.to_bytes(),
    encode(Cancel(bytes(16))),
    encode(Ended(bytes(16), "refused", "pages", "there are none")),
]


def message_again(message: Request | Cancel | Ended) -> bytes:
    """Return a message's bytes."""
    return message.to_bytes() if isinstance(message, Request) else encode(message)


class Parser:
    """What reads bytes, what writes them again, and bytes to begin with."""

    def __init__(
        self, read: Callable[[Any], Any], write: Callable[[Any], Any], *raw: bytes
    ) -> None:
        self.read = read
        self.write = write
        self.raw = raw

    def must_bear(self, raw: Any) -> None:
        """Check what becomes of some bytes."""
        try:
            thing = self.read(raw)
        except fabric.WireError as error:
            refused = str(error)
        else:
            written = self.write(thing)
            again = self.read(written)
            assert again == thing
            assert self.write(again) == written
            if isinstance(thing, fabric.Address):
                thing.as_c()
            return
        assert ": " in refused, refused
        assert len(refused) <= TEXT_MAX, refused
        assert refused.isprintable(), refused


PARSERS = {
    "address": Parser(fabric.Address.from_bytes, bytes, msgpack.packb(ADDRESS)),
    "descriptor": Parser(fabric.Descriptor.from_bytes, bytes, msgpack.packb(DESCRIPTOR)),
    "message": Parser(decode, message_again, *MESSAGES),
}

# ---- bytes that are spoilt

HEADS = [
    b"\xdd\xff\xff\xff\xff",  # an array, a map, bytes, a text, an extension: of 2**32 - 1
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x05",
    b"\xd7\xff" + bytes(8),  # a time
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf8" + bytes(6),  # no number
    b"\xa2\xed\xa0",  # half a surrogate
    b"\xa1\x1b",
    b"\x91" * 600,
    b"\x81\xa1v" * 600,
    b"\xc1",
]


@st.composite
def spoilt_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Flip, cut, insert, repeat: up to four times."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 8))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at : at + size] = b""
            case 2:
                data[at:at] = draw(st.sampled_from(HEADS) | st.binary(max_size=8))
            case 3:
                data[at:at] = data[at : at + size] * draw(st.integers(1, 50))
            case _:
                del data[at:]
    return bytes(data)


# ---- structures that are spoilt

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([-1, 0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 63) + 1, (1 << 64) - 1]),
    st.floats(),
    st.text(max_size=80),
    st.binary(max_size=150),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
)
NODES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=70),
        st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    ),
    max_leaves=8,
)


@st.composite
def spoilt_structure(draw: st.DrawFn, raw: bytes) -> bytes:
    """Replace, drop, double or swap one node; of a map, also give a field twice."""
    whole = copy.deepcopy(msgpack.unpackb(raw))
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], list | dict) or draw(st.booleans()):
            break
        place = place[key]
    match draw(st.integers(0, 3)):
        case 0:
            place[key] = draw(NODES)
        case 1:
            del place[key]
        case 2 if isinstance(place, list):
            place[key:key] = [place[key]] * draw(st.integers(1, 3))
        case _:
            other = draw(st.sampled_from(keys))
            place[key], place[other] = place[other], place[key]
    if not isinstance(whole, dict):
        return bytes(msgpack.packb(whole))
    pairs = list(whole.items())
    if draw(st.integers(0, 3)) == 0:
        pairs.insert(draw(st.integers(0, len(pairs))), (draw(st.sampled_from(keys)), draw(NODES)))
    return bytes(msgpack.Packer(autoreset=True).pack_map_pairs(pairs))


def look(test: Callable[[], None], seed: int) -> None:
    """Try examples for as long as there is time, each hundred with a seed of its own."""
    until = time.monotonic() + SECONDS
    while True:
        hypothesis.seed(seed)(test)()
        seed += 1
        if time.monotonic() > until:
            return


BRIEFLY = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("spoil", [spoilt_bytes, spoilt_structure], ids=["bytes", "structure"])
def test_what_was_spoilt(pytestconfig: pytest.Config, name: str, spoil: Any) -> None:
    parser = PARSERS[name]

    @BRIEFLY
    @given(st.sampled_from(parser.raw).flatmap(spoil))
    def test(raw: bytes) -> None:
        parser.must_bear(raw)

    look(test, pytestconfig.option.seed)


def test_any_text_as_an_address(pytestconfig: pytest.Config) -> None:
    parser = Parser(fabric.Address.parse, str)
    text = str(KV.address)

    @BRIEFLY
    @given(st.text(max_size=40), st.integers(0, len(text)), st.integers(0, len(text)))
    def test(other: str, begin: int, end: int) -> None:
        for spoilt in (other, "fab1." + other, text[:begin] + other + text[end:]):
            parser.must_bear(spoilt)

    look(test, pytestconfig.option.seed)


# ---- what this has found


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("head", [b"\xdd", b"\xdf"], ids=["arrays", "maps"])
@pytest.mark.parametrize("items", [64, 8000, 16000, 65000])
def test_what_is_refused_takes_little_memory(name: str, head: bytes, items: int) -> None:
    """Heads of arrays and maps, one in the other, which promise more items than ever come."""
    limit = {"address": 8192, "descriptor": 16384, "message": 65536}[name]
    key = b"\xa1v" if head == b"\xdf" else b""
    raw = ((head + items.to_bytes(4, "big") + key) * 500).ljust(limit, b"\xc0")[:limit]
    tracemalloc.start()
    try:
        PARSERS[name].must_bear(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK_BYTES, f"{peak} bytes"


def test_an_error_does_not_repeat_all_it_was_sent() -> None:
    long = "x" * 8000
    for name, raw in (
        ("message", msgpack.packb({"v": 1, "kind": "cancel", "id": bytes(16), long: 1})),
        ("message", msgpack.packb({"v": 1, "kind": "cancel", "id": bytes(16), "a\nb": 1})),
        ("message", msgpack.packb({"v": 1, "kind": "cancel", "id": long})),
        ("address", msgpack.packb(["fabric-address", long, b"", "", []])),
        ("descriptor", msgpack.packb(["fabric-descriptor", [long]])),
    ):
        PARSERS[name].must_bear(raw)
        with pytest.raises(fabric.WireError):
            PARSERS[name].read(raw)
