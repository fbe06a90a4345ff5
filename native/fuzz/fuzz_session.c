/* What a peer with which there is a session may send: control frames with any body, over any lane, in
 * any order, between transfers of our own. Each frame is given to the sink that NICs call.
 *
 * The input is a list of steps. Of a frame, header and session number are made right unless the step
 * says otherwise: what gets past them is what this is about.
 */
#include "core/sink.h"
#include "fuzz.h"

enum step {
    FRAME, /* type, lane, body */
    RAW, /* bytes of any kind */
    WRITE, /* with an immediate, from a */
    WRITE_OUT, /* any place and length, which may be refused */
    SEND,
    RECEIVE,
    CANCEL,
    DEREGISTER,
    TIME,
    STEPS
};

static void deliver(fab_engine *e, struct fab_lane *lane, const uint8_t *bytes, uint32_t length)
{
    fab_lock(e);
    e->now = fab_now();
    fab_core_sink.frame(lane, bytes, length, -1);
    fab_serve(e);
    fab_unlock(e);
}

static void give_frame(struct fuzz_pair *p, struct fuzz_input *in)
{
    uint8_t body[FAB_FRAME_MAX - FAB_FRAME_HEADER], choice = fuzz_u8(in);
    fab_engine *to = choice & 1 ? p->a : p->b;
    struct fab_lane *lane = fuzz_lane(to, choice & 1 ? p->b : p->a, choice >> 1 & 1);
    struct fab_peer *peer = fab_peer_find(to, choice & 1 ? p->b->id : p->a->id);
    uint8_t type = fuzz_u8(in);
    uint16_t length = fuzz_u16(in);
    struct fab_writer w;
    if (length > 300) /* most frames are short; long ones are messages */
        length =
            type == FAB_F_MESSAGE ? (uint16_t)(length % (FAB_FRAGMENT_MAX + 16)) : length % 300;
    fuzz_eat(in, body, length);
    if (!lane)
        return;
    fab_frame_begin(&w, (enum fab_frame_type)(type % (FAB_F_LAST + 2)), peer->mine);
    fab_put(&w, body, length);
    fab_frame_end(&w);
    deliver(to, lane, w.bytes, w.used);
}

static void give_raw(struct fuzz_pair *p, struct fuzz_input *in)
{
    uint8_t bytes[256];
    struct fab_lane *lane = fuzz_lane(p->b, p->a, 0);
    uint8_t length = fuzz_u8(in);
    fuzz_eat(in, bytes, length);
    if (lane)
        deliver(p->b, lane, bytes, length);
}

static int64_t work(struct fuzz_pair *p, struct fuzz_input *in, enum step step, int64_t last)
{
    uint8_t bytes[64] = {0}, got[FAB_MAX_MESSAGE];
    uint16_t at, length;
    int64_t from;
    switch (step) {
    case WRITE:
        return fab_write(p->a, p->mine, 0, p->remote, 0, FUZZ_MEMORY, p->id, 0, 0);
    case WRITE_OUT:
        at = fuzz_u16(in);
        length = fuzz_u16(in);
        return fab_write(p->a, p->mine, 0, p->remote, at, length, FAB_NO_IMM, 0, 0);
    case SEND:
        return fab_send(p->a, p->to_b, bytes, fuzz_u8(in) % sizeof bytes, 0);
    case RECEIVE:
        (void)fab_recv(p->b, got, sizeof got, &from, 0);
        break;
    case CANCEL:
        if (last > 0)
            (void)fab_transfer_cancel(p->a, last);
        break;
    case DEREGISTER:
        (void)fab_region_deregister(p->b, p->theirs, 0);
        break;
    default:
        fuzz_steps(1 + fuzz_u8(in) % 8);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    struct fuzz_pair p;
    int64_t last = 0;
    fuzz_open(&p, fuzz_u8(&in), NULL);
    fuzz_meet(&p);
    while (in.left) {
        enum step step = (enum step)(fuzz_u8(&in) % STEPS);
        if (step == FRAME) {
            give_frame(&p, &in);
            continue;
        }
        if (step == RAW) {
            give_raw(&p, &in);
            continue;
        }
        int64_t t = work(&p, &in, step, last);
        if (t <= 0)
            continue;
        if (last > 0)
            (void)fab_transfer_release(p.a, last);
        last = t;
    }
    fuzz_close(&p);
    return 0;
}
