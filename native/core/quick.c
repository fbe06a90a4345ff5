/* Transfers that are done at once; the contract is in quick.h. */
#include "quick.h"

#include "lanes.h"
#include "stats.h"
#include "worker.h"

/* One range of one piece: what will be counted, and what for. */
struct quick {
    struct fab_peer *peer;
    struct fab_timing *timing;
    struct fab_wr wr;
};

/* The lane that takes it now. NULL: not the usual case. */
static struct fab_lane *lane_for(const struct fab_engine *e, const struct quick *q)
{
    struct fab_peer *p = q->peer;
    struct fab_lane *lane = p->lanes[0];
    if (atomic_load_explicit(&p->state, memory_order_relaxed) != FAB_P_UP || p->ending ||
        p->lane_count != 1 || !fab_lane_works(p, 0) || !lane->nic->provider->post_now ||
        p->queue.head || e->trace || !q->timing->quick || q->timing->untimed >= FAB_UNTIMED)
        return NULL;
    return lane;
}

static bool post(struct fab_engine *e, struct quick *q, struct fab_lane *lane)
{
    struct fab_peer *p = q->peer;
    if (!lane->nic->provider->post_now(lane, &q->wr))
        return false;
    q->timing->untimed++;
    q->timing->pending++;
    fab_stats_acknowledged(p, lane, q->wr.length);
    p->tx_ranges++;
    p->tx_bytes += q->wr.length;
    e->stats.tx_ranges++;
    e->stats.tx_bytes += q->wr.length;
    e->stats.transfers_done++;
    return true;
}

static bool fits(uint64_t offset, uint64_t length, uint64_t limit)
{
    return offset <= limit && length <= limit - offset;
}

static void set_imm(struct fab_wr *wr, int64_t imm)
{
    wr->imm = imm < 0 ? 0 : (uint32_t)imm; /* of one piece: its number is 0 */
    wr->flags = imm < 0 ? 0 : FAB_WR_IMM;
}

static bool write_now(struct fab_engine *e, const struct fab_region *r, uint64_t src,
                      const struct fab_import *i, uint64_t dst, uint64_t length, int64_t imm)
{
    struct quick q = {.peer = i->peer, .timing = &e->timing[FAB_OP_WRITE]};
    const struct fab_lane *lane = lane_for(e, &q);
    const struct fab_grant *g = i->grant;
    if (!lane || g->state != FAB_G_HELD || r->closing || !fits(src, length, r->length) ||
        !fits(dst, length, i->length) || !fits(i->offset, i->length, g->length))
        return false;
    uint32_t far = q.peer->lane_nic[0];
    const fab_key *key = far < g->key_count   ? &g->keys[far]
                         : far < i->key_count ? &i->keys[far]
                                              : NULL;
    if (!key || !r->mrs[lane->nic->index])
        return false;
    q.wr.src = r->base + src;
    q.wr.mr = r->mrs[lane->nic->index];
    q.wr.remote = g->remote;
    q.wr.addr = key->addr + i->offset + dst;
    q.wr.rkey = key->rkey;
    q.wr.length = length;
    set_imm(&q.wr, imm);
    return post(e, &q, q.peer->lanes[0]);
}

bool fab_quick_write(struct fab_engine *e, int64_t region, uint64_t src, int64_t remote,
                     uint64_t dst, uint64_t length, int64_t imm)
{
    if (!length || length > FAB_SHORT_BYTES || !fab_trylock_soon(e))
        return false;
    const struct fab_region *r = fab_slot_peek(&e->regions, region);
    const struct fab_import *i = fab_slot_peek(&e->imports, remote);
    bool done = r && i && write_now(e, r, src, i, dst, length, imm);
    fab_unlock(e);
    return done;
}

bool fab_quick_imm(struct fab_engine *e, int64_t peer, int64_t imm)
{
    struct quick q = {.timing = &e->timing[FAB_OP_IMM]};
    if (!fab_trylock_soon(e))
        return false;
    q.peer = fab_slot_peek(&e->peers, peer);
    struct fab_lane *lane = q.peer ? lane_for(e, &q) : NULL;
    if (lane) {
        q.wr.addr = q.peer->doorbells[0].addr;
        q.wr.rkey = q.peer->doorbells[0].rkey;
        set_imm(&q.wr, imm);
    }
    bool done = lane && post(e, &q, lane);
    fab_unlock(e);
    return done;
}
