"""A simulated world: many engines in one thread, with time, chance and faults of its own.

The engines are the shipped ones, on NICs of the provider ``sim``. While a world is open, the clock
of this process's engines is the world's: it moves when somebody waits, or in `World.step`. The
same seed and the same calls give the same history, so that what went wrong once can be looked at
again::

    with sim.World(seed=7, lost_answers=0.01) as world:
        a, b = world.engine("a"), world.engine("b", nics=2)
        ...
        world.run(1.0)             # a second of simulated time
        print(world.history())

What is simulated is in ``native/providers/sim.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._engine import TransferEngine
from ._errors import InvalidArgument
from ._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

KINDS = {
    "unordered": lib.FAB_SIM_UNORDERED,
    "ordered": lib.FAB_SIM_ORDERED,
    "keys": lib.FAB_SIM_KEYS,
}
"""As tcp, as verbs, and as efa: what order lanes keep, and what a fence is."""
CHANCES = (
    "slow_lanes",
    "lost_writes",
    "lost_answers",
    "lost_contacts",
    "double_contacts",
    "slow_fences",
    "stuck_regions",
)
"""What can happen, each with a chance from 0 to 1."""
HISTORY_BYTES = 4 << 20


class World:
    """The one simulated world of this process; a context manager. Use it from one thread.

    Args:
        seed: of every choice that is left to chance.
        kind: of NICs, see `KINDS`.
        delay: seconds that everything sent takes at least.
        jitter: and up to so many more, each at its own.
        chances: ``lost_writes`` fail and are not executed; ``lost_answers`` are executed, and fail
            all the same; ``lost_contacts`` and ``double_contacts`` are of first frames;
            ``slow_lanes`` take 20 times as long; ``slow_fences`` need up to 30 ms;
            ``stuck_regions`` are not let go of by their NIC at that try.

    Raises:
        InvalidArgument: a value is out of range, a world or an engine is open already.
    """

    def __init__(
        self,
        seed: int,
        *,
        kind: str = "unordered",
        delay: float = 10e-6,
        jitter: float = 100e-6,
        **chances: float,
    ) -> None:
        if kind not in KINDS:
            raise InvalidArgument(f"kind: {kind!r}; there are {', '.join(KINDS)}")
        self._config = ffi.new("fab_sim_config *")
        self._config.seed = seed & (1 << 64) - 1
        self._config.flavour = KINDS[kind]
        self._take(delay=delay, jitter=jitter, **chances)
        self.engines: dict[str, TransferEngine] = {}
        if lib.fab_sim_begin(self._config):
            raise InvalidArgument(
                "a world needs delays below a second and this process for itself: "
                "close its engines, and the world before"
            )

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, **values: float) -> None:
        for name, value in values.items():
            if name in ("delay", "jitter"):
                setattr(self._config, f"{name}_ns", int(value * 1e9))
            elif name in CHANCES and 0 <= value <= 1:
                setattr(self._config, name, int(value * 1_000_000))
            else:
                raise InvalidArgument(
                    f"{name}={value!r}: delay and jitter in seconds, or a chance from 0 to 1 of "
                    f"{', '.join(CHANCES)}"
                )

    def set(self, **values: float) -> None:
        """Change delays and chances, by the names that the constructor takes."""
        self._take(**values)
        if lib.fab_sim_set(self._config):
            raise InvalidArgument("the world is closed, or a delay is not below a second")

    def engine(self, name: str, nics: int = 1, **options: Any) -> TransferEngine:
        """Open an engine with so many NICs, called ``name.0``, ``name.1``, ..."""
        names = [f"{name}.{i}" for i in range(nics)]
        engine = TransferEngine("sim", names, label=name, **options)
        self.engines[name] = engine
        return engine

    # ---- time ----

    @property
    def now(self) -> float:
        """Seconds of simulated time."""
        return int(lib.fab_sim_now()) / 1e9

    def step(self) -> int:
        """Give all engines their turns, and move on to what comes next (10 ms at most)."""
        return int(lib.fab_sim_step(-1))

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = lib.fab_sim_now() + int(seconds * 1e9)
        while lib.fab_sim_now() < end:
            lib.fab_sim_step(end)

    def run_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Let time pass until the condition holds; returns whether it does."""
        end = lib.fab_sim_now() + int(timeout * 1e9)
        while not condition():
            if lib.fab_sim_now() >= end:
                return False
            lib.fab_sim_step(end)
        return True

    # ---- what happens to engines ----

    def _state(self, name: str, state: int) -> None:
        engine = self.engines.get(name)
        if engine is None:
            raise InvalidArgument(f"there is no engine called {name!r}")
        for nic in engine.nics:
            lib.fab_sim_nic(nic.name.encode(), state)

    def hang(self, name: str) -> None:
        """Stop an engine, as SIGSTOP does; do not call it before `resume`."""
        self._state(name, lib.FAB_SIM_HUNG)

    def resume(self, name: str) -> None:
        """Let a stopped engine go on."""
        self._state(name, lib.FAB_SIM_UP)

    def kill(self, name: str) -> None:
        """End an engine without a word. Its object may only be closed, which `close` does."""
        self._state(name, lib.FAB_SIM_DEAD)

    def link(self, nic: str, *, up: bool) -> None:
        """Take a NIC's link down, or up again."""
        if lib.fab_sim_nic(nic.encode(), lib.FAB_SIM_UP if up else lib.FAB_SIM_DOWN):
            raise InvalidArgument(f"there is no NIC called {nic!r}")

    def cut(self, sender: str, receiver: str, *, on: bool = True) -> None:
        """Let nothing through from one NIC to the other, or mend that."""
        if lib.fab_sim_cut(sender.encode(), receiver.encode(), on):
            raise InvalidArgument(f"there is no NIC called {sender!r}, or none called {receiver!r}")

    # ---- what was ----

    def history(self) -> str:
        """Return what happened, a line each: seconds, and what; the last 4 MiB of it at most."""
        out = ffi.new("char[]", HISTORY_BYTES)
        n = lib.fab_sim_history(out, HISTORY_BYTES)
        return bytes(ffi.buffer(out, n)).decode("utf-8", "replace")

    @property
    def digest(self) -> int:
        """A number that two equal histories share."""
        return int(lib.fab_sim_digest())

    def close(self) -> None:
        """Close all engines, and the world."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()
        lib.fab_sim_end()
