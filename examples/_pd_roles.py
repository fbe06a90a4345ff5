"""The demo's two worker processes.

Forked by pd_demo.py, which calls `main` in each. Each speaks JSON lines: events on stdout, commands
on stdin. The end of stdin ends the process, so that none outlives the parent.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

Event = dict[str, Any]


def emit(event: str, **values: object) -> None:
    """Tell the parent."""
    print(json.dumps({"event": event, **values}), flush=True)


class Commands:
    """Lines of stdin, read by a thread."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._lines: queue.Queue[Event] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Event:
        """The next command.

        Raises:
            queue.Empty: none in time.
        """
        return self._lines.get(timeout=self._patience)

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(json.loads(line))
        os._exit(1)  # the parent is gone


@dataclasses.dataclass(frozen=True)
class Options:
    """What the parent says, as JSON."""

    provider: str
    corrupt: bool
    patience: float  # seconds; no single wait is longer
    workload: dict[str, int]


def open_engine(provider: str) -> Any:
    import fabric

    return fabric.TransferEngine(provider=provider, nics=["lo"] if provider == "tcp" else None)


class Stopwatch:
    """When each layer was computed and each write was under way, in CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self.computed: list[list[float]] = []
        self.written: list[list[float]] = []
        self._started: list[float] = []

    def watch(self, layers: Any) -> None:
        """Time the forward pass of every module in `layers`."""
        for layer in layers:
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def restart(self) -> None:
        """Forget the last request."""
        self.computed, self.written = [], []

    def _enter(self, *_: object) -> None:
        self._started.append(time.monotonic())

    def _leave(self, *_: object) -> None:
        self.computed.append([self._started.pop(), time.monotonic()])


class Acknowledgements:
    """A thread that waits for transfers and notes when each was acknowledged."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._queue: queue.Queue[tuple[list[float], Any] | threading.Event] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def expect(self, span: list[float], transfer: Any) -> None:
        """Append the time of the transfer's end to `span`, which holds that of its start."""
        self._queue.put((span, transfer))

    def flush(self) -> None:
        """Wait until everything expected so far has ended."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(self._patience)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            span, transfer = item
            try:
                transfer.wait(self._patience)
            except Exception as error:
                print(f"prefill: a write failed: {error}", file=sys.stderr)
            span.append(time.monotonic())


def prefill_main(options: Options, commands: Commands) -> None:
    """Serve all requests of the workload, then wait for the parent's leave to go."""
    import torch
    from _pd_model import PagedCache, Workload, fingerprint, prefill

    from kvtransfer import PagePool, Prefiller

    workload = Workload(**options.workload)
    model, layout = workload.model(), workload.layout()
    watch, acks = Stopwatch(), Acknowledgements(options.patience)
    # Room for two requests: a third waits until the writes of the first have ended.
    capacity = 2 * layout.pages_for(workload.prompt_tokens)
    tail_bytes = 4 * model.config.hidden_size

    with open_engine(options.provider) as engine:
        region = engine.alloc(layout.region_bytes(capacity))
        pages = region.tensor(torch.float32, layout.shape(capacity))
        model(torch.zeros((1, 8), dtype=torch.long))  # the first pass of a process is slow
        watch.watch(model.model.layers)
        with Prefiller(
            engine,
            layout,
            PagePool(region, capacity),
            model=fingerprint(model),
            tail_bytes=tail_bytes,
        ) as prefiller:
            emit("ready", address=bytes(engine.address).hex())
            for _ in range(workload.requests):
                with prefiller.next(options.patience) as job:

                    def layer_ready(layer: int, job: Any = job) -> None:
                        if options.corrupt and layer == workload.layers // 2:
                            pages[layer, 1].view(torch.uint8)[..., 3::4] ^= 0x80  # V's signs
                        span = [time.monotonic()]
                        watch.written.append(span)
                        acks.expect(span, job.layer_ready(layer))

                    watch.restart()
                    cache = PagedCache(pages, job.pages, layer_ready)
                    hidden = prefill(model, job.request.prompt, cache)
                    tail = [time.monotonic()]
                    acks.expect(tail, job.finish(hidden.numpy().tobytes()))
                    acks.flush()
                emit(
                    "prefilled",
                    request=int(job.request.payload),
                    computed=watch.computed,
                    written=watch.written,
                    tail=tail,
                )
            commands.next()
    emit("bye")


def decode_main(options: Options, commands: Commands) -> None:
    """Submit all requests at once; decode each when its counter says that it is complete."""
    import torch
    from _pd_model import Workload, cache_from_pages, decode, fingerprint

    import fabric
    from kvtransfer import Arrival, Decoder, PagePool, expected_ranges, payload_bytes

    workload = Workload(**options.workload)
    model, layout = workload.model(), workload.layout()
    prompts = workload.prompts()
    capacity = sum(layout.pages_for(len(prompt)) for prompt in prompts)
    arrived: queue.Queue[tuple[int, float, Exception | None]] = queue.Queue()

    def wait(index: int, arrival: Arrival) -> None:
        try:
            arrival.wait(options.patience)
        except Exception as error:
            arrived.put((index, time.monotonic(), error))
        else:
            arrived.put((index, time.monotonic(), None))

    with open_engine(options.provider) as engine:
        region = engine.alloc(layout.region_bytes(capacity))
        pages = region.tensor(torch.float32, layout.shape(capacity))
        model(torch.zeros((1, 8), dtype=torch.long))
        with Decoder(
            engine,
            layout,
            PagePool(region, capacity),
            model=fingerprint(model),
            tail_bytes=4 * model.config.hidden_size,
            max_requests=workload.requests,
        ) as decoder:
            emit("ready", layout=layout.fingerprint)
            prefiller = fabric.Address.from_bytes(bytes.fromhex(commands.next()["prefiller"]))
            arrivals, submitted = [], []
            for index, prompt in enumerate(prompts):
                submitted.append(time.monotonic())
                arrival = decoder.submit(
                    prefiller, prompt, payload=str(index).encode(), timeout=options.patience
                )
                arrivals.append(arrival)
                threading.Thread(target=wait, args=(index, arrival), daemon=True).start()
            for _ in prompts:
                index, when, error = arrived.get(timeout=options.patience)
                if error is not None:
                    raise error
                arrival = arrivals[index]
                hidden = torch.frombuffer(bytearray(arrival.tail), dtype=torch.float32)
                cache = cache_from_pages(pages, arrival.pages, len(prompts[index]))
                arrival.release()
                made = decode(model, hidden, cache, workload.new_tokens)
                emit(
                    "decoded",
                    request=index,
                    submitted=submitted[index],
                    arrived=when,
                    pages=len(arrival.pages),
                    ranges=expected_ranges(arrival.request),
                    bytes=payload_bytes(arrival.request),
                    tokens=made.tokens,
                    logits=made.logits,
                )
            commands.next()
    emit("bye")


def main(role: str, text: str) -> int:
    """Be ``"prefill"`` or ``"decode"`` with these options (JSON); returns the exit status."""
    options = Options(**json.loads(text))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    commands = Commands(options.patience)
    try:
        (prefill_main if role == "prefill" else decode_main)(options, commands)
    except Exception as error:
        emit("error", text=f"{type(error).__name__}: {error}")
        return 1
    return 0
