"""First inputs for the fuzz targets of native/fuzz: `python -m tests.fuzz_seeds FOLDER`.

They are written anew each time, from what the targets read: a frame of every type with a body of
the right length, alone and one after the other; first frames; addresses and descriptors.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

KINDS = range(3)  # of the simulated world
FRAME, RAW, WRITE, WRITE_OUT, SEND, RECEIVE, CANCEL, DEREGISTER, TIME = range(9)
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
    "GRANT_REQ": (13, struct.pack("<QQ", 1 << 32 | 1, 7)),
    "GRANT": (14, struct.pack("<QQIIQI", 1 << 32 | 1, 7, 0, 0, 4096, 0)),
    "QUIESCE": (15, struct.pack("<Q", 1 << 32 | 1)),
    "QUIESCED": (16, struct.pack("<Q", 1 << 32 | 1)),
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


def contacts(rng: random.Random) -> list[bytes]:
    """Return inputs of fuzz_contact."""
    result = []
    for how in range(32):
        for lanes in range(4):
            body = bytes(rng.randrange(256) for _ in range(200))
            foreign = bytes([0, rng.randrange(2), 7]) + struct.pack("<H", len(body)) + body
            good = bytes([1, 5, 0, 1, lanes, 0]) + struct.pack("<Q", 10**9) + bytes([0, 0])
            lane = bytes([0, 0, 1]) + bytes(8) + bytes([0])
            steps = [foreign, good + lanes * lane + b"\0", b"\2", b"\3\7"]
            rng.shuffle(steps)
            result.append(bytes([how]) + b"".join(steps))
    return result


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
    ):
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(inputs):
            (folder / f"seed-{number:03}").write_bytes(content)


if __name__ == "__main__":
    main()
