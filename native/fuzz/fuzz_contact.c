/* What a stranger may send: first frames with any body, alone or beside a session, to an engine with a
 * shared secret or without one. Half of them name the right engines, so that the rest is looked at.
 */
#include "greeting.h"

static void deliver(struct fuzz_pair *p, uint8_t nic, const struct fab_writer *w, bool forged)
{
    uint32_t newcomers = p->b->newcomer_count;
    fab_lock(p->b);
    p->b->now = fab_now();
    fab_core_sink.hello(p->b->nics[nic & 1], NULL, w->bytes, w->used);
    MUST(!forged || !p->b->config.secret_len || p->b->newcomer_count == newcomers);
    fab_serve(p->b);
    fab_unlock(p->b);
    fuzz_sane(p->b);
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
    deliver(p, nic, &w, false);
}

/* A HELLO that is right in every field, with some of them replaced. */
static void give_good(struct fuzz_pair *p, struct fuzz_input *in)
{
    struct fab_writer w;
    bool forged = fuzz_greet(in, p->a, p->b, FAB_F_HELLO, 0, &w);
    deliver(p, fuzz_u8(in), &w, forged);
}

/* The application's word on the next one who waits for it, or on nobody. */
static void say(struct fuzz_pair *p, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    fab_newcomer who = {.token = how & 2 ? fuzz_u8(in) : 0};
    (void)fab_accept_next(p->b, &who, 0);
    MUST(fuzz_prints(who.label));
    (void)fab_accept_reply(p->b, who.token, how & 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    struct fuzz_pair p;
    uint8_t how = fuzz_u8(&in);
    fuzz_open(&p, how, how & 8 ? FUZZ_SECRET : NULL, (how & 48) == 32);
    if (how & 16)
        fuzz_meet(&p);
    while (in.left) {
        uint8_t step = fuzz_u8(&in) % 5;
        if (step == 0)
            give_any(&p, &in);
        else if (step == 1)
            give_good(&p, &in);
        else if (step == 2)
            (void)fab_transfer_release(p.b, fab_imm(p.b, &p.to_a, 1, 1, 0, 0));
        else if (step == 3)
            say(&p, &in);
        else
            fuzz_steps(1 + fuzz_u8(&in) % 8);
    }
    fuzz_close(&p);
    return 0;
}
