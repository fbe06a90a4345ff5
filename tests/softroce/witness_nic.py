"""An RDMA port by pyverbs: datagrams, queue pairs, memory, completions."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyverbs.enums as e  # type: ignore[import-not-found]
from pyverbs.addr import AH, GID, AHAttr, GlobalRoute  # type: ignore[import-not-found]
from pyverbs.cq import CQ  # type: ignore[import-not-found]
from pyverbs.device import Context  # type: ignore[import-not-found]
from pyverbs.mr import MR  # type: ignore[import-not-found]
from pyverbs.pd import PD  # type: ignore[import-not-found]
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr  # type: ignore[import-not-found]
from pyverbs.wr import SGE, RecvWR, SendWR  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .witness_wire import Values

PORT = 1
GRH_BYTES = 40
UD_RECEIVES, UD_SENDS, UD_BYTES = 128, 32, 4096
PSN_MASK = 0xFFFFFF
ACK_TIMEOUT = 14  # 4.096 us * 2^14 = 67 ms
RETRIES = 6  # rdma_rxe takes 7 for "for ever", as only rnr_retry does
RNR_FOREVER = 7
SEND_SECONDS = 15.0

STATUS = {
    e.IBV_WC_SUCCESS: "success",
    e.IBV_WC_WR_FLUSH_ERR: "flushed",
    e.IBV_WC_REM_ACCESS_ERR: "remote access",
    e.IBV_WC_REM_INV_REQ_ERR: "remote invalid request",
    e.IBV_WC_REM_OP_ERR: "remote operation",
    e.IBV_WC_RETRY_EXC_ERR: "no answer",
    e.IBV_WC_RNR_RETRY_EXC_ERR: "not ready",
}


@dataclass(frozen=True)
class Completion:
    """What became of a work request."""

    status: str
    length: int
    imm: int


def immediate(raw: int) -> int:
    """Turn an immediate round: verbs structures hold it in network order."""
    return int.from_bytes(raw.to_bytes(4, sys.byteorder), "big")


class Memory:
    """Registered memory."""

    def __init__(self, port: Port, length: int, remote: bool = False) -> None:
        access = e.IBV_ACCESS_LOCAL_WRITE | (e.IBV_ACCESS_REMOTE_WRITE if remote else 0)
        self.mr = MR(port.pd, length, access)
        self.length = length

    @property
    def key(self) -> list[int]:
        """Address and key for a peer."""
        return [self.mr.buf, self.mr.rkey]

    def sge(self, offset: int, length: int) -> Any:
        """Return the scatter-gather entry of a part."""
        return SGE(self.mr.buf + offset, length, self.mr.lkey)

    def read(self, length: int, offset: int = 0) -> bytes:
        """Return a part as bytes."""
        return bytes(self.mr.read(length, offset))

    def write(self, data: bytes, offset: int = 0) -> None:
        """Store bytes."""
        self.mr.write(data, len(data), offset)


class Port:
    """Port 1 of a device with one completion queue and a UD queue pair."""

    def __init__(self, device: str, gid_index: int, rng: random.Random) -> None:
        self.context = Context(name=device)
        self.pd = PD(self.context)
        self.cq = CQ(self.context, 8192)
        self.rng = rng
        self.gid_index = gid_index
        attr = self.context.query_port(PORT)
        self.mtu, self.link, self.lid = attr.active_mtu, attr.link_layer, attr.lid
        self.gid = bytes.fromhex(self.context.query_gid(PORT, gid_index).gid.replace(":", ""))
        self.handlers: dict[int, Callable[[Completion], None]] = {}
        self.next_wr = 0
        self.ways: dict[bytes, Any] = {}
        self.on_datagram: Callable[[bytes], None] = lambda data: None
        self.qkey = rng.getrandbits(31)
        self.sends = Memory(self, UD_SENDS * UD_BYTES)
        self.receives = Memory(self, UD_RECEIVES * (UD_BYTES + GRH_BYTES))
        self.open_ud()

    def open_ud(self) -> None:
        """Make the UD queue pair and let it receive."""
        cap = QPCap(max_send_wr=UD_SENDS, max_recv_wr=UD_RECEIVES)
        init = QPInitAttr(qp_type=e.IBV_QPT_UD, scq=self.cq, rcq=self.cq, cap=cap, sq_sig_all=1)
        attr = QPAttr(port_num=PORT)
        attr.qkey = self.qkey
        self.ud = QP(self.pd, init, attr)
        for slot in range(UD_RECEIVES):
            self.receive_datagram(slot)

    def receive_datagram(self, slot: int) -> None:
        """Post a receive for one datagram."""
        at = slot * (UD_BYTES + GRH_BYTES)

        def done(c: Completion) -> None:
            if c.status == "success":
                data = self.receives.read(c.length - GRH_BYTES, at + GRH_BYTES)
                self.receive_datagram(slot)
                self.on_datagram(data)

        self.post_receive(self.ud, self.receives.sge(at, UD_BYTES + GRH_BYTES), done)

    # Work requests: each has a number of its own, by which its end is told.

    def number(self, handler: Callable[[Completion], None]) -> int:
        """Return a fresh work request id that ends in `handler`."""
        self.next_wr += 1
        self.handlers[self.next_wr] = handler
        return self.next_wr

    def post_receive(self, qp: Any, sge: Any, handler: Callable[[Completion], None]) -> None:
        """Post a receive into a piece of memory."""
        qp.post_recv(RecvWR(self.number(handler), 1, [sge]))

    def poll(self) -> int:
        """Handle what has ended; returns how much that was."""
        count, found = self.cq.poll(64)
        for wc in found if count else ():
            status = STATUS.get(wc.status, f"status {wc.status}")
            handler = self.handlers.pop(wc.wr_id)
            handler(Completion(status, wc.byte_len, immediate(wc.imm_data)))
        return int(count)

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Poll until a condition holds; returns whether it came to that in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            if not self.poll():
                time.sleep(0.001)
        return True

    def post_all(self, qp: Any, requests: Sequence[Any]) -> list[str]:
        """Post work requests at once and wait for all; `requests` take a number each."""
        ends: list[str] = []
        for make in requests:
            qp.post_send(make(self.number(lambda c: ends.append(c.status))))
        if not self.until(lambda: len(ends) == len(requests), SEND_SECONDS):
            raise TimeoutError(f"{len(requests) - len(ends)} work requests do not end")
        return ends

    # Datagrams.

    def way(self, gid: bytes) -> Any:
        """Return the address handle for a GID."""
        if gid not in self.ways:
            self.ways[gid] = AH(self.pd, attr=self.ah_attr(gid))
        return self.ways[gid]

    def ah_attr(self, gid: bytes) -> Any:
        """Return how a GID is reached."""
        text = ":".join(gid[i : i + 2].hex() for i in range(0, 16, 2))
        route = GlobalRoute(dgid=GID(text), sgid_index=self.gid_index, hop_limit=64)
        return AHAttr(port_num=PORT, is_global=1, gr=route)

    def send_datagrams(self, to: Values, datagrams: Sequence[bytes]) -> None:
        """Send to the UD queue pair that a blob names; returns when all have left."""
        way = self.way(to["gid"])
        for first in range(0, len(datagrams), UD_SENDS):
            requests = []
            for slot, data in enumerate(datagrams[first : first + UD_SENDS]):
                self.sends.write(data, slot * UD_BYTES)
                requests.append(self.datagram_request(way, to, slot, len(data)))
            ends = self.post_all(self.ud, requests)
            if set(ends) != {"success"}:
                raise OSError(f"datagrams did not leave: {ends}")

    def datagram_request(
        self, way: Any, to: Values, slot: int, length: int
    ) -> Callable[[int], Any]:
        """Return what makes the work request once it has its number."""

        def make(number: int) -> Any:
            wr = SendWR(number, e.IBV_WR_SEND, 1, 0, [self.sends.sge(slot * UD_BYTES, length)])
            wr.set_wr_ud(way, to["ud_qpn"], to["ud_qkey"])
            return wr

        return make


class Pair:
    """One RC queue pair of ours, with receives of `slot` bytes.

    For immediates a byte will do: nothing is stored there, but pyverbs posts no receive without
    memory.
    """

    def __init__(
        self, port: Port, receives: int, slot: int, on_receive: Callable[[bytes, int], None]
    ) -> None:
        self.port, self.slot, self.on_receive = port, slot, on_receive
        self.closed = False
        self.psn = port.rng.getrandbits(24)
        self.memory = Memory(port, receives * slot)
        self.scratch = Memory(port, 8192)
        cap = QPCap(max_send_wr=256, max_recv_wr=receives)
        self.qp = QP(
            port.pd,
            QPInitAttr(qp_type=e.IBV_QPT_RC, scq=port.cq, rcq=port.cq, cap=cap, sq_sig_all=1),
        )
        attr = QPAttr(qp_state=e.IBV_QPS_INIT, port_num=PORT)
        attr.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        self.qp.to_init(attr)
        for i in range(receives):
            self.receive(i)

    @property
    def number(self) -> int:
        """The queue pair's number."""
        return int(self.qp.qp_num)

    def receive(self, i: int) -> None:
        """Post one receive."""

        def done(c: Completion) -> None:
            if c.status == "success" and not self.closed:
                data = self.memory.read(min(c.length, self.slot), i * self.slot)
                self.receive(i)
                self.on_receive(data, c.imm)

        self.port.post_receive(self.qp, self.memory.sge(i * self.slot, self.slot), done)

    def connect(self, to: Values, qpn: int, psn: int) -> None:
        """Take the pair to RTS, towards queue pair `qpn` of the port in blob `to`."""
        attr = QPAttr(qp_state=e.IBV_QPS_RTR, port_num=PORT)
        attr.path_mtu = min(to["mtu"], self.port.mtu)
        attr.dest_qp_num, attr.rq_psn, attr.sq_psn = qpn, psn & PSN_MASK, self.psn
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 1
        attr.min_rnr_timer, attr.timeout = 12, ACK_TIMEOUT
        attr.retry_cnt, attr.rnr_retry = RETRIES, RNR_FOREVER
        attr.ah_attr = self.port.ah_attr(to["gid"])
        self.qp.to_rtr(attr)
        self.qp.to_rts(attr)

    def send(self, data: bytes) -> str:
        """Send one frame; returns what became of it."""
        if self.closed:
            return "closed"
        self.scratch.write(data)
        sge = self.scratch.sge(0, len(data))
        return self.port.post_all(
            self.qp, [lambda number: SendWR(number, e.IBV_WR_SEND, 1, 0, [sge])]
        )[0]

    def write_request(
        self, sge: Any, address: int, rkey: int, imm: int | None
    ) -> Callable[[int], Any]:
        """Return what makes an RDMA write once it has its number."""
        opcode = e.IBV_WR_RDMA_WRITE if imm is None else e.IBV_WR_RDMA_WRITE_WITH_IMM

        def make(number: int) -> Any:
            wr = SendWR(number, opcode, 1, immediate(imm or 0), [sge])
            wr.set_wr_rdma(rkey, address)
            return wr

        return make

    def close(self) -> None:
        """Destroy the queue pair; completions of it that are still to be polled are ignored."""
        self.closed = True
        self.qp.close()
