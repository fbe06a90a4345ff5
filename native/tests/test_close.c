/* Closing with everything still open: whatever an engine was in the middle of, close() ends it, and
 * nothing of it is left, no descriptor either. Small, so that it also runs under valgrind, which
 * looks for what is still allocated (`make sanitize`).
 *
 * test_close [seed]. Status 77: `local` passed, and there is no libfabric for the rest.
 */
#include <dirent.h>

#include "check.h"

#define MEMORY (UINT64_C(1) << 20)
#define MANY 20 /* of whatever is left open */

static struct {
    fab_engine *a, *b;
    int64_t to_b, from, into, remote, counter, id;
    uint8_t *mine; /* registered with `a` */
} pair;

static void open_pair(const char *provider, const char *const *nics, uint32_t count)
{
    fab_engine_config config = check_config(provider, nics, count);
    pair.a = check_open(&config);
    pair.b = check_open(&config);
    pair.to_b = check_peer(pair.a, pair.b);
    pair.mine = calloc(1, MEMORY);
    CHECK(pair.mine, "out of memory");
    pair.from =
        OK(fab_region_register(pair.a, (uint64_t)(uintptr_t)pair.mine, MEMORY, FAB_MEM_HOST, 0));
    pair.into = OK(fab_region_alloc(pair.b, MEMORY, 0, -1, 0));
    pair.remote = check_remote(pair.a, pair.to_b, pair.b, pair.into);
    pair.counter = OK(fab_counter_open(pair.b, -1, 1));
    pair.id = OK(fab_counter_id(pair.b, pair.counter));
}

/* Some of everything, so that there is a session with lanes, grants, and imported memory. */
static void work(void)
{
    static const uint8_t bytes[20000];
    static uint8_t got[sizeof bytes];
    int64_t sender;
    for (uint64_t i = 1; i <= 5; i++) {
        check_done(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, MEMORY, pair.id, 0, -1));
        check_count(pair.b, pair.counter, i);
        check_done(pair.a, fab_send(pair.a, pair.to_b, bytes, sizeof bytes, -1));
        SAME(OK(fab_recv(pair.b, got, sizeof got, &sender, LONG_ENOUGH)), sizeof bytes);
    }
}

/* Nothing of this is waited for, received, or released. */
static void leave_open(void)
{
    static const uint8_t bytes[20000];
    static const int32_t pages[4] = {0, 1, 2, 3};
    int64_t queue = OK(fab_queue_open(pair.a)), theirs = OK(fab_queue_open(pair.b));
    for (int i = 0; i < MANY; i++) {
        int64_t t = OK(fab_write(pair.a, pair.from, 0, pair.remote, 0, MEMORY, pair.id, 0, -1));
        OK(fab_watch_transfer(pair.a, queue, t, 1));
        OK(fab_write_pages(pair.a, pair.from, pair.remote, pages, pages, 4, 100, 100, 100, 0, 0,
                           pair.id, 0, -1));
        OK(fab_imm(pair.a, &pair.to_b, 1, 77, 0, -1));
        OK(fab_send(pair.a, pair.to_b, bytes, sizeof bytes, -1));
        OK(fab_counter_open(pair.b, 1000 + i, 1));
        OK(fab_watch_counter(pair.b, theirs, pair.counter, 0, 1 << 20, NULL, 0, 2));
        OK(fab_region_alloc(pair.a, 5000, 0, -1, 0));
    }
    fab_target row = {pair.remote, 0, 0, MEMORY};
    OK(fab_scatter(pair.a, pair.from, &row, 1, pair.id, 0, -1));
    OK(fab_watch_message(pair.a, queue, 3));
}

/* Close first the one side, or the other, or let the peer notice it. */
static void close_pair(bool receiver_first, bool slowly)
{
    fab_engine *first = receiver_first ? pair.b : pair.a;
    fab_region_info into;
    OK(fab_region_get_info(pair.b, pair.into, &into));
    if (slowly)
        check_sleep(20 * MSEC);
    fab_engine_close(first, 100 * MSEC); /* says how much was cut off; that is what it is for */
    if (slowly)
        check_sleep(20 * MSEC);
    fab_engine_free(pair.b);
    fab_unmap(into.base, into.mapped);
    fab_engine_free(pair.a); /* its regions of `leave_open` stay mapped: that is the contract */
    free(pair.mine);
}

static uint32_t open_files(void)
{
    DIR *files = opendir("/proc/self/fd");
    uint32_t n = 0;
    CHECK(files, "/proc is missing");
    while (readdir(files))
        n++;
    closedir(files);
    return n;
}

static void all_ways(const char *provider, const char *const *nics, uint32_t count)
{
    uint32_t files = 0;
    for (int i = 0; i < 8; i++) {
        open_pair(provider, nics, count);
        if (i & 4)
            work();
        leave_open();
        close_pair(i & 1, i & 2);
        if (!i)
            files = open_files(); /* a library may keep some from its first use on */
        CHECK(open_files() <= files, "%u descriptors became %u at close %d", files, open_files(),
              i);
    }
    printf("%s ok\n", provider);
}

int main(int argc, char **argv)
{
    static const char *const two[] = {"lo", "lo"};
    fab_nic_info nics[FAB_MAX_NICS];
    check_begin(argc, argv);
    all_ways("local", NULL, 0);
    if (fab_list_nics("tcp", nics, FAB_MAX_NICS) < 0) {
        printf("tcp skipped: %s\n", fab_error_text());
        return SKIPPED;
    }
    all_ways("tcp", two, 1);
    all_ways("tcp", two, 2);
    return 0;
}
