/* Copies past the cache; the contract is in local_copy.h. */
#include "local_copy.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "provider.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LINE 64
#define STRIDE 128 /* bytes of one span before the next span has its turn */

/* ---- what is in the cache ---- */

int fab_local_cache_open(struct local_cache *cache)
{
    const char *text = getenv("FABRIC_LOCAL_CACHE");
    uint64_t bytes = LOCAL_WARM, blocks = 1;
    if (text && *text) {
        char *end;
        bytes = strtoull(text, &end, 10);
        if (*end || *text < '0' || *text > '9' || bytes > LOCAL_WARM_MAX) {
            fab_fail_text("FABRIC_LOCAL_CACHE is '%s', and not a number of bytes, 0 to %llu", text,
                          (unsigned long long)LOCAL_WARM_MAX);
            return -EINVAL;
        }
    }
    while (blocks << LOCAL_BLOCK_BITS < bytes)
        blocks *= 2;
    cache->mask = blocks - 1;
    cache->blocks = calloc(blocks, sizeof *cache->blocks);
    return cache->blocks ? 0 : -ENOMEM;
}

void fab_local_cache_close(struct local_cache *cache)
{
    free(cache->blocks);
    cache->blocks = NULL;
}

#if defined(__x86_64__)

/* True where most of it was written lately; remembers that it is written now. */
static bool is_warm(struct local_cache *cache, const uint8_t *to, uint64_t length)
{
    uint64_t first = (uint64_t)(uintptr_t)to >> LOCAL_BLOCK_BITS;
    uint64_t last = ((uint64_t)(uintptr_t)to + length - 1) >> LOCAL_BLOCK_BITS, known = 0;
    for (uint64_t block = first; block <= last; block++) {
        uint64_t *entry = &cache->blocks[block & cache->mask];
        known += *entry == block;
        *entry = block;
    }
    return 2 * known > last - first + 1;
}

/* ---- streams: `bytes` of each span, destinations on whole lines ---- */

__attribute__((target("avx512f"))) static void stream_512(struct local_span *spans, int count,
                                                          uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += STRIDE)
        for (int i = 0; i < count; i++) {
            __m512i a = _mm512_loadu_si512((const void *)(spans[i].from + at));
            __m512i b = _mm512_loadu_si512((const void *)(spans[i].from + at + 64));
            _mm512_stream_si512((void *)(spans[i].to + at), a);
            _mm512_stream_si512((void *)(spans[i].to + at + 64), b);
        }
}

__attribute__((target("avx2"))) static void stream_256(struct local_span *spans, int count,
                                                       uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += STRIDE)
        for (int i = 0; i < count; i++)
            for (uint64_t k = at; k < at + STRIDE; k += 64) {
                __m256i a = _mm256_loadu_si256((const void *)(spans[i].from + k));
                __m256i b = _mm256_loadu_si256((const void *)(spans[i].from + k + 32));
                _mm256_stream_si256((void *)(spans[i].to + k), a);
                _mm256_stream_si256((void *)(spans[i].to + k + 32), b);
            }
}

typedef void stream_fn(struct local_span *, int, uint64_t);

static stream_fn *best_stream(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") ? stream_512
           : __builtin_cpu_supports("avx2")  ? stream_256
                                             : NULL;
}

static void advance(struct local_span *span, uint64_t bytes)
{
    memcpy(span->to, span->from, bytes);
    span->to += bytes;
    span->from += bytes;
}

/* Up to LOCAL_SPANS spans, a line or longer. */
static void stream(stream_fn *move, struct local_span *spans, int count, uint64_t length)
{
    uint64_t heads[LOCAL_SPANS], most = 0;
    for (int i = 0; i < count; i++) {
        heads[i] = -(uint64_t)(uintptr_t)spans[i].to % LINE;
        most = heads[i] > most ? heads[i] : most;
        advance(&spans[i], heads[i]);
    }
    uint64_t body = (length - most) / STRIDE * STRIDE;
    move(spans, count, body);
    for (int i = 0; i < count; i++)
        memcpy(spans[i].to + body, spans[i].from + body, length - heads[i] - body);
}

/* Cuts few long spans into more. */
static int divide(struct local_span *out, const struct local_span *spans, int count,
                  uint64_t *length)
{
    int parts = LOCAL_SPANS / count;
    uint64_t part = *length / (uint64_t)parts / LINE * LINE;
    for (int i = 0; i < count; i++) {
        struct local_span rest = spans[i];
        for (int k = 0; k < parts; k++) {
            out[i * parts + k] = rest;
            rest.to += part;
            rest.from += part;
        }
        memcpy(rest.to, rest.from, *length - (uint64_t)parts * part);
    }
    *length = part;
    return count * parts;
}

static bool copy_past(struct local_cache *cache, const struct local_span *spans, int count,
                      uint64_t length)
{
    static stream_fn *_Atomic chosen;
    stream_fn *move = chosen;
    if (!move)
        chosen = move = best_stream();
    if (!move)
        return false;
    int warm = 0;
    for (int i = 0; i < count; i++)
        warm += is_warm(cache, spans[i].to, length);
    if (2 * warm > count)
        return false;
    struct local_span parts[LOCAL_SPANS];
    count = divide(parts, spans, count, &length);
    stream(move, parts, count, length);
    _mm_sfence(); /* these stores are ordered by nothing else */
    return true;
}

#else

static bool copy_past(struct local_cache *cache, const struct local_span *spans, int count,
                      uint64_t length)
{
    (void)cache, (void)spans, (void)count, (void)length;
    return false;
}

#endif

void fab_local_copy(struct local_cache *cache, const struct local_span *spans, int count,
                    uint64_t length)
{
    if (length * (uint64_t)count >= LOCAL_BULK && copy_past(cache, spans, count, length))
        return;
    for (int i = 0; i < count; i++)
        memcpy(spans[i].to, spans[i].from, length);
}
