/* The same-host provider: one NIC, "local0", whose lanes are AF_UNIX connections and shared
 * memory.
 *
 *   local_nic     open, close, registrations, poll, arm; the vtable
 *   local_lane    life and death of a lane, its packets, its bell
 *   local_origin  connections that are not lanes yet
 *   local_post    work requests: immediates and direct copies
 *   local_pull    copies that the owner of the memory makes: asking and serving
 *   local_copy    memcpy, or past the cache
 *   local_inbox   layouts of shared memory, permits
 *   local_socket  packets with file descriptors, who is at the other end
 *
 * How a lane comes up. The active side connects to the socket that the NIC's blob names and sends
 * a SETUP packet at once; the passive side sends its own only from lane_open(), so a stranger
 * whom the core has not admitted gets no memory of ours. Each side then tries to read a number
 * in the other's memory with process_vm_readv and says in READS whether it could; with both
 * packets here the lane takes work. Control frames flow from the first moment.
 *
 * How bytes move. Memory with a memfd behind it is mapped by the writer and written by memcpy.
 * Other memory is written by its owner, whom the peer asks with a request that says where the
 * bytes are: in a memfd of the peer's (sent once), in its process (process_vm_readv), or in a
 * staging memfd that it fills.
 *
 * How a sleeper wakes: whoever finds its `sleeping` set clears it and sends a WAKE packet. The
 * socket cannot be drained by another peer, nor block us, nor be something else than it says,
 * all of which an eventfd shared with every peer could.
 */
#ifndef FAB_LOCAL_H
#define FAB_LOCAL_H

#include <sys/types.h>

#include "local_copy.h"
#include "local_inbox.h"
#include "provider.h"

#define LOCAL_NAME_BYTES 16                  /* of the listening socket: random */
#define LOCAL_ORIGINS 64                     /* connections that are not lanes yet */
#define LOCAL_ORIGIN_NS INT64_C(5000000000)  /* how long one may stay silent */
#define LOCAL_ORIGIN_SAFE_NS INT64_C(100000000) /* and how long it keeps its place in a crowd */
#define LOCAL_BACKLOG 1024
#define LOCAL_ACCEPTS 16                     /* of one sweep */
#define LOCAL_EVENTS 32                      /* epoll events of one sweep */
#define LOCAL_WORK 512                       /* work requests taken and not yet finished */
#define LOCAL_IMMS_AHEAD (LOCAL_IMMS / 4)    /* how far one look at the peer's ring may reach */
#define LOCAL_CHUNK (UINT64_C(256) << 10)    /* bytes under one permit */
#define LOCAL_POST_BYTES (UINT64_C(1) << 20) /* that one post() may copy */
#define LOCAL_TURN_BYTES (UINT64_C(1) << 20) /* that one poll() may copy */
#define LOCAL_SWEEP_NS INT64_C(250000)       /* between looks at the sockets */
#define LOCAL_SCAN_NS INT64_C(20000000)      /* between looks at all lanes */
#define LOCAL_PACKETS 32                     /* of one lane and look */
#define LOCAL_LAST_PACKETS 1024              /* of a lane that has failed */
#define LOCAL_SOURCES 64                     /* mappings that a peer may have us keep, per lane */
#define LOCAL_STAGING (UINT64_C(4) << 20)    /* bytes of one lane's staging ring */
#define LOCAL_REQUEST_BYTES 256              /* what the smallest request counts in a turn */
#define LOCAL_IOVECS 64                      /* requests of one process_vm_readv */
#define LOCAL_PACKET_FDS 4

#define LOCAL_FRAME_MAGIC 0xFAB1 /* the core's frames begin with it */
#define LOCAL_NOTE_MAGIC 0xFAB2  /* and our own packets with this */
#define LOCAL_VERSION 1          /* of packets and shared layouts */

enum local_note_type {
    LOCAL_SETUP = 1, /* number: our bit; serial: bytes of the inbox; address, nonce; 2 fds */
    LOCAL_READS,     /* number: 1, I can read your memory */
    LOCAL_MAP,       /* serial, length; 1 fd */
    LOCAL_UNMAP,     /* serial */
    LOCAL_WAKE,
};

/* Our own packets. Both sides are on one host: native byte order. */
struct local_note {
    uint16_t magic;
    uint8_t version;
    uint8_t type;
    uint32_t number;
    uint64_t serial;
    uint64_t length;
    uint64_t address;
    uint64_t nonce;
};

struct local_packet {
    uint32_t length;
    uint32_t fd_count;
    int fds[LOCAL_PACKET_FDS];
    uint8_t bytes[FAB_FRAME_MAX];
};

/* Who is at the other end of a socket. */
struct local_end {
    int sock; /* -1: not connected */
    int pidfd;
    pid_t pid;
};

struct fab_mr {
    uint8_t *base;
    uint64_t length;
    uint64_t number;
    int memfd; /* the core's; -1: none */
};

struct fab_remote {
    uint64_t number;
    uint64_t length;
    uint8_t *map; /* NULL: the peer copies in */
};

/* Nobody; a stranger; one whose frame the core has; one that the core has answered. */
enum local_origin_state {
    LOCAL_O_FREE,
    LOCAL_O_WAITING,
    LOCAL_O_CLAIMED,
    LOCAL_O_ANSWERED,
};

struct fab_origin {
    int state; /* enum local_origin_state */
    struct local_end end;
    int64_t deadline; /* of one that waits or was answered */
    bool set_up;
    struct local_note setup;
    int inbox_fd, bell_fd;
};

struct local_work {
    struct fab_wr wr;
    uint64_t moved; /* bytes copied, or asked for */
    uint32_t asked; /* requests without an answer */
    bool issued;    /* nothing is left to copy or to ask for */
    int status;
};

/* A mapping that we sent to the peer, at serial % LOCAL_SOURCES. */
struct local_shown {
    uint64_t serial; /* 0: none */
    const void *what; /* a registration, or the lane (its staging ring); NULL: to be unmapped */
    uint64_t last;    /* the request after the last one that names it */
};

/* A mapping that the peer sent to us, at serial % LOCAL_SOURCES. */
struct local_source {
    uint64_t serial;
    uint64_t length;
    void *map; /* NULL: none */
};

struct local_lane {
    struct fab_lane base;
    uint32_t bit; /* which lane of its NIC */
    struct local_end end;
    uint64_t nonce; /* what the peer tries to read */
    bool armed_out; /* the socket was full: epoll tells when it is not */

    struct local_inbox *in; /* ours */
    int in_fd;              /* until it is sent */
    struct local_inbox *out; /* the peer's; NULL until its SETUP */
    struct local_bell *bell; /* the peer's, and our bit there */
    uint32_t out_bit;
    bool ready;     /* SETUP and READS are here */
    bool peer_reads; /* process_vm_readv works for it */

    int fault; /* a negative errno: the lane has failed */
    char why[FAB_TEXT_MAX];
    uint32_t last_packets; /* read since */
    bool down;             /* and the core knows */
    bool closing;

    /* immediates */
    uint32_t imm_head;         /* next to take from `in` */
    uint32_t imm_tail;         /* next to fill in `out` */
    uint32_t imm_owed;         /* slots kept for work requests in the queue */
    uint32_t imm_free;         /* slots before this one are known to be free */
    uint32_t raised, raised_times; /* not yet put: equal ones in a row become one entry */
    bool to_ring;              /* something was put */
    uint32_t mail_seen, mail_sent;

    /* Work requests in order: [head, next) are asked for and wait for answers, [next, tail) wait
     * for their turn. Both kinds of copy never overlap, so the lane keeps its order. */
    struct local_work work[LOCAL_WORK];
    uint32_t head, next, tail;
    bool serve_first; /* whose turn it is to go first */

    /* copies that the peer makes for us */
    uint64_t asked, answered; /* wide: an old entry of `shown` must never look like a new one */
    uint32_t staged[LOCAL_PULLS]; /* bytes of the staging ring behind each request */
    struct local_shown shown[LOCAL_SOURCES];
    uint64_t last_serial;
    uint32_t unmaps; /* UNMAP packets still to be sent */
    uint8_t *staging;
    int staging_fd;
    uint64_t staging_head, staging_tail; /* bytes freed, bytes filled */

    /* copies that we make for the peer */
    uint32_t served;
    uint64_t served_bytes; /* of the request at `served` */
    struct local_source sources[LOCAL_SOURCES];
};

enum local_pull_mode { LOCAL_MODE_AUTO, LOCAL_MODE_VM, LOCAL_MODE_STAGING };

struct local_nic {
    struct fab_nic base;
    int epoll, listener;
    int spare; /* given up to refuse a connection when no other file descriptor is left */
    enum local_pull_mode mode;
    struct local_bell *bell;
    int bell_fd;
    struct local_lane *lanes[LOCAL_LANES];
    uint64_t pending[LOCAL_WORDS]; /* lanes that have something left to do */
    _Atomic uint32_t words;        /* of the bitmaps, that are in use */
    uint32_t cursor;               /* the lane whose turn is next */
    uint64_t allowance;            /* bytes that may still be copied in this turn */
    struct local_cache cache;
    int64_t next_sweep, next_scan;
    bool armed;
    struct fab_origin origins[LOCAL_ORIGINS];
    uint32_t origin_count;
    struct local_packet packet; /* the one being read */
};

/* What an epoll event is about: its kind, and the index of lane or origin. */
enum local_event { LOCAL_E_LISTENER, LOCAL_E_ORIGIN, LOCAL_E_SOCKET, LOCAL_E_PIDFD };

static inline struct local_nic *fab_local_nic(const struct local_lane *lane)
{
    return (struct local_nic *)lane->base.nic;
}

/* Of the bytes that this turn may copy. */
static inline void fab_local_spend(struct local_nic *nic, uint64_t bytes)
{
    nic->allowance -= bytes < nic->allowance ? bytes : nic->allowance;
}

/* ---- local_socket ---- */
int fab_local_listen(uint8_t name[LOCAL_NAME_BYTES]);
/* Connects to `name` and finds out who is there: same user, with a pidfd. */
int fab_local_dial(const uint8_t name[LOCAL_NAME_BYTES], struct local_end *end);
/* The next connection of the same user. 1: got one, 0: none, or a negative errno. */
int fab_local_accept(struct local_nic *nic, struct local_end *end);
void fab_local_end_close(struct local_end *end);
/* True when the process at the other end runs no more. */
bool fab_local_dead(const struct local_end *end);
/* 0, -EAGAIN or why the connection is of no use. */
int fab_local_send(int sock, const void *bytes, size_t length, const int *fds, uint32_t fd_count);
/* 1: a packet, whose file descriptors the caller owns; 0: none now; else why the connection is of
 * no use. */
int fab_local_receive(int sock, struct local_packet *packet);
void fab_local_packet_drop(struct local_packet *packet);
/* True when the packet is one of ours; `note` is then filled, and `type` 0 if it is malformed. */
bool fab_local_is_note(const struct local_packet *packet, struct local_note *note);
void fab_local_watch(struct local_nic *nic, int op, int fd, uint32_t events, enum local_event kind,
                     uint32_t index);

/* ---- local_lane ---- */
int fab_local_lane_open(struct fab_nic *nic, struct fab_origin *origin, struct fab_lane **out);
int fab_local_lane_connect(struct fab_lane *lane, const uint8_t *blob, uint32_t length);
int fab_local_lane_close(struct fab_lane *lane);
int fab_local_lane_send(struct fab_lane *lane, const uint8_t *bytes, uint32_t length,
                        const struct fab_mr *attach);
/* Sends one packet of either kind and tells the peer to look. */
int fab_local_lane_packet(struct local_lane *lane, const void *bytes, size_t length, const int *fds,
                          uint32_t fd_count);
/* Marks the lane as failed; the core hears of it from poll(), after what came before. */
__attribute__((format(printf, 3, 4))) void fab_local_fail(struct local_lane *lane, int error,
                                                          const char *format, ...);
/* The lane has something left to do. */
void fab_local_lane_pend(struct local_lane *lane);
/* Puts what was raised, rings the peer's bell and wakes it if it sleeps. */
void fab_local_lane_flush(struct local_lane *lane);
int fab_local_lane_packets(struct local_lane *lane);
int fab_local_lane_event(struct local_lane *lane, uint32_t events);
/* One turn of one lane; returns how many things happened. */
int fab_local_lane_turn(struct local_lane *lane, int budget);
/* True when a turn would find something in shared memory. */
bool fab_local_lane_waiting(struct local_lane *lane);
void fab_local_lane_after_fork(struct local_lane *lane);

/* ---- local_origin ---- */
int fab_local_origin_accept(struct local_nic *nic, int64_t now);
int fab_local_origin_event(struct local_nic *nic, struct fab_origin *origin);
void fab_local_origin_expire(struct local_nic *nic, int64_t now);
/* Takes the connection out of it; the origin is gone. */
void fab_local_origin_take(struct local_nic *nic, struct fab_origin *origin);
int fab_local_origin_reply(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *blob,
                           uint32_t blob_len, const uint8_t *bytes, uint32_t length);
void fab_local_origin_drop(struct fab_nic *nic, struct fab_origin *origin);
void fab_local_origin_close(struct local_nic *nic, struct fab_origin *origin);
void fab_local_origin_after_fork(struct fab_origin *origin);

/* ---- local_post ---- */
int fab_local_post(struct fab_lane *lane, const struct fab_wr *wrs, int n);
bool fab_local_post_now(struct fab_lane *lane, const struct fab_wr *wr);
bool fab_local_pages_now(struct fab_lane *lane, const struct fab_pages *pages);
/* Goes on with the queue within the NIC's allowance; returns how many things happened. */
int fab_local_work(struct local_lane *lane);
/* Reports the work requests at the head that are finished; returns how many. */
int fab_local_settle(struct local_lane *lane);
void fab_local_cancel(struct local_lane *lane);

/* ---- local_pull ---- */
/* Asks for as much of `work` as there is room for; issued is set when it was all. */
void fab_local_ask(struct local_lane *lane, struct local_work *work);
/* Takes answers; returns how many. */
int fab_local_answers(struct local_lane *lane);
/* Copies what the peer asked for, within the NIC's allowance; returns how many were done. */
int fab_local_serve(struct local_lane *lane);
void fab_local_map_note(struct local_lane *lane, const struct local_note *note,
                        struct local_packet *packet);
/* `what` is shown no more; the UNMAP packet goes now or at a later sweep. */
void fab_local_hide(struct local_lane *lane, const void *what);
void fab_local_unmaps(struct local_lane *lane);
void fab_local_pull_free(struct local_lane *lane);

#endif
