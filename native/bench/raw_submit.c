/* From the submission of a write until the NIC has its first work request, where the submitter posts it
 * itself ("inline": nobody holds the progress lock, and nothing is queued).
 *
 * Contract
 * - Both engines are of this process. The time begins before fab_write() of 8 bytes with an immediate is called.
 * - On `verbs` with the mock NIC (mock_verbs.c, which FABRIC_LIBIBVERBS names) it ends when
 *   ibv_post_send() is called: what a NIC, or the mock, then does is not in it.
 * - Elsewhere it ends when fab_write() has returned, which on `local` is when the bytes are there and the
 *   immediate is in the receiver's ring: that is later, so the true value is smaller.
 * - The time of two looks at the clock is taken off. What happens between two submissions (the end of the
 *   write; the receiver, who must not be asleep) is not in it.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "raw_far.h"

#define TURNS 4 /* of each engine after a write */

static struct {
    fab_engine *near, *far;
    int64_t region, remote, counter, id;
    _Atomic int64_t
        *posted; /* of the mock: when ibv_post_send() was called first since this was 0 */
} submit;

static void find_mock(void)
{
    const char *path = getenv("FABRIC_LIBIBVERBS");
    void *mock = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    submit.posted = mock ? dlsym(mock, "mock_posted_ns") : NULL;
    if (!submit.posted)
        raw_fail("submit: `verbs` needs FABRIC_LIBIBVERBS to name the mock NIC");
}

static void turn_both(void)
{
    for (int i = 0; i < TURNS; i++) {
        raw_must(fab_engine_progress(submit.near));
        raw_must(fab_engine_progress(submit.far));
    }
}

/* Nothing but turns brings it to its end: the mock wakes nobody. */
static void finish(int64_t transfer)
{
    if (raw_must(transfer) == FAB_DONE)
        return;
    int64_t until = raw_now() + RAW_TIMEOUT_NS;
    int rc;
    while ((rc = fab_transfer_wait(submit.near, transfer, 0)) == FAB_E_TIMEOUT && raw_now() < until)
        turn_both();
    raw_must(rc);
    raw_must(fab_transfer_release(submit.near, transfer));
}

static int64_t write_once(uint64_t bytes)
{
    return fab_write(submit.near, submit.region, 0, submit.remote, 0, bytes, submit.id, 0,
                     RAW_TIMEOUT_NS);
}

static void open_submit(const struct raw_options *o, char *about, int size)
{
    struct raw_far far;
    submit.near = raw_open_engine(o->provider, NULL, -1);
    submit.far = raw_open_engine(o->provider, NULL, -1);
    submit.region = raw_must(fab_region_alloc(submit.near, o->bytes, 0, -1, 1));
    raw_describe(submit.far, raw_must(fab_region_alloc(submit.far, o->bytes, 0, -1, 1)), &far);
    submit.counter = raw_must(fab_counter_open(submit.far, -1, 1));
    submit.id = raw_must(fab_counter_id(submit.far, submit.counter));
    submit.remote = raw_meet(submit.near, &far, NULL);
    finish(write_once(o->bytes));
    if (!strcmp(o->provider, "verbs"))
        find_mock();
    snprintf(about, (size_t)size, "llm-fabric %s, %s, C interface%s", fab_version(), o->provider,
             submit.posted ? ", on a mock NIC" : "");
}

/* What a pair of looks at the clock takes here and now. */
static int64_t clock_ns(void)
{
    int64_t before = raw_now();
    return raw_now() - before;
}

static void run_submit(const struct raw_options *o, double seconds, struct raw_result *out)
{
    int64_t begin = raw_now(), now = begin, end = begin + (int64_t)(seconds * 1e9);
    while (now < end) {
        int64_t clock = clock_ns();
        if (submit.posted)
            *submit.posted = 0;
        int64_t before = raw_now();
        int64_t transfer = write_once(o->bytes);
        int64_t after = raw_now();
        /* Where the worker had the lock, it was not posted inline. */
        bool inlined = submit.posted ? *submit.posted != 0 : transfer == FAB_DONE;
        if (inlined)
            raw_sample(out, (submit.posted ? *submit.posted : after) - before - clock);
        finish(transfer);
        turn_both();
        out->iters++;
        now = raw_now();
    }
    out->bytes = out->iters * o->bytes;
    out->seconds = (double)(now - begin) / 1e9;
}

static void close_submit(void)
{
    fab_engine *both[] = {submit.near, submit.far};
    for (int i = 0; i < 2; i++) {
        fab_engine_close(both[i], 0);
        fab_engine_free(both[i]);
    }
}

const struct raw_kind raw_submit = {
    .name = "submit",
    .ops = "write",
    .open = open_submit,
    .run = run_submit,
    .close = close_submit,
};
