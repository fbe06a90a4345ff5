/* The engine's own data, shared by the files of core/.
 *
 * Locking. `lock` is the progress lock: whoever holds it may change anything here. Fields marked
 * _Atomic are also read without it. Sink functions and everything called by fab_turn() run with it
 * held; functions named in fabric_abi.h are called without it. No other lock is ever taken while
 * it is held, save those of libc and of the provider's own library.
 */
#ifndef FAB_ENGINE_H
#define FAB_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fabric.h"
#include "frame.h"
#include "log.h"
#include "providers/provider.h"
#include "slots.h"

#define NS_PER_US INT64_C(1000)
#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S INT64_C(1000000000)

#define FAB_COMMANDS 32768          /* twice the transfers: a start and a cancel of each */
#define FAB_COMMANDS_PER_TURN 64
#define FAB_EVENTS_PER_TURN 64
#define FAB_CHAIN 32                /* work requests of one doorbell */
#define FAB_POST_PER_PEER 128       /* work requests one peer may post in a turn */
#define FAB_POST_LOOK 16            /* transfers looked at behind one that must wait */
#define FAB_TICK_NS (10 * NS_PER_MS)
#define FAB_NAP_NS (500 * NS_PER_US)
#define FAB_HELLO_EVERY_NS (100 * NS_PER_MS)
#define FAB_CONTACT_NS NS_PER_S    /* that one lane is tried for first contact */
#define FAB_LOST_FRAMES 128 /* of one peer, to be sent again over another lane */
#define FAB_DROPPED 1024 /* lanes of attempts that were given up and cannot be closed yet */
#define FAB_GRANTS_ASKED 4 /* GRANT_REQ of one session without an answer */
#define FAB_VOIDS_PENDING 1024 /* ids of one peer still to be told void */
#define FAB_VOIDS_PER_FRAME 256
#define FAB_MESSAGES_QUEUED 256 /* of one peer, not yet wholly sent */
#define FAB_NEWCOMERS 64 /* waiting for the application's word */
#define FAB_BARRED 65536 /* incarnations refused; the oldest are forgotten */
#define FAB_NO_WATCH UINT32_MAX

struct fab_engine;
struct fab_trace;
struct fab_peer;
struct fab_peer_set;
struct fab_grant;
struct fab_transfer;

/* A doubly linked list of transfers. */
struct fab_list {
    struct fab_transfer *head, *tail;
    uint32_t count;
};

/* ---- counters ---- */
enum {
    FAB_CELL_OPEN = 1,
    FAB_CELL_VOID = 2,
    FAB_CELL_USED = 4,
    FAB_CELL_OVERFLOWED = 8,
    FAB_CELL_SHARED = 16 /* early, and another peer than the one that is charged counted, too */
};

struct fab_cell {
    _Atomic uint64_t sum; /* ranges x 720720 */
    _Atomic uint32_t flags;
    uint32_t id; /* of a user cell; generation of an engine cell */
    uint32_t opens; /* counters that are open on it */
    uint32_t watch; /* first watch, or FAB_NO_WATCH */
    uint32_t early; /* user cell nobody opened yet: index + 1 of the peer charged for it */
    uint32_t next; /* hash chain or free list of user cells, index + 1 */
};

struct fab_counter {
    struct fab_slot slot;
    uint32_t first; /* cell; engine's cells come first, then the users' */
    uint32_t count;
    uint32_t id;
};

/* ---- memory ---- */
struct fab_region {
    struct fab_slot slot;
    uint8_t *base;
    uint64_t length;
    uint64_t mapped; /* bytes to unmap; 0: not ours */
    uint64_t secret;
    int kind, device;
    int memfd;
    struct fab_region *origin; /* whose memory an alias shows */
    uint32_t aliases;
    uint8_t only[FAB_ENGINE_ID_BYTES]; /* alias: the one engine it is granted to */
    bool restricted;
    _Atomic bool closing; /* nothing of ours begins any more */
    bool quiescing; /* and nobody is granted it */
    bool stuck; /* and a NIC did not let go of it */
    bool unfenced; /* a peer that is gone may still write to it, as long as this engine is open */
    _Atomic uint32_t busy; /* transfers that read from it */
    struct fab_mr *mrs[FAB_MAX_NICS];
    fab_key keys[FAB_MAX_NICS];
    struct fab_shown *shown; /* registrations for single peers (keys.h) */
    uint64_t holders[FAB_MAX_PEERS / 64];
    uint64_t ask[FAB_MAX_PEERS / 64]; /* holders to be asked to stop */
    uint64_t quiet[FAB_MAX_PEERS / 64]; /* holders that have not said that they stopped */
    uint32_t question; /* number of the QUIESCE that they answer */
};

/* A registration of the doorbell for one lane's peer. */
struct fab_bell {
    struct fab_nic *nic;
    struct fab_mr *mr;
    fab_key key;
};

/* What one peer granted us of one of its regions. */
enum fab_grant_state { FAB_G_NEW, FAB_G_ASKED, FAB_G_HELD, FAB_G_REFUSED, FAB_G_REVOKED };

struct fab_grant {
    struct fab_grant *next; /* of the same peer */
    struct fab_peer *peer;
    uint64_t region, secret;
    uint64_t length;
    enum fab_grant_state state;
    int code;
    bool due_quiesced; /* the owner waits for our QUIESCED */
    uint32_t asked, quiesced; /* numbers of our last question, and of the owner's */
    struct fab_remote *remote;
    uint32_t key_count; /* 0: the descriptor's keys are valid */
    fab_key *keys;      /* ours alone, one for each NIC of the owner */
    uint32_t users; /* fab_import entries */
    uint32_t outstanding; /* transfers that may have work requests towards it */
};

/* An imported descriptor. */
struct fab_import {
    struct fab_slot slot;
    struct fab_peer *peer;
    struct fab_grant *grant;
    uint64_t offset, length;
    int kind, device;
    uint32_t key_count;
    fab_key *keys;
};

/* ---- transfers ---- */
enum fab_transfer_kind { FAB_K_WRITE, FAB_K_PAGES, FAB_K_IMM, FAB_K_MESSAGE, FAB_K_GROUP };

struct fab_share {
    uint64_t begin, end; /* bytes of the range, or pages */
    uint64_t total; /* work requests in all */
    uint64_t per_range; /* of these, for one range */
    uint64_t posted;
    uint32_t outstanding;
    uint32_t lane;
};

struct fab_transfer {
    struct fab_slot slot;
    _Atomic uint32_t state;
    enum fab_transfer_kind kind;
    uint32_t op; /* FAB_OP_* */
    _Atomic bool cancel_asked;
    int code;
    struct fab_transfer *parent;
    struct fab_transfer *eldest, *older, *younger; /* a group's children that have not ended */
    uint32_t children;
    struct fab_region *region;
    struct fab_import *import;
    struct fab_peer *peer;
    struct fab_transfer *prev, *next;
    struct fab_list *list;
    uint64_t src, dst, length; /* offsets in the regions; length of one range */
    uint64_t src_stride, dst_stride;
    int32_t *pages; /* count source pages, then count destination pages */
    uint64_t count; /* ranges */
    int64_t imm, deadline;
    int64_t submitted; /* when; 0: not timed (stats.h) */
    int64_t waited; /* ns until its first work request, or fragment, was posted */
    uint64_t fence; /* their_fence when it was submitted (S9) */
    uint64_t acknowledged;
    uint32_t pieces_left; /* of the one range of a write */
    uint32_t outstanding;
    uint32_t shares_open; /* shares not wholly posted */
    uint32_t share_count;
    bool started, holds_grant;
    bool posted; /* some of it */
    uint32_t watch;
    /* message */
    uint8_t *bytes;
    uint64_t sent;
    uint32_t last_fragment;
    struct fab_share shares[FAB_MAX_LANES];
    char nic[FAB_NAME_MAX];
    char text[FAB_TEXT_MAX];
};

/* ---- peers ---- */
struct fab_message {
    struct fab_message *next;
    struct fab_peer *peer; /* referenced */
    uint64_t session;
    uint32_t length, fragments;
    uint8_t bytes[];
};

struct fab_fragment {
    uint32_t number, total, offset, length;
    bool held;
    uint8_t bytes[FAB_FRAGMENT_MAX];
};

struct fab_lane_life {
    uint32_t state; /* FAB_L_* */
    uint32_t nic; /* ours */
    uint32_t serial; /* how often it was opened in this session */
    uint32_t weight; /* speed, relative to the peer's other lanes */
    int64_t credit; /* of the weighted round robin */
    int64_t since, retry_at;
    uint32_t tries; /* to open it again, since it or a NIC was last up */
    bool due_down, due_open, due_opened, due_wanted;
    bool due_ready, due_probe; /* over the lane itself */
    int64_t probed; /* when the peer was last asked to say something over it */
    int64_t looked; /* when `silence` was last added to */
    int64_t silence; /* how long nothing came over it while the peer was heard otherwise */
    char text[FAB_TEXT_MAX];
};

/* What a lane has carried; outlives the session. */
struct fab_lane_counts {
    uint32_t nic; /* ours */
    uint64_t tx_bytes, tx_pieces, lost, restored;
};

/* A control frame that a lane did not get across. */
struct fab_lost_frame {
    struct fab_lost_frame *next;
    uint32_t length;
    uint8_t bytes[];
};

struct fab_peer {
    struct fab_slot slot;
    struct fab_engine *engine;
    uint8_t id[FAB_ENGINE_ID_BYTES];
    char label[FAB_NAME_MAX];
    uint32_t nic_count;
    fab_nic_info *nics; /* its address; NULL: it came to us */

    uint64_t fence; /* another number each time that we disconnect it; 0: never (S9) */
    _Atomic uint64_t their_fence; /* theirs of us, as the last handshake told it */

    _Atomic uint32_t state; /* FAB_P_* */
    _Atomic uint32_t losses; /* sessions that were lost: waits compare */
    _Atomic uint32_t waiters;
    _Atomic int64_t last_waited; /* when a wait that depended on it timed out */
    int code;
    char text[FAB_TEXT_MAX];
    _Atomic bool fence_stuck; /* FENCING, and not at once */
    bool in_busy; /* on the engine's busy list */
    struct fab_peer *busy_next;

    /* session */
    bool active; /* we sent the HELLO */
    uint64_t attempt; /* its number */
    bool greeted; /* HELLO or WELCOME was sent: the next one is a copy */
    bool welcomed; /* we accepted; the peer has not been heard since */
    uint64_t mine, theirs;
    bool was_up; /* this session */
    uint64_t attempts_over; /* its HELLOs up to this number: over, or the present session's (S4) */
    bool kept_out; /* its last word was that it bars us: it has begun nothing (S6) */
    uint8_t nonce[16], cookie[16];
    bool has_cookie;
    uint32_t kind_tried; /* bit mask of kinds that could not be reached */
    int64_t deadline, next_hello, last_ping;
    int64_t last_heard; /* its process */
    int64_t last_sign; /* that, or its NIC: for a lane to be silent beside others */
    const struct fab_provider *provider;
    struct fab_lane *lanes[FAB_MAX_LANES];
    uint32_t lane_nic[FAB_MAX_LANES]; /* the peer's NIC of each lane */
    fab_key doorbells[FAB_MAX_LANES]; /* of that NIC */
    struct fab_bell bells[FAB_MAX_LANES]; /* ours, for this peer alone (keys.h) */
    uint32_t lane_outstanding[FAB_MAX_LANES];
    struct fab_lane_life life[FAB_MAX_LANES];
    struct fab_lane_counts counts[FAB_MAX_LANES];
    uint32_t counts_used; /* lanes of the last session that was up */
    uint32_t lane_count;
    uint32_t contact; /* the lane of the handshake, and of control frames while it works */
    int64_t contact_until; /* when another lane is tried for first contact */
    bool lanes_broken; /* fab_lanes_serve() has something to do */
    struct fab_lost_frame *lost, *last_lost;
    uint32_t lost_count;
    bool in_business; /* as of the last tick */
    bool in_doubt; /* idle, and to be pinged once: see fab_session_doubt_idle() */
    bool ending; /* to be ended in this turn */
    bool no_fence;
    int end_code;
    char end_text[FAB_TEXT_MAX];

    /* control frames that are due */
    bool due_welcome, due_ready, due_ping, due_pong, due_ack, due_voided;
    uint64_t pong_stamp;
    uint32_t voided_number; /* of the last VOID that was carried out in this session */
    bool voided_any;
    uint32_t *held_voids; /* of one that waits for broken lanes to be closed */
    uint32_t held_count;
    uint32_t void_number, void_count, void_sent; /* void_sent: ids in the unanswered frame */
    uint32_t *voids;
    struct {
        uint64_t region, secret;
        uint32_t number;
    } asked[2 * FAB_GRANTS_ASKED]; /* grants the peer waits for; each may come twice */
    uint32_t asked_count;
    uint32_t grants_open; /* grants we wait for */
    uint32_t grants_asked; /* so often in all: the number of the last question */
    uint32_t quiesce_open; /* regions that it has not let go of yet */
    bool due_quiesce, due_quiesced; /* see fab_region.ask, fab_grant.due_quiesced */

    struct fab_grant *grants;
    uint32_t grant_count;
    struct fab_list queue; /* not wholly posted */
    bool posting; /* the queue is being posted; */
    bool completed; /* and a work request of it has completed since */
    struct fab_list inflight; /* wholly posted, not acknowledged */
    uint64_t outstanding;

    /* messages */
    struct fab_list sending, sent;
    uint32_t tx_next, tx_limit; /* fragment numbers */
    uint32_t rx_next, rx_taken, rx_limit; /* in order so far; taken by the user; granted */
    struct fab_message *rx_partial;
    uint32_t rx_filled;
    struct fab_fragment *rx_window; /* FAB_MESSAGE_FRAMES of them, for unordered lanes */

    uint32_t early_ids;
    bool early_overflow;
    bool lost_ids; /* it counted under some of fab_engine.lost_ids */
    uint64_t tx_bytes, tx_ranges, rx_imms, rx_frames, tx_frames;
};

/* ---- watches ---- */
enum fab_watch_kind { FAB_W_FREE, FAB_W_TRANSFER, FAB_W_COUNTER, FAB_W_MESSAGE };

struct fab_watch {
    struct fab_slot slot;
    enum fab_watch_kind kind;
    struct fab_queue *queue;
    uint64_t tag, target;
    uint32_t cell;
    struct fab_transfer *transfer;
    uint32_t next, prev; /* in the list of what is watched, slot indices */
    struct fab_peer_set *peers; /* whose loss ends the watch; NULL: none */
};

struct fab_queue {
    struct fab_slot slot;
    int fd;
    _Atomic uint32_t armed;
    _Atomic bool closed;
    uint32_t head, tail; /* under the progress lock */
    uint32_t watching; /* watches that have not posted yet */
    fab_event *events; /* FAB_MAX_WATCHES */
};

struct fab_pending { /* a HELLO that passed the checks */
    int64_t token;
    struct fab_nic *nic;
    struct fab_origin *origin;
    bool asking, shown; /* the application is to be asked; was handed the question */
    int64_t deadline;
    struct fab_hello hello;
};

/* Of all transfers of one FAB_OP_*: see stats.h. */
struct fab_timing {
    fab_histogram whole, waited;
    int64_t last; /* what the last short one took */
    bool quick; /* which ended before its submission returned */
    uint32_t untimed; /* begun since then */
    uint32_t pending; /* done, and not yet in the histograms */
};

enum fab_worker_state { FAB_AWAKE, FAB_NAPPING, FAB_SLEEPING };

struct fab_engine {
    pthread_mutex_t lock;
    _Atomic uint32_t lock_wanted; /* callers that sleep on it */
    _Atomic uint32_t lock_handed; /* how often one of them got it */
    _Atomic bool giving_way; /* the worker waits for that */
    uint8_t id[FAB_ENGINE_ID_BYTES];
    char label[FAB_NAME_MAX];
    fab_engine_config config;
    uint8_t secret[FAB_MAX_SECRET];
    uint8_t cookie_key[32];
    _Atomic bool closing, closed, forked;
    _Atomic uint32_t calls; /* API calls under way */

    struct fab_nic *nics[FAB_MAX_NICS];
    uint32_t nic_count;
    bool quick; /* one of them finishes short work requests at once: quick.h */
    struct fab_lane *dropped[FAB_DROPPED]; /* of attempts that were given up; still closing */
    uint32_t dropped_count;
    uint64_t attempts; /* to connect to somebody, so far */
    uint32_t questions; /* QUIESCE, so far */
    struct fab_mr *doorbell_mrs[FAB_MAX_NICS];
    uint8_t *doorbell; /* one page */
    uint64_t doorbell_bytes;

    struct fab_slots transfers, regions, imports, counters, peers, queues, watches;
    struct fab_cell *cells; /* FAB_MAX_COUNTERS, then FAB_MAX_USER_IDS */
    uint64_t cell_bits[FAB_MAX_COUNTERS / 64];
    uint64_t
        lost_ids[FAB_MAX_USER_IDS / 64]; /* user ids whose counts found no cell, by their hash */
    uint32_t cell_cursor;
    uint32_t *user_heads; /* hash of user ids: cell index + 1 */
    uint32_t user_free, user_touched;

    /* commands: slot index << 1 | cancel, plus a sequence number for the ring */
    struct fab_command {
        _Atomic uint64_t turn;
        uint64_t value;
    } *commands;
    _Atomic uint64_t command_tail;
    uint64_t command_head;
    _Atomic uint32_t commands_waiting;

    struct fab_peer *busy; /* peers with something to do */
    uint8_t (*barred)[FAB_ENGINE_ID_BYTES];
    uint32_t barred_count, barred_next;

    struct fab_message *inbox_head, *inbox_tail;
    _Atomic uint32_t inbox_count;
    uint32_t message_watch; /* first watch for messages */

    struct fab_pending *newcomers;
    uint32_t newcomer_count;
    int64_t next_token;

    int64_t now, last_tick, next_tick;

    /* worker and waiters */
    pthread_t worker;
    bool worker_runs;
    int (*step)(int64_t until); /* of a provider with simulated time, which needs no worker */
    int wake_fd;
    _Atomic uint32_t worker_state;
    bool armed;
    _Atomic uint32_t helped; /* a helper was here since the worker's last look */
    _Atomic uint32_t helpers;
    _Atomic uint32_t event_seq; /* futex: something changed */
    _Atomic uint32_t sleepers; /* waiters blocked on it */
    bool dirty; /* something changed in this turn */
    _Atomic bool stop;

    fab_stats stats;
    fab_nic_stats nic_stats[FAB_MAX_NICS]; /* and of peers that were forgotten */
    uint32_t nic_stats_count;
    _Atomic uint64_t queue_full;
    struct fab_timing timing[FAB_OPS];
    bool submitting; /* `now` may be of before this call (stats.h) */
    struct fab_trace *trace; /* trace.h; NULL: off */
    _Atomic bool traced;
    struct fab_engine *all_next; /* for fork */
};

static inline struct fab_peer *fab_lane_peer(const struct fab_lane *lane)
{
    return lane->peer;
}

/* API entry: every exported function that takes an engine begins and ends with these. */
int fab_enter(struct fab_engine *e);
void fab_leave(struct fab_engine *e);

int64_t fab_now(void);
int fab_random(void *out, size_t length);

#endif
