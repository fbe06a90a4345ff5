"""Addresses and descriptors on the wire: what is sent comes back, what is malformed is refused."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fabric
from fabric import _descriptor, _peer

U64 = st.integers(0, (1 << 64) - 1)
LABELS = st.text("az09AZ:-_. é€😀", max_size=15)
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that are busy with something else."""


@st.composite
def address_fields(draw: st.DrawFn) -> list[Any]:
    nic = st.tuples(
        st.sampled_from(sorted(_peer.KINDS)),
        st.binary(max_size=128),
        st.tuples(U64, U64).map(list),
        st.integers(1, (1 << 64) - 1),
        st.booleans(),
    ).map(list)
    engine = draw(st.binary(min_size=16, max_size=16).filter(any))
    nics = draw(st.lists(nic, min_size=1, max_size=32))
    return ["fabric-address", 1, engine, draw(LABELS), nics]


@st.composite
def descriptor_fields(draw: st.DrawFn) -> list[Any]:
    address = draw(address_fields())
    offset = draw(st.integers(0, 1 << 62))
    length = draw(st.integers(0, 1 << 62))
    kind = draw(st.integers(0, 1))
    device = draw(st.integers(0, 65535)) if kind else 0
    keys = [[draw(U64), draw(U64)] for _ in address[4]]
    region, secret = draw(U64), draw(U64)
    return [
        "fabric-descriptor", 1, address, region, offset, length, kind, device, keys, secret,
    ]  # fmt: skip


NICS: list[Any] = [[1, b"blob", [2, 3], 4, True], [3, b"", [0, 0], 1, False]]
ADDRESS: list[Any] = ["fabric-address", 1, b"i" * 16, "host:1", NICS]
DESCRIPTOR: list[Any] = [
    "fabric-descriptor", 1, ADDRESS, 11, 100, 1000, 0, 0, [[12, 13], [14, 15]], 16,
]  # fmt: skip


@RELAXED
@given(address_fields())
def test_an_address_comes_back(fields: list[Any]) -> None:
    data = msgpack.packb(fields)
    address = fabric.Address.from_bytes(data)
    assert bytes(address) == data
    assert fabric.Address.parse(str(address)) == address
    assert bytes(fabric.Address.parse(str(address))) == data
    assert str(address).removeprefix("fab1.").replace("-", "").replace("_", "").isalnum()
    assert address.label == fields[3]


@RELAXED
@given(descriptor_fields())
def test_a_descriptor_comes_back(fields: list[Any]) -> None:
    data = msgpack.packb(fields)
    descriptor = fabric.Descriptor.from_bytes(data)
    assert bytes(descriptor) == data
    assert descriptor == fabric.Descriptor.from_bytes(bytearray(data))
    assert descriptor.nbytes == fields[5]


@RELAXED
@given(descriptor_fields(), st.data())
def test_part_of_a_descriptor(fields: list[Any], data: st.DataObject) -> None:
    whole = fabric.Descriptor.from_bytes(msgpack.packb(fields))
    begin = data.draw(st.integers(0, whole.nbytes))
    end = data.draw(st.integers(begin, whole.nbytes))
    part = whole[begin:end]
    fields[4] += begin
    fields[5] = end - begin
    assert bytes(part) == msgpack.packb(fields)
    assert whole[begin - whole.nbytes if begin < whole.nbytes else begin : end] == part


@RELAXED
@given(st.binary(max_size=300))
def test_bytes_at_random_are_refused(data: bytes) -> None:
    for decode in (fabric.Address.from_bytes, fabric.Descriptor.from_bytes):
        with pytest.raises(fabric.WireError):
            decode(data)


@settings(RELAXED, max_examples=300)
@given(descriptor_fields(), st.data())
def test_bytes_that_were_tampered_with(fields: list[Any], data: st.DataObject) -> None:
    raw = bytearray(msgpack.packb(fields))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        descriptor = fabric.Descriptor.from_bytes(raw)
    except fabric.WireError:
        return
    assert fabric.Descriptor.from_bytes(bytes(descriptor)) == descriptor


def replaced(fields: Any, path: tuple[int, ...], value: Any) -> Any:
    """Return a copy of nested arrays with one item replaced."""
    result = copy.deepcopy(fields)
    inner = result
    for index in path[:-1]:
        inner = inner[index]
    inner[path[-1]] = value
    return result


ADDRESS_MISTAKES = [
    ((0,), "fabric-descriptor", "begin"),
    ((1,), 2, "version"),
    ((1,), True, "version"),
    ((2,), b"i" * 15, "id"),
    ((2,), "i" * 16, "id"),
    ((2,), bytes(16), "id"),
    ((3,), b"label", "label"),
    ((3,), "x" * 64, "label"),
    ((3,), "é" * 32, "label"),
    ((3,), "a\nb", "label"),
    ((3,), "a\0b", "label"),
    ((4,), [], "nics"),
    ((4,), [[1, b"", [0, 0], 1, True]] * 33, "nics"),
    ((4,), 1, "nics"),
    ((4, 1), [1, b"", [0, 0], 1], r"nics\[1\]"),
    ((4, 0, 0), 0, "kind"),
    ((4, 0, 0), 99, "kind"),
    ((4, 0, 0), True, "kind"),
    ((4, 0, 1), b"x" * 129, "blob"),
    ((4, 0, 1), None, "blob"),
    ((4, 0, 2), [1], "doorbell"),
    ((4, 0, 2, 0), -1, "doorbell.addr"),
    ((4, 0, 2, 1), 1.0, "doorbell.rkey"),
    ((4, 0, 3), 0, "max_write"),
    ((4, 0, 4), 1, "ordered"),
]
DESCRIPTOR_MISTAKES = [
    ((0,), "fabric-address", "begin"),
    ((1,), 0, "version"),
    ((2,), b"", "address"),
    ((3,), -1, "region"),
    ((3,), "1", "region"),
    ((4,), 1 << 63 | 1, "offset"),
    ((5,), (1 << 63) - 99, "length"),
    ((5,), False, "length"),
    ((6,), 2, "kind"),
    ((7,), 1, "device"),
    ((7,), -1, "device"),
    ((8,), [[12, 13]], "keys"),
    ((8, 1), [14], r"keys\[1\]"),
    ((8, 1, 0), None, "addr"),
    ((8, 1, 1), -1, "rkey"),
    ((9,), None, "secret"),
]


@pytest.mark.parametrize(("path", "value", "field"), ADDRESS_MISTAKES)
def test_the_malformed_field_of_an_address_is_named(
    path: tuple[int, ...], value: Any, field: str
) -> None:
    with pytest.raises(fabric.WireError, match=f"^address.*{field}"):
        fabric.Address.from_bytes(msgpack.packb(replaced(ADDRESS, path, value)))
    inside = replaced(DESCRIPTOR, (2,), replaced(ADDRESS, path, value))
    with pytest.raises(fabric.WireError, match=f"^descriptor.address.*{field}"):
        fabric.Descriptor.from_bytes(msgpack.packb(inside))


@pytest.mark.parametrize(("path", "value", "field"), DESCRIPTOR_MISTAKES)
def test_the_malformed_field_of_a_descriptor_is_named(
    path: tuple[int, ...], value: Any, field: str
) -> None:
    with pytest.raises(fabric.WireError, match=f"^descriptor.*{field}"):
        fabric.Descriptor.from_bytes(msgpack.packb(replaced(DESCRIPTOR, path, value)))


@pytest.mark.parametrize("fields", [ADDRESS, DESCRIPTOR])
@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data[:-1]])
def test_too_many_bytes_and_too_few(fields: list[Any], change: Any) -> None:
    decode: Any = fabric.Address if fields is ADDRESS else fabric.Descriptor
    with pytest.raises(fabric.WireError, match="not one msgpack value"):
        decode.from_bytes(change(msgpack.packb(fields)))


def test_the_limits_of_length() -> None:
    for decode, limit in (
        (fabric.Address.from_bytes, _peer.MAX_ADDRESS_BYTES),
        (fabric.Descriptor.from_bytes, _descriptor.MAX_DESCRIPTOR_BYTES),
    ):
        with pytest.raises(fabric.WireError, match=str(limit)):
            decode(bytes(limit + 1))
    largest = replaced(ADDRESS, (4,), [[6, bytes(128), [2**64 - 1] * 2, 2**64 - 1, True]] * 32)
    largest[3] = "x" * 63
    fabric.Address.from_bytes(msgpack.packb(largest))
    whole = replaced(DESCRIPTOR, (2,), largest)
    fabric.Descriptor.from_bytes(msgpack.packb(replaced(whole, (8,), [[2**64 - 1] * 2] * 32)))


@pytest.mark.parametrize(
    "text", ["", "fab1.", "fab2.AAAA", "fab1.AA=A", "fab1.A A", "fab1.é", None]
)
def test_texts_that_are_no_address(text: Any) -> None:
    with pytest.raises(fabric.WireError, match="address"):
        fabric.Address.parse(text)


def test_equality_is_by_engine() -> None:
    address = fabric.Address.from_bytes(msgpack.packb(ADDRESS))
    moved = fabric.Address.from_bytes(msgpack.packb(replaced(ADDRESS, (3,), "other")))
    restarted = fabric.Address.from_bytes(msgpack.packb(replaced(ADDRESS, (2,), b"j" * 16)))
    assert address == moved
    assert hash(address) == hash(moved)
    assert address != restarted
    assert address == fabric.Peer(b"i" * 16, "")
    assert address != "host:1"


def test_a_copy_is_the_same() -> None:
    for thing in (
        fabric.Address.from_bytes(msgpack.packb(ADDRESS)),
        fabric.Descriptor.from_bytes(msgpack.packb(DESCRIPTOR)),
    ):
        assert bytes(copy.deepcopy(thing)) == bytes(thing)


@pytest.mark.parametrize("part", [3, slice(None, None, 2), slice(0, 1001), slice(5, 4), slice("a")])
def test_parts_that_a_descriptor_does_not_have(part: Any) -> None:
    descriptor = fabric.Descriptor.from_bytes(msgpack.packb(DESCRIPTOR))
    with pytest.raises(fabric.InvalidArgument, match="d"):
        descriptor[part]


def test_reprs_say_what_it_is() -> None:
    descriptor = fabric.Descriptor.from_bytes(msgpack.packb(DESCRIPTOR))
    assert repr(descriptor.address) == "<Address host:1 69696969 local,tcp>"
    assert repr(descriptor) == (
        "<Descriptor 1000 bytes at 100 of region 0xb [host] of host:1 69696969>"
    )
    assert len(descriptor) == 1000
    assert descriptor.kind == "host"
