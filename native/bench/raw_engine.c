/* Our engine without Python: what the C interface itself takes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "raw_far.h"

static struct {
    fab_engine *engine;
    int64_t region, remote, peer, counter, far_id;
    int32_t *sources, *destinations;
    uint64_t count, at, arrived;
    int link;
} raw;

static void exchange(void)
{
    struct raw_far here, far;
    raw_describe(raw.engine, raw.region, &here);
    raw.counter = raw_must(fab_counter_open(raw.engine, -1, 1));
    here.id = raw_must(fab_counter_id(raw.engine, raw.counter));
    raw_put(raw.link, &here, sizeof here);
    raw_get(raw.link, &far, sizeof far);
    raw.remote = raw_meet(raw.engine, &far, &raw.peer);
    raw.far_id = far.id;
}

static void finish(int64_t transfer)
{
    raw_finish(raw.engine, transfer);
}

static void wait_count(uint64_t target)
{
    raw_must(
        fab_counter_wait(raw.engine, raw.counter, 0, &target, 1, RAW_TIMEOUT_NS, NULL, 0, NULL));
    raw.arrived = target;
}

static void write_once(const struct raw_options *o)
{
    uint64_t offset = raw.at * o->bytes;
    finish(fab_write(raw.engine, raw.region, offset, raw.remote, offset, o->bytes, raw.far_id, 0,
                     RAW_TIMEOUT_NS));
    raw.at = raw.at + 1 < raw.count ? raw.at + 1 : 0;
}

static void write_pages(const struct raw_options *o)
{
    if (raw.at + o->pages > raw.count)
        raw.at = 0;
    finish(fab_write_pages(raw.engine, raw.region, raw.remote, raw.sources + raw.at,
                           raw.destinations + raw.at, o->pages, o->bytes, o->bytes, o->bytes, 0, 0,
                           raw.far_id, 0, RAW_TIMEOUT_NS));
    raw.at += o->pages;
}

static void one_immediate(void)
{
    finish(fab_imm(raw.engine, &raw.peer, 1, raw.far_id, 0, RAW_TIMEOUT_NS));
}

static void one_call(const struct raw_options *o)
{
    if (!strcmp(o->op, "pages"))
        write_pages(o);
    else if (!strcmp(o->op, "imm"))
        one_immediate();
    else
        write_once(o);
    if (!strcmp(o->op, "roundtrip"))
        wait_count(raw.arrived + 1);
}

/* ---- the second process ---- */

__attribute__((noreturn)) static void serve(const struct raw_options *o)
{
    bool answers = !strcmp(o->op, "roundtrip");
    uint64_t todo;
    for (;;) {
        raw_get(raw.link, &todo, sizeof todo); /* so many will come, or for ever */
        if (!answers) {
            wait_count(raw.arrived + todo);
            raw_put(raw.link, &todo, sizeof todo);
            continue;
        }
        for (;;) {
            wait_count(raw.arrived + 1);
            write_once(o);
        }
    }
}

static void open_engine(const struct raw_options *o, char *about, int size)
{
    bool first = raw_fork(o, &raw.link);
    raw.engine = raw_open_engine(o->provider, NULL, o->cpus[!first]);
    raw.region = raw_must(fab_region_alloc(raw.engine, o->walk, 0, -1, 1));
    raw.count = o->walk / o->bytes;
    if (raw.count > INT32_MAX)
        raw_fail("more than 2^31 pages to walk");
    raw.sources = (int32_t *)raw_shuffle((uint32_t)raw.count, 1);
    raw.destinations = (int32_t *)raw_shuffle((uint32_t)raw.count, 2);
    exchange();
    if (!first)
        serve(o);
    snprintf(about, (size_t)size, "llm-fabric %s, %s, C interface", fab_version(), o->provider);
}

static void run_engine(const struct raw_options *o, double seconds, struct raw_result *out)
{
    static bool answering;
    bool roundtrip = !strcmp(o->op, "roundtrip");
    uint64_t none = 0;
    if (roundtrip && !answering)
        raw_put(raw.link, &none, sizeof none);
    answering = true;
    int64_t begin = raw_now(), now = begin, end = begin + (int64_t)(seconds * 1e9);
    /* An immediate takes little longer than a look at the clock. */
    uint32_t looks = strcmp(o->op, "imm") ? 1 : 64;
    while (now < end) {
        for (uint32_t i = 0; i < looks; i++)
            one_call(o);
        int64_t then = now;
        now = raw_now();
        raw_sample(out, (now - then) / looks);
        out->iters += looks;
    }
    out->bytes = strcmp(o->op, "imm") ? out->iters * o->pages * o->bytes : 0;
    if (!roundtrip) { /* the last one is counted before the time is taken */
        uint64_t ranges = out->iters * o->pages;
        raw_put(raw.link, &ranges, sizeof ranges);
        raw_get(raw.link, &ranges, sizeof ranges);
    }
    out->seconds = (double)(raw_now() - begin) / 1e9;
}

static void close_engine(void)
{
    fab_engine_close(raw.engine, 0);
    fab_engine_free(raw.engine);
    free(raw.sources);
    free(raw.destinations);
}

const struct raw_kind raw_engine = {
    .name = "engine",
    .ops = "write pages imm roundtrip",
    .open = open_engine,
    .run = run_engine,
    .close = close_engine,
};
