"""Prefill to decode over real processes: bytes, counts, cancellation, death, fences."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fabric
from kvtransfer import (
    Arrival,
    Decoder,
    KvLayout,
    PagePool,
    Prefiller,
    PrefillJob,
    RequestCancelled,
    RequestFailed,
    RequestRefused,
    page_rows,
)
from tests import commands
from tests.harness import wait_until
from tests.patterns import pattern
from tests.scale import patient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness import Farm, Node
    from tests.node import State
    from tests.patterns import Bytes

TAIL = 100
MODEL = "model"
HOLD_SECONDS = patient(20.0)
QUICK = patient(1.0)  # peer_timeout of those that are about to lose a peer


def layout_of(joined: bool) -> KvLayout:
    """Three layers of pages of 1536 bytes (3072 where K and V are joined)."""
    return KvLayout(
        layers=3, kv_heads=3, head_dim=16, page_tokens=8, dtype="float32", joined=joined
    )


def rows_of(layout: KvLayout, region: Any, capacity: int) -> Bytes:
    """A region as (layers, rows, bytes)."""
    whole: Bytes = region.numpy()[: layout.region_bytes(capacity)]
    return whole.reshape(layout.layers, layout.parts * capacity, layout.page_bytes)


def content(layout: KvLayout, seed: int, pages: int) -> Bytes:
    """What request `seed` carries: (layers, parts * pages, bytes)."""
    shape = (layout.layers, layout.parts * pages, layout.page_bytes)
    return pattern(seed, int(np.prod(shape))).reshape(shape)


def tail_of(seed: int) -> bytes:
    return pattern(seed + 1, TAIL).tobytes()


# ---- in the prefiller's process


def open_prefiller(node: State, joined: bool, capacity: int, max_jobs: int) -> None:
    """Serve requests, each on a thread of its own, until the prefiller is closed."""
    layout = layout_of(joined)
    region = node.engine.alloc(layout.region_bytes(capacity))
    prefiller = Prefiller(
        node.engine,
        layout,
        PagePool(region, capacity),
        model=MODEL,
        tail_bytes=TAIL,
        max_jobs=max_jobs,
    )
    node.things.update(kv=region, prefiller=prefiller, gate=threading.Event())
    node.things.update(holding=set(), outcomes={})
    node.things["server"] = threading.Thread(target=serve, args=(node, prefiller), daemon=True)
    node.things["server"].start()


def serve(node: State, prefiller: Prefiller) -> None:
    running = []
    with contextlib.suppress(fabric.EngineClosed):
        while True:
            job = prefiller.next(timeout=60.0)
            running.append(threading.Thread(target=run, args=(node, job), daemon=True))
            running[-1].start()
            del job
    for thread in running:
        thread.join(HOLD_SECONDS)


def run(node: State, job: PrefillJob) -> None:
    """Do what the request's payload says, and note how it ended."""
    order = json.loads(job.request.payload)
    try:
        with job:
            compute(node, job, order)
        job.wait(HOLD_SECONDS)
        outcome = "done"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    node.things["outcomes"][order["seed"]] = outcome


def compute(node: State, job: PrefillJob, order: dict[str, Any]) -> None:
    layout, seed = job.request.layout, order["seed"]
    pool = node.things["prefiller"].pool
    rows = rows_of(layout, pool.region, pool.capacity)
    wanted = content(layout, seed, len(job.pages))
    chunks = random.Random(seed)
    for layer in range(layout.layers):
        rows[layer, page_rows(layout, job.pages, pool.capacity)] = wanted[layer]
        for end in sorted(chunks.randrange(len(job.pages) + 1) for _ in range(3)):
            transfer = job.layer_ready(layer, end)
        if layer == 1:
            transfer.wait(HOLD_SECONDS)
            act(node, order["do"], seed)
        job.layer_ready(layer)
    job.finish(tail_of(seed))


def act(node: State, what: str, seed: int) -> None:
    """What happens in the middle of a request."""
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "boom":
        raise RuntimeError("boom")
    elif what == "hold":
        node.things["holding"].add(seed)
        assert node.things["gate"].wait(HOLD_SECONDS)


def holds(node: State, seed: int) -> bool:
    """Return whether a request is in the middle, with nothing of it under way."""
    return seed in node.things["holding"]


def open_gate(node: State) -> None:
    """Let those that hold go on."""
    node.things["gate"].set()


def outcome_of(node: State, seed: int) -> str:
    """How a request ended here."""
    outcomes: dict[int, str] = node.things["outcomes"]
    wait_until(lambda: seed in outcomes, HOLD_SECONDS, f"request {seed} does not end")
    return outcomes[seed]


# ---- in the decoder's process


def open_decoder(node: State, joined: bool, capacity: int) -> None:
    layout = layout_of(joined)
    region = node.engine.alloc(layout.region_bytes(capacity))
    decoder = Decoder(node.engine, layout, PagePool(region, capacity), model=MODEL, tail_bytes=TAIL)
    image = np.zeros(layout.region_bytes(capacity), np.uint8)
    node.things.update(kv=region, decoder=decoder, image=image, arrivals={})


def submit(
    node: State, prefiller: bytes, seed: int, pages: int, do: str = "", timeout: float = 30.0
) -> None:
    payload = json.dumps({"seed": seed, "do": do}).encode()
    node.things["arrivals"][seed] = node.things["decoder"].submit(
        commands.peer(prefiller), payload=payload, pages=pages, timeout=timeout
    )


def wait(node: State, seed: int, timeout: float | None = 20.0) -> None:
    node.things["arrivals"][seed].wait(timeout)


def wait_in_asyncio(node: State, seeds: Sequence[int]) -> None:
    async def gather() -> None:
        await asyncio.gather(*(node.things["arrivals"][seed].arrived(20.0) for seed in seeds))

    asyncio.run(gather())


def take(node: State, seed: int) -> str:
    """Compare the whole region and the tail with what should be there; release the pages."""
    decoder: Decoder = node.things["decoder"]
    arrival: Arrival = node.things["arrivals"].pop(seed)
    layout, capacity = decoder.layout, decoder.pool.capacity
    image = rows_of(layout, ImageRegion(node.things["image"]), capacity)
    rows = page_rows(layout, arrival.pages, capacity)
    image[:, rows] = content(layout, seed, len(arrival.pages))
    wrong = ""
    if not np.array_equal(rows_of(layout, decoder.pool.region, capacity)[:, rows], image[:, rows]):
        wrong += f"pages of {seed} differ; "
    if bytes(arrival.tail) != tail_of(seed):
        wrong += f"tail of {seed} differs; "
    arrival.release()
    return wrong


class ImageRegion:
    """What `rows_of` takes for a region."""

    def __init__(self, array: Bytes) -> None:
        self.array = array

    def numpy(self) -> Bytes:
        return self.array


def strays(node: State) -> bool:
    """Whether the region differs anywhere from what was taken."""
    decoder: Decoder = node.things["decoder"]
    image: Bytes = node.things["image"]
    return not np.array_equal(decoder.pool.region.numpy()[: image.size], image)


def cancel(node: State, seed: int, timeout: float = 5.0) -> None:
    node.things["arrivals"][seed].cancel(timeout)


def fence(node: State, prefiller: bytes) -> None:
    node.things["decoder"].fence(commands.peer(prefiller))


def ranges(node: State, seed: int) -> tuple[int, int]:
    """Ranges that have arrived, and all that will."""
    arrival: Arrival = node.things["arrivals"][seed]
    return arrival._counter.value, arrival.expected


def pools(node: State) -> list[tuple[int, int, int]]:
    """(free, held, quarantined) of pages and of tails, of either side."""
    side = node.things.get("decoder") or node.things["prefiller"]
    return [(pool.free, pool.held, pool.quarantined) for pool in (side.pool, side._tails)]


def digest(node: State, beside: int | None = None) -> str:
    """Digest of the decoder's region, leaving out the pages of request `beside`."""
    decoder: Decoder = node.things["decoder"]
    rows = rows_of(decoder.layout, decoder.pool.region, decoder.pool.capacity).copy()
    if beside is not None:
        pages = node.things["arrivals"][beside].pages
        rows[:, page_rows(decoder.layout, pages, decoder.pool.capacity)] = 0
    return hashlib.sha256(rows.tobytes()).hexdigest()


def close(node: State) -> None:
    """Close either side and give its memory back."""
    for name in ("decoder", "prefiller"):
        side = node.things.pop(name, None)
        if side is not None:
            side.close()
    if "server" in node.things:
        open_gate(node)
        node.things["server"].join(HOLD_SECONDS)
    node.engine.deregister(node.things["kv"])
    node.things.clear()


# ---- the tests


def start(
    pair: Sequence[Node], joined: bool = False, here: int = 20, there: int = 33, max_jobs: int = 16
) -> tuple[Node, Node]:
    """A prefiller with `here` pages and a decoder with `there`."""
    prefiller, decoder = pair
    prefiller.call(open_prefiller, joined, here, max_jobs)
    decoder.call(open_decoder, joined, there)
    return prefiller, decoder


def all_free(node: Node, capacity: int) -> None:
    """Every page comes back in time, and every tail."""
    wait_until(
        lambda: [p[1:] for p in node.call(pools)] == [(0, 0), (0, 0)],
        5.0,
        f"{node.name} still holds pages: {node.call(pools)}",
    )
    assert node.call(pools)[0] == (capacity, 0, 0)


def wait_for_half(prefiller: Node, seed: int) -> None:
    """Wait until the first layer of a request has arrived, and part of the second."""
    wait_until(lambda: prefiller.call(holds, seed), 10.0, "the prefiller does not get that far")


@pytest.mark.parametrize("joined", [False, True])
def test_pages_and_tails_arrive(pair: tuple[Node, Node], joined: bool, seed: int) -> None:
    """Ten requests at once with unequal numbers of pages; chunks are cut at random."""
    prefiller, decoder = start(pair, joined, here=14)
    order = random.Random(seed)
    seeds = [order.randrange(1 << 20) * 2 for _ in range(10)]
    for one in seeds:
        decoder.call(submit, prefiller.address, one, order.randrange(1, 4))
    for one in seeds[:5]:
        decoder.call(wait, one)
    decoder.call(wait_in_asyncio, seeds[5:])
    assert "".join(decoder.call(take, one) for one in seeds) == ""
    assert not decoder.call(strays)
    assert {prefiller.call(outcome_of, one) for one in seeds} == {"done"}
    all_free(decoder, 33)
    all_free(prefiller, 14)
    decoder.call(close)
    prefiller.call(close)


def test_requests_wait_for_source_pages(pair: tuple[Node, Node]) -> None:
    prefiller, decoder = start(pair, here=4)
    for one in range(0, 12, 2):
        decoder.call(submit, prefiller.address, one, 4)
    for one in range(0, 12, 2):
        decoder.call(wait, one)
        assert decoder.call(take, one) == ""
    decoder.call(close)
    all_free(prefiller, 4)
    prefiller.call(close)


def refused(decoder: Node, prefiller: Node, pages: int = 1, **changes: object) -> str:
    """Which field of a request the prefiller objects to."""
    decoder.call(alter, changes)
    decoder.call(submit, prefiller.address, 0, pages)
    with pytest.raises(RequestRefused) as caught:
        decoder.call(wait, 0)
    field: str = caught.value.field
    return field


def alter(node: State, changes: dict[str, Any]) -> None:
    """Make the decoder ask for something else; without changes, for the right thing again."""
    decoder: Decoder = node.things["decoder"]
    decoder.model = changes.get("model", MODEL)
    layout = layout_of(joined=False)
    fields = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    decoder.layout = KvLayout(**{**fields, **changes.get("layout", {})})


def test_what_does_not_fit_is_refused_by_name(pair: tuple[Node, Node]) -> None:
    prefiller, decoder = start(pair, here=4, max_jobs=1)
    assert refused(decoder, prefiller, model="other") == "model"
    for field, value in {"layers": 2, "page_tokens": 4, "dtype": "uint8", "joined": True}.items():
        assert refused(decoder, prefiller, layout={field: value}) == f"layout.{field}"
    assert refused(decoder, prefiller, pages=5) == "pages"
    decoder.call(alter, {})
    decoder.call(submit, prefiller.address, 2, 1, "hold")
    assert refused(decoder, prefiller) == "load"
    prefiller.call(open_gate)
    decoder.call(wait, 2)
    assert decoder.call(take, 2) == ""
    all_free(decoder, 33)
    decoder.call(close)
    prefiller.call(close)


def test_a_failure_reaches_the_decoder(pair: tuple[Node, Node]) -> None:
    prefiller, decoder = start(pair)
    decoder.call(submit, prefiller.address, 0, 3, "boom")
    with pytest.raises(RequestFailed, match="boom"):
        decoder.call(wait, 0)
    decoder.call(submit, prefiller.address, 2, 3, "hold", 0.5)
    with pytest.raises(RequestFailed, match="time is up"):
        decoder.call(wait, 2)
    prefiller.call(open_gate)
    assert "time is up" in prefiller.call(outcome_of, 2)
    all_free(decoder, 33)
    all_free(prefiller, 20)
    decoder.call(close)
    prefiller.call(close)


def test_nothing_lands_after_a_cancellation(pair: tuple[Node, Node]) -> None:
    prefiller, decoder = start(pair)
    decoder.call(submit, prefiller.address, 0, 5, "hold")
    decoder.call(submit, prefiller.address, 2, 5, "hold")
    wait_for_half(prefiller, 0)
    arrived, expected = decoder.call(ranges, 0)
    assert arrived < expected == 31
    decoder.call(cancel, 0)
    before = decoder.call(digest, beside=2)
    with pytest.raises(RequestCancelled):
        decoder.call(wait, 0)
    assert decoder.call(pools)[0] == (28, 5, 0)
    prefiller.call(open_gate)
    decoder.call(wait, 2)
    assert "RequestCancelled" in prefiller.call(outcome_of, 0)
    assert decoder.call(digest, beside=2) == before
    assert decoder.call(take, 2) == ""
    all_free(decoder, 33)
    all_free(prefiller, 20)
    decoder.call(close)
    prefiller.call(close)


def test_a_closing_prefiller_fails_its_requests(pair: tuple[Node, Node]) -> None:
    prefiller, decoder = start(pair)
    decoder.call(submit, prefiller.address, 0, 5, "hold")
    wait_for_half(prefiller, 0)
    prefiller.call(close)
    with pytest.raises(RequestFailed, match="closing"):
        decoder.call(wait, 0)
    all_free(decoder, 33)
    decoder.call(close)


@pytest.mark.fences
def test_a_dead_prefiller_frees_the_pages(farm: Farm) -> None:
    """Only its own: the other one's requests go on."""
    doomed, decoder = start([farm("a", peer_timeout=QUICK), farm("b", peer_timeout=QUICK)])
    other = farm("c", peer_timeout=QUICK)
    other.call(open_prefiller, False, 20, 16)
    decoder.call(submit, other.address, 0, 5, "hold")
    decoder.call(submit, doomed.address, 2, 4)
    decoder.call(wait, 2)
    assert decoder.call(take, 2) == ""
    decoder.call(submit, doomed.address, 4, 6, "hold")
    decoder.call(submit, doomed.address, 6, 6, "die")
    with pytest.raises(RequestFailed, match="fenced"):
        decoder.call(wait, 6)
    with pytest.raises(RequestFailed, match="fenced"):
        decoder.call(wait, 4)
    assert decoder.call(pools)[0] == (28, 5, 0)
    other.call(open_gate)
    decoder.call(wait, 0)
    assert decoder.call(take, 0) == ""
    all_free(decoder, 33)
    decoder.call(close)
    other.call(close)


def test_a_cancellation_without_answer_leaves_a_quarantine(farm: Farm) -> None:
    prefiller, decoder = start([farm("a"), farm("b")])
    for one in (0, 2):
        decoder.call(submit, prefiller.address, one, 5, "hold")
        wait_for_half(prefiller, one)
    prefiller.pause()
    for one in (0, 2):
        with pytest.raises(fabric.WaitTimeout):
            decoder.call(cancel, one, 0.2)
    assert decoder.call(pools) == [(23, 0, 10), (62, 0, 2)]
    prefiller.thaw()
    all_free(decoder, 33)  # the answers come late
    prefiller.call(open_gate)
    all_free(prefiller, 20)
    decoder.call(close)
    prefiller.call(close)


@pytest.mark.fences
def test_a_frozen_prefiller_cannot_write_after_the_fence(farm: Farm) -> None:
    """Not even when it comes back and there is a new session between the same two."""
    prefiller, decoder = start([farm("a", peer_timeout=QUICK), farm("b", peer_timeout=QUICK)])
    decoder.call(submit, prefiller.address, 0, 5, "hold")
    wait_for_half(prefiller, 0)
    prefiller.freeze()
    with pytest.raises(fabric.WaitTimeout):
        decoder.call(wait, 0, 0.2)
    assert decoder.call(pools) == [(28, 5, 0), (63, 1, 0)]
    decoder.call(fence, prefiller.address)
    all_free(decoder, 33)
    with pytest.raises(RequestFailed, match="fenced"):
        decoder.call(wait, 0)
    prefiller.thaw()
    decoder.call(submit, prefiller.address, 2, 1, "hold")  # into a page that the first one had
    wait_until(lambda: decoder.call(ranges, 2)[0] >= 2, 10.0, "nothing arrives")
    before = decoder.call(digest, beside=2)
    prefiller.call(open_gate)
    assert "RequestFailed" in prefiller.call(outcome_of, 0)
    decoder.call(wait, 2)
    assert decoder.call(digest, beside=2) == before
    assert decoder.call(take, 2) == ""
    all_free(decoder, 33)
    all_free(prefiller, 20)
    decoder.call(close)
    prefiller.call(close)


def test_a_dead_decoder_frees_the_source_pages(farm: Farm) -> None:
    prefiller, decoder = start([farm("a", peer_timeout=QUICK), farm("b", peer_timeout=QUICK)])
    decoder.call(submit, prefiller.address, 0, 5, "hold")
    wait_for_half(prefiller, 0)
    decoder.kill()
    time.sleep(0.1)
    prefiller.call(open_gate)
    assert "RequestFailed" in prefiller.call(outcome_of, 0)
    all_free(prefiller, 20)
    prefiller.call(close)
