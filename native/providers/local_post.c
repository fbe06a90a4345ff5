/* Work requests: immediates and direct copies.
 *
 * Contract
 * - A work request is taken only when its immediate has a place in the peer's ring, so nothing
 *   that was taken can be lost to a full one.
 * - Work requests are finished in the order of posting. What fits into this call is copied within
 *   it; the rest waits in a queue of LOCAL_WORK, and poll() goes on with it.
 * - Bytes go to the peer's memory in chunks under the peer's permit. When that is revoked the
 *   lane has failed, and what was not copied is reported by lane_close().
 */
#include <errno.h>
#include <string.h>

#include "local.h"

static bool is_pull(const struct fab_wr *wr)
{
    return wr->length && !wr->remote->map;
}

/* The core has checked this; a wrong address here would be a stray write. */
static bool is_sound(const struct fab_wr *wr)
{
    const struct fab_mr *mr = wr->mr;
    const struct fab_remote *remote = wr->remote;
    if (!mr || !remote || wr->addr > remote->length || wr->length > remote->length - wr->addr)
        return false;
    uint64_t offset = (uint64_t)((uintptr_t)wr->src - (uintptr_t)mr->base);
    return offset <= mr->length && wr->length <= mr->length - offset;
}

static void completed(struct local_lane *lane, const struct fab_wr *wr, int status)
{
    lane->base.nic->sink->completed(&lane->base, wr->wr_id, status);
}

/* ---- immediates ---- */

/* The peer empties slots in order, so where one is free those before it are, up to our tail. Each look is
 * at a line that the peer wrote last: one far ahead spares many of them. */
static bool slot_free(struct local_lane *lane)
{
    uint32_t index = lane->imm_tail + lane->imm_owed + (lane->raised_times ? 1 : 0);
    if ((int32_t)(lane->imm_free - index) > 0)
        return true;
    uint32_t far = index + LOCAL_IMMS_AHEAD - 1;
    if (fab_local_imm_free(lane->out, far))
        lane->imm_free = far + 1;
    else if (fab_local_imm_free(lane->out, index))
        lane->imm_free = index + 1;
    else
        return false;
    return true;
}

/* Room for one more entry. If there is none, the peer rings our bell when it has made some. */
static bool has_room(struct local_lane *lane)
{
    if (slot_free(lane))
        return true;
    atomic_store_explicit(&lane->out->hungry, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return slot_free(lane);
}

/* Equal immediates in a row become one entry, put by the flush that ends every call. */
static void raise_imm(struct local_lane *lane, uint32_t imm)
{
    if (lane->raised_times && lane->raised == imm) {
        lane->raised_times++;
        return;
    }
    if (lane->raised_times)
        fab_local_imm_put(lane->out, lane->imm_tail++, lane->raised, lane->raised_times);
    lane->raised = imm;
    lane->raised_times = 1;
    lane->to_ring = true;
}

/* ---- copies ---- */

/* Spans of up to a chunk in all, under one permit. */
static bool copy_spans(struct local_lane *lane, const struct local_span *spans, int count,
                       uint64_t length)
{
    struct local_inbox *box = lane->out;
    struct local_nic *nic = fab_local_nic(lane);
    if (!fab_local_enter(&box->busy, &box->revoked)) {
        fab_local_fail(lane, -ECONNRESET, "process %d has ended the session", (int)lane->end.pid);
        return false;
    }
    fab_local_copy(&nic->cache, spans, count, length);
    fab_local_leave(&box->busy);
    fab_local_spend(nic, length * (uint64_t)count);
    return true;
}

static struct local_span span_of(const struct fab_wr *wr, uint64_t moved)
{
    return (struct local_span){wr->remote->map + wr->addr + moved, wr->src + moved};
}

/* Goes on with a direct work request within the allowance. False: not finished. */
static bool copy_some(struct local_lane *lane, const struct fab_wr *wr, uint64_t *moved)
{
    while (*moved < wr->length) {
        uint64_t n = wr->length - *moved;
        n = n < LOCAL_CHUNK ? n : LOCAL_CHUNK;
        struct local_span span = span_of(wr, *moved);
        if (!fab_local_nic(lane)->allowance || !copy_spans(lane, &span, 1, n))
            return false;
        *moved += n;
    }
    return true;
}

/* Several pages are one copy (local_copy.h). True: `next` may be copied together with the `count`
 * work requests that `first` begins. */
static bool joins(const struct local_lane *lane, const struct fab_wr *first, int count,
                  const struct fab_wr *next)
{
    uint64_t bytes = first->length * ((uint64_t)count + 1);
    return count < LOCAL_SPANS && first->length >= LOCAL_BULK / LOCAL_SPANS &&
           next->length == first->length && bytes <= LOCAL_CHUNK &&
           bytes <= fab_local_nic(lane)->allowance && !is_pull(next) && is_sound(next);
}

/* ---- the queue ---- */

static struct local_work *work_at(struct local_lane *lane, uint32_t index)
{
    return &lane->work[index % LOCAL_WORK];
}

static bool enqueue(struct local_lane *lane, const struct fab_wr *wr)
{
    if (lane->tail - lane->head == LOCAL_WORK)
        return false;
    *work_at(lane, lane->tail++) = (struct local_work){.wr = *wr};
    if ((wr->flags & FAB_WR_IMM) && !is_pull(wr))
        lane->imm_owed++;
    return true;
}

int fab_local_settle(struct local_lane *lane)
{
    int n = 0;
    while (lane->head != lane->next) {
        struct local_work *work = work_at(lane, lane->head);
        if (work->asked || !work->issued)
            break;
        lane->head++;
        completed(lane, &work->wr, work->status);
        n++;
    }
    return n;
}

static void issued(struct local_lane *lane, struct local_work *work)
{
    if (work->wr.flags & FAB_WR_IMM) {
        lane->imm_owed--;
        raise_imm(lane, work->wr.imm);
    }
    work->issued = true;
}

/* Several of the queue at once. False: the one in front goes alone. */
static bool do_together(struct local_lane *lane)
{
    struct local_span spans[LOCAL_SPANS];
    const struct fab_wr *first = &work_at(lane, lane->next)->wr;
    int count = 0;
    while (lane->next + (uint32_t)count != lane->tail &&
           joins(lane, first, count, &work_at(lane, lane->next + (uint32_t)count)->wr)) {
        spans[count] = span_of(&work_at(lane, lane->next + (uint32_t)count)->wr, 0);
        count++;
    }
    if (count < 2 || !copy_spans(lane, spans, count, first->length))
        return false;
    for (int i = 0; i < count; i++)
        issued(lane, work_at(lane, lane->next + (uint32_t)i));
    lane->next += (uint32_t)count - 1; /* the caller goes on behind the last one */
    return true;
}

/* Direct copies or a bare immediate whose turn has come. */
static void do_direct(struct local_lane *lane, struct local_work *work)
{
    if (!work->moved && do_together(lane))
        return;
    if (!lane->fault && copy_some(lane, &work->wr, &work->moved))
        issued(lane, work);
}

/* A bare immediate behind copies that the peer makes goes the same way, to stay behind them. */
static void do_ask(struct local_lane *lane, struct local_work *work)
{
    fab_local_ask(lane, work);
    if (work->issued && !work->wr.length && (work->wr.flags & FAB_WR_IMM))
        lane->imm_owed--;
}

int fab_local_work(struct local_lane *lane)
{
    int n = 0;
    while (lane->next != lane->tail && !lane->fault) {
        struct local_work *work = work_at(lane, lane->next);
        bool behind = lane->next != lane->head;
        if (is_pull(&work->wr) || (behind && !work->wr.length))
            do_ask(lane, work);
        else if (!behind)
            do_direct(lane, work);
        if (!work->issued)
            break;
        lane->next++;
        n += fab_local_settle(lane);
    }
    if (lane->next != lane->tail && !fab_local_nic(lane)->allowance)
        fab_local_lane_pend(lane); /* else an answer of the peer's calls us */
    return n;
}

void fab_local_cancel(struct local_lane *lane)
{
    while (lane->head != lane->tail)
        completed(lane, &work_at(lane, lane->head++)->wr, -ECANCELED);
}

/* ---- posting ---- */

/* With nothing before them and enough allowance left, the work is done here and now. Returns how many
 * of the `n` work requests that `wrs` begins, which are at least one. */
static int do_now(struct local_lane *lane, const struct fab_wr *wrs, int n)
{
    struct local_span spans[LOCAL_SPANS];
    int count = 0;
    while (count < n &&
           (!count || (wrs[count].flags == wrs->flags && wrs[count].imm == wrs->imm)) &&
           joins(lane, wrs, count, &wrs[count])) {
        spans[count] = span_of(&wrs[count], 0);
        count++;
    }
    uint64_t moved = 0;
    if (count < 2)
        count = copy_some(lane, wrs, &moved);
    else if (!copy_spans(lane, spans, count, wrs->length))
        count = 0;
    for (int i = 0; i < count; i++) {
        if (wrs[i].flags & FAB_WR_IMM) /* equal ones: all go where the first one has room */
            raise_imm(lane, wrs[i].imm);
        completed(lane, &wrs[i], 0);
    }
    return count;
}

/* Takes the first of `n` work requests, and others with it where that is better. */
static int take(struct local_lane *lane, const struct fab_wr *wr, int n)
{
    if (wr->length && !is_sound(wr)) {
        completed(lane, wr, -EINVAL);
        return 1;
    }
    bool pull = is_pull(wr);
    bool now = !pull && lane->head == lane->tail && wr->length <= fab_local_nic(lane)->allowance;
    if ((wr->flags & FAB_WR_IMM) && !pull) {
        bool merges = now && lane->raised_times && lane->raised == wr->imm;
        if (!merges && !has_room(lane))
            return 0;
    }
    return now ? do_now(lane, wr, n) : enqueue(lane, wr);
}

bool fab_local_post_now(struct fab_lane *base, const struct fab_wr *wr)
{
    struct local_lane *lane = (struct local_lane *)base;
    uint64_t moved = 0;
    if (lane->fault || lane->closing || !lane->ready || lane->head != lane->tail || is_pull(wr) ||
        (wr->length && !is_sound(wr)) || ((wr->flags & FAB_WR_IMM) && !has_room(lane)))
        return false;
    fab_local_nic(lane)->allowance = LOCAL_POST_BYTES;
    if (!copy_some(lane, wr, &moved))
        return false;
    if (wr->flags & FAB_WR_IMM)
        raise_imm(lane, wr->imm);
    fab_local_lane_flush(lane);
    return true;
}

/* Pages under one permit: up to a chunk of bytes, and of pages. Returns how many; 0: revoked. */
static uint32_t copy_pages(struct local_lane *lane, const struct fab_pages *p, uint32_t begin)
{
    struct local_inbox *box = lane->out;
    const struct fab_wr *wr = &p->first;
    uint8_t *to = wr->remote->map + wr->addr;
    uint64_t most = LOCAL_CHUNK / (wr->length > LOCAL_LINE ? wr->length : LOCAL_LINE);
    uint32_t end = p->count - begin > most ? begin + (uint32_t)most : p->count;
    if (!fab_local_enter(&box->busy, &box->revoked)) {
        fab_local_fail(lane, -ECONNRESET, "process %d has ended the session", (int)lane->end.pid);
        return 0;
    }
    for (uint32_t i = begin; i < end; i++)
        memcpy(to + (uint64_t)p->to[i] * p->dst_stride,
               wr->src + (uint64_t)p->from[i] * p->src_stride, wr->length);
    fab_local_leave(&box->busy);
    return end - begin;
}

/* The furthest page as well: where page 0 lies was said by the peer, or by whoever made the
 * descriptor. */
static bool are_sound(const struct fab_pages *p)
{
    const struct fab_wr *wr = &p->first;
    if (!is_sound(wr))
        return false;
    uint64_t at = (uint64_t)((uintptr_t)wr->src - (uintptr_t)wr->mr->base);
    return p->dst_span <= wr->remote->length - wr->addr && p->src_span <= wr->mr->length - at;
}

bool fab_local_pages_now(struct fab_lane *base, const struct fab_pages *p)
{
    struct local_lane *lane = (struct local_lane *)base;
    const struct fab_wr *wr = &p->first;
    if (lane->fault || lane->closing || !lane->ready || lane->head != lane->tail || is_pull(wr) ||
        !are_sound(p) || wr->length > LOCAL_CHUNK || ((wr->flags & FAB_WR_IMM) && !has_room(lane)))
        return false;
    for (uint32_t done = 0, n; done < p->count; done += n) {
        n = copy_pages(lane, p, done);
        if (!n)
            return false;
    }
    if (wr->flags & FAB_WR_IMM) {
        raise_imm(lane, wr->imm); /* nothing was raised before it: this is one entry */
        lane->raised_times = p->count;
    }
    fab_local_lane_flush(lane);
    return true;
}

int fab_local_post(struct fab_lane *base, const struct fab_wr *wrs, int n)
{
    struct local_lane *lane = (struct local_lane *)base;
    if (lane->fault || lane->closing)
        return lane->fault ? lane->fault : -ENOTCONN;
    if (!lane->ready)
        return 0;
    fab_local_nic(lane)->allowance = LOCAL_POST_BYTES;
    int taken = 0;
    for (int more = 1; more && taken < n; taken += more)
        more = take(lane, &wrs[taken], n - taken);
    if (lane->next != lane->tail)
        fab_local_work(lane);
    fab_local_lane_flush(lane);
    return taken ? taken : lane->fault;
}
