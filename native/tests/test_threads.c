/* Four threads of one engine submit writes, pages, scatters and messages at random to another,
 * under eight counter ids, and cancel some; other threads wait for the counts, watch them, and
 * take the messages. At the end every count and every byte is as the submitters know it.
 *
 * Every submitter owns a part of the source, which never changes, and a part of the destination,
 * cut into cells. What it writes to a cell depends on the cell alone, so that a cell is right once
 * anything was written to it. What may be cancelled is counted under ids of its own: they may end
 * void, the others never.
 *
 * test_threads [seed]; RUN_SECONDS of the environment is how long each provider runs. Status 77:
 * `local` passed, and there is no libfabric.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

enum { SUBMITTERS = 4, IDS = 8, CELLS = 64, CELL = 65536, KEPT = 32, MESSAGE_MAX = 9000 };

#define PART ((uint64_t)CELLS * CELL)
#define MEMORY (SUBMITTERS * PART)

struct message {
    uint64_t thread, number, salt;
};

struct submitter {
    pthread_t thread;
    uint64_t number, random;
    uint64_t counted[IDS]; /* ranges submitted under each id */
    uint64_t messages;
    uint64_t cancelled, done;
    bool written[CELLS];
    struct {
        int64_t handle;
        bool cancelled;
    } open[KEPT];
    uint32_t open_count;
};

static struct {
    fab_engine *a, *b;
    int64_t to_b, to_a, from, into, remote;
    uint8_t *src, *dst;
    int64_t counter[IDS], id[IDS];
    int64_t risky, risky_id; /* what is cancelled counts here */
    struct submitter submitters[SUBMITTERS];
    _Atomic bool stop;      /* submitters are to end */
    _Atomic bool all_there; /* the totals below hold */
    _Atomic uint64_t totals[IDS], messages;
    _Atomic uint64_t received, events;
} rig;

static uint64_t pick(struct submitter *s, uint64_t below)
{
    return check_next(&s->random) % below;
}

/* ---- submitters ---- */

static void settle(struct submitter *s, uint32_t i)
{
    int code = fab_transfer_wait(rig.a, s->open[i].handle, LONG_ENOUGH);
    CHECK(!code || (s->open[i].cancelled && code == FAB_E_CANCELLED), "%d: %s", code,
          fab_error_text());
    s->cancelled += code != 0;
    s->done += !code;
    OK(fab_transfer_release(rig.a, s->open[i].handle));
    s->open[i] = s->open[--s->open_count];
}

static void keep(struct submitter *s, int64_t handle)
{
    OK(handle);
    if (s->open_count == KEPT)
        settle(s, (uint32_t)pick(s, KEPT));
    s->open[s->open_count].cancelled = false;
    s->open[s->open_count++].handle = handle;
}

static uint64_t at_cell(const struct submitter *s, uint64_t cell)
{
    return s->number * PART + cell * CELL;
}

static void submit_write(struct submitter *s)
{
    uint64_t cell = pick(s, CELLS), at = at_cell(s, cell), id = pick(s, IDS);
    bool counted = pick(s, 4) != 0, whole = pick(s, 2);
    uint64_t skip = whole ? 0 : pick(s, CELL), length = whole ? CELL : pick(s, CELL - skip);
    keep(s, fab_write(rig.a, rig.from, at + skip, rig.remote, at + skip, length,
                      counted ? rig.id[id] : FAB_NO_IMM, 0, -1));
    s->counted[id] += counted;
    s->written[cell] |= whole;
}

static void submit_pages(struct submitter *s)
{
    int32_t pages[16];
    uint32_t count = (uint32_t)pick(s, 17);
    uint64_t id = pick(s, IDS);
    for (uint32_t i = 0; i < count; i++) {
        pages[i] = (int32_t)pick(s, CELLS);
        s->written[pages[i]] = true;
    }
    keep(s, fab_write_pages(rig.a, rig.from, rig.remote, pages, pages, count, CELL, CELL, CELL,
                            s->number * PART, s->number * PART, rig.id[id], 0, -1));
    s->counted[id] += count;
}

static void submit_scatter(struct submitter *s)
{
    fab_target rows[8];
    uint32_t count = (uint32_t)pick(s, 9);
    uint64_t id = pick(s, IDS);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t cell = pick(s, CELLS), at = at_cell(s, cell);
        bool whole = pick(s, 2);
        rows[i] = (fab_target){rig.remote, at, at, whole ? CELL : 0};
        s->written[cell] |= whole;
    }
    keep(s, fab_scatter(rig.a, rig.from, rows, count, rig.id[id], 0, -1));
    s->counted[id] += count;
}

static void submit_message(struct submitter *s)
{
    uint8_t bytes[MESSAGE_MAX];
    struct message head = {s->number, s->messages++, check_next(&s->random)};
    uint64_t length = sizeof head + pick(s, pick(s, 8) ? 100 : MESSAGE_MAX - sizeof head);
    memcpy(bytes, &head, sizeof head);
    check_paint(bytes + sizeof head, length - sizeof head, head.salt);
    keep(s, fab_send(rig.a, rig.to_b, bytes, length, -1));
}

/* A write or a scatter that is cancelled at once, soon, or too late. */
static void submit_and_cancel(struct submitter *s)
{
    uint64_t at = at_cell(s, 0);
    fab_target rows[3] = {
        {rig.remote, at, at, PART}, {rig.remote, at, at, PART}, {rig.remote, at, at, PART}};
    int64_t t = pick(s, 2)
                    ? fab_write(rig.a, rig.from, at, rig.remote, at, PART, rig.risky_id, 0, -1)
                    : fab_scatter(rig.a, rig.from, rows, 3, rig.risky_id, 0, -1);
    keep(s, t);
    s->open[s->open_count - 1].cancelled = true;
    if (pick(s, 3) == 0)
        check_sleep((int64_t)pick(s, 300000));
    OK(fab_transfer_cancel(rig.a, t));
}

static void *submitter_main(void *arg)
{
    struct submitter *s = arg;
    while (!atomic_load(&rig.stop)) {
        switch (pick(s, 10)) {
        case 0:
            submit_and_cancel(s);
            break;
        case 1:
            submit_message(s);
            break;
        case 2:
            submit_pages(s);
            break;
        case 3:
            submit_scatter(s);
            break;
        case 4:
            if (s->open_count)
                settle(s, (uint32_t)pick(s, s->open_count));
            break;
        default:
            submit_write(s);
        }
    }
    while (s->open_count)
        settle(s, s->open_count - 1);
    return NULL;
}

/* ---- the other side ---- */

/* Waits for one more, again and again: targets are met in order and never fall. */
static void *waiter_main(void *arg)
{
    uint64_t id = (uint64_t)((_Atomic uint64_t *)arg - rig.totals), target = 0;
    while (!atomic_load(&rig.all_there) || target < rig.totals[id]) {
        uint64_t next = target + 1;
        int code =
            fab_counter_wait(rig.b, rig.counter[id], 0, &next, 1, 5 * MSEC, &rig.to_a, 1, NULL);
        if (code == FAB_E_TIMEOUT)
            continue;
        OK(code);
        target = (uint64_t)OK(fab_counter_value(rig.b, rig.counter[id], 0));
        CHECK(target >= next, "a count fell from %llu to %llu", (unsigned long long)next,
              (unsigned long long)target);
    }
    return NULL;
}

/* Watches all ids on one queue, each for the value after its last. */
static void *watcher_main(void *arg)
{
    fab_event events[IDS];
    int64_t queue = OK(fab_queue_open(rig.b)), watches[IDS] = {0};
    (void)arg;
    while (!atomic_load(&rig.all_there)) {
        for (uint64_t i = 0; i < IDS; i++) {
            if (watches[i])
                continue;
            uint64_t next = (uint64_t)OK(fab_counter_value(rig.b, rig.counter[i], 0)) + 1;
            watches[i] = OK(fab_watch_counter(rig.b, queue, rig.counter[i], 0, next, NULL, 0, i));
        }
        if (fab_queue_wait(rig.b, queue, 5 * MSEC))
            continue;
        int n = (int)OK(fab_queue_drain(rig.b, queue, events, IDS));
        for (int i = 0; i < n; i++) {
            CHECK(events[i].tag < IDS && !events[i].code, "event %d", events[i].code);
            CHECK(watches[events[i].tag], "an event of no watch");
            watches[events[i].tag] = 0;
            atomic_fetch_add(&rig.events, 1);
        }
    }
    for (int i = 0; i < IDS; i++)
        OK(fab_unwatch(rig.b, watches[i]));
    OK(fab_queue_close(rig.b, queue));
    return NULL;
}

/* One taker, so that the order of each sender's messages shows. */
static void *taker_main(void *arg)
{
    static uint8_t got[FAB_MAX_MESSAGE], want[MESSAGE_MAX];
    uint64_t next[SUBMITTERS] = {0};
    int64_t from;
    (void)arg;
    while (!atomic_load(&rig.all_there) || rig.received < rig.messages) {
        struct message head;
        int64_t n = fab_recv(rig.b, got, sizeof got, &from, 5 * MSEC);
        if (n == FAB_E_TIMEOUT)
            continue;
        CHECK(OK(n) >= (int64_t)sizeof head && n <= MESSAGE_MAX, "%lld bytes", (long long)n);
        memcpy(&head, got, sizeof head);
        CHECK(head.thread < SUBMITTERS, "thread %llu", (unsigned long long)head.thread);
        SAME(head.number, next[head.thread]);
        next[head.thread]++;
        check_paint(want, (uint64_t)n - sizeof head, head.salt);
        CHECK(!memcmp(want, got + sizeof head, (uint64_t)n - sizeof head), "its bytes differ");
        atomic_fetch_add(&rig.received, 1);
    }
    return NULL;
}

/* ---- the run ---- */

static void open_rig(const char *provider)
{
    static const char *const nics[] = {"lo"};
    fab_engine_config config = check_config(provider, nics, 1);
    memset(&rig, 0, sizeof rig);
    rig.a = check_open(&config);
    rig.b = check_open(&config);
    rig.to_b = check_peer(rig.a, rig.b);
    rig.to_a = check_peer(rig.b, rig.a);
    rig.from = OK(fab_region_alloc(rig.a, MEMORY, 0, -1, 1));
    rig.into = OK(fab_region_alloc(rig.b, MEMORY, 0, -1, 1));
    rig.src = check_base(rig.a, rig.from);
    rig.dst = check_base(rig.b, rig.into);
    rig.remote = check_remote(rig.a, rig.to_b, rig.b, rig.into);
    check_paint(rig.src, MEMORY, check_seed);
    for (int i = 0; i < IDS; i++) { /* half of them chosen by the user */
        rig.counter[i] = OK(fab_counter_open(rig.b, i % 2 ? i : -1, 1));
        rig.id[i] = OK(fab_counter_id(rig.b, rig.counter[i]));
    }
    rig.risky = OK(fab_counter_open(rig.b, -1, 1));
    rig.risky_id = OK(fab_counter_id(rig.b, rig.risky));
}

static pthread_t begin(void *(*run)(void *), void *arg)
{
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, run, arg), "no thread");
    return thread;
}

static void check_result(void)
{
    uint64_t cancelled = 0, done = 0;
    for (int i = 0; i < IDS; i++)
        SAME(OK(fab_counter_value(rig.b, rig.counter[i], 0)), rig.totals[i]);
    SAME(rig.received, rig.messages);
    for (uint64_t i = 0; i < SUBMITTERS; i++) {
        struct submitter *s = &rig.submitters[i];
        cancelled += s->cancelled;
        done += s->done;
        for (uint64_t k = 0; k < CELLS; k++)
            CHECK(!s->written[k] || !memcmp(rig.dst + at_cell(s, k), rig.src + at_cell(s, k), CELL),
                  "cell %llu of thread %llu", (unsigned long long)k, (unsigned long long)i);
    }
    fab_stats a = check_stats(rig.a), b = check_stats(rig.b);
    SAME(a.transfers_live, 0);
    SAME(a.watches + b.watches, 0);
    SAME(a.transfers_failed, 0);
    SAME(b.imm_stale + b.imm_overflow + a.frames_refused + b.frames_refused, 0);
    printf("  done %llu, cancelled %llu, messages %llu, events %llu\n", (unsigned long long)done,
           (unsigned long long)cancelled, (unsigned long long)rig.received,
           (unsigned long long)rig.events);
    CHECK(done > 100, "only %llu transfers", (unsigned long long)done);
}

static void close_rig(void)
{
    for (int i = 0; i < IDS; i++)
        OK(fab_counter_close(rig.b, rig.counter[i]));
    OK(fab_counter_close(rig.b, rig.risky));
    SAME(check_stats(rig.b).counters, 0);
    OK(fab_remote_release(rig.a, rig.remote));
    SAME(check_stats(rig.a).remotes, 0);
    fab_region_info from, into;
    OK(fab_region_get_info(rig.a, rig.from, &from));
    OK(fab_region_get_info(rig.b, rig.into, &into));
    OK(fab_region_deregister(rig.a, rig.from, LONG_ENOUGH));
    OK(fab_region_deregister(rig.b, rig.into, LONG_ENOUGH));
    SAME(check_stats(rig.a).regions + check_stats(rig.b).regions, 0);
    fab_unmap(from.base, from.mapped);
    fab_unmap(into.base, into.mapped);
    fab_engine_free(rig.a);
    fab_engine_free(rig.b);
}

static void run(const char *provider, int64_t ns)
{
    pthread_t others[IDS + 2];
    printf("%s\n", provider);
    open_rig(provider);
    for (int i = 0; i < IDS; i++)
        others[i] = begin(waiter_main, (void *)&rig.totals[i]);
    others[IDS] = begin(watcher_main, NULL);
    others[IDS + 1] = begin(taker_main, NULL);
    for (uint64_t i = 0; i < SUBMITTERS; i++) {
        rig.submitters[i].number = i;
        rig.submitters[i].random = check_seed * SUBMITTERS + i;
        rig.submitters[i].thread = begin(submitter_main, &rig.submitters[i]);
    }
    check_sleep(ns);
    atomic_store(&rig.stop, true);
    for (int i = 0; i < SUBMITTERS; i++) {
        pthread_join(rig.submitters[i].thread, NULL);
        for (int k = 0; k < IDS; k++)
            rig.totals[k] += rig.submitters[i].counted[k];
        rig.messages += rig.submitters[i].messages;
    }
    for (int i = 0; i < IDS; i++) /* with every transfer done, the counts come without delay */
        check_count(rig.b, rig.counter[i], rig.totals[i]);
    atomic_store(&rig.all_there, true);
    for (int i = 0; i < IDS + 2; i++)
        pthread_join(others[i], NULL);
    check_result();
    close_rig();
}

/* Threads are in the middle of calls when the engine closes: each ends, with a reason. */
static void *submit_until_closed(void *arg)
{
    for (;;) {
        int64_t t = fab_write(rig.a, rig.from, 0, rig.remote, 0, CELL, *(int64_t *)arg, 0, -1);
        int64_t code = t < 0 ? t : fab_transfer_wait(rig.a, t, LONG_ENOUGH);
        if (t > 0)
            OK(fab_transfer_release(rig.a, t));
        if (code)
            return (void *)(intptr_t)code;
    }
}

static void run_close(const char *provider)
{
    pthread_t threads[SUBMITTERS];
    fab_region_info from, into;
    open_rig(provider);
    OK(fab_region_get_info(rig.a, rig.from, &from));
    OK(fab_region_get_info(rig.b, rig.into, &into));
    for (int i = 0; i < SUBMITTERS; i++)
        threads[i] = begin(submit_until_closed, &rig.id[i]);
    check_sleep((int64_t)(check_next(&check_state) % (20 * MSEC)));
    OK(fab_engine_close(rig.a, SECOND));
    for (int i = 0; i < SUBMITTERS; i++) {
        void *end;
        pthread_join(threads[i], &end);
        int code = (int)(intptr_t)end;
        CHECK(code == FAB_E_CLOSED || code == FAB_E_UNREACHABLE, "code %d", code);
    }
    fab_engine_free(rig.a);
    fab_engine_free(rig.b);
    fab_unmap(from.base, from.mapped);
    fab_unmap(into.base, into.mapped);
}

int main(int argc, char **argv)
{
    static const char *const providers[] = {"local", "tcp"};
    const char *seconds = getenv("RUN_SECONDS");
    int64_t ns = seconds ? (int64_t)(strtod(seconds, NULL) * (double)SECOND) : 3 * SECOND;
    fab_nic_info nics[FAB_MAX_NICS];
    check_begin(argc, argv);
    for (int i = 0; i < 2; i++) {
        if (i && fab_list_nics(providers[i], nics, FAB_MAX_NICS) < 0) {
            printf("%s skipped: %s\n", providers[i], fab_error_text());
            return SKIPPED;
        }
        run(providers[i], ns);
        for (int k = 0; k < 10; k++)
            run_close(providers[i]);
    }
    return 0;
}
