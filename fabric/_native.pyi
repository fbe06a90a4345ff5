"""Types of the extension module that cffi makes from native/include/fabric_abi.h."""

from typing import Any, Final, TypeAlias

CData: TypeAlias = Any

class FFI:
    NULL: CData
    error: type[Exception]
    def new(self, cdecl: str, init: Any = ...) -> CData: ...
    def cast(self, cdecl: str, value: Any) -> CData: ...
    def string(self, cdata: Any, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...
    def sizeof(self, what: Any) -> int: ...
    def typeof(self, what: Any) -> Any: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...
    def from_buffer(self, cdecl: str, buffer: Any, require_writable: bool = ...) -> CData: ...

class Lib:
    FAB_ABI_VERSION: Final[int]
    FAB_ENGINE_ID_BYTES: Final[int]
    FAB_BLOB_MAX: Final[int]
    FAB_MAX_NICS: Final[int]
    FAB_MAX_LANES: Final[int]
    FAB_MAX_PEERS: Final[int]
    FAB_MAX_REGIONS: Final[int]
    FAB_MAX_REMOTES: Final[int]
    FAB_MAX_TRANSFERS: Final[int]
    FAB_MAX_COUNTERS: Final[int]
    FAB_MAX_USER_IDS: Final[int]
    FAB_MAX_EARLY_IDS: Final[int]
    FAB_MAX_PAGES: Final[int]
    FAB_MAX_TARGETS: Final[int]
    FAB_MAX_MESSAGE: Final[int]
    FAB_MAX_QUEUED: Final[int]
    FAB_MAX_WATCHES: Final[int]
    FAB_MAX_QUEUES: Final[int]
    FAB_MAX_SECRET: Final[int]
    FAB_NAME_MAX: Final[int]
    FAB_TEXT_MAX: Final[int]
    FAB_PIECE_UNIT: Final[int]
    FAB_NO_IMM: Final[int]
    FAB_USER_ID_MAX: Final[int]
    FAB_E_INVALID: Final[int]
    FAB_E_FULL: Final[int]
    FAB_E_TIMEOUT: Final[int]
    FAB_E_DRAINING: Final[int]
    FAB_E_FAILED: Final[int]
    FAB_E_UNREACHABLE: Final[int]
    FAB_E_CANCELLED: Final[int]
    FAB_E_VOID: Final[int]
    FAB_E_FENCE_PENDING: Final[int]
    FAB_E_FENCE_UNSUPPORTED: Final[int]
    FAB_E_CLOSED: Final[int]
    FAB_E_UNAVAILABLE: Final[int]
    FAB_E_WIRE: Final[int]
    FAB_E_SYSTEM: Final[int]
    FAB_MEM_HOST: Final[int]
    FAB_MEM_CUDA: Final[int]
    FAB_KIND_LOCAL: Final[int]
    FAB_KIND_VERBS: Final[int]
    FAB_KIND_OFI_TCP: Final[int]
    FAB_KIND_OFI_EFA: Final[int]
    FAB_KIND_OFI_RXM: Final[int]
    FAB_KIND_SIM: Final[int]
    FAB_T_RUNNING: Final[int]
    FAB_T_DRAINING: Final[int]
    FAB_T_DONE: Final[int]
    FAB_T_FAILED: Final[int]
    FAB_T_CANCELLED: Final[int]
    FAB_P_IDLE: Final[int]
    FAB_P_CONNECTING: Final[int]
    FAB_P_UP: Final[int]
    FAB_P_FENCING: Final[int]
    FAB_P_DEAD: Final[int]
    def fab_version(self) -> CData: ...
    def fab_error_text(self) -> CData: ...
    def fab_list_nics(self, provider: bytes, out: CData, max: int, /) -> int: ...
    def fab_library(
        self, name: bytes, path: CData, path_size: int, version: CData, version_size: int, /
    ) -> int: ...
    def fab_engine_open(self, config: CData, /) -> CData: ...
    def fab_error_code(self) -> int: ...
    def fab_engine_close(self, e: CData, timeout: int, /) -> int: ...
    def fab_engine_free(self, e: CData, /) -> None: ...
    def fab_engine_get_info(self, e: CData, out: CData, /) -> int: ...
    def fab_engine_nic(self, e: CData, index: int, out: CData, /) -> int: ...
    def fab_engine_stats(self, e: CData, out: CData, /) -> int: ...
    def fab_engine_progress(self, e: CData, /) -> int: ...
    def fab_region_register(
        self, e: CData, base: int, length: int, kind: int, device: int, /
    ) -> int: ...
    def fab_region_alloc(
        self, e: CData, length: int, huge: int, numa: int, populate: int, /
    ) -> int: ...
    def fab_region_alias(self, e: CData, region: int, engine_id: CData, /) -> int: ...
    def fab_region_get_info(self, e: CData, region: int, out: CData, /) -> int: ...
    def fab_region_deregister(self, e: CData, region: int, timeout: int, /) -> int: ...
    def fab_unmap(self, base: int, length: int, /) -> None: ...
    def fab_peer_add(self, e: CData, address: CData, /) -> int: ...
    def fab_peer_get_info(self, e: CData, peer: int, out: CData, /) -> int: ...
    def fab_peer_list(self, e: CData, out: CData, max: int, /) -> int: ...
    def fab_disconnect(self, e: CData, peer: int, timeout: int, /) -> int: ...
    def fab_remote_add(self, e: CData, peer: int, descriptor: CData, /) -> int: ...
    def fab_remote_release(self, e: CData, remote: int, /) -> int: ...
    def fab_write(
        self,
        e: CData,
        region: int,
        src_offset: int,
        remote: int,
        dst_offset: int,
        length: int,
        imm: int,
        deadline: int,
        wait: int,
        /,
    ) -> int: ...
    def fab_write_pages(
        self,
        e: CData,
        region: int,
        remote: int,
        src_pages: CData,
        dst_pages: CData,
        count: int,
        page_bytes: int,
        src_stride: int,
        dst_stride: int,
        src_offset: int,
        dst_offset: int,
        imm: int,
        deadline: int,
        wait: int,
        /,
    ) -> int: ...
    def fab_scatter(
        self,
        e: CData,
        region: int,
        targets: CData,
        count: int,
        imm: int,
        deadline: int,
        wait: int,
        /,
    ) -> int: ...
    def fab_imm(
        self, e: CData, peers: CData, count: int, imm: int, deadline: int, wait: int, /
    ) -> int: ...
    def fab_send(self, e: CData, peer: int, bytes: CData, length: int, wait: int, /) -> int: ...
    def fab_transfer_wait(self, e: CData, transfer: int, timeout: int, /) -> int: ...
    def fab_transfer_get_info(self, e: CData, transfer: int, out: CData, /) -> int: ...
    def fab_transfer_cancel(self, e: CData, transfer: int, /) -> int: ...
    def fab_transfer_release(self, e: CData, transfer: int, /) -> int: ...
    def fab_counter_open(self, e: CData, id: int, count: int, /) -> int: ...
    def fab_counter_id(self, e: CData, counter: int, /) -> int: ...
    def fab_counter_cell(self, e: CData, counter: int, index: int, /) -> CData: ...
    def fab_counter_value(self, e: CData, counter: int, index: int, /) -> int: ...
    def fab_counter_wait(
        self,
        e: CData,
        counter: int,
        offset: int,
        targets: CData,
        count: int,
        timeout: int,
        peers: CData,
        peer_count: int,
        missing: CData,
        /,
    ) -> int: ...
    def fab_counter_close(self, e: CData, counter: int, /) -> int: ...
    def fab_recv(self, e: CData, out: CData, size: int, sender: CData, timeout: int, /) -> int: ...
    def fab_queue_open(self, e: CData, /) -> int: ...
    def fab_queue_fd(self, e: CData, queue: int, /) -> int: ...
    def fab_queue_drain(self, e: CData, queue: int, out: CData, max: int, /) -> int: ...
    def fab_queue_wait(self, e: CData, queue: int, timeout: int, /) -> int: ...
    def fab_queue_close(self, e: CData, queue: int, /) -> int: ...
    def fab_watch_transfer(self, e: CData, queue: int, transfer: int, tag: int, /) -> int: ...
    def fab_watch_counter(
        self,
        e: CData,
        queue: int,
        counter: int,
        index: int,
        target: int,
        peers: CData,
        peer_count: int,
        tag: int,
        /,
    ) -> int: ...
    def fab_watch_message(self, e: CData, queue: int, tag: int, /) -> int: ...
    def fab_unwatch(self, e: CData, watch: int, /) -> int: ...
    def fab_accept_next(self, e: CData, out: CData, timeout: int, /) -> int: ...
    def fab_accept_reply(self, e: CData, token: int, admit: int, /) -> int: ...

ffi: Final[FFI]
lib: Final[Lib]
