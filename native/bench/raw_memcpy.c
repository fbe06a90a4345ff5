/* memcpy() of one thread into memory that it shares with another process: what no transport on one host
 * that copies with plain memcpy can beat. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "raw.h"

static uint8_t *from, *to;
static uint32_t *sources, *destinations; /* pages, in the order in which they are copied */
static uint64_t count, at;

static void open_memory(const struct raw_options *o, char *about, int size)
{
    int link;
    from = raw_memory(o->walk);
    to = raw_memory(o->walk);
    memset(from, 0x5a, o->walk);
    if (!raw_fork(o, &link)) {
        uint64_t sum = 0;
        for (uint64_t i = 0; i < o->walk; i += 4096) /* it is mapped there, too */
            sum += to[i];
        raw_put(link, &sum, sizeof sum);
        for (;;)
            pause();
    }
    uint64_t sum;
    raw_get(link, &sum, sizeof sum);
    count = o->walk / o->bytes;
    if (count > UINT32_MAX)
        raw_fail("more than 2^32 pages to walk");
    bool pages = !strcmp(o->op, "pages");
    sources = pages ? raw_shuffle((uint32_t)count, 1) : NULL;
    destinations = pages ? raw_shuffle((uint32_t)count, 2) : NULL;
    snprintf(about, (size_t)size, "memcpy by one thread into a shared memfd");
}

static void copy(const struct raw_options *o)
{
    for (uint32_t i = 0; i < o->pages; i++) {
        uint64_t s = sources ? sources[at] : at, d = destinations ? destinations[at] : at;
        memcpy(to + d * o->bytes, from + s * o->bytes, o->bytes);
        at = at + 1 < count ? at + 1 : 0;
    }
}

static void run_copies(const struct raw_options *o, double seconds, struct raw_result *out)
{
    int64_t begin = raw_now(), now = begin, end = begin + (int64_t)(seconds * 1e9);
    while (now < end) {
        copy(o);
        int64_t then = now;
        now = raw_now();
        raw_sample(out, now - then);
        out->iters++;
    }
    out->bytes = out->iters * o->pages * o->bytes;
    out->seconds = (double)(now - begin) / 1e9;
}

static void close_memory(void)
{
    free(sources);
    free(destinations);
}

const struct raw_kind raw_memcpy = {
    .name = "memcpy",
    .ops = "write pages",
    .open = open_memory,
    .run = run_copies,
    .close = close_memory,
};
