/* The libfabric provider on tcp, driven as the core drives it: two processes on loopback.
 *
 * Every test forks a target before anything is opened; parent and child talk over a socket pair
 * (blobs, keys, steps) while they keep polling. test_ofi [name] runs one test (speed only so);
 * SEED=n repeats a run; FABRIC_LIBFABRIC names another library. Exit status 77: no libfabric here.
 * PROVIDER=rxm runs on rxe0 and rxe1 of the SoftRoCE guest (tests/softroce/run) what is not about tcp
 * alone: frames, orphan and stopped are.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/log.h"
#include "providers/provider.h"

enum { MAX_SIDE_NICS = 2, MAX_SIDE_LANES = 8, HELLO = 1, WELCOME, BYE, DATA, REFUSE };

#define MIB (1u << 20)
#define BUFFER (64u * MIB + 8192)
#define TEST_SECONDS 60

#define CHECK(condition, ...)                                                              \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: %s: %s: ", __FILE__, __LINE__, side.role, #condition); \
            fprintf(stderr, __VA_ARGS__);                                                  \
            fprintf(stderr, "\n");                                                         \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

struct frame {
    uint32_t type;
    uint32_t lane;
    uint32_t blob_len;
    uint32_t number;
    uint8_t blob[FAB_BLOB_MAX];
};

struct end { /* what the core keeps of a lane */
    struct fab_lane *lane;
    bool up;
    bool bye;
    int down;
    uint64_t taken;
    uint64_t completed;
    uint64_t failed;
    uint64_t imms;
    uint64_t frames;
};

struct remote {
    fab_key key[MAX_SIDE_NICS];
    uint8_t blob[MAX_SIDE_NICS][FAB_BLOB_MAX];
    uint32_t blob_len;
};

static struct {
    const char *role;
    int oob;
    uint32_t nics;
    bool refuse;
    struct fab_nic *nic[MAX_SIDE_NICS];
    struct fab_mr *mr[MAX_SIDE_NICS];
    uint8_t *memory;
    struct end ends[MAX_SIDE_LANES];
    uint32_t lanes;
    uint32_t imm_last;
    uint32_t imm_wrong;
    uint32_t refused;
    struct remote peer;
} side;

static const struct fab_provider *provider = &fab_provider_tcp;
static const char *nic_names[MAX_SIDE_NICS] = {"lo", "lo"};
static unsigned long seed;
static pid_t target_pid; /* of the target, in the initiator */

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint32_t noise(uint64_t x) /* a byte pattern that repeats nowhere near */
{
    x = (x + seed) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(x >> 40);
}

static void paint(uint8_t *at, uint64_t length, uint64_t salt)
{
    for (uint64_t i = 0; i < length; i++)
        at[i] = (uint8_t)noise(i + salt);
}

static uint64_t first_difference(const uint8_t *at, uint64_t length, uint64_t salt)
{
    for (uint64_t i = 0; i < length; i++)
        if (at[i] != (uint8_t)noise(i + salt))
            return i;
    return length;
}

/* ---- sink ---- */

static struct end *end_of(const struct fab_lane *lane)
{
    return lane->peer;
}

static void on_imm(struct fab_lane *lane, uint32_t imm, uint32_t times)
{
    end_of(lane)->imms += times;
    side.imm_wrong += imm != side.imm_last + 1;
    side.imm_last = imm;
}

static void on_completed(struct fab_lane *lane, uint64_t wr_id, int status)
{
    struct end *end = end_of(lane);

    CHECK(wr_id < end->taken, "wr_id %lu was never taken", (unsigned long)wr_id);
    end->completed++;
    end->failed += status != 0;
}

static void send_frame(struct end *end, uint32_t type, uint32_t number)
{
    struct frame frame = {.type = type, .number = number, .lane = (uint32_t)(end - side.ends)};

    frame.blob_len = end->lane->blob_len;
    memcpy(frame.blob, end->lane->blob, sizeof(frame.blob));
    int rc = provider->lane_send(end->lane, (const uint8_t *)&frame, sizeof(frame), NULL);
    CHECK(rc == 0, "frame %u: %d", type, rc);
}

static void on_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    struct end *end = end_of(lane);
    struct frame frame;

    CHECK(fd == -1, "a file descriptor");
    if (length != sizeof(frame)) {
        CHECK(length == FAB_FRAME_MAX, "a frame of %u bytes", length);
        CHECK(first_difference(bytes, length, end->frames) == length, "frame content");
        end->frames++;
        return;
    }
    memcpy(&frame, bytes, sizeof(frame));
    if (frame.type == WELCOME && !end->up) {
        CHECK(provider->lane_connect(lane, frame.blob, frame.blob_len) == 0, "lane_connect");
        end->up = true;
    }
    end->bye |= frame.type == BYE;
    side.refused += frame.type == REFUSE;
    end->frames += frame.type == DATA;
}

static void on_hello(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                     uint32_t length)
{
    struct frame frame;

    CHECK(length == sizeof(frame), "a first frame of %u bytes", length);
    memcpy(&frame, bytes, sizeof(frame));
    struct end *end = &side.ends[frame.lane];
    if (side.refuse) {
        struct frame no = {.type = REFUSE};
        int rc = provider->origin_reply(nic, origin, frame.blob, frame.blob_len,
                                        (const uint8_t *)&no, sizeof(no));
        CHECK(rc == 0, "origin_reply %d", rc);
        provider->origin_drop(nic, origin);
        return;
    }
    if (end->lane) { /* sent again */
        send_frame(end, WELCOME, 0);
        return;
    }
    CHECK(provider->lane_open(nic, origin, &end->lane) == 0, "%s", fab_take_reason(0));
    end->lane->peer = end;
    CHECK(provider->lane_connect(end->lane, frame.blob, frame.blob_len) == 0, "lane_connect");
    end->up = true;
    send_frame(end, WELCOME, 0);
}

static void on_lane_down(struct fab_lane *lane, int error, const char *text)
{
    CHECK(error < 0 && *text, "error %d, text '%s'", error, text);
    CHECK(end_of(lane)->down++ == 0, "reported twice");
}

static void on_origin_gone(struct fab_nic *nic, struct fab_origin *origin)
{
    CHECK(!nic && !origin, "this provider has no origins");
}

static const struct fab_sink sink = {
    .imm = on_imm,
    .completed = on_completed,
    .frame = on_frame,
    .hello = on_hello,
    .lane_down = on_lane_down,
    .origin_gone = on_origin_gone,
};

/* ---- one side ---- */

static void progress(void)
{
    for (uint32_t i = 0; i < side.nics; i++)
        CHECK(provider->poll(side.nic[i], 256) >= 0, "poll");
}

static void run_for(double seconds)
{
    for (double end = now() + seconds; now() < end;)
        progress();
}

#define UNTIL(condition)                                    \
    do {                                                    \
        double until = now() + 20;                          \
        while (!(condition)) {                              \
            progress();                                     \
            CHECK(now() < until, "did not happen in 20 s"); \
        }                                                   \
    } while (0)

static void tell(uint64_t value)
{
    CHECK(write(side.oob, &value, sizeof(value)) == sizeof(value), "oob: %s", strerror(errno));
}

/* What the other side says next; progress goes on meanwhile. */
static uint64_t hear(void)
{
    struct pollfd fd = {.fd = side.oob, .events = POLLIN};
    uint64_t value = 0;

    while (poll(&fd, 1, 0) == 0)
        progress();
    CHECK(read(side.oob, &value, sizeof(value)) == sizeof(value), "the other side is gone");
    return value;
}

static void open_side(uint32_t nics)
{
    side.nics = nics;
    side.memory = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(side.memory != MAP_FAILED, "mmap");
    struct remote mine = {.blob_len = 0};
    for (uint32_t i = 0; i < nics; i++) {
        struct fab_nic_options options = {.sink = &sink, .index = i};
        struct fab_memory memory = {
            .base = side.memory, .length = BUFFER, .memfd = -1, .dmabuf_fd = -1};
        options.name = nic_names[target_pid ? i : 1 - i]; /* so that bytes cross the link */
        int rc = provider->nic_open(&options, &side.nic[i]);
        CHECK(rc == 0, "%d %s", rc, fab_take_reason(0));
        rc = provider->mr_reg(side.nic[i], &memory, &side.mr[i], &mine.key[i]);
        CHECK(rc == 0, "%d %s", rc, fab_take_reason(0));
        memcpy(mine.blob[i], side.nic[i]->info.blob, FAB_BLOB_MAX);
        mine.blob_len = side.nic[i]->info.blob_len;
    }
    CHECK(write(side.oob, &mine, sizeof(mine)) == sizeof(mine), "oob");
    CHECK(recv(side.oob, &side.peer, sizeof(mine), MSG_WAITALL) == sizeof(mine), "oob");
}

static struct end *start_lane(uint32_t nic)
{
    struct end *end = &side.ends[side.lanes++];

    memset(end, 0, sizeof(*end));
    int rc = provider->lane_open(side.nic[nic], NULL, &end->lane);
    CHECK(rc == 0, "%d %s", rc, fab_take_reason(0));
    end->lane->peer = end;
    rc = provider->lane_connect(end->lane, side.peer.blob[nic], side.peer.blob_len);
    CHECK(rc == 0, "%d %s", rc, fab_take_reason(0));
    send_frame(end, HELLO, 0);
    return end;
}

static struct end *connect_lane(uint32_t nic)
{
    struct end *end = start_lane(nic);

    UNTIL(end->up);
    return end;
}

static void close_end(struct end *end)
{
    CHECK(provider->lane_close(end->lane) == 0, "lane_close");
    CHECK(end->completed == end->taken, "%lu of %lu reported", (unsigned long)end->completed,
          (unsigned long)end->taken);
    end->lane = NULL;
}

static void close_side(void)
{
    for (uint32_t i = 0; i < MAX_SIDE_LANES; i++)
        if (side.ends[i].lane)
            close_end(&side.ends[i]);
    for (uint32_t i = 0; i < side.nics; i++) {
        CHECK(provider->mr_dereg(side.nic[i], side.mr[i]) == 0, "mr_dereg");
        provider->nic_close(side.nic[i]);
    }
    munmap(side.memory, BUFFER);
}

static struct fab_wr wr_of(const struct end *end, uint64_t src, uint64_t dst, uint64_t length)
{
    uint32_t nic = end->lane->nic->index;

    return (struct fab_wr){
        .wr_id = end->taken,
        .src = side.memory + src,
        .mr = side.mr[nic],
        .addr = side.peer.key[nic].addr + dst,
        .rkey = side.peer.key[nic].rkey,
        .length = length,
        .flags = FAB_WR_IMM,
    };
}

/* Posts one write, polling while there is no room. */
static void put(struct end *end, uint64_t src, uint64_t dst, uint64_t length, uint32_t imm)
{
    struct fab_wr wr = wr_of(end, src, dst, length);
    int rc;

    wr.imm = imm;
    while ((rc = provider->post(end->lane, &wr, 1)) == 0)
        progress();
    CHECK(rc == 1, "post %d", rc);
    end->taken++;
}

static uint32_t open_fds(void)
{
    uint32_t count = 0;

    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* ---- tests: each an initiator and a target ---- */

static const uint64_t sizes[] = {0, 1, 4095, 16385, MIB, 64 * MIB};
enum { SIZES = sizeof(sizes) / sizeof(sizes[0]) };

static void sizes_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    for (uint32_t i = 0; i < SIZES; i++) {
        paint(side.memory, sizes[i], i);
        put(end, 0, 4096, sizes[i], i + 1);
        UNTIL(end->completed == end->taken);
        CHECK(end->failed == 0, "a write failed");
        tell(i); /* complete means visible there, so the other side looks now */
        hear();
    }
    close_side();
}

static void sizes_target(void)
{
    open_side(1);
    for (uint32_t i = 0; i < SIZES; i++) {
        uint8_t *at = side.memory + 4096;
        hear();
        CHECK(first_difference(at, sizes[i], i) == sizes[i], "size %lu differs",
              (unsigned long)sizes[i]);
        CHECK(at[-1] == 0 && at[sizes[i]] == 0, "bytes beside the range changed");
        UNTIL(side.ends[0].imms == i + 1);
        CHECK(side.imm_wrong == 0, "a wrong immediate");
        memset(at, 0, sizes[i]);
        tell(0);
    }
    close_side();
}

#if defined(__SANITIZE_ADDRESS__)
/* libfabric 1.17 keeps some 700 bytes of every endpoint that was closed. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libfabric.so";
}
#endif

enum { PAGES = 1000, PAGE = 4096 };

static uint32_t page_place(uint32_t i)
{
    return (i * 379 + (uint32_t)(seed % PAGES)) % PAGES; /* 379 and 1000 share no factor */
}

static void pages_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    struct fab_wr wrs[32];
    paint(side.memory, PAGES * PAGE, 7);
    for (uint32_t i = 0; i < PAGES;) {
        int n = 0;
        for (; n < 32 && i + (uint32_t)n < PAGES; n++) {
            uint32_t page = i + (uint32_t)n;
            wrs[n] = wr_of(end, (uint64_t)page * PAGE, (uint64_t)page_place(page) * PAGE, PAGE);
            wrs[n].wr_id += (uint64_t)n;
            wrs[n].imm = page + 1;
        }
        int rc = provider->post(end->lane, wrs, n);
        CHECK(rc >= 0, "post %d", rc);
        i += (uint32_t)rc;
        end->taken += (uint64_t)rc;
        progress();
    }
    UNTIL(end->completed == PAGES);
    tell(0);
    hear();
    close_side();
}

static void pages_target(void)
{
    open_side(1);
    hear(); /* complete: the bytes are here; the immediates may still wait to be polled */
    UNTIL(side.ends[0].imms == PAGES);
    CHECK(side.imm_wrong == 0, "immediates were reordered");
    for (uint32_t i = 0; i < PAGES; i++)
        CHECK(first_difference(side.memory + (uint64_t)page_place(i) * PAGE, PAGE,
                               7 + (uint64_t)i * PAGE) == PAGE,
              "page %u", i);
    tell(0);
    close_side();
}

static void two_nics_initiator(void)
{
    open_side(2);
    struct end *a = connect_lane(0);
    struct end *b = connect_lane(1);
    paint(side.memory, 2 * MIB, 3);
    for (uint32_t i = 0; i < 16; i++)
        put(i % 2 ? b : a, i * 131072, i * 131072, 131072, i);
    UNTIL(a->completed == 8 && b->completed == 8);
    tell(0);
    hear();
    close_end(a); /* the other lane lives on */
    put(b, 0, 2 * MIB, MIB, 99);
    UNTIL(b->completed == 9);
    CHECK(b->failed == 0, "the other lane suffered");
    tell(0);
    hear();
    close_side();
}

static void two_nics_target(void)
{
    open_side(2);
    hear();
    UNTIL(side.ends[0].imms == 8 && side.ends[1].imms == 8);
    CHECK(first_difference(side.memory, 2 * MIB, 3) == 2 * MIB, "content");
    tell(0);
    hear();
    CHECK(first_difference(side.memory + 2 * MIB, MIB, 3) == MIB, "content");
    tell(0);
    close_side();
}

static void window_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    uint32_t taken = 0;
    tell(0); /* the target sleeps now */
    for (int empty = 0; empty < 1000; empty++) {
        struct fab_wr wr = wr_of(end, 0, 0, 8);
        int rc = provider->post(end->lane, &wr, 1);
        CHECK(rc >= 0, "post %d", rc);
        taken += (uint32_t)rc;
        end->taken += (uint64_t)rc;
    }
    CHECK(taken == end->lane->window, "%u taken, the window is %u", taken, end->lane->window);
    UNTIL(end->completed == end->taken);
    tell(0);
    hear();
    close_side();
}

static void window_target(void)
{
    open_side(1);
    hear();
    usleep(300000);
    hear();
    UNTIL(side.ends[0].imms == 128);
    tell(0);
    close_side();
}

static void kill_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    double start;
    for (int i = 0; i < 40; i++)
        put(end, 0, 0, MIB, 1);
    UNTIL(end->completed > 4);
    CHECK(end->completed < end->taken, "too fast");
    kill(target_pid, SIGKILL);
    start = now();
    while (!end->down) {
        struct fab_wr wrs[3] = {wr_of(end, 0, 0, MIB), wr_of(end, 0, 0, 8), wr_of(end, 0, 0, 64)};
        wrs[1].wr_id++;
        wrs[2].wr_id += 2;
        int rc = provider->post(end->lane, wrs, 3);
        end->taken += rc > 0 ? (uint64_t)rc : 0;
        progress();
        CHECK(now() < start + 5, "death was not noticed");
    }
    UNTIL(end->completed == end->taken);
    CHECK(end->failed > 0, "nothing failed");
    start = now();
    close_end(end);
    CHECK(now() - start < 0.05, "closing to a dead peer took %.3f s", now() - start);
    end = start_lane(0); /* nobody there: stays unconnected, disturbs nobody */
    run_for(0.2);
    CHECK(!end->up && !end->down, "connected to the dead");
    CHECK(provider->arm(side.nic[0]) >= 0, "arm");
    provider->disarm(side.nic[0]);
    close_side();
}

static void serve_forever(void)
{
    open_side(1);
    for (;;)
        progress();
}

static void write_until_fenced(uint64_t length)
{
    open_side(1);
    struct end *end = connect_lane(0);
    for (uint64_t round = 1; !end->down; round++) {
        struct fab_wr wr = wr_of(end, 0, 0, length);
        memset(side.memory, (int)(round & 0xff), 64);
        int rc = provider->post(end->lane, &wr, 1);
        end->taken += rc == 1;
        if (rc < 0)
            break;
        progress();
    }
    UNTIL(end->completed == end->taken);
    CHECK(end->down == 1 && end->failed > 0, "the fence was not noticed");
    struct fab_wr wr = wr_of(end, 0, 0, 8);
    CHECK(provider->post(end->lane, &wr, 1) < 0, "posted on a broken lane");
    hear();
    close_side();
}

static void fence_initiator(void)
{
    write_until_fenced(4 * MIB);
}

/* Closing while one immediate follows the other. */
static void hail_initiator(void)
{
    write_until_fenced(8);
}

static void fence_target(void)
{
    open_side(1);
    uint8_t *copy = malloc(4 * MIB);
    UNTIL(side.ends[0].imms > 10);
    run_for(0.003 + (double)(seed % 97) * 1e-4);
    close_end(&side.ends[0]);
    memcpy(copy, side.memory, 4 * MIB);
    for (int i = 0; i < 300; i++) {
        run_for(0.001);
        CHECK(memcmp(copy, side.memory, 4 * MIB) == 0, "bytes landed after the fence");
    }
    free(copy);
    tell(0);
    close_side();
}

/* A bad key makes libfabric drop the connection, with both processes alive, and make another. */
static void dropped_initiator(void)
{
    struct fab_wr wrs[12];

    open_side(1);
    struct end *end = connect_lane(0);
    put(end, 0, 0, 64, 1);
    for (int i = 0; i < 12; i++) {
        wrs[i] = wr_of(end, 0, 0, 4096);
        wrs[i].wr_id += (uint64_t)i;
        wrs[i].imm = (uint32_t)i + 2;
    }
    wrs[5].rkey ^= 0x5555;
    CHECK(provider->post(end->lane, wrs, 12) == 12, "post");
    end->taken += 12;
    UNTIL(end->down && end->completed == end->taken);
    CHECK(end->failed > 0, "the bad key was no failure");
    CHECK(provider->post(end->lane, wrs, 1) < 0, "posted on a broken lane");
    tell(end->completed - end->failed);
    send_frame(end, BYE, 0); /* goes out on a connection of its own */
    hear();
    close_end(end);
    side.lanes = 1;
    end = connect_lane(0); /* the NIC lives on */
    put(end, 0, 0, 4096, 1);
    UNTIL(end->completed == 1 && !end->failed);
    tell(0);
    close_side();
}

static void dropped_target(void)
{
    struct end *end = &side.ends[0];

    open_side(1);
    uint64_t proven = hear();
    UNTIL(end->bye);
    CHECK(end->imms >= proven && end->imms <= 6, "%lu immediates, %lu writes were reported done",
          (unsigned long)end->imms, (unsigned long)proven);
    close_end(end);
    tell(0);
    hear();
    close_side();
}

enum { WARM = 20, CYCLES = 200 };

static void cycles_initiator(void)
{
    uint32_t fds = 0;

    open_side(1);
    for (uint32_t i = 0; i < WARM + CYCLES; i++) {
        if (i == WARM)
            fds = open_fds();
        side.lanes = 0;
        struct end *end = connect_lane(0);
        put(end, 0, 0, 64, i + 1);
        send_frame(end, BYE, 0);
        UNTIL(end->completed == end->taken);
        close_end(end);
        CHECK(hear() == i, "out of step");
    }
    run_for(0.05);
    CHECK(open_fds() <= fds + 2, "%u fds became %u", fds, open_fds());
    tell(0);
    close_side();
}

static void cycles_target(void)
{
    uint32_t fds = 0;
    struct end *end = &side.ends[0];

    open_side(1);
    for (uint32_t i = 0; i < WARM + CYCLES; i++) {
        if (i == WARM)
            fds = open_fds();
        UNTIL(end->bye && end->imms);
        close_end(end);
        memset(end, 0, sizeof(*end));
        tell(i);
    }
    hear();
    run_for(0.05);
    CHECK(open_fds() <= fds + 2, "%u fds became %u", fds, open_fds());
    close_side();
}

enum { NAPS = 10 };

static void idle_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    for (uint32_t i = 0; i < NAPS; i++) {
        hear();
        usleep(100000);
        put(end, 0, 0, i % 2 ? 65536 : 8, i + 1);
        UNTIL(end->completed == end->taken);
    }
    tell(0);
    close_side();
}

static double cpu_seconds(void)
{
    struct rusage use;

    getrusage(RUSAGE_SELF, &use);
    return (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
           (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
}

/* Blocks as an idle worker does; returns the seconds that it slept. */
static double sleep_until_woken(uint64_t imms, uint32_t *wakes)
{
    struct pollfd fd = {.fd = side.nic[0]->wait_fd, .events = POLLIN};
    double slept = 0;

    while (side.ends[0].imms < imms) {
        while (provider->arm(side.nic[0]) == 1)
            progress();
        double start = now();
        CHECK(poll(&fd, 1, 5000) == 1, "was not woken");
        slept += now() - start;
        (*wakes)++;
        provider->disarm(side.nic[0]);
        progress();
    }
    return slept;
}

static void idle_target(void)
{
    uint32_t wakes = 0;
    double slept = 0;

    open_side(1);
    UNTIL(side.ends[0].up);
    run_for(0.05);
    double cpu = cpu_seconds();
    for (uint32_t i = 0; i < NAPS; i++) {
        tell(0);
        slept += sleep_until_woken(i + 1, &wakes);
    }
    cpu = cpu_seconds() - cpu;
    CHECK(slept > NAPS * 0.08, "slept %.3f s", slept);
    CHECK(wakes < NAPS * 20 && cpu < 0.1 * slept, "%u wakes, %.3f s CPU", wakes, cpu);
    hear();
    close_side();
}

static void frames_initiator(void)
{
    uint8_t bytes[FAB_FRAME_MAX];
    uint32_t full = 0;

    open_side(1);
    struct end *end = connect_lane(0);
    tell(0); /* the target sleeps: the slots run out */
    for (uint32_t i = 0; i < 1000;) {
        paint(bytes, sizeof(bytes), i);
        int rc = provider->lane_send(end->lane, bytes, sizeof(bytes), NULL);
        CHECK(rc == 0 || rc == -EAGAIN, "lane_send %d", rc);
        i += rc == 0;
        full += rc == -EAGAIN;
        if (rc)
            progress();
    }
    CHECK(full > 0, "never full");
    CHECK(provider->lane_send(end->lane, bytes, FAB_FRAME_MAX + 1, NULL) == -EMSGSIZE, "too long");
    tell(0);
    hear();
    close_side();
}

static void frames_target(void)
{
    open_side(1);
    hear();
    usleep(200000);
    hear();
    UNTIL(side.ends[0].frames == 1000);
    tell(0);
    close_side();
}

static void refuse_initiator(void)
{
    open_side(1);
    struct end *end = start_lane(0);
    UNTIL(side.refused == 1);
    CHECK(!end->up && !end->down, "refused and up");
    uint8_t blob[FAB_BLOB_MAX] = {0};
    CHECK(provider->lane_connect(end->lane, blob, 3) == -EINVAL, "a short blob");
    CHECK(strstr(fab_take_reason(0), "bytes"), "no reason");
    struct fab_wr wr = wr_of(end, 0, 0, 8);
    CHECK(provider->post(end->lane, &wr, 1) == 0, "posted before there was a lane");
    tell(0);
    hear();
    close_side();
}

static void refuse_target(void)
{
    side.refuse = true;
    open_side(1);
    hear();
    tell(0);
    close_side();
}

/* A peer that dies in the middle of its write: the only case in which libfabric tells us. */
static void orphan_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    const uint8_t *at = side.memory;
    UNTIL(end->imms > 1 && at[0] != at[64 * MIB - 1]); /* begun, and far from its end */
    usleep(100000); /* the socket is full: one sendmsg cannot finish the write */
    kill(target_pid, SIGKILL);
    UNTIL(end->down == 1);
    close_side();
}

static void orphan_target(void)
{
    open_side(1);
    UNTIL(side.ends[0].up);
    for (uint8_t round = 1;; round++) {
        side.memory[0] = side.memory[64 * MIB - 1] = round;
        put(&side.ends[0], 0, 0, 64 * MIB, 1);
        UNTIL(side.ends[0].completed == side.ends[0].taken);
    }
}

static void stopped_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    kill(target_pid, SIGSTOP);
    for (int i = 0; i < 8; i++)
        put(end, 0, 0, MIB, (uint32_t)i + 1);
    run_for(0.5);
    CHECK(!end->down && end->completed < end->taken, "a stopped peer is not a dead one");
    kill(target_pid, SIGCONT);
    UNTIL(end->completed == end->taken);
    CHECK(end->failed == 0, "a write failed");
    kill(target_pid, SIGSTOP);
    for (int i = 0; i < 8; i++)
        put(end, 0, 0, MIB, (uint32_t)i + 1);
    send_frame(end, BYE, 0);
    double start = now();
    close_end(end); /* reports all, though the peer does not answer */
    CHECK(now() - start < 0.1, "lane_close took %.3f s", now() - start);
    CHECK(end->failed > 0, "nothing was cancelled");
    kill(target_pid, SIGKILL);
    close_side();
}

/* ---- speed: printed, never checked ---- */

static void stream(struct end *end, uint64_t size, uint32_t count)
{
    double start = now();
    uint64_t goal = end->taken + count;
    struct fab_wr wrs[32];

    while (end->taken < goal) {
        int n = 0;
        for (; n < 32 && end->taken + (uint64_t)n < goal; n++) {
            wrs[n] = wr_of(end, (uint64_t)n % 16 * size, (uint64_t)n % 16 * size, size);
            wrs[n].wr_id += (uint64_t)n;
        }
        int rc = provider->post(end->lane, wrs, n);
        CHECK(rc >= 0, "post %d", rc);
        end->taken += (uint64_t)rc;
        progress();
    }
    UNTIL(end->completed == goal);
    double took = now() - start;
    printf("  %8lu bytes: %6.2f GB/s, %8.0f writes/s\n", (unsigned long)size,
           (double)size * count / took * 1e-9, count / took);
}

static void speed_initiator(void)
{
    open_side(1);
    struct end *end = connect_lane(0);
    paint(side.memory, 32 * MIB, 1);
    stream(end, 8, 100000);
    stream(end, 65536, 20000);
    stream(end, 65536, 20000);
    stream(end, MIB, 2000);
    stream(end, MIB, 2000);
    tell(0);
    UNTIL(end->imms == 1);
    double start = now();
    for (uint64_t i = 0; i < 20000; i++) {
        put(end, 0, 0, 8, 0);
        UNTIL(end->imms == i + 2);
    }
    printf("  8-byte round trip: %.2f us\n", (now() - start) / 20000 * 1e6);
    tell(0);
    hear();
    close_side();
}

static void speed_target(void)
{
    open_side(1);
    hear();
    struct end *end = &side.ends[0];
    uint64_t before = end->imms;
    put(end, 0, 0, 8, 0);
    for (uint64_t i = 0; i < 20000; i++) {
        UNTIL(end->imms == before + i + 1);
        put(end, 0, 0, 8, 0);
    }
    hear();
    tell(0);
    close_side();
}

/* ---- running ---- */

struct test {
    const char *name;
    void (*initiator)(void);
    void (*target)(void);
    bool target_dies;
};

static const struct test tests[] = {
    {"sizes", sizes_initiator, sizes_target, false},
    {"pages", pages_initiator, pages_target, false},
    {"two_nics", two_nics_initiator, two_nics_target, false},
    {"window", window_initiator, window_target, false},
    {"frames", frames_initiator, frames_target, false},
    {"refuse", refuse_initiator, refuse_target, false},
    {"idle", idle_initiator, idle_target, false},
    {"fence", fence_initiator, fence_target, false},
    {"hail", hail_initiator, fence_target, false},
    {"cycles", cycles_initiator, cycles_target, false},
    {"dropped", dropped_initiator, dropped_target, false},
    {"kill", kill_initiator, serve_forever, true},
    {"orphan", orphan_initiator, orphan_target, true},
    {"stopped", stopped_initiator, serve_forever, true},
    {"speed", speed_initiator, speed_target, false},
};

static int run_side(const char *role, int oob, void (*body)(void))
{
    side.role = role;
    side.oob = oob;
    alarm(TEST_SECONDS);
    body();
    exit(0);
}

static pid_t start(const char *role, int oob, int other, void (*body)(void))
{
    pid_t pid = fork();

    if (pid == 0) {
        close(other);
        run_side(role, oob, body);
    }
    return pid;
}

static bool run_test(const struct test *test)
{
    int pair[2], initiator, target;
    double begin = now();

    fflush(stdout);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return false;
    target_pid = start("target", pair[1], pair[0], test->target);
    pid_t pid = start("initiator", pair[0], pair[1], test->initiator);
    close(pair[0]);
    close(pair[1]);
    waitpid(pid, &initiator, 0);
    if (initiator)
        kill(target_pid, SIGKILL);
    waitpid(target_pid, &target, 0);
    bool ok = initiator == 0 && (test->target_dies || target == 0);
    printf("%s %s (%.1f s)\n", ok ? "ok    " : "FAILED", test->name, now() - begin);
    return ok;
}

/* In a child: what needs no second process. */
static void check_library(void)
{
    char path[512], version[64];
    fab_nic_info nics[8];

    CHECK(fab_library("libfabric", path, sizeof(path), version, sizeof(version)) == 0, "%s",
          fab_take_reason(0));
    printf("libfabric %s at %s\n", version, path);
    CHECK(fab_library("nothing", path, sizeof(path), version, sizeof(version)) < 0, "known");
    int n = provider->list(nics, 8);
    bool lo = false;
    for (int i = 0; i < n; i++)
        lo |= strcmp(nics[i].name, "lo") == 0;
    CHECK(lo, "lo is not among %d NICs", n);
    struct fab_nic_options options = {.name = "nosuchnic", .sink = &sink};
    struct fab_nic *nic;
    CHECK(provider->nic_open(&options, &nic) < 0, "opened nosuchnic");
    CHECK(strstr(fab_take_reason(0), "nosuchnic"), "the reason does not name it");
    n = fab_provider_efa.list(nics, 8);
    if (n < 0)
        printf("no efa: %s\n", fab_take_reason(0));
}

int main(int argc, char **argv)
{
    const char *wanted = getenv("SEED");
    const char *other = getenv("PROVIDER");
    int failed = 0, status;
    char path[512], version[64];

    seed = wanted ? strtoul(wanted, NULL, 0) : (unsigned long)time(NULL) ^ (unsigned long)getpid();
    printf("SEED=%lu\n", seed);
    fflush(stdout);
    pid_t pid = fork(); /* libfabric stays out of the process that forks */
    if (pid == 0) {
        side.role = "library";
        if (fab_library("libfabric", path, sizeof(path), version, sizeof(version))) {
            printf("skipped: %s\n", fab_take_reason(0));
            exit(77);
        }
        check_library();
        exit(0);
    }
    waitpid(pid, &status, 0);
    if (status)
        return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    if (other && strcmp(other, "rxm") == 0) {
        provider = &fab_provider_rxm;
        nic_names[0] = "rxe0";
        nic_names[1] = "rxe1";
    }
    for (uint32_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
        if (argc < 2 ? tests[i].initiator != speed_initiator : !strcmp(argv[1], tests[i].name))
            failed += !run_test(&tests[i]);
    return failed != 0;
}
