"""``fabric bench``: client, server, or both."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .._errors import FabricError, InvalidArgument
from ._case import MAX_BYTES, OPS, ROUND_TRIPS, VERIFIED, Case
from ._client import Client
from ._ends import Set
from ._link import PORT, dial, listen
from ._loopback import Loopback
from ._program import Program, raw
from ._report import Progress, Row, header, plot, print_header, print_row, write_json
from ._result import Result
from ._server import Server
from ._targets import check_targets

SLICES = 10
"""Runs of each row, between those of the baseline."""
Run = Callable[[Case], Callable[[float, int], Result]]
"""Prepares a case; what it returns runs it for so many seconds or iterations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    ops = "; ".join(f"{name}: {meaning}" for name, meaning in OPS.items())
    parser.add_argument("host", nargs="?", help="server to measure against; none: be the server")
    parser.add_argument("--loopback", action="store_true", help="start both on this machine")
    parser.add_argument(
        "--targets",
        action="store_true",
        help="check the project's own targets; --provider verbs: those of NICs, beside perftest",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="of the server (default %(default)s)"
    )
    parser.add_argument("--op", default="write", choices=list(OPS), metavar="OP", help=ops)
    parser.add_argument("--provider", default="auto", help="as TransferEngine takes it")
    parser.add_argument("--lanes", type=int, default=0, help="NICs to open (default: its choice)")
    parser.add_argument("--minbytes", type=int, default=None, metavar="N", help="default 8")
    parser.add_argument("--maxbytes", type=int, default=None, metavar="N", help="default 8 MiB")
    parser.add_argument("--stepfactor", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--pages", type=int, default=64, metavar="N", help="of a call (default 64)")
    parser.add_argument("--window", type=int, default=1, metavar="N", help="calls under way")
    parser.add_argument(
        "--walk",
        type=int,
        default=0,
        metavar="BYTES",
        help="size of the buffers that calls go through; by default one call's, which stays in"
        " the cache",
    )
    parser.add_argument("--duration", type=float, default=1.0, metavar="SECONDS", help="of a row")
    parser.add_argument("--warmup-iters", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--spin-us", type=int, default=50, metavar="N", help="as TransferEngine")
    parser.add_argument("--foreign", action="store_true", help="server: memory not from alloc()")
    parser.add_argument("--check", action="store_true", help="verify what the server received")
    parser.add_argument("--no-baseline", action="store_true", help="run nothing beside it")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all slices")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the rows")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Do what was asked for; returns the exit status.

    Args:
        options: as `add_arguments` made them.
        parser: told what is wrong with them.
    """
    problem = _unused(options, parser) or _wrong(options)
    if problem:
        parser.error(problem)
    if options.targets:
        return check_targets(options.provider)
    try:
        settings = Set(options.provider, options.lanes, options.spin_us, foreign=options.foreign)
        if not options.host and not options.loopback:
            return _serve(settings, options.port)
        cases = _cases(options)
        with _contender(options, settings) as ours:
            return _measure(options, cases, ours)
    except InvalidArgument as error:
        parser.error(str(error))
    except FabricError as error:
        print(f"fabric bench: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


ENGINE = {"provider", "lanes", "spin_us"}
PAGED = ("pages", "scatter", "submit")


def _unused(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return what was asked for and would have no effect here."""
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    given -= {"command"}
    if options.host and options.loopback:
        return "--loopback starts the server itself: leave the host out"
    if options.targets:
        useless, where = given - {"targets", "provider"}, "--targets"
    elif options.loopback:
        useless, where = given & {"port", "host"}, "--loopback"
    elif options.host:
        useless, where = given & {"foreign", "no_baseline"}, "a client"
    else:
        useless, where = (
            given - ENGINE - {"port", "foreign"},
            "a server, which does what clients ask",
        )
    if options.op not in PAGED and "pages" in given and not useless:
        useless, where = {"pages"}, f"--op {options.op}"
    if options.op in ROUND_TRIPS and "window" in given and not useless:
        useless, where = {"window"}, f"--op {options.op}"
    if options.op not in VERIFIED and options.check and not useless:
        useless, where = {"check"}, f"--op {options.op}"
    names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
    return f"{names}: no use to {where}" if useless else None


def _wrong(options: argparse.Namespace) -> str | None:
    for name, low, high in (
        ("stepfactor", 2, 1 << 20),
        ("port", 1, 65535),
        ("lanes", 0, 32),
        ("warmup_iters", 0, 1 << 30),
        ("duration", 0.01, 86400),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            return f"--{name.replace('_', '-')} {value}: it must be from {low} to {high}"
    if options.targets and options.provider not in ("auto", "verbs"):
        return f"--provider {options.provider}: --targets takes auto (local and tcp) or verbs"
    if options.plot and options.plot.suffix != ".png":
        return f"--plot {options.plot}: the name must end in .png"
    return None


def _cases(options: argparse.Namespace) -> list[Case]:
    small = options.op in ("barrier", "imm", "latency", "submit")
    most = 8 if small else 65536 if options.op == "messages" else 8 << 20
    low = 8 if options.minbytes is None else options.minbytes
    high = max(low, most) if options.maxbytes is None else options.maxbytes
    if not 0 < low <= high <= MAX_BYTES:
        raise InvalidArgument(
            f"--minbytes {low} --maxbytes {high}: 0 < minbytes <= maxbytes <= {MAX_BYTES} is needed"
        )
    sizes = []
    while low <= high:
        sizes.append(low)
        low *= options.stepfactor
    pages = options.pages if options.op in PAGED else 1
    return [
        Case(options.op, size, pages, options.window, options.walk, options.check) for size in sizes
    ]


def _serve(settings: Set, port: int) -> int:
    with settings.open():  # what is wrong here is said now, not to the first client
        pass
    with listen(port) as listener:
        where = f"port {listener.getsockname()[1]}"
        print(f"# serving on {where}; on another machine: fabric bench HOST", flush=True)
        Server(settings).serve_forever(listener)
    return 0


@contextlib.contextmanager
def _contender(options: argparse.Namespace, settings: Set) -> Iterator[Run]:
    if options.loopback:
        near = Set(options.provider, options.lanes, options.spin_us)
        with contextlib.closing(Loopback(near, settings)) as loopback:

            def prepare(case: Case) -> Callable[[float, int], Result]:
                loopback.set_up(case)
                return loopback.run

            yield prepare
        return
    link = dial(options.host, options.port)
    clients: list[Client] = []
    try:
        with settings.open() as engine:

            def connect(case: Case) -> Callable[[float, int], Result]:
                while clients:
                    clients.pop().close()
                clients.append(Client(link, engine, case))
                return clients[-1].run

            yield connect
            link.send("bye")
    finally:
        link.close()


BASELINES = {"local": "memcpy() of one thread into shared memory", "tcp": "a loop over libfabric"}
RAW_OPS = {"write": "write", "pages": "pages", "latency": "roundtrip"}


def _baseline_of(options: argparse.Namespace) -> str | None:
    """Return the provider whose baseline runs in turns with ours. None: there is none."""
    provider = "local" if options.provider == "auto" else options.provider
    if options.no_baseline or not options.loopback or provider not in BASELINES:
        return None
    possible = ("write", "pages") if provider == "local" else tuple(RAW_OPS)
    return provider if options.op in possible else None


def _start_baseline(options: argparse.Namespace, case: Case) -> Program | None:
    provider = _baseline_of(options)
    if provider is None:
        return None
    sizes: dict[str, Any] = {"pages": case.call_pages, "walk": case.size}
    if provider == "local":
        return raw("memcpy", RAW_OPS[case.op], case.nbytes, **sizes)
    more: dict[str, Any] = {"window": case.window, "provider": provider, "delivery": True}
    return raw("ofi", RAW_OPS[case.op], case.nbytes, **more, **sizes)


def _measure(options: argparse.Namespace, cases: list[Case], prepare: Run) -> int:
    head = header(options.provider, "both" if options.loopback else f"client of {options.host}")
    baseline = _baseline_of(options)
    head["baseline"] = BASELINES[baseline] if baseline else None
    print_header(head, sys.stdout)
    rows: list[Row] = []
    progress = Progress()
    for case in cases:
        progress.show(f"{case.op} {case.nbytes} bytes")
        row = _row(options, case, prepare, progress)
        progress.show("")
        print_row(row, sys.stdout)
        rows.append(row)
        if row.failure:  # the count of what failed is void: nothing can be measured after it
            print(f"fabric bench: {row.failure}", file=sys.stderr)
            break
    if options.json:
        write_json(options.json, head, rows)
    if options.plot:
        plot(options.plot, head, rows)
    return 1 if rows[-1].failure else 0


def _row(options: argparse.Namespace, case: Case, prepare: Run, progress: Progress) -> Row:
    run_ours = prepare(case)
    if options.warmup_iters:
        run_ours(0.0, options.warmup_iters)
    baseline = _start_baseline(options, case)
    seconds = options.duration / SLICES
    ours: list[Result] = []
    theirs: list[Result] = []
    failure = ""
    try:
        for index in range(SLICES):
            progress.show(f"{case.op} {case.nbytes} bytes: slice {index + 1} of {SLICES}")
            ours.append(run_ours(seconds, 0))
            if baseline is not None:
                theirs.append(baseline.run(seconds))
    except FabricError as error:
        ours.append(Result(errors=1))
        failure = str(error)
    finally:
        if baseline is not None:
            baseline.close()
    return Row(case, ours, theirs, baseline.about if baseline else "", failure)
