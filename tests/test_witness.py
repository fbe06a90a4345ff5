"""Engines against a peer that was written from the documents alone, with pyverbs.

The witness (tests/softroce/witness.py) shares no code with the engine: what both agree on is what
ARCHITECTURE.md says. As a hostile peer it sends what no engine would. Engine `e`, on the first NIC,
is what is tested; `c` is its other peer, an engine that must never notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fabric
from tests import commands
from tests.conftest import borrow, settle
from tests.harness import Node, wait_until
from tests.patterns import image, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Farm
    from tests.node import State

pytestmark = [
    pytest.mark.skipif(
        "SOFTROCE" not in os.environ, reason="needs the SoftRoCE guest: tests/softroce/run"
    ),
    pytest.mark.only("verbs"),
]

PROGRAM = Path(__file__).resolve().parent / "softroce" / "witness.py"
PYTHON = "/usr/bin/python3"  # Debian's, which has python3-pyverbs
SIZE = 100_000
SECRET = b"a secret of both"
IMM = 28  # an immediate is (pieces - 1) << 28 | id
FIRST, LAST = "00" * 15 + "01", "ff" * 16  # ids that are smaller and greater than any other


class Witness:
    """The process of the witness: one command at a time, with a result or an error."""

    def __init__(self, seed: int) -> None:
        self.process = subprocess.Popen(
            [PYTHON, str(PROGRAM), "--device=rxe1", f"--seed={seed}", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        values = {k: v.hex() if isinstance(v, bytes) else v for k, v in arguments.items()}
        self.process.stdin.write(json.dumps({"do": name, **values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the witness ended with {self.process.wait(10.0)} (python3-pyverbs?)"
        result = json.loads(line)
        assert "error" not in result, f"witness, {name}: {result['error']}\n{result['trace']}"
        return result["ok"]

    def close(self) -> int:
        """End the process; returns its exit status."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        try:
            return self.process.wait(20.0)
        finally:
            self.process.kill()
            self.process.stdout.close()


@dataclass
class Peer:
    """One peer that the witness plays."""

    witness: Witness
    number: int
    id: str
    address: bytes

    def __call__(self, name: str, **arguments: Any) -> Any:
        return self.witness(name, peer=self.number, **arguments)

    def connect(self, node: Node, **how: Any) -> dict[str, Any]:
        """Open a session, which must come up."""
        state: dict[str, Any] = self("connect", address=node.address, **how)
        assert state["state"] == "up", state
        return state

    def region(self, length: int, fill: int = 0) -> tuple[int, bytes]:
        """Make a region; returns its number and descriptor."""
        made = self("region", length=length, fill=fill)
        return made["region"], bytes.fromhex(made["descriptor"])


@dataclass
class Scene:
    """The engine, its other peer, and the witness."""

    witness: Witness
    e: Node
    c: Node

    def peer(self, **options: Any) -> Peer:
        """Make a peer of the witness."""
        made = self.witness("peer", **options)
        return Peer(self.witness, made["peer"], made["id"], bytes.fromhex(made["address"]))

    def serves(self) -> None:
        """Check that the engine serves its other peer, to the byte and to the count."""
        imm = self.e.counter("served")
        descriptor = self.e.region("for c", 1000, 1)
        self.c.region("c source", 1000, 2)
        self.c.write("c source", descriptor, imm=imm)
        assert self.e.settled("served", 1) == 1
        assert self.e.differs("for c", 2) == ""
        self.e.call(commands.release, "served")
        self.e.call(commands.deregister, "for c")
        self.c.call(commands.deregister, "c source")


@pytest.fixture(scope="module")
def witness(request: pytest.FixtureRequest) -> Iterator[Witness]:
    program = Witness(request.config.option.seed)
    yield program
    assert program.close() == 0


@pytest.fixture
def scene(shared_farm: Farm, witness: Witness, seed: int) -> Iterator[Scene]:
    nodes = borrow(shared_farm, "ec")
    yield Scene(witness, *nodes)
    settle(nodes)


@pytest.fixture(scope="module")
def strict_node(shared_farm: Farm) -> Node:
    """An engine with a secret that soon loses patience."""
    return shared_farm("strict", nics=["rxe0"], secret=SECRET, peer_timeout=2.0)


@pytest.fixture
def strict(strict_node: Node, witness: Witness, scene: Scene) -> Iterator[Scene]:
    yield Scene(witness, strict_node, scene.c)
    settle([strict_node])


def bytes_of(fill: int, length: int, offset: int = 0) -> bytes:
    """Return a part of a pattern."""
    return pattern(fill, offset + length)[offset:].tobytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- both read the same ----


def test_address_and_descriptor_say_the_same_to_both(scene: Scene) -> None:
    descriptor = scene.e.region("dst", SIZE, 1)
    read = scene.witness("decode", descriptor=descriptor)
    ours = fabric.Address.from_bytes(scene.e.address)
    assert read["address"]["id"] == ours.id.hex()
    assert read["address"]["label"] == ours.label
    (nic,) = read["address"]["nics"]
    assert nic["kind"] == 2
    assert nic["ordered"]
    assert nic["blob"]["gid"] == "00000000000000000000ffff0a090001"
    assert nic["blob"]["token"] == nic["blob"]["write_qpn"] == 0
    assert (read["offset"], read["length"], read["memory"]) == (0, SIZE, 0)
    assert len(read["keys"]) == 1


# ---- the witness writes ----


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_the_witness_writes_and_is_counted(scene: Scene, lanes: int) -> None:
    e, peer = scene.e, scene.peer()
    descriptor, imm = e.region("dst", SIZE, 1), e.counter("count")
    state = peer.connect(e, lanes=lanes)
    assert (state["hello"]["lanes"], state["different"], state["hello"]["kind"]) == (lanes, 1, 2)
    grant = peer("grant", descriptor=descriptor)
    assert (grant["code"], grant["length"]) == (0, SIZE)
    copies, count = [], 0
    for pieces in (1, 2, 3, 7, 13, 16):
        start, length = count * 5000 + 3, 4000 + pieces
        data = bytes_of(2, length, start)
        ends = peer("write", descriptor=descriptor, data=data, offset=start, imm=imm, pieces=pieces)
        assert ends == ["success"] * pieces
        copies.append((start, 2, start, length))
        count += 1
        assert e.settled("count", count) == count
    assert e.differs("dst", 1, copies) == ""
    # Of no bytes, and of bytes that nobody counts.
    assert peer("write", descriptor=descriptor, imm=imm) == ["success"]
    assert peer("write", descriptor=descriptor, data=b"\x07") == ["success"]
    assert e.settled("count", count + 1) == count + 1
    assert e.differs("dst", 1, [*copies, (0, 2, 0, 0)]).startswith("1 of")
    peer("bye")
    scene.serves()


def test_some_pieces_are_no_range(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    imm = e.counter("count")
    descriptor = e.region("dst", SIZE, 1)
    peer.connect(e)
    raised = e.stats()["rx_imms"]
    for pieces in (16, 11, 5):
        peer("write", descriptor=descriptor, data=bytes(pieces * 10), imm=imm, pieces=pieces)
    assert e.settled("count", 3) == 3
    # The last piece of three is missing: (3 - 1) << 28 | id, twice.
    for _ in range(2):
        peer("write", descriptor=descriptor, data=b"x", imm=imm | 2 << IMM)
    wait_until(lambda: e.stats()["rx_imms"] == raised + 34, 5.0, "immediates are missing")
    assert e.value("count") == 3
    peer("write", descriptor=descriptor, data=b"x", imm=imm | 2 << IMM)
    assert e.settled("count", 4) == 4
    peer("bye")


def test_a_descriptor_that_was_tampered_with_is_not_granted(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    descriptor = e.region("dst", SIZE, 1)
    peer.connect(e)
    assert peer("grant", descriptor=descriptor, secret_plus=1)["code"] < 0
    assert peer("grant", descriptor=descriptor)["code"] == 0
    e.call(commands.deregister, "dst")
    (asked,) = peer("frames", kind="QUIESCE")
    assert asked["region"] == scene.witness("decode", descriptor=descriptor)["region"]
    assert peer("grant", descriptor=descriptor)["code"] < 0
    peer("bye")


# ---- the witness is written to ----


def test_the_witness_is_written_to(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    number, descriptor = peer.region(SIZE, 9)
    e.region("src", SIZE, 3)
    e.write("src", descriptor, length=1, imm=5)
    e.write("src", descriptor, src_offset=10, dst_offset=20_000, length=50_000, imm=77)
    e.write("src", descriptor, src_offset=100, dst_offset=90_000, length=10_000)
    e.call(commands.write_imm, peer.address, 6)
    assert peer("imms", count=3) == [5, 77, 6]
    expected = bytearray(b"\x09" * SIZE)
    for source, target, length in ((0, 0, 1), (10, 20_000, 50_000), (100, 90_000, 10_000)):
        expected[target : target + length] = bytes_of(3, length, source)
    assert peer("digest", region=number) == sha256(bytes(expected))
    assert peer("frames", kind="READY")
    assert {f["region"] for f in peer("frames", kind="GRANT_REQ")} == {number}
    scene.serves()


def test_pages_and_large_writes_to_a_witness_with_two_nics(scene: Scene) -> None:
    e, peer = scene.e, scene.peer(nics=2)
    size, page = 4 << 20, 4096
    number, descriptor = peer.region(size)
    e.region("src", size, 4)
    for _ in range(20):  # the second lane works when a frame came over it
        e.write("src", descriptor, imm=8)
        if (raised := peer("imms", count=2, seconds=0.2)) != [8]:
            break
    assert raised == [1 << IMM | 8] * 2
    assert peer("digest", region=number) == sha256(bytes_of(4, size))
    assert peer("state")["lanes"] == 2
    pages = [5, 900, 17, 1023, 0, 512]
    e.call(
        commands.write_pages,
        "src",
        descriptor,
        (list(range(6)), pages),
        {"page_bytes": page, "imm": 9},
    )
    assert peer("imms", count=6) == [9] * 6
    expected = image(4, size, [(to * page, 4, i * page, page) for i, to in enumerate(pages)])
    assert peer("digest", region=number) == sha256(expected.tobytes())


def test_a_write_that_is_longer_than_a_message_of_the_port(scene: Scene) -> None:
    """It goes in parts, of which the last one alone raises the immediate."""
    e, peer = scene.e, scene.peer()
    (nic,) = scene.witness("decode", address=e.address)["nics"]
    size = nic["max_write"] + 12_345
    number, descriptor = peer.region(size)
    e.region("src", size, 6)
    e.write("src", descriptor, imm=10)
    assert peer("imms", count=1) == [10]
    assert peer("digest", region=number) == sha256(bytes_of(6, size))


def test_the_witness_refuses_a_grant(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    number, descriptor = peer.region(SIZE)
    values = list(descriptor)
    values[-1] ^= 1  # the secret is last
    e.region("src", SIZE, 3)
    with pytest.raises(fabric.TransferFailed, match="refused"):
        e.write("src", bytes(values))
    e.write("src", descriptor, imm=1)
    assert peer("imms", count=1) == [1]
    assert peer("digest", region=number) == sha256(bytes_of(3, SIZE))


# ---- frames ----


def test_ping_messages_and_voids(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    peer.connect(e)
    for stamp in (0, 1, (1 << 64) - 1):
        peer("frame", kind="PING", body={"stamp": stamp})
    answers = peer("frames", kind="PONG", count=1)
    assert answers[-1]["stamp"] in (0, 1, (1 << 64) - 1)
    assert {frame["session"] for frame in answers} == {peer("state")["mine"]}
    for length, order in ((0, [0]), (5, [0]), (9000, [2, 0, 1]), (4096 * 5, [4, 3, 2, 1, 0])):
        data = bytes_of(length, length)
        peer("message", data=data, order=order)
        assert e.call(receive) == (peer.id, data)
    for length in (0, 4096, 10_000):
        e.call(send, peer.address, bytes_of(1, length))
    heard = peer("messages", count=3)
    assert heard == [bytes_of(1, length).hex() for length in (0, 4096, 10_000)]
    counter = e.counter("doomed")
    other = e.counter("other")
    peer.witness("frame", peer=peer.number, kind="VOID", body={"number": 0, "ids": [counter]})
    assert peer("frames", kind="VOIDED")[0]["number"] == 0
    with pytest.raises(fabric.CounterVoid):
        e.wait("doomed", 1)
    e.region("src", SIZE, 1)
    _, descriptor = peer.region(SIZE)
    e.call(commands.write_imm, peer.address, 1)
    peer("answer", off=["GRANT_REQ"])
    e.call(commands.begin_write, "t", "src", descriptor, {"imm": 4242})
    peer("frames", kind="GRANT_REQ")
    assert e.call(cancel, "t") == "TransferCancelled"
    assert peer("frames", kind="VOID")[0]["ids"] == [4242]
    assert peer("imms", count=1) == [1]
    assert e.value("other") == 0
    assert other != counter
    peer("bye")


def cancel(node: State, name: str) -> str:
    """Cancel a transfer and forget it; says how it ended."""
    transfer = node.things.pop(name)
    transfer.cancel()
    return commands.end_of(transfer)


def send(node: State, address: bytes, message: bytes) -> None:
    """Send a message; returns when the peer holds it."""
    node.engine.send(commands.peer(address), message).wait(timeout=20.0)


def receive(node: State) -> tuple[str, bytes]:
    """Receive a message."""
    sender, message = node.engine.recv(timeout=20.0)
    return sender.id.hex(), bytes(message)


def test_a_peer_is_alive_as_long_as_it_answers(strict: Scene) -> None:
    e, peer = strict.e, strict.peer(secret=SECRET)
    e.counter("count", 12)
    peer.connect(e)
    waiting = e.start(commands.counter_wait, "count", 1, 20.0, [peer.address], thread=True)
    stamps = [frame["stamp"] for frame in peer("frames", kind="PING", count=5)]
    assert len(set(stamps)) == len(stamps) >= 5
    assert not waiting.done()
    peer("answer", off=["PING"])
    begin = time.monotonic()
    with pytest.raises(fabric.PeerUnreachable, match="silent"):
        waiting.result()
    assert time.monotonic() - begin < 4.0
    peer("state", until="over", seconds=5.0)
    assert peer("connect", address=e.address)["state"] == "refused"


# ---- handshakes, good ones ----


def test_a_secret_is_asked_for_and_proved_by_both(strict: Scene) -> None:
    e, peer = strict.e, strict.peer(secret=SECRET)
    imm = e.counter("count")
    descriptor = e.region("dst", SIZE, 1)
    peer.connect(e)
    assert len(peer("frames", kind="CHALLENGE")) >= 1
    peer("write", descriptor=descriptor, data=bytes_of(2, SIZE), imm=imm)
    assert e.settled("count", 1) == 1
    assert e.differs("dst", 2) == ""
    peer("bye")
    for wrong in (b"", b"another"):
        before = e.stats()["handshakes_refused"]
        state = strict.peer(secret=wrong)("connect", address=e.address)
        assert state["state"] == "refused"
        assert "secret" in state["why"]
        assert e.stats()["handshakes_refused"] > before


def test_twenty_hellos_at_once_are_one_session(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    before = e.stats()["peers_up"]
    state = peer.connect(e, copies=20)
    peer("state", seconds=0.5, until="never")
    state = peer("state")
    assert state["different"] == 1, "the WELCOMEs differ"
    assert e.stats()["peers_up"] == before + 1
    check_session(e, peer)
    peer("bye")


def check_session(e: Node, peer: Peer) -> None:
    """Check that a session carries writes both ways, and that nothing is counted twice."""
    imm, descriptor = e.counter("checked"), e.region("checked dst", 1000, 1)
    peer("write", descriptor=descriptor, data=bytes_of(2, 1000), imm=imm)
    e.call(commands.write_imm, peer.address, 99)
    assert peer("imms", count=1) == [99]
    assert e.settled("checked", 1) == 1
    assert e.differs("checked dst", 2) == ""
    e.call(commands.release, "checked")
    e.call(commands.deregister, "checked dst")


@pytest.mark.parametrize(
    "how",
    [
        {"chunk": 64, "shuffle": True},
        {"chunk": 100, "shuffle": True, "twice": True},
        {"chunk": 97, "copies": 3, "shuffle": True},
    ],
    ids=str,
)
def test_datagrams_in_any_order(scene: Scene, how: dict[str, Any]) -> None:
    peer = scene.peer()
    peer.connect(scene.e, **how)
    check_session(scene.e, peer)
    peer("bye")


def test_hellos_are_sent_again_and_are_the_same(scene: Scene) -> None:
    """The engine's HELLO is lost, and again; then its answer comes more than once (S4)."""
    e, peer = scene.e, scene.peer()
    peer("answer", off=["HELLO"])
    calling = e.start(commands.write_imm, peer.address, 3)
    wait_until(lambda: peer("hellos")["count"] >= 5, 10.0, "no HELLOs")
    seen = peer("hellos")
    assert seen["different"] == 1
    assert 0.05 < sorted(seen["gaps"])[len(seen["gaps"]) // 2] < 0.5
    peer("answer", on=["HELLO"])
    calling.result()
    peer("welcome", copies=5)
    assert peer("imms", count=1) == [3]
    state = peer("state")
    assert (state["state"], state["active"]) == ("up", False)
    check_session(e, peer)
    assert peer("frames", kind="BYE", seconds=0.0) == []
    assert peer("state")["mine"] == state["mine"]


@pytest.mark.parametrize("number", [FIRST, LAST])
def test_both_connect_at_once(scene: Scene, number: str) -> None:
    """The HELLO of the smaller id wins, and what waits goes over that session (S2)."""
    e, peer = scene.e, scene.peer(engine=number)
    peer("answer", off=["HELLO"])
    before = e.stats()["peers_up"]
    calling = e.start(commands.write_imm, peer.address, 3)
    wait_until(lambda: peer("hellos")["count"] >= 1, 10.0, "no HELLO")
    if number == FIRST:
        peer.connect(e)
        assert peer("state")["active"]
    else:
        assert peer("connect", address=e.address, seconds=1.0)["state"] == "connecting"
        assert peer("state")["welcomes"] == 0
        peer("answer", on=["HELLO"])
    calling.result()
    assert peer("imms", count=1) == [3]
    assert peer("state")["active"] == (number == FIRST)
    check_session(e, peer)
    assert e.stats()["peers_up"] == before + 1
    if number == FIRST:
        peer("bye")


def test_a_new_session_of_the_same_peer(scene: Scene) -> None:
    """A peer that lost its queue pairs begins again: the old session ends, the new one serves."""
    e, peer = scene.e, scene.peer()
    first = peer.connect(e)
    peer("drop")
    second = peer.connect(e)
    assert second["hello"]["session"] != first["hello"]["session"]
    check_session(e, peer)
    peer("bye")


def test_a_late_hello_of_an_earlier_session_changes_nothing(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    peer.connect(e)
    peer("bye")
    peer.connect(e)
    check_session(e, peer)
    peer("replay", address=e.address, number=-1)  # of this session: a copy
    peer("replay", address=e.address, number=-2)  # of the one before
    e.call(commands.totals)
    assert peer("frames", kind="BYE", seconds=0.5) == []
    check_session(e, peer)
    peer("bye")


# ---- handshakes that are refused ----

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "for another engine": ({"fields": {"target": "ab" * 16}}, "another engine listens here"),
    "of another kind": ({"fields": {"kind": 1}}, "malformed"),
    "to a NIC that is not there": ({"lane": {"to_nic": 1}}, "malformed"),
    "lane 3 to a NIC that is not there": ({"lanes": 4, "lane": {"to_nic": 31}}, "malformed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hello_is_refused_in_words(scene: Scene, name: str) -> None:
    e, peer, (how, text) = scene.e, scene.peer(), REFUSED[name]
    before = e.stats()
    (answer,) = peer("hello", address=e.address, seconds=5.0, **how)
    assert answer["kind"] == "REFUSE"
    assert text in answer["text"]
    assert answer["session"] == answer["for"]
    assert answer["refuser"] == e.id.hex()
    assert answer["code"] < 0
    after = e.stats()
    assert after["handshakes_refused"] == before["handshakes_refused"] + 1
    assert after["peers_up"] == before["peers_up"]
    scene.serves()


def test_the_answer_goes_to_the_lane_of_first_contact(scene: Scene) -> None:
    how = {"lanes": 2, "deaf": 0, "fields": {"contact": 1, "target": "ab" * 16}}
    answers = scene.peer()("hello", address=scene.e.address, seconds=1.0, **how)
    assert [answer["kind"] for answer in answers] == ["REFUSE"]


UNREADABLE: dict[str, dict[str, Any]] = {
    "magic": {"header": {"magic": 0xFAB2}},
    "version": {"header": {"version": 2}},
    "type 0": {"header": {"type": 0}},
    "type WELCOME": {"header": {"type": 3}},
    "type 99": {"header": {"type": 99}},
    "length 0": {"header": {"length": 0}},
    "length too long": {"header": {"length": 4352}},
    "truncated": {"cut": 1},
    "truncated to its header": {"cut": 364},
    "no lane": {"fields": {"lane_count": 0}},
    "fewer lanes than it says": {"fields": {"lane_count": 2}},
    "more lanes than it says": {"lanes": 2, "fields": {"lane_count": 1}},
    "17 lanes": {"lanes": 17},
    "lanes without end": {"fields": {"lane_count": 0xFFFFFFFF}},
    "no NIC": {"fields": {"nics": 0}},
    "33 NICs": {"fields": {"nics": 33}},
    "no session": {"fields": {"session": 0}},
    "contact on no lane": {"fields": {"contact": 1}},
    "a label without end": {"fields": {"label": "41" * 64}},
    "from NIC 32": {"lane": {"from_nic": 32}},
    "to NIC 32": {"lane": {"to_nic": 32}},
    "a blob of 129 bytes": {"lane": {"length": 129}},
}


def test_hellos_that_cannot_be_read(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    for name, how in UNREADABLE.items():
        before = e.stats()
        assert peer("hello", address=e.address, seconds=0.0, **how) == [], name
        scene.witness("probe", address=e.address)
        after = e.stats()
        assert after["frames_refused"] == before["frames_refused"] + 1, name
        assert after["peers_up"] == before["peers_up"], name
    scene.serves()
    peer.connect(e)
    check_session(e, peer)
    peer("bye")


DROPPED: dict[str, dict[str, Any]] = {
    "magic": {"datagram": {"magic": 0xFAB1}},
    "version": {"datagram": {"version": 2}},
    "no datagrams": {"datagram": {"count": 0}},
    "33 datagrams": {"datagram": {"count": 33}},
    "beyond the last": {"datagram": {"number": 1}},
    "beyond the last of many": {"chunk": 64, "datagram": {"number": 200}},
    "count lies": {"datagram": {"count": 2}},
    "length 0": {"datagram": {"length": 0}},
    "length lies": {"datagram": {"length": 4352}},
    "length beyond a frame": {"datagram": {"length": 0xFFFF}},
    "chunk 0": {"datagram": {"chunk": 0}},
    "chunk of many lies": {"chunk": 64, "datagram": {"chunk": 65}},
    "shorter than it says": {"shorter": 1},
    "of many, all shorter": {"chunk": 64, "shorter": 1},
    "shorter than a header": {"chunk": 1000, "shorter": 380},
    "the first is missing": {"chunk": 64, "drop": 0},
    "the last is missing": {"chunk": 64, "drop": -1},
    "one is missing, the others come twice": {"chunk": 64, "drop": 2, "twice": True},
    "for a lane that is none": {"token": 0x8000_0000_0000_0000},
    "for another": {"token": 0x1234_0000_0001},
}


def test_datagrams_that_make_no_frame(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    before = e.stats()
    for name, how in DROPPED.items():
        assert peer("hello", address=e.address, seconds=0.0, **how) == [], name
    scene.witness("probe", address=e.address)
    after = e.stats()
    assert after["frames_refused"] == before["frames_refused"]
    assert after["peers_up"] == before["peers_up"]
    scene.serves()
    peer.connect(e)
    check_session(e, peer)
    peer("bye")


BAD_LANES: dict[str, dict[str, Any]] = {
    "blob version": {"blob": {"version": 2}},
    "link layer": {"blob": {"link": 1}},
    "MTU code": {"blob": {"mtu": 6}},
    "short blob": {"lane": {"length": 59}},
    "no blob": {"lane": {"length": 0}},
    "no such queue pair": {"blob": {"write_qpn": 0xFFFFFFFF}},
    "no GID": {"blob": {"gid": "00" * 16}},
    "token of a NIC": {"blob": {"token": 0}},
}


def test_hellos_of_peers_that_cannot_be_reached(scene: Scene) -> None:
    """Lanes that cannot be connected, or lead nowhere, are given up after the peer timeout."""
    e = scene.e
    before = e.stats()["peers_up"]
    for how in BAD_LANES.values():
        scene.peer()("hello", address=e.address, seconds=0.0, **how)
        scene.witness("probe", address=e.address)
    assert e.stats()["peers_up"] == before
    scene.serves()
    good = scene.peer()
    good.connect(e)
    check_session(e, good)
    good("bye")


def test_hosts_that_do_not_answer_hold_up_nobody(scene: Scene) -> None:
    """Strangers whose hosts are not there are refused while a peer connects.

    The kernel waits about a second for each: one of them may be in the way, not all.
    """
    e, peer = scene.e, scene.peer()
    nowhere = [f"{0xFFFF_0A09_0050 + i:032x}" for i in range(6)]
    for gid in nowhere:
        how = {"fields": {"target": "ab" * 16}, "blob": {"gid": gid}}
        peer("hello", address=e.address, seconds=0.0, **how)
    begin = time.monotonic()
    peer.connect(e)
    took = time.monotonic() - begin
    check_session(e, peer)
    peer("bye")
    assert took < 3.0


# ---- frames that are refused ----


def test_strange_frames_in_a_session(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    peer.connect(e)
    bad: list[dict[str, Any]] = [
        {"kind": "PING", "body": {"stamp": 1}, "session_plus": 1},
        {"kind": "BYE", "body": {"code": 0, "text": "not from this session"}, "session_plus": -1},
        {"kind": "QUIESCED", "body": {"region": 1, "number": 1}, "session_plus": 1 << 40},
        {"kind": "PING", "body": {"stamp": 1}, "header": {"magic": 0}},
        {"kind": "PING", "body": {"stamp": 1}, "header": {"version": 0}},
        {"kind": "PING", "body": {"stamp": 1}, "header": {"length": 23}},
        {"kind": "PING", "body": {"stamp": 1}, "header": {"type": 200}},
        {"kind": "PING", "body": {"stamp": 1}, "cut": 1},
        {"kind": "PING", "body": {"stamp": 1}, "cut": 1, "header": {"length": 23}},
        {"kind": "READY", "cut": 15, "header": {"length": 1}},
        {"kind": "VOID", "body": {"number": 0, "ids": []}, "cut": 4, "header": {"length": 20}},
        {"kind": "VOID", "body": {"number": 0, "ids": [1, 2]}, "cut": 4, "header": {"length": 28}},
        {"kind": "VOID", "body": {"number": 0, "ids": list(range(300))}},
        {"kind": "GRANT", "cut": 8, "header": {"length": 48}, "body": dict.fromkeys(
            ("region", "secret", "number", "code", "pulled", "length", "keys"), 0)},
        {"kind": "LANE_DOWN", "body": {"lane": 1, "serial": 0}},
    ]  # fmt: skip
    for number, frame in enumerate(bad):
        before = e.stats()["frames_refused"]
        assert peer("frame", **frame) == "success"
        peer("frame", kind="PING", body={"stamp": 1000 + number})
        peer("frames", kind="PONG", count=number + 1)
        assert e.stats()["frames_refused"] == before + 1, frame
    assert peer("frames", kind="PONG", count=len(bad))[-1]["stamp"] == 1000 + len(bad) - 1
    check_session(e, peer)
    peer("bye")
    scene.serves()


def test_bodies_that_are_too_long(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    peer.connect(e)
    check_session(e, peer)
    before = e.stats()["frames_refused"]
    peer("frame", kind="READY", more="00", header={"length": 17})
    peer("frame", kind="VOIDED", body={"number": 9}, more="0000", header={"length": 22})
    check_session(e, peer)
    peer("bye")
    assert e.stats()["frames_refused"] == before + 2


def test_handshake_frames_that_nobody_asked_for(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    peer.connect(e)
    refused = e.stats()["frames_refused"]
    peer("stray", kind="WELCOME", address=e.address)
    peer("stray", kind="READY", address=e.address)
    peer("stray", kind="WELCOME", address=e.address, token="lane")
    peer("stray", kind="PING", address=e.address, token="lane", stamp=1)
    peer("stray", kind="WELCOME", address=e.address, token="wrong")
    peer("stray", kind="PING", address=e.address, token="wrong", stamp=1)
    for kind in ("REFUSE", "CHALLENGE"):
        body = {"refuser": [0] * 16, "target": [0] * 16, "session": 1, "code": -1, "text": "no"}
        body |= {"cookie": [0] * 16}
        peer("stray", kind=kind, address=e.address, token="lane", **body)
    peer("frame", kind="PING", body={"stamp": 5})
    peer("frames", kind="PONG")
    wait_until(lambda: e.stats()["frames_refused"] == refused + 4, 5.0, "not all were refused")
    check_session(e, peer)
    peer("bye")
    scene.serves()


# ---- noise ----


def test_random_datagrams(scene: Scene, seed: int) -> None:
    e, peer = scene.e, scene.peer()
    before = e.stats()["peers_up"]
    assert scene.witness("noise", address=e.address, count=1024) == 1024, seed
    assert e.stats()["peers_up"] == before
    scene.serves()
    assert peer("mutants", address=e.address, count=1024) == 1024, seed
    assert e.stats()["peers_up"] == before
    scene.serves()
    peer.connect(e)
    check_session(e, peer)
    peer("bye")


def test_random_frames_in_a_session(scene: Scene, seed: int) -> None:
    e, peer = scene.e, scene.peer()
    e.region("guard", SIZE, 4)
    for _ in range(3):
        peer.connect(e)
        assert peer("frame_noise", count=300), seed
    scene.serves()
    peer.connect(e)
    check_session(e, peer)
    assert e.differs("guard", 4) == ""
    peer("bye")


# ---- writes where there is nothing to write to ----

MISDEEDS: dict[str, dict[str, int]] = {
    "another key": {"rkey_plus": 1},
    "no key": {"rkey_plus": 1 << 31},
    "beyond the end": {"offset": SIZE - 50},
    "far beyond the end": {"address_plus": 1 << 40},
    "before the beginning": {"address_plus": -1},
}


def test_a_bad_write_breaks_its_own_lane_only(scene: Scene) -> None:
    e, c = scene.e, scene.c
    descriptor, guard = e.region("dst", SIZE, 1), e.region("guard", SIZE, 4)
    imm, stolen = e.counter("count"), e.counter("stolen")
    c.region("src", SIZE, 3)
    writing = c.start(write_until, "src", descriptor, imm, thread=True)
    peers = []
    for how in MISDEEDS.values():
        peer = scene.peer()
        peer.connect(e)
        assert peer("grant", descriptor=guard)["code"] == 0
        data = b"bad" * 40
        assert peer("write", descriptor=guard, data=data, imm=stolen, **how) == ["remote access"]
        assert peer("write", descriptor=guard, data=data, imm=stolen) == ["flushed"]
        peers.append(peer)
    gone = e.region("gone", SIZE, 1)
    e.call(commands.deregister, "gone")
    peers[0].connect(e)
    assert peers[0]("write", descriptor=gone, data=b"x", imm=stolen) == ["remote access"]
    assert e.differs("guard", 4) == ""
    e.wait("count", 11, 60.0)
    e.counter("stop", 5)
    c.counter("stop", 5)
    e.call(commands.write_imm, c.address, 5)
    count = writing.result()
    assert count > 10
    assert e.settled("count", count) == count
    assert e.differs("dst", 3) == ""
    assert e.value("stolen") == 0
    for peer in peers:
        peer.connect(e)
        check_session(e, peer)
        peer("bye")
    c.call(commands.write_imm, e.address, 5)
    assert e.settled("stop", 1) == 1


def write_until(node: State, source: str, descriptor: bytes, imm: int) -> int:
    """Write until the counter `stop` is raised here; returns how often."""
    remote = fabric.Descriptor.from_bytes(descriptor)
    count = 0
    while "stop" not in node.things or not node.things["stop"].value:
        node.engine.write(node.things[source], remote, imm=imm).wait(timeout=20.0)
        count += 1
    return count


def test_a_lane_comes_back(scene: Scene) -> None:
    """One lane of three breaks by a bad write; the others count on, and then it does again."""
    e, peer = scene.e, scene.peer()
    descriptor, imm = e.region("dst", SIZE, 1), e.counter("count")
    peer.connect(e, lanes=3)
    check_session(e, peer)
    before = e.stats()
    wrong = {"pieces": 1, "rkey_plus": 1}
    assert peer("write", descriptor=descriptor, data=b"x", imm=imm, **wrong) == ["remote access"]
    assert peer("repair", lane=0) == 1
    data = bytes_of(2, SIZE)
    ends = peer("write", descriptor=descriptor, data=data, imm=imm, pieces=3)
    assert ends == ["success"] * 3
    assert e.settled("count", 1) == 1
    assert e.differs("dst", 2) == ""
    after = e.stats()
    assert after["lanes_restored"] == before["lanes_restored"] + 1
    assert after["peers_up"] == before["peers_up"]
    check_session(e, peer)
    peer("bye")


# ---- after the end ----


def test_nothing_lands_after_the_fence(scene: Scene) -> None:
    e, peer = scene.e, scene.peer()
    descriptor, imm = e.region("dst", SIZE, 1), e.counter("count")
    peer.connect(e)
    peer("answer", off=["BYE"])
    peer("write", descriptor=descriptor, data=bytes_of(2, SIZE), imm=imm)
    assert e.settled("count", 1) == 1
    e.refill("dst", 1)
    e.call(commands.disconnect, peer.address)
    ends = peer("write", descriptor=descriptor, data=bytes_of(2, SIZE), imm=imm)
    assert ends == ["no answer"]
    assert e.differs("dst", 1) == ""
    assert e.value("count") == 1
    peer("answer", on=["BYE"])
    before = e.stats()["handshakes_refused"]
    refused = peer("connect", address=e.address)
    assert refused["state"] == "refused"
    assert "disconnected" in refused["why"]
    assert e.stats()["handshakes_refused"] > before
    peer("drop")
    # This side uses the peer's address again: that lifts the bar.
    e.call(commands.write_imm, peer.address, 7)
    assert peer("imms", count=1) == [7]
    check_session(e, peer)
    scene.serves()
