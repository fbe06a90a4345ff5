"""An independent peer of engines over verbs: pyverbs and the documents, none of the engine's code.

The test `tests/test_witness.py` drives it through `serve`: a JSON object a line comes in,
``{"do": NAME, ...arguments}``, and one goes out, ``{"ok": result}`` or ``{"error": text}``. Bytes
are hexadecimal text. Between commands it answers what engines ask.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import inspect
import itertools
import json
import os
import random
import select
import struct
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from .witness_wire import (
    DATAGRAM,
    FRAMES,
    HEADER,
    BadBytes,
    Frame,
    Values,
    lane_blob,
    pack_frame,
    plain,
    read_address,
    read_descriptor,
    unpack_blob,
    unpack_frame,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .witness_peer import Peer, Witness

IDLE_SECONDS = 0.002
BATCH = 32  # fewer datagrams than an engine has receives for
ANSWER_SECONDS = 5.0


class Commands:
    """What a test can ask for: every public method."""

    def __init__(self, witness: Witness, rng: random.Random) -> None:
        self._witness, self._rng = witness, rng

    def _peer(self, number: int) -> Peer:
        return self._witness.peers[number]

    # ---- peers ----

    def peer(self, engine: str = "", nics: int = 1, secret: str = "") -> Values:
        """Make a peer: an engine id, an address, no session yet."""
        from .witness_peer import Peer

        number = bytes.fromhex(engine) or self._rng.randbytes(16)
        peer = Peer(self._witness, number, nics, bytes.fromhex(secret))
        self._witness.peers.append(peer)
        return {"peer": len(self._witness.peers) - 1, "id": number, "address": peer.address}

    def decode(self, address: str = "", descriptor: str = "") -> Values:
        """Take an address or descriptor apart, NICs and all."""
        values = (
            read_descriptor(bytes.fromhex(descriptor))
            if descriptor
            else read_address(bytes.fromhex(address))
        )
        for nic in values.get("address", values)["nics"]:
            nic["blob"] = unpack_blob(nic["blob"])
        return values

    def answer(self, peer: int, on: Sequence[str] = (), off: Sequence[str] = ()) -> None:
        """Choose what is answered between commands."""
        self._peer(peer).answers |= set(on)
        self._peer(peer).answers -= set(off)

    def connect(
        self, peer: int, address: str, lanes: int = 1, seconds: float = 10.0, **how: Any
    ) -> Values:
        """Open a session; `how` the HELLO is sent: see `_send`."""

        def send(to: Values, frame: bytes) -> None:
            self._send(to, frame, **how)

        self._peer(peer).connect(
            read_address(bytes.fromhex(address)), lanes, seconds, send if how else None
        )
        return self.state(peer)

    def state(self, peer: int, seconds: float = 0.0, until: str = "") -> Values:
        """Say how the session stands; with `until`, when it stands so."""
        session = self._peer(peer).session
        if not session:
            return {"state": "none"}
        self._witness.until(lambda: session.state == until, seconds if until else 0.0)
        digests = sorted({hashlib.sha256(frame).hexdigest() for frame in session.welcomes})
        return {
            "state": session.state,
            "why": session.why,
            "mine": session.mine,
            "theirs": session.theirs,
            "active": session.active,
            "lanes": len(session.lanes),
            "welcomes": len(session.welcomes),
            "different": len(digests),
            "hello": {**session.hello, "lanes": len(session.hello.get("lanes", []))},
        }

    def hellos(self, peer: int, clear: bool = False) -> Values:
        """Tell of the HELLOs that engines sent to this peer."""
        seen = self._peer(peer).hellos
        times = [when for when, _ in seen]
        result = {
            "count": len(seen),
            "different": len({frame.data for _, frame in seen}),
            "gaps": [b - a for a, b in itertools.pairwise(times)],
        }
        if clear:
            seen.clear()
        return result

    def frames(self, peer: int, kind: str, seconds: float = 10.0, count: int = 1) -> list[Any]:
        """Return the frames of a kind that came in this session; waits for `count` of them."""
        session = self._peer(peer).session
        assert session

        def found() -> list[Frame]:
            return [frame for frame in session.frames if frame.kind == kind]

        self._witness.until(lambda: len(found()) >= count, seconds)
        return [{"session": frame.session, **frame.body} for frame in found()]

    def imms(self, peer: int, count: int, seconds: float = 10.0) -> list[int]:
        """Return the immediates that came, as numbers, when there are `count` of them."""
        session = self._peer(peer).session
        assert session
        self._witness.until(lambda: len(session.imms) >= count, seconds)
        self._witness.until(lambda: False, 0.05)  # for one too many
        imms, session.imms = session.imms, []
        return imms

    def bye(self, peer: int, text: str = "done") -> None:
        """End the session in words."""
        session = self._peer(peer).up()
        session.send("BYE", code=0, text=text)
        session.close()

    def drop(self, peer: int) -> None:
        """End the session without a word."""
        self._peer(peer).drop()

    # ---- memory ----

    def region(self, peer: int, length: int, fill: int = 0) -> Values:
        """Make a region of one byte again and again."""
        from .witness_nic import Memory

        owner = self._peer(peer)
        number = len(owner.regions) + 1
        owner.regions[number] = Memory(self._witness.port, length, remote=True)
        owner.regions[number].write(bytes([fill]) * length)
        return {"region": number, "descriptor": owner.descriptor(number)}

    def digest(self, peer: int, region: int) -> str:
        """Return the SHA-256 of a region."""
        memory = self._peer(peer).regions[region]
        return hashlib.sha256(memory.read(memory.length)).hexdigest()

    def grant(self, peer: int, descriptor: str, secret_plus: int = 0) -> Values:
        """Ask for a region; returns the answer."""
        to = read_descriptor(bytes.fromhex(descriptor))
        to["secret"] = to["secret"] + secret_plus & (1 << 64) - 1
        return self._peer(peer).grant(to)

    def write(
        self,
        peer: int,
        descriptor: str,
        data: str = "",
        offset: int = 0,
        imm: int | None = None,
        **how: int,
    ) -> list[str]:
        """Write; `how`: pieces, rkey_plus, address_plus."""
        to = read_descriptor(bytes.fromhex(descriptor))
        to["offset"] += offset
        return self._peer(peer).write(to, bytes.fromhex(data), imm, **how)

    # ---- frames, right and wrong ----

    def frame(
        self,
        peer: int,
        kind: str,
        body: Values | None = None,
        header: dict[str, int] | None = None,
        session_plus: int = 0,
        cut: int = 0,
        more: str = "",
    ) -> str:
        """Send a frame over the frame pair: `cut` short, or with `more` behind it."""
        session = self._peer(peer).up()
        number = session.theirs + session_plus & (1 << 64) - 1
        data = pack_frame(kind, number, body or {}, header=header)
        return session.send_bytes(data[: len(data) - cut] + bytes.fromhex(more))

    def repair(self, peer: int, lane: int) -> int:
        """Give up a lane and open it again; returns its serial."""
        return self._peer(peer).repair(lane)

    def message(self, peer: int, data: str, order: list[int] | None = None) -> None:
        """Send a message."""
        self._peer(peer).send_message(bytes.fromhex(data), order)

    def messages(self, peer: int, count: int) -> list[bytes]:
        """Return the messages that came, when there are `count` of them."""
        session = self._peer(peer).up()
        self._witness.until(lambda: len(session.messages) >= count, 10.0)
        return session.messages

    def welcome(self, peer: int, copies: int = 1) -> None:
        """Send the WELCOME of the session again."""
        session = self._peer(peer).session
        assert session
        for _ in range(copies):
            session.send_welcome()

    def stray(self, peer: int, kind: str, address: str, token: str = "", **body: Any) -> None:
        """Send a frame as datagrams to a lane (`token`: "lane", "wrong") or to the NIC."""
        owner, target = self._peer(peer), read_address(bytes.fromhex(address))
        to, number = unpack_blob(target["nics"][0]["blob"]), 0
        if token:
            number = lane_blob(owner.up().hello["lanes"][0])["token"] ^ (token == "wrong") << 40
        body = {key: bytes(v) if isinstance(v, list) else v for key, v in body.items()}
        if FRAMES[kind][2] == "hello":
            body = self._hello(owner, target, 1) | body
        self._witness.send_frame(to, pack_frame(kind, 0, body), number)

    def _hello(self, peer: Peer, target: Values, lanes: int, token: int = 0) -> Values:
        """Return a HELLO whose queue pairs are not: it is meant to be refused."""
        rng = self._rng
        values = peer.hello_values(target["id"], rng.getrandbits(64) | 1)
        names = ("write_qpn", "write_psn", "frame_qpn", "frame_psn")
        numbers = {name: rng.getrandbits(24) for name in names}
        blob = self._witness.blob(token=token or rng.getrandbits(64) | 1, **numbers)
        values["lanes"] = [peer.lane_entry(blob, 0, 0) for _ in range(lanes)]
        return values

    def hello(
        self,
        peer: int,
        address: str,
        lanes: int = 1,
        seconds: float = 0.0,
        fields: Values | None = None,
        lane: Values | None = None,
        blob: Values | None = None,
        header: dict[str, int] | None = None,
        deaf: int | None = None,
        **how: Any,
    ) -> list[Values]:
        """Send a HELLO with some fields wrong; returns what was answered within `seconds`.

        Nobody hears what is sent to lane `deaf`.
        """
        target = read_address(bytes.fromhex(address))
        heard: list[Frame] = []
        token = self._rng.getrandbits(64) | 1
        values = self._hello(self._peer(peer), target, lanes, token) | unhex(fields)
        for i, entry in enumerate(values["lanes"]):
            lost = {"ud_qpn": 0xFFFFF} if i == deaf else {}
            data = self._witness.blob(**{**lane_blob(entry), **unhex(blob), **lost})
            entry |= {"blob": data, **unhex(lane)}
        self._witness.ears[token] = lambda data: heard.append(unpack_frame(data))
        to = unpack_blob(target["nics"][0]["blob"])
        self._send(to, pack_frame("HELLO", 0, values, header=header), **how)
        self._witness.until(lambda: bool(heard), seconds)
        del self._witness.ears[token]
        return [{"kind": frame.kind, "for": values["session"], **frame.body} for frame in heard]

    def _send(
        self,
        to: Values,
        frame: bytes,
        copies: int = 1,
        chunk: int = 0,
        token: int = 0,
        cut: int = 0,
        drop: int | None = None,
        shuffle: bool = False,
        twice: bool = False,
        datagram: dict[str, int] | None = None,
        shorter: int = 0,
    ) -> None:
        """Send a frame: some copies, cut small, incomplete, in any order, with a false header."""
        out: list[bytes] = []
        for _ in range(copies):
            parts = self._witness.cut(to, frame[: len(frame) - cut], token, chunk)
            if drop is not None:
                del parts[drop]
            out += parts + parts if twice else parts
        if shuffle:
            self._rng.shuffle(out)
        for i, part in enumerate(out):
            head = {**DATAGRAM.unpack(part), **(datagram or {})}
            out[i] = (DATAGRAM.pack(head) + part[DATAGRAM.size :])[: len(part) - shorter]
        self._witness.port.send_datagrams(to, out)

    def replay(self, peer: int, address: str, number: int) -> None:
        """Send again the HELLO by which this peer began one of its sessions."""
        to = unpack_blob(read_address(bytes.fromhex(address))["nics"][0]["blob"])
        self._witness.send_frame(to, self._peer(peer).sent[number], 0)

    # ---- noise ----

    def probe(self, address: str, seconds: float = ANSWER_SECONDS) -> float:
        """Have a HELLO refused; returns after how many seconds: the engine is there and awake."""
        begin = time.monotonic()
        if not self._witness.peers:
            self.peer()
        other = self._rng.randbytes(16).hex()
        while time.monotonic() < begin + seconds:
            if self.hello(0, address, seconds=0.5, fields={"target": other}):
                return time.monotonic() - begin
        raise TimeoutError(f"no answer within {seconds} s")

    def noise(self, address: str, count: int) -> int:
        """Send random datagrams, ever more of which begin as they should."""
        to = unpack_blob(read_address(bytes.fromhex(address))["nics"][0]["blob"])
        frame = HEADER.pack({"magic": 0xFAB1, "version": 1, "type": 1, "length": 0, "session": 0})
        starts = [b"", b"\xb3\xfa\x01\x00", frame[:3], frame]
        for first in range(0, count, BATCH):
            out = []
            for i in range(first, min(first + BATCH, count)):
                data = starts[i % 4] + self._rng.randbytes(self._rng.randrange(900))
                out.append(self._witness.cut(to, data, 0)[0] if i % 4 >= 2 else data)
            self._witness.port.send_datagrams(to, [data or b"\0" for data in out])
            self.probe(address)
        return count

    def mutants(self, peer: int, address: str, count: int) -> int:
        """Send HELLOs for another engine with some bytes changed, wherever that may be.

        Only the GID to be answered stays right, as looking for a host that is not there takes the
        kernel a second and more.
        """
        target = read_address(bytes.fromhex(address))
        to = unpack_blob(target["nics"][0]["blob"])
        rng = self._rng
        for first in range(0, count, BATCH):
            out = []
            for _ in range(min(BATCH, count - first)):
                values = self._hello(self._peer(peer), target, rng.randrange(1, 4))
                values["target"] = rng.randbytes(16)
                frame = pack_frame("HELLO", 0, values)
                data = bytearray(self._witness.cut(to, frame, 0)[0])
                fixed = data.find(self._witness.port.gid)
                for _ in range(rng.randrange(1, 9)):
                    at = rng.randrange(len(data))
                    if not fixed <= at < fixed + 16:
                        data[at] = rng.randrange(256)
                out.append(bytes(data[: rng.choice((len(data), rng.randrange(1, len(data))))]))
            self._witness.port.send_datagrams(to, out)
            self.probe(address)
        return count

    def frame_noise(self, peer: int, count: int) -> str:
        """Send frames with random bodies in the session, until its end; says how that came."""
        session, rng = self._peer(peer).up(), self._rng
        head = {"magic": 0xFAB1, "version": 1, "session": session.theirs}
        for _ in range(count):
            body = rng.randbytes(rng.choice((0, 4, 8, 12, 16, rng.randrange(600))))
            kind = rng.choice([1, 2, 3, 4, 5, 7, 8, 10, 12, 13, 14, 15, 16, rng.randrange(256)])
            values = {**head, "type": kind, "length": HEADER.size + len(body)}
            if kind in (6, 9, 11):  # an end, or one that voids what others count
                continue
            end = session.send_bytes(HEADER.pack(values) + body)
            self._witness.pump()
            if end != "success" or session.state != "up":
                return f"{end}, {session.state}"
        return "success"


def unhex(values: Values | None) -> Values:
    """Return fields with texts turned into bytes."""
    items = (values or {}).items()
    return {key: bytes.fromhex(v) if isinstance(v, str) else v for key, v in items}


def run_command(commands: Commands, line: bytes) -> Values:
    """Run one command; an error is a result, too."""
    try:
        request = json.loads(line)
        name = request.pop("do")
        if name.startswith("_") or not hasattr(commands, name):
            raise LookupError(f"no command {name}")
        return {"ok": plain(getattr(commands, name)(**request))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def serve(commands: Commands, witness: Witness, source: int) -> None:
    """Run commands from a file descriptor until it ends; answer engines all the while."""
    waiting, trouble = b"", ""
    while True:
        try:
            witness.pump()
        except Exception:
            trouble = trouble or traceback.format_exc()
        if select.select([source], [], [], IDLE_SECONDS)[0]:
            data = os.read(source, 1 << 20)
            if not data:
                return
            waiting += data
        *lines, waiting = waiting.split(b"\n")
        for line in lines:
            result = run_command(commands, line)
            if trouble:
                result, trouble = {"error": "between commands", "trace": trouble}, ""
            print(json.dumps(result), flush=True)


def leave() -> None:
    """End without destructors: pyverbs runs them in an order in which they fail."""
    sys.stdout.flush()
    os._exit(0)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [name for name, _ in inspect.getmembers(Commands, inspect.isfunction)]
    parser = argparse.ArgumentParser(
        prog="witness.py",
        description=__doc__,
        epilog=f"commands of serve: {', '.join(n for n in names if n[0] != '_')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="rxe1", help="RDMA device (default: rxe1)")
    parser.add_argument("--gid-index", type=int, default=1, help="of its port 1 (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default: 1)")
    parser.add_argument(
        "what", choices=("serve", "decode", "greet"), help="decode and greet need ADDRESS"
    )
    parser.add_argument("address", nargs="?", help="for decode and greet: fab1....")
    result = parser.parse_args()
    if result.what != "serve" and not result.address:
        parser.error(f"{result.what} needs an address")
    return result


def main() -> None:
    """Decode an address, greet an engine, or serve a test."""
    faulthandler.enable()
    options = arguments()
    if options.what == "decode":
        try:
            print(json.dumps(plain(read_address(options.address)), indent=2))
        except (BadBytes, ValueError, IndexError, struct.error) as error:
            sys.exit(f"not an address: {error}")
        return
    from .witness_nic import Port
    from .witness_peer import Witness

    rng = random.Random(options.seed)
    witness = Witness(Port(options.device, options.gid_index, rng), rng)
    commands = Commands(witness, rng)
    if options.what == "serve":
        serve(commands, witness, sys.stdin.fileno())
        leave()
    engine = read_address(options.address)
    peer = witness.peers[commands.peer()["peer"]]
    session = peer.connect(engine, 1, ANSWER_SECONDS)
    print(json.dumps(plain(commands.state(0)), indent=2))
    if session.state == "up":
        begin = time.monotonic()
        session.send("PING", stamp=4711)
        peer.await_frame("PONG")
        print(f"PONG after {(time.monotonic() - begin) * 1e3:.1f} ms")
        commands.bye(0)
    leave()


if __name__ == "__main__":
    main()
