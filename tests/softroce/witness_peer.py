"""A peer of engines: handshake, frames, grants, writes. It does what ARCHITECTURE.md says."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from .witness_nic import Memory, Pair
from .witness_wire import (
    BLOB,
    DATAGRAM,
    FRAGMENT_MAX,
    FRAME_MAX,
    KIND_VERBS,
    RANGE_IDS,
    VERSION,
    BadBytes,
    Frame,
    Joiner,
    Values,
    cut,
    lane_blob,
    mac_holds,
    pack_frame,
    pieces_of,
    unpack_blob,
    unpack_frame,
    write_address,
    write_descriptor,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from .witness_nic import Port

CREDIT = 16  # message fragments that we can hold
IMM_RECEIVES, FRAME_RECEIVES = 256, 48
HELLO_SECONDS = 0.25  # emulation is slow: more often would only be a storm
PEER_TIMEOUT_NS = 10_000_000_000
INVALID = -1


class Lane:
    """Two RC queue pairs, and the token that datagrams to them show."""

    def __init__(self, session: Session) -> None:
        port = session.witness.port
        self.session = session
        self.token = port.rng.getrandbits(64) | 1
        self.writes = Pair(port, IMM_RECEIVES, 1, lambda _, imm: session.imms.append(imm))
        self.frames = Pair(
            port, FRAME_RECEIVES, FRAME_MAX, lambda data, _: session.heard(data, self)
        )

    def blob(self) -> bytes:
        """Return what the other side connects to."""
        return self.session.witness.blob(
            token=self.token,
            write_qpn=self.writes.number,
            write_psn=self.writes.psn,
            frame_qpn=self.frames.number,
            frame_psn=self.frames.psn,
        )

    def connect(self, to: Values) -> None:
        """Take both pairs to RTS."""
        self.writes.connect(to, to["write_qpn"], to["write_psn"])
        self.frames.connect(to, to["frame_qpn"], to["frame_psn"])

    def close(self) -> None:
        """Destroy both pairs."""
        self.writes.close()
        self.frames.close()


class Session:
    """A session with one engine, from the first HELLO on."""

    def __init__(self, peer: Peer, engine: bytes, lanes: int, active: bool) -> None:
        self.peer, self.witness, self.active = peer, peer.witness, active
        self.engine = engine
        self.mine: int = self.witness.rng.getrandbits(64) | 1
        self.theirs = 0
        self.state = "connecting"
        self.why = ""
        self.imms: list[int] = []
        self.frames: list[Frame] = []
        self.welcomes: list[bytes] = []
        self.cookie = bytes(16)
        self.hello: Values = {}
        self.serials: dict[int, int] = {}
        self.broken: set[int] = set()
        self.message, self.messages = bytearray(), [b""][:0]
        self.fragments_in = self.fragments_out = 0
        self.credit = CREDIT
        self.lanes = [Lane(self) for _ in range(lanes)]
        self.witness.ears |= {lane.token: self.on_datagram for lane in self.lanes}

    def on_datagram(self, data: bytes) -> None:
        """Take a frame that came as datagrams."""
        self.heard(data, None)

    def heard(self, data: bytes, lane: Lane | None) -> None:
        """Note a frame; it is looked at between completions, never among them."""
        self.witness.inbox.append((self, data, lane))

    # What is sent.

    def values(self, answers: int, pairs: list[tuple[int, int]]) -> Values:
        """Return the fields of our HELLO or WELCOME; `pairs` are (our NIC, their NIC)."""
        values = self.peer.hello_values(self.engine, self.mine, answers)
        values["cookie"] = self.cookie
        values["lanes"] = [
            self.peer.lane_entry(lane.blob(), *pair)
            for lane, pair in zip(self.lanes, pairs, strict=True)
        ]
        return values

    def send(self, kind: str, session: int | None = None, **body: Any) -> str:
        """Send a frame of this session over the frame pair of a lane that works."""
        number = self.theirs if session is None else session
        return self.send_bytes(pack_frame(kind, number, body))

    def send_bytes(self, data: bytes) -> str:
        """Send whatever it is over the frame pair of a lane that works."""
        lane = next(lane for i, lane in enumerate(self.lanes) if i not in self.broken)
        return lane.frames.send(data)

    def send_welcome(self) -> None:
        """Answer their HELLO; every time with the same bytes."""
        if not self.welcomes:
            pairs = [(lane["to_nic"], lane["from_nic"]) for lane in self.hello["lanes"]]
            body = self.values(self.theirs, pairs)
            frame = pack_frame("WELCOME", self.theirs, body, self.peer.secret)
            self.welcomes.append(frame)
        to = lane_blob(self.hello["lanes"][self.hello["contact"]])
        self.witness.send_frame(to, self.welcomes[0], to["token"])

    # What is heard.

    def take(self, frame: Frame, lane: Lane | None) -> None:
        """Look at one frame, which came over a lane's frame pair or (None) as datagrams."""
        self.frames.append(frame)
        handler: Callable[[Values], None] | None = getattr(self, f"on_{frame.kind.lower()}", None)
        if frame.kind == "WELCOME":
            self.on_welcome_frame(frame)
        elif frame.kind in ("CHALLENGE", "REFUSE"):
            if frame.body["session"] == self.mine and self.state == "connecting" and handler:
                handler(frame.body)
        elif frame.session != self.mine or not lane:
            raise BadBytes(f"{frame.kind} for session {frame.session}; we are {self.mine}")
        elif frame.kind == "LANE_READY":
            if not self.active:
                self.prove(lane)
        else:
            if self.state == "welcomed":
                self.state = "up"
            if handler and frame.kind in self.peer.answers:
                handler(frame.body)

    def on_welcome_frame(self, frame: Frame) -> None:
        """Finish our own attempt; one that comes again says that READY was lost."""
        body = frame.body
        good = frame.session == body["answers"] == self.mine and body["source"] == self.engine
        if not (good and self.active and body["target"] == self.peer.id):
            raise BadBytes("a WELCOME that is not for us")
        if len(body["lanes"]) != len(self.lanes) or not mac_holds(frame, self.peer.secret):
            raise BadBytes("a WELCOME with other lanes, or with a wrong mac")
        self.welcomes.append(frame.data)
        first = self.state == "connecting"
        if first:
            self.begin(body)
            self.state = "up"
        if self.state == "up":
            self.send("READY")
        for lane in self.lanes[1:] if first else ():
            self.prove(lane)

    def prove(self, lane: Lane) -> None:
        """Say LANE_READY over a lane itself: who hears it knows that the lane works."""
        if lane in self.lanes:
            number = self.lanes.index(lane)
            body = {"lane": number, "serial": self.serials.get(number, 0)}
            lane.frames.send(pack_frame("LANE_READY", self.theirs, body))

    def begin(self, hello: Values) -> None:
        """Connect our lanes to those of their HELLO or WELCOME."""
        self.hello, self.theirs = hello, hello["session"]
        self.credit = hello["fragments"]
        for lane, entry in zip(self.lanes, hello["lanes"], strict=True):
            lane.connect(lane_blob(entry))

    def on_challenge(self, body: Values) -> None:
        self.cookie = body["cookie"]

    def on_refuse(self, body: Values) -> None:
        self.state, self.why = "refused", body["text"]

    def on_bye(self, body: Values) -> None:
        self.state, self.why = "over", body["text"]

    def on_ping(self, body: Values) -> None:
        self.send("PONG", stamp=body["stamp"])

    def on_void(self, body: Values) -> None:
        self.send("VOIDED", number=body["number"])

    def on_quiesce(self, body: Values) -> None:
        self.send("QUIESCED", region=body["region"], number=body["number"])

    def on_lane_down(self, body: Values) -> None:
        self.broken.add(body["lane"])

    def on_grant_req(self, body: Values) -> None:
        region = self.peer.regions.get(body["region"])
        good = region is not None and body["secret"] == self.peer.region_secret(body["region"])
        length = region.length if region and good else 0
        self.send("GRANT", **body, code=0 if good else INVALID, pulled=0, length=length, keys=0)

    def on_ack(self, body: Values) -> None:
        self.credit = body["limit"]

    def on_message(self, body: Values) -> None:
        """Take the next fragment; RC keeps order and loses nothing, so it is the next."""
        if body["number"] != self.fragments_in or body["offset"] != len(self.message):
            raise BadBytes(f"fragment {body['number']} at {body['offset']}")
        self.fragments_in += 1
        self.message += body["bytes"]
        if len(self.message) == body["total"]:
            self.messages.append(bytes(self.message))
            self.message.clear()
        self.send("ACK", held=self.fragments_in, limit=self.fragments_in + CREDIT)

    def close(self) -> None:
        """Destroy the queue pairs, without a word."""
        for lane in self.lanes:
            self.witness.ears.pop(lane.token, None)
            lane.close()
        self.lanes = []
        if self.state != "refused":
            self.state = "over"


class Peer:
    """One engine id of ours, with regions and at most one session."""

    def __init__(self, witness: Witness, engine: bytes, nics: int, secret: bytes) -> None:
        self.witness, self.id, self.nics, self.secret = witness, engine, nics, secret
        self.label = f"witness {engine.hex()[:8]}"
        self.doorbell = Memory(witness.port, 4096, remote=True)
        self.source = Memory(witness.port, 4096)
        self.regions: dict[int, Memory] = {}
        self.hellos: list[tuple[float, Frame]] = []
        self.session: Session | None = None
        self.attempts = 0
        self.sent: list[bytes] = []  # the HELLO of each session that we began
        self.answers = {
            "HELLO", "PING", "VOID", "QUIESCE", "GRANT_REQ", "MESSAGE", "ACK", "BYE", "LANE_DOWN",
        }  # fmt: skip
        row = {"kind": KIND_VERBS, "blob": witness.blob(), "doorbell": self.doorbell.key}
        row |= {"max_write": 1 << 30, "ordered": True}
        self.address = write_address(engine, self.label, [row] * nics)

    def hello_values(self, target: bytes, session: int, answers: int = 0) -> Values:
        """Return the fields of a HELLO or WELCOME but for its lanes."""
        self.attempts += not answers
        return {
            "source": self.id,
            "target": target,
            "session": session,
            "answers": answers,
            "attempt": self.attempts,
            "kind": KIND_VERBS,
            "nics": self.nics,
            "fragments": CREDIT,
            "contact": 0,
            "peer_timeout": PEER_TIMEOUT_NS,
            "fence": 0,
            "nonce": self.witness.rng.randbytes(16),
            "cookie": bytes(16),
            "label": self.label.encode(),
        }

    def lane_entry(self, blob: bytes, ours: int, theirs: int) -> Values:
        """Return the fields of one lane of a HELLO or WELCOME."""
        return {
            "from_nic": ours,
            "to_nic": theirs,
            "length": len(blob),
            "speed": 0,
            "doorbell_address": self.doorbell.key[0],
            "doorbell_key": self.doorbell.key[1],
            "blob": blob,
        }

    def up(self) -> Session:
        """Return the session, which must be up."""
        if self.session is None or self.session.state != "up":
            state = self.session.state if self.session else "none"
            raise LookupError(f"no session is up ({state})")
        return self.session

    def connect(
        self,
        address: Values,
        lanes: int,
        seconds: float,
        send: Callable[[Values, bytes], None] | None = None,
    ) -> Session:
        """Open a session; `send` may send the HELLO in another way."""
        self.drop()
        self.session = session = Session(self, address["id"], lanes, active=True)
        to = unpack_blob(address["nics"][0]["blob"])
        theirs = len(address["nics"])
        values = session.values(0, [(i % self.nics, i % theirs) for i in range(lanes)])
        self.sent.append(b"")
        end = time.monotonic() + seconds
        while session.state == "connecting" and time.monotonic() < end:
            values["cookie"] = session.cookie
            frame = self.sent[-1] = pack_frame("HELLO", 0, values, self.secret)
            if send:
                send(to, frame)
            else:
                self.witness.send_frame(to, frame, 0)
            self.witness.until(
                lambda: session.state != "connecting" or session.cookie != values["cookie"],
                HELLO_SECONDS,
            )
        return session

    def on_hello(self, frame: Frame) -> None:
        """Answer an engine's HELLO (S2, S4)."""
        self.hellos.append((time.monotonic(), frame))
        if "HELLO" not in self.answers or not mac_holds(frame, self.secret):
            return
        ours, body = self.session, frame.body
        if ours and ours.theirs == body["session"]:
            if not ours.active:
                ours.send_welcome()
            return
        if ours and ours.active and ours.state == "connecting" and self.id < body["source"]:
            return  # ours wins
        self.drop()
        self.session = session = Session(self, body["source"], len(body["lanes"]), active=False)
        session.begin(body)
        session.state = "welcomed"
        session.send_welcome()

    def drop(self) -> None:
        """Destroy the queue pairs of the session."""
        if self.session:
            self.session.close()

    # Memory.

    def region_secret(self, number: int) -> int:
        """Return the secret of a region of ours."""
        return int.from_bytes(self.id[:4], "big") << 32 | number

    def descriptor(self, number: int, offset: int = 0, length: int | None = None) -> bytes:
        """Return the descriptor of a region of ours, or of a part of it."""
        memory = self.regions[number]
        values = {"region": number, "offset": offset, "secret": self.region_secret(number)}
        values["length"] = memory.length - offset if length is None else length
        return write_descriptor(self.address, {**values, "keys": [memory.key] * self.nics})

    def grant(self, descriptor: Values) -> Values:
        """Ask the owner of a descriptor for it; returns the answer."""
        session, seen = self.up(), len(self.up().frames)
        asked = {"region": descriptor["region"], "secret": descriptor["secret"]}
        session.send("GRANT_REQ", **asked, number=1)
        return self.await_frame("GRANT", seen).body

    def await_frame(self, kind: str, seen: int = 0, seconds: float = 10.0) -> Frame:
        """Wait for a frame of a kind, behind the first `seen` frames of the session."""
        session = self.session
        assert session

        def found() -> list[Frame]:
            return [frame for frame in session.frames[seen:] if frame.kind == kind]

        if not self.witness.until(lambda: bool(found()), seconds):
            raise TimeoutError(f"no {kind} within {seconds} s")
        return found()[0]

    def write(
        self,
        to: Values,
        data: bytes,
        imm: int | None,
        pieces: int = 1,
        rkey_plus: int = 0,
        address_plus: int = 0,
    ) -> list[str]:
        """Write to a descriptor, in pieces over all lanes; returns what became of each."""
        session = self.up()
        if self.source.length < len(data):
            self.source = Memory(self.witness.port, len(data))
        self.source.write(data)
        ends = []
        for i, (begin, end) in enumerate(pieces_of(len(data), pieces)):
            number = i % len(session.lanes)
            pair = session.lanes[number].writes
            address, rkey = to["keys"][session.hello["lanes"][number]["from_nic"]]
            raised = None if imm is None else (pieces - 1) << RANGE_IDS | imm
            request = pair.write_request(
                self.source.sge(begin, end - begin),
                address + to["offset"] + begin + address_plus,
                rkey + rkey_plus & 0xFFFFFFFF,
                raised,
            )
            ends += self.witness.port.post_all(pair.qp, [request])
        return ends

    def repair(self, number: int) -> int:
        """Give up a lane of a session that we began, and open it again; returns its serial."""
        session, seen = self.up(), len(self.up().frames)
        serial = session.serials.get(number, 0)
        session.broken.add(number)
        session.send("LANE_DOWN", lane=number, serial=serial)
        session.lanes[number].close()
        session.lanes[number] = lane = Lane(session)
        serial = session.serials[number] = serial + 1
        for _ in range(20):  # the other side may still be at closing the old one
            blob = lane.blob()
            session.send("LANE_OPEN", lane=number, serial=serial, length=len(blob), blob=blob)
            with contextlib.suppress(TimeoutError):
                answer = self.await_frame("LANE_OPENED", seen, 0.5).body
                break
        else:
            raise TimeoutError("no LANE_OPENED")
        if (answer["lane"], answer["serial"]) != (number, serial):
            raise BadBytes(f"LANE_OPENED for lane {answer['lane']}, serial {answer['serial']}")
        lane.connect(lane_blob(answer))
        session.broken.remove(number)
        session.prove(lane)
        return serial

    def send_message(self, data: bytes, order: list[int] | None = None) -> None:
        """Send a message, its fragments in some order; returns when all are acknowledged."""
        session = self.up()
        starts = range(0, max(len(data), 1), FRAGMENT_MAX)
        first, seen = session.fragments_out, len(session.frames)
        for i in order or range(len(starts)):
            part = data[starts[i] : starts[i] + FRAGMENT_MAX]
            if first + i >= session.credit:
                raise ValueError("no credit")
            body: Values = {"number": first + i, "total": len(data), "offset": starts[i]}
            session.send("MESSAGE", **body, bytes=part)
        session.fragments_out += len(starts)
        self.witness.until(
            lambda: any(
                frame.kind == "ACK" and frame.body["held"] == session.fragments_out
                for frame in session.frames[seen:]
            ),
            10.0,
        )


class Witness:
    """All peers of one port."""

    def __init__(self, port: Port, rng: random.Random) -> None:
        self.port, self.rng = port, rng
        self.peers: list[Peer] = []
        self.ears: dict[int, Callable[[bytes], None]] = {}
        self.inbox: deque[tuple[Session | None, bytes, Lane | None]] = deque()
        self.joiner = Joiner()
        self.source, self.serial = rng.getrandbits(64), 0
        port.on_datagram = self.on_datagram

    def blob(self, **fields: int) -> bytes:
        """Return the address of our NIC, or with more fields of a lane."""
        port = self.port
        values = dict.fromkeys(BLOB.names, 0) | {"version": VERSION, "link": port.link}
        values |= {"mtu": port.mtu, "lid": port.lid, "gid": port.gid}
        values |= {"ud_qpn": port.ud.qp_num, "ud_qkey": port.qkey}
        return BLOB.pack({**values, **fields})

    def send_frame(self, to: Values, frame: bytes, token: int) -> None:
        """Send a frame as datagrams of the path MTU."""
        self.port.send_datagrams(to, self.cut(to, frame, token))

    def cut(self, to: Values, frame: bytes, token: int, chunk: int = 0) -> list[bytes]:
        """Cut a frame into datagrams, under a serial of their own."""
        self.serial += 1
        most = (128 << min(to["mtu"], self.port.mtu)) - DATAGRAM.size
        return cut(frame, self.serial, self.source, token, chunk or most)

    def on_datagram(self, data: bytes) -> None:
        """Put datagrams together."""
        whole = self.joiner.take(data)
        if whole is None:
            return
        token, frame = whole
        if token in self.ears:
            self.ears[token](frame)
        elif token == 0:
            self.inbox.append((None, frame, None))

    def pump(self) -> int:
        """Handle what came; returns how much that was."""
        count = self.port.poll()
        while self.inbox:
            session, data, lane = self.inbox.popleft()
            frame = unpack_frame(data)
            if session and session.lanes:
                session.take(frame, lane)
            elif session:
                continue  # closed meanwhile
            elif frame.kind == "HELLO" and frame.session == 0:
                for peer in self.peers:
                    if peer.id == frame.body["target"]:
                        peer.on_hello(frame)
            count += 1
        return count

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Handle what comes until a condition holds; returns whether it came to that in time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            if not self.pump():
                time.sleep(0.001)
        return True
