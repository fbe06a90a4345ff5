/* What the C tests of the core share: checks that say file, line and the library's own words, a
 * seeded generator, and the steps that bring two engines together.
 *
 * A failed check ends the program with status 1. The seed is the first argument, or SEED of the
 * environment, or the clock; it is printed at the start.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fabric.h"

#define SECOND INT64_C(1000000000)
#define MSEC INT64_C(1000000)
#define LONG_ENOUGH (30 * SECOND) /* for what must happen, on a busy machine under a sanitizer */
#define SKIPPED 77

#define CHECK(condition, ...)                                                  \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fflush(stdout);                                                    \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
            fprintf(stderr, __VA_ARGS__);                                      \
            fprintf(stderr, " (seed %llu)\n", (unsigned long long)check_seed); \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

/* The call must succeed; its result. */
#define OK(call) check_ok((int64_t)(call), #call, __FILE__, __LINE__)
/* The call must fail with this code, and say why. */
#define FAILS(code, call) check_fails(code, (int64_t)(call), #call, __FILE__, __LINE__)
/* Two integers must be the same. */
#define SAME(a, b) check_same((uint64_t)(a), (uint64_t)(b), #a, #b, __FILE__, __LINE__)

static uint64_t check_seed, check_state;

static inline int64_t check_ok(int64_t result, const char *call, const char *file, int line)
{
    if (result < 0) {
        fprintf(stderr, "%s:%d: %s: %lld: %s (seed %llu)\n", file, line, call, (long long)result,
                fab_error_text(), (unsigned long long)check_seed);
        exit(1);
    }
    return result;
}

static inline void check_fails(int64_t code, int64_t result, const char *call, const char *file,
                               int line)
{
    if (result == code && *fab_error_text())
        return;
    fprintf(stderr, "%s:%d: %s: %lld, not %lld: %s (seed %llu)\n", file, line, call,
            (long long)result, (long long)code, result < 0 ? fab_error_text() : "it succeeded",
            (unsigned long long)check_seed);
    exit(1);
}

static inline void check_same(uint64_t a, uint64_t b, const char *left, const char *right,
                              const char *file, int line)
{
    if (a == b)
        return;
    fprintf(stderr, "%s:%d: %s is %llu, %s is %llu (seed %llu)\n", file, line, left,
            (unsigned long long)a, right, (unsigned long long)b, (unsigned long long)check_seed);
    exit(1);
}

static inline int64_t check_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * SECOND + t.tv_nsec;
}

static inline void check_sleep(int64_t ns)
{
    struct timespec t = {.tv_sec = ns / SECOND, .tv_nsec = ns % SECOND};
    nanosleep(&t, NULL);
}

/* splitmix64, with a state of the caller's: one for each thread. */
static inline uint64_t check_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint64_t check_random(uint64_t below)
{
    return check_next(&check_state) % below;
}

static inline void check_begin(int argc, char **argv)
{
    const char *text = argc > 1 ? argv[1] : getenv("SEED");
    check_seed = text ? strtoull(text, NULL, 0) : (uint64_t)check_now();
    check_state = check_seed;
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("seed %llu\n", (unsigned long long)check_seed);
}

/* A pattern that repeats nowhere near: eight bytes of it for each word. */
static inline void check_paint(uint8_t *at, uint64_t length, uint64_t salt)
{
    for (uint64_t i = 0; i < length; i += 8) {
        uint64_t state = salt + i, word = check_next(&state);
        memcpy(at + i, &word, length - i < 8 ? length - i : 8);
    }
}

/* ---- engines ---- */

static inline fab_engine_config check_config(const char *provider, const char *const *nics,
                                             uint32_t count)
{
    return (fab_engine_config){.provider = provider,
                               .nics = nics,
                               .nic_count = count,
                               .spin_us = 50,
                               .cpu = -1,
                               .peer_timeout_ns = 10 * SECOND};
}

static inline fab_engine *check_open(const fab_engine_config *config)
{
    fab_engine *e = fab_engine_open(config);
    CHECK(e, "%s: %s", config->provider, fab_error_text());
    return e;
}

/* The handle under which `from` knows `to`. */
static inline int64_t check_peer(fab_engine *from, fab_engine *to)
{
    fab_engine_info info;
    fab_nic_info nics[FAB_MAX_NICS];
    OK(fab_engine_get_info(to, &info));
    for (uint32_t i = 0; i < info.nic_count; i++)
        OK(fab_engine_nic(to, i, &nics[i]));
    fab_peer_address address = {.label = info.label, .nic_count = info.nic_count, .nics = nics};
    memcpy(address.id, info.id, sizeof address.id);
    return OK(fab_peer_add(from, &address));
}

static inline fab_descriptor check_describe(const fab_region_info *info)
{
    return (fab_descriptor){.region = info->region,
                            .secret = info->secret,
                            .length = info->length,
                            .kind = info->kind,
                            .device = info->device,
                            .key_count = info->key_count,
                            .keys = info->keys};
}

/* `owner`'s region as a destination of `from`'s. */
static inline int64_t check_remote(fab_engine *from, int64_t peer, fab_engine *owner,
                                   int64_t region)
{
    fab_region_info info;
    OK(fab_region_get_info(owner, region, &info));
    fab_descriptor d = check_describe(&info);
    return OK(fab_remote_add(from, peer, &d));
}

static inline uint8_t *check_base(fab_engine *e, int64_t region)
{
    fab_region_info info;
    OK(fab_region_get_info(e, region, &info));
    return (uint8_t *)(uintptr_t)info.base;
}

/* Waits for the transfer's success, and lets go of it. */
static inline void check_done(fab_engine *e, int64_t transfer)
{
    OK(transfer);
    OK(fab_transfer_wait(e, transfer, LONG_ENOUGH));
    OK(fab_transfer_release(e, transfer));
}

/* A submission that is refused at once or ends with a failure: its code. */
static inline int check_end(fab_engine *e, int64_t transfer)
{
    if (transfer < 0)
        return (int)transfer;
    int code = fab_transfer_wait(e, transfer, LONG_ENOUGH);
    OK(fab_transfer_release(e, transfer));
    return code;
}

static inline void check_count(fab_engine *e, int64_t counter, uint64_t target)
{
    OK(fab_counter_wait(e, counter, 0, &target, 1, LONG_ENOUGH, NULL, 0, NULL));
    SAME(fab_counter_value(e, counter, 0), target);
}

static inline fab_stats check_stats(fab_engine *e)
{
    fab_stats stats;
    OK(fab_engine_stats(e, &stats));
    return stats;
}

#endif
