/* Counts and times; the contract is in stats.h. */
#include "stats.h"

#include <string.h>

#include "peer.h"
#include "worker.h"

/* ---- times ---- */

uint32_t fab_bucket(uint64_t ns)
{
    if (ns < 4)
        return (uint32_t)ns;
    uint32_t octave = 63 - (uint32_t)__builtin_clzll(ns);
    uint32_t bucket = (octave - 1) * 4 + (uint32_t)(ns >> (octave - 2) & 3);
    return bucket < FAB_BUCKETS ? bucket : FAB_BUCKETS - 1;
}

static void add(fab_histogram *h, int64_t ns, uint32_t times)
{
    uint64_t value = ns > 0 ? (uint64_t)ns : 0;
    h->sum += value * times;
    h->buckets[fab_bucket(value)] += times;
}

/* Adds those that count as the last one. */
static void settle(struct fab_timing *timing)
{
    add(&timing->whole, timing->last, timing->pending);
    add(&timing->waited, 0, timing->pending);
    timing->pending = 0;
}

void fab_stats_timed(struct fab_timing *timing, int64_t ns)
{
    add(&timing->whole, ns, 1);
    add(&timing->waited, 0, 1);
}

static bool may_be_quick(const struct fab_transfer *t)
{
    return (t->op == FAB_OP_WRITE || t->op == FAB_OP_IMM) && t->count == 1 &&
           t->length <= FAB_SHORT_BYTES;
}

void fab_stats_note_submitted(struct fab_engine *e, struct fab_transfer *t, bool left)
{
    struct fab_timing *timing = &e->timing[t->op];
    timing->untimed = 0;
    if (!t->submitted)
        t->submitted = e->now = fab_now(); /* it is not as quick as those before it */
    if (may_be_quick(t))
        timing->quick = !left;
}

void fab_stats_note_posted(struct fab_transfer *t)
{
    struct fab_engine *e = t->peer->engine;
    struct fab_transfer *whole = t->parent ? t->parent : t;
    fab_trace_transfer(e, t, FAB_TRACE_POST);
    if (whole != t && whole->posted)
        return;
    whole->posted = true;
    whole->waited = whole->submitted ? e->now - whole->submitted : 0;
}

static void time_done(struct fab_engine *e, const struct fab_transfer *t)
{
    struct fab_timing *timing = &e->timing[t->op];
    /* Within a turn, the copying of much takes longer than what passed before it. */
    bool look = e->submitting || t->kind == FAB_K_PAGES || t->length > FAB_SHORT_BYTES;
    int64_t ns = (look ? fab_now() : e->now) - t->submitted;
    if (may_be_quick(t)) {
        settle(timing);
        timing->last = ns;
    }
    add(&timing->whole, ns, 1);
    add(&timing->waited, t->waited, 1);
}

void fab_stats_ended(struct fab_engine *e, struct fab_transfer *t, uint32_t state)
{
    if (state == FAB_T_DONE) {
        e->stats.transfers_done++;
        if (!t->parent && !t->submitted)
            e->timing[t->op].pending++;
        else if (!t->parent)
            time_done(e, t);
    } else if (state == FAB_T_CANCELLED) {
        e->stats.transfers_cancelled++;
    } else {
        e->stats.transfers_failed++;
        e->stats.failures[-t->code]++;
    }
    fab_trace_transfer(e, t, FAB_TRACE_END);
}

/* ---- lanes and NICs ---- */

static void add_to_nic(const struct fab_lane_counts *counts, fab_nic_stats *nics)
{
    nics[counts->nic].tx_bytes += counts->tx_bytes;
    nics[counts->nic].tx_pieces += counts->tx_pieces;
}

void fab_stats_lanes(struct fab_peer *p)
{
    for (uint32_t i = 0; i < p->lane_count; i++) {
        struct fab_lane_counts *counts = &p->counts[i];
        if (counts->nic == p->life[i].nic)
            continue;
        add_to_nic(counts, p->engine->nic_stats); /* another NIC's turn: another lane */
        *counts = (struct fab_lane_counts){.nic = p->life[i].nic};
    }
    p->counts_used = p->lane_count;
}

void fab_stats_forget(struct fab_peer *p)
{
    for (uint32_t i = 0; i < FAB_MAX_LANES; i++)
        add_to_nic(&p->counts[i], p->engine->nic_stats);
    memset(p->counts, 0, sizeof p->counts);
    p->counts_used = 0;
}

/* What all NICs have carried: of peers that are known, and of those that were. */
static void read_nics(struct fab_engine *e, fab_nic_stats nics[FAB_MAX_NICS])
{
    memcpy(nics, e->nic_stats, sizeof e->nic_stats);
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        const struct fab_peer *p = fab_slot_at(&e->peers, i);
        for (uint32_t k = 0; k < FAB_MAX_LANES; k++)
            add_to_nic(&p->counts[k], nics);
    }
}

uint64_t fab_stats_peer_pieces(const struct fab_peer *p)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < FAB_MAX_LANES; i++)
        sum += p->counts[i].tx_pieces;
    return sum;
}

/* ---- API ---- */

static void add_depths(const struct fab_peer *p, fab_stats *out)
{
    out->transfers_waiting += p->queue.count;
    out->transfers_posted += p->inflight.count;
    out->messages_sending += p->sending.count + p->sent.count;
    out->pieces_outstanding += p->outstanding;
    out->frames_waiting += p->lost_count;
}

int fab_engine_stats(fab_engine *e, fab_stats *out)
{
    if (atomic_load(&e->forked))
        return fab_error(FAB_E_CLOSED, "the engine belongs to the parent process");
    fab_nic_stats nics[FAB_MAX_NICS];
    fab_lock(e);
    *out = e->stats;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++)
        add_depths(fab_slot_at(&e->peers, i), out);
    read_nics(e, nics);
    fab_unlock(e);
    for (uint32_t i = 0; i < FAB_MAX_NICS; i++)
        out->tx_pieces += nics[i].tx_pieces;
    out->messages_waiting = atomic_load(&e->inbox_count);
    out->commands_waiting = atomic_load(&e->commands_waiting);
    out->transfers_live = atomic_load(&e->transfers.live);
    out->regions = atomic_load(&e->regions.live);
    out->counters = atomic_load(&e->counters.live);
    out->remotes = atomic_load(&e->imports.live);
    out->watches = atomic_load(&e->watches.live);
    out->queue_full = atomic_load(&e->queue_full);
    return 0;
}

int fab_engine_latency(fab_engine *e, int op, fab_histogram *whole, fab_histogram *waited)
{
    if (atomic_load(&e->forked))
        return fab_error(FAB_E_CLOSED, "the engine belongs to the parent process");
    if (op < 0 || op >= FAB_OPS)
        return fab_error(FAB_E_INVALID, "kind %d of transfers; there are %d", op, FAB_OPS);
    fab_lock(e);
    settle(&e->timing[op]);
    *whole = e->timing[op].whole;
    *waited = e->timing[op].waited;
    fab_unlock(e);
    for (uint32_t i = 0; i < FAB_BUCKETS; i++) {
        whole->count += whole->buckets[i];
        waited->count += waited->buckets[i];
    }
    return 0;
}

int fab_engine_nic_stats(fab_engine *e, fab_nic_stats *out, uint32_t max)
{
    if (atomic_load(&e->forked))
        return fab_error(FAB_E_CLOSED, "the engine belongs to the parent process");
    fab_nic_stats nics[FAB_MAX_NICS];
    fab_lock(e);
    read_nics(e, nics);
    for (uint32_t i = 0; i < e->nic_stats_count && i < max; i++) {
        out[i] = nics[i];
        out[i].up = i < e->nic_count && e->nics[i]->info.up; /* none is of a closed engine */
    }
    fab_unlock(e);
    return (int)e->nic_stats_count;
}

static void lane_stats(const struct fab_peer *p, uint32_t i, fab_lane_stats *out)
{
    const struct fab_lane_counts *counts = &p->counts[i];
    memset(out, 0, sizeof *out);
    out->state = i < p->lane_count ? (int32_t)p->life[i].state : FAB_L_GONE;
    out->remote_nic = p->lane_nic[i];
    memcpy(out->nic, p->engine->nic_stats[counts->nic].name, sizeof out->nic);
    out->tx_bytes = counts->tx_bytes;
    out->tx_pieces = counts->tx_pieces;
    out->outstanding = p->lane_outstanding[i];
    out->lost = counts->lost;
    out->restored = counts->restored;
}

int fab_peer_lanes(fab_engine *e, int64_t peer, fab_lane_stats *out, uint32_t max)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_peer *p = fab_peer_get(e, peer);
    int count = FAB_E_INVALID;
    if (p) {
        fab_lock(e);
        count = (int)p->counts_used;
        for (uint32_t i = 0; i < p->counts_used && i < max; i++)
            lane_stats(p, i, &out[i]);
        fab_unlock(e);
        fab_peer_put(e, p);
    }
    fab_leave(e);
    return count;
}
