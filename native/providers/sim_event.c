/* What is under way in the simulated world: a heap by time, and what arriving means. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "providers/sim.h"

static bool before(const struct sim_event *one, const struct sim_event *other)
{
    return one->at != other->at ? one->at < other->at : one->serial < other->serial;
}

static void swap(uint32_t one, uint32_t other)
{
    struct sim_event *kept = sim_world->heap[one];

    sim_world->heap[one] = sim_world->heap[other];
    sim_world->heap[other] = kept;
}

static void sift_up(uint32_t at)
{
    for (; at && before(sim_world->heap[at], sim_world->heap[(at - 1) / 2]); at = (at - 1) / 2)
        swap(at, (at - 1) / 2);
}

static void sift_down(uint32_t at)
{
    for (;;) {
        uint32_t least = at;
        for (uint32_t child = 2 * at + 1; child <= 2 * at + 2; child++)
            if (child < sim_world->heap_count &&
                before(sim_world->heap[child], sim_world->heap[least]))
                least = child;
        if (least == at)
            return;
        swap(at, least);
        at = least;
    }
}

static struct sim_event *pop(void)
{
    struct sim_event *first = sim_world->heap[0];

    swap(0, --sim_world->heap_count);
    sift_down(0);
    return first;
}

struct sim_event *sim_event_next(void)
{
    return sim_world->heap_count ? sim_world->heap[0] : NULL;
}

struct sim_event *sim_event_new(enum sim_kind kind, const struct sim_lane *from)
{
    if (sim_grow((void **)&sim_world->heap, &sim_world->heap_slots, sim_world->heap_count,
                 sizeof *sim_world->heap, SIM_EVENTS))
        return NULL;
    struct sim_event *event = calloc(1, sizeof *event);
    if (!event)
        return NULL;
    event->kind = kind;
    if (from) {
        event->from_nic = from->nic->id;
        event->from_lane = from->id;
        event->to_nic = from->peer_nic;
        event->to_lane = from->peer_lane;
    }
    return event;
}

void sim_event_free(struct sim_event *event)
{
    free(event->bytes);
    free(event);
}

static int64_t delay(const struct sim_lane *lane)
{
    const fab_sim_config *c = &sim_world->config;
    int64_t ns = c->delay_ns + (int64_t)sim_chance((uint64_t)c->jitter_ns + 1);

    return ns * (lane ? lane->slow : 1);
}

static void put(struct sim_event *event, int64_t at)
{
    event->at = at;
    event->serial = ++sim_world->serial;
    /* sim_event_new() made room, and whoever reschedules has just taken one out. */
    sim_world->heap[sim_world->heap_count++] = event;
    sift_up(sim_world->heap_count - 1);
}

void sim_event_send(struct sim_event *event, const struct sim_lane *lane)
{
    struct sim_lane *ordered = (struct sim_lane *)lane;
    int64_t at = sim_world->now + event->late + delay(lane);

    if (lane && sim_ordered() && event->kind != SIM_HELLO) {
        if (at < ordered->last)
            at = ordered->last;
        ordered->last = at;
    }
    put(event, at);
}

void sim_item_give(struct sim_nic *nic, struct sim_item *item)
{
    item->next = NULL;
    if (nic->tail)
        nic->tail->next = item;
    else
        nic->head = item;
    nic->tail = item;
}

/* ---- arrivals ---- */

static struct sim_item *item_new(enum sim_news what, uint32_t lane, uint32_t length)
{
    struct sim_item *item = calloc(1, sizeof *item + length);

    if (!item)
        abort(); /* a simulation that loses an event proves nothing */
    item->what = what;
    item->lane = lane;
    item->length = length;
    return item;
}

static void forget_write(struct sim_lane *lane, const struct sim_event *event)
{
    for (uint32_t i = 0; i < lane->writes_out; i++)
        if (lane->writes[i].event == event)
            lane->writes[i].event = NULL;
}

static void answer(const struct sim_event *event, int status, int64_t after)
{
    const struct sim_lane *lane = sim_lane_of(event->from_lane);
    struct sim_event *back = lane ? sim_event_new(SIM_ANSWER, NULL) : NULL;

    if (!back)
        return; /* nobody asks for it any more */
    back->from_nic = event->to_nic;
    back->to_nic = event->from_nic;
    back->to_lane = event->from_lane;
    back->wr = event->wr;
    back->status = status;
    put(back, sim_world->now + after + delay(lane));
}

/* Places the bytes. 0, or why not. */
static int place(const struct sim_event *event)
{
    const struct sim_lane *to = sim_lane_of(event->to_lane);
    const struct fab_wr *wr = &event->wr;
    const struct sim_mr *mr = sim_mr_of(wr->rkey);

    /* Where endpoints are shared, a key is all that a write needs. */
    if (sim_world->config.flavour != FAB_SIM_KEYS && (!to || to->down))
        return -ECONNRESET;
    if (wr->length == 0 && !wr->rkey)
        return 0;
    if (!mr || mr->nic->id != event->to_nic || !mr->remote)
        return -EACCES;
    uint64_t offset = wr->addr - (uint64_t)(uintptr_t)mr->base;
    if (offset > mr->length || wr->length > mr->length - offset)
        return -EACCES;
    if (wr->length)
        memcpy(mr->base + offset, event->bytes ? event->bytes : wr->src, wr->length);
    return 0;
}

/* A lane that keeps order takes nothing behind what it did not take. */
static int place_in_order(const struct sim_event *event, int status)
{
    struct sim_lane *to = sim_ordered() ? sim_lane_of(event->to_lane) : NULL;

    if (to && to->gap)
        return -ETIMEDOUT;
    if (!status)
        status = place(event);
    if (to && status)
        to->gap = true;
    return status;
}

static void write_arrives(const struct sim_event *event)
{
    struct sim_lane *from = sim_lane_of(event->from_lane);
    bool reaches = sim_reaches(event->from_nic, event->to_nic);
    int64_t after = reaches ? 0 : SIM_RETRY_NS;
    int status = !reaches ? -ETIMEDOUT : event->fate == SIM_LOST ? -EIO : 0;

    if (from)
        forget_write(from, event);
    status = place_in_order(event, status);
    sim_note("write %u->%u wr %llx %llu bytes imm %x: %s", event->from_lane, event->to_lane,
             (unsigned long long)event->wr.wr_id, (unsigned long long)event->wr.length,
             event->wr.flags & FAB_WR_IMM ? event->wr.imm : 0,
             status ? strerror(-status) : "landed");
    if (status == 0 && event->wr.flags & FAB_WR_IMM) {
        struct sim_item *item = item_new(SIM_GOT_IMM, event->to_lane, 0);
        item->imm = event->wr.imm;
        sim_item_give(sim_nic_of(event->to_nic), item);
    }
    answer(event, status == 0 && event->fate == SIM_UNANSWERED ? -ETIMEDOUT : status, after);
}

static void answer_arrives(const struct sim_event *event)
{
    struct sim_nic *nic = sim_nic_of(event->to_nic);

    if (!nic || !sim_lane_of(event->to_lane))
        return;
    struct sim_item *item = item_new(SIM_GOT_ANSWER, event->to_lane, 0);
    item->wr_id = event->wr.wr_id;
    item->status = event->status;
    sim_item_give(nic, item);
}

/* True: it is on its way again. */
static bool frame_arrives(struct sim_event *event)
{
    struct sim_nic *nic = sim_nic_of(event->to_nic);
    bool reaches = sim_reaches(event->from_nic, event->to_nic);
    struct sim_lane *from = sim_lane_of(event->from_lane);

    if (event->kind == SIM_FRAME && sim_world->config.flavour != FAB_SIM_KEYS)
        reaches &= sim_lane_of(event->to_lane) != NULL;
    if (!reaches && event->kind == SIM_FRAME && ++event->tries < SIM_TRIES) {
        put(event, sim_world->now + SIM_RETRY_NS);
        return true;
    }
    if (from)
        from->frames_out--;
    if (!reaches && event->kind == SIM_FRAME && from) {
        struct sim_item *item = item_new(SIM_LOST_FRAME, from->id, event->length);
        memcpy(item->bytes, event->bytes, event->length);
        sim_item_give(from->nic, item);
    }
    sim_note("%s %u->%u %u bytes: %s", event->kind == SIM_HELLO ? "hello" : "frame",
             event->from_lane, event->to_lane, event->length, reaches ? "arrived" : "lost");
    if (!reaches)
        return false;
    struct sim_item *item = item_new(event->kind == SIM_HELLO ? SIM_GOT_HELLO : SIM_GOT_FRAME,
                                     event->to_lane, event->length);
    memcpy(item->bytes, event->bytes, event->length);
    sim_item_give(nic, item);
    return false;
}

void sim_events_run(void)
{
    while (sim_world->heap_count && sim_world->heap[0]->at <= sim_world->now) {
        struct sim_event *event = pop();
        if (event->kind == SIM_WRITE)
            write_arrives(event);
        else if (event->kind == SIM_ANSWER)
            answer_arrives(event);
        else if (frame_arrives(event))
            continue;
        sim_event_free(event);
    }
}

/* ---- a lane that is gone ---- */

static void orphan_write(struct sim_event *event)
{
    bool left = sim_chance(2); /* the NIC already */

    if (left && event->wr.length) {
        event->bytes = malloc(event->wr.length);
        if (!event->bytes)
            abort();
        memcpy(event->bytes, event->wr.src, event->wr.length);
    }
    if (!left)
        event->fate = SIM_LOST;
}

void sim_events_orphan(struct sim_lane *lane)
{
    const struct fab_sink *sink = lane->nic->base.sink;
    struct sim_event *frames[SIM_FRAMES];
    uint32_t count = 0;

    for (uint32_t i = 0; i < sim_world->heap_count; i++) {
        struct sim_event *event = sim_world->heap[i];
        if (event->from_lane != lane->id)
            continue;
        event->from_lane = 0;
        if (event->kind == SIM_WRITE)
            orphan_write(event);
        else if (event->kind == SIM_FRAME)
            frames[count++] = event;
    }
    /* Sinks may send, which adds to the heap. */
    for (uint32_t i = 0; i < count && lane->nic->base.provider->repairs; i++) {
        if (sim_chance(2))
            frames[i]->tries = SIM_TRIES, frames[i]->to_nic = 0;
        sink->frame_lost(&lane->base, frames[i]->bytes, frames[i]->length);
    }
}

void sim_events_forget(const struct sim_lane *lane)
{
    for (uint32_t i = 0; i < sim_world->heap_count; i++) {
        struct sim_event *event = sim_world->heap[i];
        if (event->from_lane != lane->id)
            continue;
        event->from_lane = 0;
        if (event->kind == SIM_WRITE) /* its source may be gone */
            event->fate = SIM_LOST;
    }
}
