/* From ranges to work requests; the contract is in post.h. */
#include "post.h"

#include <errno.h>
#include <string.h>

#include "lanes.h"
#include "message.h"
#include "peer.h"
#include "remote.h"
#include "session.h"
#include "shard.h"
#include "stats.h"
#include "transfer.h"
#include "worker.h"

#define WR_LAST 1u /* this work request ends its piece of a range */

static uint64_t make_wr_id(const struct fab_transfer *t, uint32_t share, bool last)
{
    return (uint64_t)t->slot.index << 16 | share << 8 | (last ? WR_LAST : 0);
}

/* ---- planning ---- */

static void plan_share(struct fab_transfer *t, uint32_t i, struct fab_span span, uint32_t lane)
{
    struct fab_peer *p = t->peer;
    uint64_t max = p->lanes[lane]->nic->info.max_write;
    uint64_t bytes = t->kind == FAB_K_PAGES ? t->length : span.end - span.begin;
    uint64_t ranges = t->kind == FAB_K_PAGES ? span.end - span.begin : 1;
    uint64_t per_range = bytes > max ? (bytes + max - 1) / max : 1;
    t->shares[i] = (struct fab_share){.begin = span.begin,
                                      .end = span.end,
                                      .per_range = per_range,
                                      .total = per_range * ranges,
                                      .lane = lane};
}

/* Cuts the transfer into shares, once, when the peer's lanes are known. */
static void plan(struct fab_transfer *t)
{
    struct fab_peer *p = t->peer;
    uint32_t lanes[FAB_MAX_LANES], weights[FAB_MAX_LANES], n = 1;
    if (t->kind == FAB_K_WRITE)
        n = fab_shard_pieces(t->length, p->lane_count);
    else if (t->kind == FAB_K_PAGES)
        n = t->count < p->lane_count ? (uint32_t)t->count : p->lane_count;
    n = fab_lanes_pick(p, n, lanes, weights);
    if (t->kind == FAB_K_WRITE)
        n = fab_shard_worthy(t->length, n, lanes, weights);
    t->share_count = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct fab_span span = {0, 0};
        if (t->kind == FAB_K_WRITE && n == 1)
            span.end = t->length;
        else if (t->kind == FAB_K_WRITE)
            span = fab_shard_bytes(t->length, i, n, weights);
        else if (t->kind == FAB_K_PAGES)
            span = fab_shard_items(t->count, i, n, weights);
        if (t->kind != FAB_K_PAGES || span.end > span.begin) /* few pages: a slow lane gets none */
            plan_share(t, t->share_count++, span, lanes[i]);
    }
    t->shares_open = t->pieces_left = t->share_count;
    t->started = true;
}

static bool keys_reach(const struct fab_transfer *t)
{
    for (uint32_t i = 0; i < t->share_count; i++)
        if (t->peer->lane_nic[t->shares[i].lane] >= t->import->key_count)
            return false;
    return true;
}

static bool registered(const struct fab_transfer *t)
{
    for (uint32_t i = 0; i < t->share_count; i++)
        if (!t->region->mrs[t->peer->lanes[t->shares[i].lane]->nic->index])
            return false;
    return true;
}

/* 1: may be posted; 0: waits for a grant; negative: will never be. */
static int make_ready(struct fab_transfer *t, const char **why)
{
    if (t->started)
        return 1;
    if (t->fence != atomic_load_explicit(&t->peer->their_fence, memory_order_relaxed)) {
        *why = "the receiver fenced this engine off after the transfer was begun; begin it anew";
        return FAB_E_FAILED;
    }
    if (t->length && t->import) {
        int rc = fab_grant_ready(t->import->grant, why);
        if (rc <= 0)
            return rc;
    }
    if (!fab_lane_for_frames(t->peer))
        return 0; /* the last lane broke in this turn */
    plan(t);
    if (!t->length || !t->import)
        return 1;
    if (!registered(t)) {
        *why = "the source memory has no path over this provider; open the engine with another";
        return FAB_E_FAILED;
    }
    const struct fab_import *i = t->import;
    if (i->offset > i->grant->length || i->length > i->grant->length - i->offset) {
        *why = "the descriptor reaches beyond its region: it was tampered with";
        return FAB_E_FAILED;
    }
    if (!keys_reach(t)) {
        *why = "the descriptor has no key for a NIC of its engine";
        return FAB_E_FAILED;
    }
    fab_grant_begin(t->import->grant);
    t->holds_grant = true;
    return 1;
}

/* ---- building ---- */

static void address_payload(const struct fab_transfer *t, const struct fab_share *s,
                            struct fab_wr *wr, uint64_t n)
{
    const struct fab_peer *p = t->peer;
    const struct fab_lane *lane = p->lanes[s->lane];
    uint64_t max = lane->nic->info.max_write;
    uint64_t offset = n % s->per_range * max, src = t->src, dst = t->dst, bytes = t->length;
    if (t->kind == FAB_K_PAGES) {
        uint64_t page = s->begin + n / s->per_range;
        src += (uint64_t)t->pages[page] * t->src_stride;
        dst += (uint64_t)t->pages[t->count + page] * t->dst_stride;
    } else {
        src += s->begin;
        dst += s->begin;
        bytes = s->end - s->begin;
    }
    const fab_key *key = fab_import_key(t->import, p->lane_nic[s->lane]);
    wr->src = t->region->base + src + offset;
    wr->mr = t->region->mrs[lane->nic->index];
    wr->remote = t->import->grant->remote;
    wr->addr = key->addr + t->import->offset + dst + offset;
    wr->rkey = key->rkey;
    wr->length = bytes - offset < max ? bytes - offset : max;
}

static void build(const struct fab_transfer *t, uint32_t share, uint64_t n, struct fab_wr *wr)
{
    const struct fab_share *s = &t->shares[share];
    bool last = n % s->per_range == s->per_range - 1;
    *wr = (struct fab_wr){.wr_id = make_wr_id(t, share, last)};
    if (t->length) {
        address_payload(t, s, wr, n);
    } else {
        wr->addr = t->peer->doorbells[s->lane].addr;
        wr->rkey = t->peer->doorbells[s->lane].rkey;
    }
    if (last && t->imm >= 0) {
        uint32_t pieces = t->kind == FAB_K_WRITE ? t->share_count : 1;
        wr->imm = (pieces - 1) << 28 | (uint32_t)t->imm;
        wr->flags = FAB_WR_IMM;
    }
}

/* How many work requests of the share may be posted now. */
static uint32_t share_room(const struct fab_transfer *t, const struct fab_share *s, uint32_t budget)
{
    const struct fab_lane *lane = t->peer->lanes[s->lane];
    if (!fab_lane_works(t->peer, s->lane))
        return 0;
    uint32_t used = t->peer->lane_outstanding[s->lane];
    uint32_t room = lane->window > used ? lane->window - used : 0;
    uint64_t left = s->total - s->posted;
    if (room > budget)
        room = budget;
    if (room > FAB_CHAIN)
        room = FAB_CHAIN;
    if (left < room)
        room = (uint32_t)left;
    if (room && !lane->nic->info.ordered && s->per_range > 1) {
        /* Up to the last part of the range; that one goes alone, when the others are visible. */
        uint64_t before_last = s->per_range - 1 - s->posted % s->per_range;
        if (!before_last)
            room = s->outstanding ? 0 : 1;
        else if (before_last < room)
            room = (uint32_t)before_last;
    }
    return room;
}

static void count_outstanding(struct fab_transfer *t, struct fab_share *s, int64_t by)
{
    t->outstanding = (uint32_t)(t->outstanding + by);
    s->outstanding = (uint32_t)(s->outstanding + by);
    t->peer->lane_outstanding[s->lane] = (uint32_t)(t->peer->lane_outstanding[s->lane] + by);
    t->peer->outstanding = (uint64_t)((int64_t)t->peer->outstanding + by);
}

/* ---- posting ---- */

/* One chain. Returns how many work requests were taken; *full is set when the lane takes no more
 * for now. */
static int post_chain(struct fab_transfer *t, uint32_t share, uint32_t budget, bool *full)
{
    struct fab_share *s = &t->shares[share];
    struct fab_peer *p = t->peer;
    struct fab_lane *lane = p->lanes[s->lane];
    struct fab_wr wrs[FAB_CHAIN];
    uint32_t n = share_room(t, s, budget);
    if (!n) {
        *full = true;
        return 0;
    }
    for (uint32_t i = 0; i < n; i++)
        build(t, share, s->posted + i, &wrs[i]);
    /* Counted before posting: completions may come from within post(). */
    count_outstanding(t, s, n);
    int taken = lane->nic->provider->post(lane, wrs, (int)n);
    if (taken < 0) {
        fab_text(t->nic, sizeof t->nic, "%s", lane->nic->info.name);
        fab_lane_broke(lane, fab_take_reason(taken));
        taken = 0;
    }
    count_outstanding(t, s, -((int64_t)n - taken));
    s->posted += (uint32_t)taken;
    if (taken && !t->posted)
        fab_stats_posted(p->engine, t);
    if (s->posted == s->total && !--t->shares_open)
        fab_trace_transfer(p->engine, t, FAB_TRACE_POSTED);
    if ((uint32_t)taken < n) {
        *full = true;
        fab_peer_busy(p); /* nothing may ever complete on this lane: look again next turn */
    }
    return taken;
}

static void check_done(struct fab_transfer *t)
{
    uint32_t state = atomic_load_explicit(&t->state, memory_order_relaxed);
    if (t->outstanding)
        return;
    if (state == FAB_T_DRAINING)
        fab_transfer_settle(t);
    else if (state == FAB_T_RUNNING && t->started && !t->shares_open)
        fab_transfer_done(t);
}

/* All that windows and budget allow of one transfer. */
static int post_transfer(struct fab_transfer *t, uint32_t budget)
{
    uint32_t posted = 0;
    fab_slot_ref(t); /* it may end while we look at it */
    for (uint32_t i = 0; i < t->share_count; i++) {
        bool full = false;
        while (!full && posted < budget && t->shares[i].posted < t->shares[i].total &&
               atomic_load_explicit(&t->state, memory_order_relaxed) == FAB_T_RUNNING)
            posted += (uint32_t)post_chain(t, i, budget - posted, &full);
    }
    if (atomic_load_explicit(&t->state, memory_order_relaxed) == FAB_T_RUNNING && !t->shares_open &&
        t->outstanding) {
        fab_list_remove(t);
        fab_list_append(&t->peer->inflight, t);
    }
    check_done(t);
    fab_transfer_put(t->peer->engine, t);
    return (int)posted;
}

static int post_queue(struct fab_peer *p)
{
    uint32_t posted = 0, looked = 0;
    struct fab_transfer *t = p->queue.head;
    p->posting = true;
    p->completed = false;
    while (t && posted < FAB_POST_PER_PEER && looked < FAB_POST_LOOK && !p->ending) {
        struct fab_transfer *next = t->next;
        const char *why = "";
        if (next)
            fab_slot_ref(next); /* posting may complete, and so end, any transfer of the peer */
        int rc = make_ready(t, &why);
        if (rc < 0) {
            fab_transfer_fail(t, rc, why);
        } else if (!rc) {
            looked++;
        } else {
            uint32_t before = posted;
            posted += (uint32_t)post_transfer(t, FAB_POST_PER_PEER - posted);
            looked += posted == before;
        }
        bool gone = next && next->list != &p->queue;
        if (next)
            fab_transfer_put(p->engine, next);
        if (gone) {
            fab_peer_busy(p);
            break;
        }
        t = next;
    }
    p->posting = false;
    if (p->queue.head && (posted >= FAB_POST_PER_PEER || p->completed))
        fab_peer_busy(p); /* what completed within post() may have made room */
    return (int)posted;
}

int fab_post_peer(struct fab_peer *p)
{
    if (atomic_load_explicit(&p->state, memory_order_relaxed) != FAB_P_UP || p->ending)
        return 0;
    int n = p->sending.head ? fab_message_post(p) : 0;
    return p->queue.head ? n + post_queue(p) : n;
}

void fab_post_enqueue(struct fab_transfer *t)
{
    fab_list_append(&t->peer->queue, t);
    fab_peer_busy(t->peer);
}

/* ---- completions ---- */

static void acknowledge(struct fab_transfer *t)
{
    struct fab_peer *p = t->peer;
    if (t->kind == FAB_K_WRITE && --t->pieces_left)
        return;
    t->acknowledged++;
    p->tx_ranges++;
    p->tx_bytes += t->length;
    p->engine->stats.tx_ranges++;
    p->engine->stats.tx_bytes += t->length;
}

/* The owner refused this work request alone; all else means that the lane is broken. */
static bool refused(int status)
{
    return status == -EACCES || status == -EFAULT || status == -EINVAL || status == -EPERM;
}

static void work_request_failed(struct fab_transfer *t, struct fab_lane *lane, int status)
{
    char text[FAB_TEXT_MAX];
    if (atomic_load_explicit(&t->state, memory_order_relaxed) != FAB_T_RUNNING)
        return;
    fab_text(t->nic, sizeof t->nic, "%s", lane->nic->info.name);
    fab_text(text, sizeof text, "a work request failed: %s (%d)", strerror(-status), status);
    struct fab_peer *p = t->peer;
    if (p->life[lane->number].state == FAB_L_BROKEN)
        fab_text(text, sizeof text, "%.230s", p->life[lane->number].text);
    else if (!refused(status))
        fab_lane_broke(lane, text);
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    bool lost = p->ending || state != FAB_P_UP;
    fab_transfer_fail(t, lost && !refused(status) ? FAB_E_UNREACHABLE : FAB_E_FAILED, text);
}

void fab_post_completed(struct fab_lane *lane, uint64_t wr_id, int status)
{
    struct fab_peer *p = fab_lane_peer(lane);
    if (!p)
        return; /* a lane that a NIC ends on its own, at the end of the engine */
    struct fab_engine *e = p->engine;
    struct fab_transfer *t = fab_slot_at(&e->transfers, (uint32_t)(wr_id >> 16));
    struct fab_share *s = &t->shares[wr_id >> 8 & 0xff];
    fab_slot_ref(t);
    count_outstanding(t, s, -1);
    if (status) {
        e->stats.pieces_failed++;
        work_request_failed(t, lane, status);
    } else {
        uint64_t bytes = t->kind == FAB_K_PAGES ? t->length : s->end - s->begin;
        fab_stats_acknowledged(p, lane, wr_id & WR_LAST ? bytes : 0);
        /* On tcp the peer's process acknowledges, elsewhere its NIC, which a process that hangs does not
         * stop; on `local` we do the work ourselves. */
        if (lane->nic->info.kind == FAB_KIND_OFI_TCP)
            p->last_heard = e->now;
        if (lane->nic->info.kind != FAB_KIND_LOCAL) {
            p->last_sign = e->now;
            fab_lane_alive(lane);
        }
        if (wr_id & WR_LAST)
            acknowledge(t);
    }
    check_done(t);
    fab_transfer_put(e, t);
    p->completed = true;
    if (p->queue.head && !p->posting)
        fab_peer_busy(p);
}

/* ---- a lane is gone ---- */

/* Gives what the lane did not begin to another one; the number of pieces stays. False: a range was
 * half done. Its first parts are acknowledged, but only what follows on the same lane proves that
 * they are visible. */
static bool move_share(struct fab_transfer *t, uint32_t i, uint32_t lane)
{
    struct fab_share *s = &t->shares[i];
    uint64_t done = s->posted / s->per_range;
    if (s->posted % s->per_range)
        return false;
    plan_share(t, i, (struct fab_span){s->begin, s->end}, lane);
    s->posted = done * s->per_range;
    return t->peer->lane_nic[lane] < (t->import ? t->import->key_count : FAB_MAX_NICS) &&
           (!t->region || t->region->mrs[t->peer->lanes[lane]->nic->index]);
}

static void leave_lane(struct fab_transfer *t, uint32_t lane, const char *name, const char *text)
{
    uint32_t to[FAB_MAX_LANES], weights[FAB_MAX_LANES];
    for (uint32_t i = 0; i < t->share_count; i++) {
        struct fab_share *s = &t->shares[i];
        if (s->lane != lane || s->posted == s->total)
            continue;
        if (fab_lanes_pick(t->peer, 1, to, weights) && move_share(t, i, to[0]))
            continue;
        fab_text(t->nic, sizeof t->nic, "%s", name);
        fab_transfer_fail(t, FAB_E_FAILED, text);
        return;
    }
}

void fab_post_lane_gone(struct fab_peer *p, uint32_t lane, const char *text)
{
    const char *name = p->engine->nics[p->life[lane].nic]->info.name;
    for (struct fab_transfer *t = p->queue.head, *next; t; t = next) {
        next = t->next;
        if (t->started && atomic_load_explicit(&t->state, memory_order_relaxed) == FAB_T_RUNNING)
            leave_lane(t, lane, name, text);
    }
    fab_peer_busy(p);
}

/* ---- whole peers ---- */

static void fail_list(struct fab_list *list, int code, const char *text)
{
    for (struct fab_transfer *t = list->head, *next; t; t = next) {
        next = t->next;
        fab_transfer_fail(t, code, text);
    }
}

void fab_transfers_fail_peer(struct fab_peer *p, int code, const char *text)
{
    fail_list(&p->queue, code, text);
    fail_list(&p->inflight, code, text);
    fail_list(&p->sending, code, text);
    fail_list(&p->sent, code, text);
}

static void settle_list(struct fab_list *list)
{
    for (struct fab_transfer *t = list->head, *next; t; t = next) {
        next = t->next;
        fab_transfer_settle(t);
    }
}

void fab_transfers_settle_peer(struct fab_peer *p)
{
    settle_list(&p->queue);
    settle_list(&p->inflight);
    settle_list(&p->sending);
    settle_list(&p->sent);
}

static void expire(struct fab_list *list, int64_t now)
{
    for (struct fab_transfer *t = list->head, *next; t; t = next) {
        next = t->next;
        if (t->deadline && now >= t->deadline)
            fab_transfer_fail(t, FAB_E_FAILED, "its deadline passed");
    }
}

void fab_transfers_check_deadlines(struct fab_peer *p)
{
    expire(&p->queue, p->engine->now);
    expire(&p->inflight, p->engine->now);
}
