/* What the files of the verbs provider share.
 *
 *   verbs_device.c   which NICs there are: devices, ports, GIDs, P_Keys, the environment
 *   verbs_queue.c    the completion queue and its places; receive queues
 *   verbs_memory.c   registration, dma-buf included
 *   verbs_blob.c     addresses on the wire
 *   verbs_setup.c    the thread that makes address handles and connects queue pairs
 *   verbs_contact.c  first frames, as UD datagrams: cut, put together, answered
 *   verbs_frame.c    frames of a connected lane
 *   verbs_event.c    what a completion means; asynchronous events
 *   verbs_lane.c     lanes: open, connect, post, close
 *   verbs.c          NICs, poll, arm; the vtable
 *
 * Contract
 * - A lane is two RC queue pairs: one for writes, whose immediates take receives without memory
 *   from one shared receive queue, and one for frames, with another shared queue of buffers. RC
 *   keeps order, so of a chain only the last work request is signalled; its completion retires
 *   those before it. Destroying the queue pairs is the fence.
 * - Every work request or receive that may yield a completion holds a place of the completion
 *   queue from before it is posted until its completion is handled, so that queue never overruns.
 *   It grows with the lanes; a lane for which it cannot grow is not opened.
 * - What would block (ARP for an address handle, and for a queue pair on its way to RTR) is done
 *   on a thread of the NIC. A lane whose setup is under way posts nothing and cannot be closed.
 * - First frames, and all frames until the other side is known to be connected, are UD datagrams.
 *   They may be lost, doubled or forged; the core's handshake is made for that.
 * - Completions of a lane that is gone are taken out of the queue before lane_close() returns, so
 *   that none can be mistaken for those of a later lane with the same queue pair number.
 * - Whatever happens to one lane's queue pairs stays on that lane.
 */
#ifndef FAB_VERBS_H
#define FAB_VERBS_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/dl.h"
#include "providers/provider.h"

enum {
    VERBS_WINDOW = 256,      /* work requests of a lane under way */
    VERBS_INLINE = 64,       /* bytes asked for; what the device grants is used */
    VERBS_FRAME_SENDS = FAB_CONTROL_FRAMES + FAB_MESSAGE_FRAMES + 8, /* of a lane under way */
    VERBS_FRAME_RECVS = 512, /* of a NIC; a sender that finds none is told to retry (RNR) */
    VERBS_IMM_RECVS = 4096,  /* likewise */
    VERBS_IMM_REFILL = 64,   /* receives posted again in one chain */
    VERBS_UD_RECVS = 128,    /* datagrams beyond are lost */
    VERBS_UD_SENDS = 64,
    VERBS_UD_MTU = 4096,
    VERBS_GRH = 40,          /* bytes before every UD payload */
    VERBS_REPLIES = 8,       /* answers to strangers under way; lanes go first */
    VERBS_PARTIALS = 32,     /* frames of which datagrams are missing */
    VERBS_BATCH = 64,        /* completions of one poll */
    VERBS_ASYNC_TURNS = 64,  /* polls between looks at asynchronous events */
    VERBS_CQ_START = 8192,   /* places */
    VERBS_MAX_LANES = FAB_MAX_PEERS * FAB_MAX_LANES,
    VERBS_BLOB = 60,         /* bytes of an address; ARCHITECTURE.md has them */
    VERBS_DATAGRAM = 32,     /* bytes of a datagram's header, likewise */
    VERBS_RETRIES = 7,       /* the most; to rdma_rxe it means for ever */
    VERBS_RNR_FOREVER = 7,
    VERBS_RNR_TIMER = 1,     /* 0.01 ms */
};

#define VERBS_LAST_WQE_NS \
    2000000u /* lane_close waits for both queue pairs to have let go of theirs */
#define VERBS_LINGER_NS 50000000u  /* lane_close waits for frames to be taken (BYE) */
#define VERBS_MAX_WRITE (1ull << 30)
#define VERBS_ACK_UNIT_NS 4096u    /* an ack timeout of t is this times 2^t */

struct verbs_nic;
struct verbs_lane;

/* What a completion belongs to, in the low bits of wr_id. */
enum verbs_tag {
    VERBS_WRITE = 1, /* lane << 40 | sequence number << 8 */
    VERBS_SEND,      /* lane << 40 | slot << 8 */
    VERBS_IMM,
    VERBS_FRAME,     /* buffer << 8 */
    VERBS_UD_RECV,   /* buffer << 8 */
    VERBS_UD_SEND,   /* buffer << 8 */
};

/* An address, taken apart: a NIC's (token 0), or a lane's. */
struct verbs_blob {
    uint8_t link; /* IBV_LINK_LAYER_* */
    uint8_t mtu;  /* enum ibv_mtu */
    uint16_t lid;
    union ibv_gid gid;
    uint32_t ud_qpn, ud_qkey;
    uint64_t token;
    uint32_t write_qpn, write_psn;
    uint32_t frame_qpn, frame_psn;
};

/* The way to a UD queue pair. */
struct verbs_way {
    struct ibv_ah *ah;
    uint32_t qpn, qkey;
    uint32_t mtu; /* bytes */
    uint64_t token;
};

/* An address handle that nobody needs, but for datagrams that are under way. */
struct verbs_grave {
    struct verbs_grave *next;
    struct ibv_ah *ah;
    uint32_t after; /* destroyed when so many datagrams have ended */
};

/* Work of the setup thread. The thread reads the first group and writes the second. */
enum verbs_job_state { VERBS_IDLE, VERBS_QUEUED, VERBS_RUNNING, VERBS_ENDED };

struct verbs_job {
    struct verbs_job *next;
    struct verbs_lane *lane; /* NULL: a reply to a stranger */
    struct verbs_blob to;
    bool connect; /* the queue pairs too */
    uint8_t mtu;  /* of our port, as enum ibv_mtu */

    struct ibv_ah *ah;
    int rc;
    char why[FAB_TEXT_MAX];

    enum verbs_job_state state; /* under the lock of verbs_setup */
    uint8_t *frame;             /* to be sent when it has ended; allocated */
    uint32_t length;
};

struct verbs_setup {
    pthread_t thread;
    bool runs;
    pthread_mutex_t lock; /* held for a few lines only, never while something blocks */
    pthread_cond_t more;
    struct verbs_job *first, *last; /* to be done, of lanes */
    struct verbs_job *strangers;    /* and replies, when no lane waits */
    struct verbs_job *ended;
    bool stop;
    _Atomic bool any_ended;
    int wake_fd; /* eventfd, readable when one has ended */
    uint32_t replies;
};

struct verbs_srq {
    struct ibv_srq *srq;
    uint32_t depth;
    uint32_t missing; /* receives used and not posted again */
};

struct verbs_mr {
    struct ibv_mr *mr;
    bool host;
};

/* A frame that was cut into datagrams, of which some are here. */
struct verbs_partial {
    uint64_t source;
    uint64_t token;
    uint32_t serial;
    uint16_t count, length, chunk;
    uint32_t have; /* bit for each datagram */
    uint64_t age;
    uint8_t bytes[FAB_FRAME_MAX];
};

struct verbs_options { /* from the environment */
    int gid_index;     /* -1: choose */
    bool ipv6;
    int pkey; /* -1: the first */
    int ack_timeout; /* -1: from the peer timeout */
    uint8_t traffic_class, service_level;
};

struct verbs_lane {
    struct fab_lane base;
    uint64_t token;
    uint32_t index; /* in nic->lanes */
    struct ibv_qp *write_qp, *frame_qp; /* NULL once destroyed */
    uint32_t write_qpn, frame_qpn;
    uint32_t write_psn, frame_psn;
    struct verbs_blob peer; /* whom it points at; token 0: a NIC */
    struct verbs_way way;
    struct verbs_job job;
    bool again;     /* it was pointed elsewhere while its setup ran */
    bool pointed;   /* `way` is usable */
    bool connected; /* the queue pairs are */
    bool down;
    bool closing;
    bool lingered; /* on its way out */
    bool abandoned; /* closed while its setup ran; freed when that has ended */
    uint32_t inline_bytes;
    uint32_t last_wqes; /* queue pairs in error that said they take no more receives */
    uint32_t head, tail; /* of ring: sequence numbers */
    uint64_t ring[VERBS_WINDOW]; /* wr_id of the core */
    uint8_t *frames; /* VERBS_FRAME_SENDS of them, from the first frame on */
    struct ibv_mr *frames_mr;
    uint32_t frame_lengths[VERBS_FRAME_SENDS];
    uint64_t frames_free; /* bit for each slot */
    uint8_t *waiting; /* one frame, for when setup has ended; allocated */
    uint32_t waiting_length;
};

struct verbs_nic {
    struct fab_nic base;
    const struct fab_libibverbs *lib;
    struct verbs_options options;
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_device_attr device;
    struct ibv_port_attr port_attr;
    char device_name[FAB_NAME_MAX];
    uint8_t port;
    union ibv_gid gid;
    int gid_index;
    uint16_t pkey_index;
    uint8_t ack_timeout;
    uint8_t link_layer; /* IBV_LINK_LAYER_* */
    bool fatal;         /* the device is gone for good */
    bool no_last_wqe;   /* it does not tell when a queue pair has let go of its receives */
    uint64_t no_linger_before;

    struct ibv_cq *cq;
    uint32_t cq_depth, cq_reserved;
    struct ibv_wc *queue; /* completions taken out and not yet handled; cq_depth of them */
    uint32_t queue_head, queued;

    struct verbs_srq imms, frames;
    struct ibv_qp *ud;
    uint32_t qkey;
    uint64_t source; /* names us in datagrams */
    uint32_t serial; /* of the next frame */
    uint8_t *memory; /* frame receives, UD receives, UD sends */
    uint64_t memory_size;
    struct ibv_mr *memory_mr;
    uint64_t ud_sends_free; /* bit for each buffer */
    uint32_t ud_posted, ud_ended; /* datagrams, counted modulo 2^32 */
    bool ud_broken;
    uint32_t ud_recvs_out;
    struct verbs_grave *graves;
    struct verbs_partial *partials;
    uint64_t partial_clock;

    struct verbs_setup setup;
    struct verbs_lane **lanes; /* by index; NULL: free */
    uint32_t lane_slots, lane_count;
    struct { /* by queue pair number: open addressing, at least half empty */
        uint32_t qpn;
        struct verbs_lane *lane;
    } *qpns;
    uint32_t qpn_slots;
    uint32_t turn;
    bool look_async;
};

static inline struct verbs_nic *verbs_nic_of(const struct verbs_lane *lane)
{
    return (struct verbs_nic *)lane->base.nic;
}

/* verbs_device.c */
int verbs_list(fab_nic_info *out, uint32_t max);
int verbs_options_read(struct verbs_options *out);
/* Opens the device called `name` ("mlx5_0", "mlx5_0:2"; NULL: FABRIC_VERBS_NIC, or the first that
 * is up) and fills everything about its port. */
int verbs_device_open(struct verbs_nic *nic, const char *name);
/* Reads the port again, speed and state included. */
int verbs_port_read(struct verbs_nic *nic);
/* Text of "verbs NAME: WHAT failed: errno"; returns -error. */
int verbs_fail(const struct verbs_nic *nic, const char *what, int error);
/* Index of the GID to be used: NCCL's rules. -1: none is usable. */
int verbs_gid_choose(const struct ibv_gid_entry *table, int count, bool ipv6);
/* Ack timeout for which all tries together take at most a quarter of the peer timeout: devices
 * may wait up to four times as long as they are told. */
uint8_t verbs_ack_timeout(int64_t peer_timeout_ns);
uint32_t verbs_mtu_bytes(enum ibv_mtu mtu);

/* verbs_queue.c */
int verbs_cq_open(struct verbs_nic *nic);
/* Holds `places` more of the completion queue; -ENOSPC with its text. */
int verbs_cq_reserve(struct verbs_nic *nic, uint32_t places);
void verbs_cq_release(struct verbs_nic *nic, uint32_t places);
/* Takes all that is there now out of the completion queue. */
void verbs_cq_drain(struct verbs_nic *nic);
bool verbs_cq_next(struct verbs_nic *nic, struct ibv_wc *out); /* of those taken out */
int verbs_srq_open(struct verbs_nic *nic, struct verbs_srq *srq, uint32_t depth);
void verbs_imms_refill(struct verbs_nic *nic);
int verbs_frame_recv(struct verbs_nic *nic, uint32_t buffer);
int verbs_ud_recv(struct verbs_nic *nic, uint32_t buffer);
int verbs_receives_open(struct verbs_nic *nic); /* memory, shared queues, first receives */
uint8_t *verbs_frame_buffer(const struct verbs_nic *nic, uint32_t buffer);
uint8_t *verbs_ud_recv_buffer(const struct verbs_nic *nic, uint32_t buffer);
uint8_t *verbs_ud_send_buffer(const struct verbs_nic *nic, uint32_t buffer);

/* verbs_memory.c */
int verbs_mr_reg(struct fab_nic *base, const struct fab_memory *memory, struct fab_mr **out,
                 fab_key *key);
int verbs_mr_dereg(struct fab_nic *base, struct fab_mr *mr);

/* verbs_blob.c */
void verbs_blob_write(const struct verbs_blob *blob, uint8_t out[VERBS_BLOB]);
/* -EINVAL with the reason when the bytes are none of ours or do not fit our port. */
int verbs_blob_read(const struct verbs_nic *nic, const uint8_t *bytes, uint32_t length,
                    struct verbs_blob *out);
struct verbs_blob verbs_blob_of_nic(const struct verbs_nic *nic);

/* verbs_setup.c */
int verbs_setup_open(struct verbs_nic *nic);
void verbs_setup_close(struct verbs_nic *nic);
void verbs_setup_submit(struct verbs_nic *nic, struct verbs_job *job);
/* Takes a job back that has not begun. False: it runs. */
bool verbs_setup_revoke(struct verbs_nic *nic, struct verbs_job *job);
int verbs_setup_poll(struct verbs_nic *nic);
int verbs_qp_init(struct verbs_nic *nic, struct ibv_qp *qp, unsigned access);

/* verbs_contact.c */
int verbs_ud_open(struct verbs_nic *nic);
/* Sends a frame along `way`; -EAGAIN: later. */
int verbs_contact_send(struct verbs_nic *nic, const struct verbs_way *way, const uint8_t *bytes,
                       uint32_t length);
/* Once everything is flushed out of a UD queue pair that broke, it begins anew. */
void verbs_ud_repair(struct verbs_nic *nic);
void verbs_contact_sent(struct verbs_nic *nic, uint32_t buffer, bool failed);
void verbs_ah_retire(struct verbs_nic *nic, struct ibv_ah *ah);
void verbs_ahs_bury(struct verbs_nic *nic, bool all);
void verbs_contact_received(struct verbs_nic *nic, uint32_t buffer, uint32_t length);
int verbs_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                       uint32_t blob_len, const uint8_t *bytes, uint32_t length);
void verbs_origin_drop(struct fab_nic *base, struct fab_origin *origin);

/* verbs_frame.c */
int verbs_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                    const struct fab_mr *attach);
/* Sends what waited for setup. */
void verbs_lane_flush(struct verbs_lane *lane);
void verbs_frames_close(struct verbs_lane *lane);
void verbs_frame_sent(struct verbs_lane *lane, uint32_t slot, bool failed);
bool verbs_frames_out(const struct verbs_lane *lane);

/* verbs_event.c */
/* Handles up to `budget` completions; returns how many. */
int verbs_events(struct verbs_nic *nic, int budget);
/* Handles what was taken out of one lane and leaves the rest, in order. */
void verbs_events_of(struct verbs_nic *nic, struct verbs_lane *lane);
void verbs_async(struct verbs_nic *nic);

/* verbs_lane.c */
int verbs_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out);
int verbs_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length);
int verbs_lane_close(struct fab_lane *base);
void verbs_lane_abandon(struct fab_lane *base);
int verbs_post(struct fab_lane *base, const struct fab_wr *wrs, int n);
void verbs_lane_down(struct verbs_lane *lane, int error, const char *text);
/* The setup of this lane has ended. */
void verbs_lane_ready(struct verbs_lane *lane);
struct verbs_lane *verbs_lane_of_qpn(const struct verbs_nic *nic, uint32_t qpn);

#endif
