/* What a kind of NIC must be able to do. Everything else (sharding, counting, windows, the
 * handshake, deadlines) is in core/, written once.
 *
 * Contract
 * - All functions of one engine's NICs are called with that engine's progress lock held, by
 *   whichever thread holds it: a provider needs no lock and must not block. The exceptions:
 *   list() is called without an engine; mr_reg() and mr_dereg() of a provider that says so
 *   (`pins`) take long, and are called without the lock, by several threads at once.
 * - Functions return 0 or a count, or a negative errno. A text for humans goes to
 *   fab_fail_text().
 * - Events reach the core through the sink, from within poll(), post() or lane_close(). A sink
 *   function never calls back into post(), poll() or lane_close(); it may call lane_send().
 * - A lane is one connection to one peer. It is born unconnected (lane_open), is pointed at the
 *   other half (lane_connect), and dies by lane_close() only.
 * - A work request that post() took is reported exactly once by sink->completed, also when it
 *   failed or when its lane is closed. Its source may be touched until then. Status 0 means
 *   that its bytes and those of all work requests posted before it on an ordered lane are
 *   visible at the receiver.
 * - An immediate is reported to the receiver's sink->imm only after all bytes of its own work
 *   request, and on an ordered lane of all earlier ones, are visible to the CPU that polls.
 * - lane_close() is the fence. When it returns 0, nothing that the peer started on this lane
 *   lands any more, no work request of ours touches memory, every one of them has been
 *   reported, and the lane is freed. -EINPROGRESS: the peer may be inside a write; call again.
 *   -ENOTSUP: as 0, except that writes by the peer that are under way may still land.
 *   Where a NIC says that its lanes are no fences (fab_nic.fences), keys are: mr_dereg() of a
 *   registration made with `remote` ends what its key can do, and each call of mr_reg() gives
 *   another key. The peer's keys are taken back before lane_close(), which then reports what had
 *   arrived by then.
 */
#ifndef FAB_PROVIDER_H
#define FAB_PROVIDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "fabric.h"

#define FAB_FRAME_MAX 4352 /* bytes of one control frame, header included */
/* Control frames that a peer may have under way towards us beside message fragments: the
 * session layer never has more than this many unanswered. */
#define FAB_CONTROL_FRAMES 24
#define FAB_MESSAGE_FRAMES 16 /* message fragments of one peer under way, by credit */

struct fab_nic;
struct fab_lane;
struct fab_mr;     /* a provider's registration of one region with one NIC */
struct fab_remote; /* a provider's hold on one granted region of a peer */
struct fab_origin; /* where a first frame came from; valid until origin_drop or lane_open */

enum { FAB_WR_IMM = 1 };

/* One work request: write `length` bytes (0: none) and then, with FAB_WR_IMM, raise `imm`. */
struct fab_wr {
    uint64_t wr_id;
    const uint8_t *src;
    struct fab_mr *mr;         /* of src; NULL when length is 0 */
    struct fab_remote *remote; /* what import() gave; NULL when length is 0 or import is NULL */
    uint64_t addr;             /* the key's addr + offset in the region, or the doorbell's */
    uint64_t rkey;
    uint64_t length;
    uint32_t imm;
    uint32_t flags;
};

/* Many ranges of one length between two regions. Page i goes from src + from[i] * src_stride to
 * addr + to[i] * dst_stride. */
struct fab_pages {
    struct fab_wr first; /* of page 0 on both sides, and what each of them raises */
    const int32_t *from, *to;
    uint32_t count;
    uint64_t src_stride, dst_stride;
    uint64_t src_span; /* from the first byte of page 0 to the last of the furthest page, */
    uint64_t dst_span; /* on either side */
};

/* A region to be registered. */
struct fab_memory {
    uint8_t *base;
    uint64_t length;
    uint64_t number; /* of the region in its engine: what a pull names */
    int kind;        /* FAB_MEM_* */
    int device;
    int memfd; /* the sealed memfd behind it, from fab_region_alloc(), or -1 */
    int dmabuf_fd;
    uint64_t dmabuf_offset;
    bool remote; /* peers may write with the key; matters only where lanes are no fences */
};

struct fab_sink {
    void (*imm)(struct fab_lane *lane, uint32_t imm, uint32_t times);
    void (*completed)(struct fab_lane *lane, uint64_t wr_id, int status);
    /* A control frame. fd is the file descriptor that lane_send() attached, or -1; the callee
     * owns it. */
    void (*frame)(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd);
    /* A first frame, from no lane that we know. The callee ends it by origin_drop or by
     * lane_open, at once or later. origin is NULL where the provider needs none. */
    void (*hello)(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                  uint32_t length);
    /* The lane is unusable. Reported once; lane_close() must follow. */
    void (*lane_down)(struct fab_lane *lane, int error, const char *text);
    /* A frame that lane_send() took and that may not have arrived: the lane broke, or closes.
     * May be NULL. */
    void (*frame_lost)(struct fab_lane *lane, const uint8_t *bytes, uint32_t length);
    /* info.up changed: the NIC went down, or is back. May be NULL. */
    void (*nic_state)(struct fab_nic *nic, const char *text);
    /* `origin` died before it was dropped; it is freed on return. */
    void (*origin_gone)(struct fab_nic *nic, struct fab_origin *origin);
    /* Local provider: memory of our region `number`, for a copy that a peer asks us to make.
     * Checks offset and length against the region, and that `lane`'s peer was granted it.
     * NULL: refused. */
    uint8_t *(*destination)(struct fab_lane *lane, uint64_t number, uint64_t offset,
                            uint64_t length);
};

/* The base of every provider's NIC; embedded first in its own struct. */
struct fab_nic {
    const struct fab_provider *provider;
    const struct fab_sink *sink;
    void *engine;       /* of the core */
    fab_nic_info info;  /* all but doorbell is filled by nic_open */
    int wait_fd;        /* pollable: readable when something happened after arm() said 0 */
    uint32_t index;     /* in the engine */
    int64_t now;        /* when poll() is called: fab_now(), from the core */
    bool remote_needed; /* zero-length writes need the doorbell's addr and rkey */
    bool fences;        /* lane_close() is a fence; else mr_dereg() is */
};

/* The base of every provider's lane. */
struct fab_lane {
    struct fab_nic *nic;
    void *peer;                 /* of the core; NULL until it says so */
    uint32_t number;            /* among the peer's lanes */
    uint32_t window;            /* work requests that may be outstanding */
    bool established;           /* the core: the peer has connected its half, too */
    bool to_lane;               /* the core: from now on blobs are of lanes, not of a NIC */
    bool given_up;              /* the core: closing it need not wait for its last frames */
    uint8_t blob[FAB_BLOB_MAX]; /* what the peer's lane_connect() needs */
    uint32_t blob_len;
};

struct fab_nic_options {
    const char *name; /* which NIC; NULL takes the first */
    const struct fab_sink *sink;
    void *engine;
    uint32_t index;
    const uint8_t *engine_id; /* FAB_ENGINE_ID_BYTES */
    int64_t peer_timeout_ns;
    int (*turn)(void *engine); /* the engine's work, for a provider with step() */
};

struct fab_provider {
    const char *name; /* as users write it: "local", "tcp", "efa", "rxm", "verbs" */
    int kind;         /* FAB_KIND_* */
    bool pins;        /* see above: registering pins the memory */
    bool repairs;     /* lanes break and come back one by one: sink->frame_lost is called */

    /* NICs that could be opened; returns how many. 0 or a negative errno with the reason. */
    int (*list)(fab_nic_info *out, uint32_t max);
    int (*nic_open)(const struct fab_nic_options *options, struct fab_nic **out);
    void (*nic_close)(struct fab_nic *nic); /* all lanes and registrations are gone */

    int (*mr_reg)(struct fab_nic *nic, const struct fab_memory *memory, struct fab_mr **out,
                  fab_key *key);
    int (*mr_dereg)(struct fab_nic *nic, struct fab_mr *mr);

    /* A new lane: from `origin` (accepting its connection) or, when NULL, of our own. */
    int (*lane_open)(struct fab_nic *nic, struct fab_origin *origin, struct fab_lane **out);
    /* Points the lane at a NIC (first contact) or at the peer's lane (from WELCOME on). May be
     * called again with another blob. */
    int (*lane_connect)(struct fab_lane *lane, const uint8_t *blob, uint32_t length);
    int (*lane_close)(struct fab_lane *lane);
    /* lane_close() of a lane on which no session began: the provider may finish in its own time.
     * NULL: lane_close() is immediate then. */
    void (*lane_abandon)(struct fab_lane *lane);
    /* Sends one control frame, in order with other frames of this lane where the provider keeps
     * order. `attach`: the frame grants this registration (may be NULL). -EAGAIN: later. */
    int (*lane_send)(struct fab_lane *lane, const uint8_t *bytes, uint32_t length,
                     const struct fab_mr *attach);
    /* One frame to somebody with whom there is no lane (a refusal). Best effort. */
    int (*origin_reply)(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *blob,
                        uint32_t blob_len, const uint8_t *bytes, uint32_t length);
    void (*origin_drop)(struct fab_nic *nic, struct fab_origin *origin);

    /* A peer granted us `length` bytes; fd as in sink->frame (owned by the callee), `pulled` as
     * the grant says. NULL functions: nothing to hold. */
    int (*import)(struct fab_lane *lane, uint64_t number, uint64_t length, int fd, bool pulled,
                  struct fab_remote **out);
    void (*unimport)(struct fab_remote *remote);

    /* Posts up to n work requests, one doorbell; returns how many were taken. Fewer than n:
     * full for now. A negative errno: the lane is broken and none was taken. */
    int (*post)(struct fab_lane *lane, const struct fab_wr *wrs, int n);
    /* One short work request, if it can be finished within the call; it is not reported then. False:
     * nothing was done. NULL: never. */
    bool (*post_now)(struct fab_lane *lane, const struct fab_wr *wr);
    /* The same for pages. Where the lane breaks meanwhile some were written, and none counted. */
    bool (*pages_now)(struct fab_lane *lane, const struct fab_pages *pages);
    /* Polls up to about `budget` events and gives waiting work its share. Returns how many
     * things happened. */
    int (*poll)(struct fab_nic *nic, int budget);
    /* Without the lock, between nic_open and nic_close: whether poll() may find something new. NULL:
     * only poll() tells. */
    bool (*glance)(const struct fab_nic *nic);
    /* Before blocking on wait_fd. 0: block; 1: something is there, poll again. */
    int (*arm)(struct fab_nic *nic);
    void (*disarm)(struct fab_nic *nic);
    /* In a forked child: closes file descriptors, touches nothing shared. */
    void (*after_fork)(struct fab_nic *nic);
    /* Simulated time: moves it on, to `until` at most, and gives all engines their turns. Called
     * without the lock, by whoever waits. An engine on such a NIC has no worker. NULL: time passes
     * by itself. */
    int (*step)(int64_t until);
};

extern const struct fab_provider fab_provider_local;
extern const struct fab_provider fab_provider_tcp;
extern const struct fab_provider fab_provider_efa;
extern const struct fab_provider fab_provider_rxm;
extern const struct fab_provider fab_provider_verbs;
extern const struct fab_provider fab_provider_sim;

/* By name; NULL: unknown. providers.c holds the table. */
const struct fab_provider *fab_provider_named(const char *name);

/* core/clock.c: takes over fab_now() and fab_random() of the whole process; NULL: gives them back. */
void fab_time_is(int64_t (*now)(void), int (*random)(void *out, size_t length));
/* core/engine.c: no engine is open in this process. */
bool fab_no_engines(void);

/* core/log.c: a reason in words for the negative errno that the caller is about to return. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void fab_fail_text(const char *format, ...);

#endif
