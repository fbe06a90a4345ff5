"""First inputs for the fuzz targets of native/fuzz: `python -m tests.fuzz_seeds FOLDER`.

They are written anew each time, from what the targets read: a frame of every type with a body of
the right length, alone and one after the other; first frames and answers to them; addresses and
descriptors; what the providers read before the core does.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

KINDS = range(3)  # of the simulated world
(
    FRAME, RAW, WRITE, WRITE_OUT, SEND, RECEIVE, CANCEL, DEREGISTER, TIME, FITTING, NIC, ASK,
) = range(12)  # fmt: skip
BLOB = 64
# The frame's number, and a body of the length that native/core/session.c expects.
BODIES: dict[str, tuple[int, bytes]] = {
    "READY": (4, b""),
    "BYE": (6, struct.pack("<IH", 5, 4) + b"text"),
    "PING": (7, bytes(8)),
    "PONG": (8, bytes(8)),
    "MESSAGE": (9, struct.pack("<III", 0, 8, 0) + b"12345678"),
    "ACK": (10, struct.pack("<II", 0, 99)),
    "VOID": (11, struct.pack("<IIII", 0, 2, 1, 1 << 27)),
    "VOIDED": (12, bytes(4)),
    "GRANT_REQ": (13, struct.pack("<QQI", 1 << 32 | 1, 7, 1)),
    "GRANT": (14, struct.pack("<QQIIIQI", 1 << 32 | 1, 7, 1, 0, 0, 4096, 0)),
    "QUIESCE": (15, struct.pack("<QI", 1 << 32 | 1, 1)),
    "QUIESCED": (16, struct.pack("<QI", 1 << 32 | 1, 1)),
    "LANE_DOWN": (17, struct.pack("<II", 1, 0)),
    "LANE_OPEN": (18, struct.pack("<III", 1, 1, 12) + bytes(BLOB)),
    "LANE_OPENED": (19, struct.pack("<III", 1, 1, 12) + bytes(BLOB)),
    "LANE_READY": (20, struct.pack("<II", 1, 0)),
    "LANE_WANTED": (21, struct.pack("<II", 1, 0)),
    "LANE_PROBE": (22, struct.pack("<II", 1, 0)),
    "HELLO": (1, bytes(300)),
    "CHALLENGE": (2, bytes(64)),
    "WELCOME": (3, bytes(300)),
    "REFUSE": (5, bytes(40)),
}
WORK = (
    bytes([WRITE]),
    bytes([WRITE_OUT, 1, 0, 200, 0]),
    bytes([SEND, 9]),
    bytes([RECEIVE]),
    bytes([CANCEL]),
    bytes([DEREGISTER]),
    bytes([TIME, 5]),
    bytes([RAW, 4]) + b"\xb1\xfa\x01\x07",
    *(bytes([ASK, 1, FITTING, 4 << 2 | 1, how]) + bytes(4) for how in range(0, 64, 3)),
    bytes([NIC, 0]),
    bytes([NIC, 1]),
    *(bytes([FITTING, kind << 2 | side]) + bytes(4) for kind in range(12) for side in range(4)),
    *(bytes([FITTING, side, how]) + b"\x50\x20" + bytes(4) for how in range(32) for side in (0, 1)),
)


def frame(name: str, choice: int) -> bytes:
    """Return the step that gives a frame to one side, over one lane."""
    number, body = BODIES[name]
    return struct.pack("<BBBH", FRAME, choice, number, len(body)) + body


def sessions(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_session."""
    alone = [
        bytes([kind]) + frame(name, choice) + bytes([TIME, 5])
        for kind in KINDS
        for name in BODIES
        for choice in range(4)
    ]
    mixed = []
    for _ in range(100):
        steps = [rng.choice(WORK) for _ in range(12)]
        steps += [frame(rng.choice(list(BODIES)), rng.randrange(4)) for _ in range(12)]
        rng.shuffle(steps)
        mixed.append(bytes([rng.randrange(3)]) + b"".join(steps))
    return alone + mixed


def greeting(how: int = 0, extra: bytes = b"", lanes: int = 2) -> bytes:
    """Return what fuzz_greet() reads: a HELLO or WELCOME with nothing replaced but by `how`."""
    return bytes([how]) + extra + lanes * bytes([0, 1]) + b"\0"


def contacts(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_contact."""
    result = []
    for how in range(64):
        for lanes in range(4):
            body = rng.randbytes(200)
            foreign = bytes([0, rng.randrange(2), 7]) + struct.pack("<H", len(body)) + body
            good = b"\1" + greeting(16, bytes([lanes]), lanes) + b"\0"
            steps = [foreign, good, b"\1" + greeting() + b"\0", b"\2", b"\3\1", b"\4\7"]
            rng.shuffle(steps)
            result.append(bytes([how]) + b"".join(steps))
    return result


def answers(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_answer."""
    welcome = bytes([0, 0]) + greeting()
    challenge = bytes([1, 0, 0]) + bytes(64)
    refuse = bytes([2, 0, 0]) + bytes(64)
    hello = bytes([3, 0]) + greeting()
    ready = bytes([4, 0, BODIES["READY"][0], 0])
    steps = [welcome, challenge, refuse, hello, ready, b"\5", b"\6", b"\7\7"]
    result = [bytes([how]) + step + b"\7\7" for how in range(16) for step in steps]
    for _ in range(50):
        chosen = [welcome, *(rng.choice(steps) for _ in range(10))]
        rng.shuffle(chosen)
        result.append(bytes([rng.randrange(16)]) + challenge + b"".join(chosen))
    return result


def datagrams(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_verbs: frames cut into several datagrams, and blobs."""
    result = [bytes([0, 0]) + rng.randbytes(60) for _ in range(10)]
    for count in (1, 2, 5, 32):
        for length in (100, 1025, 4351, 4352, 4400):
            numbers = rng.sample(range(count), count)
            who = rng.randrange(32)
            result.append(
                b"".join(
                    struct.pack("<BBBHBBB", 1, 0, who, length, count - 1, number, 1)
                    for number in numbers
                )
            )
    return result


def libfabric(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_ofi."""
    return [bytes([how]) + rng.randbytes(200) for how in range(64)]


def neighbours(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_local: a stranger that is let in, and then does this and that."""
    note, frame, imm, pull, answer, scribble, post, poll, admit, say = range(10)
    setup, reads, map_ = 1, 2, 3
    come_in = bytes([note, setup, 0, 0, frame, 1]) + bytes(14) + bytes([0, poll, poll])
    come_in += bytes([admit, 1, poll, note, reads, 0, 0, 0, poll])
    mapping = bytes([note, map_, 0, 5, 0, poll])
    steps = [
        mapping,
        bytes([imm, 1, poll]),
        bytes([pull, 0, 1, 1, 7, 0, 0, 0, 5]) + struct.pack("<HHH", 0, 8, 100) + bytes([poll]),
        bytes([pull, 1, 1, 0, 7, 0, 0, 0, 5]) + struct.pack("<HHH", 0, 8, 100) + bytes([poll]),
        bytes([post, 100, 1, 7, 1, poll]),
        bytes([post, 0, 0, 7, 1, poll]),
        bytes([answer, 4, 1, poll]),
        bytes([scribble, 1, 1, 16]) + struct.pack("<I", 1) + bytes([poll]),
        bytes([frame, 1]) + bytes(14) + bytes([0, poll]),
        bytes([note, 4, 0, 5, 0, poll]),
        bytes([say, 8, poll]),
    ]
    dialled = come_in[:6] + bytes([poll, note, reads, 0, 0, 0, poll])
    for how in range(32):
        odd = struct.pack("<HHH", rng.randrange(1 << 16), rng.randrange(4200), rng.randrange(4200))
        head = bytes([pull, how, 1, 1, 7, 0, 0, 0, 5])
        steps.append(head + odd + rng.randbytes(8 * (how & 14).bit_count() + 1) + bytes([poll]))
    result = [bytes([0]) + come_in + mapping + step for step in steps]
    for way in range(6):
        begin = bytes([way]) + (dialled if way & 4 else come_in)
        result += [begin + b"".join(rng.choice(steps) for _ in range(20)) for _ in range(10)]
    return [*result, come_in[:40], bytes([0, frame, 1]) + bytes(15)]


def addresses(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_address."""
    return [
        bytes([how]) + bytes(rng.choice([0, 0, 1, 255, rng.randrange(256)]) for _ in range(60))
        for how in range(16)
        for _ in range(10)
    ]


def main() -> None:
    """Write a folder of inputs for each target."""
    rng = random.Random(1)
    for name, inputs in (
        ("fuzz_session", sessions(rng)),
        ("fuzz_contact", contacts(rng)),
        ("fuzz_address", addresses(rng)),
        ("fuzz_answer", answers(rng)),
        ("fuzz_verbs", datagrams(rng)),
        ("fuzz_ofi", libfabric(rng)),
        ("fuzz_local", neighbours(rng)),
    ):
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(inputs):
            (folder / f"seed-{number:03}").write_bytes(content)


if __name__ == "__main__":
    main()
