/* The C interface of llm-fabric: the only header that Python sees.
 *
 * cffi reads this text as its cdef, so it holds plain declarations only: no include, no
 * conditional, no macro but integer constants. <stdint.h> types are known to cffi; C
 * files include fabric.h, which includes those headers first.
 *
 * Conventions
 * - A function that can fail returns a negative FAB_E_* code; fab_error_text() then says in
 *   words what was wrong, for the calling thread. Nothing else is to be read from it.
 * - A handle is a positive 64-bit integer, slot and generation: a stale one is refused.
 * - Times are nanoseconds. A timeout below zero waits for ever, zero does not wait.
 *   A deadline is a point of CLOCK_MONOTONIC; zero means none.
 * - imm is a counter id of the receiver (28 bits), or FAB_NO_IMM.
 * - Every function may be called from any thread. None calls back.
 */

#define FAB_ABI_VERSION 1

/* Bounds. Each has an error for reaching it. */
#define FAB_ENGINE_ID_BYTES 16
#define FAB_BLOB_MAX 128        /* a provider's own address of a NIC or lane */
#define FAB_MAX_NICS 32         /* of one engine */
#define FAB_MAX_LANES 16        /* of one peer; pieces of one range */
#define FAB_MAX_PEERS 1024      /* of one engine */
#define FAB_MAX_REGIONS 4096    /* of one engine */
#define FAB_MAX_REMOTES 65536   /* imported descriptors of one engine */
#define FAB_MAX_TRANSFERS 16384 /* of one engine, not yet released */
#define FAB_MAX_COUNTERS 65536  /* of one engine, chosen by it */
#define FAB_MAX_USER_IDS 65536  /* of one engine, chosen by users */
#define FAB_MAX_EARLY_IDS 4096  /* user ids of one peer counted before anybody asked */
#define FAB_MAX_PAGES 1048576   /* of one write_pages */
#define FAB_MAX_TARGETS 4096    /* of one scatter or barrier */
#define FAB_MAX_MESSAGE 65536   /* bytes of one message */
#define FAB_MAX_QUEUED 16384    /* messages received and not yet taken, of one engine */
#define FAB_MAX_WATCHES 65536   /* of one engine */
#define FAB_MAX_QUEUES 64       /* of one engine: one for each event loop or dispatcher */
#define FAB_MAX_SECRET 64       /* bytes of the shared secret */
#define FAB_MAX_TRACE 1048576   /* events of one engine's trace */
#define FAB_NAME_MAX 64
#define FAB_TEXT_MAX 256
#define FAB_PIECE_UNIT 720720   /* lcm(1..16): what one range adds to a counter's sum */
#define FAB_NO_IMM -1
#define FAB_DONE 0 /* for a handle: the transfer was done before the call returned */
#define FAB_USER_ID_MAX 134217727 /* 2^27 - 1 */

/* Error codes. */
#define FAB_E_INVALID -1            /* bad argument */
#define FAB_E_FULL -2               /* a bounded queue or table is full */
#define FAB_E_TIMEOUT -3            /* not yet; the thing goes on */
#define FAB_E_DRAINING -4           /* not yet; it failed or was cancelled and drains */
#define FAB_E_FAILED -5             /* the transfer failed */
#define FAB_E_UNREACHABLE -6        /* the peer is gone */
#define FAB_E_CANCELLED -7          /* the transfer was cancelled */
#define FAB_E_VOID -8               /* the counter id can no longer be trusted */
#define FAB_E_FENCE_PENDING -9      /* the peer may still be inside a write */
#define FAB_E_FENCE_UNSUPPORTED -10 /* this provider cannot fence this peer */
#define FAB_E_CLOSED -11            /* the engine is closed, or belongs to the parent process */
#define FAB_E_UNAVAILABLE -12       /* no such provider or NIC here */
#define FAB_E_WIRE -13              /* malformed bytes from elsewhere */
#define FAB_E_SYSTEM -14            /* the operating system refused; the text has its errno */
#define FAB_ERRORS 15               /* codes are above -FAB_ERRORS */

/* Kinds of memory. */
#define FAB_MEM_HOST 0
#define FAB_MEM_CUDA 1

/* Kinds of provider, as they stand in an address. */
#define FAB_KIND_LOCAL 1
#define FAB_KIND_VERBS 2
#define FAB_KIND_OFI_TCP 3
#define FAB_KIND_OFI_EFA 4
#define FAB_KIND_OFI_RXM 5
#define FAB_KIND_SIM 6

/* Transfer states. */
#define FAB_T_RUNNING 1
#define FAB_T_DRAINING 2
#define FAB_T_DONE 3
#define FAB_T_FAILED 4
#define FAB_T_CANCELLED 5

/* What a transfer was submitted as. */
#define FAB_OP_WRITE 0
#define FAB_OP_PAGES 1
#define FAB_OP_SCATTER 2
#define FAB_OP_IMM 3 /* write_imm and barrier */
#define FAB_OP_MESSAGE 4
#define FAB_OPS 5

/* Lane states (ARCHITECTURE.md, "Lane"). */
#define FAB_L_FRESH 0    /* opened by a handshake that is under way */
#define FAB_L_UP 1       /* a frame came over it */
#define FAB_L_BROKEN 2   /* to be closed */
#define FAB_L_GONE 3     /* closed */
#define FAB_L_OFFERED 4  /* half of an attempt to open it again */
#define FAB_L_ANSWERED 5 /* connected, as far as the side that was asked knows */
#define FAB_L_PROVING 6  /* connected, as far as the side that asked knows */

/* Peer states. */
#define FAB_P_IDLE 1       /* known, no session */
#define FAB_P_CONNECTING 2 /* handshake under way */
#define FAB_P_UP 3
#define FAB_P_FENCING 4 /* session over, the peer may still be inside a write */
#define FAB_P_DEAD 5    /* session over and fenced; the reason is kept */

typedef struct fab_engine fab_engine;

typedef struct {
    const char *provider;     /* "auto", "local", "tcp", "efa", "verbs" or a list "local,tcp" */
    const char *const *nics;  /* names; NULL takes the provider's choice */
    uint32_t nic_count;
    uint32_t spin_us;         /* how long a waiter polls before it sleeps */
    int32_t cpu;              /* CPU of the worker thread; -1 leaves it to the kernel */
    int32_t ask_accept;       /* 1: newcomers wait for fab_accept_reply() */
    int64_t peer_timeout_ns;  /* silence after which a peer is unreachable */
    const uint8_t *secret;    /* shared secret of the handshake; NULL admits without */
    uint32_t secret_len;
    const char *label;        /* shown in peers' errors; NULL takes host:pid */
} fab_engine_config;

typedef struct {
    uint64_t addr; /* virtual address or offset that a peer's work request names */
    uint64_t rkey;
} fab_key;

typedef struct {
    int32_t kind;                /* FAB_KIND_* */
    char provider[FAB_NAME_MAX]; /* e.g. "local", "net;ofi_rxm" as libfabric calls it */
    char name[FAB_NAME_MAX];
    uint8_t blob[FAB_BLOB_MAX]; /* where peers reach this NIC */
    uint32_t blob_len;
    fab_key doorbell;           /* eight bytes that zero-length writes name */
    uint64_t max_write;         /* bytes of one work request */
    uint64_t speed_bps;         /* bits per second; 0: unknown */
    int32_t ordered;            /* a lane keeps the order of its work requests */
    int32_t up;
} fab_nic_info;

typedef struct {
    uint8_t id[FAB_ENGINE_ID_BYTES]; /* the incarnation: random at every start */
    char label[FAB_NAME_MAX];
    uint32_t nic_count;
    int32_t closed;
} fab_engine_info;

/* One engine as it stands in an address. */
typedef struct {
    uint8_t id[FAB_ENGINE_ID_BYTES];
    const char *label;
    uint32_t nic_count;
    const fab_nic_info *nics; /* kind, blob, doorbell, max_write, ordered are read */
} fab_peer_address;

typedef struct {
    uint64_t base;   /* address in this process */
    uint64_t length;
    uint64_t mapped; /* bytes that fab_unmap() takes; 0: not from fab_region_alloc() */
    int32_t kind;    /* FAB_MEM_* */
    int32_t device;
    int32_t pulled;  /* 1: on `local`, peers ask this engine to copy in */
    uint64_t region; /* number of the region in this engine */
    uint64_t secret; /* what a peer must show to be granted the region */
    uint32_t key_count;
    fab_key keys[FAB_MAX_NICS]; /* one for each NIC of the engine, in its order */
} fab_region_info;

/* A descriptor, taken apart. */
typedef struct {
    uint64_t region;
    uint64_t secret;
    uint64_t offset; /* of this descriptor inside the region */
    uint64_t length;
    int32_t kind;
    int32_t device;
    uint32_t key_count;
    const fab_key *keys; /* keys of the whole region, not of the sub-range */
} fab_descriptor;

typedef struct {
    int64_t remote; /* handle of fab_remote_add() */
    uint64_t src_offset;
    uint64_t dst_offset;
    uint64_t length;
} fab_target;

typedef struct {
    int32_t state;         /* FAB_T_* */
    int32_t code;          /* FAB_E_* of the end; 0 when done */
    uint64_t ranges;       /* submitted */
    uint64_t acknowledged; /* of these, known to be visible at the receiver */
    uint64_t bytes;
    char nic[FAB_NAME_MAX];
    char peer[FAB_NAME_MAX];
    char text[FAB_TEXT_MAX];
} fab_transfer_info;

typedef struct {
    int32_t state; /* FAB_P_* */
    int32_t code;
    uint32_t lanes;
    char label[FAB_NAME_MAX];
    char provider[FAB_NAME_MAX];
    char text[FAB_TEXT_MAX]; /* why it is dead */
    uint8_t id[FAB_ENGINE_ID_BYTES];
    uint64_t tx_bytes, tx_ranges, tx_pieces, rx_imms, rx_frames, tx_frames;
    uint64_t outstanding; /* work requests */
    uint64_t queued;      /* transfers not yet wholly posted */
} fab_peer_info;

/* One lane of a peer. Counts are those of the peer's sessions so far. */
typedef struct {
    int32_t state;        /* FAB_L_* */
    uint32_t remote_nic;  /* the peer's, in the order of its address */
    char nic[FAB_NAME_MAX];
    uint64_t tx_bytes;    /* payload that was acknowledged */
    uint64_t tx_pieces;   /* work requests that were acknowledged */
    uint64_t outstanding; /* work requests */
    uint64_t lost;        /* times that it broke while the session went on */
    uint64_t restored;    /* of these, times that it was opened again */
} fab_lane_stats;

/* One NIC of an engine; also told after the engine was closed. */
typedef struct {
    char name[FAB_NAME_MAX];
    int32_t up;
    int32_t reserved;
    uint64_t tx_bytes;
    uint64_t tx_pieces;
} fab_nic_stats;

/* Times in ns. Buckets 0 to 3 hold that many ns; from there on every octave has four buckets of
 * equal width, so that bucket i begins at (4 + i % 4) << (i / 4 - 1). The last one also holds all
 * that is longer. `count` is the sum of the buckets. */
#define FAB_BUCKETS 160
typedef struct {
    uint64_t count;
    uint64_t sum;
    uint64_t buckets[FAB_BUCKETS];
} fab_histogram;

typedef struct {
    uint64_t tx_bytes;             /* payload that was acknowledged */
    uint64_t tx_ranges;            /* ranges that were acknowledged */
    uint64_t tx_pieces;            /* work requests that were acknowledged */
    uint64_t tx_messages;
    uint64_t rx_messages;
    uint64_t rx_imms;              /* immediates received and counted */
    uint64_t imm_stale;            /* dropped: released or foreign generation */
    uint64_t imm_overflow;         /* dropped: a peer's early ids overflowed */
    uint64_t transfers_done;
    uint64_t transfers_failed;
    uint64_t transfers_cancelled;
    uint64_t transfers_live;
    uint64_t frames_rx;
    uint64_t frames_tx;
    uint64_t frames_refused;       /* malformed, stale or unknown */
    uint64_t handshakes_refused;
    uint64_t peers_up;
    uint64_t peers_lost;
    uint64_t lanes_lost;           /* broke while their session went on */
    uint64_t lanes_restored;       /* of these, opened again */
    uint64_t nics_lost;            /* times that a NIC of this engine went down */
    uint64_t regions;
    uint64_t counters;
    uint64_t remotes;
    uint64_t watches;
    uint64_t worker_turns;
    uint64_t worker_naps;
    uint64_t worker_sleeps;
    uint64_t helper_turns;
    uint64_t queue_full;           /* submissions that found a table full */
    uint64_t pieces_failed;        /* work requests that the provider reported as failed */
    uint64_t handshakes_resent;    /* HELLO and WELCOME that were sent again */
    uint64_t frames_resent;        /* control frames that a lane lost, sent again over another */
    uint64_t transfers_waiting;    /* not wholly posted */
    uint64_t transfers_posted;     /* wholly posted, not acknowledged */
    uint64_t messages_sending;     /* not yet held by the receiver's engine */
    uint64_t messages_waiting;     /* received, and not yet taken by the application */
    uint64_t pieces_outstanding;   /* work requests posted, and not reported yet */
    uint64_t frames_waiting;       /* control frames that a lane lost, to be sent again */
    uint64_t commands_waiting;     /* submissions and cancellations the worker has not seen yet */
    uint64_t failures[FAB_ERRORS]; /* of transfers_failed, by -code */
} fab_stats;

/* What a trace tells of. */
#define FAB_TRACE_SUBMIT 1 /* a transfer was submitted */
#define FAB_TRACE_POST 2   /* the provider took its first work request, or fragment */
#define FAB_TRACE_POSTED 3 /* and the last */
#define FAB_TRACE_DRAIN 4  /* it will not succeed; `text` says why */
#define FAB_TRACE_END 5    /* and with the last acknowledgement it ends; `code` says how */
#define FAB_TRACE_UP 6     /* a peer's session is up */
#define FAB_TRACE_LOST 7   /* and over; `text` says why */
#define FAB_TRACE_LANE 8   /* a lane changed its state */
#define FAB_TRACE_COUNT 9  /* a counter reached what somebody waits for */

typedef struct {
    int64_t time;            /* of fab_time_ns() */
    int64_t transfer;        /* handle; 0: it is not about one */
    int64_t parent;          /* handle of the scatter or barrier that it is part of; 0: none */
    int64_t imm;             /* counter id; FAB_NO_IMM: none */
    uint64_t bytes;
    uint64_t ranges;         /* SUBMIT: submitted; END: acknowledged; COUNT: value */
    int32_t what;            /* FAB_TRACE_* */
    int32_t op;              /* FAB_OP_* */
    int32_t code;            /* END: 0 or FAB_E_*; LANE: FAB_L_* */
    uint32_t lane;
    char name[FAB_NAME_MAX]; /* of the peer */
    char text[FAB_NAME_MAX];
} fab_trace_event;

typedef struct {
    uint64_t tag;
    int32_t code; /* 0 or FAB_E_* */
    int32_t reserved;
} fab_event;

typedef struct {
    int64_t token;
    uint8_t id[FAB_ENGINE_ID_BYTES];
    char label[FAB_NAME_MAX];
    char provider[FAB_NAME_MAX];
} fab_newcomer;

/* ---- library ---- */
const char *fab_version(void);
const char *fab_error_text(void);
/* The clock of deadlines: CLOCK_MONOTONIC, or a simulated world's. */
int64_t fab_time_ns(void);
/* NICs of one provider ("local", "tcp", "efa", "verbs"). Returns how many were written, or a code
 * whose text is the reason that there are none. */
int fab_list_nics(const char *provider, fab_nic_info *out, uint32_t max);
/* "libfabric" or "libibverbs": path and version really loaded. 0, or a code with the reason. */
int fab_library(const char *name, char *path, uint32_t path_size, char *version,
                uint32_t version_size);

/* ---- engine ---- */
fab_engine *fab_engine_open(const fab_engine_config *config); /* NULL: fab_error_code() */
int fab_error_code(void);
/* Drains for at most `timeout`, says goodbye, joins the worker. Every later call but
 * fab_engine_free() returns FAB_E_CLOSED. Calling it again is harmless. */
int fab_engine_close(fab_engine *e, int64_t timeout);
/* Frees what close left. No call may be running or follow. */
void fab_engine_free(fab_engine *e);
int fab_engine_get_info(fab_engine *e, fab_engine_info *out);
int fab_engine_nic(fab_engine *e, uint32_t index, fab_nic_info *out);
int fab_engine_stats(fab_engine *e, fab_stats *out);
/* Of transfers of one FAB_OP_* that were done: from submission to the end, and to the first work
 * request. Parts of a scatter or a barrier are not told apart. */
int fab_engine_latency(fab_engine *e, int op, fab_histogram *whole, fab_histogram *waited);
/* Returns how many NICs there are, of which up to `max` are written. */
int fab_engine_nic_stats(fab_engine *e, fab_nic_stats *out, uint32_t max);
/* Keeps the last `events` events, from now on. */
int fab_trace_begin(fab_engine *e, uint32_t events);
/* Takes the oldest events. *lost: how many older ones the trace had no room for, since the last call.
 * Returns how many were written. */
int fab_trace_read(fab_engine *e, fab_trace_event *out, uint32_t max, uint64_t *lost);
int fab_trace_end(fab_engine *e);
/* One turn of the worker's work by the caller. Returns the number of things that happened. */
int fab_engine_progress(fab_engine *e);

/* ---- memory ---- */
int64_t fab_region_register(fab_engine *e, uint64_t base, uint64_t length, int kind, int device);
/* The memory stays mapped until fab_unmap(), also after deregistering and after the engine is
 * freed: views of it may be alive. */
int64_t fab_region_alloc(fab_engine *e, uint64_t length, int huge, int numa, int populate);
/* The same memory under a key of its own, granted to one engine only. */
int64_t fab_region_alias(fab_engine *e, int64_t region, const uint8_t *engine_id);
int fab_region_get_info(fab_engine *e, int64_t region, fab_region_info *out);
int fab_region_deregister(fab_engine *e, int64_t region, int64_t timeout);
/* Unmaps what fab_region_alloc() mapped, after fab_region_deregister() or fab_engine_close(). */
void fab_unmap(uint64_t base, uint64_t mapped);

/* ---- peers and what they let us write ---- */
int64_t fab_peer_add(fab_engine *e, const fab_peer_address *address);
int fab_peer_get_info(fab_engine *e, int64_t peer, fab_peer_info *out);
/* Its lanes, up to `max`. Returns how many there are, or were in its last session. */
int fab_peer_lanes(fab_engine *e, int64_t peer, fab_lane_stats *out, uint32_t max);
/* Handles of all known peers; returns how many there are. */
int fab_peer_list(fab_engine *e, int64_t *out, uint32_t max);
/* Fence: when it returns 0, nothing the peer started lands here any more. */
int fab_disconnect(fab_engine *e, int64_t peer, int64_t timeout);
int64_t fab_remote_add(fab_engine *e, int64_t peer, const fab_descriptor *descriptor);
int fab_remote_release(fab_engine *e, int64_t remote);

/* ---- transfers: each returns a handle, or FAB_DONE ----
 * FAB_DONE needs no release. It may be waited for, watched, cancelled, released and asked about, as any
 * transfer that has ended well. */
int64_t fab_write(fab_engine *e, int64_t region, uint64_t src_offset, int64_t remote,
                  uint64_t dst_offset, uint64_t length, int64_t imm, int64_t deadline,
                  int64_t wait);
/* Page i goes from src_offset + src_pages[i] * src_stride to dst_offset + dst_pages[i] *
 * dst_stride, page_bytes each; every page is one range. */
int64_t fab_write_pages(fab_engine *e, int64_t region, int64_t remote, const int32_t *src_pages,
                        const int32_t *dst_pages, uint32_t count, uint64_t page_bytes,
                        uint64_t src_stride, uint64_t dst_stride, uint64_t src_offset,
                        uint64_t dst_offset, int64_t imm, int64_t deadline, int64_t wait);
int64_t fab_scatter(fab_engine *e, int64_t region, const fab_target *targets, uint32_t count,
                    int64_t imm, int64_t deadline, int64_t wait);
/* Zero-length immediates to `count` peers: write_imm and barrier. */
int64_t fab_imm(fab_engine *e, const int64_t *peers, uint32_t count, int64_t imm, int64_t deadline,
                int64_t wait);
/* A message; done when the receiver's engine holds it. */
int64_t fab_send(fab_engine *e, int64_t peer, const void *bytes, uint64_t length, int64_t wait);
int fab_transfer_wait(fab_engine *e, int64_t transfer, int64_t timeout);
int fab_transfer_get_info(fab_engine *e, int64_t transfer, fab_transfer_info *out);
int fab_transfer_cancel(fab_engine *e, int64_t transfer);
int fab_transfer_release(fab_engine *e, int64_t transfer);

/* ---- counters ---- */
int64_t fab_counter_open(fab_engine *e, int64_t id, uint32_t count); /* id -1: engine's choice */
int64_t fab_counter_id(fab_engine *e, int64_t counter);
/* The sum that a counter's ranges add to, in units of 1/720720; readable until the engine is
 * freed, of this counter while it is open. NULL: bad handle. */
const uint64_t *fab_counter_cell(fab_engine *e, int64_t counter, uint32_t index);
/* 1: the counter, whose cell this is, has reached `target` and is open and not void; 0:
 * fab_counter_wait() tells what it is. */
int fab_counter_reached(fab_engine *e, int64_t counter, const uint64_t *cell, uint64_t target);
int64_t fab_counter_value(fab_engine *e, int64_t counter, uint32_t index);
/* Waits until every value[i] >= targets[i]. missing[i] is set to 1 for those that are not; may be
 * NULL. Ends at once when one of `peers` is lost. `offset`: of the first counter in a block. */
int fab_counter_wait(fab_engine *e, int64_t counter, uint32_t offset, const uint64_t *targets,
                     uint32_t count, int64_t timeout, const int64_t *peers, uint32_t peer_count,
                     uint8_t *missing);
/* The same for the first counter alone, whoever counts. */
int fab_counter_await(fab_engine *e, int64_t counter, uint64_t target, int64_t timeout);
int fab_counter_close(fab_engine *e, int64_t counter);

/* ---- messages ---- */
/* Returns the length, or a code. `from` gets the sender's handle. */
int64_t fab_recv(fab_engine *e, void *out, uint64_t size, int64_t *from, int64_t timeout);

/* ---- completion queues for event loops ---- */
int64_t fab_queue_open(fab_engine *e);
int fab_queue_fd(fab_engine *e, int64_t queue); /* an eventfd: readable when events are there */
/* Takes up to max events and re-arms the eventfd when none is left. Returns how many. */
int fab_queue_drain(fab_engine *e, int64_t queue, fab_event *out, uint32_t max);
int fab_queue_wait(fab_engine *e, int64_t queue, int64_t timeout);
int fab_queue_close(fab_engine *e, int64_t queue);
/* Each posts one event {tag, code} to the queue, once. Returns a handle for fab_unwatch(), or 0
 * when it holds already (then no event comes), or a code. */
int64_t fab_watch_transfer(fab_engine *e, int64_t queue, int64_t transfer, uint64_t tag);
int64_t fab_watch_counter(fab_engine *e, int64_t queue, int64_t counter, uint32_t index,
                          uint64_t target, const int64_t *peers, uint32_t peer_count, uint64_t tag);
int64_t fab_watch_message(fab_engine *e, int64_t queue, uint64_t tag);
int fab_unwatch(fab_engine *e, int64_t watch);

/* ---- newcomers, where the engine was opened with ask_accept ---- */
int fab_accept_next(fab_engine *e, fab_newcomer *out, int64_t timeout);
int fab_accept_reply(fab_engine *e, int64_t token, int admit);

/* ---- the simulated world: NICs of the provider "sim", in one thread of one process ---- */
#define FAB_SIM_UNORDERED 1 /* as libfabric's tcp: closing a lane is the fence */
#define FAB_SIM_ORDERED 2   /* as verbs: lanes break and come back one by one */
#define FAB_SIM_KEYS 3      /* as efa: keys are the fence */

/* States of a NIC. */
#define FAB_SIM_UP 1
#define FAB_SIM_DOWN 2 /* the link is down */
#define FAB_SIM_HUNG 3 /* its process gets no turns */
#define FAB_SIM_DEAD 4 /* nor does anything reach its memory */

typedef struct {
    uint64_t seed;
    int32_t flavour;          /* FAB_SIM_UNORDERED ... */
    int32_t reserved;
    int64_t delay_ns;         /* of everything sent, */
    int64_t jitter_ns;        /* and up to so much more, each at its own */
    uint32_t slow_lanes;      /* of a million: 20 times as slow */
    uint32_t lost_writes;     /* of a million: not executed, and reported as failed */
    uint32_t lost_answers;    /* of a million: executed, and reported as failed */
    uint32_t lost_contacts;   /* of a million first frames */
    uint32_t double_contacts; /* the same */
    uint32_t slow_fences;     /* of a million: closing a lane takes up to 30 ms */
    uint32_t stuck_regions; /* of a million: a NIC does not let go of a registration this time */
} fab_sim_config;

/* Opens the world; the process's clock and chance are its own until fab_sim_end(). Both are refused
 * while an engine is open. */
int fab_sim_begin(const fab_sim_config *config);
int fab_sim_end(void);
/* Changes all but seed and flavour. */
int fab_sim_set(const fab_sim_config *config);
int64_t fab_sim_now(void);
/* Gives all engines their turns until nothing is left to do, and moves time on to what comes next, but
 * not beyond `until` (below 0: no bound) nor by more than 10 ms. Returns how much was done. */
int fab_sim_step(int64_t until);
int fab_sim_nic(const char *name, int state);
/* Nothing gets from one NIC to the other while `on`. */
int fab_sim_cut(const char *from, const char *to, int on);
/* The end of the history, up to `size` bytes. Returns how many. */
int64_t fab_sim_history(char *out, uint64_t size);
/* Of the whole history, for comparing two. */
uint64_t fab_sim_digest(void);
