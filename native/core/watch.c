/* Completion queues; the contract is in watch.h. */
#include "watch.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "counter.h"
#include "peer.h"
#include "session.h"
#include "trace.h"
#include "transfer.h"
#include "worker.h"

static void post(struct fab_queue *q, uint64_t tag, int code)
{
    if (atomic_load_explicit(&q->closed, memory_order_relaxed))
        return;
    q->events[q->tail++ % FAB_MAX_WATCHES] = (fab_event){.tag = tag, .code = code};
    if (atomic_exchange_explicit(&q->armed, 0, memory_order_acq_rel)) {
        uint64_t one = 1;
        ssize_t n = write(q->fd, &one, sizeof one);
        (void)n; /* an eventfd this far from its limit always takes it */
    }
}

static struct fab_watch *watch_at(struct fab_engine *e, uint32_t index)
{
    return fab_slot_at(&e->watches, index);
}

static uint32_t *head_of(struct fab_engine *e, struct fab_watch *w)
{
    switch (w->kind) {
    case FAB_W_TRANSFER:
        return &w->transfer->watch;
    case FAB_W_COUNTER:
        return &e->cells[w->cell].watch;
    default:
        return &e->message_watch;
    }
}

static void link_watch(struct fab_engine *e, struct fab_watch *w)
{
    uint32_t *head = head_of(e, w), self = w->slot.index;
    w->prev = FAB_NO_WATCH;
    w->next = *head;
    if (*head != FAB_NO_WATCH)
        watch_at(e, *head)->prev = self;
    *head = self;
}

static void put_queue(struct fab_engine *e, struct fab_queue *q)
{
    if (!fab_slot_put(q))
        return;
    close(q->fd);
    fab_table_free(q->events, FAB_MAX_WATCHES, sizeof *q->events);
    fab_slot_free(&e->queues, q);
}

/* Takes the watch off what it watches and gives it back. */
static void drop(struct fab_engine *e, struct fab_watch *w)
{
    if (w->prev == FAB_NO_WATCH)
        *head_of(e, w) = w->next;
    else
        watch_at(e, w->prev)->next = w->next;
    if (w->next != FAB_NO_WATCH)
        watch_at(e, w->next)->prev = w->prev;
    if (w->kind == FAB_W_TRANSFER)
        fab_transfer_put(e, w->transfer);
    if (w->peers) {
        fab_peer_set_close(e, w->peers);
        free(w->peers);
        w->peers = NULL;
    }
    w->kind = FAB_W_FREE;
    w->queue->watching--;
    put_queue(e, w->queue);
    fab_slot_kill(w);
    if (fab_slot_put(w))
        fab_slot_free(&e->watches, w);
}

static void fire(struct fab_engine *e, struct fab_watch *w, int code)
{
    post(w->queue, w->tag, code);
    drop(e, w);
}

/* ---- what happened ---- */

/* The counter id that a cell stands for. */
static uint32_t id_of(const struct fab_engine *e, const struct fab_cell *cell)
{
    ptrdiff_t at = cell - e->cells;
    return at < FAB_MAX_COUNTERS ? FAB_ID_ENGINE_BIT | cell->id << 16 | (uint32_t)at : cell->id;
}

void fab_watch_cell_changed(struct fab_engine *e, struct fab_cell *cell)
{
    bool gone = atomic_load_explicit(&cell->flags, memory_order_relaxed) & FAB_CELL_VOID;
    uint64_t value = atomic_load_explicit(&cell->sum, memory_order_relaxed) / FAB_PIECE_UNIT;
    for (uint32_t i = cell->watch; i != FAB_NO_WATCH;) {
        struct fab_watch *w = watch_at(e, i);
        i = w->next;
        if (gone) {
            fire(e, w, FAB_E_VOID);
        } else if (value >= w->target) {
            fab_trace_count(e, id_of(e, cell), w->target);
            fire(e, w, 0);
        }
    }
}

void fab_watch_cell_closed(struct fab_engine *e, struct fab_cell *cell)
{
    while (cell->watch != FAB_NO_WATCH)
        fire(e, watch_at(e, cell->watch), FAB_E_CLOSED);
}

void fab_watch_transfer_ended(struct fab_engine *e, struct fab_transfer *t)
{
    while (t->watch != FAB_NO_WATCH)
        fire(e, watch_at(e, t->watch), t->code);
}

void fab_watch_message_came(struct fab_engine *e)
{
    while (e->message_watch != FAB_NO_WATCH)
        fire(e, watch_at(e, e->message_watch), 0);
}

void fab_watch_peer_lost(struct fab_engine *e, struct fab_peer *peer, int code)
{
    uint32_t touched = atomic_load_explicit(&e->watches.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_watch *w = watch_at(e, i);
        if (w->kind != FAB_W_COUNTER || !w->peers)
            continue;
        for (uint32_t k = 0; k < w->peers->count; k++) {
            if (w->peers->all[k].peer != peer)
                continue;
            if (code == FAB_E_UNREACHABLE)
                fab_session_told(peer); /* the watch may be younger than the end */
            fire(e, w, code);
            break;
        }
    }
}

static void wake_queue(struct fab_queue *q)
{
    uint64_t one = 1;
    ssize_t n = write(q->fd, &one, sizeof one);
    (void)n; /* an eventfd this far from its limit always takes it */
}

void fab_watches_close(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->watches.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++)
        if (watch_at(e, i)->kind != FAB_W_FREE)
            fire(e, watch_at(e, i), FAB_E_CLOSED);
    touched = atomic_load_explicit(&e->queues.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_queue *q = fab_slot_at(&e->queues, i);
        if (fab_slot_live(q))
            wake_queue(q);
    }
}

/* ---- watches ---- */

static struct fab_queue *get_queue(struct fab_engine *e, int64_t handle)
{
    struct fab_queue *q = fab_slot_get(&e->queues, handle);
    if (!q)
        fab_error(FAB_E_INVALID, "the completion queue is closed");
    return q;
}

/* A linked watch that keeps a reference to its queue; NULL with the error set. */
static struct fab_watch *new_watch(struct fab_engine *e, int64_t queue, enum fab_watch_kind kind,
                                   uint64_t tag)
{
    struct fab_queue *q = get_queue(e, queue);
    if (!q)
        return NULL;
    if (atomic_load(&e->closed)) {
        put_queue(e, q);
        fab_error(FAB_E_CLOSED, "the engine is closed");
        return NULL;
    }
    /* Events that were posted and not yet taken need their places, too. */
    bool room = q->tail - q->head + q->watching < FAB_MAX_WATCHES;
    struct fab_watch *w = room ? fab_slot_alloc(&e->watches) : NULL;
    if (!w) {
        put_queue(e, q);
        fab_error(FAB_E_FULL, "%d waits are pending, the limit", FAB_MAX_WATCHES);
        return NULL;
    }
    q->watching++;
    w->kind = kind;
    w->queue = q;
    w->tag = tag;
    w->peers = NULL;
    return w;
}

static int watch_peers(struct fab_engine *e, struct fab_watch *w, const int64_t *peers,
                       uint32_t count)
{
    if (!count)
        return 0;
    w->peers = calloc(1, sizeof *w->peers);
    if (!w->peers)
        return fab_error(FAB_E_SYSTEM, "out of memory");
    int code = fab_peer_set_open(e, w->peers, peers, count);
    if (!code) {
        code = fab_peer_set_lost(w->peers);
        if (code)
            fab_peer_set_error(w->peers);
    }
    return code;
}

int64_t fab_watch_cell(struct fab_engine *e, int64_t queue, uint32_t at, uint64_t target,
                       const int64_t *peers, uint32_t peer_count, uint64_t tag)
{
    struct fab_cell *cell = &e->cells[at];
    if (atomic_load_explicit(&cell->flags, memory_order_relaxed) & FAB_CELL_VOID)
        return fab_void_error(cell);
    if (atomic_load_explicit(&cell->sum, memory_order_acquire) >= target * FAB_PIECE_UNIT)
        return 0;
    struct fab_watch *w = new_watch(e, queue, FAB_W_COUNTER, tag);
    if (!w)
        return fab_error_code();
    w->cell = at;
    w->target = target;
    link_watch(e, w);
    int code = watch_peers(e, w, peers, peer_count);
    if (!code)
        return fab_slot_handle(w);
    drop(e, w);
    return code;
}

int64_t fab_watch_transfer(fab_engine *e, int64_t queue, int64_t transfer, uint64_t tag)
{
    if (transfer == FAB_DONE)
        return 0;
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = 0;
    fab_lock(e);
    struct fab_transfer *t = fab_slot_get(&e->transfers, transfer);
    if (!t) {
        result = fab_error(FAB_E_INVALID, "the transfer was released");
    } else if (atomic_load(&t->state) >= FAB_T_DONE) {
        fab_transfer_put(e, t);
    } else {
        struct fab_watch *w = new_watch(e, queue, FAB_W_TRANSFER, tag);
        if (w) {
            w->transfer = t; /* keeps our reference */
            link_watch(e, w);
            result = fab_slot_handle(w);
        } else {
            result = fab_error_code();
            fab_transfer_put(e, t);
        }
    }
    fab_unlock(e);
    if (result > 0)
        fab_rouse(e);
    fab_leave(e);
    return result;
}

int64_t fab_watch_message(fab_engine *e, int64_t queue, uint64_t tag)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = 0;
    fab_lock(e);
    if (!atomic_load(&e->inbox_count)) {
        struct fab_watch *w = new_watch(e, queue, FAB_W_MESSAGE, tag);
        if (w)
            link_watch(e, w);
        result = w ? fab_slot_handle(w) : fab_error_code();
    }
    fab_unlock(e);
    if (result > 0)
        fab_rouse(e);
    fab_leave(e);
    return result;
}

int fab_unwatch(fab_engine *e, int64_t watch)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    fab_lock(e);
    struct fab_watch *w = fab_slot_get(&e->watches, watch);
    if (w) {
        if (w->kind != FAB_W_FREE)
            drop(e, w);
        if (fab_slot_put(w))
            fab_slot_free(&e->watches, w);
    }
    fab_unlock(e);
    fab_leave(e);
    return 0; /* one that has fired is gone: that is no error */
}

/* ---- queues ---- */

int64_t fab_queue_open(fab_engine *e)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result;
    struct fab_queue *q = fab_slot_alloc(&e->queues);
    if (!q) {
        result = fab_error(FAB_E_FULL, "%d completion queues are open, the limit", FAB_MAX_QUEUES);
    } else {
        q->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        q->events = fab_table_alloc(FAB_MAX_WATCHES, sizeof *q->events);
        q->head = q->tail = q->watching = 0;
        atomic_store(&q->closed, false);
        atomic_store(&q->armed, 1);
        result = fab_slot_handle(q);
        if (q->fd < 0 || !q->events) {
            result = fab_error(FAB_E_SYSTEM, "cannot open a completion queue: %s", strerror(errno));
            fab_slot_kill(q);
            put_queue(e, q);
        }
    }
    fab_leave(e);
    return result;
}

int fab_queue_fd(fab_engine *e, int64_t queue)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_queue *q = get_queue(e, queue);
    int fd = q ? q->fd : FAB_E_INVALID;
    if (q)
        put_queue(e, q);
    fab_leave(e);
    return fd;
}

/* Also of a closed engine, whose last events may still be taken. */
static struct fab_queue *enter_queue(struct fab_engine *e, int64_t queue)
{
    if (atomic_load(&e->forked)) {
        fab_error(FAB_E_CLOSED, "the engine belongs to the parent process");
        return NULL;
    }
    atomic_fetch_add_explicit(&e->calls, 1, memory_order_acquire);
    struct fab_queue *q = get_queue(e, queue);
    if (!q)
        fab_leave(e);
    return q;
}

static void leave_queue(struct fab_engine *e, struct fab_queue *q)
{
    put_queue(e, q);
    fab_leave(e);
}

int fab_queue_drain(fab_engine *e, int64_t queue, fab_event *out, uint32_t max)
{
    struct fab_queue *q = enter_queue(e, queue);
    if (!q)
        return fab_error_code();
    fab_lock(e);
    uint32_t n = 0;
    while (n < max && q->head != q->tail)
        out[n++] = q->events[q->head++ % FAB_MAX_WATCHES];
    if (q->head == q->tail) { /* what is left keeps the eventfd readable */
        uint64_t count;
        ssize_t got = read(q->fd, &count, sizeof count);
        (void)got; /* EAGAIN: nothing was signalled since the last drain */
        q->head = q->tail = 0; /* stays in the pages that it has touched */
        atomic_store_explicit(&q->armed, 1, memory_order_release);
    }
    fab_unlock(e);
    leave_queue(e, q);
    return (int)n;
}

int fab_queue_wait(fab_engine *e, int64_t queue, int64_t timeout)
{
    struct fab_queue *q = enter_queue(e, queue);
    if (!q)
        return fab_error_code();
    struct pollfd p = {.fd = q->fd, .events = POLLIN};
    int n = poll(&p, 1, timeout < 0 ? -1 : (int)((timeout + NS_PER_MS - 1) / NS_PER_MS));
    bool closed = atomic_load(&q->closed) || atomic_load(&e->closed);
    leave_queue(e, q);
    if (closed)
        return fab_error(FAB_E_CLOSED, "the completion queue was closed");
    return n > 0 ? 0 : fab_error(FAB_E_TIMEOUT, "no event");
}

int fab_queue_close(fab_engine *e, int64_t queue)
{
    struct fab_queue *q = enter_queue(e, queue);
    if (!q)
        return 0;
    fab_lock(e);
    atomic_store(&q->closed, true);
    wake_queue(q); /* who waits on it is to leave */
    uint32_t touched = atomic_load_explicit(&e->watches.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++)
        if (watch_at(e, i)->kind != FAB_W_FREE && watch_at(e, i)->queue == q)
            drop(e, watch_at(e, i));
    fab_unlock(e);
    if (fab_slot_kill(q))
        put_queue(e, q);
    leave_queue(e, q);
    return 0;
}

void fab_queues_fini(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->queues.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_queue *q = fab_slot_at(&e->queues, i);
        if (fab_slot_kill(q))
            put_queue(e, q);
    }
}
