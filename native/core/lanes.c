/* Lanes that break and come back; the contract is in lanes.h. */
#include "lanes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "peer.h"
#include "post.h"
#include "session.h"
#include "stats.h"

#define WEIGHT_MAX 1000u
#define LATE_NS (10 * FAB_TICK_NS) /* what passes without a look at a lane is not its silence */

/* ---- which lanes there are ---- */

static void due(struct fab_peer *p, bool *what)
{
    *what = true;
    p->lanes_broken = true;
    fab_peer_busy(p);
}

static const char *const state_names[] = {
    [FAB_L_FRESH] = "fresh",        [FAB_L_UP] = "up",           [FAB_L_BROKEN] = "lost",
    [FAB_L_GONE] = "closed",        [FAB_L_OFFERED] = "offered", [FAB_L_ANSWERED] = "answered",
    [FAB_L_PROVING] = "to be heard"};

/* Every change of a lane's state: one line of the log, and one event of the trace. */
static void turns(struct fab_peer *p, uint32_t i, uint32_t state, enum fab_log_level level,
                  const char *why)
{
    const char *nic = p->engine->nics[p->life[i].nic]->info.name;
    p->life[i].state = state;
    fab_log(level, "peer %s: lane %u over %s: %s%s%s", p->label, i, nic, state_names[state],
            why[0] ? ": " : "", why);
    fab_trace_lane(p, i, state, why);
}

void fab_lanes_begin(struct fab_peer *p)
{
    fab_stats_lanes(p);
    for (uint32_t i = 0; i < p->lane_count; i++) {
        struct fab_lane_life *life = &p->life[i];
        p->lanes[i]->established = true;
        if (life->state == FAB_L_BROKEN)
            continue;
        life->since = p->engine->now;
        if (i == p->contact || !p->provider->repairs)
            turns(p, i, FAB_L_UP, FAB_LOG_INFO, "");
        else
            turns(p, i, p->active ? FAB_L_PROVING : FAB_L_ANSWERED, FAB_LOG_DEBUG, "");
        if (life->state == FAB_L_PROVING)
            due(p, &life->due_ready);
    }
}

void fab_lanes_close(struct fab_peer *p, const char *why)
{
    for (uint32_t i = 0; i < p->lane_count; i++)
        if (p->life[i].state != FAB_L_GONE)
            turns(p, i, FAB_L_GONE, FAB_LOG_INFO, why);
}

void fab_lanes_forget(struct fab_peer *p)
{
    memset(p->life, 0, sizeof p->life);
    p->contact = 0;
    p->lanes_broken = false;
    while (p->lost) {
        struct fab_lost_frame *frame = p->lost;
        p->lost = frame->next;
        free(frame);
    }
    p->last_lost = NULL;
    p->lost_count = 0;
}

bool fab_lane_works(const struct fab_peer *p, uint32_t i)
{
    return p->lanes[i] && p->life[i].state == FAB_L_UP;
}

struct fab_lane *fab_lane_for_frames(const struct fab_peer *p)
{
    if (p->lanes[p->contact] && p->life[p->contact].state <= FAB_L_UP)
        return p->lanes[p->contact];
    for (uint32_t i = 0; i < p->lane_count; i++)
        if (fab_lane_works(p, i))
            return p->lanes[i];
    return NULL;
}

static bool another_works(const struct fab_peer *p, uint32_t but)
{
    for (uint32_t i = 0; i < p->lane_count; i++)
        if (i != but && p->lanes[i] && p->life[i].state <= FAB_L_UP)
            return true;
    return false;
}

/* ---- weights ---- */

static uint32_t sharing(const struct fab_peer *p, uint32_t i, bool ours)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < p->lane_count; k++)
        n += ours ? p->life[k].nic == p->life[i].nic : p->lane_nic[k] == p->lane_nic[i];
    return n;
}

/* A lane is as fast as its slower end, whose speed it shares with the other lanes of that NIC. Where
 * one speed is unknown, all lanes count the same. */
void fab_lanes_weigh(struct fab_peer *p, const uint32_t *speeds)
{
    uint64_t speed[FAB_MAX_LANES], most = 0;
    bool known = true;
    for (uint32_t i = 0; i < p->lane_count; i++) {
        uint64_t ours = p->lanes[i]->nic->info.speed_bps / 1000000 / sharing(p, i, true);
        uint64_t theirs = speeds[i] / sharing(p, i, false);
        speed[i] = ours < theirs ? ours : theirs;
        known &= speed[i] > 0;
        most = speed[i] > most ? speed[i] : most;
    }
    for (uint32_t i = 0; i < p->lane_count; i++) {
        uint64_t weight = known ? (speed[i] * WEIGHT_MAX + most - 1) / most : 1;
        p->life[i].weight = (uint32_t)weight;
        p->life[i].credit = 0;
    }
}

/* Smooth weighted round robin: every lane earns its weight, the richest is taken and pays for all.
 * With equal weights the lanes take turns. */
static uint32_t richest(struct fab_peer *p, const bool taken[FAB_MAX_LANES])
{
    uint32_t best = FAB_MAX_LANES;
    int64_t paid = 0;
    for (uint32_t i = 0; i < p->lane_count; i++) {
        if (taken[i] || !fab_lane_works(p, i))
            continue;
        p->life[i].credit += p->life[i].weight;
        paid += p->life[i].weight;
        if (best == FAB_MAX_LANES || p->life[i].credit > p->life[best].credit)
            best = i;
    }
    if (best < FAB_MAX_LANES)
        p->life[best].credit -= paid;
    return best;
}

uint32_t fab_lanes_pick(struct fab_peer *p, uint32_t most, uint32_t out[FAB_MAX_LANES],
                        uint32_t weights[FAB_MAX_LANES])
{
    bool taken[FAB_MAX_LANES] = {false};
    uint32_t n = 0;
    while (n < most) {
        uint32_t i = richest(p, taken);
        if (i == FAB_MAX_LANES)
            break;
        taken[i] = true;
        weights[n] = p->life[i].weight;
        out[n++] = i;
    }
    return n;
}

/* ---- a lane breaks ---- */

static uint32_t index_of(const struct fab_peer *p, const struct fab_lane *lane)
{
    uint32_t i = lane->number;
    return i < FAB_MAX_LANES && p->lanes[i] == lane ? i : FAB_MAX_LANES;
}

static void mark_broken(struct fab_peer *p, uint32_t i, const char *text, bool tell)
{
    struct fab_lane_life *life = &p->life[i];
    if (life->state == FAB_L_BROKEN || life->state == FAB_L_GONE)
        return;
    bool was_up = life->state == FAB_L_UP;
    if (was_up) {
        if (p->engine->now - life->since > FAB_LANE_STABLE_NS)
            life->tries = 0;
        p->engine->stats.lanes_lost++;
        p->counts[i].lost++;
    }
    turns(p, i, FAB_L_BROKEN, was_up ? FAB_LOG_WARN : FAB_LOG_INFO, text);
    life->due_open = life->due_opened = life->due_ready = life->due_probe = false;
    p->lanes[i]->given_up = true;
    fab_text(life->text, sizeof life->text, "%s", text);
    due(p, &life->due_down);
    life->due_down = tell;
}

void fab_lane_broke(struct fab_lane *lane, const char *text)
{
    struct fab_peer *p = fab_lane_peer(lane);
    uint32_t i = p ? index_of(p, lane) : FAB_MAX_LANES;
    if (i == FAB_MAX_LANES)
        return;
    if (!lane->nic->provider->repairs || !another_works(p, i)) {
        fab_session_doom(p, FAB_E_UNREACHABLE, text);
        return;
    }
    mark_broken(p, i, text, true);
}

void fab_lane_frame_lost(struct fab_lane *lane, const uint8_t *bytes, uint32_t length)
{
    struct fab_peer *p = fab_lane_peer(lane);
    uint32_t state = p ? atomic_load_explicit(&p->state, memory_order_relaxed) : FAB_P_IDLE;
    if (state != FAB_P_UP || p->ending)
        return;
    struct fab_lost_frame *frame =
        p->lost_count < FAB_LOST_FRAMES ? malloc(sizeof *frame + length) : NULL;
    if (!frame) {
        fab_session_doom(p, FAB_E_UNREACHABLE, "more control frames were lost than can be kept");
        return;
    }
    frame->next = NULL;
    frame->length = length;
    memcpy(frame->bytes, bytes, length);
    if (p->last_lost)
        p->last_lost->next = frame;
    else
        p->lost = frame;
    p->last_lost = frame;
    p->lost_count++;
    p->lanes_broken = true;
    fab_peer_busy(p);
}

/* Sends lost frames again, in their order, as far as that goes. */
static int send_lost(struct fab_peer *p)
{
    int n = 0;
    while (p->lost) {
        struct fab_lost_frame *frame = p->lost;
        struct fab_lane *lane = fab_lane_for_frames(p);
        int rc = lane ? lane->nic->provider->lane_send(lane, frame->bytes, frame->length, NULL)
                      : -EAGAIN;
        if (rc < 0 && rc != -EAGAIN)
            fab_lane_broke(lane, fab_take_reason(rc));
        if (rc < 0)
            break;
        p->lost = frame->next;
        if (!p->lost)
            p->last_lost = NULL;
        p->lost_count--;
        p->engine->stats.frames_resent++;
        free(frame);
        n++;
    }
    return n;
}

/* A NIC that went down takes its lanes along at once where there are others; a lane that is its
 * peer's last may outlast a short outage, by the device's own retransmissions. */
void fab_lanes_nic_state(struct fab_nic *nic, const char *text)
{
    struct fab_engine *e = nic->engine;
    char line[FAB_TEXT_MAX];
    fab_text(line, sizeof line, "%s: %s", nic->info.name, text);
    fab_log(FAB_LOG_WARN, "NIC %s is %s: %s", nic->info.name, nic->info.up ? "up" : "down", text);
    e->stats.nics_lost += !nic->info.up;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t k = 0; k < touched; k++) {
        struct fab_peer *p = fab_slot_at(&e->peers, k);
        if (!fab_slot_live(p) || atomic_load(&p->state) != FAB_P_UP)
            continue;
        for (uint32_t i = 0; i < p->lane_count; i++) {
            if (p->life[i].nic != nic->index || !nic->provider->repairs)
                continue;
            if (nic->info.up && p->life[i].state == FAB_L_GONE) {
                p->life[i].retry_at = 0;
                p->life[i].tries = 0;
                due(p, &p->life[i].due_wanted);
            } else if (!nic->info.up && fab_lane_works(p, i) && another_works(p, i)) {
                mark_broken(p, i, line, true);
            }
        }
    }
}

/* ---- closing, and what is due ---- */

static bool send_pair(struct fab_peer *p, enum fab_frame_type type, uint32_t i)
{
    struct fab_writer w;
    fab_frame_begin(&w, type, p->theirs);
    fab_put_u32(&w, i);
    fab_put_u32(&w, p->life[i].serial);
    return fab_session_send(p, &w, NULL);
}

/* Over the lane itself: hearing it there is what proves that the lane works. */
static bool send_over(struct fab_peer *p, enum fab_frame_type type, uint32_t i)
{
    struct fab_lane *lane = p->lanes[i];
    struct fab_writer w;
    fab_frame_begin(&w, type, p->theirs);
    fab_put_u32(&w, i);
    fab_put_u32(&w, p->life[i].serial);
    fab_frame_end(&w);
    int rc = lane->nic->provider->lane_send(lane, w.bytes, w.used, NULL);
    if (rc < 0 && rc != -EAGAIN)
        fab_lane_broke(lane, fab_take_reason(rc));
    return rc == 0;
}

static bool send_blob(struct fab_peer *p, enum fab_frame_type type, uint32_t i)
{
    struct fab_writer w;
    fab_frame_begin(&w, type, p->theirs);
    fab_put_u32(&w, i);
    fab_put_u32(&w, p->life[i].serial);
    fab_put_u32(&w, p->lanes[i]->blob_len);
    fab_put(&w, p->lanes[i]->blob, FAB_BLOB_MAX);
    return fab_session_send(p, &w, NULL);
}

static int64_t next_try(const struct fab_peer *p, uint32_t i)
{
    uint32_t tries = p->life[i].tries;
    return p->engine->now +
           (FAB_LANE_RETRY_NS << (tries < FAB_LANE_TRIES ? tries : FAB_LANE_TRIES));
}

/* 1: closed; 0: not yet. */
static int close_lane(struct fab_peer *p, uint32_t i)
{
    struct fab_lane *lane = p->lanes[i];
    if (lane && lane->nic->provider->lane_close(lane) == -EINPROGRESS)
        return 0;
    p->lanes[i] = NULL;
    turns(p, i, FAB_L_GONE, FAB_LOG_DEBUG, "");
    p->life[i].retry_at = next_try(p, i);
    fab_post_lane_gone(p, i, p->life[i].text);
    return 1;
}

static int send_due(struct fab_peer *p, uint32_t i)
{
    struct fab_lane_life *life = &p->life[i];
    int n = 0;
    if (life->due_down && send_pair(p, FAB_F_LANE_DOWN, i))
        life->due_down = false, n++;
    if (life->due_open && send_blob(p, FAB_F_LANE_OPEN, i))
        life->due_open = false, n++;
    if (life->due_opened && send_blob(p, FAB_F_LANE_OPENED, i))
        life->due_opened = false, n++;
    if (life->due_ready && send_over(p, FAB_F_LANE_READY, i))
        life->due_ready = false, n++;
    if (life->due_probe && send_over(p, FAB_F_LANE_PROBE, i))
        life->due_probe = false, n++;
    if (life->due_wanted && send_pair(p, FAB_F_LANE_WANTED, i))
        life->due_wanted = false, n++;
    return n;
}

static bool any_due(const struct fab_lane_life *life)
{
    return life->due_down || life->due_open || life->due_opened || life->due_ready ||
           life->due_probe || life->due_wanted || life->state == FAB_L_BROKEN;
}

int fab_lanes_serve(struct fab_peer *p)
{
    int n = 0;
    if (!p->lanes_broken)
        return 0;
    p->lanes_broken = false;
    for (uint32_t i = 0; i < p->lane_count && !p->ending; i++) {
        if (p->life[i].state == FAB_L_BROKEN)
            n += close_lane(p, i);
        n += send_due(p, i);
        p->lanes_broken |= any_due(&p->life[i]);
    }
    if (!p->ending)
        n += send_lost(p);
    fab_session_carry_out_voids(p);
    p->lanes_broken |= p->lost != NULL;
    if (p->lanes_broken)
        fab_peer_busy(p);
    return n;
}

/* ---- coming back ---- */

/* Opens our half; the peer's is told by the frame that follows. */
static bool open_half(struct fab_peer *p, uint32_t i)
{
    struct fab_nic *nic = p->engine->nics[p->life[i].nic];
    if (nic->provider->lane_open(nic, NULL, &p->lanes[i])) {
        fab_log(FAB_LOG_WARN, "peer %s: lane %u cannot be opened again: %s", p->label, i,
                fab_take_reason(-EIO));
        p->lanes[i] = NULL;
        return false;
    }
    p->lanes[i]->peer = p;
    p->lanes[i]->number = i;
    p->lanes[i]->established = p->lanes[i]->to_lane = true;
    p->life[i].since = p->engine->now;
    return true;
}

static void offer(struct fab_peer *p, uint32_t i)
{
    struct fab_lane_life *life = &p->life[i];
    if (life->due_down)
        return; /* the peer has to hear of the last one first */
    life->retry_at = next_try(p, i);
    life->tries++;
    if (!p->engine->nics[life->nic]->info.up || !open_half(p, i))
        return;
    life->serial++;
    turns(p, i, FAB_L_OFFERED, FAB_LOG_DEBUG, "");
    due(p, &life->due_open);
}

/* Adds up the time in which the peer was heard, but not over this lane. A peer that is stopped is
 * silent on all lanes, and comes back on all of them: that time must not count. Of it, what passes
 * until the others have missed their probes does count, hence the margin between the limits: a
 * quarter before the first probe and 3/8 of being heard are less than 3/4 of the peer timeout. */
static void watch_silence(struct fab_peer *p, uint32_t i)
{
    struct fab_lane_life *life = &p->life[i];
    int64_t now = p->engine->now, timeout = p->engine->config.peer_timeout_ns;
    int64_t passed = now - life->looked < LATE_NS ? now - life->looked : LATE_NS;
    life->looked = now;
    if (now - p->last_sign < timeout * 3 / 8)
        life->silence += passed;
    if (life->silence >= timeout * 3 / 4) {
        mark_broken(p, i, "nothing was heard over it while other lanes work", true);
    } else if (life->silence >= timeout / 4 && now - life->probed >= timeout / 4) {
        life->probed = now;
        due(p, &life->due_probe);
    }
}

void fab_lanes_tick(struct fab_peer *p)
{
    int64_t now = p->engine->now;
    for (uint32_t i = 0; i < p->lane_count; i++) {
        struct fab_lane_life *life = &p->life[i];
        bool waits = life->state >= FAB_L_OFFERED;
        if (life->state == FAB_L_GONE && p->active && now >= life->retry_at)
            offer(p, i);
        else if (waits && now - life->since > p->engine->config.peer_timeout_ns)
            mark_broken(p, i, "nothing was heard over it", true);
        else if (p->provider->repairs && fab_lane_works(p, i) && another_works(p, i))
            watch_silence(p, i);
    }
}

bool fab_lanes_have_business(const struct fab_peer *p)
{
    if (p->lanes_broken)
        return true;
    for (uint32_t i = 0; i < p->lane_count; i++) {
        const struct fab_lane_life *life = &p->life[i];
        if (life->state >= FAB_L_OFFERED ||
            (life->state == FAB_L_GONE && p->active && life->tries < FAB_LANE_TRIES))
            return true;
    }
    return false;
}

bool fab_lanes_closing(const struct fab_peer *p)
{
    for (uint32_t i = 0; i < p->lane_count; i++)
        if (p->lanes[i] && p->life[i].state == FAB_L_BROKEN)
            return true;
    return false;
}

static void is_up(struct fab_peer *p, uint32_t i)
{
    bool again = p->life[i].serial;
    turns(p, i, FAB_L_UP, again ? FAB_LOG_WARN : FAB_LOG_INFO, again ? "restored" : "");
    p->life[i].since = p->engine->now;
    fab_peer_busy(p);
    p->engine->stats.lanes_restored += again;
    p->counts[i].restored += again;
}

void fab_lanes_heard(struct fab_peer *p, const struct fab_lane *lane)
{
    uint32_t i = index_of(p, lane);
    if (i == FAB_MAX_LANES)
        return;
    uint32_t state = p->life[i].state;
    p->life[i].silence = 0;
    if (state == FAB_L_PROVING || state == FAB_L_ANSWERED)
        is_up(p, i);
    if (state == FAB_L_ANSWERED)
        due(p, &p->life[i].due_ready);
}

void fab_lane_alive(struct fab_lane *lane)
{
    struct fab_peer *p = fab_lane_peer(lane);
    uint32_t i = index_of(p, lane);
    if (i != FAB_MAX_LANES)
        p->life[i].silence = 0;
}

/* ---- frames ---- */

/* The lane that a frame names, or FAB_MAX_LANES: malformed, or about what was before. */
static uint32_t read_pair(struct fab_peer *p, struct fab_reader *r, uint32_t *serial)
{
    uint32_t i = fab_get_u32(r);
    *serial = fab_get_u32(r);
    r->bad |= i >= p->lane_count;
    return r->bad ? FAB_MAX_LANES : i;
}

static uint32_t read_blob(struct fab_peer *p, struct fab_reader *r, uint32_t *serial,
                          uint8_t blob[FAB_BLOB_MAX], uint32_t *length)
{
    uint32_t i = read_pair(p, r, serial);
    *length = fab_get_u32(r);
    fab_get(r, blob, FAB_BLOB_MAX);
    r->bad |= *length > FAB_BLOB_MAX;
    return r->bad ? FAB_MAX_LANES : i;
}

void fab_lanes_on_down(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t serial, i = read_pair(p, r, &serial);
    if (i == FAB_MAX_LANES || serial != p->life[i].serial || !p->lanes[i])
        return;
    if (another_works(p, i))
        mark_broken(p, i, "the peer lost it", false);
    else
        fab_session_doom(p, FAB_E_UNREACHABLE, "the peer lost the last lane");
}

/* Answers an offer. A half that we still hold belongs to a lane that the peer has lost: it goes
 * first, and the peer offers again. */
void fab_lanes_on_open(struct fab_peer *p, struct fab_reader *r)
{
    uint8_t blob[FAB_BLOB_MAX];
    uint32_t serial, length, i = read_blob(p, r, &serial, blob, &length);
    if (i == FAB_MAX_LANES || p->active || (int32_t)(serial - p->life[i].serial) <= 0)
        return;
    if (p->life[i].state != FAB_L_GONE) {
        if (another_works(p, i))
            mark_broken(p, i, "the peer opens it again", false);
        return;
    }
    if (p->engine->now - p->life[i].since < FAB_LANE_RETRY_NS / 2)
        return; /* more often than any peer of ours does */
    if (!p->engine->nics[p->life[i].nic]->info.up || !open_half(p, i))
        return;
    p->life[i].serial = serial;
    turns(p, i, FAB_L_ANSWERED, FAB_LOG_DEBUG, "");
    if (p->provider->lane_connect(p->lanes[i], blob, length))
        mark_broken(p, i, fab_take_reason(-EPROTO), true);
    else
        due(p, &p->life[i].due_opened);
}

void fab_lanes_on_opened(struct fab_peer *p, struct fab_reader *r)
{
    uint8_t blob[FAB_BLOB_MAX];
    uint32_t serial, length, i = read_blob(p, r, &serial, blob, &length);
    if (i == FAB_MAX_LANES || serial != p->life[i].serial || p->life[i].state != FAB_L_OFFERED)
        return;
    if (p->provider->lane_connect(p->lanes[i], blob, length)) {
        mark_broken(p, i, fab_take_reason(-EPROTO), true);
        return;
    }
    turns(p, i, FAB_L_PROVING, FAB_LOG_DEBUG, "");
    due(p, &p->life[i].due_ready);
}

/* Hearing it was the point (fab_lanes_heard). */
void fab_lanes_on_ready(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t serial;
    (void)read_pair(p, r, &serial);
}

/* The peer's NIC is back: now is the time to try. What it was offered while its NIC was down it did not
 * take. */
void fab_lanes_on_wanted(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t serial, i = read_pair(p, r, &serial);
    if (i == FAB_MAX_LANES || !p->active)
        return;
    struct fab_lane_life *life = &p->life[i];
    if (life->state == FAB_L_GONE) {
        life->tries = 0;
        offer(p, i);
    } else if (life->state == FAB_L_OFFERED) {
        due(p, &life->due_open);
    }
}

void fab_lanes_on_probe(struct fab_peer *p, struct fab_reader *r)
{
    uint32_t serial, i = read_pair(p, r, &serial);
    if (i != FAB_MAX_LANES && serial == p->life[i].serial && fab_lane_works(p, i))
        due(p, &p->life[i].due_ready);
}
