/* Frames of a lane.
 *
 * Towards a NIC, and until the other side is known to be connected, a frame travels as datagrams;
 * after that over the lane's queue pair for frames, from a slot that is held until it is
 * acknowledged: what a broken lane did not get across is handed to the core, which has other lanes.
 * While setup runs one frame waits; towards a NIC the newest, since first frames are sent again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "providers/verbs.h"

#define FRAMES_BYTES ((size_t)VERBS_FRAME_SENDS * FAB_FRAME_MAX)
#define ALL_FREE ((1ull << VERBS_FRAME_SENDS) - 1)
_Static_assert(VERBS_FRAME_SENDS < 64, "frames_free has a bit for each");

static uint8_t *slot_bytes(const struct verbs_lane *lane, uint32_t slot)
{
    return lane->frames + (size_t)slot * FAB_FRAME_MAX;
}

/* A lane that never sends frames (all but a peer's first, mostly) has no memory for them. */
static int open_slots(struct verbs_lane *lane)
{
    struct verbs_nic *nic = verbs_nic_of(lane);
    size_t size = FRAMES_BYTES;

    /* Whole pages of its own: before Linux 5.12 a forked child loses what is registered. */
    lane->frames = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (lane->frames == MAP_FAILED) {
        lane->frames = NULL;
        return -ENOMEM;
    }
    lane->frames_mr = nic->lib->reg_mr_iova2(nic->pd, lane->frames, size, (uintptr_t)lane->frames,
                                             IBV_ACCESS_LOCAL_WRITE);
    if (lane->frames_mr) {
        lane->frames_free = ALL_FREE;
        return 0;
    }
    int rc = verbs_fail(nic, "pinning memory for frames (see ulimit -l)", errno);
    (void)munmap(lane->frames, size);
    lane->frames = NULL;
    return rc;
}

static int send_connected(struct verbs_lane *lane, const uint8_t *bytes, uint32_t length)
{
    struct verbs_nic *nic = verbs_nic_of(lane);
    int rc = lane->frames ? 0 : open_slots(lane);

    if (rc)
        return rc;
    if (!lane->frames_free)
        return -EAGAIN;
    uint32_t slot = (uint32_t)__builtin_ctzll(lane->frames_free);
    struct ibv_sge sge = {
        .addr = (uintptr_t)slot_bytes(lane, slot), .length = length, .lkey = lane->frames_mr->lkey};
    struct ibv_send_wr wr = {.wr_id =
                                 (uint64_t)lane->index << 40 | (uint64_t)slot << 8 | VERBS_SEND,
                             .sg_list = &sge,
                             .num_sge = 1,
                             .opcode = IBV_WR_SEND,
                             .send_flags = IBV_SEND_SIGNALED};
    struct ibv_send_wr *bad;
    memcpy(slot_bytes(lane, slot), bytes, length);
    lane->frame_lengths[slot] = length;
    rc = ibv_post_send(lane->frame_qp, &wr, &bad);
    if (rc)
        return verbs_fail(nic, "sending a frame", rc);
    lane->frames_free &= ~(1ull << slot);
    return 0;
}

static int keep_waiting(struct verbs_lane *lane, const uint8_t *bytes, uint32_t length)
{
    if (lane->waiting_length && lane->peer.token)
        return -EAGAIN;
    if (!lane->waiting)
        lane->waiting = malloc(FAB_FRAME_MAX);
    if (!lane->waiting)
        return -ENOMEM;
    memcpy(lane->waiting, bytes, length);
    lane->waiting_length = length;
    return 0;
}

int verbs_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                    const struct fab_mr *attach)
{
    struct verbs_lane *lane = (struct verbs_lane *)base;

    (void)attach; /* a key says all that a peer needs */
    if (length > FAB_FRAME_MAX)
        return -EMSGSIZE;
    if (lane->down)
        return -ENOTCONN;
    if (!lane->pointed || (lane->base.established && !lane->connected))
        return keep_waiting(lane, bytes, length);
    if (lane->base.established && lane->connected)
        return send_connected(lane, bytes, length);
    return verbs_contact_send(verbs_nic_of(lane), &lane->way, bytes, length);
}

/* What waited and cannot be sent is the core's to send again, if it was of a session; a first frame
 * that finds no buffer is as one that the network lost. */
void verbs_lane_flush(struct verbs_lane *lane)
{
    const struct fab_sink *sink = lane->base.nic->sink;
    uint32_t length = lane->waiting_length;

    lane->waiting_length = 0;
    if (!length)
        return;
    int rc = lane->down || lane->closing
                 ? -ENOTCONN
                 : verbs_lane_send(&lane->base, lane->waiting, length, NULL);
    if (rc && lane->base.established && sink->frame_lost)
        sink->frame_lost(&lane->base, lane->waiting, length);
}

void verbs_frame_sent(struct verbs_lane *lane, uint32_t slot, bool failed)
{
    const struct fab_sink *sink = lane->base.nic->sink;

    lane->frames_free |= 1ull << slot;
    if (failed && sink->frame_lost)
        sink->frame_lost(&lane->base, slot_bytes(lane, slot), lane->frame_lengths[slot]);
}

bool verbs_frames_out(const struct verbs_lane *lane)
{
    return lane->frames && lane->frames_free != ALL_FREE;
}

/* The queue pair is gone: what is still out is lost. */
void verbs_frames_close(struct verbs_lane *lane)
{
    struct verbs_nic *nic = verbs_nic_of(lane);

    verbs_lane_flush(lane);
    free(lane->waiting);
    lane->waiting = NULL;
    if (!lane->frames)
        return;
    for (uint32_t slot = 0; slot < VERBS_FRAME_SENDS; slot++)
        if (!(lane->frames_free >> slot & 1))
            verbs_frame_sent(lane, slot, true);
    (void)nic->lib->dereg_mr(lane->frames_mr);
    (void)munmap(lane->frames, FRAMES_BYTES);
    lane->frames = NULL;
}
