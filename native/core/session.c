/* Sessions: life after the handshake. The contract is in session.h; the handshake itself is in
 * handshake.c. */
#include "session.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "counter.h"
#include "handshake.h"
#include "keys.h"
#include "lanes.h"
#include "memory.h"
#include "message.h"
#include "peer.h"
#include "post.h"
#include "remote.h"
#include "trace.h"
#include "watch.h"
#include "worker.h"

#define FENCE_STUCK_NS (100 * NS_PER_MS) /* how long a fence may take before waits are told */
#define DRAIN_POLLS 256                  /* polls for what a departed peer left for us */

bool fab_session_send(struct fab_peer *p, struct fab_writer *w, const struct fab_mr *attach)
{
    struct fab_lane *lane = fab_lane_for_frames(p);
    if (!lane)
        return false;
    fab_frame_end(w);
    int rc = lane->nic->provider->lane_send(lane, w->bytes, w->used, attach);
    if (rc == -EAGAIN)
        return false;
    if (rc < 0) {
        fab_lane_broke(lane, fab_take_reason(rc));
        return false;
    }
    p->tx_frames++;
    p->engine->stats.frames_tx++;
    return true;
}

static bool send_empty(struct fab_peer *p, enum fab_frame_type type)
{
    struct fab_writer w;
    fab_frame_begin(&w, type, p->theirs);
    return fab_session_send(p, &w, NULL);
}

static bool send_stamp(struct fab_peer *p, enum fab_frame_type type, uint64_t stamp)
{
    struct fab_writer w;
    fab_frame_begin(&w, type, p->theirs);
    fab_put_u64(&w, stamp);
    return fab_session_send(p, &w, NULL);
}

static bool send_voids(struct fab_peer *p)
{
    uint32_t count = p->void_count < FAB_VOIDS_PER_FRAME ? p->void_count : FAB_VOIDS_PER_FRAME;
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_VOID, p->theirs);
    fab_put_u32(&w, p->void_number);
    fab_put_u32(&w, count);
    fab_put(&w, p->voids, count * sizeof *p->voids);
    if (!fab_session_send(p, &w, NULL))
        return false;
    p->void_sent = count;
    return true;
}

static bool send_voided(struct fab_peer *p)
{
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_VOIDED, p->theirs);
    fab_put_u32(&w, p->voided_number);
    return fab_session_send(p, &w, NULL);
}

/* Sends what is due, most urgent first. Returns how many frames went out. */
static int flush(struct fab_peer *p)
{
    int n = 0;
    if (p->due_welcome && fab_handshake_send_welcome(p))
        p->due_welcome = false, n++;
    if (atomic_load_explicit(&p->state, memory_order_relaxed) != FAB_P_UP)
        return n;
    if (p->due_ready && send_empty(p, FAB_F_READY))
        p->due_ready = false, n++;
    if (p->due_pong && send_stamp(p, FAB_F_PONG, p->pong_stamp))
        p->due_pong = false, n++;
    n += fab_lanes_serve(p); /* that a lane is lost is told before what that voids */
    if (p->due_voided && send_voided(p))
        p->due_voided = false, n++;
    if (p->void_count && !p->void_sent && send_voids(p))
        n++;
    if (p->due_ping && send_stamp(p, FAB_F_PING, (uint64_t)p->engine->now))
        p->due_ping = false, n++;
    if (p->asked_count)
        n += fab_memory_answer_grants(p);
    if (p->due_quiesce)
        n += fab_memory_ask_quiesce(p);
    if (p->due_quiesced)
        n += fab_remote_answer_quiesce(p);
    if (p->due_ack && fab_message_send_ack(p))
        p->due_ack = false, n++;
    bool more = p->due_ready || p->due_pong || p->due_voided || p->due_ping || p->asked_count ||
                p->due_quiesce || p->due_quiesced || p->due_ack || (p->void_count && !p->void_sent);
    if (more)
        fab_peer_busy(p);
    return n;
}

void fab_session_doom(struct fab_peer *p, int code, const char *text)
{
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    if (p->ending || (state != FAB_P_UP && state != FAB_P_CONNECTING))
        return;
    p->ending = true;
    p->end_code = code;
    fab_text(p->end_text, sizeof p->end_text, "%s", text);
    fab_peer_busy(p);
}

/* ---- the end ---- */

static void forget_session(struct fab_peer *p)
{
    fab_remotes_end_session(p);
    fab_regions_forget_holder(p);
    fab_messages_end_session(p);
    p->was_up = false;
    p->mine = p->theirs = 0;
    p->lane_count = 0;
    p->voided_any = false;
    p->held_count = 0;
    fab_lanes_forget(p);
    p->active = p->welcomed = p->has_cookie = p->ending = p->in_doubt = false;
    p->due_welcome = p->due_ready = p->due_ping = p->due_pong = p->due_ack = false;
    p->due_voided = p->due_quiesce = p->due_quiesced = false;
    p->void_count = p->void_sent = 0;
    p->asked_count = p->grants_open = p->quiesce_open = 0;
    fab_counters_end_session(p->engine, p);
}

static void ended(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    p->code = p->end_code;
    fab_text(p->text, sizeof p->text, "%s", p->end_text);
    fab_session_carry_out_voids(p);
    if (p->was_up) {
        fab_lanes_close(p, p->text);
        fab_trace_peer(p, FAB_TRACE_LOST, p->text);
    }
    forget_session(p);
    atomic_store_explicit(&p->fence_stuck, false, memory_order_relaxed);
    atomic_store_explicit(&p->state, FAB_P_DEAD, memory_order_release);
    atomic_fetch_add_explicit(&p->losses, 1, memory_order_release);
    fab_transfers_settle_peer(p);
    e->stats.peers_lost++;
    e->dirty = true;
    fab_watch_peer_lost(e, p, FAB_E_UNREACHABLE);
    fab_log(FAB_LOG_INFO, "peer %s: session over: %s", p->label, p->text);
}

void fab_session_abandon(struct fab_peer *p)
{
    if (atomic_load_explicit(&p->state, memory_order_relaxed) != FAB_P_FENCING)
        return;
    memset(p->lanes, 0, sizeof p->lanes);
    forget_session(p);
    atomic_store_explicit(&p->state, FAB_P_DEAD, memory_order_release);
}

/* Takes keys back and closes what can be closed. True: all of it. */
static bool close_lanes(struct fab_peer *p)
{
    if (!fab_keys_revoke(p))
        return false;
    bool all = true;
    for (uint32_t i = 0; i < FAB_MAX_LANES; i++) {
        struct fab_lane *lane = p->lanes[i];
        if (!lane)
            continue;
        int rc = lane->nic->provider->lane_close(lane);
        if (rc == -EINPROGRESS) {
            all = false;
            continue;
        }
        p->no_fence |= rc == -ENOTSUP;
        p->lanes[i] = NULL;
    }
    return all;
}

/* What the peer left in our rings before it went counts; only a fence cuts it off. */
static void take_leftovers(struct fab_peer *p)
{
    for (uint32_t k = 0; k < p->lane_count; k++) {
        struct fab_nic *nic = p->lanes[k] ? p->lanes[k]->nic : NULL;
        for (int i = 0; nic && i < DRAIN_POLLS; i++) {
            nic->now = fab_now(); /* this may be the submission of somebody, and no turn */
            if (nic->provider->poll(nic, FAB_EVENTS_PER_TURN) <= 0)
                break;
        }
    }
}

static void say_goodbye(struct fab_peer *p, int code, const char *text)
{
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_BYE, p->theirs);
    fab_put_u32(&w, (uint32_t)code);
    fab_put_text(&w, text);
    fab_session_send(p, &w, NULL);
}

void fab_session_end(struct fab_peer *p, int code, const char *text, bool goodbye)
{
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    if (state != FAB_P_UP && state != FAB_P_CONNECTING)
        return;
    if (state == FAB_P_UP && goodbye)
        say_goodbye(p, code, text);
    if (state == FAB_P_UP)
        p->engine->stats.peers_up--;
    p->ending = true;
    p->end_code = code;
    if (text != p->end_text)
        fab_text(p->end_text, sizeof p->end_text, "%s", text);
    p->deadline = fab_now() + FENCE_STUCK_NS;
    atomic_store_explicit(&p->state, FAB_P_FENCING, memory_order_release);
    fab_transfers_fail_peer(p, FAB_E_UNREACHABLE, p->end_text);
    if (close_lanes(p))
        ended(p);
}

/* The number ends what the peer has begun, whichever side begins the next session (S9); the bar keeps it
 * from beginning one. A peer that keeps us out was told before us: were it barred in turn, the two would keep
 * each other out by turns. Without an address here nobody could lift the bar. */
void fab_session_told(struct fab_peer *p)
{
    fab_random(&p->fence, sizeof p->fence);
    if (p->nics && !p->kept_out)
        fab_bar(p->engine, p);
}

/* Whether somebody here is told PeerUnreachable by this end (S6). Where there was no session, what the
 * peer has begun may yet begin one. */
static bool anybody_told(const struct fab_peer *p)
{
    return p->queue.head || p->inflight.head || p->sending.head || p->sent.head ||
           fab_peer_waited_for(p);
}

void fab_session_carry_out_doom(struct fab_peer *p)
{
    take_leftovers(p);
    if (anybody_told(p))
        fab_session_told(p);
    fab_session_end(p, FAB_E_UNREACHABLE, p->end_text, true);
}

/* ---- turn and tick ---- */

int fab_session_serve(struct fab_peer *p)
{
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    if (p->ending && (state == FAB_P_UP || state == FAB_P_CONNECTING)) {
        fab_session_carry_out_doom(p);
        return 1;
    }
    if (state != FAB_P_UP && state != FAB_P_CONNECTING)
        return 0;
    return flush(p);
}

static void check_silence(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    int64_t silent = e->now - p->last_heard, timeout = e->config.peer_timeout_ns;
    if (silent > timeout) {
        char text[FAB_TEXT_MAX];
        fab_text(text, sizeof text, "silent for %.1f s (peer_timeout %.1f s)", (double)silent / 1e9,
                 (double)timeout / 1e9);
        fab_session_doom(p, FAB_E_UNREACHABLE, text);
    } else if (silent > timeout / 4 && e->now - p->last_ping > timeout / 4) {
        p->last_ping = e->now;
        p->due_ping = true;
        fab_peer_busy(p);
    }
}

/* Where the provider does not tell that a process died, a session without business would stay for
 * ever, and with it an endpoint and a place in the table. It cannot pile up: each session that begins
 * has those looked at that were silent for a while. No clock does, so idle engines stay asleep. */
void fab_session_doubt_idle(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        if (fab_slot_live(p) && atomic_load_explicit(&p->state, memory_order_relaxed) == FAB_P_UP &&
            e->now - p->last_heard > e->config.peer_timeout_ns / 4)
            p->in_doubt = true; /* until a frame comes */
    }
}

void fab_session_tick(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    bool business = fab_peer_has_business(p);
    switch (atomic_load_explicit(&p->state, memory_order_relaxed)) {
    case FAB_P_IDLE:
        /* A wait depends on a peer that we never spoke to: find out whether it lives. */
        if (atomic_load_explicit(&p->waiters, memory_order_relaxed) && p->nics)
            fab_session_start(p);
        break;
    case FAB_P_CONNECTING:
        fab_transfers_check_deadlines(p);
        fab_handshake_tick(p);
        break;
    case FAB_P_UP:
        if (business && !p->in_business)
            p->last_heard = p->last_sign = p->last_ping = e->now; /* silence counts from here */
        p->in_business = business;
        if (!business)
            break;
        fab_lanes_tick(p);
        fab_transfers_check_deadlines(p);
        check_silence(p);
        fab_peer_busy(p);
        break;
    case FAB_P_FENCING:
        if (close_lanes(p))
            ended(p);
        else if (e->now > p->deadline && !atomic_exchange(&p->fence_stuck, true)) {
            fab_watch_peer_lost(e, p, FAB_E_FENCE_PENDING);
            e->dirty = true;
        }
        break;
    default:
        break;
    }
}

/* ---- frames of a session ---- */

static void on_voids(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t number = fab_get_u32(r), count = fab_get_u32(r);
    if (r->bad || count > FAB_VOIDS_PER_FRAME || r->length - r->at != count * 4) {
        r->bad = true;
        return;
    }
    if (p->voided_any && (int32_t)(number - p->voided_number) <= 0) {
        p->due_voided = !p->held_count; /* a copy of one that was carried out */
        return;
    }
    if (!p->held_voids)
        p->held_voids = calloc(FAB_VOIDS_PER_FRAME, sizeof *p->held_voids);
    if (!p->held_voids) {
        fab_session_doom(p, FAB_E_UNREACHABLE, "out of memory for what it voids");
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        p->held_voids[i] = fab_get_u32(r) & FAB_ID_MASK;
    p->held_count = count;
    p->voided_number = number;
    p->voided_any = true;
    p->due_voided = !count;
    fab_session_carry_out_voids(p);
}

/* Whoever waits on a void id may free its memory, so nobody is told before the lanes that broke,
 * over which something may still come, are closed here, too. */
void fab_session_carry_out_voids(struct fab_peer *p)
{
    if (!p->held_count || fab_lanes_closing(p))
        return;
    for (uint32_t i = 0; i < p->held_count; i++)
        fab_void_id(p->engine, p, p->held_voids[i]);
    p->held_count = 0;
    p->due_voided = true;
    fab_peer_busy(p);
}

static void on_voided(struct fab_peer *p, struct fab_reader *r)
{
    if (fab_get_u32(r) != p->void_number || r->bad || !p->void_sent)
        return; /* an answer that came twice */
    p->void_count -= p->void_sent;
    memmove(p->voids, p->voids + p->void_sent, p->void_count * sizeof *p->voids);
    p->void_sent = 0;
    p->void_number++;
    p->engine->dirty = true; /* close() waits for this */
}

static void on_bye(struct fab_peer *p, struct fab_reader *r)
{
    char text[FAB_TEXT_MAX], line[FAB_TEXT_MAX + 64];
    fab_get_u32(r);
    fab_get_text(r, text, sizeof text);
    if (r->bad)
        return;
    fab_text(line, sizeof line, "the peer ended the session: %s", text);
    fab_session_doom(p, FAB_E_CLOSED, line);
}

static void on_ping(struct fab_peer *p, struct fab_reader *r)
{
    p->pong_stamp = fab_get_u64(r);
    p->due_pong = true;
}

/* Whether the body is as long as the type says; some tell it themselves. */
static bool right_length(const struct fab_header *h, const struct fab_reader *r)
{
    static const uint8_t lengths[FAB_F_LAST + 1] = {[FAB_F_PING] = 8,
                                                    [FAB_F_PONG] = 8,
                                                    [FAB_F_ACK] = 8,
                                                    [FAB_F_VOIDED] = 4,
                                                    [FAB_F_GRANT_REQ] = 20,
                                                    [FAB_F_QUIESCE] = 12,
                                                    [FAB_F_QUIESCED] = 12,
                                                    [FAB_F_LANE_DOWN] = 8,
                                                    [FAB_F_LANE_READY] = 8,
                                                    [FAB_F_LANE_WANTED] = 8,
                                                    [FAB_F_LANE_PROBE] = 8,
                                                    [FAB_F_LANE_OPEN] = 12 + FAB_BLOB_MAX,
                                                    [FAB_F_LANE_OPENED] = 12 + FAB_BLOB_MAX};
    if (h->type == FAB_F_BYE || h->type == FAB_F_MESSAGE || h->type == FAB_F_VOID ||
        h->type == FAB_F_GRANT)
        return true;
    return r->length - r->at == lengths[h->type];
}

/* Frames of an established session, by type. */
static void dispatch(struct fab_peer *p, const struct fab_header *h, struct fab_reader *r, int *fd)
{
    switch (h->type) {
    case FAB_F_READY:
        break; /* hearing it was the point */
    case FAB_F_BYE:
        on_bye(p, r);
        break;
    case FAB_F_PING:
        on_ping(p, r);
        break;
    case FAB_F_PONG:
        fab_get_u64(r);
        break;
    case FAB_F_MESSAGE:
        fab_message_on_fragment(p, r);
        break;
    case FAB_F_ACK:
        fab_message_on_ack(p, r);
        break;
    case FAB_F_VOID:
        on_voids(p, r);
        break;
    case FAB_F_VOIDED:
        on_voided(p, r);
        break;
    case FAB_F_GRANT_REQ:
        fab_memory_on_grant_request(p, r);
        break;
    case FAB_F_GRANT:
        fab_remote_on_grant(p, r, fd);
        break;
    case FAB_F_QUIESCE:
        fab_remote_on_quiesce(p, r);
        break;
    case FAB_F_QUIESCED:
        fab_memory_on_quiesced(p, r);
        break;
    case FAB_F_LANE_DOWN:
        fab_lanes_on_down(p, r);
        break;
    case FAB_F_LANE_OPEN:
        fab_lanes_on_open(p, r);
        break;
    case FAB_F_LANE_OPENED:
        fab_lanes_on_opened(p, r);
        break;
    case FAB_F_LANE_READY:
        fab_lanes_on_ready(p, r);
        break;
    case FAB_F_LANE_WANTED:
        fab_lanes_on_wanted(p, r);
        break;
    case FAB_F_LANE_PROBE:
        fab_lanes_on_probe(p, r);
        break;
    default:
        r->bad = true;
    }
}

static void refuse_frame(struct fab_peer *p, const char *why)
{
    p->engine->stats.frames_refused++;
    fab_log(FAB_LOG_DEBUG, "peer %s: a frame was dropped: %s", p->label, why);
}

void fab_session_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    struct fab_peer *p = fab_lane_peer(lane);
    struct fab_header h;
    struct fab_reader r;
    int own_fd = fd;
    if (!p || fab_read_header(&r, bytes, length, &h)) {
        if (p)
            refuse_frame(p, "bad header");
    } else if (h.type == FAB_F_HELLO || h.type == FAB_F_CHALLENGE || h.type == FAB_F_WELCOME ||
               h.type == FAB_F_REFUSE) {
        p->engine->stats.frames_rx++;
        fab_handshake_frame(p, &h, &r);
    } else if (!p->mine || h.session != p->mine ||
               (p->active && atomic_load(&p->state) != FAB_P_UP)) {
        refuse_frame(p, "another session's");
    } else {
        p->rx_frames++;
        p->engine->stats.frames_rx++;
        p->last_heard = p->last_sign = p->engine->now;
        p->in_doubt = false;
        if (p->welcomed && atomic_load(&p->state) == FAB_P_CONNECTING)
            fab_handshake_up(p);
        fab_lanes_heard(p, lane);
        r.bad = !right_length(&h, &r);
        if (atomic_load(&p->state) == FAB_P_UP && !r.bad)
            dispatch(p, &h, &r, &own_fd);
        if (r.bad)
            refuse_frame(p, "malformed body");
        fab_peer_busy(p);
    }
    if (own_fd >= 0)
        fab_close_fd(own_fd);
}
