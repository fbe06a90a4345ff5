/* What two processes of one host share: the layouts, and the protocols on them.
 *
 * Contract
 * - Every mapping is of a sealed memfd whose seals and size were checked by the mapper, so a peer
 *   that truncates what it shares cannot make us fault.
 * - A peer may write anything at any time. Indices are private to each side and masked, every
 *   value is read once into a local and checked there; what a peer scribbles costs it its lane, a
 *   wasted look or a bounded delay, nothing else.
 * - A permit lets one side touch memory that the other side may take back: take it before and
 *   give it back after each chunk. The other side revokes, and then waits until nobody is inside.
 */
#ifndef FAB_LOCAL_INBOX_H
#define FAB_LOCAL_INBOX_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "provider.h"

#define LOCAL_LANES FAB_MAX_PEERS /* of one NIC */
#define LOCAL_WORDS (LOCAL_LANES / 64)
#define LOCAL_IMMS 4096  /* immediates on the way to a receiver, per lane */
#define LOCAL_PULLS 256  /* requests to copy in, per lane */
#define LOCAL_LINE 64

/* One per NIC, shared with all its peers: which lanes have something for its owner. */
struct local_bell {
    _Atomic uint64_t bits[LOCAL_WORDS];
};

enum local_pull_state { LOCAL_PULL_FREE, LOCAL_PULL_POSTED, LOCAL_PULL_DONE };
enum local_pull_from { LOCAL_FROM_NOTHING, LOCAL_FROM_MAPPED, LOCAL_FROM_PROCESS };

/* "Copy this into your memory": written by the peer, answered in place by the owner. */
struct local_pull {
    _Atomic uint32_t state;
    int32_t status; /* 0 or a negative errno, with LOCAL_PULL_DONE */
    uint32_t from;
    uint32_t flags; /* FAB_WR_IMM */
    uint32_t imm;
    uint32_t reserved;
    uint64_t serial; /* MAPPED: of the mapping that the peer sent */
    uint64_t source; /* MAPPED: offset in it; PROCESS: address in the peer */
    uint64_t region; /* of the owner, and where in it */
    uint64_t offset;
    uint64_t length;
};

/* One per lane and direction, made by the receiver (its owner), written by the peer. */
struct local_inbox {
    /* By the owner. `sleeping` is cleared by the peer, who then owes a wake packet. */
    alignas(LOCAL_LINE) _Atomic uint32_t revoked;
    _Atomic uint32_t sleeping;
    alignas(LOCAL_LINE) _Atomic uint32_t pulling; /* permit of the peer's sources: inside */
    /* By the peer. */
    alignas(LOCAL_LINE) _Atomic uint32_t busy; /* permit of the owner's memory: inside */
    alignas(LOCAL_LINE) _Atomic uint32_t closed; /* permit of the peer's sources: revoked */
    _Atomic uint32_t hungry; /* it found the ring of immediates full */
    _Atomic uint32_t mail;   /* packets it has sent */
    /* {times, imm}; 0 is free. The peer fills, the owner empties, each in order. */
    alignas(LOCAL_LINE) _Atomic uint64_t imms[LOCAL_IMMS];
    alignas(LOCAL_LINE) struct local_pull pulls[LOCAL_PULLS];
};

_Static_assert(sizeof(struct local_pull) == LOCAL_LINE, "a request is one cache line");
_Static_assert(sizeof(struct local_inbox) <= 64 * 1024, "an inbox is small");
_Static_assert((LOCAL_IMMS & (LOCAL_IMMS - 1)) == 0, "indices are masked");
_Static_assert((LOCAL_PULLS & (LOCAL_PULLS - 1)) == 0, "indices are masked");

/* A new sealed memfd of `bytes`, mapped here. */
int fab_local_share(const char *name, size_t bytes, void **map, int *fd);
/* Maps what somebody else made, of at least `bytes`, after checking its seals and size. */
int fab_local_map(int fd, size_t bytes, int protection, void **map);
void fab_local_unmap(void *map, size_t bytes);

/* Enters a chunk. False: the permit was revoked, nothing may be touched. */
static inline bool fab_local_enter(_Atomic uint32_t *inside, _Atomic uint32_t *revoked)
{
    atomic_store_explicit(inside, 1, memory_order_relaxed);
    /* Orders our store before our look, as the revoker's fence does: one of us sees the other. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load_explicit(revoked, memory_order_acquire))
        return true;
    atomic_store_explicit(inside, 0, memory_order_release);
    return false;
}

static inline void fab_local_leave(_Atomic uint32_t *inside)
{
    atomic_store_explicit(inside, 0, memory_order_release);
}

/* One immediate, `times` over. Full: false. */
static inline bool fab_local_imm_free(struct local_inbox *box, uint32_t index)
{
    return atomic_load_explicit(&box->imms[index & (LOCAL_IMMS - 1)], memory_order_acquire) == 0;
}

static inline void fab_local_imm_put(struct local_inbox *box, uint32_t index, uint32_t imm,
                                     uint32_t times)
{
    atomic_store_explicit(&box->imms[index & (LOCAL_IMMS - 1)], (uint64_t)times << 32 | imm,
                          memory_order_release);
}

/* What stands at `index`; returns how many times, 0: nothing. Does not empty it. */
static inline uint32_t fab_local_imm_peek(struct local_inbox *box, uint32_t index, uint32_t *imm)
{
    uint64_t entry =
        atomic_load_explicit(&box->imms[index & (LOCAL_IMMS - 1)], memory_order_acquire);
    *imm = (uint32_t)entry;
    return (uint32_t)(entry >> 32);
}

static inline void fab_local_imm_empty(struct local_inbox *box, uint32_t index)
{
    atomic_store_explicit(&box->imms[index & (LOCAL_IMMS - 1)], 0, memory_order_release);
}

static inline struct local_pull *fab_local_pull_at(struct local_inbox *box, uint32_t index)
{
    return &box->pulls[index & (LOCAL_PULLS - 1)];
}

static inline bool fab_local_pull_is(struct local_inbox *box, uint32_t index,
                                     enum local_pull_state state)
{
    return atomic_load_explicit(&fab_local_pull_at(box, index)->state, memory_order_acquire) ==
           (uint32_t)state;
}

#endif
