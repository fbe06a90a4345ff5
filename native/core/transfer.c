/* Transfers: submission, waiting, the end. The contract is in transfer.h. */
#include "transfer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "message.h"
#include "peer.h"
#include "post.h"
#include "quick.h"
#include "remote.h"
#include "session.h"
#include "span.h"
#include "stats.h"
#include "watch.h"
#include "worker.h"

/* ---- lists ---- */

void fab_list_append(struct fab_list *list, struct fab_transfer *t)
{
    t->list = list;
    t->next = NULL;
    t->prev = list->tail;
    if (list->tail)
        list->tail->next = t;
    else
        list->head = t;
    list->tail = t;
    list->count++;
}

void fab_list_remove(struct fab_transfer *t)
{
    struct fab_list *list = t->list;
    if (!list)
        return;
    if (t->prev)
        t->prev->next = t->next;
    else
        list->head = t->next;
    if (t->next)
        t->next->prev = t->prev;
    else
        list->tail = t->prev;
    list->count--;
    t->list = NULL;
    t->prev = t->next = NULL;
}

/* ---- the end ---- */

void fab_transfer_put(struct fab_engine *e, struct fab_transfer *t)
{
    if (!fab_slot_put(t))
        return;
    if (t->peer)
        fab_peer_put(e, t->peer);
    free(t->pages);
    free(t->bytes);
    t->pages = NULL;
    t->bytes = NULL;
    t->peer = NULL;
    fab_slot_free(&e->transfers, t);
    fab_wake_waiters(e); /* one may wait for a slot */
}

/* The receiver waits for ranges that will not come: tell it, if it can still be told. */
static void void_id(struct fab_transfer *t)
{
    struct fab_peer *p = t->peer;
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    if (t->imm < 0 || t->acknowledged >= t->count || p->ending ||
        (state != FAB_P_UP && state != FAB_P_CONNECTING))
        return;
    uint32_t id = (uint32_t)t->imm;
    for (uint32_t i = p->void_sent; i < p->void_count; i++)
        if (p->voids[i] == id)
            return;
    if (!p->voids)
        p->voids = calloc(FAB_VOIDS_PENDING, sizeof *p->voids);
    if (!p->voids || p->void_count == FAB_VOIDS_PENDING) {
        fab_session_doom(p, FAB_E_UNREACHABLE, "too many failed transfers to tell it about");
        return;
    }
    p->voids[p->void_count++] = id;
    fab_peer_busy(p);
}

static void let_go(struct fab_engine *e, struct fab_transfer *t)
{
    fab_list_remove(t);
    if (t->holds_grant)
        fab_grant_end(t->import->grant);
    t->holds_grant = false;
    if (t->region) {
        atomic_fetch_sub_explicit(&t->region->busy, 1, memory_order_release);
        fab_region_put(e, t->region);
    }
    if (t->import)
        fab_import_put_locked(e, t->import);
    t->region = NULL;
    t->import = NULL;
}

static void child_ended(struct fab_engine *e, struct fab_transfer *parent,
                        const struct fab_transfer *child);

static void end(struct fab_engine *e, struct fab_transfer *t, uint32_t state)
{
    if (state != FAB_T_DONE && t->kind != FAB_K_MESSAGE && t->kind != FAB_K_GROUP)
        void_id(t);
    let_go(e, t);
    fab_stats_ended(e, t, state);
    struct fab_transfer *parent = t->parent;
    t->parent = NULL;
    if (parent)
        child_ended(e, parent, t);
    atomic_store_explicit(&t->state, state, memory_order_release);
    fab_watch_transfer_ended(e, t);
    e->dirty = true;
    fab_transfer_put(e, t);
}

static void leave_family(struct fab_transfer *parent, const struct fab_transfer *child)
{
    if (child->older)
        child->older->younger = child->younger;
    else
        parent->eldest = child->younger;
    if (child->younger)
        child->younger->older = child->older;
}

static void child_ended(struct fab_engine *e, struct fab_transfer *parent,
                        const struct fab_transfer *child)
{
    leave_family(parent, child);
    parent->acknowledged += child->acknowledged;
    if (child->code && !parent->code) {
        parent->code = child->code;
        memcpy(parent->text, child->text, sizeof parent->text);
        memcpy(parent->nic, child->nic, sizeof parent->nic);
        parent->peer = child->peer;
        fab_slot_ref(parent->peer);
    }
    if (--parent->children)
        return;
    uint32_t state = !parent->code                     ? FAB_T_DONE
                     : parent->code == FAB_E_CANCELLED ? FAB_T_CANCELLED
                                                       : FAB_T_FAILED;
    end(e, parent, state);
}

void fab_transfer_done(struct fab_transfer *t)
{
    end(t->peer->engine, t, FAB_T_DONE);
}

/* PeerUnreachable is not told before the peer is fenced (S5): until then the transfer drains. */
static bool fence_comes_first(const struct fab_transfer *t)
{
    const struct fab_peer *p = t->peer;
    return t->code == FAB_E_UNREACHABLE && t->list &&
           (p->ending || atomic_load_explicit(&p->state, memory_order_relaxed) == FAB_P_FENCING);
}

void fab_transfer_settle(struct fab_transfer *t)
{
    if (atomic_load_explicit(&t->state, memory_order_relaxed) == FAB_T_DRAINING &&
        !t->outstanding && !fence_comes_first(t))
        end(t->peer->engine, t, t->code == FAB_E_CANCELLED ? FAB_T_CANCELLED : FAB_T_FAILED);
}

void fab_transfer_fail(struct fab_transfer *t, int code, const char *text)
{
    if (atomic_load_explicit(&t->state, memory_order_relaxed) != FAB_T_RUNNING)
        return;
    t->code = code;
    fab_text(t->text, sizeof t->text, "%s", text);
    atomic_store_explicit(&t->state, FAB_T_DRAINING, memory_order_release);
    fab_trace_transfer(t->peer->engine, t, FAB_TRACE_DRAIN);
    if (t->list == &t->peer->queue && t->outstanding) {
        fab_list_remove(t);
        fab_list_append(&t->peer->inflight, t);
    }
    fab_transfer_settle(t);
}

static void cancel_one(struct fab_transfer *t)
{
    /* A message of which some is out must be finished, or the stream would break. */
    if (t->kind != FAB_K_MESSAGE || (!t->sent && t->list == &t->peer->sending && t->length))
        fab_transfer_fail(t, FAB_E_CANCELLED, "cancelled");
}

void fab_transfer_do_cancel(struct fab_engine *e, struct fab_transfer *t)
{
    if (t->kind == FAB_K_GROUP) {
        for (struct fab_transfer *child = t->eldest, *next; child; child = next) {
            next = child->younger;
            cancel_one(child);
        }
    } else if (atomic_load(&t->state) == FAB_T_RUNNING) {
        cancel_one(t);
    }
    fab_transfer_put(e, t); /* the command's reference */
}

/* ---- the start ---- */

static void start_one(struct fab_transfer *t)
{
    struct fab_peer *p = t->peer;
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    fab_trace_transfer(p->engine, t, FAB_TRACE_SUBMIT);
    if (state == FAB_P_IDLE || state == FAB_P_DEAD) {
        fab_session_start(p);
        state = atomic_load_explicit(&p->state, memory_order_relaxed);
    }
    if (state == FAB_P_DEAD) {
        fab_transfer_fail(t, FAB_E_UNREACHABLE, p->text);
        return;
    }
    if (t->kind == FAB_K_MESSAGE)
        fab_message_start(p, t);
    else
        fab_post_enqueue(t);
    if (state == FAB_P_FENCING)
        fab_session_told(p); /* when its end began, nobody may have been */
    if (state == FAB_P_FENCING || p->ending)
        fab_transfer_fail(t, FAB_E_UNREACHABLE, p->end_text);
}

void fab_transfer_start(struct fab_engine *e, struct fab_transfer *t)
{
    if (t->kind != FAB_K_GROUP) {
        start_one(t);
        return;
    }
    fab_trace_transfer(e, t, FAB_TRACE_SUBMIT);
    for (struct fab_transfer *child = t->eldest, *next; child; child = next) {
        next = child->younger; /* a child that cannot start ends, and leaves the chain */
        start_one(child);
    }
}

/* ---- building at submission, without the lock ---- */

static int slot_free(struct fab_engine *e, void *arg)
{
    (void)arg;
    return atomic_load_explicit(&e->transfers.live, memory_order_relaxed) < FAB_MAX_TRANSFERS;
}

/* What is left of a wait that began when `until` was `wait` away; negative: for ever. */
static int64_t left_of(int64_t wait, int64_t until)
{
    int64_t left = until - fab_now();
    return wait < 0 ? wait : left > 0 ? left : 0;
}

static struct fab_transfer *new_transfer(struct fab_engine *e, enum fab_transfer_kind kind,
                                         uint32_t op, int64_t wait)
{
    struct fab_transfer *t = fab_slot_alloc(&e->transfers);
    int64_t until = t || !wait ? 0 : fab_now() + wait;
    while (!t && wait && fab_wait(e, slot_free, NULL, left_of(wait, until)) == 1)
        t = fab_slot_alloc(&e->transfers); /* another thread may have been quicker */
    if (!t) {
        atomic_fetch_add_explicit(&e->queue_full, 1, memory_order_relaxed);
        fab_error(FAB_E_FULL, "%d transfers are under way or unreleased, the limit",
                  FAB_MAX_TRANSFERS);
        return NULL;
    }
    /* Shares are filled by the planner; texts by a failure. */
    memset((char *)t + sizeof t->slot, 0, offsetof(struct fab_transfer, shares) - sizeof t->slot);
    t->nic[0] = t->text[0] = 0;
    t->kind = kind;
    t->op = op;
    t->imm = FAB_NO_IMM;
    t->watch = FAB_NO_WATCH;
    atomic_store_explicit(&t->state, FAB_T_RUNNING, memory_order_relaxed);
    return t;
}

/* Gives back a transfer that was never submitted. */
static void discard(struct fab_engine *e, struct fab_transfer *t)
{
    if (t->region) {
        atomic_fetch_sub(&t->region->busy, 1);
        fab_region_put(e, t->region);
        fab_wake_waiters(e); /* one may wait to deregister it */
    }
    if (t->import)
        fab_import_put(e, t->import);
    fab_slot_kill(t);
    fab_transfer_put(e, t);
}

static int check_imm(int64_t imm)
{
    if (imm < FAB_NO_IMM || imm > 0x0fffffff)
        return fab_error(FAB_E_INVALID, "counter id %lld is out of range: 0 to %d", (long long)imm,
                         0x0fffffff);
    return 0;
}

static int check_span(const char *what, uint64_t offset, uint64_t length, uint64_t limit)
{
    if (fab_fits(offset, length, limit))
        return 0;
    return fab_error(FAB_E_INVALID, "%llu bytes at offset %llu end outside the %s of %llu bytes",
                     (unsigned long long)length, (unsigned long long)offset, what,
                     (unsigned long long)limit);
}

/* Takes references to both ends. */
static int take_ends(struct fab_engine *e, struct fab_transfer *t, int64_t region, int64_t remote)
{
    struct fab_region *r = fab_region_get(e, region);
    if (!r)
        return FAB_E_INVALID;
    t->region = r;
    atomic_fetch_add(&r->busy, 1);
    if (atomic_load(&r->closing)) /* deregistration looks at `busy` after setting this */
        return fab_error(FAB_E_INVALID, "the region is being deregistered");
    t->import = fab_import_get(e, remote);
    if (!t->import)
        return FAB_E_INVALID;
    t->peer = t->import->peer;
    t->fence = atomic_load(&t->peer->their_fence);
    fab_slot_ref(t->peer);
    return 0;
}

/* Starts it inline if the progress lock is free, else through the command ring. */
static int64_t submit(struct fab_engine *e, struct fab_transfer *t)
{
    int64_t handle = fab_slot_handle(t);
    fab_slot_ref(t); /* the engine's, until the end */
    if (!fab_trylock_soon(e)) {
        t->submitted = fab_now();
        fab_command(e, t->slot.index, false);
        fab_kick(e);
        return handle;
    }
    fab_stats_submit(e, t);
    fab_transfer_start(e, t);
    fab_serve(e);
    bool left = atomic_load_explicit(&t->state, memory_order_relaxed) < FAB_T_DONE;
    fab_stats_submitted(e, t, left);
    fab_unlock(e);
    if (left)
        fab_kick(e);
    return handle;
}

static int64_t submit_done(struct fab_engine *e, struct fab_transfer *t)
{
    fab_lock(e);
    fab_slot_ref(t);
    t->submitted = e->now; /* it takes no time */
    fab_trace_transfer(e, t, FAB_TRACE_SUBMIT);
    end(e, t, FAB_T_DONE);
    fab_unlock(e);
    return fab_slot_handle(t);
}

/* ---- API: write ---- */

static int fill_write(struct fab_engine *e, struct fab_transfer *t, int64_t region, uint64_t src,
                      int64_t remote, uint64_t dst, uint64_t length)
{
    int rc = take_ends(e, t, region, remote);
    if (!rc)
        rc = check_span("source region", src, length, t->region->length);
    if (!rc)
        rc = check_span("destination descriptor", dst, length, t->import->length);
    t->src = src;
    t->dst = dst;
    t->length = length;
    t->count = 1;
    return rc;
}

int64_t fab_write(fab_engine *e, int64_t region, uint64_t src, int64_t remote, uint64_t dst,
                  uint64_t length, int64_t imm, int64_t deadline, int64_t wait)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = check_imm(imm);
    if (!result && !deadline && fab_quick_write(e, region, src, remote, dst, length, imm)) {
        fab_leave(e);
        return FAB_DONE;
    }
    struct fab_transfer *t = result ? NULL : new_transfer(e, FAB_K_WRITE, FAB_OP_WRITE, wait);
    if (!t) {
        result = fab_error_code();
    } else {
        t->imm = imm;
        t->deadline = deadline;
        result = fill_write(e, t, region, src, remote, dst, length);
        if (result)
            discard(e, t);
        else if (!length && imm < 0)
            result = submit_done(e, t); /* no bytes and no count: nothing to do */
        else
            result = submit(e, t);
    }
    fab_leave(e);
    return result;
}

/* ---- API: pages ---- */

/* The span that the pages reach, or an error that names the page. */
static int check_pages(const char *what, const int32_t *pages, uint32_t count, uint64_t stride,
                       uint64_t bytes, uint64_t offset, uint64_t limit)
{
    struct fab_reach reach = fab_reach(pages, count);
    uint64_t span;
    if (reach.low < 0)
        return fab_error(FAB_E_INVALID, "page index %d of the %s is negative", reach.low, what);
    if (!fab_page_span(reach.high, stride, bytes, &span) || !fab_fits(offset, span, limit))
        return fab_error(FAB_E_INVALID,
                         "page %d of the %s ends outside its %llu bytes (stride %llu, offset %llu, "
                         "page of %llu bytes)",
                         reach.high, what, (unsigned long long)limit, (unsigned long long)stride,
                         (unsigned long long)offset, (unsigned long long)bytes);
    return 0;
}

static int fill_pages(struct fab_transfer *t, const int32_t *src_pages, const int32_t *dst_pages)
{
    uint32_t count = (uint32_t)t->count;
    if (!t->length)
        return fab_error(FAB_E_INVALID, "page_bytes is 0; pages need at least one byte");
    if (t->count > FAB_MAX_PAGES)
        return fab_error(FAB_E_INVALID, "%u pages in one call; the limit is %d", count,
                         FAB_MAX_PAGES);
    if (!count)
        return 0;
    t->pages = malloc(2 * sizeof *t->pages * count);
    if (!t->pages)
        return fab_error(FAB_E_SYSTEM, "out of memory");
    memcpy(t->pages, src_pages, sizeof *t->pages * count);
    memcpy(t->pages + count, dst_pages, sizeof *t->pages * count);
    /* The copies are checked: another thread may change the caller's arrays meanwhile. */
    int rc = check_pages("source region", t->pages, count, t->src_stride, t->length, t->src,
                         t->region->length);
    if (!rc)
        rc = check_pages("destination descriptor", t->pages + count, count, t->dst_stride,
                         t->length, t->dst, t->import->length);
    return rc;
}

int64_t fab_write_pages(fab_engine *e, int64_t region, int64_t remote, const int32_t *src_pages,
                        const int32_t *dst_pages, uint32_t count, uint64_t page_bytes,
                        uint64_t src_stride, uint64_t dst_stride, uint64_t src_offset,
                        uint64_t dst_offset, int64_t imm, int64_t deadline, int64_t wait)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = check_imm(imm);
    struct fab_page_write w = {.region = region,
                               .remote = remote,
                               .imm = imm,
                               .from = src_pages,
                               .to = dst_pages,
                               .count = count,
                               .bytes = page_bytes,
                               .src_stride = src_stride,
                               .dst_stride = dst_stride,
                               .src = src_offset,
                               .dst = dst_offset};
    if (!result && !deadline && fab_quick_pages(e, &w)) {
        fab_leave(e);
        return FAB_DONE;
    }
    struct fab_transfer *t = result ? NULL : new_transfer(e, FAB_K_PAGES, FAB_OP_PAGES, wait);
    if (!t) {
        result = fab_error_code();
    } else {
        t->imm = imm;
        t->deadline = deadline;
        t->src = src_offset;
        t->dst = dst_offset;
        t->src_stride = src_stride;
        t->dst_stride = dst_stride;
        t->length = page_bytes;
        t->count = count;
        result = take_ends(e, t, region, remote);
        if (!result)
            result = fill_pages(t, src_pages, dst_pages);
        if (result)
            discard(e, t);
        else
            result = count ? submit(e, t) : submit_done(e, t);
    }
    fab_leave(e);
    return result;
}

/* ---- API: scatter, immediates ---- */

/* What a scatter or a barrier was called with. */
struct group {
    int64_t (*build)(struct fab_engine *e, struct group *g);
    int64_t region;
    const fab_target *targets; /* scatter */
    const int64_t *peers;      /* immediates */
    uint32_t count;
    int64_t imm, deadline;
};

static void discard_group(struct fab_engine *e, struct fab_transfer *parent)
{
    for (struct fab_transfer *child = parent->eldest, *next; child; child = next) {
        next = child->younger;
        discard(e, child);
    }
    discard(e, parent);
}

/* One more child. NULL with the error set: the group is to be discarded. */
static struct fab_transfer *add_child(struct fab_engine *e, struct fab_transfer *parent,
                                      enum fab_transfer_kind kind)
{
    struct fab_transfer *child = new_transfer(e, kind, parent->op, 0);
    if (!child)
        return NULL;
    child->parent = parent;
    child->imm = parent->imm;
    child->deadline = parent->deadline;
    child->count = 1;
    child->younger = parent->eldest;
    if (child->younger)
        child->younger->older = child;
    parent->eldest = child;
    parent->children++;
    return child;
}

/* Children hold only the engine's reference: nobody has their handles. */
static int64_t submit_group(struct fab_engine *e, struct fab_transfer *parent)
{
    if (!parent->children)
        return submit_done(e, parent);
    for (struct fab_transfer *child = parent->eldest; child; child = child->younger)
        fab_slot_kill(child);
    return submit(e, parent);
}

static struct fab_transfer *new_group(struct fab_engine *e, const struct group *g, uint32_t op)
{
    struct fab_transfer *parent = new_transfer(e, FAB_K_GROUP, op, 0);
    if (parent) {
        parent->imm = g->imm;
        parent->deadline = g->deadline;
        parent->count = g->count;
    }
    return parent;
}

static int room_for_group(struct fab_engine *e, void *arg)
{
    const struct group *g = arg;
    uint32_t live = atomic_load_explicit(&e->transfers.live, memory_order_relaxed);
    return live + g->count + 1 <= FAB_MAX_TRANSFERS;
}

/* All slots of a group or none: who held some while waiting for more could block another such for
 * ever. So a group that finds the table full is given up, and tried again when there is room. */
static int64_t submit_when_room(struct fab_engine *e, struct group *g, int64_t wait)
{
    int64_t until = wait < 0 ? INT64_MAX : fab_now() + wait;
    for (;;) {
        int64_t result = g->build(e, g);
        int64_t left = wait < 0 ? -1 : until - fab_now();
        if (result != FAB_E_FULL || !wait || (wait > 0 && left <= 0))
            return result;
        int rc = fab_wait(e, room_for_group, g, left);
        if (rc != 1)
            return rc == FAB_E_CLOSED ? rc : result;
    }
}

static int64_t build_scatter(struct fab_engine *e, struct group *g)
{
    struct fab_transfer *parent = new_group(e, g, FAB_OP_SCATTER);
    int64_t result = parent ? 0 : fab_error_code();
    for (uint32_t i = 0; !result && i < g->count; i++) {
        const fab_target *row = &g->targets[i];
        if (!row->length && g->imm < 0)
            continue; /* no bytes and no count */
        struct fab_transfer *t = add_child(e, parent, FAB_K_WRITE);
        result = t ? fill_write(e, t, g->region, row->src_offset, row->remote, row->dst_offset,
                                row->length)
                   : fab_error_code();
        parent->length += row->length;
    }
    if (!result)
        return submit_group(e, parent);
    if (parent)
        discard_group(e, parent);
    return result;
}

static int64_t build_imms(struct fab_engine *e, struct group *g)
{
    struct fab_transfer *parent = new_group(e, g, FAB_OP_IMM);
    int64_t result = parent ? 0 : fab_error_code();
    for (uint32_t i = 0; !result && i < g->count; i++) {
        struct fab_transfer *t = add_child(e, parent, FAB_K_IMM);
        if (t)
            t->peer = fab_peer_get(e, g->peers[i]);
        if (t && t->peer)
            t->fence = atomic_load(&t->peer->their_fence);
        result = t && t->peer ? 0 : fab_error_code();
    }
    if (!result)
        return submit_group(e, parent);
    if (parent)
        discard_group(e, parent);
    return result;
}

static int check_group(const struct group *g)
{
    if (g->count > FAB_MAX_TARGETS)
        return fab_error(FAB_E_INVALID, "%u targets in one call; the limit is %d", g->count,
                         FAB_MAX_TARGETS);
    return check_imm(g->imm);
}

int64_t fab_scatter(fab_engine *e, int64_t region, const fab_target *targets, uint32_t count,
                    int64_t imm, int64_t deadline, int64_t wait)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct group g = {.build = build_scatter,
                      .region = region,
                      .targets = targets,
                      .count = count,
                      .imm = imm,
                      .deadline = deadline};
    int64_t result = check_group(&g);
    if (!result)
        result = submit_when_room(e, &g, wait);
    fab_leave(e);
    return result;
}

int64_t fab_imm(fab_engine *e, const int64_t *peers, uint32_t count, int64_t imm, int64_t deadline,
                int64_t wait)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct group g = {
        .build = build_imms, .peers = peers, .count = count, .imm = imm, .deadline = deadline};
    int64_t result = check_group(&g);
    if (!result && imm < 0)
        result = fab_error(FAB_E_INVALID, "an immediate without bytes needs a counter id, 0 to %d",
                           0x0fffffff);
    if (!result && count == 1 && !deadline && fab_quick_imm(e, *peers, imm))
        result = FAB_DONE;
    else if (!result)
        result = submit_when_room(e, &g, wait);
    fab_leave(e);
    return result;
}

/* ---- API: messages ---- */

static int room_for_message(struct fab_engine *e, void *arg)
{
    const struct fab_peer *p = arg;
    fab_lock(e);
    bool room = p->sending.count < FAB_MESSAGES_QUEUED;
    fab_unlock(e);
    return room;
}

int64_t fab_send(fab_engine *e, int64_t peer, const void *bytes, uint64_t length, int64_t wait)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = 0, until = fab_now() + wait;
    struct fab_peer *p = fab_peer_get(e, peer);
    if (!p)
        result = FAB_E_INVALID;
    else if (length > FAB_MAX_MESSAGE)
        result = fab_error(FAB_E_INVALID,
                           "a message of %llu bytes; the limit is %d: write larger "
                           "data one-sided",
                           (unsigned long long)length, FAB_MAX_MESSAGE);
    else if (fab_wait(e, room_for_message, p, wait) != 1)
        result =
            atomic_load(&e->closed)
                ? FAB_E_CLOSED
                : fab_error(FAB_E_FULL, "%d messages to %s wait for its application to take some",
                            FAB_MESSAGES_QUEUED, p->label);
    struct fab_transfer *t =
        result ? NULL : new_transfer(e, FAB_K_MESSAGE, FAB_OP_MESSAGE, left_of(wait, until));
    if (t) {
        t->peer = p;
        fab_slot_ref(p);
        t->count = 1;
        t->length = length;
        t->bytes = malloc(length ? length : 1);
        if (t->bytes)
            memcpy(t->bytes, bytes, length);
        result = t->bytes ? submit(e, t) : fab_error(FAB_E_SYSTEM, "out of memory");
        if (!t->bytes)
            discard(e, t);
    } else if (!result) {
        result = fab_error_code();
    }
    if (p)
        fab_peer_put(e, p);
    fab_leave(e);
    return result;
}

/* ---- API: waiting and handles ---- */

static int transfer_ended(struct fab_engine *e, void *arg)
{
    (void)e;
    const struct fab_transfer *t = arg;
    return atomic_load_explicit(&t->state, memory_order_acquire) >= FAB_T_DONE;
}

static int report(struct fab_transfer *t, int rc, int64_t timeout)
{
    uint32_t state = atomic_load_explicit(&t->state, memory_order_acquire);
    const char *peer = t->peer ? t->peer->label : "several";
    if (rc == FAB_E_CLOSED)
        return rc;
    if (state == FAB_T_RUNNING)
        return fab_error(FAB_E_TIMEOUT, "the transfer to %s goes on after %.3f s", peer,
                         (double)timeout / 1e9);
    if (state == FAB_T_DRAINING)
        return fab_error(FAB_E_DRAINING,
                         "the transfer to %s drains (%s): its memory is still in "
                         "use",
                         peer, t->text);
    if (!t->code)
        return 0;
    return fab_error(t->code, "transfer to %s%s%s: %s (%llu of %llu ranges acknowledged)", peer,
                     t->nic[0] ? " over " : "", t->nic, t->text,
                     (unsigned long long)t->acknowledged, (unsigned long long)t->count);
}

static struct fab_transfer *get_transfer(struct fab_engine *e, int64_t handle)
{
    struct fab_transfer *t = fab_slot_get(&e->transfers, handle);
    if (!t)
        fab_error(FAB_E_INVALID, "the transfer was released");
    return t;
}

int fab_transfer_wait(fab_engine *e, int64_t transfer, int64_t timeout)
{
    if (transfer == FAB_DONE)
        return 0;
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_transfer *t = get_transfer(e, transfer);
    int rc = FAB_E_INVALID;
    if (t) {
        rc = report(t, fab_wait(e, transfer_ended, t, timeout), timeout);
        fab_transfer_put(e, t);
    }
    fab_leave(e);
    return rc;
}

int fab_transfer_get_info(fab_engine *e, int64_t transfer, fab_transfer_info *out)
{
    memset(out, 0, sizeof *out);
    if (transfer == FAB_DONE) {
        out->state = FAB_T_DONE;
        return 0;
    }
    if (atomic_load(&e->forked)) /* a closed engine still tells how its transfers ended */
        return fab_error(FAB_E_CLOSED, "the engine belongs to the parent process");
    struct fab_transfer *t = get_transfer(e, transfer);
    if (!t)
        return FAB_E_INVALID;
    out->state = (int32_t)atomic_load_explicit(&t->state, memory_order_acquire);
    bool over = out->state >= FAB_T_DRAINING;
    out->code = over ? t->code : 0;
    out->ranges = t->count;
    out->acknowledged = t->acknowledged;
    out->bytes = t->kind == FAB_K_PAGES ? t->length * t->count : t->length;
    if (over) {
        memcpy(out->nic, t->nic, sizeof out->nic);
        memcpy(out->text, t->text, sizeof out->text);
    }
    if (t->peer)
        memcpy(out->peer, t->peer->label, sizeof out->peer);
    fab_transfer_put(e, t);
    return 0;
}

int fab_transfer_cancel(fab_engine *e, int64_t transfer)
{
    if (transfer == FAB_DONE)
        return 0;
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_transfer *t = get_transfer(e, transfer);
    if (t) {
        if (atomic_load(&t->state) < FAB_T_DONE && !atomic_exchange(&t->cancel_asked, true)) {
            fab_slot_ref(t);
            fab_command(e, t->slot.index, true);
            fab_kick(e);
        }
        fab_transfer_put(e, t);
    }
    fab_leave(e);
    return t ? 0 : FAB_E_INVALID;
}

int fab_transfer_release(fab_engine *e, int64_t transfer)
{
    if (atomic_load(&e->forked))
        return 0;
    struct fab_transfer *t = fab_slot_get(&e->transfers, transfer);
    if (!t)
        return 0;
    if (fab_slot_kill(t))
        fab_transfer_put(e, t);
    fab_transfer_put(e, t);
    return 0;
}
