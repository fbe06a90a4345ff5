/* What may come back to an engine that connects: CHALLENGE, WELCOME and REFUSE, right or not, HELLOs of
 * the other side beside them, and frames of the session that a WELCOME made. Whoever answers is not an
 * engine: nothing that a says arrives.
 */
#include "greeting.h"

enum step { WELCOME, CHALLENGE, REFUSE, HELLO, FRAME, WRITE, SEND, TIME, STEPS };

/* The other side's engine is there for its id and its addresses only. */
static void cut_off(void)
{
    static const char *const names[] = {"a0", "a1", "b0", "b1"};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++)
            if (i / 2 != k / 2)
                MUST(!fab_sim_cut(names[i], names[k], 1));
}

static struct fab_peer *other(const struct fuzz_pair *p)
{
    return fab_peer_find(p->a, p->b->id);
}

/* A body that begins as an answer to our HELLO does, of any length behind that. */
static void put_answer(struct fuzz_pair *p, struct fuzz_input *in, struct fab_writer *w,
                       enum fab_frame_type type)
{
    uint8_t how = fuzz_u8(in), rest[64];
    uint64_t session = how & 1 ? fuzz_u64(in) : other(p)->mine;
    uint32_t length = type == FAB_F_CHALLENGE ? 16 : 6;
    fab_frame_begin(w, type, 0);
    fab_put(w, p->b->id, sizeof p->b->id);
    fab_put_u64(w, session);
    if (how & 2)
        length = fuzz_u8(in) % sizeof rest;
    fuzz_eat(in, rest, sizeof rest);
    if (type == FAB_F_REFUSE && !(how & 4))
        memset(rest + 4, 0, 2); /* a text of no length */
    fab_put(w, rest, length);
    fab_frame_end(w);
}

static void put_frame(struct fuzz_pair *p, struct fuzz_input *in, struct fab_writer *w)
{
    uint8_t body[256], type = fuzz_u8(in), length = fuzz_u8(in);
    fuzz_eat(in, body, length);
    fab_frame_begin(w, (enum fab_frame_type)(type % (FAB_F_LAST + 2)), other(p)->mine);
    fab_put(w, body, length);
    fab_frame_end(w);
}

static void give(struct fuzz_pair *p, struct fuzz_input *in, enum step step)
{
    struct fab_lane *lane = fuzz_lane(p->a, p->b, fuzz_u8(in) & 1);
    uint32_t before = atomic_load(&other(p)->state);
    struct fab_writer w;
    bool forged = false;
    if (step == HELLO) {
        fuzz_greet(in, p->b, p->a, FAB_F_HELLO, 0, &w);
        fab_lock(p->a);
        p->a->now = fab_now();
        fab_core_sink.hello(p->a->nics[0], NULL, w.bytes, w.used);
        fab_serve(p->a);
        fab_unlock(p->a);
        return;
    }
    if (step == WELCOME)
        forged = fuzz_greet(in, p->b, p->a, FAB_F_WELCOME, other(p)->mine, &w);
    else if (step == FRAME)
        put_frame(p, in, &w);
    else
        put_answer(p, in, &w, step == CHALLENGE ? FAB_F_CHALLENGE : FAB_F_REFUSE);
    if (lane)
        fuzz_deliver(p->a, lane, w.bytes, w.used);
    MUST(!forged || !p->a->config.secret_len || before == FAB_P_UP ||
         atomic_load(&other(p)->state) != FAB_P_UP);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    struct fuzz_pair p;
    uint8_t how = fuzz_u8(&in);
    fuzz_open(&p, how, how & 8 ? FUZZ_SECRET : NULL, false);
    cut_off();
    int64_t first = fab_write(p.a, p.mine, 0, p.remote, 0, 8, p.id, 0, 0);
    fuzz_steps(1);
    while (in.left) {
        enum step step = (enum step)(fuzz_u8(&in) % STEPS);
        if (step == WRITE)
            (void)fab_transfer_release(p.a, fab_write(p.a, p.mine, 0, p.remote, 0, 8, p.id, 0, 0));
        else if (step == SEND)
            (void)fab_transfer_release(p.a, fab_send(p.a, p.to_b, "text", 4, 0));
        else if (step == TIME)
            fuzz_steps(1 + fuzz_u8(&in) % 8);
        else
            give(&p, &in, step);
    }
    (void)fab_transfer_release(p.a, first);
    MUST(!fab_counter_value(p.b, p.counter, 0)); /* it got nothing */
    fuzz_close(&p);
    return 0;
}
