/* The table of peers; the contract is in peer.h. */
#include "peer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "counter.h"
#include "lanes.h"
#include "session.h"
#include "stats.h"
#include "worker.h"

struct fab_peer *fab_peer_find(struct fab_engine *e, const uint8_t *id)
{
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *peer = fab_slot_at(&e->peers, i);
        if (fab_slot_live(peer) && !memcmp(peer->id, id, sizeof peer->id))
            return peer;
    }
    return NULL;
}

bool fab_peer_waited_for(const struct fab_peer *p)
{
    int64_t last = atomic_load_explicit(&p->last_waited, memory_order_relaxed);
    return atomic_load_explicit(&p->waiters, memory_order_seq_cst) ||
           (last && p->engine->now - last < FAB_WAIT_GRACE_NS);
}

bool fab_peer_has_work(const struct fab_peer *p)
{
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    return state == FAB_P_CONNECTING || state == FAB_P_FENCING || p->queue.head ||
           p->inflight.head || p->sending.head || p->sent.head || p->grants_open || p->void_count ||
           p->due_quiesce || p->quiesce_open || p->ending || p->in_doubt ||
           fab_lanes_have_business(p);
}

bool fab_peer_has_business(const struct fab_peer *p)
{
    return fab_peer_has_work(p) || fab_peer_waited_for(p);
}

/* A peer that nothing refers to and that has no session makes room for a new one. */
static bool evict_one(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *peer = fab_slot_at(&e->peers, i);
        uint32_t state = atomic_load_explicit(&peer->state, memory_order_relaxed);
        if (!fab_slot_live(peer) || (state != FAB_P_IDLE && state != FAB_P_DEAD) || peer->in_busy ||
            !fab_slot_kill_unused(peer))
            continue;
        if (peer->fence)
            fab_bar(e, peer); /* its number goes with the entry (S9) */
        fab_counters_forget_peer(e, peer);
        fab_stats_forget(peer);
        fab_peer_put(e, peer);
        return true;
    }
    return false;
}

struct fab_peer *fab_peer_new(struct fab_engine *e, const uint8_t *id, const char *label)
{
    struct fab_peer *peer = fab_slot_alloc(&e->peers);
    if (!peer && evict_one(e))
        peer = fab_slot_alloc(&e->peers);
    if (!peer) {
        fab_session_doubt_idle(e); /* who comes a moment later finds room, if some of them died */
        return NULL;
    }
    memset((char *)peer + sizeof peer->slot, 0, sizeof *peer - sizeof peer->slot);
    peer->engine = e;
    memcpy(peer->id, id, sizeof peer->id);
    fab_text(peer->label, sizeof peer->label, "%s", label);
    if (fab_barred(e, id)) /* its former entry is gone, and with it the number */
        fab_random(&peer->fence, sizeof peer->fence);
    atomic_store_explicit(&peer->state, FAB_P_IDLE, memory_order_release);
    return peer;
}

struct fab_peer *fab_peer_get(struct fab_engine *e, int64_t handle)
{
    struct fab_peer *peer = fab_slot_get(&e->peers, handle);
    if (!peer)
        fab_error(FAB_E_INVALID, "unknown peer: %s",
                  handle > 0 ? "its entry was reused; add its address again" : "bad handle");
    return peer;
}

void fab_peer_put(struct fab_engine *e, struct fab_peer *peer)
{
    if (!fab_slot_put(peer))
        return;
    free(peer->nics);
    free(peer->voids);
    free(peer->held_voids);
    peer->held_voids = NULL;
    peer->nics = NULL;
    peer->voids = NULL;
    fab_slot_free(&e->peers, peer);
}

bool fab_peer_any_overflowed(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *peer = fab_slot_at(&e->peers, i);
        if (fab_slot_live(peer) && peer->early_overflow)
            return true;
    }
    return false;
}

void fab_peer_busy(struct fab_peer *peer)
{
    if (peer->in_busy)
        return;
    peer->in_busy = true;
    peer->busy_next = peer->engine->busy;
    peer->engine->busy = peer;
}

/* ---- barred incarnations ---- */

bool fab_barred(const struct fab_engine *e, const uint8_t *id)
{
    for (uint32_t i = 0; i < e->barred_count; i++)
        if (!memcmp(e->barred[i], id, FAB_ENGINE_ID_BYTES))
            return true;
    return false;
}

void fab_bar(struct fab_engine *e, struct fab_peer *peer)
{
    if (fab_barred(e, peer->id))
        return;
    bool full = e->barred_count == FAB_BARRED; /* then the one that was barred first is forgotten */
    uint32_t at = full ? e->barred_next : e->barred_count++;
    if (full)
        e->barred_next = (e->barred_next + 1) % FAB_BARRED;
    memcpy(e->barred[at], peer->id, FAB_ENGINE_ID_BYTES);
}

void fab_unbar(struct fab_engine *e, struct fab_peer *peer)
{
    for (uint32_t i = 0; i < e->barred_count; i++)
        if (!memcmp(e->barred[i], peer->id, FAB_ENGINE_ID_BYTES)) {
            memcpy(e->barred[i], e->barred[--e->barred_count], FAB_ENGINE_ID_BYTES);
            e->barred_next =
                0; /* of a table that is full again; the order is lost, and does not matter */
        }
}

/* ---- API ---- */

static int take_address(struct fab_peer *peer, const fab_peer_address *a)
{
    fab_nic_info *nics = calloc(a->nic_count, sizeof *nics);
    if (!nics)
        return fab_error(FAB_E_SYSTEM, "out of memory");
    memcpy(nics, a->nics, a->nic_count * sizeof *nics);
    peer->nics = nics;
    peer->nic_count = a->nic_count;
    return 0;
}

static int check_address(struct fab_engine *e, const fab_peer_address *a)
{
    if (!a->nic_count || a->nic_count > FAB_MAX_NICS)
        return fab_error(FAB_E_INVALID, "an address with %u NICs; 1 to %d are possible",
                         a->nic_count, FAB_MAX_NICS);
    for (uint32_t i = 0; i < a->nic_count; i++)
        if (a->nics[i].blob_len > FAB_BLOB_MAX)
            return fab_error(FAB_E_INVALID, "NIC %u has an address of %u bytes; the limit is %d", i,
                             a->nics[i].blob_len, FAB_BLOB_MAX);
    if (!memcmp(a->id, e->id, sizeof e->id))
        return fab_error(FAB_E_INVALID,
                         "the address is this engine's own; copy the memory instead");
    return 0;
}

int64_t fab_peer_add(fab_engine *e, const fab_peer_address *a)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = check_address(e, a);
    if (!result) {
        fab_lock(e);
        struct fab_peer *peer = fab_peer_find(e, a->id);
        if (!peer)
            peer = fab_peer_new(e, a->id, a->label ? a->label : "");
        if (!peer)
            result = fab_error(FAB_E_FULL, "%d peers are known and busy, the limit; close some",
                               FAB_MAX_PEERS);
        else if (!peer->nics)
            result = take_address(peer, a);
        if (!result)
            result = fab_slot_handle(peer);
        fab_unlock(e);
    }
    fab_leave(e);
    return result;
}

int fab_peer_get_info(fab_engine *e, int64_t handle, fab_peer_info *out)
{
    memset(out, 0, sizeof *out);
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_peer *p = fab_peer_get(e, handle);
    if (p) {
        fab_lock(e);
        out->state = (int32_t)atomic_load(&p->state);
        out->code = p->code;
        for (uint32_t i = 0; i < p->lane_count; i++)
            out->lanes += fab_lane_works(p, i);
        fab_text(out->label, sizeof out->label, "%s", p->label);
        fab_text(out->provider, sizeof out->provider, "%s", p->provider ? p->provider->name : "");
        fab_text(out->text, sizeof out->text, "%s", p->text);
        memcpy(out->id, p->id, sizeof out->id);
        out->tx_bytes = p->tx_bytes;
        out->tx_ranges = p->tx_ranges;
        out->tx_pieces = fab_stats_peer_pieces(p);
        out->rx_imms = p->rx_imms;
        out->rx_frames = p->rx_frames;
        out->tx_frames = p->tx_frames;
        out->outstanding = p->outstanding;
        out->queued = p->queue.count;
        fab_unlock(e);
        fab_peer_put(e, p);
    }
    fab_leave(e);
    return p ? 0 : FAB_E_INVALID;
}

int fab_peer_list(fab_engine *e, int64_t *out, uint32_t max)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire), n = 0;
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *peer = fab_slot_at(&e->peers, i);
        if (!fab_slot_live(peer))
            continue;
        if (n < max)
            out[n] = fab_slot_handle(peer);
        n++;
    }
    fab_leave(e);
    return (int)n;
}

/* ---- the peers of a wait ---- */

int fab_peer_set_open(struct fab_engine *e, struct fab_peer_set *set, const int64_t *peers,
                      uint32_t count)
{
    set->count = 0;
    set->all = set->few;
    if (count > FAB_MAX_PEERS)
        return fab_error(FAB_E_INVALID, "%u peers to wait on; the limit is %d", count,
                         FAB_MAX_PEERS);
    if (count > FAB_PEER_SET_INLINE)
        set->all = calloc(count, sizeof *set->all);
    if (!set->all)
        return fab_error(FAB_E_SYSTEM, "out of memory");
    for (uint32_t i = 0; i < count; i++) {
        struct fab_peer *peer = fab_peer_get(e, peers[i]);
        if (!peer) {
            fab_peer_set_close(e, set);
            return FAB_E_INVALID;
        }
        /* Losses first: a loss after this line is seen, whatever the state says next. */
        set->all[i].losses = atomic_load_explicit(&peer->losses, memory_order_acquire);
        set->all[i].peer = peer;
        set->count++;
        atomic_fetch_add_explicit(&peer->waiters, 1, memory_order_seq_cst);
    }
    if (count)
        fab_kick(e); /* the worker must tick while there is business */
    return 0;
}

int fab_peer_lost(const struct fab_watched_peer *watched)
{
    struct fab_peer *p = watched->peer;
    if (atomic_load_explicit(&p->losses, memory_order_acquire) != watched->losses ||
        atomic_load_explicit(&p->state, memory_order_acquire) == FAB_P_DEAD)
        return FAB_E_UNREACHABLE;
    return atomic_load_explicit(&p->fence_stuck, memory_order_acquire) ? FAB_E_FENCE_PENDING : 0;
}

int fab_peer_set_lost(const struct fab_peer_set *set)
{
    for (uint32_t i = 0; i < set->count; i++) {
        int code = fab_peer_lost(&set->all[i]);
        if (code)
            return code;
    }
    return 0;
}

/* Who is told that a peer is gone may free what it could write to: it stays out (S6). */
static void bar_the_lost(const struct fab_peer_set *set)
{
    for (uint32_t i = 0; i < set->count; i++) {
        struct fab_peer *p = set->all[i].peer;
        if (fab_peer_lost(&set->all[i]) != FAB_E_UNREACHABLE)
            continue;
        fab_session_told(p);
        fab_session_end(p, FAB_E_UNREACHABLE, "a wait had been told that it was gone", true);
    }
}

int fab_peer_set_error(const struct fab_peer_set *set)
{
    bar_the_lost(set);
    for (uint32_t i = 0; i < set->count; i++) {
        struct fab_peer *p = set->all[i].peer;
        int code = fab_peer_lost(&set->all[i]);
        if (code == FAB_E_FENCE_PENDING)
            return fab_error(code, "peer %s is gone (%s) but may still be inside a write", p->label,
                             p->end_text);
        if (code)
            return fab_error(code, "peer %s is gone: %s", p->label, p->text);
    }
    return FAB_E_UNREACHABLE;
}

void fab_peer_set_timed_out(const struct fab_peer_set *set)
{
    for (uint32_t i = 0; i < set->count; i++)
        atomic_store_explicit(&set->all[i].peer->last_waited, fab_now(), memory_order_relaxed);
}

void fab_peer_set_close(struct fab_engine *e, struct fab_peer_set *set)
{
    for (uint32_t i = 0; i < set->count; i++) {
        atomic_fetch_sub_explicit(&set->all[i].peer->waiters, 1, memory_order_seq_cst);
        fab_peer_put(e, set->all[i].peer);
    }
    if (set->all && set->all != set->few)
        free(set->all);
    set->all = set->few; /* closing again is harmless */
    set->count = 0;
}
