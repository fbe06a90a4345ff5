/* What the hot paths cost, in instructions: fixed workloads for valgrind (tests/instructions.py).
 *
 *   instructions PROVIDER WORKLOAD ROUNDS
 *
 * brings two engines of this process together over PROVIDER, repeats WORKLOAD, and prints how many
 * operations that was. What is to be counted happens inside counted() and nowhere else:
 *
 *   valgrind --tool=callgrind --toggle-collect=counted instructions local write 2000
 *
 * Contract
 * - Two runs count the same. Nothing runs beside the calling thread while it counts, since engines
 *   are opened without a worker: whoever waits does the work inline, as it does for as long as the
 *   worker of an engine naps. And time is counted in looks at the clock, so that what is done from
 *   time to time (ticks, looks at sockets) comes as often in each run.
 * - The code that is counted is the shipped one: both are put in place by the linker
 *   (--wrap in CMakeLists.txt).
 * - What a round needs and what it leaves behind (immediates that are not taken yet) is seen to
 *   outside of counted().
 */
#include <pthread.h>
#include <unistd.h>

#include "check.h"

struct fab_engine;

#define LOOK_NS 200   /* what passes between two looks at the clock */
#define TRIES 1000000 /* of something that has to happen */
#define BYTES 8       /* of one range */

enum { PAGES = 1024, POSTED = 128 /* work requests that a submission posts itself */, BURST = 64 };

static struct {
    fab_engine *a, *b; /* a writes to b */
    int64_t from, remote, counter, id;
    uint64_t count; /* ranges that were sent under `id` */
    int64_t transfer;
} pair;
static int32_t pages[PAGES];

/* ---- what the linker puts in place of the engine's ---- */

int __wrap_fab_worker_start(struct fab_engine *e);
int __wrap_clock_gettime(clockid_t clock, struct timespec *out);

int __wrap_fab_worker_start(struct fab_engine *e)
{
    (void)e;
    return 0;
}

static int64_t clock_ns = SECOND;

int __wrap_clock_gettime(clockid_t clock, struct timespec *out)
{
    (void)clock;
    clock_ns += LOOK_NS;
    *out = (struct timespec){.tv_sec = clock_ns / SECOND, .tv_nsec = clock_ns % SECOND};
    return 0;
}

/* ---- two engines ---- */

/* One turn of both. Something else may have to be done by another thread: of a NIC, setting up. */
static void turn_both(void)
{
    OK(fab_engine_progress(pair.a));
    OK(fab_engine_progress(pair.b));
}

static void finish(int64_t transfer)
{
    int rc = FAB_E_TIMEOUT;
    OK(transfer);
    for (int i = 0; i < TRIES && rc == FAB_E_TIMEOUT; i++) {
        turn_both();
        rc = fab_transfer_wait(pair.a, transfer, 0);
        if (rc == FAB_E_TIMEOUT)
            check_sleep(MSEC / 10);
    }
    OK(rc);
    OK(fab_transfer_release(pair.a, transfer));
}

/* Takes all immediates that were sent. */
static void take_all(void)
{
    for (int i = 0; i < TRIES; i++) {
        if ((uint64_t)OK(fab_counter_value(pair.b, pair.counter, 0)) == pair.count)
            return;
        OK(fab_engine_progress(pair.b));
    }
    CHECK(false, "ranges are missing");
}

static int64_t send_pages(uint32_t count)
{
    pair.count += count;
    return fab_write_pages(pair.a, pair.from, pair.remote, pages, pages, count, BYTES, BYTES, BYTES,
                           0, 0, pair.id, 0, -1);
}

static int64_t send_one(void)
{
    pair.count++;
    return fab_write(pair.a, pair.from, 0, pair.remote, 0, BYTES, pair.id, 0, -1);
}

/* As beside a worker: libc spares some of its locks in a process of one thread. */
static void *stay(void *arg)
{
    for (;;)
        pause();
    return arg;
}

static void open_pair(const char *provider)
{
    pthread_t other;
    CHECK(!pthread_create(&other, NULL, stay, NULL), "no thread");
    fab_engine_config config = check_config(provider, NULL, 0);
    pair.a = check_open(&config);
    pair.b = check_open(&config);
    pair.from = OK(fab_region_alloc(pair.a, PAGES * BYTES, 0, -1, 1));
    int64_t into = OK(fab_region_alloc(pair.b, PAGES * BYTES, 0, -1, 1));
    pair.remote = check_remote(pair.a, check_peer(pair.a, pair.b), pair.b, into);
    pair.counter = OK(fab_counter_open(pair.b, -1, 1));
    pair.id = OK(fab_counter_id(pair.b, pair.counter));
    for (int32_t i = 0; i < PAGES; i++)
        pages[i] = (i * 421 + 7) % PAGES; /* each once, and none beside the one before */
    finish(send_one());
    finish(send_pages(PAGES));
    take_all();
}

/* From here on it is the same in each run: how long two engines take to connect is not. */
static void settle(void)
{
    clock_ns += 2 * SECOND - clock_ns % SECOND;
    for (int i = 0; i < 1000; i++)
        turn_both();
}

/* ---- workloads ---- */

static void write_one(void)
{
    int64_t t = send_one();
    OK(fab_transfer_wait(pair.a, t, LONG_ENOUGH));
    OK(fab_transfer_release(pair.a, t));
}

static void write_uncounted(void)
{
    int64_t t = fab_write(pair.a, pair.from, 0, pair.remote, 0, BYTES, FAB_NO_IMM, 0, -1);
    OK(fab_transfer_wait(pair.a, t, LONG_ENOUGH));
    OK(fab_transfer_release(pair.a, t));
}

static void write_pages(void)
{
    int64_t t = send_pages(PAGES);
    OK(fab_transfer_wait(pair.a, t, LONG_ENOUGH));
    OK(fab_transfer_release(pair.a, t));
}

static void post_pages(void)
{
    pair.transfer = send_pages(POSTED);
}

static void await_pages(void)
{
    OK(fab_transfer_wait(pair.a, pair.transfer, LONG_ENOUGH));
}

static void release_pages(void)
{
    OK(fab_transfer_release(pair.a, pair.transfer));
    take_all();
}

static void finish_pages(void)
{
    await_pages();
    release_pages();
}

static void send_burst(void)
{
    for (int i = 0; i < BURST; i++)
        write_one();
}

static void take_one(void)
{
    OK(fab_engine_progress(pair.b));
}

/* The turn that takes the last of a burst says that there may be more: a receiver looks again. */
static void take_burst(void)
{
    while ((uint64_t)OK(fab_counter_value(pair.b, pair.counter, 0)) != pair.count)
        OK(fab_engine_progress(pair.b));
}

static void wait_counter(void)
{
    OK(fab_counter_wait(pair.b, pair.counter, 0, &pair.count, 1, LONG_ENOUGH, NULL, 0, NULL));
}

static void read_counter(void)
{
    OK(fab_counter_value(pair.b, pair.counter, 0));
}

static const struct workload {
    const char *name;
    uint32_t each; /* operations of one round */
    void (*before)(void);
    void (*work)(void);
    void (*after)(void);
} workloads[] = {
    {"write", 1, NULL, write_one, take_all},
    {"write-uncounted", 1, NULL, write_uncounted, NULL},
    {"pages", PAGES, NULL, write_pages, take_all},
    {"post", POSTED, NULL, post_pages, finish_pages},
    {"complete", POSTED, post_pages, await_pages, release_pages},
    {"take-one", 1, write_one, take_one, take_all},
    {"take-burst", BURST, send_burst, take_burst, NULL},
    {"counter-wait", 1, NULL, wait_counter, NULL},
    {"counter-value", 1, NULL, read_counter, NULL},
};

/* What valgrind looks for by its name. */
__attribute__((noipa)) void counted(void (*work)(void));
void counted(void (*work)(void))
{
    work();
    __asm__ volatile("" ::: "memory"); /* it ends after `work` does */
}

static void repeat(const struct workload *w, uint32_t rounds)
{
    for (uint32_t i = 0; i < rounds; i++) {
        if (w->before)
            w->before();
        counted(w->work);
        if (w->after)
            w->after();
    }
}

int main(int argc, char **argv)
{
    if (argc == 4)
        for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
            uint32_t rounds = (uint32_t)strtoul(argv[3], NULL, 0);
            if (strcmp(workloads[i].name, argv[2]) != 0)
                continue;
            open_pair(argv[1]);
            settle();
            repeat(&workloads[i], rounds);
            printf("%llu\n", (unsigned long long)rounds * workloads[i].each);
            return 0; /* the engines end with the process */
        }
    fprintf(stderr, "usage: instructions PROVIDER WORKLOAD ROUNDS\n");
    return 2;
}
