"""`fabric bench`: it measures what it says, verifies, and refuses what it cannot do."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest

from fabric import FabricError, InvalidArgument, TransferEngine, WireError
from fabric.bench import OPS, Case, _costs
from fabric.bench._burst import Burst
from fabric.bench._case import paint, wrong_pages
from fabric.bench._ends import Set
from fabric.bench._link import MAX_BYTES, Link, listen
from fabric.bench._loopback import Loopback
from fabric.bench._perftest import WriteBandwidth, gid_index, parse
from fabric.bench._program import Program, mock_nic, raw, raw_program
from fabric.bench._result import Result, median, percentile, total
from fabric.bench._targets import NAMES, Target, all_targets, in_turns, verbs_targets

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

SHORT = 0.05
KIB = 1024


def bench(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fabric", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    with contextlib.closing(Loopback(Set("local"))) as both:
        yield both


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_and_its_bytes_are_verified(loopback: Loopback, op: str) -> None:
    case = Case(op, 512, pages=8, window=3, walk=64 * KIB, check=True)
    loopback.set_up(case)
    first = loopback.run(iters=10)
    second = loopback.run(SHORT)
    assert first.iters == 10
    assert second.iters > 0
    assert second.nbytes == second.iters * case.payload
    assert first.errors == second.errors == 0
    assert second.p50_us is not None
    assert second.p50_us > 0


def test_foreign_memory_is_measured_as_well() -> None:
    with contextlib.closing(Loopback(Set("local"), Set("local", foreign=True))) as both:
        both.set_up(Case("pages", 16 * KIB, 32, walk=2 * KIB * KIB, check=True))
        assert both.run(SHORT).iters > 0


def test_a_page_that_differs_is_found() -> None:
    case = Case("pages", 64, pages=4, walk=64 * 64)
    source = np.zeros(case.size // 8, np.uint64)
    paint(source, 64)
    target = np.zeros_like(source).reshape(-1, 8)
    for s, d in zip(case.order(0), case.order(1), strict=True):
        target[d] = source.reshape(-1, 8)[s]
    assert wrong_pages(case, target.ravel(), 10**6) == 0
    target[case.order(1)[5]][3] += 1
    assert wrong_pages(case, target.ravel(), 5) == 0  # that one was not written yet
    assert wrong_pages(case, target.ravel(), 6) == 1


def test_rows_json_and_baseline(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.json"
    sizes = ("--minbytes", "65536", "--maxbytes", "1048576", "--stepfactor", "4")
    done = bench(
        "--loopback", "--provider", "local", *sizes, "--duration", "0.3", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    assert "# baseline: memcpy() of one thread into shared memory" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]
    assert rows[0][:2] == ["bytes", "iters"]
    assert [row[0] for row in rows[1:]] == ["65536", "262144", "1048576"]
    assert all(re.fullmatch(r"\d+%", row[9]) for row in rows[1:]), rows
    facts = json.loads(path.read_text())
    assert facts["header"]["provider"] == "local"
    for row, size in zip(facts["rows"], (65536, 262144, 1048576), strict=True):
        assert row["case"]["nbytes"] == size
        assert len(row["slices"]) == len(row["baseline"]) == 10
        assert row["ratio"] > 0
        assert "memcpy" in row["baseline_is"]


def test_a_plot(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.png"
    shape = ("--op", "latency", "--duration", "0.1", "--plot", str(path))
    done = bench("--loopback", "--provider", "local", *shape)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def heed_ctrl_c() -> None:
    """Whoever runs in the background of a shell ignores it, and so do the children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "fabric", "bench", "--provider", "local"]
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        assert process.stdout is not None
        assert f"port {port}" in process.stdout.readline()
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_client_and_server_and_the_end_by_ctrl_c() -> None:
    sizes = ("--minbytes", "64", "--maxbytes", "64", "--duration", "0.1")
    with server() as (process, port):
        for op in ("scatter", "latency"):  # one client after the other
            check = ("--check",) if op == "scatter" else ()
            where = ("localhost", "--port", str(port), "--provider", "local")
            done = bench(*where, "--op", op, *sizes, *check)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1].split()[0] == "64"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_client_that_speaks_something_else_does_not_end_the_server() -> None:
    with server() as (process, port):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(1000)
        for fields in (
            {},
            {"case": 7},
            {"case": {"op": "write"}},
            {"case": {"op": "write"}, "address": 1},
        ):
            data = msgpack.packb({"is": "case", "v": 1, **fields})
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(struct.pack("<I", len(data)) + data)
                assert b"failed" in stranger.recv(1000)
        sizes = ("--minbytes", "64", "--maxbytes", "64", "--duration", "0.1")
        done = bench("localhost", "--port", str(port), "--provider", "local", *sizes)
        assert done.returncode == 0, done.stderr
        assert process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "teleport"], "invalid choice: 'teleport'"),
        (
            ["--loopback", "--minbytes", "12", "--maxbytes", "12"],
            "bytes is 12; it must be a multip",
        ),
        (["--loopback", "--minbytes", "64", "--maxbytes", "8"], "minbytes <= maxbytes"),
        (["--loopback", "--stepfactor", "1"], "--stepfactor 1: it must be from 2"),
        (["--loopback", "--duration", "0"], "--duration 0.0: it must be from 0.01"),
        (["--loopback", "--window", "0"], "window is 0; it must be from 1 to 4096"),
        (["--loopback", "--pages", "99999999", "--op", "pages"], "pages is 99999999"),
        (["--loopback", "--op", "messages", "--maxbytes", "131072"], "bytes is 131072"),
        (["--loopback", "--plot", "rows.jpg"], "must end in .png"),
        (["host", "--loopback"], "leave the host out"),
        (["--targets", "--json", "rows.json"], "--json: no use to --targets"),
        (["--targets", "--provider", "tcp"], "--targets takes auto (local and tcp) or verbs"),
        (["--op", "pages", "--check"], "--check, --op: no use to a server"),
        (["host", "--foreign"], "--foreign: no use to a client"),
        (["--loopback", "--pages", "5"], "--pages: no use to --op write"),
        (["--loopback", "--op", "latency", "--window", "5"], "--window: no use to --op latency"),
        (["--loopback", "--op", "imm", "--check"], "--check: no use to --op imm"),
        (["--provider", "pigeon"], "pigeon"),
        (["--loopback", "--provider", "local", "--lanes", "5"], "5 lanes need as many NICs"),
        (["--loopback", "--provider", "pigeon"], "pigeon"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server() -> None:
    done = bench("localhost", "--port", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("fabric bench: no server at localhost port 1")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (struct.pack("<I", MAX_BYTES + 1), "announces 1048577 bytes"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "does not speak fabric bench"),
        (struct.pack("<I", 1) + b"\x01", "does not speak fabric bench"),
        (b"\x00", "closed the connection"),
    ],
)
def test_what_a_stranger_sends_is_refused(sent: bytes, said: str) -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(FabricError, match=said):
        link.receive("case")
    link.close()


def test_another_version_and_another_message_are_refused() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)

    def send(fields: dict[str, Any]) -> None:
        data = msgpack.packb(fields)
        theirs.sendall(struct.pack("<I", len(data)) + data)

    send({"is": "case", "v": 99})
    with pytest.raises(WireError, match="speaks version 99, this one 1"):
        link.receive("case")
    send({"is": "begin", "v": 1})
    with pytest.raises(WireError, match="sent 'begin'; expected case"):
        link.receive("case")
    send({"is": "failed", "v": 1, "why": "no NIC"})
    with pytest.raises(FabricError, match="the other side failed: no NIC"):
        link.receive("case")
    theirs.close()
    link.close()


def test_a_malformed_case_is_refused() -> None:
    for fields in ({"op": "write", "colour": 1}, {"op": "teleport"}, 7, None, {"nbytes": 8}):
        with pytest.raises(WireError, match="the other side's case"):
            Case.unpack(fields)
    with pytest.raises(InvalidArgument, match="bytes is '8'"):
        Case("write", "8")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["memcpy", "engine"])
@pytest.mark.parametrize("op", ["write", "pages"])
def test_programs_without_python(kind: str, op: str) -> None:
    options: dict[str, Any] = {} if kind == "memcpy" else {"provider": "local"}
    pages = 8 if op == "pages" else 1
    with contextlib.closing(raw(kind, op, 4096, pages=pages, walk=1 << 20, **options)) as program:
        assert program.about
        result = program.run(SHORT)
        assert result.nbytes == result.iters * pages * 4096 > 0
        assert result.seconds >= SHORT
        assert result.p50_us is not None
        assert program.run(SHORT).iters > 0


@pytest.mark.parametrize("op", ["write", "pages", "roundtrip"])
def test_the_loop_over_libfabric(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_TCP_NIC", "lo")
    try:
        program = raw("ofi", op, 4096, pages=1 if op == "roundtrip" else 4, delivery=True)
    except FabricError as error:
        pytest.skip(str(error))
    with contextlib.closing(program):
        assert program.run(SHORT).iters > 0


def slow_program() -> None:
    with contextlib.closing(raw("memcpy", "write", 4096)) as program:
        program._answer(0.0)


def test_programs_say_what_is_wrong() -> None:
    with pytest.raises(FabricError, match="submit: write"):
        raw("memcpy", "teleport", 8)
    with pytest.raises(FabricError, match="no answer within 0 s"):
        slow_program()
    with pytest.raises(FabricError, match="cannot start /nonexistent"):
        Program(["/nonexistent"])
    done = subprocess.run([raw_program()], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: _raw KIND" in done.stderr


def test_a_burst_from_another_process() -> None:
    with TransferEngine("local") as engine, contextlib.closing(Burst()) as burst:
        counter = engine.counter()
        for total in (10, 20):
            before = time.monotonic_ns()
            burst.begin(engine.address, counter.id, 10)
            counter.wait(total, timeout=30)
            assert before < burst.last() < time.monotonic_ns()
        assert counter.value == 20


def test_results() -> None:
    assert percentile([], 0.5) is None
    assert percentile([1, 2, 3, 4], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    one = Result(iters=2, seconds=1.0, nbytes=10**9, p50_us=3.0)
    both = total([one, Result(iters=4, seconds=1.0, nbytes=3 * 10**9, p50_us=5.0)])
    assert (both.iters, both.gbps, both.rate, both.p50_us) == (6, 2.0, 3.0, 4.0)
    assert both.submit_us is None


def test_targets_are_met_or_missed() -> None:
    at_least = Target("a", "x", 1.0, True, list)
    at_most = Target("b", "us", 1.0, False, list)
    assert at_least.met(0.951)
    assert not at_least.met(0.949)
    assert at_most.met(1.049)
    assert not at_most.met(1.051)
    names = [t.name for t in (*all_targets(), *verbs_targets())]
    assert len(names) == len(set(names)) > 20
    assert max(map(len, names)) <= NAMES  # or the table would be out of line


def test_contenders_take_turns() -> None:
    order = []

    def contender(name: str, took: float) -> Callable[[float], Result]:
        def run(seconds: float) -> Result:
            order.append(name)
            return Result(p50_us=took)

        return run

    ratios = in_turns(contender("a", 3.0), contender("b", 2.0), lambda one: one.p50_us or 0.0)
    assert set(ratios) == {1.5}
    assert "".join(order).startswith("ababba")
    assert order.count("a") == order.count("b") == len(ratios) + 1


@pytest.mark.parametrize("over", ["local", "sim"])
def test_one_engine_writes_to_many(over: str) -> None:
    with contextlib.closing(raw("crowd", "write", 64, provider=over, peers=20)) as program:
        assert "20 peers" in program.about
        result = program.run(SHORT)
        assert result.nbytes == result.iters * 64 > 0
        assert result.p50_us is not None
        assert result.p50_us > 0


def test_a_peer_that_idles_takes_little_memory() -> None:
    with (
        contextlib.closing(raw("crowd", "write", 8, provider="local", peers=34)) as many,
        contextlib.closing(raw("crowd", "write", 8, provider="local", peers=2)) as few,
    ):
        each = (many.resident() - few.resident()) / 32
        # Its slot in the table of peers and its rings are some pages at least.
        assert 8 * KIB < each <= 64 * KIB


@pytest.mark.parametrize("over", ["local", "verbs"])
def test_submission_to_first_work_request(over: str) -> None:
    env = mock_nic() if over == "verbs" else None
    with contextlib.closing(raw("submit", "write", 8, env=env, provider=over)) as program:
        assert ("mock" in program.about) == (over == "verbs")
        result = program.run(SHORT)
        assert result.p50_us is not None  # some were posted inline
        assert result.p50_us < 1e6 * result.seconds / result.iters  # which is one part of all
    assert program.status == 0  # its engines were closed


def test_the_mock_nic_is_what_times_a_submission_on_verbs() -> None:
    with pytest.raises(FabricError):
        raw("submit", "write", 8, env={"FABRIC_LIBIBVERBS": "/nonexistent"}, provider="verbs")


def test_an_event_loop_wakes_once_for_a_thousand_immediates() -> None:
    with contextlib.closing(_costs.Rig()) as rig, contextlib.closing(Burst()) as burst:
        assert [_costs.wakes_of_fan_in(rig, burst) for _ in range(5)] == [1] * 5


def test_wakes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop that is woken for each of two counters wakes up twice."""
    real = _costs._resumed

    async def twice(rig: _costs.Rig, burst: Burst) -> float:
        await real(rig, burst)
        return await real(rig, burst)

    monkeypatch.setattr(_costs, "_resumed", twice)
    with contextlib.closing(_costs.Rig()) as rig, contextlib.closing(Burst()) as burst:
        assert _costs.wakes_of_fan_in(rig, burst) == 2


def test_pages_are_queued_behind_a_large_write(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(_costs.Rig()) as rig:
        monkeypatch.setattr(_costs, "QUEUED", 20)
        assert _costs._queued(rig) > 0
        monkeypatch.setattr(_costs, "BUSY_WRITES", 0)
        with pytest.raises(FabricError, match="never at work"):
            _costs._queued(rig)


PERFTEST = """\
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
Conflicting CPU frequency values detected: 2100.000000 != 800.000000.
 {}
---------------------------------------------------------------------------------------
"""


def test_what_perftest_prints() -> None:
    large = parse(PERFTEST.format("65536      350      0.00      8.00      0.000128"), 65536)
    assert (large.iters, large.nbytes) == (350, 350 * 65536)
    assert large.rate == pytest.approx(128)  # of the 8 MiB, not of the rounded rate
    small = parse(PERFTEST.format("8      1000      0.02      0.01      0.002500"), 8)
    assert small.rate == pytest.approx(2500)
    assert small.seconds == pytest.approx(0.4)
    for row in ("", "8 1000 0.00 0.00 0.000000", "16 1000 0.02 0.01 0.002500", "8 a b c d"):
        with pytest.raises(FabricError, match="printed no result"):
            parse(PERFTEST.format(row), 8)


def test_the_gid_that_perftest_is_to_use(tmp_path: pathlib.Path) -> None:
    port = tmp_path / "rxe0" / "ports" / "1"
    (port / "gid_attrs" / "types").mkdir(parents=True)
    (port / "gids").mkdir()
    assert gid_index("rxe0", tmp_path) is None
    ipv4 = "0000:0000:0000:0000:0000:ffff:0a09:0001"
    kinds = (("fe80::1", "RoCE v2"), (ipv4, "IB/RoCE v1"), (ipv4, "RoCE v2"), (ipv4, "RoCE v2"))
    for index, (gid, kind) in enumerate(kinds):
        (port / "gids" / str(index)).write_text(gid + "\n")
        (port / "gid_attrs" / "types" / str(index)).write_text(kind + "\n")
    assert gid_index("rxe0", tmp_path) == 2


FAKE_PERFTEST = """\
#!{python}
import socket, sys
arguments = dict(zip(sys.argv[1:-1], sys.argv[2:]))
port, size, writes = (int(arguments[name]) for name in ("-p", "-s", "-n"))
if sys.argv[-1] == "localhost":
    socket.create_connection(("localhost", port)).close()
    if arguments["-d"] == "broken":
        sys.exit("no such device")
    print(size, writes, "0.00", "64.00", "0.010000")
else:
    socket.create_server(("", port)).accept()
"""


def test_perftest_is_run_as_long_as_we_are(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FabricError, match="perftest"):
        WriteBandwidth("rxe0", "rxe1", 65536, 64).run(0.5)
    program = tmp_path / "ib_write_bw"
    program.write_text(FAKE_PERFTEST.format(python=sys.executable))
    program.chmod(0o755)
    theirs = WriteBandwidth("rxe0", "rxe1", 65536, 64)
    assert theirs.run(0.5).iters == 64  # one queue full, to find out how fast it is
    assert theirs.run(0.5).iters == 512  # half a second's, at 64 MiB/s
    with pytest.raises(FabricError, match="no such device"):
        WriteBandwidth("broken", "rxe1", 65536, 64).run(0.5)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FabricError, match=f"cannot listen on port {port}.*--port"):
            listen(port, "127.0.0.1")
