/* What the fuzz targets share: two engines in a simulated world, and an input that is eaten byte by
 * byte. A target is the one function LLVMFuzzerTestOneInput; each call has a world of its own, so that
 * an input that fails once fails always.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"
#include "core/frame.h"
#include "core/peer.h"
#include "core/sink.h"
#include "core/worker.h"
#include "fabric.h"
#include "providers/provider.h"

#define FUZZ_SECOND INT64_C(1000000000)
#define FUZZ_MEMORY 4096
#define FUZZ_STEPS 64 /* of the world, at the end of an input */

/* What does not hold ends the program, as a sanitizer's finding does. */
#define MUST(condition)                                                                           \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, fab_error_text()); \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

struct fuzz_input {
    const uint8_t *bytes;
    size_t left;
};

static inline void fuzz_eat(struct fuzz_input *in, void *out, size_t size)
{
    size_t n = size < in->left ? size : in->left;
    memset(out, 0, size);
    memcpy(out, in->bytes, n);
    in->bytes += n;
    in->left -= n;
}

static inline uint8_t fuzz_u8(struct fuzz_input *in)
{
    uint8_t v;
    fuzz_eat(in, &v, sizeof v);
    return v;
}

static inline uint16_t fuzz_u16(struct fuzz_input *in)
{
    uint16_t v;
    fuzz_eat(in, &v, sizeof v);
    return v;
}

static inline uint32_t fuzz_u32(struct fuzz_input *in)
{
    uint32_t v;
    fuzz_eat(in, &v, sizeof v);
    return v;
}

static inline uint64_t fuzz_u64(struct fuzz_input *in)
{
    uint64_t v;
    fuzz_eat(in, &v, sizeof v);
    return v;
}

struct fuzz_pair {
    fab_engine *a, *b;
    int64_t to_b, to_a;
    int64_t mine, theirs; /* regions of a and b */
    int64_t remote; /* b's, as a sees it */
    int64_t counter, id; /* of b */
    fab_region_info info; /* of theirs, as long as it was there */
};

/* The low bits say how the world's NICs work, the high ones whose id is smaller. */
static inline void fuzz_world(uint8_t kind)
{
    fab_sim_config world = {
        .seed = 7 + (kind >> 6), .flavour = 1 + kind % 3, .delay_ns = 1000, .jitter_ns = 5000};
    setenv("FABRIC_LOG_LEVEL", "error", 0);
    MUST(!fab_sim_begin(&world));
}

static inline fab_engine *fuzz_engine(const char *first, const char *second, const char *secret,
                                      bool asks)
{
    const char *nics[2] = {first, second};
    fab_engine_config config = {.provider = "sim",
                                .nics = nics,
                                .nic_count = second ? 2 : 1,
                                .cpu = -1,
                                .ask_accept = asks,
                                .secret = (const uint8_t *)secret,
                                .secret_len = secret ? (uint32_t)strlen(secret) : 0,
                                .peer_timeout_ns = FUZZ_SECOND / 2};
    fab_engine *e = fab_engine_open(&config);
    MUST(e);
    return e;
}

/* What `of` tells others about itself; `nics` has room for all. */
static inline fab_peer_address fuzz_address(fab_engine *of, fab_nic_info nics[FAB_MAX_NICS])
{
    fab_engine_info info;
    MUST(!fab_engine_get_info(of, &info));
    for (uint32_t i = 0; i < info.nic_count; i++)
        MUST(!fab_engine_nic(of, i, &nics[i]));
    fab_peer_address address = {.label = "peer", .nic_count = info.nic_count, .nics = nics};
    memcpy(address.id, info.id, sizeof address.id);
    return address;
}

static inline fab_descriptor fuzz_describe(fab_region_info *info)
{
    return (fab_descriptor){.region = info->region,
                            .secret = info->secret,
                            .length = info->length,
                            .kind = info->kind,
                            .device = info->device,
                            .key_count = info->key_count,
                            .keys = info->keys};
}

static inline void fuzz_steps(int n)
{
    for (int i = 0; i < n; i++)
        fab_sim_step(-1);
}

/* Two engines, each with a region and both with an address, and no session. b may ask who is let in. */
static inline void fuzz_open(struct fuzz_pair *p, uint8_t kind, const char *secret, bool asks)
{
    static uint8_t memory[FUZZ_MEMORY];
    fab_nic_info nics[FAB_MAX_NICS];
    memset(p, 0, sizeof *p);
    fuzz_world(kind);
    p->a = fuzz_engine("a0", "a1", secret, false);
    p->b = fuzz_engine("b0", "b1", secret, asks);
    fab_peer_address address = fuzz_address(p->b, nics);
    MUST((p->to_b = fab_peer_add(p->a, &address)) > 0);
    address = fuzz_address(p->a, nics);
    MUST((p->to_a = fab_peer_add(p->b, &address)) > 0);
    MUST((p->mine = fab_region_register(p->a, (uint64_t)(uintptr_t)memory, sizeof memory, 0, 0)) >
         0);
    MUST((p->theirs = fab_region_alloc(p->b, FUZZ_MEMORY, 0, -1, 0)) > 0);
    MUST(!fab_region_get_info(p->b, p->theirs, &p->info));
    fab_descriptor d = fuzz_describe(&p->info);
    MUST((p->remote = fab_remote_add(p->a, p->to_b, &d)) > 0);
    MUST((p->counter = fab_counter_open(p->b, -1, 1)) > 0);
    MUST((p->id = fab_counter_id(p->b, p->counter)) >= 0);
}

/* A session with its region granted. */
static inline void fuzz_meet(struct fuzz_pair *p)
{
    int64_t t = fab_write(p->a, p->mine, 0, p->remote, 0, 8, p->id, 0, -1);
    MUST(t > 0);
    MUST(!fab_transfer_wait(p->a, t, FUZZ_SECOND));
    MUST(!fab_transfer_release(p->a, t));
}

static inline bool fuzz_prints(const char *text)
{
    while (*text && (unsigned char)*text >= ' ' && *text != 0x7F)
        text++;
    return !*text;
}

/* What no frame may change: the bounds of what is kept for a peer. */
static inline void fuzz_sane(fab_engine *e)
{
    uint32_t touched = atomic_load(&e->peers.touched);
    MUST(e->newcomer_count <= FAB_NEWCOMERS);
    MUST(atomic_load(&e->inbox_count) <= FAB_MAX_QUEUED);
    for (uint32_t i = 0; i < touched; i++) {
        const struct fab_peer *p = fab_slot_at(&e->peers, i);
        if (!fab_slot_live(p))
            continue;
        MUST(fuzz_prints(p->label) && fuzz_prints(p->text) && fuzz_prints(p->end_text));
        MUST(p->lane_count <= FAB_MAX_LANES && p->grant_count <= FAB_MAX_REGIONS);
        MUST(p->grants_open <= FAB_GRANTS_ASKED && p->asked_count <= 2 * FAB_GRANTS_ASKED);
        MUST(p->void_sent <= p->void_count && p->held_count <= FAB_VOIDS_PER_FRAME);
        MUST(p->lost_count <= FAB_LOST_FRAMES);
        MUST(p->rx_limit - p->rx_next <= FAB_MESSAGE_FRAMES);
        MUST(!p->rx_partial || p->rx_filled <= p->rx_partial->length);
    }
}

static inline void fuzz_close(struct fuzz_pair *p)
{
    fuzz_steps(FUZZ_STEPS);
    fuzz_sane(p->a);
    fuzz_sane(p->b);
    fab_engine_free(p->a);
    fab_engine_free(p->b);
    fab_unmap(p->info.base, p->info.mapped);
    MUST(!fab_sim_end());
}

/* The lane over which an engine hears a peer; NULL: there is none now. */
static inline struct fab_lane *fuzz_lane(fab_engine *e, const fab_engine *peer, uint32_t number)
{
    struct fab_peer *p = fab_peer_find(e, peer->id);
    return p && number < p->lane_count ? p->lanes[number] : NULL;
}

/* As a NIC does that received it. */
static inline void fuzz_deliver(fab_engine *e, struct fab_lane *lane, const uint8_t *bytes,
                                uint32_t length)
{
    fab_lock(e);
    e->now = fab_now();
    fab_core_sink.frame(lane, bytes, length, -1);
    fab_serve(e);
    fab_unlock(e);
    fuzz_sane(e);
}

#endif
