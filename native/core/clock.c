/* Time and chance: the kernel's, or those of a simulated world (providers/sim.h). */
#include <errno.h>
#include <sys/random.h>
#include <time.h>

#include "engine.h"

static int64_t (*simulated_now)(void);
static int (*simulated_random)(void *out, size_t length);

void fab_time_is(int64_t (*now)(void), int (*random)(void *out, size_t length))
{
    simulated_now = now;
    simulated_random = random;
}

int64_t fab_now(void)
{
    struct timespec t;
    if (simulated_now)
        return simulated_now();
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * NS_PER_S + t.tv_nsec;
}

int64_t fab_time_ns(void)
{
    return fab_now();
}

int fab_random(void *out, size_t length)
{
    if (simulated_random)
        return simulated_random(out, length);
    return getrandom(out, length, 0) == (ssize_t)length ? 0 : -errno;
}
