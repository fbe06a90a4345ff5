/* The control file: faults are set in it at run time, and each process counts in a slot of its own.
 * $EFA_EMULATOR_DIR/control; without that variable there are no devices. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "emulator.h"

enum { HEAD_BYTES = 4096, SLOT_BYTES = 256, SLOTS = 1024 };

struct slot {
    uint32_t pid, reserved;
    uint64_t counters[COUNTERS];
};

_Static_assert(sizeof(struct slot) <= SLOT_BYTES, "a slot holds all counters");

struct control *efa_control;
static struct slot *slot;
static uint64_t generator;

static void fail(const char *what)
{
    perror(what);
    abort();
}

void efa_control_open(void)
{
    const char *folder = getenv("EFA_EMULATOR_DIR");
    char path[4096];

    if (!folder)
        return;
    (void)snprintf(path, sizeof path, "%s/control", folder);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    efa_control =
        mmap(NULL, HEAD_BYTES + SLOTS * SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (efa_control == MAP_FAILED)
        fail("efa-emulator: mapping the control file");
    (void)close(fd);
    uint32_t at = __atomic_fetch_add(&efa_control->processes, 1, __ATOMIC_SEQ_CST);
    if (at >= SLOTS) /* later ones share the last */
        at = SLOTS - 1;
    slot = (struct slot *)((uint8_t *)efa_control + HEAD_BYTES + (size_t)at * SLOT_BYTES);
    slot->pid = (uint32_t)getpid();
    generator = efa_control->seed + at * 0x9e3779b97f4a7c15u;
}

void efa_count(enum counter counter, uint64_t by)
{
    __atomic_fetch_add(&slot->counters[counter], by, __ATOMIC_RELAXED);
}

void efa_count_most(enum counter counter, uint64_t value)
{
    if (value > slot->counters[counter])
        slot->counters[counter] = value;
}

bool efa_device_gone(const struct device *device)
{
    bool listed = efa_control->gone >> device->index & 1;

    return listed && (!efa_control->gone_pid || efa_control->gone_pid == (uint32_t)getpid());
}

/* splitmix64 */
uint64_t efa_random(void)
{
    uint64_t z = generator += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

bool efa_chance(uint32_t of_a_million)
{
    return of_a_million && efa_random() % 1000000 < of_a_million;
}

uint64_t efa_now(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
