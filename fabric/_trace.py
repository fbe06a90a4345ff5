"""Traces: the lives of transfers, in the JSON that Perfetto and chrome://tracing open."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import heapq
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._env import TRACE
from ._errors import CLASSES, check, text_of
from ._native import ffi, lib
from ._stats import LANE_STATES, OPS

if TYPE_CHECKING:
    from ._core import Core

log = logging.getLogger("fabric")

EVENTS = 131_072
"""Events that a trace keeps by default; a transfer takes four."""
_CHUNK = 4096
_TRACKS = 100_000  # thread numbers of one engine
_HEAD = b'{"displayTimeUnit":"ns","traceEvents":[\n'
_TAIL = b"\n]}\n"
_engines = itertools.count(1)

Event = dict[str, Any]


class Fact(NamedTuple):
    """An event as the C core tells it, see ``fab_trace_event``."""

    time: int
    transfer: int
    parent: int
    imm: int
    bytes: int
    ranges: int
    what: int
    op: int
    code: int
    lane: int
    name: str
    text: str


_NUMBERS = Fact._fields[:-2]


@dataclass
class _Life:
    """What is known of one transfer: when what happened, and its name."""

    name: str
    peer: str
    args: Event
    times: dict[int, int] = field(default_factory=dict)
    end: int = 0
    ended: bool = False

    @property
    def begin(self) -> int:
        """The first time that is known: older events may have made room."""
        return min(self.times.values())

    def phases(self) -> list[tuple[str, int, int]]:
        """Return name, begin and end of what it went through, in order and without gaps."""
        steps = (
            (lib.FAB_TRACE_SUBMIT, "waits"),
            (lib.FAB_TRACE_POST, "is posted"),
            (lib.FAB_TRACE_POSTED, "in flight"),
            (lib.FAB_TRACE_DRAIN, "drains"),
        )
        known = [(name, self.times[what]) for what, name in steps if what in self.times]
        if not self.peer:
            return []  # a scatter to several: its parts have them
        ends = [at for _, at in known[1:]] + [self.end]
        return [(name, at, end) for (name, at), end in zip(known, ends, strict=True)]


def begin(core: Core, events: int) -> None:
    """Begin to trace an engine.

    Raises:
        InvalidArgument: a bad number of events, or it is traced already.
    """
    check(lib.fab_trace_begin(core.ptr, events))


def take(core: Core) -> tuple[list[Fact], int]:
    """Take all events, and end the trace; returns them and how many older ones were lost."""
    result: list[Fact] = []
    out, lost = ffi.new("fab_trace_event[]", _CHUNK), ffi.new("uint64_t *")
    total, count = 0, _CHUNK
    while count == _CHUNK:
        count = check(lib.fab_trace_read(core.ptr, out, _CHUNK, lost))
        total += lost[0]
        for event in out[0:count]:
            numbers = [getattr(event, name) for name in _NUMBERS]
            result.append(Fact._make([*numbers, text_of(event.name), text_of(event.text)]))
    check(lib.fab_trace_end(core.ptr))
    return result, total


def to_json(label: str, events: list[Fact], lost: int, now: int) -> list[Event]:
    """Return the trace events of one engine; at `now`, in ns, what has not ended is cut off."""
    base = next(_engines) * _TRACKS
    tracks = _Tracks(os.getpid(), base, label)
    lives = _lives(events, now)
    for (peer, _), row in sorted(_rows(lives).items()):
        track = tracks.new(f"{label} to {peer}" if peer else f"{label} to several")
        for life in row:
            tracks.slice(track, life)
    instants = tracks.new(f"{label}: peers, lanes, counters")
    if lost:
        first = min((event.time for event in events), default=now)
        tracks.instant(instants, f"{lost} older events had no room", first, {"lost": lost})
    for event in sorted(events, key=lambda event: event.time):
        if not event.transfer:
            tracks.instant(instants, *_note(event))
    return tracks.events


class _Tracks:
    """The rows of one engine in the viewer: threads of this process."""

    def __init__(self, pid: int, base: int, label: str) -> None:
        self._pid = pid
        self._next = base
        self.events: list[Event] = []
        self._add("M", base, name="process_name", args={"name": f"{label} [{pid}]"})

    def _add(self, phase: str, track: int, **rest: Any) -> None:
        self.events.append({"ph": phase, "pid": self._pid, "tid": track, **rest})

    def new(self, name: str) -> int:
        """Return another track."""
        self._next += 1
        self._add("M", self._next, name="thread_name", args={"name": name})
        self._add("M", self._next, name="thread_sort_index", args={"sort_index": self._next})
        return self._next

    def slice(self, track: int, life: _Life) -> None:
        """Draw a transfer, and its phases inside of it."""
        self._add("B", track, ts=life.begin / 1e3, name=life.name, cat="transfer", args=life.args)
        for name, at, end in life.phases():
            self._add("B", track, ts=at / 1e3, name=name, cat="phase")
            self._add("E", track, ts=end / 1e3)
        self._add("E", track, ts=life.end / 1e3)

    def instant(self, track: int, name: str, at: int, args: Event) -> None:
        """Draw a mark."""
        self._add("i", track, ts=at / 1e3, name=name, s="t", cat="engine", args=args)


def _lives(events: list[Fact], now: int) -> list[_Life]:
    """Return the transfers that the events tell of, by begin."""
    lives: dict[int, _Life] = {}
    for event in events:
        if not event.transfer:
            continue
        life = lives.get(event.transfer)
        if life is None:
            life = lives[event.transfer] = _new_life(event)
        life.times.setdefault(event.what, event.time)
        life.end = max(life.end, event.time)
        if event.what == lib.FAB_TRACE_END:
            life.ended = True
            kind = CLASSES.get(event.code)
            life.args["status"] = kind.__name__ if kind is not None else "done"
            life.args["acknowledged"] = event.ranges
        if event.text:
            life.args["why"] = event.text
    for life in lives.values():
        if not life.ended:
            life.args["status"] = "unfinished"
            life.end = max(life.end, now)
    return sorted(lives.values(), key=lambda life: (life.begin, -life.end))


def _new_life(event: Fact) -> _Life:
    part = "part of " if event.parent else ""
    size = f" {event.bytes} B" if event.bytes else ""
    args: Event = {"transfer": f"{event.transfer:#x}", "peer": event.name}
    args["ranges"] = event.ranges
    if event.parent:
        args["parent"] = f"{event.parent:#x}"
    if event.imm != lib.FAB_NO_IMM:
        args["imm"] = f"{event.imm:#x}"
    return _Life(f"{part}{OPS[event.op]}{size}", event.name, args)


def _rows(lives: list[_Life]) -> dict[tuple[str, int], list[_Life]]:
    """Lay the transfers out so that those of one row follow each other: the viewer needs that."""
    rows: dict[tuple[str, int], list[_Life]] = collections.defaultdict(list)
    ends: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # heaps: end, row
    for life in lives:
        heap = ends[life.peer]
        row = heapq.heappop(heap)[1] if heap and heap[0][0] <= life.begin else len(heap)
        heapq.heappush(heap, (life.end, row))
        rows[life.peer, row].append(life)
    return rows


def _note(event: Fact) -> tuple[str, int, Event]:
    """Return name, time and details of what is not about a transfer."""
    peer = event.name
    args: Event = {"peer": peer, "why": event.text}
    if event.what == lib.FAB_TRACE_LANE:
        state = LANE_STATES.get(event.code, str(event.code))
        return f"{peer}: lane {event.lane} {state}", event.time, {**args, "lane": event.lane}
    if event.what == lib.FAB_TRACE_COUNT:
        args = {"imm": f"{event.imm:#x}", "target": event.ranges}
        return f"counter {event.imm:#x} reached {event.ranges}", event.time, args
    return f"{peer}: {'up' if event.what == lib.FAB_TRACE_UP else 'lost'}", event.time, args


def save(path: str | os.PathLike[str], events: list[Event], *, anew: bool) -> None:
    """Write events to a file, or add them to those that are there.

    Raises:
        ValueError: it is to be added to a file that is no trace.
    """
    text = b",\n".join(json.dumps(event, separators=(",", ":")).encode() for event in events)
    with Path(path).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # engines of other processes write the same one
        if anew:
            file.truncate(0)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(max(0, size - len(_TAIL)))
            if file.read() != _TAIL:
                raise ValueError(f"{os.fspath(path)} is not a trace of this library")
            file.truncate(size - len(_TAIL))
        file.write((b",\n" if size else _HEAD) + text + _TAIL)


def begin_by_environment(core: Core) -> bool:
    """Trace the engine if FABRIC_TRACE says so; returns whether it does."""
    if not TRACE.value:
        return False
    begin(core, EVENTS)
    return True


def _is_of_another_run(path: Path) -> bool:
    """Return whether nobody has written to the file since this process was started."""
    if not path.exists():
        return True
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.time() - path.stat().st_mtime > age


def end_by_environment(core: Core) -> None:
    """Write the trace of a closed engine where FABRIC_TRACE says; a failure is only told."""
    path = TRACE.value or ""
    try:
        events, lost = take(core)
        stale = _is_of_another_run(Path(path))
        label = core.address.label
        save(path, to_json(label, events, lost, lib.fab_time_ns()), anew=stale)
        if lost:
            _say(f"{path}: the trace of {label} lacks its first {lost} events")
    except Exception as error:
        _say(f"{path}: the trace was not written: {error}")


def _say(text: str) -> None:
    """Tell whoever set the variable; the program may know nothing of it, nor have a log."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"FABRIC_TRACE={text}", file=sys.stderr)


@contextlib.contextmanager
def traced(core: Core, path: str | os.PathLike[str], events: int) -> Iterator[None]:
    """Trace an engine for a while; see `TransferEngine.trace`."""
    core.check_open()
    begin(core, events)
    try:
        yield
    finally:
        taken, lost = take(core)
        save(path, to_json(core.address.label, taken, lost, lib.fab_time_ns()), anew=True)
        if lost:
            log.warning("%s: the trace lacks its first %d events", os.fspath(path), lost)
