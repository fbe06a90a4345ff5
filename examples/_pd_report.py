"""What the demo prints and draws."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from _pd_model import Generated

if TYPE_CHECKING:
    from pathlib import Path

Span = list[float]

#: Most requests that one picture shows.
MAX_DRAWN = 8

#: A token can win by luck over a damaged cache; its logit cannot stay the same. Undamaged, the
#: largest difference was 0, bit for bit; with the sign of one page of V flipped, 0.02 or more.
MAX_DEVIATION = 1e-3

EQUAL = "equal"


@dataclasses.dataclass(frozen=True)
class Run:
    """One request, as the two processes saw it. Times are CLOCK_MONOTONIC seconds.

    Attributes:
        submitted, arrived: at the decoder: request sent, counter complete.
        computed: start and end of each layer at the prefiller.
        written: submission and acknowledgement of each layer's write.
        tail: the same of the tail's.
        pages, ranges, bytes: moved, of one sequence.
        tokens, logits: what the decoder generated, and the logit each token won with.
    """

    submitted: float
    arrived: float
    computed: list[Span]
    written: list[Span]
    tail: Span
    pages: int
    ranges: int
    bytes: int
    tokens: list[int]
    logits: list[float]

    @property
    def wire(self) -> list[Span]:
        """When at least one write was outstanding."""
        return union([*self.written, self.tail])

    @property
    def compute(self) -> Span:
        """From the start of the first layer to the end of the last."""
        return [self.computed[0][0], self.computed[-1][1]]


def union(spans: list[Span]) -> list[Span]:
    """The same times as disjoint spans in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def length(spans: list[Span]) -> float:
    """Seconds in disjoint spans."""
    return sum(end - start for start, end in spans)


def overlap(spans: list[Span], window: Span) -> float:
    """Seconds of disjoint spans that lie within the window."""
    return sum(max(0.0, min(e, window[1]) - max(s, window[0])) for s, e in spans)


def shortened(tokens: list[int], limit: int = 12) -> str:
    """The list, with its middle left out where it is long."""
    if len(tokens) <= limit:
        return " ".join(map(str, tokens))
    head, tail = tokens[: limit - 4], tokens[-3:]
    return f"{' '.join(map(str, head))} ... {' '.join(map(str, tail))}"


def plural(count: int, noun: str) -> str:
    """Say how many."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def verdict(run: Run, expected: Generated) -> str:
    """Say `EQUAL` where the tokens are and their logits are within `MAX_DEVIATION`."""
    deviation = expected.deviation(Generated(run.tokens, run.logits))
    if math.isinf(deviation):
        return "DIFFERENT"
    if deviation > MAX_DEVIATION:
        return f"equal, but a LOGIT DIFFERS by {deviation:.2g}"
    return EQUAL


def print_runs(runs: list[Run], expected: list[Generated]) -> None:
    """Tokens and times of every request."""
    for index, (run, reference) in enumerate(zip(runs, expected, strict=True)):
        compute = run.compute[1] - run.compute[0]
        print(f"request {index}")
        print(f"  decoded    {shortened(run.tokens)}   ({len(run.tokens)} tokens)")
        print(f"  undivided  {shortened(reference.tokens)}   {verdict(run, reference)}")
        print(
            f"  moved      {size(run.bytes)} in {run.ranges} ranges: {len(run.computed)} layers x "
            f"K and V x {plural(run.pages, 'page')}, and the tail"
        )
        print(
            f"  times      prefill {1e3 * compute:.1f} ms, wire {1e3 * length(run.wire):.1f} ms, "
            f"complete at the decoder {1e3 * (run.arrived - run.compute[1]):+.2f} ms after the "
            "last layer"
        )


def print_totals(runs: list[Run]) -> None:
    """Bytes, rate, and how much of it was hidden."""
    moved = sum(run.bytes for run in runs)
    wire = union([span for run in runs for span in run.wire])
    hidden = sum(overlap(run.wire, run.compute) for run in runs)
    busy = sum(length(run.wire) for run in runs)
    pages = sum(run.pages for run in runs)
    ranges = sum(run.ranges for run in runs)
    print(f"total        {size(moved)}, {plural(pages, 'page')}, {plural(ranges, 'range')}")
    print(
        f"on the wire  {moved / length(wire) / 1e9:.2f} GB/s "
        f"({size(moved)} in the {1e3 * length(wire):.1f} ms in which a write was outstanding)"
    )
    print(
        f"hidden       {100 * hidden / busy:.1f} % "
        "(share of the time with a write outstanding, submission to\n"
        "             acknowledgement, that fell within the prefill's compute, start of the first\n"
        "             layer to end of the last)"
    )


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Save the timeline: two rows for each request, and its arrival at the decoder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = runs[:MAX_DRAWN]
    zero = min(run.submitted for run in shown)
    figure, axes = plt.subplots(figsize=(11, 1.6 + 1.1 * len(shown)), layout="constrained")
    colours = plt.get_cmap("viridis")
    for index, run in enumerate(shown):
        rows = ((3 * index, run.computed), (3 * index + 1, [*run.written, run.tail]))
        for row, spans in rows:
            for layer, (start, end) in enumerate(spans):
                colour = colours(layer / max(1, len(run.computed)))
                left, width = 1e3 * (start - zero), 1e3 * (end - start)
                axes.barh(row, width, left=left, color=colour, edgecolor=colour, height=0.8, lw=0.5)
        axes.vlines(
            1e3 * (run.arrived - zero),
            3 * index - 0.5,
            3 * index + 1.5,
            colors="crimson",
            linewidth=1.5,
            label="counter complete at the decoder" if index == 0 else None,
        )
    axes.set_yticks(
        [3 * i + row for i in range(len(shown)) for row in (0, 1)],
        [f"request {i}: {what}" for i in range(len(shown)) for what in ("compute", "wire")],
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds since the first request")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
