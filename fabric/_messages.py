"""Messages: small payloads between engines, in order for each pair of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ._errors import EngineClosed, check, error_of
from ._native import lib
from ._values import in_slices, nanoseconds

if TYPE_CHECKING:
    from ._core import Core
    from ._peer import Peer


def receive(core: Core, timeout: float | None) -> tuple[Peer, bytes]:
    """Wait for a message and take it.

    Raises:
        WaitTimeout: none came.
        EngineClosed: the engine is closed.
    """
    core.check_open()
    result = (0, b"")

    def call(slice_ns: int) -> int:
        nonlocal result
        result = core.receive(slice_ns)
        return result[0]

    check(in_slices(call, nanoseconds("timeout", timeout)))
    return core.sender(result[0]), result[1]


class Messages:
    """What ``async for sender, payload in engine.messages()`` reads; ends when the engine closes.

    Several loops and tasks may read: each message goes to one of them.
    """

    __slots__ = ("_core",)

    def __init__(self, core: Core) -> None:
        self._core = core

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> tuple[Peer, bytes]:
        core = self._core
        watch = functools.partial(lib.fab_watch_message, core.ptr)
        try:
            while True:
                handle, payload = core.receive(0)
                if handle > 0:
                    return core.sender(handle), payload
                if handle != lib.FAB_E_TIMEOUT:
                    raise error_of(handle)
                if await core.loop_queue().wait(watch) == lib.FAB_E_CLOSED:
                    break
        except EngineClosed:
            if core.forked:
                raise
        raise StopAsyncIteration
