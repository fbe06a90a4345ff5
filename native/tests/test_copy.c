/* fab_local_copy(): every byte arrives and none beside it changes, for all counts of spans, lengths and
 * alignments, in the cache and past it.
 *
 * test_copy [seed]
 */
#include <errno.h>

#include "check.h"
#include "providers/local_copy.h"

#define ROUNDS 3000
#define MOST (UINT64_C(300) << 10)
#define ROOM (MOST + 4096) /* for each span, with some left on both sides */

static uint8_t *from, *to, *expected;

static uint64_t some_length(void)
{
    uint64_t most = check_random(4) ? MOST : 2 * LOCAL_BULK;
    uint64_t length = 1 + check_random(most);
    return check_random(2) ? length : (length + 63) / 64 * 64;
}

static uint64_t some_offset(void)
{
    return check_random(2) ? 64 * check_random(16) : check_random(1024);
}

static void copy_once(struct local_cache *cache)
{
    struct local_span spans[LOCAL_SPANS];
    int count = 1 + (int)check_random(LOCAL_SPANS);
    uint64_t length = some_length();
    for (int i = 0; i < count; i++) {
        uint64_t base = (uint64_t)i * ROOM, at = base + some_offset();
        spans[i] = (struct local_span){to + at, from + base + some_offset()};
        memcpy(expected + at, spans[i].from, length);
    }
    fab_local_copy(cache, spans, count, length);
    for (int i = 0; i < count; i++) {
        uint64_t base = (uint64_t)i * ROOM;
        CHECK(!memcmp(to + base, expected + base, ROOM), "%d spans of %llu bytes: span %d differs",
              count, (unsigned long long)length, i);
    }
}

static void test_all_lengths(const char *cache_bytes)
{
    struct local_cache cache;
    setenv("FABRIC_LOCAL_CACHE", cache_bytes, 1);
    OK(fab_local_cache_open(&cache));
    for (int i = 0; i < ROUNDS; i++)
        copy_once(&cache);
    fab_local_cache_close(&cache);
    printf("  FABRIC_LOCAL_CACHE=%s ok\n", cache_bytes);
}

static void test_bad_settings(void)
{
    static const char *const bad[] = {"-1", "1k", "1073741825", "0x10", " "};
    struct local_cache cache;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        setenv("FABRIC_LOCAL_CACHE", bad[i], 1);
        CHECK(fab_local_cache_open(&cache) == -EINVAL, "'%s' was taken", bad[i]);
    }
    unsetenv("FABRIC_LOCAL_CACHE");
}

int main(int argc, char **argv)
{
    check_begin(argc, argv);
    from = malloc(LOCAL_SPANS * ROOM);
    to = malloc(LOCAL_SPANS * ROOM);
    expected = malloc(LOCAL_SPANS * ROOM);
    CHECK(from && to && expected, "out of memory");
    check_paint(from, LOCAL_SPANS * ROOM, check_seed);
    memset(to, 0, LOCAL_SPANS * ROOM);
    memset(expected, 0, LOCAL_SPANS * ROOM);
    test_all_lengths("0"); /* past the cache, nearly always */
    test_all_lengths("16777216"); /* in turns */
    test_bad_settings();
    free(from);
    free(to);
    free(expected);
    return 0;
}
