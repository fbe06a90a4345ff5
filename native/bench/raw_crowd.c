/* One engine that is connected with `--peers N` others and writes to them in turn: what a write costs, and
 * what a peer costs, must not depend on how many there are.
 *
 * Contract
 * - On `local` the others are in the second process, so that the first one has what its own engine needs for
 *   its peers and nothing else. Writes carry no immediate: what it takes to wake a receiver is not seen.
 * - On `sim` all are engines of one world, without delay. The others are hung once they are connected:
 *   their memory is written to, and they get no turns that would be counted here.
 * - Writes come BATCH at a time, and the time of one is a part of the batch's, from the first submission until
 *   all have ended.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "raw_far.h"

#define BATCH 64
#define STEPS 1000 /* of the world, at most, until what it has under way has arrived */
#define SETTLE_NS INT64_C(1000000000) /* after which nobody has anything to say */

static struct {
    fab_engine *engine;
    int64_t region, remotes[RAW_PEERS];
    uint32_t at;
    bool hung; /* the others, on `sim` */
} crowd;

static const char *name_of(uint32_t number, char name[FAB_NAME_MAX])
{
    snprintf(name, FAB_NAME_MAX, "crowd.%u", number);
    return name;
}

static fab_engine *open_one(const char *provider, uint32_t number)
{
    char name[FAB_NAME_MAX];
    const char *simulated = strcmp(provider, "sim") ? NULL : name_of(number, name);
    return raw_open_engine(provider, simulated, -1);
}

/* The second process: its engines do what there is to do. */
__attribute__((noreturn)) static void serve(const struct raw_options *o, int link)
{
    struct raw_far far;
    for (uint32_t i = 0; i < o->peers; i++) {
        fab_engine *engine = open_one(o->provider, i + 1);
        raw_describe(engine, raw_must(fab_region_alloc(engine, o->bytes, 0, -1, 1)), &far);
        raw_put(link, &far, sizeof far);
    }
    raw_get(link, &far, sizeof far); /* nothing comes: it ends with the first process */
    _exit(0);
}

/* What is under way in a world without delay arrives without time passing, in which the hung would be missed. */
static void let_arrive(int64_t transfer)
{
    for (int i = 0; i < STEPS && fab_transfer_wait(crowd.engine, transfer, 0) == FAB_E_TIMEOUT;
         i++) {
        raw_must(fab_sim_step(fab_sim_now()));
        raw_must(fab_engine_progress(crowd.engine));
    }
}

static void write_and_wait(uint32_t count, uint64_t bytes, uint32_t peers)
{
    int64_t transfers[BATCH];
    for (uint32_t i = 0; i < count; i++) {
        transfers[i] = fab_write(crowd.engine, crowd.region, 0, crowd.remotes[crowd.at], 0, bytes,
                                 FAB_NO_IMM, 0, RAW_TIMEOUT_NS);
        crowd.at = crowd.at + 1 < peers ? crowd.at + 1 : 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (crowd.hung)
            let_arrive(raw_must(transfers[i]));
        raw_finish(crowd.engine, transfers[i]);
    }
}

static void meet(uint32_t index, const struct raw_far *far, uint64_t bytes)
{
    crowd.remotes[index] = raw_meet(crowd.engine, far, NULL);
    crowd.at = index;
    write_and_wait(1, bytes, index + 1); /* the first use connects */
}

static void meet_simulated(const struct raw_options *o)
{
    struct raw_far far;
    for (uint32_t i = 0; i < o->peers; i++) {
        fab_engine *engine = open_one("sim", i + 1);
        raw_describe(engine, raw_must(fab_region_alloc(engine, o->bytes, 0, -1, 1)), &far);
        meet(i, &far, o->bytes);
    }
    int64_t until = fab_sim_now() + SETTLE_NS;
    while (fab_sim_now() < until)
        fab_sim_step(until);
    for (uint32_t i = 0; i < o->peers; i++) {
        char name[FAB_NAME_MAX];
        raw_must(fab_sim_nic(name_of(i + 1, name), FAB_SIM_HUNG));
    }
    crowd.hung = true;
}

static void open_crowd(const struct raw_options *o, char *about, int size)
{
    const fab_sim_config world = {.seed = 1, .flavour = FAB_SIM_ORDERED};
    bool simulated = !strcmp(o->provider, "sim");
    int link = -1;
    if (simulated)
        raw_must(fab_sim_begin(&world));
    else if (!raw_fork(o, &link))
        serve(o, link);
    crowd.engine = open_one(o->provider, 0);
    crowd.region = raw_must(fab_region_alloc(crowd.engine, o->bytes, 0, -1, 1));
    if (simulated)
        meet_simulated(o);
    for (uint32_t i = 0; i < o->peers && !simulated; i++) {
        struct raw_far far;
        raw_get(link, &far, sizeof far);
        meet(i, &far, o->bytes);
    }
    snprintf(about, (size_t)size, "llm-fabric %s, %s, C interface, %u peers", fab_version(),
             o->provider, o->peers);
}

static void run_crowd(const struct raw_options *o, double seconds, struct raw_result *out)
{
    int64_t begin = raw_now(), now = begin, end = begin + (int64_t)(seconds * 1e9);
    while (now < end) {
        write_and_wait(BATCH, o->bytes, o->peers);
        int64_t then = now;
        now = raw_now();
        raw_sample(out, (now - then) / BATCH);
        out->iters += BATCH;
    }
    out->bytes = out->iters * o->bytes;
    out->seconds = (double)(now - begin) / 1e9;
}

static void close_crowd(void)
{
    fab_engine_close(crowd.engine, 0);
    fab_engine_free(crowd.engine);
}

const struct raw_kind raw_crowd = {
    .name = "crowd",
    .ops = "write",
    .open = open_crowd,
    .run = run_crowd,
    .close = close_crowd,
};
