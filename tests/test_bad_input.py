"""A table of mistakes: each raises at once, names what is wrong, and breaks nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np
import pytest

import fabric
from tests import commands
from tests.harness import Farm, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.node import State

SIZE = 65536
PAGE = 4096
OLD, NEW = 41, 42
USER_ID_MAX = 134_217_727
Trio = tuple[Node, Node, Node]

Invalid = fabric.InvalidArgument
Mistyped = (TypeError, fabric.InvalidArgument)


@dataclass
class Case:
    """What a mistake is made with: a good region, a good descriptor, a good address."""

    engine: Any
    region: Any
    remote: Any
    address: Any
    own: Any  # descriptor of the engine's own region
    block: Any
    counter: Any

    def write(self, **options: Any) -> Any:
        """Write with one thing wrong."""
        return self.engine.write(self.region, self.remote, imm=5, **options)

    def pages(self, src: Any, dst: Any, **options: Any) -> Any:
        """Write pages with one thing wrong."""
        options = {"page_bytes": PAGE, "imm": 5, **options}
        return self.engine.write_pages(self.region, self.remote, src, dst, **options)

    def scatter(self, *rows: Any) -> Any:
        """Scatter with one row wrong, behind a good one."""
        return self.engine.scatter(self.region, [(self.remote, 0, 0, 10), *rows], imm=5)


class Row(NamedTuple):
    """One mistake: how it is made, what it raises, and what the message must name."""

    make: Callable[[Case], Any]
    raises: type[BaseException] | tuple[type[BaseException], ...]
    names: tuple[str, ...] = ()


def int32(*values: int) -> Any:
    """Return page indices."""
    return np.array(values, np.int32)


WRITES = {
    "source offset beyond the end": Row(
        lambda c: c.write(src_offset=SIZE + 1, length=0), Invalid, ("65537", "65536")
    ),
    "source range beyond the end": Row(
        lambda c: c.write(src_offset=1, length=SIZE), Invalid, ("65536",)
    ),
    "destination range beyond the end": Row(
        lambda c: c.write(dst_offset=100, length=SIZE - 99), Invalid, ("65437", "65536")
    ),
    "destination offset beyond the end": Row(
        lambda c: c.write(dst_offset=SIZE + 7, length=0), Invalid, ("65543", "65536")
    ),
    "sub-range of a descriptor": Row(
        lambda c: c.engine.write(c.region, c.remote[10:110], length=101), Invalid, ("101", "100")
    ),
    "offset in a sub-range": Row(
        lambda c: c.engine.write(c.region, c.remote[10:110], dst_offset=99, length=2),
        Invalid,
        ("100",),
    ),
    "negative source offset": Row(lambda c: c.write(src_offset=-1), Invalid, ("-1",)),
    "negative destination offset": Row(lambda c: c.write(dst_offset=-9), Invalid, ("-9",)),
    "negative length": Row(lambda c: c.write(length=-4), Invalid, ("-4",)),
    "offset that wraps around": Row(
        lambda c: c.write(src_offset=2**64 - 1, length=2), Invalid, ("18446744073709551615",)
    ),
    "length that wraps around": Row(
        lambda c: c.write(dst_offset=2**63, length=2**63), Invalid, ("9223372036854775808",)
    ),
    "offset over 64 bits": Row(lambda c: c.write(src_offset=2**64), Invalid, (str(2**64),)),
    "length over 64 bits": Row(lambda c: c.write(length=2**70), Invalid, (str(2**70),)),
    "offset that is a text": Row(lambda c: c.write(src_offset="1"), Mistyped, ("src_offset",)),
    "length that is a float": Row(lambda c: c.write(length=1.5), Mistyped, ("length",)),
    "deadline that is a text": Row(lambda c: c.write(deadline="soon"), Mistyped, ("deadline",)),
    "deadline that is no number": Row(
        lambda c: c.write(deadline=float("nan")), Invalid, ("deadline", "nan")
    ),
    "negative deadline": Row(lambda c: c.write(deadline=-1.0), Invalid, ("deadline", "-1")),
    "after that is no event": Row(lambda c: c.write(after=3), Mistyped, ("after",)),
    "source that is no region": Row(
        lambda c: c.engine.write(b"bytes", c.remote), Mistyped, ("MemoryRegion", "bytes")
    ),
    "source that is a descriptor": Row(
        lambda c: c.engine.write(c.remote, c.remote), Mistyped, ("MemoryRegion", "Descriptor")
    ),
    "descriptor that is bytes": Row(
        lambda c: c.engine.write(c.region, bytes(c.remote)), Mistyped, ("Descriptor", "bytes")
    ),
    "descriptor that is None": Row(
        lambda c: c.engine.write(c.region, None), Mistyped, ("Descriptor", "None")
    ),
    "own descriptor": Row(lambda c: c.engine.write(c.region, c.own), Invalid, ("own",)),
    "imm over 28 bits": Row(
        lambda c: c.engine.write(c.region, c.remote, imm=2**28), Invalid, ("268435456",)
    ),
    "negative imm": Row(lambda c: c.engine.write(c.region, c.remote, imm=-2), Invalid, ("-2",)),
    "imm of minus one": Row(lambda c: c.engine.write(c.region, c.remote, imm=-1), Invalid, ("-1",)),
    "imm that is a text": Row(
        lambda c: c.engine.write(c.region, c.remote, imm="5"), Mistyped, ("imm",)
    ),
}

PAGES = {
    "more source pages": Row(lambda c: c.pages(int32(0, 1, 2), int32(0, 1)), Invalid, ("3", "2")),
    "more destination pages": Row(lambda c: c.pages(int32(), int32(0)), Invalid, ("0", "1")),
    "source page beyond the end": Row(
        lambda c: c.pages(int32(0, 16), int32(0, 1)), Invalid, ("16",)
    ),
    "destination page beyond the end": Row(
        lambda c: c.pages(int32(0, 1), int32(0, 17)), Invalid, ("17",)
    ),
    "last page sticks out": Row(
        lambda c: c.pages(int32(0), int32(15), dst_offset=1), Invalid, ("15",)
    ),
    "negative source page": Row(lambda c: c.pages(int32(0, -3), int32(0, 1)), Invalid, ("-3",)),
    "negative destination page": Row(
        lambda c: c.pages(int32(0, 1), int32(-7, 1)), Invalid, ("-7",)
    ),
    "index over 32 bits": Row(lambda c: c.pages([2**31], [0]), (*Mistyped, OverflowError)),
    "indices that are floats": Row(
        lambda c: c.pages(np.array([0.5]), int32(0)), Mistyped, ("float64",)
    ),
    "indices of 64 bits out of range": Row(
        lambda c: c.pages(np.array([1 << 40]), int32(0)), Mistyped
    ),
    "indices in two dimensions": Row(
        lambda c: c.pages(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.int32)), Mistyped
    ),
    "indices that are a text": Row(lambda c: c.pages("ab", int32(0, 1)), Mistyped),
    "negative page size": Row(
        lambda c: c.pages(int32(0), int32(0), page_bytes=-1), Invalid, ("page_bytes", "-1")
    ),
    "page size over 64 bits": Row(
        lambda c: c.pages(int32(0), int32(0), page_bytes=2**64), Invalid, ("page_bytes",)
    ),
    "page larger than the region": Row(
        lambda c: c.pages(int32(0), int32(0), page_bytes=SIZE + 1), Invalid, ("65537",)
    ),
    "negative stride": Row(
        lambda c: c.pages(int32(1), int32(1), src_stride=-PAGE), Invalid, ("src_stride", "-4096")
    ),
    "stride that wraps around": Row(
        lambda c: c.pages(int32(4), int32(4), dst_stride=2**62), Invalid, (str(2**62),)
    ),
    "too many pages": Row(
        lambda c: c.pages(np.zeros(1048577, np.int32), np.zeros(1048577, np.int32)),
        Invalid,
        ("1048577", "1048576"),
    ),
}

SCATTERS = {
    "row beyond the end": Row(lambda c: c.scatter((c.remote, 0, SIZE, 1)), Invalid, ("65536",)),
    "row beyond the source": Row(lambda c: c.scatter((c.remote, SIZE, 0, 1)), Invalid, ("65536",)),
    "row with a negative length": Row(lambda c: c.scatter((c.remote, 0, 0, -1)), Invalid, ("-1",)),
    "row that is too short": Row(lambda c: c.scatter((c.remote, 0, 0)), Mistyped),
    "row that is too long": Row(lambda c: c.scatter((c.remote, 0, 0, 1, 1)), Mistyped),
    "row of wrong types": Row(lambda c: c.scatter(("descriptor", 0, 0, 1)), Mistyped),
    "row to this engine itself": Row(lambda c: c.scatter((c.own, 0, 0, 1)), Invalid, ("own",)),
    "too many rows": Row(
        lambda c: c.scatter(*[(c.remote, 0, 0, 1)] * 4096), Invalid, ("4097", "4096")
    ),
    "rows that are no rows": Row(lambda c: c.engine.scatter(c.region, 5, imm=5), Mistyped),
    "imm of own address": Row(lambda c: c.engine.write_imm(c.engine.address, 5), Invalid, ("own",)),
    "imm to no address": Row(lambda c: c.engine.write_imm("here", 5), Mistyped, ("address",)),
    "imm that is missing": Row(lambda c: c.engine.write_imm(c.address, None), Mistyped, ("imm",)),
    "barrier that includes this engine": Row(
        lambda c: c.engine.barrier([c.address, c.engine.address], 5), Invalid, ("own",)
    ),
    "barrier of wrong types": Row(lambda c: c.engine.barrier([c.address, 5], 5), Mistyped),
    "barrier of too many": Row(
        lambda c: c.engine.barrier([c.address] * 4097, 5), Invalid, ("4097", "4096")
    ),
    "barrier with an imm out of range": Row(
        lambda c: c.engine.barrier([c.address], 1 << 28), Invalid, ("268435456",)
    ),
}

COUNTERS = {
    "negative id": Row(lambda c: c.engine.counter(-1), Invalid, ("-1",)),
    "id over the users' range": Row(
        lambda c: c.engine.counter(USER_ID_MAX + 1), Invalid, ("134217728", "134217727")
    ),
    "id over 64 bits": Row(lambda c: c.engine.counter(2**64), Invalid, (str(2**64),)),
    "id that is a text": Row(lambda c: c.engine.counter("x"), Mistyped),
    "block of none": Row(lambda c: c.engine.counter_block(0), Invalid, ("0",)),
    "block of a negative number": Row(lambda c: c.engine.counter_block(-2), Invalid, ("-2",)),
    "block that is too large": Row(
        lambda c: c.engine.counter_block(65537), Invalid, ("65537", "65536")
    ),
    "negative target": Row(lambda c: c.counter.wait(-1, timeout=0), Invalid, ("-1",)),
    "target that is too large": Row(lambda c: c.counter.wait(2**64, timeout=0), Invalid),
    "target that is a text": Row(lambda c: c.counter.wait("1", timeout=0), Mistyped),
    "timeout that is a text": Row(lambda c: c.counter.wait(1, timeout="1"), Mistyped, ("timeout",)),
    "timeout that is no number": Row(
        lambda c: c.counter.wait(1, timeout=float("nan")), Invalid, ("timeout", "nan")
    ),
    "peers that are no addresses": Row(
        lambda c: c.counter.wait(1, timeout=0, peers=["a"]), Mistyped, ("address",)
    ),
    "too few targets of a block": Row(lambda c: c.block.wait([1, 1], 0), Invalid, ("2", "3")),
    "too many targets of a block": Row(lambda c: c.block.wait([0] * 4, 0), Invalid, ("4", "3")),
    "negative target of a block": Row(lambda c: c.block.wait([0, -5, 0], 0), Invalid, ("-5",)),
}

MEMORY = {
    "alloc of nothing": Row(lambda c: c.engine.alloc(0), Invalid, ("0",)),
    "alloc of a negative size": Row(lambda c: c.engine.alloc(-1), Invalid, ("-1",)),
    "alloc of more than there is": Row(
        lambda c: c.engine.alloc(1 << 60), (MemoryError, fabric.FabricError), (str(1 << 60),)
    ),
    "alloc of a text": Row(lambda c: c.engine.alloc("1"), Mistyped),
    "register a number": Row(lambda c: c.engine.register(5), Mistyped, ("int",)),
    "register a text": Row(lambda c: c.engine.register("text"), Mistyped, ("str",)),
    "register strides": Row(
        lambda c: c.engine.register(np.zeros((8, 8), np.uint8)[:, ::2]), Invalid, ("contiguous",)
    ),
    "register objects": Row(lambda c: c.engine.register(np.array([c], object)), Mistyped),
    "register nothing": Row(lambda c: c.engine.register(bytearray()), Invalid, ("empty",)),
    "register what cannot be written": Row(
        lambda c: c.engine.register(b"bytes"), Invalid, ("read-only",)
    ),
    "register a negative length": Row(lambda c: c.engine.register((4096, -1)), Invalid, ("-1",)),
    "register an address over 64 bits": Row(lambda c: c.engine.register((2**64, 8)), Invalid),
    "register a range that wraps around": Row(
        lambda c: c.engine.register((2**64 - 4096, 8192)), Invalid
    ),
    "register a null pointer": Row(lambda c: c.engine.register((0, 4096)), Invalid, ("0",)),
    "register a triple": Row(lambda c: c.engine.register((1, 2, 3)), Mistyped),
    "deregister what is none": Row(
        lambda c: c.engine.deregister("region"), Mistyped, ("MemoryRegion",)
    ),
    "descriptor for no address": Row(lambda c: c.region.descriptor_for(5), Mistyped, ("address",)),
    "sub-range beyond the end": Row(lambda c: c.remote[0 : SIZE + 1], Invalid, ("65537", "65536")),
    "sub-range backwards": Row(lambda c: c.remote[9:3], Invalid),
    "sub-range in steps": Row(lambda c: c.remote[0:10:2], Invalid, ("2",)),
    "sub-range of texts": Row(lambda c: c.remote["a":"b"], Mistyped),
}

WIRE = {
    "empty descriptor": Row(lambda c: fabric.Descriptor.from_bytes(b""), fabric.WireError),
    "truncated descriptor": Row(
        lambda c: fabric.Descriptor.from_bytes(bytes(c.remote)[:-1]), fabric.WireError
    ),
    "descriptor with a tail": Row(
        lambda c: fabric.Descriptor.from_bytes(bytes(c.remote) + b"\0"), fabric.WireError
    ),
    "descriptor that is noise": Row(
        lambda c: fabric.Descriptor.from_bytes(bytes(range(200))), fabric.WireError
    ),
    "descriptor that is an address": Row(
        lambda c: fabric.Descriptor.from_bytes(bytes(c.address)), fabric.WireError
    ),
    "descriptor from a text": Row(
        lambda c: fabric.Descriptor.from_bytes("text"),  # type: ignore[arg-type]
        (*Mistyped, fabric.WireError),
    ),
    "empty address": Row(lambda c: fabric.Address.from_bytes(b""), fabric.WireError),
    "address that is a descriptor": Row(
        lambda c: fabric.Address.from_bytes(bytes(c.remote)), fabric.WireError
    ),
    "address from a wrong text": Row(
        lambda c: fabric.Address.parse("not an address"), fabric.WireError
    ),
}

MESSAGES = {
    "message that is too long": Row(
        lambda c: c.engine.send(c.address, bytes(65537)), Invalid, ("65537", "65536")
    ),
    "message that is a text": Row(
        lambda c: c.engine.send(c.address, "text"), Mistyped, ("payload",)
    ),
    "message that is a number": Row(
        lambda c: c.engine.send(c.address, 100), Mistyped, ("payload",)
    ),
    "message to no address": Row(lambda c: c.engine.send(b"here", b""), Mistyped, ("address",)),
    "message to this engine": Row(
        lambda c: c.engine.send(c.engine.address, b""), Invalid, ("own",)
    ),
    "disconnect no address": Row(lambda c: c.engine.disconnect(7), Mistyped, ("address",)),
    "disconnect this engine": Row(
        lambda c: c.engine.disconnect(c.engine.address), Invalid, ("own",)
    ),
}


def opened(**options: Any) -> Callable[[Case], Any]:
    """Return a mistake in opening an engine."""
    return lambda case: fabric.TransferEngine(**{"provider": "local", **options})


ENGINES = {
    "unknown provider": Row(
        opened(provider="carrier pigeon"),
        (fabric.InvalidArgument, fabric.ProviderUnavailable),
        ("carrier pigeon", "local"),
    ),
    "empty provider": Row(opened(provider=""), (Invalid, fabric.ProviderUnavailable)),
    "provider that is a number": Row(opened(provider=1), Mistyped, ("provider",)),
    "unknown NIC": Row(
        opened(provider="tcp", nics=["no-such-nic"]), fabric.ProviderUnavailable, ("no-such-nic",)
    ),
    "no NIC at all": Row(opened(nics=[]), Invalid, ("nics",)),
    "NICs as one text": Row(opened(provider="tcp", nics="lo"), Mistyped, ("nics",)),
    "too many NICs": Row(opened(provider="tcp", nics=["lo"] * 33), Invalid, ("33", "32")),
    "negative spin": Row(opened(spin_us=-1), Invalid, ("spin_us", "-1")),
    "spin over 32 bits": Row(opened(spin_us=2**32), Invalid, ("spin_us", str(2**32))),
    "peer timeout of zero": Row(opened(peer_timeout=0), Invalid, ("peer_timeout", "0")),
    "negative peer timeout": Row(opened(peer_timeout=-1.0), Invalid, ("peer_timeout", "-1")),
    "peer timeout that is no number": Row(
        opened(peer_timeout=float("nan")), Invalid, ("peer_timeout", "nan")
    ),
    "CPU that is not there": Row(opened(cpu=100_000), (Invalid, fabric.FabricError), ("100000",)),
    "secret that is too long": Row(opened(secret=b"x" * 65), Invalid, ("65", "64")),
    "secret that is a text": Row(opened(secret="x"), Mistyped, ("secret",)),
    "empty secret": Row(opened(secret=b""), Invalid, ("secret",)),
    "accept that is no function": Row(opened(accept=1), Mistyped, ("accept",)),
}

TABLE: dict[str, Row] = {
    **WRITES,
    **PAGES,
    **SCATTERS,
    **COUNTERS,
    **MEMORY,
    **WIRE,
    **MESSAGES,
    **ENGINES,
}


# ---- in the nodes ----


def case_of(node: State, descriptor: bytes, address: bytes) -> Case:
    """Return the good things that mistakes are made with."""
    things = node.things
    region = things["src"]
    return Case(
        node.engine,
        region,
        fabric.Descriptor.from_bytes(descriptor),
        commands.peer(address),
        region.descriptor,
        things.setdefault("block", node.engine.counter_block(3)),
        things.setdefault("counter", node.engine.counter()),
    )


def attempt(node: State, name: str, descriptor: bytes, address: bytes) -> None:
    """Make one mistake."""
    result = TABLE[name].make(case_of(node, descriptor, address))
    if isinstance(result, fabric.TransferEngine):
        result.close()


class Stage(NamedTuple):
    """Two nodes that wrote to each other, and what the mistakes aim at."""

    a: Node
    b: Node
    descriptor: bytes


@pytest.fixture
def stage(pair: tuple[Node, Node]) -> Iterator[Stage]:
    """A connected pair; afterwards nothing has changed, and a good write still works."""
    a, b = pair
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    b.counter("five", 5)
    a.write("src", descriptor, length=0)
    before = a.stats()
    yield Stage(a, b, descriptor)
    after = a.stats()
    for key in ("tx_ranges", "tx_bytes", "transfers_live", "transfers_failed", "peers_lost"):
        assert after[key] == before[key], key
    assert b.value("five") == 0
    assert b.differs("dst", OLD) == ""
    assert a.call(no_message, b.address) is None
    a.write("src", descriptor, imm=5)
    assert b.settled("five", 1) == 1
    assert b.differs("dst", NEW) == ""


def no_message(node: State, address: bytes) -> None:
    """Check that nothing is waiting to be received."""
    with pytest.raises(fabric.WaitTimeout):
        node.engine.recv(timeout=0)


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_raises(stage: Stage, name: str) -> None:
    row = TABLE[name]
    with pytest.raises(row.raises) as caught:
        stage.a.call(attempt, name, stage.descriptor, stage.b.address)
    for word in row.names:
        assert word in str(caught.value), f"the message does not name {word!r}: {caught.value}"


def write_from_two_engines(node: State, descriptor: bytes) -> None:
    """Write from a region that belongs to another engine of the same process."""
    with fabric.TransferEngine(provider=node.provider, nics=node.nics) as other:
        region = other.alloc(100)
        node.engine.write(region, fabric.Descriptor.from_bytes(descriptor), length=1, imm=5)


def write_deregistered(node: State, descriptor: bytes) -> None:
    """Write from a region that was deregistered."""
    region = node.engine.alloc(100)
    node.engine.deregister(region)
    node.engine.write(region, fabric.Descriptor.from_bytes(descriptor), length=1, imm=5)


def deregister_twice(node: State, descriptor: bytes) -> None:
    """Deregister a region twice."""
    region = node.engine.alloc(100)
    node.engine.deregister(region)
    node.engine.deregister(region)


def use_closed_counter(node: State, descriptor: bytes) -> None:
    """Wait on a counter that was closed."""
    counter = node.engine.counter()
    counter.close()
    counter.wait(0, timeout=0)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (write_from_two_engines, "engine"),
        (write_deregistered, "deregistered"),
        (deregister_twice, "deregistered"),
        (use_closed_counter, "closed"),
    ],
)
def test_things_that_are_over(
    stage: Stage, mistake: Callable[[State, bytes], None], words: str
) -> None:
    with pytest.raises(fabric.FabricError, match=words):
        stage.a.call(mistake, stage.descriptor)


# ---- descriptors from elsewhere ----


def truncations(node: State, descriptor: bytes) -> list[int]:
    """Return the lengths at which a truncated descriptor is accepted."""
    accepted = []
    for length in range(len(descriptor)):
        try:
            fabric.Descriptor.from_bytes(descriptor[:length])
        except fabric.WireError:
            continue
        accepted.append(length)
    return accepted


def garbled(node: State, descriptor: bytes, seed: int) -> list[str]:
    """Write with descriptors of which one bit is wrong; returns the surprises.

    Most are refused as malformed, or by the owner, who knows no such region or secret. The part
    that is the owner's address is left alone: another one is another machine's.
    """
    rng = random.Random(seed)
    remote = fabric.Descriptor.from_bytes(descriptor)
    begin = descriptor.index(bytes(remote.address))
    end = begin + len(bytes(remote.address))
    places = [at for at in range(len(descriptor)) if not begin <= at < end]
    outcomes = [
        flip_a_bit(node, descriptor, rng.choice(places), rng.randrange(8)) for _ in range(200)
    ]
    return [text for text in outcomes if text]


def flip_a_bit(node: State, descriptor: bytes, at: int, bit: int) -> str:
    """Write one byte with a descriptor that has a wrong bit; says what it did but refuse."""
    forged = bytearray(descriptor)
    forged[at] ^= 1 << bit
    try:
        remote = fabric.Descriptor.from_bytes(bytes(forged))
        node.engine.write(node.things["src"], remote, length=1).wait(timeout=20.0)
    except fabric.FabricError:
        return ""
    except Exception as error:
        return f"byte {at}, bit {bit}: {error!r}"
    return ""


def test_truncated_descriptors(stage: Stage) -> None:
    assert stage.a.call(truncations, stage.descriptor) == []


def test_garbled_descriptors(farm: Farm, seed: int) -> None:
    """Nobody crashes, and no other region changes."""
    a, b, c = (farm(name) for name in "abc")
    for node in (a, c):
        node.region("src", SIZE, NEW)
    before = b.region("before", SIZE, OLD)
    descriptor = b.region("dst", SIZE, OLD)
    b.region("after", SIZE, OLD)
    assert a.call(garbled, descriptor, seed, within=120.0) == []
    assert b.differs("before", OLD) == b.differs("after", OLD) == ""
    for node in (a, c):
        b.refill("dst", OLD)
        node.write("src", descriptor)
        assert b.differs("dst", NEW) == ""
        node.write("src", before)
        assert b.differs("before", NEW) == ""


def stretch(descriptor: bytes, offset: int, length: int) -> bytes:
    """Return a descriptor that claims another part of its region than there is."""
    fields = msgpack.unpackb(descriptor)
    fields[4:6] = [offset, length]
    forged: bytes = msgpack.packb(fields)
    return forged


@pytest.mark.parametrize("kind", ["alloc", "numpy"])
@pytest.mark.parametrize(
    ("offset", "length", "at"),
    [(0, 1 << 40, SIZE), (SIZE - 1, 2, 1), (SIZE, 100, 0), (1 << 50, 1 << 20, 0)],
)
def test_a_descriptor_of_more_than_the_region(
    farm: Farm, kind: str, offset: int, length: int, at: int
) -> None:
    """The owner knows how long its region is, whatever a descriptor says."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD, kind)
    imm = b.counter("count")
    with pytest.raises(fabric.FabricError, match="region"):
        a.write("src", stretch(descriptor, offset, length), dst_offset=at, length=1, imm=imm)
    assert b.differs("dst", OLD) == ""
    assert b.value("count") == 0
    a.write("src", descriptor)
    assert b.differs("dst", NEW) == ""


@pytest.mark.parametrize("kind", ["alloc", "numpy"])
@pytest.mark.parametrize("connected", [True, False])
def test_a_region_that_its_owner_deregistered(farm: Farm, kind: str, connected: bool) -> None:
    """Refused in words, also for one that never connected before; on tcp no key could tell."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    gone = b.region("gone", SIZE, OLD, kind)
    imm = b.counter("count")
    if connected:
        a.write("src", gone)
    b.call(commands.deregister, "gone")
    fresh = b.region("fresh", SIZE, OLD, kind)
    for _ in range(2):
        with pytest.raises(fabric.TransferFailed, match="region") as caught:
            a.write("src", gone, imm=imm)
        assert not isinstance(caught.value, fabric.PeerUnreachable)
    assert b.differs("fresh", OLD) == ""
    assert b.value("count") == 0
    b.call(commands.release, "count")
    imm = b.counter("count")
    a.write("src", fresh, imm=imm)
    assert b.settled("count", 1) == 1
    assert b.differs("fresh", NEW) == ""


def test_a_forged_secret(farm: Farm) -> None:
    """Somebody who guesses at the region of another gets nothing."""
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    first, second = b.region("one", SIZE, OLD), b.region("two", SIZE, OLD)
    forged = splice(first, second)
    with pytest.raises(fabric.FabricError):
        a.write("src", forged)
    assert b.differs("one", OLD) == ""
    assert b.differs("two", OLD) == ""


def splice(first: bytes, second: bytes) -> bytes:
    """Return the first descriptor with the last byte in which the two differ from the second."""
    at = max(i for i in range(min(len(first), len(second))) if first[i] != second[i])
    return first[:at] + second[at : at + 1] + first[at + 1 :]


# ---- engines that are closed, or belong to a parent process ----


def uses(node: State, descriptor: bytes, address: bytes) -> dict[str, Callable[[], Any]]:
    """Return one call of everything that needs an engine."""
    c = case_of(node, descriptor, address)
    counter, block = c.counter, c.block
    c.engine.write_imm(c.address, 998).wait(timeout=10.0)
    running = c.engine.write_imm(c.address, 999)
    return {
        "register": lambda: c.engine.register(bytearray(10)),
        "alloc": lambda: c.engine.alloc(10),
        "deregister": lambda: c.engine.deregister(c.region),
        "descriptor_for": lambda: c.region.descriptor_for(c.address),
        "counter": lambda: c.engine.counter(),
        "counter with an id": lambda: c.engine.counter(6),
        "counter_block": lambda: c.engine.counter_block(2),
        "wait for a counter": lambda: counter.wait(1, timeout=1.0),
        "wait for a block": lambda: block.wait([1, 1, 1], 1.0),
        "write": lambda: c.engine.write(c.region, c.remote, length=1, imm=5),
        "write_pages": lambda: c.pages(int32(0), int32(0)),
        "write_pages of none": lambda: c.pages(int32(), int32()),
        "scatter": lambda: c.scatter(),
        "write_imm": lambda: c.engine.write_imm(c.address, 5),
        "barrier": lambda: c.engine.barrier([c.address], 5),
        "barrier of none": lambda: c.engine.barrier([], 5),
        "send": lambda: c.engine.send(c.address, b"text"),
        "recv": lambda: c.engine.recv(timeout=1.0),
        "disconnect": lambda: c.engine.disconnect(c.address),
        "stats": lambda: c.engine.stats(),
        "wait for a transfer": lambda: running.wait(timeout=1.0),
    }


def refusals(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Make every call; returns the ones that do not raise EngineClosed, and what they did."""
    outcomes = {name: outcome(call) for name, call in calls.items()}
    return {name: text for name, text in outcomes.items() if text}


def outcome(call: Callable[[], Any]) -> str:
    """Make a call that must raise EngineClosed; returns what it did instead."""
    try:
        return f"returned {call()!r}"
    except fabric.EngineClosed as error:
        return "" if str(error) else "said nothing"
    except BaseException as error:
        return repr(error)


def use_after_close(node: State, descriptor: bytes, address: bytes) -> dict[str, str]:
    """Use everything of a closed engine."""
    calls = uses(node, descriptor, address)
    del calls["wait for a transfer"], calls["stats"]  # a closed engine still tells these
    node.engine.close()
    return refusals(calls)


def test_a_closed_engine(farm: Farm) -> None:
    a, b = farm("a"), farm("b")
    a.region("src", SIZE, NEW)
    descriptor = b.region("dst", SIZE, OLD)
    b.counter("five", 5)
    assert a.call(use_after_close, descriptor, b.address) == {}
    assert b.value("five") == 0
    assert b.differs("dst", OLD) == ""
