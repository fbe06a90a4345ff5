/* Messages; the contract is in message.h. */
#include "message.h"

#include <stdlib.h>
#include <string.h>

#include "peer.h"
#include "session.h"
#include "stats.h"
#include "transfer.h"
#include "watch.h"
#include "worker.h"

/* ---- sending ---- */

static uint32_t fragments_of(uint64_t length)
{
    return length ? (uint32_t)((length + FAB_FRAGMENT_MAX - 1) / FAB_FRAGMENT_MAX) : 1;
}

void fab_message_start(struct fab_peer *p, struct fab_transfer *t)
{
    t->sent = 0;
    fab_list_append(&p->sending, t);
    fab_peer_busy(p);
}

static bool send_fragment(struct fab_peer *p, struct fab_transfer *t)
{
    uint64_t left = t->length - t->sent;
    uint32_t size = left < FAB_FRAGMENT_MAX ? (uint32_t)left : FAB_FRAGMENT_MAX;
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_MESSAGE, p->theirs);
    fab_put_u32(&w, p->tx_next);
    fab_put_u32(&w, (uint32_t)t->length);
    fab_put_u32(&w, (uint32_t)t->sent);
    fab_put(&w, t->bytes + t->sent, size);
    if (!fab_session_send(p, &w, NULL))
        return false;
    if (!t->posted)
        fab_stats_posted(p->engine, t);
    t->sent += size;
    t->last_fragment = p->tx_next++;
    return true;
}

int fab_message_post(struct fab_peer *p)
{
    int n = 0;
    while (p->sending.head && (int32_t)(p->tx_limit - p->tx_next) > 0) {
        struct fab_transfer *t = p->sending.head;
        if (!send_fragment(p, t)) {
            fab_peer_busy(p);
            break;
        }
        n++;
        if (t->sent == t->length) {
            fab_trace_transfer(p->engine, t, FAB_TRACE_POSTED);
            fab_list_remove(t);
            fab_list_append(&p->sent, t);
        }
    }
    return n;
}

void fab_message_on_ack(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t held = fab_get_u32(r), limit = fab_get_u32(r);
    if (r->bad || (int32_t)(p->tx_next - held) < 0)
        return;
    if ((int32_t)(limit - p->tx_limit) > 0)
        p->tx_limit = limit;
    while (p->sent.head && (int32_t)(held - p->sent.head->last_fragment) > 0) {
        struct fab_transfer *t = p->sent.head;
        t->acknowledged = 1;
        p->engine->stats.tx_messages++;
        fab_transfer_done(t);
    }
}

/* ---- receiving ---- */

void fab_messages_begin_session(struct fab_peer *p)
{
    p->tx_next = p->rx_next = p->rx_taken = 0;
    p->tx_limit = p->rx_limit = FAB_MESSAGE_FRAMES;
    p->rx_filled = 0;
}

void fab_messages_end_session(struct fab_peer *p)
{
    if (p->rx_partial)
        fab_peer_put(p->engine, p);
    free(p->rx_partial);
    free(p->rx_window);
    p->rx_partial = NULL;
    p->rx_window = NULL;
}

bool fab_message_send_ack(struct fab_peer *p)
{
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_ACK, p->theirs);
    fab_put_u32(&w, p->rx_next);
    fab_put_u32(&w, p->rx_limit);
    return fab_session_send(p, &w, NULL);
}

static void deliver(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    struct fab_message *m = p->rx_partial;
    p->rx_partial = NULL;
    p->rx_filled = 0;
    m->next = NULL;
    if (e->inbox_tail)
        e->inbox_tail->next = m;
    else
        e->inbox_head = m;
    e->inbox_tail = m;
    atomic_fetch_add_explicit(&e->inbox_count, 1, memory_order_release);
    e->stats.rx_messages++;
    e->dirty = true;
    fab_watch_message_came(e);
}

static struct fab_message *new_message(struct fab_peer *p, uint32_t length)
{
    struct fab_message *m = malloc(sizeof *m + length);
    if (!m)
        return NULL;
    fab_slot_ref(p);
    m->peer = p;
    m->session = p->mine;
    m->length = length;
    m->fragments = fragments_of(length);
    return m;
}

/* The next fragment in order. False: it does not fit what came before. */
static bool append(struct fab_peer *p, const struct fab_fragment *f)
{
    if (!p->rx_partial) {
        if (f->offset)
            return false;
        /* Reconnecting gives new credit while old messages still lie here. */
        if (atomic_load(&p->engine->inbox_count) < FAB_MAX_QUEUED)
            p->rx_partial = new_message(p, f->total);
        if (!p->rx_partial)
            return false;
    }
    struct fab_message *m = p->rx_partial;
    bool last = p->rx_filled + f->length == m->length;
    if (f->total != m->length || f->offset != p->rx_filled ||
        (!last && f->length != FAB_FRAGMENT_MAX) || f->length > m->length - p->rx_filled)
        return false;
    memcpy(m->bytes + p->rx_filled, f->bytes, f->length);
    p->rx_filled += f->length;
    p->rx_next++;
    if (last)
        deliver(p);
    return true;
}

static bool read_fragment(struct fab_reader *r, struct fab_fragment *f)
{
    f->number = fab_get_u32(r);
    f->total = fab_get_u32(r);
    f->offset = fab_get_u32(r);
    f->length = r->length - r->at;
    if (r->bad || f->length > FAB_FRAGMENT_MAX || f->total > FAB_MAX_MESSAGE)
        return false;
    fab_get(r, f->bytes, f->length);
    return true;
}

/* Keeps a fragment that came before its turn; takes those whose turn it is. */
static bool keep_and_take(struct fab_peer *p, const struct fab_fragment *f)
{
    if (!p->rx_window)
        p->rx_window = calloc(FAB_MESSAGE_FRAMES, sizeof *p->rx_window);
    if (!p->rx_window)
        return false;
    struct fab_fragment *place = &p->rx_window[f->number % FAB_MESSAGE_FRAMES];
    *place = *f;
    place->held = true;
    return true;
}

void fab_message_on_fragment(struct fab_peer *p, struct fab_reader *r)
{
    struct fab_fragment f = {0};
    if (!read_fragment(r, &f)) {
        r->bad = true;
        return;
    }
    p->due_ack = true;
    if ((int32_t)(f.number - p->rx_next) < 0)
        return; /* a copy of one we hold */
    bool ok = (int32_t)(p->rx_limit - f.number) > 0;
    if (ok && f.number != p->rx_next) {
        ok = keep_and_take(p, &f);
    } else if (ok) {
        ok = append(p, &f);
        while (ok && p->rx_window && p->rx_window[p->rx_next % FAB_MESSAGE_FRAMES].held &&
               p->rx_window[p->rx_next % FAB_MESSAGE_FRAMES].number == p->rx_next) {
            struct fab_fragment *next = &p->rx_window[p->rx_next % FAB_MESSAGE_FRAMES];
            next->held = false;
            ok = append(p, next);
        }
    }
    if (!ok)
        fab_session_doom(p, FAB_E_UNREACHABLE, "it broke the message protocol");
}

/* ---- API ---- */

static int inbox_ready(struct fab_engine *e, void *arg)
{
    (void)arg;
    return atomic_load_explicit(&e->inbox_count, memory_order_acquire) > 0;
}

/* With the lock. A message that fits `size`, or its length as an error. */
static int64_t take(struct fab_engine *e, void *out, uint64_t size, int64_t *from)
{
    struct fab_message *m = e->inbox_head;
    if (!m)
        return FAB_E_TIMEOUT;
    if (m->length > size)
        return fab_error(FAB_E_INVALID, "the message has %u bytes, the buffer %llu", m->length,
                         (unsigned long long)size);
    e->inbox_head = m->next;
    if (!e->inbox_head)
        e->inbox_tail = NULL;
    atomic_fetch_sub_explicit(&e->inbox_count, 1, memory_order_relaxed);
    memcpy(out, m->bytes, m->length);
    struct fab_peer *p = m->peer;
    *from = fab_slot_handle(p);
    if (p->mine == m->session) { /* its place in the window is free again */
        p->rx_taken += m->fragments;
        p->rx_limit = p->rx_taken + FAB_MESSAGE_FRAMES;
        p->due_ack = true;
        fab_peer_busy(p);
    }
    int64_t length = m->length;
    fab_peer_put(e, p);
    free(m);
    return length;
}

int64_t fab_recv(fab_engine *e, void *out, uint64_t size, int64_t *from, int64_t timeout)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result;
    int64_t until = timeout < 0 ? INT64_MAX : fab_now() + timeout;
    do { /* another thread may take the message that ended the wait */
        int64_t left = timeout < 0 ? -1 : until - fab_now();
        int rc = fab_wait(e, inbox_ready, NULL, left < 0 && timeout >= 0 ? 0 : left);
        if (rc != 1) {
            result = rc == FAB_E_TIMEOUT ? fab_error(rc, "no message") : rc;
            break;
        }
        fab_lock(e);
        result = take(e, out, size, from);
        fab_serve(e); /* the credit goes back at once */
        fab_unlock(e);
    } while (result == FAB_E_TIMEOUT);
    fab_leave(e);
    return result;
}

void fab_messages_fini(struct fab_engine *e)
{
    while (e->inbox_head) {
        struct fab_message *m = e->inbox_head;
        e->inbox_head = m->next;
        fab_peer_put(e, m->peer);
        free(m);
    }
    e->inbox_tail = NULL;
}
