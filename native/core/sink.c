/* Where the providers' events enter the core: one line each, to the room that deals with it. */
#include "sink.h"

#include "counter.h"
#include "engine.h"
#include "lanes.h"
#include "memory.h"
#include "post.h"
#include "session.h"

static void on_imm(struct fab_lane *lane, uint32_t imm, uint32_t times)
{
    struct fab_peer *p = fab_lane_peer(lane);
    if (!p || !times)
        return;
    p->last_heard = p->last_sign = p->engine->now;
    fab_lane_alive(lane);
    fab_count(p->engine, p, imm, times);
}

static void on_lane_down(struct fab_lane *lane, int error, const char *text)
{
    struct fab_peer *p = fab_lane_peer(lane);
    (void)error; /* the text says it */
    if (p)
        fab_lane_broke(lane, text);
}

const struct fab_sink fab_core_sink = {
    .imm = on_imm,
    .completed = fab_post_completed,
    .frame = fab_session_frame,
    .hello = fab_session_hello,
    .lane_down = on_lane_down,
    .frame_lost = fab_lane_frame_lost,
    .nic_state = fab_lanes_nic_state,
    .origin_gone = fab_session_origin_gone,
    .destination = fab_memory_destination,
};
