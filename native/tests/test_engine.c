/* Two engines of one process, driven through the C interface alone, over `local`, over `tcp` with
 * one NIC and over `tcp` with two: every operation, its bounds, and the ends that it can have.
 *
 * test_engine [seed]. Status 77: `local` passed, and there is no libfabric for the rest.
 */
#include <pthread.h>

#include "check.h"

#define MIB (UINT64_C(1) << 20)
#define MEMORY (64 * MIB)
#define GUARD 0x5a /* what memory that nobody wrote to holds */

static const char *const two_nics[] = {"lo", "lo"};
static fab_engine_config config; /* of the provider at hand */

static struct {
    fab_engine *a, *b;
    int64_t to_b, to_a;         /* peers */
    int64_t from, into, remote; /* regions of a and b; b's, seen from a */
    uint8_t *src, *dst;
    int64_t counter, id; /* of b */
    uint64_t count;
} pair;

static void open_pair(void)
{
    pair.a = check_open(&config);
    pair.b = check_open(&config);
    pair.to_b = check_peer(pair.a, pair.b);
    pair.to_a = check_peer(pair.b, pair.a);
    pair.from = OK(fab_region_alloc(pair.a, MEMORY, 0, -1, 1));
    pair.into = OK(fab_region_alloc(pair.b, MEMORY, 0, -1, 1));
    pair.src = check_base(pair.a, pair.from);
    pair.dst = check_base(pair.b, pair.into);
    pair.remote = check_remote(pair.a, pair.to_b, pair.b, pair.into);
    pair.counter = OK(fab_counter_open(pair.b, -1, 1));
    pair.id = OK(fab_counter_id(pair.b, pair.counter));
    pair.count = 0;
    check_paint(pair.src, MEMORY, check_next(&check_state));
}

static void free_with_memory(fab_engine *e, int64_t region)
{
    fab_region_info info;
    OK(fab_region_get_info(e, region, &info));
    fab_engine_free(e);
    fab_unmap(info.base, info.mapped);
}

static void close_pair(void)
{
    fab_stats stats = check_stats(pair.a);
    SAME(stats.transfers_live, 0);
    SAME(stats.watches, 0);
    free_with_memory(pair.a, pair.from);
    free_with_memory(pair.b, pair.into);
}

/* ---- writes ---- */

/* Exactly the `length` bytes at `at` are those of the source. */
static void check_landed(uint64_t at, uint64_t from, uint64_t length)
{
    CHECK(!memcmp(pair.dst + at, pair.src + from, length), "%llu bytes at %llu differ",
          (unsigned long long)length, (unsigned long long)at);
    for (uint64_t i = 1; i <= 64; i++) {
        CHECK(at < i || pair.dst[at - i] == GUARD, "written before %llu", (unsigned long long)at);
        CHECK(at + length + i > MEMORY || pair.dst[at + length + i - 1] == GUARD,
              "written after %llu", (unsigned long long)(at + length));
    }
}

static void write_once(uint64_t length, bool counted)
{
    uint64_t room = MEMORY - length;
    uint64_t from = room ? check_random(room) : 0, at = room ? check_random(room) : 0;
    memset(pair.dst + (at > 64 ? at - 64 : 0), GUARD,
           at + length + 64 < MEMORY ? length + 128 - (at > 64 ? 0 : 64 - at) : MEMORY - at);
    int64_t t = OK(fab_write(pair.a, pair.from, from, pair.remote, at, length,
                             counted ? pair.id : FAB_NO_IMM, 0, -1));
    if (counted)
        check_count(pair.b, pair.counter, ++pair.count);
    OK(fab_transfer_wait(pair.a, t, LONG_ENOUGH));
    check_landed(at, from, length);
    fab_transfer_info info;
    OK(fab_transfer_get_info(pair.a, t, &info));
    CHECK(info.state == FAB_T_DONE && !info.code, "state %d", info.state);
    if (t != FAB_DONE) { /* else there never was one */
        SAME(info.acknowledged, length || counted ? info.ranges : info.acknowledged);
        SAME(info.bytes, length);
    }
    OK(fab_transfer_release(pair.a, t));
}

static void test_writes(void)
{
    static const uint64_t sizes[] = {0, 1, 4095, 16385, 65537, 262143, MIB, 64 * MIB};
    memset(pair.dst, GUARD, MEMORY);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        write_once(sizes[i], true);
        write_once(sizes[i], false);
    }
    for (int i = 0; i < 100; i++)
        write_once(check_random(MIB), check_random(2));
    SAME(fab_counter_value(pair.b, pair.counter, 0), pair.count);
}

static void write_pages(uint32_t count, uint64_t bytes, uint64_t src_stride, uint64_t dst_stride)
{
    static int32_t src[1023], dst[1023];
    for (uint32_t i = 0; i < count; i++) { /* a shuffle of the destination, any source */
        uint32_t k = (uint32_t)check_random(i + 1);
        dst[i] = dst[k];
        dst[k] = (int32_t)i;
        src[i] = (int32_t)check_random(1023);
    }
    uint64_t used = count ? (count - 1) * dst_stride + bytes : 0;
    memset(pair.dst, GUARD, used + 4096);
    int64_t t = fab_write_pages(pair.a, pair.from, pair.remote, src, dst, count, bytes, src_stride,
                                dst_stride, 128, 64, pair.id, 0, -1);
    pair.count += count;
    check_count(pair.b, pair.counter, pair.count);
    check_done(pair.a, t);
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *at = pair.dst + 64 + (uint64_t)dst[i] * dst_stride;
        CHECK(!memcmp(at, pair.src + 128 + (uint64_t)src[i] * src_stride, bytes), "page %u", i);
        for (uint64_t k = bytes; k < dst_stride && k < bytes + 64; k++)
            CHECK(at[k] == GUARD, "written behind page %u", i);
    }
}

static void test_pages(void)
{
    static const uint32_t counts[] = {0, 1, 2, 1023};
    for (size_t i = 0; i < 4; i++) {
        write_pages(counts[i], 4096, 4096, 4096);
        write_pages(counts[i], 1, 7, 3);
        write_pages(counts[i], 16385, 16500, 20000);
    }
    write_pages(5, 3 * MIB, 1000, 3 * MIB + 100);
}

static void test_scatter(void)
{
    enum { N = 64 };
    fab_target rows[N];
    memset(pair.dst, GUARD, N * MIB / 2);
    for (uint32_t i = 0; i < N; i++) {
        static const uint64_t sizes[] = {0, 1, 4095, 200000};
        rows[i] = (fab_target){pair.remote, check_random(MIB), i * MIB / 2, sizes[i % 4]};
    }
    check_done(pair.a, fab_scatter(pair.a, pair.from, rows, N, pair.id, 0, -1));
    pair.count += N;
    check_count(pair.b, pair.counter, pair.count);
    for (uint32_t i = 0; i < N; i++) {
        const uint8_t *at = pair.dst + rows[i].dst_offset;
        CHECK(!memcmp(at, pair.src + rows[i].src_offset, rows[i].length), "row %u", i);
        CHECK(at[rows[i].length] == GUARD, "written behind row %u", i);
    }
    check_done(pair.a, fab_scatter(pair.a, pair.from, rows, N, FAB_NO_IMM, 0, -1));
    check_done(pair.a, fab_scatter(pair.a, pair.from, rows, 1, FAB_NO_IMM, 0, -1)); /* no bytes */
    check_done(pair.a, fab_scatter(pair.a, pair.from, NULL, 0, pair.id, 0, -1));
    check_count(pair.b, pair.counter, pair.count);
}

static void test_immediates(void)
{
    int64_t peers[3] = {pair.to_b, pair.to_b, pair.to_b};
    check_done(pair.a, fab_imm(pair.a, NULL, 0, pair.id, 0, -1)); /* nobody to wait for */
    for (int i = 0; i < 100; i++)
        check_done(pair.a, fab_imm(pair.a, peers, 1, pair.id, 0, -1));
    check_done(pair.a, fab_imm(pair.a, peers, 3, pair.id, 0, -1));
    pair.count += 103;
    check_count(pair.b, pair.counter, pair.count);
    for (int i = 0; i < 7; i++) /* an id that nobody opened yet */
        check_done(pair.a, fab_imm(pair.a, peers, 1, 1234, 0, -1));
    check_done(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, MIB, 1234, 0, -1));
    int64_t early = OK(fab_counter_open(pair.b, 1234, 1));
    check_count(pair.b, early, 8);
    OK(fab_counter_close(pair.b, early));
}

/* ---- what is refused before anything is posted ---- */

static void test_bounds(void)
{
    fab_engine *a = pair.a;
    int64_t from = pair.from, to = pair.remote, id = pair.id;
    uint64_t pieces = check_stats(a).tx_pieces;
    int64_t nobody = 99;
    int32_t good = 0, negative = -1, far = INT32_MAX;
    fab_target row = {to, 0, MEMORY, 1};
    FAILS(FAB_E_INVALID, fab_write(a, from, MEMORY, to, 0, 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, 0, to, MEMORY, 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, 1, to, 0, UINT64_MAX, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, UINT64_MAX, to, 0, 2, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, MEMORY + 1, to, 0, 0, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, 0, to, 0, 1, 1 << 28, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, 0, to, 0, 1, -2, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, 99, 0, to, 0, 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write(a, from, 0, 0, 0, 1, id, 0, -1));
    FAILS(FAB_E_INVALID,
          fab_write_pages(a, from, to, &negative, &good, 1, 1, 1, 1, 0, 0, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write_pages(a, from, to, &good, &far, 1, 1, 1, 1, 0, 0, id, 0, -1));
    FAILS(FAB_E_INVALID,
          fab_write_pages(a, from, to, &far, &good, 1, 1, UINT64_MAX, 1, 0, 0, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_write_pages(a, from, to, &good, &good, 1, 0, 1, 1, 0, 0, id, 0, -1));
    FAILS(FAB_E_INVALID,
          fab_write_pages(a, from, to, &good, &good, 1, 2, 1, 1, MEMORY - 1, 0, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_scatter(a, from, &row, 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_scatter(a, from, &row, FAB_MAX_TARGETS + 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_imm(a, &pair.to_b, 1, FAB_NO_IMM, 0, -1));
    FAILS(FAB_E_INVALID, fab_imm(a, &nobody, 1, id, 0, -1));
    FAILS(FAB_E_INVALID, fab_send(a, pair.to_b, pair.src, FAB_MAX_MESSAGE + 1, -1));
    FAILS(FAB_E_INVALID, fab_send(a, 0, pair.src, 1, -1));
    FAILS(FAB_E_INVALID, fab_region_register(a, 0, 1, FAB_MEM_HOST, 0));
    FAILS(FAB_E_INVALID, fab_region_register(a, 4096, 0, FAB_MEM_HOST, 0));
    FAILS(FAB_E_INVALID, fab_region_register(a, UINT64_MAX, 2, FAB_MEM_HOST, 0));
    FAILS(FAB_E_INVALID, fab_region_register(a, (uint64_t)(uintptr_t)pair.src, 1, 7, 0));
    FAILS(FAB_E_INVALID, fab_region_alloc(a, 0, 0, -1, 0));
    FAILS(FAB_E_INVALID, fab_region_deregister(a, 99, 0));
    FAILS(FAB_E_INVALID, fab_remote_release(a, 99));
    FAILS(FAB_E_INVALID, fab_transfer_wait(a, 99, 0));
    SAME(check_stats(a).tx_pieces, pieces);
    SAME(check_stats(a).transfers_live, 0);
    check_count(pair.b, pair.counter, pair.count);
}

/* A descriptor of a part: its bounds hold, and its offset is added. */
static void test_sub_range(void)
{
    fab_region_info info;
    OK(fab_region_get_info(pair.b, pair.into, &info));
    fab_descriptor d = check_describe(&info);
    d.offset = 5000;
    d.length = 100;
    int64_t part = OK(fab_remote_add(pair.a, pair.to_b, &d));
    memset(pair.dst, GUARD, 10000);
    check_done(pair.a, fab_write(pair.a, pair.from, 3, part, 20, 80, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    check_landed(5020, 3, 80);
    FAILS(FAB_E_INVALID, fab_write(pair.a, pair.from, 0, part, 20, 81, pair.id, 0, -1));
    OK(fab_remote_release(pair.a, part));
    FAILS(FAB_E_INVALID, fab_write(pair.a, pair.from, 0, part, 0, 1, pair.id, 0, -1));
    d.key_count = FAB_MAX_NICS + 1;
    FAILS(FAB_E_INVALID, fab_remote_add(pair.a, pair.to_b, &d));
    d.key_count = info.key_count;
    d.offset = UINT64_MAX;
    FAILS(FAB_E_INVALID, fab_remote_add(pair.a, pair.to_b, &d));
}

/* A part of the scatter is bad: none of it is started, and nothing of it is left behind that a
 * later group could trip over. */
static void test_scatter_half_bad(void)
{
    fab_target rows[4] = {{pair.remote, 0, 0, 8},
                          {pair.remote, 0, 0, 8},
                          {pair.remote, 0, 0, 8},
                          {pair.remote, 0, MEMORY, 8}};
    for (int i = 0; i < 20; i++) {
        FAILS(FAB_E_INVALID, fab_scatter(pair.a, pair.from, rows, 4, FAB_NO_IMM, 0, -1));
        rows[0].length = 16 * MIB;
        int64_t t = OK(fab_scatter(pair.a, pair.from, rows, 1, FAB_NO_IMM, 0, -1));
        OK(fab_transfer_cancel(pair.a, t));
        int code = check_end(pair.a, t);
        CHECK(!code || code == FAB_E_CANCELLED, "code %d", code);
        rows[0].length = 8;
    }
    SAME(check_stats(pair.a).transfers_live, 0);
}

/* ---- memory of the application's own ---- */

static void test_registered(void)
{
    uint64_t length = 3 * MIB + 17;
    uint8_t *ours = malloc(length), *theirs = malloc(length + 1);
    CHECK(ours && theirs, "out of memory");
    check_paint(ours, length, check_next(&check_state));
    memset(theirs, GUARD, length + 1);
    int64_t from = OK(fab_region_register(pair.a, (uint64_t)(uintptr_t)ours, length, 0, 0));
    int64_t into = OK(fab_region_register(pair.b, (uint64_t)(uintptr_t)theirs, length, 0, 0));
    int64_t remote = check_remote(pair.a, pair.to_b, pair.b, into);
    check_done(pair.a, fab_write(pair.a, from, 0, remote, 0, length, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    CHECK(!memcmp(ours, theirs, length) && theirs[length] == GUARD, "registered to registered");
    check_done(pair.a, fab_write(pair.a, pair.from, 5, remote, 9, length - 9, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    CHECK(!memcmp(theirs + 9, pair.src + 5, length - 9), "allocated to registered");
    check_done(pair.a, fab_write(pair.a, from, 1, pair.remote, 2, 4097, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    CHECK(!memcmp(pair.dst + 2, ours + 1, 4097), "registered to allocated");
    OK(fab_region_deregister(pair.b, into, LONG_ENOUGH));
    OK(fab_region_deregister(pair.a, from, LONG_ENOUGH));
    OK(fab_remote_release(pair.a, remote));
    free(ours);
    free(theirs);
}

/* ---- messages ---- */

static void receive(fab_engine *e, uint64_t length, uint64_t salt, int64_t *from)
{
    static uint8_t got[FAB_MAX_MESSAGE], want[FAB_MAX_MESSAGE];
    int64_t n = OK(fab_recv(e, got, sizeof got, from, LONG_ENOUGH));
    SAME(n, length);
    check_paint(want, length, salt);
    CHECK(!memcmp(got, want, length), "a message of %llu bytes", (unsigned long long)length);
}

static void test_messages(void)
{
    static const uint64_t sizes[] = {0, 1, 4095, 4096, 4097, 8192, 65535, FAB_MAX_MESSAGE};
    static uint8_t bytes[FAB_MAX_MESSAGE];
    int64_t from;
    for (uint64_t i = 0; i < 8; i++)
        for (int back = 0; back < 2; back++) {
            check_paint(bytes, sizes[i], i);
            int64_t t = back ? fab_send(pair.b, pair.to_a, bytes, sizes[i], -1)
                             : fab_send(pair.a, pair.to_b, bytes, sizes[i], -1);
            OK(t);
            receive(back ? pair.a : pair.b, sizes[i], i, &from);
            CHECK(from == (back ? pair.to_b : pair.to_a), "from another");
            check_done(back ? pair.b : pair.a, t);
        }
    FAILS(FAB_E_TIMEOUT, fab_recv(pair.b, bytes, sizeof bytes, &from, 0));
    check_done(pair.a, fab_send(pair.a, pair.to_b, bytes, 100, -1));
    FAILS(FAB_E_INVALID, fab_recv(pair.b, bytes, 99, &from, LONG_ENOUGH));
    SAME(OK(fab_recv(pair.b, bytes, 100, &from, LONG_ENOUGH)), 100);
}

/* Nobody takes them: the sender is held up at a bound; then all come, in order, once. */
static void test_back_pressure(void)
{
    enum { MOST = 4096 };
    static int64_t sent[MOST];
    static uint8_t bytes[5000];
    uint32_t n = 0;
    int64_t from;
    for (; n < MOST; n++) {
        check_paint(bytes, n % sizeof bytes, n);
        sent[n] = fab_send(pair.a, pair.to_b, bytes, n % sizeof bytes, 20 * MSEC);
        if (sent[n] < 0)
            break;
    }
    CHECK(n > 100 && n < 1000, "%u messages went without anybody taking one", n);
    SAME(sent[n], FAB_E_FULL);
    FAILS(FAB_E_FULL, fab_send(pair.a, pair.to_b, bytes, 1, 0));
    write_once(MIB, true); /* writes go on meanwhile */
    OK(fab_transfer_cancel(pair.a, sent[n - 1])); /* none of it is out: it need not go */
    FAILS(FAB_E_CANCELLED, fab_transfer_wait(pair.a, sent[n - 1], LONG_ENOUGH));
    OK(fab_transfer_release(pair.a, sent[--n]));
    for (uint32_t i = 0; i < n; i++)
        receive(pair.b, i % sizeof bytes, i, &from);
    for (uint32_t i = 0; i < n; i++)
        check_done(pair.a, sent[i]);
    FAILS(FAB_E_TIMEOUT, fab_recv(pair.b, bytes, sizeof bytes, &from, 0));
}

/* ---- event loops ---- */

static void expect_event(fab_engine *e, int64_t queue, uint64_t tag, int code)
{
    fab_event event;
    OK(fab_queue_wait(e, queue, LONG_ENOUGH));
    SAME(OK(fab_queue_drain(e, queue, &event, 1)), 1);
    CHECK(event.tag == tag && event.code == code, "event %llu, code %d",
          (unsigned long long)event.tag, event.code);
}

static void test_queues(void)
{
    uint8_t bytes[8];
    int64_t from, queue_a = OK(fab_queue_open(pair.a)), queue_b = OK(fab_queue_open(pair.b));
    OK(fab_queue_fd(pair.a, queue_a));
    for (uint64_t i = 0; i < 100; i++) {
        OK(fab_watch_message(pair.b, queue_b, i));
        OK(fab_watch_counter(pair.b, queue_b, pair.counter, 0, pair.count + 1, &pair.to_a, 1, ~i));
        int64_t t = OK(fab_write(pair.a, pair.from, 0, pair.remote, 0, MIB, pair.id, 0, -1));
        if (fab_watch_transfer(pair.a, queue_a, t, i) > 0)
            expect_event(pair.a, queue_a, i, 0);
        pair.count++;
        expect_event(pair.b, queue_b, ~i, 0);
        check_done(pair.a, t);
        check_done(pair.a, fab_send(pair.a, pair.to_b, "message", 8, -1));
        expect_event(pair.b, queue_b, i, 0);
        SAME(OK(fab_recv(pair.b, bytes, sizeof bytes, &from, 0)), 8);
    }
    OK(fab_watch_message(pair.b, queue_b, 1));
    OK(fab_queue_close(pair.b, queue_b)); /* takes its watches along */
    SAME(check_stats(pair.b).watches, 0);
    FAILS(FAB_E_INVALID, fab_watch_message(pair.b, queue_b, 1));
    OK(fab_queue_close(pair.a, queue_a));
    OK(fab_queue_close(pair.a, queue_a));
}

/* ---- cancel ---- */

static void test_cancel(void)
{
    uint32_t cancelled = 0, done = 0;
    for (int i = 0; i < 60; i++) {
        int64_t c = OK(fab_counter_open(pair.b, -1, 1)), id = OK(fab_counter_id(pair.b, c));
        uint64_t one = 1;
        int64_t t = OK(fab_write(pair.a, pair.from, 0, pair.remote, 0, 8 * MIB, id, 0, -1));
        if (i % 3)
            check_sleep((int64_t)check_random(2000000));
        OK(fab_transfer_cancel(pair.a, t));
        OK(fab_transfer_cancel(pair.a, t));
        int code = fab_transfer_wait(pair.a, t, LONG_ENOUGH);
        int wait = fab_counter_wait(pair.b, c, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL);
        CHECK(code == FAB_E_CANCELLED ? wait == FAB_E_VOID || !wait : !code && !wait,
              "transfer %d, counter %d: %s", code, wait, fab_error_text());
        cancelled += code != 0;
        done += !code;
        fab_transfer_info info;
        OK(fab_transfer_get_info(pair.a, t, &info));
        SAME(info.state, code ? FAB_T_CANCELLED : FAB_T_DONE);
        if (code) { /* nothing of it touches the source or lands any more */
            check_sleep(MSEC);
            memset(pair.dst, GUARD, 8 * MIB);
            check_sleep(3 * MSEC);
            for (uint64_t k = 0; k < 8 * MIB; k += 1021)
                CHECK(pair.dst[k] == GUARD, "a cancelled transfer wrote at %llu",
                      (unsigned long long)k);
        }
        OK(fab_transfer_release(pair.a, t));
        OK(fab_counter_close(pair.b, c));
    }
    printf("  cancelled %u, done %u\n", cancelled, done);
    SAME(check_stats(pair.a).transfers_live, 0);
}

/* ---- regions that go ---- */

static void test_deregister(void)
{
    int64_t region = OK(fab_region_alloc(pair.b, 4 * MIB, 0, -1, 1));
    fab_region_info info;
    OK(fab_region_get_info(pair.b, region, &info));
    int64_t remote = check_remote(pair.a, pair.to_b, pair.b, region);
    int64_t open[50];
    for (int i = 0; i < 50; i++)
        open[i] = OK(fab_write(pair.a, pair.from, 0, remote, 0, 4 * MIB, FAB_NO_IMM, 0, -1));
    OK(fab_transfer_wait(pair.a, open[0], LONG_ENOUGH)); /* it holds the region */
    OK(fab_region_deregister(pair.b, region, LONG_ENOUGH));
    uint8_t *base = (uint8_t *)(uintptr_t)info.base;
    memset(base, GUARD, 4 * MIB);
    for (int i = 0; i < 50; i++) {
        int code = check_end(pair.a, open[i]);
        CHECK(!code || code == FAB_E_FAILED, "code %d: %s", code, fab_error_text());
    }
    SAME(check_end(pair.a, fab_write(pair.a, pair.from, 0, remote, 0, 1, FAB_NO_IMM, 0, -1)),
         FAB_E_FAILED);
    for (uint64_t k = 0; k < 4 * MIB; k++)
        CHECK(base[k] == GUARD, "written at %llu after it was deregistered", (unsigned long long)k);
    FAILS(FAB_E_INVALID, fab_region_get_info(pair.b, region, &info));
    FAILS(FAB_E_INVALID, fab_region_deregister(pair.b, region, 0));
    OK(fab_remote_release(pair.a, remote));
    fab_unmap(info.base, info.mapped);
    write_once(MIB, true);
}

/* A source that is being read is not let go; afterwards it is. */
static void test_deregister_source(void)
{
    int64_t region = OK(fab_region_alloc(pair.a, 32 * MIB, 0, -1, 1));
    fab_region_info info;
    OK(fab_region_get_info(pair.a, region, &info));
    int64_t t = OK(fab_write(pair.a, region, 0, pair.remote, 0, 32 * MIB, pair.id, 0, -1));
    OK(fab_region_deregister(pair.a, region, LONG_ENOUGH));
    FAILS(FAB_E_INVALID, fab_write(pair.a, region, 0, pair.remote, 0, 1, pair.id, 0, -1));
    SAME(check_end(pair.a, t), 0);
    check_count(pair.b, pair.counter, ++pair.count);
    fab_unmap(info.base, info.mapped);
}

static void test_descriptors(void)
{
    fab_region_info info;
    fab_engine *c = check_open(&config);
    fab_engine_info a;
    int64_t to_b = check_peer(c, pair.b), from = OK(fab_region_alloc(c, 4096, 0, -1, 1));
    OK(fab_engine_get_info(pair.a, &a));
    int64_t alias = OK(fab_region_alias(pair.b, pair.into, a.id));
    FAILS(FAB_E_INVALID, fab_region_alias(pair.b, alias, a.id));
    FAILS(FAB_E_INVALID, fab_region_deregister(pair.b, pair.into, 0));
    int64_t ours = check_remote(pair.a, pair.to_b, pair.b, alias);
    int64_t theirs = check_remote(c, to_b, pair.b, alias);
    check_done(pair.a, fab_write(pair.a, pair.from, 0, ours, 0, MIB, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    memset(pair.dst, GUARD, 4096);
    SAME(check_end(c, fab_write(c, from, 0, theirs, 0, 4096, FAB_NO_IMM, 0, -1)), FAB_E_FAILED);
    OK(fab_region_get_info(pair.b, pair.into, &info));
    fab_descriptor forged = check_describe(&info);
    forged.secret++;
    int64_t bad = OK(fab_remote_add(c, to_b, &forged));
    SAME(check_end(c, fab_write(c, from, 0, bad, 0, 4096, FAB_NO_IMM, 0, -1)), FAB_E_FAILED);
    CHECK(pair.dst[0] == GUARD && pair.dst[4095] == GUARD, "a refused descriptor wrote");
    int64_t good = check_remote(c, to_b, pair.b, pair.into);
    check_done(c, fab_write(c, from, 0, good, 0, 4096, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    OK(fab_region_deregister(pair.b, alias, LONG_ENOUGH));
    SAME(check_end(pair.a, fab_write(pair.a, pair.from, 0, ours, 0, 1, FAB_NO_IMM, 0, -1)),
         FAB_E_FAILED);
    write_once(4096, true); /* the other descriptor of the same memory goes on */
    OK(fab_remote_release(pair.a, ours));
    free_with_memory(c, from);
}

/* Its region went before this engine ever connected. */
static void test_stale_descriptor(void)
{
    fab_engine *c = check_open(&config);
    int64_t to_b = check_peer(c, pair.b), from = OK(fab_region_alloc(c, 4096, 0, -1, 1));
    int64_t region = OK(fab_region_alloc(pair.b, 4096, 0, -1, 1));
    int64_t remote = check_remote(c, to_b, pair.b, region);
    fab_region_info info;
    OK(fab_region_get_info(pair.b, region, &info));
    OK(fab_region_deregister(pair.b, region, LONG_ENOUGH));
    int64_t counter = OK(fab_counter_open(pair.b, -1, 1)), id = OK(fab_counter_id(pair.b, counter));
    uint64_t one = 1;
    SAME(check_end(c, fab_write(c, from, 0, remote, 0, 4096, id, 0, -1)), FAB_E_FAILED);
    FAILS(FAB_E_VOID, fab_counter_wait(pair.b, counter, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL));
    OK(fab_counter_close(pair.b, counter));
    fab_unmap(info.base, info.mapped);
    free_with_memory(c, from);
}

/* ---- who may connect ---- */

static int try_to_connect(const fab_engine_config *ours, const fab_engine_config *theirs)
{
    fab_engine *x = check_open(ours), *y = check_open(theirs);
    int64_t peer = check_peer(x, y);
    int code = check_end(x, fab_imm(x, &peer, 1, 1, 0, -1));
    if (code)
        CHECK(*fab_error_text(), "no reason");
    fab_engine_free(x);
    fab_engine_free(y);
    return code;
}

static void test_secrets(void)
{
    fab_engine_config right = config, wrong = config;
    right.secret = (const uint8_t *)"open sesame";
    right.secret_len = 11;
    wrong.secret = (const uint8_t *)"open barley";
    wrong.secret_len = 11;
    SAME(try_to_connect(&right, &right), 0);
    SAME(try_to_connect(&wrong, &right), FAB_E_UNREACHABLE);
    SAME(try_to_connect(&config, &right), FAB_E_UNREACHABLE);
    SAME(try_to_connect(&right, &config), FAB_E_UNREACHABLE);
    wrong.secret_len = FAB_MAX_SECRET + 1;
    CHECK(!fab_engine_open(&wrong) && fab_error_code() == FAB_E_INVALID, "a secret that long");
}

static void test_accept(void)
{
    fab_engine_config asking = config;
    asking.ask_accept = 1;
    fab_newcomer newcomer;
    fab_engine *x = check_open(&config), *y = check_open(&asking);
    int64_t peer = check_peer(x, y);
    fab_engine_info info;
    OK(fab_engine_get_info(x, &info));
    for (int yes = 0; yes < 2; yes++) {
        int64_t t = OK(fab_imm(x, &peer, 1, 1, 0, -1));
        OK(fab_accept_next(y, &newcomer, LONG_ENOUGH));
        CHECK(!memcmp(newcomer.id, info.id, sizeof info.id), "another newcomer");
        CHECK(!strcmp(newcomer.label, info.label), "label %s", newcomer.label);
        FAILS(FAB_E_TIMEOUT, fab_accept_next(y, &newcomer, 0));
        FAILS(FAB_E_TIMEOUT, fab_transfer_wait(x, t, 0));
        OK(fab_accept_reply(y, newcomer.token, yes));
        FAILS(FAB_E_INVALID, fab_accept_reply(y, newcomer.token, yes));
        SAME(check_end(x, t), yes ? 0 : FAB_E_UNREACHABLE);
    }
    fab_engine_free(x);
    fab_engine_free(y);
}

/* Nobody answers the newcomer: what it started ends at its own deadline, and all else at the
 * deadline of the handshake. */
static void test_deadlines(void)
{
    fab_engine_config asking = config, quick = config;
    asking.ask_accept = 1;
    quick.peer_timeout_ns = SECOND;
    fab_engine *x = check_open(&quick), *y = check_open(&asking);
    int64_t peer = check_peer(x, y), start = check_now();
    int64_t cut = OK(fab_imm(x, &peer, 1, 1, start + 200 * MSEC, -1));
    int64_t dropped = OK(fab_imm(x, &peer, 1, 1, 0, -1)), left = OK(fab_imm(x, &peer, 1, 1, 0, -1));
    OK(fab_transfer_cancel(x, dropped));
    SAME(check_end(x, dropped), FAB_E_CANCELLED);
    SAME(check_end(x, cut), FAB_E_FAILED); /* and not with the handshake, as unreachable */
    CHECK(check_now() - start >= 200 * MSEC, "ended before its deadline");
    SAME(check_end(x, left), FAB_E_UNREACHABLE);
    CHECK(check_now() - start >= quick.peer_timeout_ns, "gave up before peer_timeout");
    fab_engine_free(x);
    fab_engine_free(y);
    /* And on a session that is up: one that has passed already, and one that is far. */
    uint64_t one = 1;
    int64_t c = OK(fab_counter_open(pair.b, -1, 1)), id = OK(fab_counter_id(pair.b, c));
    int64_t t = OK(fab_write(pair.a, pair.from, 0, pair.remote, 0, 64 * MIB, id, 1, -1));
    int code = check_end(pair.a, t);
    int wait = fab_counter_wait(pair.b, c, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL);
    CHECK(code == FAB_E_FAILED ? wait == FAB_E_VOID || !wait : !code && !wait, "%d, %d", code,
          wait);
    OK(fab_counter_close(pair.b, c));
    check_done(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, 1, pair.id,
                                 check_now() + LONG_ENOUGH, -1));
    check_count(pair.b, pair.counter, ++pair.count);
}

/* ---- sessions that end ---- */

static void test_disconnect(void)
{
    fab_peer_info info;
    uint64_t far = pair.count + 1000;
    int64_t open[20];
    for (int i = 0; i < 20; i++)
        open[i] = OK(fab_write(pair.a, pair.from, 0, pair.remote, 0, 16 * MIB, FAB_NO_IMM, 0, -1));
    OK(fab_transfer_wait(pair.a, open[0], LONG_ENOUGH));
    OK(fab_disconnect(pair.b, pair.to_a, LONG_ENOUGH));
    memset(pair.dst, GUARD, 16 * MIB);
    for (int i = 0; i < 20; i++) {
        int code = check_end(pair.a, open[i]);
        CHECK(!code || code == FAB_E_UNREACHABLE, "code %d: %s", code, fab_error_text());
    }
    /* It is barred: what it tries from its side is refused. */
    SAME(check_end(pair.a, fab_imm(pair.a, &pair.to_b, 1, pair.id, 0, -1)), FAB_E_UNREACHABLE);
    SAME(check_end(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, 9, pair.id, 0, -1)),
         FAB_E_UNREACHABLE);
    for (uint64_t k = 0; k < 16 * MIB; k++)
        CHECK(pair.dst[k] == GUARD, "written at %llu after disconnect", (unsigned long long)k);
    OK(fab_peer_get_info(pair.b, pair.to_a, &info));
    CHECK(info.state == FAB_P_DEAD && *info.text, "state %d", info.state);
    FAILS(FAB_E_UNREACHABLE,
          fab_counter_wait(pair.b, pair.counter, 0, &far, 1, LONG_ENOUGH, &pair.to_a, 1, NULL));
    OK(fab_disconnect(pair.b, pair.to_a, LONG_ENOUGH)); /* again: no harm */
    /* This side uses the address again, which lifts the bar. The other was told that we are unreachable, so
     * what is begun before we hear of that fails. */
    SAME(check_end(pair.b, fab_imm(pair.b, &pair.to_a, 1, 1, 0, -1)), FAB_E_FAILED);
    check_done(pair.b, fab_imm(pair.b, &pair.to_a, 1, 1, 0, -1));
    write_once(MIB, true);
    SAME(check_stats(pair.a).peers_up, 1);
}

/* The one that ends it comes back at once: the other must not confuse the two sessions. */
static void test_reconnect(void)
{
    for (int i = 0; i < 20; i++) {
        OK(fab_disconnect(pair.a, pair.to_b, LONG_ENOUGH));
        check_done(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, 100000, pair.id, 0, -1));
        check_count(pair.b, pair.counter, ++pair.count);
    }
}

struct side {
    fab_engine *engine;
    int64_t peer;
    pthread_barrier_t *start;
    char text[FAB_TEXT_MAX];
    int code;
};

static void *connect_side(void *arg)
{
    struct side *s = arg;
    pthread_barrier_wait(s->start);
    s->code = check_end(s->engine, fab_imm(s->engine, &s->peer, 1, 7, 0, -1));
    snprintf(s->text, sizeof s->text, "%s", s->code ? fab_error_text() : "");
    return NULL;
}

/* Both at the same moment, each through a thread of its own. */
static void connect_both_ways(int round)
{
    struct side sides[2] = {0};
    pthread_barrier_t start;
    pthread_t threads[2];
    pthread_barrier_init(&start, NULL, 2);
    for (int i = 0; i < 2; i++)
        sides[i] = (struct side){.engine = check_open(&config), .start = &start};
    for (int i = 0; i < 2; i++) {
        sides[i].peer = check_peer(sides[i].engine, sides[1 - i].engine);
        CHECK(!pthread_create(&threads[i], NULL, connect_side, &sides[i]), "no thread");
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) {
        CHECK(!sides[i].code, "round %d, side %d: %s", round, i, sides[i].text);
        int64_t c = OK(fab_counter_open(sides[i].engine, 7, 1));
        check_count(sides[i].engine, c, 1);
        SAME(check_stats(sides[i].engine).peers_lost, 0);
    }
    for (int i = 0; i < 2; i++)
        fab_engine_free(sides[i].engine);
    pthread_barrier_destroy(&start);
}

/* ---- statistics and the end of an engine ---- */

static void test_statistics(void)
{
    fab_stats before = check_stats(pair.a), other = check_stats(pair.b);
    fab_peer_info info;
    check_done(pair.a, fab_write(pair.a, pair.from, 0, pair.remote, 0, MIB, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    OK(fab_peer_get_info(pair.a, pair.to_b, &info));
    CHECK(info.state == FAB_P_UP && info.lanes && *info.provider, "state %d", info.state);
    fab_stats after = check_stats(pair.a);
    SAME(after.tx_ranges, before.tx_ranges + 1);
    SAME(after.tx_bytes, before.tx_bytes + MIB);
    CHECK(after.tx_pieces >= before.tx_pieces + info.lanes, "pieces over %u lanes", info.lanes);
    SAME(after.transfers_done, before.transfers_done + 1);
    SAME(check_stats(pair.b).rx_imms, other.rx_imms + info.lanes);
    SAME(after.transfers_live, 0);
    SAME(after.imm_stale, 0);
    SAME(after.regions, 1);
    SAME(fab_peer_list(pair.a, NULL, 0), 1);
    CHECK(info.outstanding == 0 && info.queued == 0, "work left");
}

static void test_closed(void)
{
    fab_engine *x = check_open(&config);
    int64_t peer = check_peer(x, pair.b), region = OK(fab_region_alloc(x, 4096, 0, -1, 1));
    int64_t remote = check_remote(x, peer, pair.b, pair.into), from;
    fab_region_info info;
    OK(fab_region_get_info(x, region, &info));
    check_done(x, fab_imm(x, &peer, 1, pair.id, 0, -1));
    check_count(pair.b, pair.counter, ++pair.count);
    OK(fab_engine_close(x, SECOND));
    OK(fab_engine_close(x, SECOND));
    FAILS(FAB_E_CLOSED, fab_write(x, region, 0, remote, 0, 1, pair.id, 0, -1));
    FAILS(FAB_E_CLOSED, fab_imm(x, &peer, 1, pair.id, 0, -1));
    FAILS(FAB_E_CLOSED, fab_send(x, peer, "", 0, -1));
    FAILS(FAB_E_CLOSED, fab_recv(x, &from, sizeof from, &from, -1));
    FAILS(FAB_E_CLOSED, fab_region_alloc(x, 4096, 0, -1, 1));
    FAILS(FAB_E_CLOSED, fab_disconnect(x, peer, -1));
    FAILS(FAB_E_CLOSED, fab_queue_open(x));
    FAILS(FAB_E_CLOSED, fab_accept_next(x, NULL, -1));
    fab_engine_free(x);
    memset((void *)(uintptr_t)info.base, 1, 4096); /* views of the memory outlive the engine */
    fab_unmap(info.base, info.mapped);
    write_once(4096, true); /* the others go on */
}

static void test_open(void)
{
    fab_engine_config bad = config;
    bad.provider = "pigeon";
    CHECK(!fab_engine_open(&bad) && fab_error_code() == FAB_E_INVALID, "%s", fab_error_text());
    bad = config;
    bad.peer_timeout_ns = MSEC;
    CHECK(!fab_engine_open(&bad) && fab_error_code() == FAB_E_INVALID, "%s", fab_error_text());
    bad = config;
    bad.cpu = 1 << 20;
    CHECK(!fab_engine_open(&bad) && fab_error_code() == FAB_E_INVALID, "%s", fab_error_text());
    bad = config;
    bad.nic_count = FAB_MAX_NICS + 1;
    CHECK(!fab_engine_open(&bad) && fab_error_code() == FAB_E_INVALID, "%s", fab_error_text());
}

static void run(const char *name, void (*test)(void))
{
    int64_t start = check_now();
    test();
    printf("  %-18s %lld ms\n", name, (long long)((check_now() - start) / MSEC));
}

#define RUN(test) run(#test + sizeof "test", test)

static void run_all(const char *provider, uint32_t nics, int rounds)
{
    config = check_config(provider, two_nics, nics);
    printf("%s, %u NICs\n", provider, nics);
    open_pair();
    RUN(test_writes);
    RUN(test_pages);
    RUN(test_scatter);
    RUN(test_immediates);
    RUN(test_bounds);
    RUN(test_sub_range);
    RUN(test_scatter_half_bad);
    RUN(test_registered);
    RUN(test_messages);
    RUN(test_back_pressure);
    RUN(test_queues);
    RUN(test_cancel);
    RUN(test_deregister);
    RUN(test_deregister_source);
    RUN(test_statistics);
    RUN(test_descriptors);
    RUN(test_stale_descriptor);
    RUN(test_secrets);
    RUN(test_accept);
    RUN(test_deadlines);
    RUN(test_disconnect);
    RUN(test_reconnect);
    RUN(test_closed);
    RUN(test_open);
    close_pair();
    int64_t start = check_now();
    for (int i = 0; i < rounds; i++)
        connect_both_ways(i);
    printf("  %-18s %lld ms\n", "both_ways", (long long)((check_now() - start) / MSEC));
}

int main(int argc, char **argv)
{
    fab_nic_info nics[FAB_MAX_NICS];
    check_begin(argc, argv);
    run_all("local", 1, 120);
    if (fab_list_nics("tcp", nics, FAB_MAX_NICS) < 0) {
        printf("tcp skipped: %s\n", fab_error_text());
        return SKIPPED;
    }
    run_all("tcp", 1, 50);
    run_all("tcp", 2, 30);
    return 0;
}
