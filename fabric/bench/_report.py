"""What people and scripts see: header, rows, JSON, a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .. import __version__
from .._errors import FabricError
from .._native import ffi, lib
from ._result import Result, median, total

if TYPE_CHECKING:
    from ._case import Case

COLUMNS = (
    ("bytes", 10),
    ("iters", 9),
    ("peak GB/s", 10),
    ("GB/s", 8),
    ("Mranges/s", 10),
    ("p50 us", 9),
    ("p99 us", 9),
    ("p99.9 us", 9),
    ("submit us", 10),
    ("baseline", 9),
    ("errors", 7),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, and what stood beside it.

    Args:
        case: what was run.
        slices: of ours.
        baseline: of the baseline, one for each of ours; empty: there is none.
        named: what the baseline is.
        failure: why the row ended early; empty: it did not.
    """

    case: Case
    slices: Sequence[Result]
    baseline: Sequence[Result] = ()
    named: str = ""
    failure: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to the baseline's: the median over the pairs of slices. None: there is none."""
        by_time = self.case.op == "latency"
        ratios = [
            (theirs.p50_us or 0) / (ours.p50_us or 1) if by_time else ours.gbps / theirs.gbps
            for ours, theirs in zip(self.slices, self.baseline, strict=False)
            if theirs.gbps or by_time
        ]
        return median(ratios) if ratios else None

    def facts(self) -> dict[str, Any]:
        """Return everything, as JSON has it."""
        return {
            "case": self.case.pack(),
            "slices": [one.facts() for one in self.slices],
            "baseline": [one.facts() for one in self.baseline],
            "baseline_is": self.named or None,
            "ratio": self.ratio,
            "failure": self.failure or None,
        }


def header(provider: str, role: str) -> dict[str, Any]:
    """Return where and with what this was measured."""
    return {
        "machine": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "llm-fabric": __version__,
        "provider": provider,
        "library": _library(provider),
        "role": role,
    }


def print_header(facts: dict[str, Any], out: TextIO) -> None:
    """Print it, one fact to a line."""
    for name, value in facts.items():
        if value:
            print(f"# {name}: {value}", file=out)
    print("".join(f"{name:>{width}}" for name, width in COLUMNS), file=out, flush=True)


def print_row(row: Row, out: TextIO) -> None:
    """Print one line of the table."""
    whole = total(row.slices)
    ranges = whole.rate * row.case.call_pages / 1e6
    ratio = row.ratio
    values = (
        str(row.case.nbytes),
        str(whole.iters),
        f"{max((one.gbps for one in row.slices), default=0):.3f}",
        f"{whole.gbps:.3f}",
        f"{ranges:.3f}",
        _us(whole.p50_us),
        _us(whole.p99_us),
        _us(whole.p999_us),
        _us(whole.submit_us),
        "-" if ratio is None else f"{ratio:.0%}",
        str(whole.errors),
    )
    line = zip(values, COLUMNS, strict=True)
    print("".join(f"{value:>{width}}" for value, (_, width) in line), file=out, flush=True)


def write_json(path: pathlib.Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write header and all slices to a file.

    Raises:
        FabricError: it cannot be written.
    """
    try:
        text = json.dumps({"header": head, "rows": [row.facts() for row in rows]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise FabricError(f"--json: {error}") from None


def plot(path: pathlib.Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw bandwidth and median latency over the size.

    Raises:
        FabricError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise FabricError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=90)
    sizes = [row.case.nbytes for row in rows]
    axes.plot(sizes, [total(row.slices).gbps for row in rows], "o-", label=head["provider"])
    if all(row.baseline for row in rows):
        axes.plot(sizes, [total(row.baseline).gbps for row in rows], "s--", label=rows[0].named)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of a range")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"fabric bench --op {rows[0].case.op}: {head['machine']}", fontsize=9)
    axes.legend()
    times = axes.twinx()
    times.plot(sizes, [total(row.slices).p50_us or 0 for row in rows], ":", color="gray")
    times.set_yscale("log")
    times.set_ylabel("p50 us (dotted)")
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise FabricError(f"--plot: {error}") from None
    finally:
        pyplot.close(figure)


class Progress:
    """A line on standard error that says what is being measured, where that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Replace the line; an empty text removes it."""
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} CPUs"
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def _library(provider: str) -> str:
    name = {"verbs": "libibverbs", "local": ""}.get(provider, "libfabric")
    path, version = ffi.new("char[]", 4096), ffi.new("char[]", 256)
    if not name or lib.fab_library(name.encode(), path, 4096, version, 256) != 0:
        return ""
    return f"{name} {ffi.string(version).decode()}"
