"""The project's own targets: ratios to baselines that ran in turns with us, and bounds on costs.

`make bench` prints each beside what it is to be, and fails where one is missed by more than 5 %. It
is not part of CI: it wants a machine that does nothing else.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import closing

from .._errors import FabricError
from .._nics import list_nics
from ._case import Case
from ._costs import COSTS, Rig
from ._ends import Set
from ._loopback import Loopback
from ._perftest import WriteBandwidth
from ._program import Program, mock_nic, raw
from ._report import Progress, header
from ._result import Result, median

PAIRS = 9
SLICE_SECONDS = 0.2
TOLERANCE = 0.05
COLD = 1 << 28
CROWD = {"local": 256, "sim": 255}
"""Peers of one engine, where it has many; a simulated world has 256 NICs, the writer's included."""
FEW = 2
NAMES = 58
"""Width of the column of names."""
NIC_SECONDS = 1.0
"""Of a run beside perftest, which takes long to start."""
MESSAGES = 1024
MIB = 1 << 20
KIB = 1 << 10


Run = Callable[[float], Result]
"""Runs a contender for so many seconds."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One line: what is compared with what, and what it must reach.

    Args:
        name: for people.
        unit: of both values; "x" for a ratio.
        bound: at least this where `more`, else at most.
        measure: returns the values whose median counts.
    """

    name: str
    unit: str
    bound: float
    more: bool
    measure: Callable[[], list[float]]

    def met(self, value: float) -> bool:
        """Return whether the value is good enough, within the tolerance."""
        if self.more:
            return value >= self.bound * (1 - TOLERANCE)
        return value <= self.bound * (1 + TOLERANCE)


def check_targets(provider: str) -> int:
    """Measure all targets and print them; returns the exit status.

    Args:
        provider: "verbs" for those of two NICs of this machine; else those that need no NIC.
    """
    on_nics = provider == "verbs"
    facts = header(*(("verbs", "targets") if on_nics else ("tcp", "targets, on local and tcp")))
    for name, value in facts.items():
        if value:
            print(f"# {name}: {value}")
    print(f"{'target':<{NAMES}}{'measured':>12}{'wanted':>14}  result")
    missed = 0
    progress = Progress()
    try:
        for target in verbs_targets() if on_nics else all_targets():
            progress.show(target.name)
            missed += not _check(target, progress)
    except KeyboardInterrupt:
        return 130
    print(f"{missed} missed" if missed else "all targets met")
    return 1 if missed else 0


def all_targets() -> Iterator[Target]:
    """Return all of them, in the order in which they are checked."""
    yield from bandwidth_targets()
    yield from latency_targets()
    yield from crowd_targets()
    yield from cost_targets()


def _check(target: Target, progress: Progress) -> bool:
    try:
        value = median(target.measure())
    except FabricError as error:
        progress.show("")
        print(f"{target.name:<{NAMES}}{'-':>12}{'':>14}  not measured: {error}")
        return False
    progress.show("")
    good = target.met(value)
    wanted = f"{'>=' if target.more else '<='} {target.bound:g} {target.unit}"
    verdict = "ok" if good else "MISSED"
    print(f"{target.name:<{NAMES}}{value:>9.3f} {target.unit:<2}{wanted:>14}  {verdict}")
    sys.stdout.flush()
    return good


# ---- against baselines ----


def _ratios(
    case: Case,
    provider: str,
    baseline: Callable[[], Program],
    value: Callable[[Result], float],
    foreign: bool = False,
) -> list[float]:
    """Run ours and a baseline in turns; returns ours divided by the baseline's for each pair."""
    near = Set(provider)
    far = dataclasses.replace(near, foreign=foreign)
    with closing(Loopback(near, far)) as ours, closing(baseline()) as theirs:
        ours.set_up(case)
        return in_turns(ours.run, theirs.run, value)


def in_turns(
    ours: Run,
    theirs: Run,
    value: Callable[[Result], float],
    seconds: float = SLICE_SECONDS,
) -> list[float]:
    """Run both by turns; returns ours divided by theirs for each pair."""
    ours(seconds)
    theirs(seconds)
    ratios = []
    for turn in range(PAIRS):
        if turn % 2:
            b = value(theirs(seconds))
            a = value(ours(seconds))
        else:
            a = value(ours(seconds))
            b = value(theirs(seconds))
        ratios.append(a / b)
    return ratios


def _bandwidth(one: Result) -> float:
    return one.gbps


def _latency(one: Result) -> float:
    return one.p50_us or 0.0


def _against_memcpy(name: str, case: Case, bound: float, foreign: bool = False) -> Target:
    op = "pages" if case.op == "pages" else "write"

    def measure() -> list[float]:
        def baseline() -> Program:
            return raw("memcpy", op, case.nbytes, pages=case.call_pages, walk=case.size)

        return _ratios(case, "local", baseline, _bandwidth, foreign)

    return Target(f"local, {name}, to memcpy", "x", bound, True, measure)


def _against_libfabric(name: str, case: Case, delivery: bool) -> Target:
    op = "pages" if case.op == "pages" else "write"

    def measure() -> list[float]:
        def baseline() -> Program:
            return raw(
                "ofi",
                op,
                case.nbytes,
                pages=case.call_pages,
                walk=case.size,
                window=case.window,
                provider="tcp",
                delivery=delivery,
            )

        return _ratios(case, "tcp", baseline, _bandwidth)

    complete = "delivered" if delivery else "transmitted"
    return Target(f"tcp, {name}, to libfabric ({complete})", "x", 0.95, True, measure)


def bandwidth_targets() -> Iterator[Target]:
    """Return the targets for bandwidth, in the order of the issue that set them."""
    yield _against_memcpy("1 MiB, cold", Case("write", MIB, walk=COLD), 1.2)
    yield _against_memcpy("1 MiB, hot", Case("write", MIB), 0.9)
    for size, cold, hot in ((16, 1.1, 0.85), (64, 1.25, 0.9)):
        nbytes = size * KIB
        walk = max(COLD, 4 * 1024 * nbytes)
        name = f"1024 pages of {size} KiB"
        yield _against_memcpy(f"{name}, cold", Case("pages", nbytes, 1024, walk=walk), cold)
        yield _against_memcpy(f"{name}, hot", Case("pages", nbytes, 1024), hot)
    yield _against_memcpy(
        "1 MiB, cold, foreign destination", Case("write", MIB, walk=COLD), 0.6, foreign=True
    )
    for delivery in (False, True):
        yield _against_libfabric("64 KiB", Case("write", 64 * KIB, window=16), delivery)
        yield _against_libfabric("1 MiB", Case("write", MIB, window=16), delivery)
        yield _against_libfabric(
            "1024 pages of 16 KiB", Case("pages", 16 * KIB, 1024, window=1), delivery
        )


# ---- latency ----


def _round_trip(near: Set, far: Set, part: str) -> list[float]:
    with closing(Loopback(near, far)) as loopback:
        loopback.set_up(Case("latency", 8))
        loopback.run(SLICE_SECONDS)
        return [getattr(loopback.run(SLICE_SECONDS), part) or 0.0 for _ in range(PAIRS)]


def _c_round_trip(cpus: str) -> list[float]:
    with closing(raw("engine", "roundtrip", 8, provider="local", cpus=cpus)) as program:
        program.run(SLICE_SECONDS)
        return [program.run(SLICE_SECONDS).p50_us or 0.0 for _ in range(PAIRS)]


def _rate(op: str, pages: int) -> list[float]:
    with closing(raw("engine", op, 8, pages=pages, provider="local")) as program:
        program.run(SLICE_SECONDS)
        runs = [program.run(SLICE_SECONDS) for _ in range(PAIRS)]
        return [one.iters * pages / one.seconds / 1e6 for one in runs]


def _tcp_round_trip() -> list[float]:
    def baseline() -> Program:
        return raw("ofi", "roundtrip", 8, provider="tcp")

    return _ratios(Case("latency", 8), "tcp", baseline, _latency)


def _submit(provider: str) -> list[float]:
    """Return how long it takes from submission to the first work request, see raw_submit.c."""
    env = mock_nic() if provider == "verbs" else None
    with closing(raw("submit", "write", 8, env=env, provider=provider)) as program:
        program.run(SLICE_SECONDS)
        return [program.run(SLICE_SECONDS).p50_us or 0.0 for _ in range(PAIRS)]


def latency_targets() -> Iterator[Target]:
    """Return the targets for round trips and rates."""
    two = (Set("local", cpu=0), Set("local", cpu=1))
    one = (Set("local", cpu=0), Set("local", cpu=0))
    trip = "local, 8 B there and back"
    yield Target(f"{trip}, Python, p50", "us", 1.5, False, lambda: _round_trip(*two, "p50_us"))
    yield Target(f"{trip}, Python, p99", "us", 5.0, False, lambda: _round_trip(*two, "p99_us"))
    yield Target(f"{trip}, one core, p50", "us", 10.0, False, lambda: _round_trip(*one, "p50_us"))
    yield Target(f"{trip}, C, p50", "us", 0.6, False, lambda: _c_round_trip("0,1"))
    for provider, name in (("verbs", "verbs on a mock NIC"), ("local", "local")):

        def submit(provider: str = provider) -> list[float]:
            return _submit(provider)

        first = f"{name}, submit to first work request (C), p50"
        yield Target(first, "us", 0.5, False, submit)
    yield Target("local, immediates, one by one (C)", "M/s", 8.0, True, lambda: _rate("imm", 1))
    yield Target(
        "local, immediates, pages of 8 B (C)", "M/s", 30.0, True, lambda: _rate("pages", 1024)
    )
    yield Target("tcp, 8 B there and back, p50, to libfabric", "x", 1.2, False, _tcp_round_trip)


# ---- NICs ----


def _two_nics() -> tuple[str, str]:
    names = [nic.name for nic in list_nics("verbs")]
    return names[0], names[-1 if len(names) == 1 else 1]


def _against_perftest(
    case: Case, nbytes: int, depth: int, value: Callable[[Result], float]
) -> list[float]:
    near, far = _two_nics()
    theirs = WriteBandwidth(near, far, nbytes, depth)
    with closing(Loopback(Set("verbs", nic=near), Set("verbs", nic=far))) as ours:
        ours.set_up(case)
        theirs.run(NIC_SECONDS)  # the first run only finds out how fast it is
        return in_turns(ours.run, theirs.run, value, NIC_SECONDS)


def verbs_targets() -> Iterator[Target]:
    """Return the targets for two NICs of this machine, or one, beside perftest."""
    for name, nbytes, depth in (
        ("4 KiB", 4 * KIB, 128),
        ("64 KiB", 64 * KIB, 64),
        ("1 MiB", MIB, 16),
    ):

        def bandwidth(nbytes: int = nbytes, depth: int = depth) -> list[float]:
            case = Case("write", nbytes, window=depth)
            return _against_perftest(case, nbytes, depth, _bandwidth)

        yield Target(f"verbs, {name}, to ib_write_bw", "x", 0.95, True, bandwidth)

    def rate() -> list[float]:
        case = Case("pages", 8, MESSAGES)
        return _against_perftest(case, 8, 128, lambda one: one.nbytes / 8 / one.seconds)

    yield Target("verbs, pages of 8 B: message rate to ib_write_bw", "x", 0.9, True, rate)


# ---- many peers ----


def _crowd(provider: str, peers: int) -> Program:
    return raw("crowd", "write", 8, provider=provider, peers=peers)


def write_in_a_crowd(provider: str) -> list[float]:
    """Return what a write takes where there are many peers, divided by what it takes with few."""
    with (
        closing(_crowd(provider, CROWD[provider])) as many,
        closing(_crowd(provider, FEW)) as few,
    ):
        return in_turns(many.run, few.run, _latency)


def memory_of_peer() -> list[float]:
    """Return the KiB of memory that a peer takes which is connected and was written to once."""
    with closing(_crowd("local", CROWD["local"])) as many, closing(_crowd("local", FEW)) as few:
        more = many.resident() - few.resident()
        return [more / KIB / (CROWD["local"] - FEW)]


def crowd_targets() -> Iterator[Target]:
    """Return the targets for an engine with many peers."""
    for provider, peers in CROWD.items():

        def measure(provider: str = provider) -> list[float]:
            return write_in_a_crowd(provider)

        name = f"{provider}, write with {peers} peers, to {FEW} (C), p50"
        yield Target(name, "x", 1.1, False, measure)
    yield Target(
        "local, memory of an idle peer, without page tables", "K", 64, False, memory_of_peer
    )


# ---- costs ----


def cost_targets() -> Iterator[Target]:
    """Return the targets for what calls take."""
    for cost in COSTS:

        def measure(run: Callable[[Rig], list[float]] = cost.run) -> list[float]:
            with closing(Rig()) as rig:
                return run(rig)

        yield Target(cost.name, cost.unit, cost.bound, False, measure)
