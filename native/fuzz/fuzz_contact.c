/* What a stranger may send: first frames with any body, alone or beside a session, to an engine with a
 * shared secret or without one. Half of them name the right engines, so that the rest is looked at.
 */
#include "core/sink.h"
#include "fuzz.h"

static void deliver(struct fuzz_pair *p, uint8_t nic, const struct fab_writer *w)
{
    fab_lock(p->b);
    p->b->now = fab_now();
    fab_core_sink.hello(p->b->nics[nic & 1], NULL, w->bytes, w->used);
    fab_serve(p->b);
    fab_unlock(p->b);
}

static void give_any(struct fuzz_pair *p, struct fuzz_input *in)
{
    uint8_t nic = fuzz_u8(in), how = fuzz_u8(in), body[1024];
    uint16_t length = fuzz_u16(in) % sizeof body;
    struct fab_writer w;
    fuzz_eat(in, body, length);
    if (how & 1 && length >= 2 * FAB_ENGINE_ID_BYTES)
        memcpy(body + FAB_ENGINE_ID_BYTES, p->b->id, FAB_ENGINE_ID_BYTES);
    if (how & 2 && length >= 2 * FAB_ENGINE_ID_BYTES)
        memcpy(body, p->a->id, FAB_ENGINE_ID_BYTES);
    fab_frame_begin(&w, how & 4 ? FAB_F_HELLO : (enum fab_frame_type)(how >> 3), fuzz_u8(in));
    fab_put(&w, body, length);
    fab_frame_end(&w);
    deliver(p, nic, &w);
}

/* A HELLO that is right in every field, with one part of it replaced. */
static void give_good(struct fuzz_pair *p, struct fuzz_input *in)
{
    struct fab_hello h = {.session = fuzz_u8(in),
                          .answers = fuzz_u8(in),
                          .kind = FAB_KIND_SIM,
                          .nic_count = 1 + fuzz_u8(in) % 3,
                          .lane_count = fuzz_u8(in) % (FAB_MAX_LANES + 1),
                          .fragments = FAB_MESSAGE_FRAMES,
                          .contact = fuzz_u8(in) % 4,
                          .peer_timeout = fuzz_u64(in),
                          .fence = fuzz_u8(in)};
    struct fab_writer w;
    memcpy(h.from, p->a->id, sizeof h.from);
    memcpy(h.to, p->b->id, sizeof h.to);
    h.from[0] = (uint8_t)(h.from[0] ^ (fuzz_u8(in) & 3));
    for (uint32_t i = 0; i < h.lane_count; i++) {
        h.lanes[i].from_nic = fuzz_u8(in) % 3;
        h.lanes[i].to_nic = fuzz_u8(in) % 3;
        h.lanes[i].blob_len = fuzz_u8(in) & 1 ? 12 : fuzz_u8(in);
        h.lanes[i].speed = (uint32_t)fuzz_u64(in);
        memcpy(h.lanes[i].blob, p->a->nics[0]->info.blob, 12);
        h.lanes[i].blob[4] = fuzz_u8(in);
    }
    fab_frame_begin(&w, FAB_F_HELLO, 0);
    fab_put_hello(&w, &h);
    fab_put(&w, h.mac, sizeof h.mac);
    fab_frame_end(&w);
    deliver(p, fuzz_u8(in), &w);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    struct fuzz_pair p;
    uint8_t how = fuzz_u8(&in);
    fuzz_open(&p, how, how & 8 ? "a shared secret" : NULL);
    if (how & 16)
        fuzz_meet(&p);
    while (in.left) {
        uint8_t step = fuzz_u8(&in) % 4;
        if (step == 0)
            give_any(&p, &in);
        else if (step == 1)
            give_good(&p, &in);
        else if (step == 2)
            (void)fab_transfer_release(p.b, fab_imm(p.b, &p.to_a, 1, 1, 0, 0));
        else
            fuzz_steps(1 + fuzz_u8(&in) % 8);
    }
    fuzz_close(&p);
    return 0;
}
