/* What a peer with which there is a session may send: control frames with any body, over any lane, in
 * any order, between transfers of our own. Each frame is given to the sink that NICs call.
 *
 * The input is a list of steps. Of a frame, header and session number are made right unless the step
 * says otherwise: what gets past them is what this is about.
 */
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
    FITTING, /* a frame with the numbers that its receiver waits for, or nearly */
    NIC, /* of b goes down, or is back */
    ASK, /* for a region, with a secret that may be wrong */
    STEPS
};

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
    fuzz_deliver(to, lane, w.bytes, w.used);
}

static void put_fragment(struct fuzz_input *in, const struct fab_peer *peer, struct fab_writer *w)
{
    uint8_t bytes[FAB_FRAGMENT_MAX] = {0}, how = fuzz_u8(in);
    uint32_t total = fuzz_u16(in), at = how & 1 ? fuzz_u16(in) : peer->rx_filled;
    uint32_t length = how & 2 ? fuzz_u16(in) % (sizeof bytes + 1) : total - at;
    if (peer->rx_partial && !(how & 4))
        total = peer->rx_partial->length;
    if (!(how & 2) && total - at < sizeof bytes)
        length = total - at;
    if (how & 16)
        length = sizeof bytes; /* as of one that is not the last */
    fab_put_u32(w, peer->rx_next + (how & 8 ? fuzz_u8(in) % 20 : 0));
    fab_put_u32(w, total);
    fab_put_u32(w, at);
    fab_put(w, bytes, length < sizeof bytes ? length : sizeof bytes);
}

static void put_grant(struct fuzz_input *in, const struct fab_peer *peer, struct fab_writer *w)
{
    const struct fab_grant *g = peer->grants;
    uint8_t how = fuzz_u8(in), count = how & 1 ? fuzz_u8(in) % (FAB_MAX_NICS + 2) : how & 2;
    while (g && g->state != FAB_G_ASKED)
        g = g->next;
    fab_put_u64(w, g ? g->region : 1);
    fab_put_u64(w, g ? g->secret : 1);
    fab_put_u32(w, g && !(how & 64) ? g->asked : 0);
    fab_put_u32(w, how & 4 ? fuzz_u32(in) : 0);
    fab_put_u32(w, how & 8);
    fab_put_u64(w, how & 16 ? fuzz_u64(in) : FUZZ_MEMORY);
    fab_put_u32(w, how & 32 ? fuzz_u32(in) : count);
    for (uint32_t i = 0; i < 2u * count; i++)
        fab_put_u64(w, fuzz_u64(in));
}

static void put_lane(struct fuzz_input *in, const fab_engine *from, const struct fab_peer *peer,
                     bool blob, struct fab_writer *w)
{
    uint8_t how = fuzz_u8(in), bytes[FAB_BLOB_MAX] = {0};
    uint32_t lane = how & 1;
    memcpy(bytes, from->nics[lane]->info.blob, sizeof bytes);
    bytes[4] = fuzz_u8(in); /* the simulated lane's number */
    fab_put_u32(w, lane);
    fab_put_u32(w, peer->life[lane].serial + (how >> 1 & 3) - 1);
    if (!blob)
        return;
    fab_put_u32(w, how & 8 ? fuzz_u8(in) : from->nics[lane]->info.blob_len);
    fab_put(w, bytes, sizeof bytes);
}

static void put_void(struct fuzz_input *in, const struct fuzz_pair *p, const struct fab_peer *peer,
                     struct fab_writer *w)
{
    uint32_t count = fuzz_u8(in) % 4;
    fab_put_u32(w, peer->voided_number + fuzz_u8(in) % 4);
    fab_put_u32(w, count);
    for (uint32_t i = 0; i < count; i++)
        fab_put_u32(w, fuzz_u8(in) % 2 ? fuzz_u32(in) : (uint32_t)p->id);
}

static void give_fitting(struct fuzz_pair *p, struct fuzz_input *in)
{
    static const enum fab_frame_type types[] = {
        FAB_F_MESSAGE,     FAB_F_ACK,        FAB_F_VOID,       FAB_F_VOIDED,
        FAB_F_GRANT,       FAB_F_LANE_DOWN,  FAB_F_LANE_OPEN,  FAB_F_LANE_OPENED,
        FAB_F_LANE_WANTED, FAB_F_LANE_PROBE, FAB_F_LANE_READY, FAB_F_MESSAGE};
    uint8_t choice = fuzz_u8(in);
    fab_engine *to = choice & 1 ? p->a : p->b, *from = choice & 1 ? p->b : p->a;
    struct fab_lane *lane = fuzz_lane(to, from, choice >> 1 & 1);
    const struct fab_peer *peer = fab_peer_find(to, from->id);
    enum fab_frame_type type = types[(choice >> 2) % (sizeof types / sizeof *types)];
    struct fab_writer w;
    if (!lane)
        return;
    fab_frame_begin(&w, type, peer->mine);
    if (type == FAB_F_MESSAGE) {
        put_fragment(in, peer, &w);
    } else if (type == FAB_F_ACK) {
        fab_put_u32(&w, peer->tx_next - fuzz_u8(in) % 4);
        fab_put_u32(&w, peer->tx_limit + fuzz_u8(in));
    } else if (type == FAB_F_VOID) {
        put_void(in, p, peer, &w);
    } else if (type == FAB_F_VOIDED) {
        fab_put_u32(&w, peer->void_number - (fuzz_u8(in) & 1));
    } else if (type == FAB_F_GRANT) {
        put_grant(in, peer, &w);
    } else {
        put_lane(in, from, peer, type == FAB_F_LANE_OPEN || type == FAB_F_LANE_OPENED, &w);
    }
    fab_frame_end(&w);
    fuzz_deliver(to, lane, w.bytes, w.used);
}

static void give_raw(struct fuzz_pair *p, struct fuzz_input *in)
{
    uint8_t bytes[256];
    struct fab_lane *lane = fuzz_lane(p->b, p->a, 0);
    uint8_t length = fuzz_u8(in);
    fuzz_eat(in, bytes, length);
    if (lane)
        fuzz_deliver(p->b, lane, bytes, length);
}

static void give(struct fuzz_pair *p, struct fuzz_input *in, enum step step)
{
    if (step == FRAME)
        give_frame(p, in);
    else if (step == FITTING)
        give_fitting(p, in);
    else
        give_raw(p, in);
}

static int64_t ask(struct fuzz_pair *p, struct fuzz_input *in)
{
    fab_descriptor d = fuzz_describe(&p->info);
    d.secret ^= fuzz_u8(in);
    int64_t remote = fab_remote_add(p->a, p->to_b, &d);
    int64_t t = fab_write(p->a, p->mine, 0, remote, 0, 8, FAB_NO_IMM, 0, 0);
    if (remote > 0)
        MUST(!fab_remote_release(p->a, remote));
    return t;
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
    case ASK:
        return ask(p, in);
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
    case NIC:
        MUST(!fab_sim_nic("b1", fuzz_u8(in) % 2 ? FAB_SIM_UP : FAB_SIM_DOWN));
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
    int64_t last = 0, writes = 1;
    fuzz_open(&p, fuzz_u8(&in), NULL, false);
    fuzz_meet(&p);
    while (in.left) {
        enum step step = (enum step)(fuzz_u8(&in) % STEPS);
        if (step == FRAME || step == FITTING || step == RAW) {
            give(&p, &in, step);
            continue;
        }
        int64_t t = work(&p, &in, step, last);
        writes += step == WRITE && t > 0;
        if (t <= 0)
            continue;
        if (last > 0)
            (void)fab_transfer_release(p.a, last);
        last = t;
    }
    MUST(fab_counter_value(p.b, p.counter, 0) <= writes); /* no frame counts */
    fuzz_close(&p);
    return 0;
}
