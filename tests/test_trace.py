"""Traces: JSON that Perfetto opens, of what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

import fabric
from fabric import sim

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 16
PATIENT = 30.0
Event = dict[str, Any]


def descriptor(region: fabric.MemoryRegion) -> fabric.Descriptor:
    """Return a descriptor as a peer gets it."""
    return fabric.Descriptor.from_bytes(bytes(region.descriptor))


def read(path: Path) -> list[Event]:
    """Return the events of a trace, after checking what viewers rely on."""
    events: list[Event] = json.loads(path.read_text())["traceEvents"]
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    for event in events:
        track = event["pid"], event["tid"]
        if event["ph"] != "M":
            tracks[track].append(event)
        elif event["name"] == "thread_name":
            assert track not in named
            named.add(track)
    assert set(tracks) <= named
    for row in tracks.values():
        times = [event["ts"] for event in row]
        assert times == sorted(times)
        depth = 0
        for event in row:
            assert event["ph"] in "BEi"
            depth += {"B": 1, "E": -1, "i": 0}[event["ph"]]
            assert 0 <= depth <= 2
        assert depth == 0
    return events


def names(events: list[Event], phase: str) -> list[str]:
    """Return the names of all slices (B), marks (i) or metadata (M)."""
    return [event["name"] for event in events if event["ph"] == phase]


def of(events: list[Event], name: str) -> list[Event]:
    """Return what a transfer of this name tells of itself."""
    return [event["args"] for event in events if event["ph"] == "B" and event["name"] == name]


def test_the_life_of_transfers(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with sim.World(1, kind="ordered") as world:
        a, b = world.engine("a", 2), world.engine("b", 2)
        source, target, count = a.alloc(SIZE), b.alloc(SIZE), b.counter()
        d = descriptor(target)
        with a.trace(path):
            a.write(source, d, imm=count.id).wait(timeout=PATIENT)
            transfers = [a.write(source, d, length=8) for _ in range(20)]
            transfers.append(a.scatter(source, [(d, 0, 0, 8), (d, 8, 8, 8)]))
            transfers.append(a.send(b.address, b"hello"))
            for transfer in transfers:
                transfer.wait(timeout=PATIENT)
            world.link("a.1", up=False)
            world.run(0.1)
            world.set(lost_writes=1.0)
            with pytest.raises(fabric.TransferFailed):
                a.write(source, d, length=100).wait(timeout=PATIENT)
        a.stats()
    events = read(path)
    slices = names(events, "B")
    assert slices.count("write 8 B") == 20
    assert slices.count("part of scatter 8 B") == 2
    assert slices.count("scatter 16 B") == slices.count("message 5 B") == 1
    first = of(events, f"write {SIZE} B")[0]
    assert first["peer"] == "b"
    assert first["status"] == "done"
    assert first["ranges"] == first["acknowledged"] == 1
    assert first["imm"] == f"{count.id:#x}"
    failed = of(events, "write 100 B")[0]
    assert failed["status"] in ("TransferFailed", "PeerUnreachable")
    assert failed["why"]
    assert {"waits", "is posted", "in flight", "drains"} <= set(slices)
    marks = names(events, "i")
    assert {"b: up", "b: lane 0 up", "b: lane 1 up", "b: lane 1 lost"} <= set(marks)
    tracks = {event["args"].get("name") for event in events if event["ph"] == "M"}
    assert {f"a [{os.getpid()}]", "a to b", "a: peers, lanes, counters"} <= tracks


def test_counters_and_what_is_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with sim.World(1) as world:
        a, b = world.engine("a"), world.engine("b")
        source, d, count = a.alloc(SIZE), descriptor(b.alloc(SIZE)), b.counter()
        with b.trace(path):
            a.write_imm(b.address, count.id).wait(timeout=PATIENT)
            count.wait(1, timeout=PATIENT)
        assert f"counter {count.id:#x} reached 1" in names(read(path), "i")
        world.hang("b")
        with a.trace(path):
            transfer = a.write(source, d)
            world.run(0.1)
        assert of(read(path), f"write {SIZE} B")[0]["status"] == "unfinished"
        world.resume("b")
        transfer.wait(timeout=PATIENT)


def test_a_full_trace_keeps_the_last_events_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with fabric.TransferEngine("local") as a, fabric.TransferEngine("local") as b:
        source, d = a.alloc(SIZE), b.alloc(SIZE).descriptor
        a.write(source, d).wait(timeout=PATIENT)
        with a.trace(path, events=42):
            for length in range(1, 101):
                a.write(source, d, length=length).wait(timeout=PATIENT)
    events = read(path)
    assert "358 older events had no room" in names(events, "i")
    assert "write 100 B" in names(events, "B")
    assert "write 50 B" not in names(events, "B")


def test_wrong_calls(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with fabric.TransferEngine("local") as a:
        for wrong in (0, 1 << 21, "many"):
            with pytest.raises(fabric.InvalidArgument, match="events"):
                a.trace(path, events=wrong)  # type: ignore[arg-type]
        with (
            a.trace(path),
            pytest.raises(fabric.InvalidArgument, match="already"),
            a.trace(path),
        ):
            pass
        with a.trace(path):
            pass
    with pytest.raises(fabric.EngineClosed), a.trace(path):
        pass
    assert read(path)  # what names the tracks


PROGRAM = """
import sys, fabric
with fabric.TransferEngine("local", label="a") as a, fabric.TransferEngine("local", label="b") as b:
    a.write(a.alloc(4096), b.alloc(4096).descriptor, length=int(sys.argv[1])).wait(timeout=10.0)
"""


def program(path: Path, length: int) -> subprocess.Popen[str]:
    """Start a process that is traced by its environment."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(length)],
        env={"FABRIC_TRACE": str(path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_engines_and_processes_share_the_file_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("of another day")
    os.utime(path, (1, 1))
    both = [program(path, length) for length in (8, 16)]
    assert [process.communicate(timeout=60)[1] for process in both] == ["", ""]
    events = read(path)
    slices = names(events, "B")
    assert slices.count("write 8 B") == slices.count("write 16 B") == 1
    assert {event["pid"] for event in events} == {process.pid for process in both}
    marks = names(events, "i")
    assert marks.count("b: up") == marks.count("a: up") == 2
    assert marks.count("b: lost") == 2  # closing is part of it


def test_a_file_that_is_no_trace_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("of today")
    os.utime(path, (1 << 33, 1 << 33))
    said = program(path, 8).communicate(timeout=60)[1]
    assert "is not a trace" in said
    assert path.read_text() == "of today"
