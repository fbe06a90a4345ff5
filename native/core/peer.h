/* Peers: the table of remote engines, by id.
 *
 * A peer is an incarnation: an engine that restarted is another peer. Its slot lives as long as
 * anything refers to it; idle ones are reused when the table is full. All functions need the
 * progress lock unless they say otherwise.
 */
#ifndef FAB_PEER_H
#define FAB_PEER_H

#include "engine.h"

#define FAB_PEER_SET_INLINE 16
#define FAB_WAIT_GRACE_NS NS_PER_S

/* The peers that a wait depends on. */
struct fab_peer_set {
    uint32_t count;
    struct fab_watched_peer {
        struct fab_peer *peer;
        uint32_t losses;
    } few[FAB_PEER_SET_INLINE], *all;
};

/* By id; NULL: unknown. */
struct fab_peer *fab_peer_find(struct fab_engine *e, const uint8_t *id);
/* A new one in state IDLE; NULL: the table is full. */
struct fab_peer *fab_peer_new(struct fab_engine *e, const uint8_t *id, const char *label);
/* Without the lock: a referenced peer, or NULL with the error set. */
struct fab_peer *fab_peer_get(struct fab_engine *e, int64_t handle);
void fab_peer_put(struct fab_engine *e, struct fab_peer *peer);
bool fab_peer_any_overflowed(struct fab_engine *e);
/* Puts the peer on the list of those that fab_turn() serves. */
void fab_peer_busy(struct fab_peer *peer);
/* A wait depends on it, or did a moment ago. */
bool fab_peer_waited_for(const struct fab_peer *peer);
/* Something of ours or of its is under way. */
bool fab_peer_has_work(const struct fab_peer *peer);
/* That, or somebody waits for what it may do. */
bool fab_peer_has_business(const struct fab_peer *peer);

bool fab_barred(const struct fab_engine *e, const uint8_t *id);
void fab_bar(struct fab_engine *e, struct fab_peer *peer);
void fab_unbar(struct fab_engine *e, struct fab_peer *peer);

/* Without the lock. Opening makes sure that the peers are pinged while the wait lasts. */
int fab_peer_set_open(struct fab_engine *e, struct fab_peer_set *set, const int64_t *peers,
                      uint32_t count);
/* 0: all are there; FAB_E_UNREACHABLE: one is gone and fenced; FAB_E_FENCE_PENDING: one is gone
 * and may still be inside a write. */
int fab_peer_set_lost(const struct fab_peer_set *set);
/* With the lock: sets the error for what fab_peer_set_lost() returned, and bars who is lost. */
int fab_peer_set_error(const struct fab_peer_set *set);
int fab_peer_lost(const struct fab_watched_peer *watched);
/* The wait timed out and is likely to be gone on with: its peers stay business for a while, so that
 * waiting in slices is as good as waiting in one go. */
void fab_peer_set_timed_out(const struct fab_peer_set *set);
void fab_peer_set_close(struct fab_engine *e, struct fab_peer_set *set);

#endif
