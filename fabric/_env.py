"""The one registry of environment variables, printed by ``fabric info --env``."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable that the library reads, in C or in Python."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str | None:
        """What it is set to; None when it is not set."""
        return os.environ.get(self.name)


PROVIDER = Variable(
    "FABRIC_PROVIDER",
    "auto",
    'provider that engines opened with provider="auto" use, or a list such as local,tcp',
)

TRACE = Variable(
    "FABRIC_TRACE",
    "no trace",
    "file to which every engine adds its trace when it is closed, for Perfetto; one that is older"
    " than the process is begun anew",
)

VARIABLES = (
    PROVIDER,
    Variable("FABRIC_LIBFABRIC", "libfabric.so.1", "path of the libfabric to load"),
    Variable("FABRIC_LIBIBVERBS", "libibverbs.so.1", "path of the libibverbs to load"),
    Variable("FABRIC_TCP_NIC", "the first", "NIC that the provider tcp opens when none is named"),
    Variable("FABRIC_EFA_NIC", "the first", "NIC that the provider efa opens when none is named"),
    Variable("FABRIC_RXM_NIC", "the first", "NIC that the provider rxm opens when none is named"),
    Variable(
        "FABRIC_VERBS_NIC",
        "the first that is up",
        "NIC that the provider verbs opens when none is named: mlx5_0, or mlx5_0:2 for its port 2",
    ),
    Variable(
        "FABRIC_VERBS_GID_INDEX",
        "chosen",
        "index in the port's GID table; chosen are RoCE v2 and FABRIC_VERBS_GID_FAMILY where"
        " there are, and never link-local ones",
    ),
    Variable("FABRIC_VERBS_GID_FAMILY", "ipv4", "ipv4 or ipv6: which GIDs are preferred on RoCE"),
    Variable("FABRIC_VERBS_PKEY", "the first", "P_Key whose index in the port's table is used"),
    Variable(
        "FABRIC_VERBS_TIMEOUT",
        "from peer_timeout",
        "ack timeout of queue pairs, 4.096 us times 2 to the power of it (1 to 31); when 8 in a row"
        " pass, a lane fails; chosen so that they take at most a quarter of peer_timeout",
    ),
    Variable("FABRIC_VERBS_TRAFFIC_CLASS", "0", "traffic class (DSCP and ECN) on RoCE"),
    Variable("FABRIC_VERBS_SERVICE_LEVEL", "0", "service level of queue pairs, 0 to 15"),
    Variable("FABRIC_LOG_LEVEL", "warn", "log lines of the C core: error, warn, info or debug"),
    Variable("FABRIC_LOG_FILE", "standard error", "file that those lines are appended to"),
    TRACE,
    Variable(
        "FABRIC_LOCAL_PULL",
        "auto",
        "how `local` copies out of foreign memory: vm (process_vm_readv) or staging",
    ),
    Variable(
        "FABRIC_LOCAL_CACHE",
        "16777216",
        "bytes of destinations that `local` takes to be in the cache still (0 to 2**30): larger"
        " copies to other places go past it",
    ),
    Variable(
        "FABRIC_EFA_ALLOW_EMULATED",
        "0",
        "1: use EFA devices without RDMA write, whose writes are copied by the target's CPU",
    ),
)
