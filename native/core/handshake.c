/* The handshake; the contract is in handshake.h. */
#include "handshake.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "keys.h"
#include "lanes.h"
#include "message.h"
#include "peer.h"
#include "session.h"
#include "sha256.h"
#include "trace.h"
#include "worker.h"

static const char barred_text[] = "it disconnected us, and has to use our address again first";
#define COOKIE_EPOCH_NS (10 * NS_PER_S)

static const char hello_label[] = "fabric hello 1", welcome_label[] = "fabric welcome 1";

/* Best first. */
static const int kind_order[] = {FAB_KIND_SIM,   FAB_KIND_LOCAL,   FAB_KIND_OFI_EFA,
                                 FAB_KIND_VERBS, FAB_KIND_OFI_TCP, FAB_KIND_OFI_RXM};

/* ---- our half ---- */

static uint32_t nics_of_kind(const fab_nic_info *nics, uint32_t count, int kind,
                             uint32_t out[FAB_MAX_NICS])
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < count; i++)
        if (nics[i].kind == kind)
            out[n++] = i;
    return n;
}

static uint32_t own_nics_of_kind(const struct fab_engine *e, int kind, uint32_t out[FAB_MAX_NICS])
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->nic_count; i++)
        if (e->nics[i]->info.kind == kind)
            out[n++] = i;
    return n;
}

/* Nothing was posted on it, and the other half knows no keys. */
static void drop_lane(struct fab_engine *e, struct fab_lane *lane)
{
    if (lane->nic->provider->lane_abandon) {
        lane->nic->provider->lane_abandon(lane);
        return;
    }
    lane->peer = NULL;
    if (lane->nic->provider->lane_close(lane) != -EINPROGRESS)
        return;
    if (e->dropped_count < FAB_DROPPED)
        e->dropped[e->dropped_count++] = lane;
    else
        fab_log(FAB_LOG_WARN, "%s: %d lanes are closing, the limit; one stays open with the engine",
                lane->nic->info.name, FAB_DROPPED);
}

void fab_handshake_close_dropped(struct fab_engine *e)
{
    for (uint32_t i = 0; i < e->dropped_count; i++)
        if (e->dropped[i]->nic->provider->lane_close(e->dropped[i]) != -EINPROGRESS)
            e->dropped[i--] = e->dropped[--e->dropped_count];
}

static void drop_lanes(struct fab_peer *p)
{
    for (uint32_t i = 0; i < FAB_MAX_LANES; i++) {
        if (p->lanes[i])
            drop_lane(p->engine, p->lanes[i]);
        p->lanes[i] = NULL;
    }
    p->lane_count = 0;
    fab_lanes_forget(p);
}

static int add_lane(struct fab_peer *p, struct fab_nic *nic, struct fab_origin *origin,
                    uint32_t peer_nic)
{
    uint32_t i = p->lane_count;
    int rc = nic->provider->lane_open(nic, origin, &p->lanes[i]);
    if (rc) {
        p->lanes[i] = NULL;
        return rc;
    }
    p->lanes[i]->peer = p;
    p->lanes[i]->number = i;
    p->lane_nic[i] = peer_nic;
    p->life[i] = (struct fab_lane_life){.nic = nic->index, .weight = 1};
    p->lane_outstanding[i] = 0;
    p->lane_count++;
    p->provider = nic->provider;
    return 0;
}

/* Points the lane of first contact at the peer's NIC. */
static int point_at_nic(struct fab_peer *p)
{
    const fab_nic_info *to = &p->nics[p->lane_nic[p->contact]];
    int64_t turn = p->engine->config.peer_timeout_ns / (p->lane_count + 1);
    p->contact_until = p->engine->now + (turn < FAB_CONTACT_NS ? turn : FAB_CONTACT_NS);
    return p->provider->lane_connect(p->lanes[p->contact], to->blob, to->blob_len);
}

/* The lane of first contact broke, or nobody answers there: the next one's turn. */
static void next_contact(struct fab_peer *p)
{
    for (uint32_t k = 1; k <= p->lane_count; k++) {
        uint32_t i = (p->contact + k) % p->lane_count;
        if (p->life[i].state != FAB_L_FRESH || (i == p->contact && p->active))
            continue;
        p->contact = i;
        if (p->active && point_at_nic(p))
            fab_lane_broke(p->lanes[i], fab_take_reason(-EIO));
        return;
    }
    p->contact_until = p->engine->now + FAB_CONTACT_NS; /* there is no other */
}

/* Opens our halves of the lanes of one kind, and points one at the peer's NIC. */
static int try_kind(struct fab_peer *p, int kind)
{
    struct fab_engine *e = p->engine;
    uint32_t ours[FAB_MAX_NICS], theirs[FAB_MAX_NICS];
    uint32_t n = own_nics_of_kind(e, kind, ours);
    uint32_t m = nics_of_kind(p->nics, p->nic_count, kind, theirs);
    if (!n || !m)
        return -ENOENT;
    uint32_t lanes = n > m ? n : m;
    if (lanes > FAB_MAX_LANES)
        lanes = FAB_MAX_LANES;
    int rc = 0;
    for (uint32_t i = 0; i < lanes && !rc; i++)
        rc = add_lane(p, e->nics[ours[i % n]], NULL, theirs[i % m]);
    for (uint32_t i = lanes; i-- > 0 && !rc;)
        if (p->lanes[i]->nic->info.up)
            p->contact = i;
    if (!rc)
        rc = point_at_nic(p);
    if (rc)
        drop_lanes(p);
    return rc;
}

static void sign(const struct fab_engine *e, const struct fab_writer *w, const struct fab_hello *h,
                 const char *label, uint8_t mac[FAB_MAC_BYTES])
{
    memset(mac, 0, FAB_MAC_BYTES);
    if (e->config.secret_len)
        fab_hmac(e->secret, e->config.secret_len, label, w->bytes + FAB_FRAME_HEADER,
                 h->signed_bytes, mac);
}

static bool send_hello(struct fab_peer *p, bool welcome)
{
    struct fab_engine *e = p->engine;
    struct fab_hello h = {.session = p->mine,
                          .answers = welcome ? p->theirs : 0,
                          .attempt = welcome ? e->attempts : p->attempt,
                          .kind = (uint32_t)p->provider->kind,
                          .nic_count = e->nic_count,
                          .lane_count = p->lane_count,
                          .fragments = FAB_MESSAGE_FRAMES,
                          .contact = p->contact,
                          .peer_timeout = (uint64_t)e->config.peer_timeout_ns,
                          .fence = p->fence};
    memcpy(h.from, e->id, sizeof h.from);
    memcpy(h.to, p->id, sizeof h.to);
    memcpy(h.nonce, p->nonce, sizeof h.nonce);
    memcpy(h.cookie, p->cookie, sizeof h.cookie);
    memcpy(h.label, e->label, sizeof h.label);
    for (uint32_t i = 0; i < p->lane_count; i++) {
        h.lanes[i].from_nic = p->lanes[i]->nic->index;
        h.lanes[i].to_nic = p->lane_nic[i];
        h.lanes[i].blob_len = p->lanes[i]->blob_len;
        h.lanes[i].speed = (uint32_t)(p->lanes[i]->nic->info.speed_bps / 1000000);
        int rc = fab_keys_bell(p, i, &h.lanes[i].doorbell);
        if (rc) {
            fab_session_doom(p, FAB_E_UNREACHABLE, fab_take_reason(rc));
            return false;
        }
        memcpy(h.lanes[i].blob, p->lanes[i]->blob, FAB_BLOB_MAX);
    }
    struct fab_writer w;
    fab_frame_begin(&w, welcome ? FAB_F_WELCOME : FAB_F_HELLO, welcome ? p->theirs : 0);
    fab_put_hello(&w, &h);
    uint8_t mac[FAB_MAC_BYTES];
    sign(e, &w, &h, welcome ? welcome_label : hello_label, mac);
    fab_put(&w, mac, sizeof mac);
    if (!fab_session_send(p, &w, NULL))
        return false;
    e->stats.handshakes_resent += p->greeted;
    p->greeted = true;
    return true;
}

bool fab_handshake_send_welcome(struct fab_peer *p)
{
    return send_hello(p, true);
}

static void begin(struct fab_peer *p, bool active)
{
    struct fab_engine *e = p->engine;
    /* Kept by a side that gives up its own attempt: its HELLO, should it arrive late, then names the
     * session that stands (S4). The end of a session sets it to 0. */
    while (!p->mine)
        fab_random(&p->mine, sizeof p->mine);
    fab_random(p->nonce, sizeof p->nonce);
    memset(p->cookie, 0, sizeof p->cookie);
    p->active = active;
    if (active)
        p->attempt = ++e->attempts;
    p->kept_out = p->ending = p->greeted = false;
    p->theirs = 0;
    p->deadline = e->now + e->config.peer_timeout_ns;
    p->next_hello = e->now;
    p->last_heard = p->last_sign = p->last_ping = e->now;
    atomic_store_explicit(&p->state, FAB_P_CONNECTING, memory_order_release);
    fab_peer_busy(p);
}

static void fail_start(struct fab_peer *p, const char *text)
{
    p->end_code = FAB_E_UNREACHABLE;
    atomic_store_explicit(&p->state, FAB_P_CONNECTING, memory_order_release);
    fab_session_end(p, FAB_E_UNREACHABLE, text, false);
}

void fab_session_start(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    char why[FAB_TEXT_MAX] = "";
    e->now = fab_now();
    if (atomic_load(&e->closing)) {
        fail_start(p, "the engine is closing");
        return;
    }
    if (!p->nics) {
        fab_session_told(p);
        fail_start(p, "it has no address here; it has to connect to us");
        return;
    }
    fab_session_doubt_idle(e);
    size_t used = 0;
    for (size_t i = 0; i < sizeof kind_order / sizeof *kind_order; i++) {
        int rc = try_kind(p, kind_order[i]);
        if (!rc) {
            fab_unbar(e, p);
            begin(p, true);
            return;
        }
        if (rc == -ENOENT && kind_order[i] != FAB_KIND_LOCAL)
            continue;
        int more = snprintf(why + used, sizeof why - used, "%s%s", used ? "; " : "",
                            rc == -ENOENT ? "not on this host" : fab_take_reason(rc));
        if (more > 0 && used + (size_t)more < sizeof why)
            used += (size_t)more;
    }
    fab_session_told(p);
    fail_start(p, used ? why : "no provider in common");
}

void fab_handshake_tick(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    if (e->now > p->deadline) {
        char text[FAB_TEXT_MAX];
        fab_text(text, sizeof text, "no answer to the handshake within %.1f s (provider %s)",
                 (double)e->config.peer_timeout_ns / 1e9, p->provider ? p->provider->name : "none");
        fab_session_doom(p, FAB_E_UNREACHABLE, text);
    } else if (e->now >= p->next_hello) {
        bool broken = p->life[p->contact].state != FAB_L_FRESH;
        if (broken || (p->active && e->now >= p->contact_until))
            next_contact(p);
        p->next_hello = e->now + FAB_HELLO_EVERY_NS;
        if (p->active)
            send_hello(p, false);
        else
            p->due_welcome = true;
    }
    fab_peer_busy(p);
}

void fab_handshake_up(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    p->welcomed = p->due_welcome = false; /* its lane may be gone when one would be sent */
    p->was_up = true;
    p->last_heard = p->last_sign = e->now;
    fab_lanes_begin(p);
    fab_messages_begin_session(p);
    atomic_store_explicit(&p->state, FAB_P_UP, memory_order_release);
    e->stats.peers_up++;
    e->dirty = true;
    fab_log(FAB_LOG_INFO, "peer %s: up over %s, %u lanes", p->label, p->provider->name,
            p->lane_count);
    fab_trace_peer(p, FAB_TRACE_UP, p->provider->name);
    fab_peer_busy(p);
}

/* ---- answers to our HELLO ---- */

static bool connecting(const struct fab_peer *p)
{
    return p->active && atomic_load_explicit(&p->state, memory_order_relaxed) == FAB_P_CONNECTING;
}

static void on_challenge(struct fab_peer *p, struct fab_reader *r)
{
    uint8_t id[FAB_ENGINE_ID_BYTES], cookie[16];
    fab_get(r, id, sizeof id);
    uint64_t session = fab_get_u64(r);
    fab_get(r, cookie, sizeof cookie);
    if (!fab_read_end(r) || session != p->mine || !connecting(p) || memcmp(id, p->id, sizeof id))
        return;
    if (!p->engine->config.secret_len) {
        fab_session_doom(p, FAB_E_UNREACHABLE,
                         "the peer asks for a shared secret; none is set here");
        return;
    }
    memcpy(p->cookie, cookie, sizeof cookie);
    p->greeted = false; /* what follows is another HELLO, not a copy */
    p->next_hello = 0;
    fab_peer_busy(p);
    fab_handshake_tick(p);
}

/* The peer gave this attempt up before we did, as its peer_timeout is shorter. */
static void begin_again(struct fab_peer *p)
{
    int64_t deadline = p->deadline;
    p->mine = 0;
    begin(p, true);
    p->deadline = deadline;
    p->next_hello = p->engine->now + FAB_HELLO_EVERY_NS;
}

static void on_refuse(struct fab_peer *p, struct fab_reader *r)
{
    struct fab_engine *e = p->engine;
    uint8_t id[FAB_ENGINE_ID_BYTES];
    char text[FAB_TEXT_MAX], line[FAB_TEXT_MAX + 32];
    fab_get(r, id, sizeof id);
    uint64_t session = fab_get_u64(r);
    int code = (int)fab_get_u32(r);
    fab_get_text(r, text, sizeof text);
    if (!fab_read_end(r) || session != p->mine || !connecting(p))
        return;
    if (code == FAB_E_CANCELLED && !p->ending && e->now < p->deadline) {
        begin_again(p);
        return;
    }
    p->kept_out = code == FAB_E_UNREACHABLE && !memcmp(id, p->id, sizeof id);
    fab_text(line, sizeof line, "refused: %s", text);
    fab_session_doom(p, FAB_E_CLOSED, line);
}

static bool welcome_is_ours(const struct fab_peer *p, const struct fab_hello *h)
{
    return p->active && h->answers == p->mine && h->lane_count == p->lane_count &&
           !memcmp(h->from, p->id, sizeof h->from) && !memcmp(h->to, p->engine->id, sizeof h->to);
}

static bool mac_ok(const struct fab_engine *e, const struct fab_reader *r,
                   const struct fab_hello *h, const char *label)
{
    uint8_t mac[FAB_MAC_BYTES];
    if (!e->config.secret_len)
        return true;
    fab_hmac(e->secret, e->config.secret_len, label, r->bytes + FAB_FRAME_HEADER, h->signed_bytes,
             mac);
    return fab_mac_equal(mac, h->mac);
}

/* Whatever it tried up to now is over, or the session that begins. */
static void note_attempt(struct fab_peer *p, const struct fab_hello *h)
{
    if (h->attempt > p->attempts_over)
        p->attempts_over = h->attempt;
}

static void on_welcome(struct fab_peer *p, const struct fab_header *head, struct fab_reader *r)
{
    struct fab_hello h;
    uint32_t speeds[FAB_MAX_LANES];
    if (fab_read_hello(r, &h) || !welcome_is_ours(p, &h) || head->session != p->mine) {
        p->engine->stats.frames_refused++;
        return;
    }
    uint32_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    if (state == FAB_P_UP && h.session == p->theirs) {
        p->due_ready = true; /* ours was lost */
        return;
    }
    if (state != FAB_P_CONNECTING)
        return;
    if (!mac_ok(p->engine, r, &h, welcome_label)) {
        fab_session_doom(p, FAB_E_UNREACHABLE, "the peer does not know the shared secret");
        return;
    }
    for (uint32_t i = 0; i < p->lane_count; i++) {
        p->doorbells[i] = h.lanes[i].doorbell;
        speeds[i] = h.lanes[i].speed;
        if (!h.lanes[i].blob_len || p->life[i].state != FAB_L_FRESH)
            continue;
        p->lanes[i]->to_lane = true;
        int rc = p->provider->lane_connect(p->lanes[i], h.lanes[i].blob, h.lanes[i].blob_len);
        if (rc)
            fab_lane_broke(p->lanes[i], fab_take_reason(rc));
        if (p->ending)
            return;
    }
    fab_lanes_weigh(p, speeds);
    p->theirs = h.session;
    note_attempt(p, &h);
    atomic_store(&p->their_fence, h.fence);
    memcpy(p->label, h.label, sizeof p->label);
    p->due_ready = true;
    fab_handshake_up(p);
}

/* ---- their HELLO ---- */

static void refuse(struct fab_nic *nic, struct fab_origin *origin, const struct fab_hello *h,
                   int code, const char *text)
{
    struct fab_engine *e = nic->engine;
    struct fab_writer w;
    e->stats.handshakes_refused++;
    fab_log(FAB_LOG_INFO, "%s: refused %s: %s", nic->info.name, h->label, text);
    fab_frame_begin(&w, FAB_F_REFUSE, 0);
    fab_put(&w, e->id, sizeof e->id);
    fab_put_u64(&w, h->session);
    fab_put_u32(&w, (uint32_t)code);
    fab_put_text(&w, text);
    fab_frame_end(&w);
    nic->provider->origin_reply(nic, origin, h->lanes[h->contact].blob,
                                h->lanes[h->contact].blob_len, w.bytes, w.used);
    nic->provider->origin_drop(nic, origin);
}

static void challenge(struct fab_nic *nic, struct fab_origin *origin, const struct fab_hello *h,
                      const uint8_t cookie[16])
{
    struct fab_engine *e = nic->engine;
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_CHALLENGE, 0);
    fab_put(&w, e->id, sizeof e->id);
    fab_put_u64(&w, h->session);
    fab_put(&w, cookie, 16);
    fab_frame_end(&w);
    nic->provider->origin_reply(nic, origin, h->lanes[h->contact].blob,
                                h->lanes[h->contact].blob_len, w.bytes, w.used);
    nic->provider->origin_drop(nic, origin); /* the next HELLO comes as a first frame again */
}

/* The cookie proves that the sender of a HELLO receives what we send to it, and bounds for how long
 * a recorded HELLO can be replayed; it is computed, not kept, so that HELLOs cost us no memory. */
static void make_cookie(const struct fab_engine *e, const struct fab_hello *h, int64_t epoch,
                        uint8_t cookie[16])
{
    uint8_t text[FAB_ENGINE_ID_BYTES + sizeof h->nonce + sizeof epoch], mac[FAB_MAC_BYTES];
    memcpy(text, h->from, sizeof h->from);
    memcpy(text + sizeof h->from, h->nonce, sizeof h->nonce);
    memcpy(text + sizeof h->from + sizeof h->nonce, &epoch, sizeof epoch);
    fab_hmac(e->cookie_key, sizeof e->cookie_key, "fabric cookie 1", text, sizeof text, mac);
    memcpy(cookie, mac, 16);
}

static bool lanes_fit(const struct fab_nic *nic, const struct fab_hello *h)
{
    const struct fab_engine *e = nic->engine;
    if (h->kind != (uint32_t)nic->provider->kind)
        return false;
    for (uint32_t i = 0; i < h->lane_count; i++)
        if (h->lanes[i].to_nic >= e->nic_count ||
            e->nics[h->lanes[i].to_nic]->info.kind != nic->info.kind)
            return false;
    return true;
}

static int open_their_lanes(struct fab_peer *p, struct fab_nic *nic, struct fab_origin *origin,
                            const struct fab_hello *h)
{
    struct fab_engine *e = p->engine;
    uint32_t speeds[FAB_MAX_LANES];
    for (uint32_t i = 0; i < h->lane_count; i++) {
        /* An origin is a connection, on the NIC where it came in. */
        struct fab_nic *on = origin && !i ? nic : e->nics[h->lanes[i].to_nic];
        int rc = add_lane(p, on, i ? NULL : origin, h->lanes[i].from_nic);
        speeds[i] = h->lanes[i].speed;
        p->doorbells[i] = h->lanes[i].doorbell;
        if (!rc)
            p->lanes[i]->to_lane = true;
        if (!rc && h->lanes[i].blob_len)
            rc = on->provider->lane_connect(p->lanes[i], h->lanes[i].blob, h->lanes[i].blob_len);
        if (rc)
            return rc;
    }
    p->contact = h->contact;
    fab_lanes_weigh(p, speeds);
    return 0;
}

static void admit(struct fab_nic *nic, struct fab_origin *origin, const struct fab_hello *h)
{
    struct fab_engine *e = nic->engine;
    struct fab_peer *p = fab_peer_find(e, h->from);
    if (!p)
        p = fab_peer_new(e, h->from, h->label);
    if (!p) {
        refuse(nic, origin, h, FAB_E_FULL, "its table of peers is full");
        return;
    }
    memcpy(p->label, h->label, sizeof p->label);
    int rc = open_their_lanes(p, nic, origin, h);
    if (rc) {
        char text[FAB_TEXT_MAX];
        fab_text(text, sizeof text, "cannot open the lanes it asks for: %s", fab_take_reason(rc));
        fab_log(FAB_LOG_WARN, "peer %s: %s", p->label, text);
        if (!origin || !p->lanes[0]) /* its first lane takes an origin */
            refuse(nic, origin, h, FAB_E_SYSTEM, "it could not open a lane");
        drop_lanes(p);
        /* Of two attempts at once ours was given up for this one (settle_existing). */
        if (atomic_load_explicit(&p->state, memory_order_relaxed) == FAB_P_CONNECTING)
            fab_session_doom(p, FAB_E_UNREACHABLE, text);
        return;
    }
    begin(p, false);
    memcpy(p->cookie, h->cookie, sizeof p->cookie);
    p->theirs = h->session;
    note_attempt(p, h);
    atomic_store(&p->their_fence, h->fence);
    p->welcomed = true;
    p->due_welcome = true;
    p->next_hello = e->now + FAB_HELLO_EVERY_NS;
}

static struct fab_pending *find_pending(struct fab_engine *e, const struct fab_hello *h)
{
    for (uint32_t i = 0; i < e->newcomer_count; i++)
        if (e->newcomers[i].hello.session == h->session &&
            !memcmp(e->newcomers[i].hello.from, h->from, sizeof h->from))
            return &e->newcomers[i];
    return NULL;
}

/* A HELLO that passed all checks waits here for the end of the turn, since lanes must not be closed
 * from within the provider's poll(); and after that, if need be, for the application's word. */
static void enqueue(struct fab_nic *nic, struct fab_origin *origin, const struct fab_hello *h)
{
    struct fab_engine *e = nic->engine;
    struct fab_pending *same = find_pending(e, h);
    if (same && same->origin != origin)
        nic->provider->origin_drop(nic, origin);
    if (same)
        return;
    if (e->newcomer_count == FAB_NEWCOMERS) {
        refuse(nic, origin, h, FAB_E_FULL, "too many newcomers wait for it");
        return;
    }
    e->newcomers[e->newcomer_count++] =
        (struct fab_pending){.token = ++e->next_token,
                             .nic = nic,
                             .origin = origin,
                             .deadline = e->now + e->config.peer_timeout_ns,
                             .hello = *h};
}

enum verdict { ADMIT, DROP, LATER, OVER };

/* What becomes of a HELLO that meets a session (S2, S4). */
static enum verdict settle_existing(struct fab_engine *e, const struct fab_hello *h)
{
    struct fab_peer *p = fab_peer_find(e, h->from);
    uint32_t state = p ? atomic_load_explicit(&p->state, memory_order_relaxed) : FAB_P_IDLE;
    if ((state == FAB_P_UP || state == FAB_P_CONNECTING) && !p->ending && p->theirs == h->session) {
        /* It did not get ours; once it was heard in the session, this is a late copy. */
        p->due_welcome = state == FAB_P_CONNECTING && !p->active;
        if (p->due_welcome && h->contact < p->lane_count)
            p->contact = h->contact; /* where it hears */
        fab_peer_busy(p);
        return DROP;
    }
    if (p && h->attempt <= p->attempts_over)
        return OVER;
    if (state == FAB_P_CONNECTING && p->active && !p->ending) {
        if (memcmp(e->id, h->from, sizeof e->id) < 0)
            return DROP; /* ours wins */
        drop_lanes(p); /* theirs wins: our transfers stay queued and use it */
        return ADMIT;
    }
    if (state == FAB_P_UP || state == FAB_P_CONNECTING) {
        fab_session_doom(p, FAB_E_CLOSED, "the peer began a new session");
        return LATER; /* this turn ends it; polling here would change the list being served */
    }
    return state == FAB_P_FENCING ? LATER : ADMIT;
}

static void on_hello(struct fab_nic *nic, struct fab_origin *origin, struct fab_reader *r)
{
    struct fab_engine *e = nic->engine;
    struct fab_hello h;
    if (fab_read_hello(r, &h)) {
        e->stats.frames_refused++;
        nic->provider->origin_drop(nic, origin);
        return;
    }
    uint8_t cookie[16], before[16];
    make_cookie(e, &h, e->now / COOKIE_EPOCH_NS, cookie);
    make_cookie(e, &h, e->now / COOKIE_EPOCH_NS - 1, before);
    if (memcmp(h.to, e->id, sizeof h.to))
        refuse(nic, origin, &h, FAB_E_UNREACHABLE,
               "another engine listens here; the peer restarted");
    else if (!memcmp(h.from, e->id, sizeof h.from) || !lanes_fit(nic, &h))
        refuse(nic, origin, &h, FAB_E_WIRE, "malformed hello");
    else if (atomic_load(&e->closing))
        refuse(nic, origin, &h, FAB_E_CLOSED, "it is closing");
    else if (e->config.secret_len && memcmp(h.cookie, cookie, sizeof cookie) &&
             memcmp(h.cookie, before, sizeof before))
        challenge(nic, origin, &h, cookie);
    else if (!mac_ok(e, r, &h, hello_label))
        refuse(nic, origin, &h, FAB_E_INVALID, "the shared secret differs");
    else if (fab_barred(e, h.from))
        refuse(nic, origin, &h, FAB_E_UNREACHABLE, barred_text);
    else {
        fab_session_doubt_idle(e);
        enqueue(nic, origin, &h);
    }
}

void fab_session_hello(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                       uint32_t length)
{
    struct fab_engine *e = nic->engine;
    struct fab_header head;
    struct fab_reader r;
    if (fab_read_header(&r, bytes, length, &head) || head.type != FAB_F_HELLO) {
        e->stats.frames_refused++;
        nic->provider->origin_drop(nic, origin);
        return;
    }
    e->stats.frames_rx++;
    on_hello(nic, origin, &r);
}

void fab_handshake_frame(struct fab_peer *p, const struct fab_header *h, struct fab_reader *r)
{
    if (h->type == FAB_F_CHALLENGE)
        on_challenge(p, r);
    else if (h->type == FAB_F_REFUSE)
        on_refuse(p, r);
    else if (h->type == FAB_F_WELCOME)
        on_welcome(p, h, r);
    else if (!p->active && atomic_load(&p->state) == FAB_P_CONNECTING)
        p->due_welcome = true; /* a HELLO on a lane that came from one: it was sent again */
    fab_peer_busy(p);
}

/* ---- newcomers and the application's word ---- */

static void forget_newcomer(struct fab_engine *e, uint32_t i)
{
    e->newcomers[i] = e->newcomers[--e->newcomer_count];
}

void fab_session_origin_gone(struct fab_nic *nic, struct fab_origin *origin)
{
    struct fab_engine *e = nic->engine;
    for (uint32_t i = 0; origin && i < e->newcomer_count; i++)
        if (e->newcomers[i].origin == origin)
            forget_newcomer(e, i--);
}

static void answer(struct fab_engine *e, const struct fab_pending *n, enum verdict verdict)
{
    if (verdict == DROP)
        n->nic->provider->origin_drop(n->nic, n->origin);
    else if (atomic_load(&e->closing))
        refuse(n->nic, n->origin, &n->hello, FAB_E_CLOSED, "it is closing");
    else if (fab_barred(e, n->hello.from))
        refuse(n->nic, n->origin, &n->hello, FAB_E_UNREACHABLE, barred_text);
    else if (verdict == OVER) /* a late copy; or it does not know yet, and begins anew */
        refuse(n->nic, n->origin, &n->hello, FAB_E_CANCELLED, "that attempt is over");
    else
        admit(n->nic, n->origin, &n->hello);
}

int fab_newcomers_serve(struct fab_engine *e)
{
    int n = 0;
    for (uint32_t i = 0; i < e->newcomer_count; i++) {
        struct fab_pending next = e->newcomers[i];
        if (next.asking)
            continue;
        if (e->config.ask_accept && !fab_peer_find(e, next.hello.from)) {
            e->newcomers[i].asking = true;
            e->dirty = true;
            continue;
        }
        enum verdict verdict = settle_existing(e, &next.hello);
        if (verdict == LATER)
            continue;
        forget_newcomer(e, i--);
        answer(e, &next, verdict);
        n++;
    }
    return n;
}

void fab_newcomers_tick(struct fab_engine *e)
{
    for (uint32_t i = 0; i < e->newcomer_count; i++) {
        if (e->now < e->newcomers[i].deadline)
            continue;
        struct fab_pending late = e->newcomers[i];
        forget_newcomer(e, i--);
        refuse(late.nic, late.origin, &late.hello, FAB_E_TIMEOUT,
               "its accept callback did not answer in time");
    }
}

static int newcomer_ready(struct fab_engine *e, void *arg)
{
    fab_newcomer *out = arg;
    int found = 0;
    fab_lock(e);
    for (uint32_t i = 0; i < e->newcomer_count && !found; i++) {
        struct fab_pending *n = &e->newcomers[i];
        if (!n->asking || n->shown)
            continue;
        n->shown = true;
        found = 1;
        memset(out, 0, sizeof *out);
        out->token = n->token;
        memcpy(out->id, n->hello.from, sizeof out->id);
        memcpy(out->label, n->hello.label, sizeof out->label);
        fab_text(out->provider, sizeof out->provider, "%s", n->nic->provider->name);
    }
    fab_unlock(e);
    return found;
}

int fab_accept_next(fab_engine *e, fab_newcomer *out, int64_t timeout)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int rc = fab_wait_quietly(e, newcomer_ready, out, timeout);
    if (rc == FAB_E_TIMEOUT)
        fab_error(rc, "no newcomer");
    fab_leave(e);
    return rc == 1 ? 0 : rc;
}

int fab_accept_reply(fab_engine *e, int64_t token, int yes)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int rc = fab_error(FAB_E_INVALID, "newcomer %lld is gone or was answered", (long long)token);
    fab_lock(e);
    e->now = fab_now();
    for (uint32_t i = 0; i < e->newcomer_count; i++) {
        if (e->newcomers[i].token != token)
            continue;
        struct fab_pending n = e->newcomers[i];
        forget_newcomer(e, i);
        enum verdict verdict = yes ? settle_existing(e, &n.hello) : DROP;
        if (verdict == LATER) { /* it is known meanwhile: the next turns see to it */
            n.asking = false;
            e->newcomers[e->newcomer_count++] = n;
        } else if (yes) {
            answer(e, &n, verdict);
        } else {
            refuse(n.nic, n.origin, &n.hello, FAB_E_INVALID, "its application said no");
        }
        rc = 0;
        break;
    }
    fab_unlock(e);
    fab_leave(e);
    return rc;
}
