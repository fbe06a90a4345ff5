/* Transfers that are done at once; the contract is in quick.h. */
#include "quick.h"

#include <string.h>

#include "lanes.h"
#include "remote.h"
#include "span.h"
#include "stats.h"
#include "worker.h"

/* The lane that takes it now. NULL: not the usual case. */
static struct fab_lane *lane_for(const struct fab_engine *e, const struct fab_peer *p)
{
    struct fab_lane *lane = p->lanes[0];
    if (atomic_load_explicit(&p->state, memory_order_relaxed) != FAB_P_UP || p->ending ||
        p->lane_count != 1 || !fab_lane_works(p, 0) || !lane->nic->provider->post_now ||
        p->queue.head || e->trace)
        return NULL;
    return lane;
}

/* What one in 64 is timed for may be left out (stats.h). */
static bool untimed(const struct fab_timing *timing)
{
    return timing->quick && timing->untimed < FAB_UNTIMED;
}

static void count_untimed(struct fab_timing *timing)
{
    timing->untimed++;
    timing->pending++;
}

static void count_ranges(struct fab_engine *e, struct fab_peer *p, uint32_t ranges, uint64_t bytes)
{
    p->counts[0].tx_pieces += ranges;
    p->counts[0].tx_bytes += bytes;
    p->tx_ranges += ranges;
    p->tx_bytes += bytes;
    e->stats.tx_ranges += ranges;
    e->stats.tx_bytes += bytes;
    e->stats.transfers_done++;
}

static void set_imm(struct fab_wr *wr, int64_t imm)
{
    wr->imm = imm < 0 ? 0 : (uint32_t)imm; /* of one piece: its number is 0 */
    wr->flags = imm < 0 ? 0 : FAB_WR_IMM;
}

/* A region here and a descriptor, and what joins them. */
struct ends {
    const struct fab_region *region;
    const struct fab_import *import;
    struct fab_peer *peer;
    struct fab_lane *lane;
};

static bool find_ends(struct fab_engine *e, int64_t region, int64_t remote, struct ends *ends)
{
    const struct fab_region *r = ends->region = fab_slot_peek(&e->regions, region);
    const struct fab_import *i = ends->import = fab_slot_peek(&e->imports, remote);
    if (!r || !i || r->closing || i->grant->state != FAB_G_HELD ||
        !fab_fits(i->offset, i->length, i->grant->length))
        return false;
    ends->peer = i->peer;
    ends->lane = lane_for(e, i->peer);
    return ends->lane && r->mrs[ends->lane->nic->index];
}

/* A work request from the beginning of one to the beginning of the other. */
static bool begin_at(const struct ends *ends, uint64_t src, uint64_t dst, uint64_t length,
                     int64_t imm, struct fab_wr *wr)
{
    const struct fab_import *i = ends->import;
    const fab_key *key = fab_import_key(i, ends->peer->lane_nic[0]);
    if (!key)
        return false;
    *wr = (struct fab_wr){.src = ends->region->base + src,
                          .mr = ends->region->mrs[ends->lane->nic->index],
                          .remote = i->grant->remote,
                          .addr = key->addr + i->offset + dst,
                          .rkey = key->rkey,
                          .length = length};
    set_imm(wr, imm);
    return true;
}

static bool write_now(struct fab_engine *e, const struct ends *ends, const struct fab_wr *wr)
{
    struct fab_timing *timing = &e->timing[FAB_OP_WRITE];
    if (!untimed(timing) || !ends->lane->nic->provider->post_now(ends->lane, wr))
        return false;
    count_untimed(timing);
    count_ranges(e, ends->peer, 1, wr->length);
    return true;
}

bool fab_quick_write(struct fab_engine *e, int64_t region, uint64_t src, int64_t remote,
                     uint64_t dst, uint64_t length, int64_t imm)
{
    struct ends ends;
    struct fab_wr wr;
    if (!e->quick || !length || length > FAB_SHORT_BYTES || !fab_trylock_soon(e))
        return false;
    bool done = find_ends(e, region, remote, &ends) && fab_fits(src, length, ends.region->length) &&
                fab_fits(dst, length, ends.import->length) &&
                begin_at(&ends, src, dst, length, imm, &wr) && write_now(e, &ends, &wr);
    fab_unlock(e);
    return done;
}

/* Within `limit`; *span: the bytes from page 0's first to the furthest page's last. */
static bool all_fit(const int32_t *pages, uint32_t count, uint64_t stride, uint64_t offset,
                    uint64_t length, uint64_t limit, uint64_t *span)
{
    struct fab_reach reach = fab_reach(pages, count);
    return reach.low >= 0 && fab_page_span(reach.high, stride, length, span) &&
           fab_fits(offset, *span, limit);
}

static bool pages_now(struct fab_engine *e, const struct ends *ends, const struct fab_pages *p)
{
    int64_t begin = fab_now();
    if (!ends->lane->nic->provider->pages_now(ends->lane, p))
        return false;
    fab_stats_timed(&e->timing[FAB_OP_PAGES], fab_now() - begin);
    count_ranges(e, ends->peer, p->count, p->first.length * p->count);
    return true;
}

bool fab_quick_pages(struct fab_engine *e, const struct fab_page_write *w)
{
    int32_t from[FAB_QUICK_PAGES], to[FAB_QUICK_PAGES];
    struct ends ends;
    struct fab_pages p = {.from = from,
                          .to = to,
                          .count = w->count,
                          .src_stride = w->src_stride,
                          .dst_stride = w->dst_stride};
    if (!e->quick || !w->count || w->count > FAB_QUICK_PAGES || !w->bytes ||
        w->bytes > FAB_SHORT_BYTES || w->bytes * w->count > FAB_QUICK_BYTES)
        return false;
    /* The copies are checked: another thread may change the caller's arrays meanwhile. */
    memcpy(from, w->from, sizeof *from * w->count);
    memcpy(to, w->to, sizeof *to * w->count);
    if (!fab_trylock_soon(e))
        return false;
    bool done =
        find_ends(e, w->region, w->remote, &ends) &&
        all_fit(from, w->count, w->src_stride, w->src, w->bytes, ends.region->length,
                &p.src_span) &&
        all_fit(to, w->count, w->dst_stride, w->dst, w->bytes, ends.import->length, &p.dst_span) &&
        begin_at(&ends, w->src, w->dst, w->bytes, w->imm, &p.first) && pages_now(e, &ends, &p);
    fab_unlock(e);
    return done;
}

bool fab_quick_imm(struct fab_engine *e, int64_t peer, int64_t imm)
{
    struct fab_timing *timing = &e->timing[FAB_OP_IMM];
    if (!e->quick || !fab_trylock_soon(e))
        return false;
    struct fab_peer *p = fab_slot_peek(&e->peers, peer);
    struct fab_lane *lane = p ? lane_for(e, p) : NULL;
    bool done = false;
    if (lane && untimed(timing)) {
        struct fab_wr wr = {.addr = p->doorbells[0].addr, .rkey = p->doorbells[0].rkey};
        set_imm(&wr, imm);
        done = lane->nic->provider->post_now(lane, &wr);
    }
    if (done) {
        count_untimed(timing);
        count_ranges(e, p, 1, 0);
    }
    fab_unlock(e);
    return done;
}
