"""Options and fixtures: `--providers` says which providers to test, `--seed` repeats a run.

``FABRIC_EXAMPLES`` is how many examples Hypothesis tries in each test that does not say it itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.harness import Farm, Node, close_fork_servers, nothing_left_in_shm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EFA_NICS = os.environ.get(
    "FABRIC_TEST_EFA_NICS", "rdmap16s0-rdm,rdmap17s0-rdm,rdmap18s0-rdm,rdmap19s0-rdm"
).split(",")
"""Those of tests/efa/run, unless the machine has some."""

SETUPS: dict[str, tuple[str, Sequence[list[str] | None]]] = {
    "local": ("local", [None]),
    "tcp": ("tcp", [["lo"]]),
    "verbs": ("verbs", [["rxe0"], ["rxe1"]]),
    "verbs-2": ("verbs", [["rxe0", "rxe1"], ["rxe1", "rxe0"]]),
    "efa": ("efa", [EFA_NICS[:1]]),
    "efa-4": ("efa", [EFA_NICS[:4]]),
    "efa-old": ("efa", [EFA_NICS[:1]]),
}
"""Provider and NICs for each name of ``--providers``; the nodes of a test take turns in the lists.

None leaves the choice to the provider. With SoftRoCE the turns see to it that bytes cross the link:
a NIC that talks to itself does not use it. efa is emulated (tests/efa/run); efa-old is a libfabric
without device writes.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite."""
    group = parser.getgroup("fabric")
    group.addoption(
        "--providers",
        help=f"comma-separated: {', '.join(SETUPS)}; one that is named here and missing is an error"
        " (default: local,tcp, and one that is missing skips); only tests that depend on the"
        " provider run, and those that need the SoftRoCE guest",
    )
    group.addoption("--seed", type=int, help="seed of random sizes and orders (default: random)")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, once for all workers of a parallel run."""
    config.addinivalue_line("markers", "only(*names): the test is about these providers")
    config.addinivalue_line("markers", "fences: the test needs writes that can be fenced")
    if examples := os.environ.get("FABRIC_EXAMPLES"):
        hypothesis.settings.register_profile("more", max_examples=int(examples), deadline=None)
        hypothesis.settings.load_profile("more")
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1 << 31)


def pytest_unconfigure() -> None:
    """End the processes that nodes were forked from."""
    close_fork_servers()


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to repeat the run."""
    return f"fabric: --seed={config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Print the seed beside every failure of a test that uses it."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        report.sections.append(("seed", f"repeat with --seed={item.config.option.seed}"))
    return report  # type: ignore[return-value]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for a provider on each of them."""
    if "provider" in metafunc.fixturenames:
        names = (metafunc.config.option.providers or "local,tcp").split(",")
        if unknown := set(names) - set(SETUPS):
            raise pytest.UsageError(f"--providers: {unknown} unknown; there are {list(SETUPS)}")
        for mark in metafunc.definition.iter_markers("only"):
            names = [name for name in names if name in mark.args]
        metafunc.parametrize("provider", names, scope="module")


NEEDS_GUEST = "needs the SoftRoCE guest"
"""How the reason begins for which a test skips outside of the guest."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where providers are named, leave out what says nothing about them."""
    for item in items:
        if item.get_closest_marker("fences") and is_unfenced(item):
            item.add_marker(pytest.mark.skip(reason="emulated writes cannot be fenced"))
    if config.option.providers is None:
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (kept if is_of_a_provider(item) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def is_unfenced(item: pytest.Item) -> bool:
    """Return whether a test runs on a provider that has no fence."""
    params: dict[str, object] = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("provider") == "efa-old"


def is_of_a_provider(item: pytest.Item) -> bool:
    """Return whether a test runs on a provider that was named, or on a NIC of the guest itself."""
    if "provider" in getattr(item, "fixturenames", ()):
        # Not so where the test is about other providers only: then it is there to be skipped.
        return item.callspec.params["provider"] in SETUPS  # type: ignore[attr-defined]
    marks = item.iter_markers("skipif")
    return any(mark.kwargs.get("reason", "").startswith(NEEDS_GUEST) for mark in marks)


@pytest.fixture
def torch() -> tuple[str, ...]:
    """The `modules` of nodes in which a test uses torch; it is imported in no other process."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    return ("torch",)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run."""
    result: int = request.config.option.seed
    return result


@contextlib.contextmanager
def open_farm(provider: str, config: pytest.Config) -> Iterator[Farm]:
    """Nodes on one provider; all are gone at the end, and have left nothing behind."""
    with nothing_left_in_shm():
        farm = Farm(*SETUPS[provider], strict=config.option.providers is not None)
        try:
            yield farm
        finally:
            farm.close()


@pytest.fixture
def farm(provider: str, request: pytest.FixtureRequest) -> Iterator[Farm]:
    """Nodes for one test."""
    with open_farm(provider, request.config) as farm:
        yield farm


@pytest.fixture(scope="module")
def shared_farm(provider: str, request: pytest.FixtureRequest) -> Iterator[Farm]:
    """Nodes for all tests of a module on one provider."""
    with open_farm(provider, request.config) as farm:
        yield farm


def borrow(farm: Farm, names: str) -> list[Node]:
    """Return the shared nodes of these names, new ones for those that died."""
    living = {node.name: node for node in farm.nodes if node.alive()}
    return [living.get(name) or farm(name) for name in names]


def settle(nodes: list[Node]) -> None:
    """Check that tests left nothing in the engines of shared nodes; end nodes that fail."""
    held = {}
    try:
        for node in nodes:
            held[node.name] = node.settle()
    except BaseException:
        for node in nodes:
            node.kill()
        raise
    assert not any(held.values()), f"handles that are still alive: {held}"


@pytest.fixture
def pair(shared_farm: Farm) -> Iterator[tuple[Node, Node]]:
    """Two connected processes: by convention the first writes to the second."""
    nodes = borrow(shared_farm, "ab")
    yield nodes[0], nodes[1]
    settle(nodes)


@pytest.fixture
def trio(shared_farm: Farm) -> Iterator[tuple[Node, Node, Node]]:
    """Three processes: by convention the first writes to the other two."""
    nodes = borrow(shared_farm, "abc")
    yield nodes[0], nodes[1], nodes[2]
    settle(nodes)
