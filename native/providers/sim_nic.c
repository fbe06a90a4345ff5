/* Simulated NICs and lanes: the vtables. A blob is the NIC's number (4 bytes), the lane's (4; 0: none),
 * and 4 that the world's seed gives, so that addresses of other worlds are told apart. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/sim.h"

static struct sim_nic *nic_of(struct fab_nic *base)
{
    return (struct sim_nic *)base;
}

static struct sim_lane *lane_of(struct fab_lane *base)
{
    return (struct sim_lane *)base;
}

/* ---- NICs ---- */

static int no_world(void)
{
    fab_fail_text("no simulated world is open in this process: fabric.sim.World opens one");
    return -ENODEV;
}

static void describe(fab_nic_info *info, const char *name)
{
    memset(info, 0, sizeof *info);
    info->kind = FAB_KIND_SIM;
    (void)snprintf(info->provider, sizeof info->provider, "sim");
    (void)snprintf(info->name, sizeof info->name, "%s", name);
    info->max_write = SIM_MAX_WRITE;
    info->speed_bps = 100000000000u;
    info->ordered = sim_ordered();
    info->up = 1;
}

static int sim_list(fab_nic_info *out, uint32_t max)
{
    if (!sim_world)
        return no_world();
    if (max)
        describe(out, "sim");
    return max ? 1 : 0;
}

static void make_blob(uint32_t nic, uint32_t lane, uint8_t *blob, uint32_t *length)
{
    uint32_t words[3] = {nic, lane, (uint32_t)sim_world->config.seed};

    memcpy(blob, words, SIM_BLOB_BYTES);
    *length = SIM_BLOB_BYTES;
}

static bool read_blob(const uint8_t *blob, uint32_t length, uint32_t *nic, uint32_t *lane)
{
    uint32_t words[3];

    if (length != SIM_BLOB_BYTES)
        return false;
    memcpy(words, blob, SIM_BLOB_BYTES);
    *nic = words[0];
    *lane = words[1];
    return words[2] == (uint32_t)sim_world->config.seed && words[0] && words[0] <= SIM_NICS;
}

static bool name_is_free(const char *name)
{
    for (uint32_t i = 0; i < sim_world->nic_count; i++)
        if (sim_world->nics[i] && !strcmp(sim_world->nics[i]->base.info.name, name))
            return false;
    return true;
}

static int nic_open(const struct fab_provider *provider, const struct fab_nic_options *options,
                    struct fab_nic **out)
{
    char name[FAB_NAME_MAX];

    if (!sim_world)
        return no_world();
    if (sim_world->nic_count == SIM_NICS) {
        fab_fail_text("a simulated world has at most %d NICs, ever", SIM_NICS);
        return -ENOSPC;
    }
    (void)snprintf(name, sizeof name, "sim%u", sim_world->nic_count);
    if (options->name)
        (void)snprintf(name, sizeof name, "%s", options->name);
    if (!name_is_free(name)) {
        fab_fail_text("there is a simulated NIC called '%s' already", name);
        return -EEXIST;
    }
    struct sim_nic *nic = calloc(1, sizeof *nic);
    if (!nic)
        return -ENOMEM;
    nic->base = (struct fab_nic){.provider = provider,
                                 .sink = options->sink,
                                 .engine = options->engine,
                                 .index = options->index,
                                 .wait_fd = -1,
                                 .fences = sim_world->config.flavour != FAB_SIM_KEYS};
    describe(&nic->base.info, name);
    nic->turn = options->turn;
    nic->state = FAB_SIM_UP;
    nic->state_told = true;
    sim_world->nics[sim_world->nic_count++] = nic;
    nic->id = sim_world->nic_count;
    make_blob(nic->id, 0, nic->base.info.blob, &nic->base.info.blob_len);
    sim_note("NIC %u is %s", nic->id, name);
    *out = &nic->base;
    return 0;
}

static const struct fab_provider *flavour(void);

static int sim_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    return nic_open(sim_world ? flavour() : NULL, options, out);
}

static void drop_items(struct sim_nic *nic, uint32_t lane)
{
    struct sim_item *list = nic->head, *next;

    nic->head = nic->tail = NULL;
    for (; list; list = next) {
        next = list->next;
        if (lane && list->lane != lane)
            sim_item_give(nic, list);
        else
            free(list);
    }
}

static void sim_nic_close(struct fab_nic *base)
{
    struct sim_nic *nic = nic_of(base);

    for (uint32_t i = 0; i < sim_world->lane_count; i++) { /* those that could not be closed */
        struct sim_lane *lane = sim_world->lanes[i];
        if (!lane || lane->nic != nic)
            continue;
        sim_events_forget(lane);
        sim_world->lanes[i] = NULL;
        free(lane);
    }
    drop_items(nic, 0);
    sim_world->nics[nic->id - 1] = NULL;
    sim_note("NIC %u is closed", nic->id);
    free(nic);
}

/* ---- memory ---- */

static int sim_mr_reg(struct fab_nic *base, const struct fab_memory *memory, struct fab_mr **out,
                      fab_key *key)
{
    int rc = sim_grow((void **)&sim_world->keys, &sim_world->key_slots, sim_world->key_count,
                      sizeof *sim_world->keys, SIM_KEYS);
    struct sim_mr *mr = rc ? NULL : calloc(1, sizeof *mr);

    if (!mr)
        return rc ? rc : -ENOMEM;
    if (memory->kind != FAB_MEM_HOST) {
        free(mr);
        return -ENOTSUP;
    }
    sim_world->keys[sim_world->key_count++] = mr;
    mr->nic = nic_of(base);
    mr->base = memory->base;
    mr->length = memory->length;
    mr->remote = base->fences || memory->remote;
    mr->rkey = sim_chance(UINT32_MAX) << 32 | sim_world->key_count;
    *key = (fab_key){.addr = (uint64_t)(uintptr_t)memory->base, .rkey = mr->rkey};
    *out = (struct fab_mr *)mr;
    return 0;
}

static int sim_mr_dereg(struct fab_nic *base, struct fab_mr *opaque)
{
    struct sim_mr *mr = (struct sim_mr *)opaque;

    (void)base;
    if (sim_happens(sim_world->config.stuck_regions))
        return -EBUSY;
    sim_world->keys[(uint32_t)mr->rkey - 1] = NULL;
    free(mr);
    return 0;
}

/* ---- lanes ---- */

static int sim_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out)
{
    int rc = sim_grow((void **)&sim_world->lanes, &sim_world->lane_slots, sim_world->lane_count,
                      sizeof *sim_world->lanes, SIM_LANES);
    struct sim_lane *lane = rc ? NULL : calloc(1, sizeof *lane);

    (void)origin; /* always NULL */
    if (!lane)
        return rc ? rc : -ENOMEM;
    sim_world->lanes[sim_world->lane_count++] = lane;
    lane->id = sim_world->lane_count;
    lane->nic = nic_of(base);
    lane->base.nic = base;
    lane->base.window = SIM_WINDOW;
    lane->slow = sim_happens(sim_world->config.slow_lanes) ? SIM_SLOW : 1;
    make_blob(lane->nic->id, lane->id, lane->base.blob, &lane->base.blob_len);
    *out = &lane->base;
    return 0;
}

static int sim_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length)
{
    struct sim_lane *lane = lane_of(base);
    uint32_t nic, peer;

    if (lane->down)
        return -ENOTCONN;
    if (!read_blob(blob, length, &nic, &peer))
        return -EINVAL;
    lane->peer_nic = nic;
    lane->peer_lane = peer;
    lane->pointed = true;
    return 0;
}

/* All that is under way is reported; some of it has left. */
static void flush_writes(struct sim_lane *lane)
{
    uint32_t n = lane->writes_out;
    struct sim_wr writes[SIM_WINDOW];

    memcpy(writes, lane->writes, n * sizeof *writes);
    sim_events_orphan(lane);
    lane->writes_out = lane->frames_out = 0;
    for (uint32_t i = 0; i < n; i++)
        lane->nic->base.sink->completed(&lane->base, writes[i].wr_id, -ECANCELED);
}

static void go_down(struct sim_lane *lane, int status)
{
    if (lane->down)
        return;
    lane->down = true;
    (void)snprintf(lane->reason, sizeof lane->reason, "sim %.40s: %s", lane->nic->base.info.name,
                   strerror(-status));
    sim_note("lane %u is down: %s", lane->id, strerror(-status));
    if (lane->nic->base.fences)
        flush_writes(lane);
    if (!lane->closing)
        lane->nic->base.sink->lane_down(&lane->base, status, lane->reason);
}

static void take_answer(struct sim_lane *lane, uint64_t wr_id, int status)
{
    uint32_t i = 0;

    while (i < lane->writes_out && lane->writes[i].wr_id != wr_id)
        i++;
    if (i < lane->writes_out) {
        memmove(lane->writes + i, lane->writes + i + 1,
                (--lane->writes_out - i) * sizeof *lane->writes);
        lane->nic->base.sink->completed(&lane->base, wr_id, status);
    }
    if (status)
        go_down(lane, status);
}

static void lose_frame(struct sim_lane *lane, const struct sim_item *item)
{
    const struct sim_nic *nic = lane->nic;

    if (nic->base.provider->repairs)
        nic->base.sink->frame_lost(&lane->base, item->bytes, item->length);
    go_down(lane, -ETIMEDOUT);
}

static void handle(struct sim_nic *nic, const struct sim_item *item)
{
    const struct fab_sink *sink = nic->base.sink;
    struct sim_lane *lane = sim_lane_of(item->lane);

    if (item->what == SIM_GOT_HELLO)
        sink->hello(&nic->base, NULL, item->bytes, item->length);
    else if (!lane)
        return;
    else if (item->what == SIM_GOT_IMM)
        sink->imm(&lane->base, item->imm, 1);
    else if (item->what == SIM_GOT_ANSWER)
        take_answer(lane, item->wr_id, item->status);
    else if (item->what == SIM_LOST_FRAME)
        lose_frame(lane, item);
    else if (!lane->closing || sim_ordered())
        sink->frame(&lane->base, item->bytes, item->length, -1);
}

/* What has arrived before the fence counts. */
static void take_items(struct sim_nic *nic, uint32_t lane)
{
    struct sim_item *list = nic->head, *next;

    nic->head = nic->tail = NULL;
    for (; list; list = next) {
        next = list->next;
        if (list->lane != lane) {
            sim_item_give(nic, list);
            continue;
        }
        handle(nic, list);
        free(list);
    }
}

static int sim_lane_close(struct fab_lane *base)
{
    struct sim_lane *lane = lane_of(base);
    struct sim_nic *nic = lane->nic;

    if (!lane->closing) {
        lane->closing = true;
        lane->closes_at = sim_world->now;
        if (sim_happens(sim_world->config.slow_fences))
            lane->closes_at += (int64_t)sim_chance(SIM_FENCE_NS);
    }
    if (sim_world->now < lane->closes_at)
        return -EINPROGRESS;
    if (sim_ordered())
        take_items(nic, lane->id);
    if (!base->nic->fences) {
        if (lane->writes_out)
            return -EINPROGRESS;
        sim_events_orphan(lane);
    } else {
        flush_writes(lane);
    }
    drop_items(nic, lane->id);
    sim_note("lane %u is closed", lane->id);
    sim_world->lanes[lane->id - 1] = NULL;
    free(lane);
    return 0;
}

/* ---- frames ---- */

static int send_bytes(struct sim_event *event, const struct sim_lane *lane, const uint8_t *bytes,
                      uint32_t length)
{
    event->bytes = malloc(length);
    if (!event->bytes) {
        sim_event_free(event);
        return -ENOMEM;
    }
    memcpy(event->bytes, bytes, length);
    event->length = length;
    sim_event_send(event, lane);
    return 0;
}

/* A first frame: lost, doubled (and the copy late), or neither. */
static int send_hello(struct sim_lane *lane, const uint8_t *bytes, uint32_t length)
{
    if (sim_happens(sim_world->config.lost_contacts))
        return 0;
    int copies = sim_happens(sim_world->config.double_contacts) ? 2 : 1;
    int rc = 0;
    for (int i = 0; i < copies && !rc; i++) {
        struct sim_event *event = sim_event_new(SIM_HELLO, lane);
        if (!event)
            return -EAGAIN;
        event->from_lane = 0; /* nobody follows it */
        event->late = i ? (int64_t)sim_chance(SIM_LATE_NS) : 0;
        rc = send_bytes(event, lane, bytes, length);
    }
    return rc;
}

static int sim_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                         const struct fab_mr *attach)
{
    struct sim_lane *lane = lane_of(base);

    (void)attach; /* a key says all */
    if (!lane->pointed)
        return -ENOTCONN;
    if (!lane->peer_lane)
        return send_hello(lane, bytes, length);
    if (lane->down)
        return -ENOTCONN;
    if (lane->frames_out == SIM_FRAMES)
        return -EAGAIN;
    struct sim_event *event = sim_event_new(SIM_FRAME, lane);
    if (!event)
        return -EAGAIN;
    int rc = send_bytes(event, lane, bytes, length);
    if (rc == 0)
        lane->frames_out++;
    return rc;
}

static int sim_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                            uint32_t blob_len, const uint8_t *bytes, uint32_t length)
{
    uint32_t nic, lane;

    (void)origin;
    if (!read_blob(blob, blob_len, &nic, &lane))
        return -EINVAL;
    struct sim_event *event = sim_event_new(SIM_FRAME, NULL);
    if (!event)
        return -EAGAIN;
    event->from_nic = nic_of(base)->id;
    event->to_nic = nic;
    event->to_lane = lane;
    event->tries = SIM_TRIES; /* nobody tries again */
    return send_bytes(event, NULL, bytes, length);
}

static void sim_origin_drop(struct fab_nic *base, struct fab_origin *origin)
{
    (void)base;
    (void)origin;
}

/* ---- work ---- */

static enum sim_fate fate(void)
{
    if (sim_happens(sim_world->config.lost_writes))
        return SIM_LOST;
    return sim_happens(sim_world->config.lost_answers) ? SIM_UNANSWERED : SIM_WELL;
}

static int sim_post(struct fab_lane *base, const struct fab_wr *wrs, int n)
{
    struct sim_lane *lane = lane_of(base);
    int taken = 0;

    if (lane->down)
        return -ENOTCONN;
    if (!lane->pointed || !lane->peer_lane)
        return 0;
    for (; taken < n && lane->writes_out < SIM_WINDOW; taken++) {
        struct sim_event *event = sim_event_new(SIM_WRITE, lane);
        if (!event)
            break;
        event->wr = wrs[taken];
        event->fate = fate();
        lane->writes[lane->writes_out++] = (struct sim_wr){wrs[taken].wr_id, event};
        sim_event_send(event, lane);
    }
    return taken;
}

static int tell_state(struct sim_nic *nic)
{
    if (nic->state_told)
        return 0;
    nic->state_told = true;
    nic->base.info.up = nic->state != FAB_SIM_DOWN;
    nic->base.sink->nic_state(&nic->base, nic->base.info.up ? "it is up again" : "it went down");
    return 1;
}

static int sim_poll(struct fab_nic *base, int budget)
{
    struct sim_nic *nic = nic_of(base);
    int done = tell_state(nic);

    for (; nic->head && done < budget; done++) {
        struct sim_item *item = nic->head;
        nic->head = item->next;
        if (!nic->head)
            nic->tail = NULL;
        handle(nic, item);
        free(item);
    }
    return done;
}

static int sim_arm(struct fab_nic *base)
{
    return nic_of(base)->head != NULL;
}

static void sim_nothing(struct fab_nic *base)
{
    (void)base;
}

static int sim_step(int64_t until)
{
    return fab_sim_step(until);
}

#define SIM_SHARED                                                                                \
    .name = "sim", .kind = FAB_KIND_SIM, .list = sim_list, .nic_open = sim_nic_open,              \
    .nic_close = sim_nic_close, .mr_reg = sim_mr_reg, .mr_dereg = sim_mr_dereg,                   \
    .lane_open = sim_lane_open, .lane_connect = sim_lane_connect, .lane_close = sim_lane_close,   \
    .lane_send = sim_lane_send, .origin_reply = sim_origin_reply, .origin_drop = sim_origin_drop, \
    .post = sim_post, .poll = sim_poll, .arm = sim_arm, .disarm = sim_nothing,                    \
    .after_fork = sim_nothing, .step = sim_step

const struct fab_provider fab_provider_sim = {SIM_SHARED};

static const struct fab_provider ordered = {SIM_SHARED, .repairs = true};

static const struct fab_provider *flavour(void)
{
    return sim_ordered() ? &ordered : &fab_provider_sim;
}
