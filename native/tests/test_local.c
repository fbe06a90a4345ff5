/* The same-host provider, driven through its vtable by two processes.
 *
 * The parent runs each test as the *driver*; for each it forks a *server* before any NIC is open,
 * talks to it over a socket pair, and reads its verdict there. Around the vtable stands the little
 * that the core does: hello, welcome, grant, import. The seed is printed; `test_local SEED`
 * repeats it, `test_local SEED NAME` runs one test, `test_local bench` measures.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "providers/local.h"

#define MIB (UINT64_C(1) << 20)
#define BIG (65 * MIB)
#define WAIT_NS INT64_C(20000000000)
#define WRS 32       /* of one post */
#define STAMPS 20000 /* of the test of order */
#define CROWD 150    /* of the test of many lanes: more than there is room for origins */

static const struct fab_provider *const provider = &fab_provider_local;
static char reason[512];
static uint64_t seed;
static int failures;

void fab_fail_text(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
}

__attribute__((format(printf, 3, 4))) static void fail(int at, const char *what, const char *format,
                                                       ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "line %d: [%d] not true: %s: %s (last reason: %s)\n", at, (int)getpid(), what,
            text, reason);
    failures++;
}

#define CHECK(condition, ...)                        \
    do {                                             \
        if (!(condition))                            \
            fail(__LINE__, #condition, __VA_ARGS__); \
    } while (0)

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void sleep_ms(int ms)
{
    poll(NULL, 0, ms);
}

static uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t next_random(void)
{
    static uint64_t state;
    return mix(seed + ++state);
}

/* Bytes that depend on their distance from `at` and on the key. */
static void fill(uint8_t *at, uint64_t length, uint64_t key)
{
    for (uint64_t i = 0; i < length; i += 8) {
        uint64_t word = mix(key + i);
        memcpy(at + i, &word, length - i < 8 ? length - i : 8);
    }
}

static bool filled(const uint8_t *at, uint64_t length, uint64_t key)
{
    for (uint64_t i = 0; i < length; i += 8) {
        uint64_t word = mix(key + i);
        if (memcmp(at + i, &word, length - i < 8 ? length - i : 8) != 0)
            return false;
    }
    return true;
}

static int count_entries(const char *path)
{
    DIR *directory = opendir(path);
    int n = 0;
    while (directory && readdir(directory))
        n++;
    if (directory)
        closedir(directory);
    return n;
}

/* ---- the little core ---- */

enum frame_type { T_HELLO = 1, T_WELCOME, T_CHALLENGE, T_GRANT, T_BYE, T_TEXT };

struct frame {
    uint16_t magic;
    uint8_t version, type;
    uint32_t length;
    uint64_t number, bytes;
    uint32_t pulled, value;
};

struct region {
    uint8_t *base;
    uint64_t length;
    int memfd;
    struct fab_mr *mr;
    fab_key key;
    uint64_t number;
};

static struct {
    struct fab_nic *nic;
    struct fab_lane *lane;
    struct region dst, src;
    struct fab_remote *remote; /* the other side's dst */
    fab_key remote_key;
    int import_error;
    uint64_t imms, imm_calls, done, failed;
    uint32_t last_imm;
    bool in_order; /* check that immediate n comes once, and after the stamps of 0 to n */
    uint64_t disorder;
    int last_status;
    bool welcomed, bye;
    uint32_t texts, text_gaps;
    int down;
    char down_text[FAB_TEXT_MAX];
    uint32_t challenges; /* to make before anybody is let in */
    bool hold_origin;
    struct fab_origin *held;
    uint32_t hellos, gone;
    bool crowd; /* let everybody in */
    struct fab_lane *guests[CROWD];
    uint32_t guest_count, welcomes;
} me;

static void on_imm(struct fab_lane *lane, uint32_t imm, uint32_t times)
{
    (void)lane;
    if (me.in_order) {
        static bool seen[STAMPS];
        me.disorder += imm >= STAMPS || seen[imm % STAMPS] || times != 1;
        seen[imm % STAMPS] = true;
        for (uint32_t i = imm > 64 ? imm - 64 : 0; i <= imm; i++) {
            uint64_t stamp;
            memcpy(&stamp, me.dst.base + (i % 1024) * 64, 8);
            me.disorder += stamp < i + 1;
        }
    }
    me.last_imm = imm;
    me.imms += times;
    me.imm_calls++;
}

static void on_completed(struct fab_lane *lane, uint64_t wr_id, int status)
{
    (void)lane;
    (void)wr_id;
    me.done++;
    if (status) {
        me.failed++;
        me.last_status = status;
    }
}

static int send_frame(uint8_t type, const struct region *region, uint32_t value)
{
    struct frame f = {.magic = 0xFAB1, .version = 1, .type = type, .length = sizeof f};
    f.value = value;
    if (region) {
        f.number = region->number;
        f.bytes = region->length;
        f.pulled = region->memfd < 0;
    }
    return provider->lane_send(me.lane, (const uint8_t *)&f, sizeof f, region ? region->mr : NULL);
}

static void on_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    struct frame f = {0};
    if (length == sizeof f)
        memcpy(&f, bytes, sizeof f);
    if (f.magic == 0xFAB1 && f.type == T_GRANT && !me.remote) {
        me.import_error = provider->import(lane, f.number, f.bytes, fd, f.pulled, &me.remote);
        me.remote_key = (fab_key){0, f.number};
        return;
    }
    me.welcomed |= f.type == T_WELCOME;
    me.welcomes += f.type == T_WELCOME;
    me.bye |= f.type == T_BYE;
    if (f.type == T_CHALLENGE)
        send_frame(T_HELLO, NULL, 0);
    if (f.type == T_TEXT)
        me.text_gaps += f.value != me.texts++;
    if (fd >= 0)
        close(fd);
}

static void on_hello(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                     uint32_t length)
{
    struct frame f = {0};
    me.hellos++;
    if (length == sizeof f)
        memcpy(&f, bytes, sizeof f);
    if (me.crowd) {
        struct fab_lane *lane;
        CHECK(provider->lane_open(nic, origin, &lane) == 0, "lane_open");
        f.type = T_WELCOME;
        CHECK(provider->lane_send(lane, (uint8_t *)&f, sizeof f, NULL) == 0, "welcome");
        me.guests[me.guest_count++] = lane;
    } else if (f.type != T_HELLO || me.lane) {
        provider->origin_drop(nic, origin);
    } else if (me.hold_origin) {
        me.held = origin;
    } else if (me.challenges) {
        me.challenges--;
        f.type = T_CHALLENGE;
        int rc = provider->origin_reply(nic, origin, NULL, 0, (uint8_t *)&f, sizeof f);
        CHECK(rc == 0, "origin_reply %d", rc);
        if (me.challenges & 1) /* both ways have to do */
            provider->origin_drop(nic, origin);
    } else if (provider->lane_open(nic, origin, &me.lane) == 0) {
        send_frame(T_WELCOME, NULL, 0);
    }
}

static void on_down(struct fab_lane *lane, int error, const char *text)
{
    (void)lane;
    CHECK(!me.down, "lane_down twice");
    CHECK(error < 0, "lane_down with %d", error);
    me.down = error;
    snprintf(me.down_text, sizeof me.down_text, "%s", text);
}

static void on_gone(struct fab_nic *nic, struct fab_origin *origin)
{
    (void)nic;
    me.gone++;
    CHECK(origin == me.held, "another origin is gone");
    me.held = NULL;
}

static uint8_t *on_destination(struct fab_lane *lane, uint64_t number, uint64_t offset,
                               uint64_t length)
{
    (void)lane;
    if (number != me.dst.number || offset > me.dst.length || length > me.dst.length - offset)
        return NULL;
    return me.dst.base + offset;
}

static const struct fab_sink sink = {
    .imm = on_imm,
    .completed = on_completed,
    .frame = on_frame,
    .hello = on_hello,
    .lane_down = on_down,
    .origin_gone = on_gone,
    .destination = on_destination,
};

static void open_nic(void)
{
    static const uint8_t id[FAB_ENGINE_ID_BYTES];
    struct fab_nic_options options = {.sink = &sink, .engine_id = id};
    int rc = provider->nic_open(&options, &me.nic);
    if (rc) {
        fprintf(stderr, "nic_open: %d %s\n", rc, reason);
        exit(1);
    }
}

static void open_region(struct region *region, uint64_t length, bool shared, uint64_t number)
{
    *region = (struct region){.length = length, .memfd = -1, .number = number};
    void *map;
    if (shared) {
        CHECK(fab_local_share("test", length, &map, &region->memfd) == 0, "memfd");
    } else {
        map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    region->base = map;
    memset(map, 0, length);
    struct fab_memory memory = {
        .base = map, .length = length, .number = number, .memfd = region->memfd, .dmabuf_fd = -1};
    CHECK(provider->mr_reg(me.nic, &memory, &region->mr, &region->key) == 0, "mr_reg");
    CHECK(region->key.addr == 0 && region->key.rkey == number, "key");
}

static void close_region(struct region *region)
{
    if (!region->mr)
        return;
    provider->mr_dereg(me.nic, region->mr);
    munmap(region->base, region->length);
    if (region->memfd >= 0)
        close(region->memfd);
    *region = (struct region){.memfd = -1};
}

static int poll_nic(void)
{
    me.nic->now = now_ns();
    return provider->poll(me.nic, 64);
}

/* Closes the lane; false when the peer stays inside for too long. */
static bool close_lane(void)
{
    int64_t end = now_ns() + WAIT_NS;
    int rc;
    while ((rc = provider->lane_close(me.lane)) == -EINPROGRESS && now_ns() < end)
        ;
    CHECK(rc == 0, "lane_close %d", rc);
    me.lane = NULL;
    return rc == 0;
}

static void close_all(void)
{
    if (me.lane)
        close_lane();
    if (me.remote)
        provider->unimport(me.remote);
    me.remote = NULL;
    close_region(&me.dst);
    close_region(&me.src);
    if (me.nic)
        provider->nic_close(me.nic);
    me.nic = NULL;
}

/* Polls until the condition holds; evaluates it once each time. */
#define AWAIT(condition, ...)                                              \
    do {                                                                   \
        int64_t await_end = now_ns() + WAIT_NS;                            \
        bool holds;                                                        \
        while (!(holds = (condition)) && now_ns() < await_end && !me.down) \
            poll_nic();                                                    \
        if (!holds)                                                        \
            fail(__LINE__, #condition, __VA_ARGS__);                       \
    } while (0)

static void connect_to(const uint8_t *blob)
{
    int rc = provider->lane_open(me.nic, NULL, &me.lane);
    CHECK(rc == 0, "lane_open %d", rc);
    rc = provider->lane_connect(me.lane, blob, LOCAL_NAME_BYTES);
    CHECK(rc == 0, "lane_connect %d", rc);
    CHECK(send_frame(T_HELLO, NULL, 0) == 0, "hello");
    AWAIT(me.welcomed, "no welcome");
}

static struct fab_wr new_wr(uint64_t from, uint64_t to, uint64_t length, int64_t imm)
{
    return (struct fab_wr){.src = me.src.base + from,
                           .mr = length ? me.src.mr : NULL,
                           .remote = length ? me.remote : NULL,
                           .addr = me.remote_key.addr + to,
                           .rkey = me.remote_key.rkey,
                           .length = length,
                           .imm = (uint32_t)imm,
                           .flags = imm >= 0 ? FAB_WR_IMM : 0};
}

/* Posts all of them, polling when full. */
static void post_all(const struct fab_wr *wrs, int n)
{
    int64_t end = now_ns() + WAIT_NS;
    while (n > 0 && !me.down && now_ns() < end) {
        int taken = provider->post(me.lane, wrs, n < WRS ? n : WRS);
        if (taken > 0) {
            wrs += taken;
            n -= taken;
        }
        if (taken < 0 || n)
            poll_nic();
    }
    CHECK(n == 0 || me.down, "%d work requests were not taken", n);
}

static void write_and_wait(uint64_t from, uint64_t to, uint64_t length, int64_t imm)
{
    uint64_t before = me.done;
    struct fab_wr wr = new_wr(from, to, length, imm);
    post_all(&wr, 1);
    AWAIT(me.done == before + 1, "write of %llu bytes", (unsigned long long)length);
}

/* ---- the server and how the driver talks to it ---- */

enum order_type { O_CHECK = 1, O_PAUSE, O_FORK, O_WRITE, O_SLEEP, O_TEXTS, O_SCAN, O_QUIT };

struct order {
    uint32_t type;
    uint32_t value;
    uint64_t imms; /* O_CHECK: to be counted first */
    uint64_t offset, length, key;
};

struct report {
    uint64_t ok, imms, calls, disorder, done, failed;
    int64_t pid;
    uint64_t down;
};

struct setup {
    bool dst_shared;
    uint64_t dst_bytes, src_bytes;
    bool src_shared;
    bool grants; /* the driver grants its own dst to the server */
    bool in_order;
    bool sleeps; /* the echo server blocks when it has nothing to do */
    uint32_t challenges;
    const char *mode; /* FABRIC_LOCAL_PULL */
    void (*server)(const struct setup *); /* instead of the usual one */
};

static int line = -1; /* to the other process */
static pid_t server_pid;

static void tell(const void *bytes, size_t length)
{
    CHECK(send(line, bytes, length, MSG_NOSIGNAL) == (ssize_t)length, "tell");
}

static void hear(void *bytes, size_t length)
{
    int64_t end = now_ns() + WAIT_NS;
    ssize_t got;
    while ((got = recv(line, bytes, length, MSG_DONTWAIT)) < 0 && now_ns() < end)
        if (!me.nic || !poll_nic())
            poll(NULL, 0, 0);
    if (got != (ssize_t)length) {
        fprintf(stderr, "[%d] the other process says nothing\n", (int)getpid());
        exit(1);
    }
}

static void report_now(bool ok)
{
    struct report r = {.ok = ok,
                       .imms = me.imms,
                       .calls = me.imm_calls,
                       .done = me.done,
                       .disorder = me.disorder + me.text_gaps,
                       .failed = me.failed,
                       .pid = getpid(),
                       .down = me.down != 0};
    tell(&r, sizeof r);
}

/* Writes for ever to whoever granted us memory: value after value, all over it. */
static void write_for_ever(uint32_t bytes)
{
    for (uint64_t value = 1;; value++) {
        memset(me.src.base, (int)(value & 0x7f), bytes);
        struct fab_wr wr = new_wr(0, 0, bytes, 7);
        uint64_t before = me.done;
        while (!me.down && provider->post(me.lane, &wr, 1) == 0)
            poll_nic();
        while (!me.down && me.done == before)
            poll_nic();
        if (me.down) { /* the lane stays: the driver wants to see that nothing lands */
            for (;;)
                pause();
        }
    }
}

/* Until something happens, or for `ms`. */
static void block_on_nic(int ms)
{
    if (poll_nic() || provider->arm(me.nic))
        return;
    struct pollfd look = {.fd = me.nic->wait_fd, .events = POLLIN};
    poll(&look, 1, ms);
    provider->disarm(me.nic);
}

static void sleep_on_nic(uint32_t ms)
{
    int64_t end = now_ns() + (int64_t)ms * 1000000;
    while (now_ns() < end)
        block_on_nic((int)((end - now_ns()) / 1000000) + 1);
}

static void fork_grandchild(void)
{
    pid_t pid = fork(); /* inherits every descriptor, as a careless child does */
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, 0);
        close(line);
        for (;;)
            pause();
    }
    struct report r = {.ok = 1, .pid = pid};
    tell(&r, sizeof r);
}

static bool obey(const struct order *order)
{
    switch (order->type) {
    case O_CHECK:
        AWAIT(me.imms >= order->imms, "%llu of %llu immediates", (unsigned long long)me.imms,
              (unsigned long long)order->imms);
        report_now(me.imms == order->imms &&
                   filled(me.dst.base + order->offset, order->length, order->key));
        break;
    case O_PAUSE:
        sleep_ms((int)order->value);
        break;
    case O_FORK:
        fork_grandchild();
        break;
    case O_WRITE:
        report_now(true);
        write_for_ever(order->value);
        break;
    case O_SLEEP:
        report_now(true);
        sleep_on_nic(order->value);
        break;
    case O_TEXTS:
        for (uint32_t i = 0; i < order->value; i++)
            while (send_frame(T_TEXT, NULL, i) == -EAGAIN)
                poll_nic();
        break;
    case O_SCAN:
        report_now(memchr(me.dst.base, (int)order->value, me.dst.length) == NULL);
        break;
    default:
        return false;
    }
    return true;
}

static void serve(const struct setup *setup)
{
    int fds = count_entries("/proc/self/fd");
    open_nic();
    me.challenges = setup->challenges;
    me.in_order = setup->in_order;
    open_region(&me.dst, setup->dst_bytes, setup->dst_shared, 11);
    if (setup->grants)
        open_region(&me.src, setup->src_bytes, setup->src_shared, 12);
    tell(me.nic->info.blob, LOCAL_NAME_BYTES);
    AWAIT(me.lane, "nobody connects");
    while (send_frame(T_GRANT, &me.dst, 0) == -EAGAIN)
        poll_nic();
    if (setup->grants)
        AWAIT(me.remote, "no grant");
    struct order order;
    for (uint32_t turn = 0;; turn++) {
        poll_nic();
        if (turn % 16 == 0 && recv(line, &order, sizeof order, MSG_DONTWAIT) == sizeof order &&
            !obey(&order))
            break;
    }
    close_all();
    int left = count_entries("/proc/self/fd");
    CHECK(left == fds, "%d file descriptors before, %d after", fds, left);
    report_now(failures == 0);
}

static void start_server(const struct setup *setup)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        abort();
    memset(&me, 0, sizeof me);
    me.dst.memfd = me.src.memfd = -1;
    fflush(NULL);
    if (setup->mode)
        setenv("FABRIC_LOCAL_PULL", setup->mode, 1);
    else
        unsetenv("FABRIC_LOCAL_PULL");
    server_pid = fork();
    if (server_pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(pair[0]);
        line = pair[1];
        failures = 0;
        (setup->server ? setup->server : serve)(setup);
        exit(failures != 0);
    }
    close(pair[1]);
    line = pair[0];
}

/* A server, a lane to it, and its memory in our hands. */
static void begin(const struct setup *setup)
{
    start_server(setup);
    open_nic();
    uint8_t blob[LOCAL_NAME_BYTES];
    hear(blob, sizeof blob);
    if (setup->grants)
        open_region(&me.dst, setup->dst_bytes, setup->dst_shared, 21);
    open_region(&me.src, setup->src_bytes, setup->src_shared, 22);
    connect_to(blob);
    AWAIT(me.remote || me.import_error, "no grant");
    CHECK(!me.import_error, "import %d", me.import_error);
    if (setup->grants)
        CHECK(send_frame(T_GRANT, &me.dst, 0) == 0, "grant");
}

static struct report order(struct order o)
{
    struct report r;
    tell(&o, sizeof o);
    hear(&r, sizeof r);
    return r;
}

static void kill_server(void)
{
    kill(server_pid, SIGKILL);
    waitpid(server_pid, NULL, 0);
    close(line);
    line = -1;
}

static void stop_server(void)
{
    kill(server_pid, SIGSTOP);
    int status;
    waitpid(server_pid, &status, WUNTRACED);
}

static void quit(void)
{
    struct report r = order((struct order){.type = O_QUIT});
    CHECK(r.ok, "the server is not content");
    int status = 0;
    waitpid(server_pid, &status, 0);
    CHECK(status == 0, "the server ended with %#x", status);
    close(line);
    line = -1;
    close_all();
}

/* ---- tests ---- */

static const uint64_t sizes[] = {0, 1, 4095, 16385, MIB, 64 * MIB};

static void write_sizes(void)
{
    uint64_t imms = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint64_t key = next_random(), from = next_random() % 777, to = next_random() % 999;
        fill(me.src.base + from, sizes[i], key);
        write_and_wait(from, to, sizes[i], (int64_t)i);
        struct report r = order((struct order){
            .type = O_CHECK, .imms = ++imms, .offset = to, .length = sizes[i], .key = key});
        CHECK(r.ok, "%llu bytes", (unsigned long long)sizes[i]);
    }
    CHECK(me.failed == 0, "status %d", me.last_status);
}

/* 1000 pages to shuffled places, all under one immediate. */
static void write_pages(uint64_t before)
{
    enum { PAGES = 1000, PAGE = 4096 };
    static struct fab_wr wrs[PAGES];
    uint64_t key = next_random(), done = me.done;
    fill(me.src.base, PAGES * PAGE, key);
    uint64_t step = 7 + 10 * (next_random() % 90); /* ends in 7: prime to 1000 */
    step = step % 10 == 7 ? step : 7;
    for (uint64_t i = 0; i < PAGES; i++) {
        uint64_t page = i * step % PAGES;
        wrs[i] = new_wr(page * PAGE, page * PAGE, PAGE, 5);
    }
    post_all(wrs, PAGES);
    AWAIT(me.done == done + PAGES, "%llu pages", (unsigned long long)(me.done - done));
    struct report r = order((struct order){
        .type = O_CHECK, .imms = before + PAGES, .length = PAGES * PAGE, .key = key});
    CHECK(r.ok, "pages, %llu immediates", (unsigned long long)r.imms);
}

static void sizes_and_pages(const struct setup *setup)
{
    begin(setup);
    write_sizes();
    write_pages(sizeof sizes / sizeof *sizes);
    quit();
}

static void test_direct(void)
{
    sizes_and_pages(&(struct setup){
        .dst_shared = true, .dst_bytes = BIG, .src_shared = true, .src_bytes = BIG});
    sizes_and_pages(&(struct setup){.dst_shared = true, .dst_bytes = BIG, .src_bytes = BIG});
}

static void test_pull_memfd(void)
{
    sizes_and_pages(
        &(struct setup){.dst_bytes = BIG, .src_shared = true, .src_bytes = BIG, .mode = "auto"});
}

static void test_pull_auto(void)
{
    sizes_and_pages(&(struct setup){.dst_bytes = BIG, .src_bytes = BIG});
}

static void test_pull_staged(void)
{
    sizes_and_pages(&(struct setup){.dst_bytes = BIG, .src_bytes = BIG, .mode = "staging"});
}

static void test_pull_vm(void)
{
    struct setup setup = {.dst_bytes = BIG, .src_bytes = BIG, .mode = "vm"};
    begin(&setup);
    if (((struct local_lane *)me.lane)->peer_reads) {
        write_sizes();
        write_pages(sizeof sizes / sizeof *sizes);
    } else {
        fprintf(stderr, "skipped: process_vm_readv is not permitted here\n");
        write_and_wait(0, 0, 100, 1);
        CHECK(me.failed == 1 && me.last_status == -EPERM, "status %d", me.last_status);
    }
    quit();
}

/* More registrations than the peer keeps mappings of. */
static void test_pull_many_sources(void)
{
    enum { COUNT = 3 * LOCAL_SOURCES };
    struct setup setup = {.dst_bytes = MIB, .src_shared = true, .src_bytes = 4096};
    static struct region regions[COUNT];
    begin(&setup);
    struct region first = me.src;
    for (int i = 0; i < COUNT; i++) {
        open_region(&regions[i], 4096, true, 100 + (uint64_t)i);
        fill(regions[i].base, 4096, 5 + 4096 * (uint64_t)i);
    }
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < COUNT; i++) {
            me.src = regions[i];
            struct fab_wr wr = new_wr(0, 4096 * (uint64_t)i % MIB, 4096, 1);
            post_all(&wr, 1);
        }
    AWAIT(me.done == 2 * COUNT, "%llu done", (unsigned long long)me.done);
    CHECK(me.failed == 0, "status %d", me.last_status);
    struct report r =
        order((struct order){.type = O_CHECK, .imms = 2 * COUNT, .length = 4096 * COUNT, .key = 5});
    CHECK(r.ok, "bytes of many sources");
    for (int i = 0; i < COUNT; i++)
        close_region(&regions[i]);
    me.src = first;
    quit();
}

/* Direct and pulled writes and bare immediates on one lane: each immediate comes after the bytes
 * of all before it. */
static void mixed_order(const char *mode, bool src_shared)
{
    struct setup setup = {.dst_shared = true,
                          .dst_bytes = MIB,
                          .src_shared = src_shared,
                          .src_bytes = STAMPS * 8,
                          .mode = mode,
                          .in_order = true};
    begin(&setup);
    struct fab_remote *direct = me.remote, *pulled;
    CHECK(provider->import(me.lane, 11, MIB, -1, true, &pulled) == 0, "import");
    static struct fab_wr wrs[2 * STAMPS];
    int n = 0;
    for (uint64_t k = 0; k < STAMPS; k++) {
        uint64_t stamp = k + 1, kind = next_random() % 4;
        memcpy(me.src.base + k * 8, &stamp, 8);
        me.remote = kind & 1 ? direct : pulled;
        wrs[n++] = new_wr(k * 8, k % 1024 * 64, 8, kind & 2 ? -1 : (int64_t)k);
        if (kind & 2)
            wrs[n++] = new_wr(0, 0, 0, (int64_t)k);
    }
    post_all(wrs, n);
    AWAIT(me.done == (uint64_t)n, "%llu of %d", (unsigned long long)me.done, n);
    CHECK(me.failed == 0, "status %d", me.last_status);
    struct report r = order((struct order){.type = O_CHECK, .imms = STAMPS});
    CHECK(r.ok && r.disorder == 0, "disorder %llu, %llu immediates", (unsigned long long)r.disorder,
          (unsigned long long)r.imms);
    me.remote = direct;
    provider->unimport(pulled);
    quit();
}

static void test_order(void)
{
    mixed_order("auto", true);
    mixed_order("auto", false);
    mixed_order("staging", false);
}

/* The receiver does not poll: what was taken is kept, the rest is not taken. */
static void test_ring_full(void)
{
    enum { COUNT = 20000 };
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    tell(&(struct order){.type = O_PAUSE, .value = 300}, sizeof(struct order));
    sleep_ms(50);
    uint64_t taken = 0;
    int rc = 1;
    while (rc > 0 && taken < COUNT) {
        struct fab_wr wr = new_wr(taken % MIB, taken % MIB, taken % 3, (int64_t)taken);
        rc = provider->post(me.lane, &wr, 1);
        taken += rc > 0;
    }
    CHECK(rc == 0 && taken >= LOCAL_IMMS && taken < COUNT, "taken %llu, rc %d",
          (unsigned long long)taken, rc);
    int64_t began = now_ns();
    sleep_on_nic(1); /* wakes when the receiver has made room, at the latest after 1 ms */
    while (taken < COUNT && now_ns() - began < WAIT_NS) {
        struct fab_wr wr = new_wr(0, 0, 0, (int64_t)taken);
        taken += provider->post(me.lane, &wr, 1) > 0;
        poll_nic();
    }
    AWAIT(me.done == COUNT, "done %llu", (unsigned long long)me.done);
    struct report r = order((struct order){.type = O_CHECK, .imms = COUNT});
    CHECK(r.ok && r.calls == COUNT, "%llu immediates, %llu calls", (unsigned long long)r.imms,
          (unsigned long long)r.calls);
    quit();
}

/* A full ring wakes the sleeping writer as soon as there is room. */
static void test_room_wakes(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    tell(&(struct order){.type = O_PAUSE, .value = 200}, sizeof(struct order));
    sleep_ms(50);
    uint64_t taken = 0;
    struct fab_wr wr;
    do
        wr = new_wr(0, 0, 0, (int64_t)taken);
    while (provider->post(me.lane, &wr, 1) == 1 && ++taken);
    int64_t began = now_ns();
    while (poll_nic())
        ;
    CHECK(provider->arm(me.nic) == 0, "there is nothing to do");
    struct pollfd look = {.fd = me.nic->wait_fd, .events = POLLIN};
    CHECK(poll(&look, 1, 5000) == 1, "nobody wakes us");
    provider->disarm(me.nic);
    CHECK(now_ns() - began < INT64_C(2000000000), "woken late");
    CHECK(provider->post(me.lane, &wr, 1) == 1, "no room after the wake");
    struct report r = order((struct order){.type = O_CHECK, .imms = taken + 1});
    CHECK(r.ok, "%llu immediates", (unsigned long long)r.imms);
    quit();
}

/* A sleeping receiver is woken by an immediate, and by a frame. */
static void test_sleep(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    order((struct order){.type = O_SLEEP, .value = 300});
    for (uint64_t i = 0; i < 50; i++) {
        write_and_wait(0, 0, 8, 3);
        sleep_ms((int)(next_random() % 4));
    }
    struct report r = order((struct order){.type = O_CHECK, .imms = 50});
    CHECK(r.ok, "%llu immediates", (unsigned long long)r.imms);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    sleep_on_nic(200);
    getrusage(RUSAGE_SELF, &after);
    int64_t used = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) * 1000000 +
                   (after.ru_utime.tv_usec - before.ru_utime.tv_usec);
    CHECK(used < 20000, "%lld us of CPU while asleep", (long long)used);
    quit();
}

/* Answers every immediate with one. */
static void echo_server(const struct setup *setup)
{
    open_nic();
    open_region(&me.dst, setup->dst_bytes, true, 11);
    open_region(&me.src, setup->src_bytes, true, 12);
    tell(me.nic->info.blob, LOCAL_NAME_BYTES);
    AWAIT(me.lane, "nobody connects");
    send_frame(T_GRANT, &me.dst, 0);
    AWAIT(me.remote, "no grant");
    for (uint64_t seen = 0; !me.down;) {
        if (setup->sleeps && seen == me.imms)
            block_on_nic(5000);
        poll_nic();
        while (seen < me.imms && !me.down) {
            struct fab_wr wr = new_wr(0, 0, 8, 1);
            seen += provider->post(me.lane, &wr, 1) > 0;
        }
    }
    close_all();
}

/* Both sides block between any two messages: no wake may be lost. */
static void test_sleepers(void)
{
    enum { ROUNDS = 4000 };
    struct setup setup = {.dst_shared = true,
                          .dst_bytes = MIB,
                          .src_bytes = MIB,
                          .grants = true,
                          .sleeps = true,
                          .server = echo_server};
    begin(&setup);
    int64_t slowest = 0;
    for (uint64_t i = 0; i < ROUNDS; i++) {
        int64_t began = now_ns();
        struct fab_wr wr = new_wr(0, 0, 8, 1);
        CHECK(provider->post(me.lane, &wr, 1) == 1, "post");
        while (me.imms <= i && now_ns() - began < WAIT_NS)
            block_on_nic(5000);
        slowest = now_ns() - began > slowest ? now_ns() - began : slowest;
    }
    CHECK(me.imms == ROUNDS, "%llu immediates", (unsigned long long)me.imms);
    CHECK(slowest < INT64_C(2000000000), "one took %lld us", (long long)slowest / 1000);
    close_all();
    waitpid(server_pid, NULL, 0);
    close(line);
}

/* Thousands of frames in order, also when the socket is full. */
static void test_frames(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    tell(&(struct order){.type = O_TEXTS, .value = 3000}, sizeof(struct order));
    bool full = false;
    for (uint32_t i = 0; i < 3000; i++)
        for (int rc; (rc = send_frame(T_TEXT, NULL, i)) == -EAGAIN; poll_nic())
            full = true;
    AWAIT(me.texts == 3000, "%u frames", me.texts);
    CHECK(!me.text_gaps, "%u gaps", me.text_gaps);
    struct report r = order((struct order){.type = O_CHECK});
    CHECK(r.disorder == 0, "gaps at the server (full: %d)", full);
    quit();
}

static bool is_still(uint8_t *copy, int ms)
{
    memcpy(copy, me.dst.base, me.dst.length);
    sleep_ms(ms);
    return memcmp(copy, me.dst.base, me.dst.length) == 0;
}

/* SIGKILL in mid-write, while a child of the victim keeps its socket open. */
static void kill_writer(bool shared, const char *mode)
{
    struct setup setup = {.dst_shared = shared,
                          .dst_bytes = 16 * MIB,
                          .src_shared = false,
                          .src_bytes = 16 * MIB,
                          .grants = true,
                          .mode = mode};
    begin(&setup);
    struct report child = order((struct order){.type = O_FORK});
    order((struct order){.type = O_WRITE, .value = 16 * MIB});
    AWAIT(me.imms >= 3, "no writes");
    struct fab_wr wrs[4]; /* ours are under way, too */
    for (uint64_t i = 0; i < 4; i++)
        wrs[i] = new_wr(0, 0, 16 * MIB, 1);
    int taken = provider->post(me.lane, wrs, 4);
    kill(server_pid, SIGKILL);
    int64_t began = now_ns();
    AWAIT(me.down, "death was not seen");
    CHECK(now_ns() - began < INT64_C(1000000000), "seen after %lld us",
          (long long)(now_ns() - began) / 1000);
    CHECK(strstr(me.down_text, "exited"), "text: %s", me.down_text);
    CHECK(provider->post(me.lane, wrs, 1) < 0, "post on a dead lane");
    CHECK(kill((pid_t)child.pid, 0) == 0, "the child should live");
    CHECK(provider->lane_close(me.lane) == 0, "a dead peer is nowhere inside");
    me.lane = NULL;
    CHECK(taken >= 0 && me.done == (uint64_t)taken, "%llu of %d reported",
          (unsigned long long)me.done, taken);
    uint8_t *copy = malloc(me.dst.length);
    CHECK(is_still(copy, 100), "bytes land after the fence");
    free(copy);
    kill((pid_t)child.pid, SIGKILL);
    kill_server();
    close_all();
}

static void test_kill(void)
{
    kill_writer(true, NULL);
    kill_writer(false, "auto");
    kill_writer(false, "staging");
}

/* The receiver closes while the sender writes; after that no byte changes. */
static void test_fence(void)
{
    for (int i = 0; i < 12; i++) {
        struct setup setup = {.dst_shared = i % 3 != 1,
                              .dst_bytes = MIB,
                              .src_bytes = MIB,
                              .grants = true,
                              .mode = i % 3 == 2 ? "staging" : NULL};
        begin(&setup);
        order((struct order){.type = O_WRITE, .value = MIB});
        uint64_t enough = 1 + next_random() % 20;
        AWAIT(me.imms >= enough, "no writes");
        uint64_t counted = me.imms;
        if (!close_lane())
            break;
        uint8_t *copy = malloc(me.dst.length);
        CHECK(is_still(copy, 30), "bytes land after the fence");
        CHECK(me.imms == counted, "an immediate after the fence");
        free(copy);
        kill_server();
        close_all();
    }
}

/* A stopped writer: either it is outside and the fence is done at once, or it is inside and the
 * fence is pending until it goes on. */
static void stop_writer(int *inside, int *outside)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB, .grants = true};
    begin(&setup);
    order((struct order){.type = O_WRITE, .value = next_random() % 2 ? 64 : MIB});
    int64_t end = now_ns() + (int64_t)(next_random() % 3000000) + 1000000;
    while (now_ns() < end)
        poll_nic();
    stop_server();
    int rc = provider->lane_close(me.lane);
    uint8_t *copy = malloc(me.dst.length);
    memcpy(copy, me.dst.base, me.dst.length);
    CHECK(rc == 0 || rc == -EINPROGRESS, "lane_close %d", rc);
    if (rc) {
        sleep_ms(5);
        CHECK(provider->lane_close(me.lane) == -EINPROGRESS, "it is still inside");
    }
    *(rc ? inside : outside) += 1;
    kill(server_pid, SIGCONT);
    if (rc && close_lane())
        memcpy(copy, me.dst.base, me.dst.length);
    me.lane = NULL;
    sleep_ms(20);
    CHECK(memcmp(copy, me.dst.base, me.dst.length) == 0, "bytes land after the fence");
    free(copy);
    kill_server();
    close_all();
}

/* The same for a stopped owner that copies from our source: when the lane is closed the source
 * may be reused. */
static void stop_owner(const char *mode, int *inside, int *outside)
{
    struct setup setup = {.dst_bytes = 8 * MIB, .src_bytes = 8 * MIB, .mode = mode};
    begin(&setup);
    memset(me.src.base, 1, 8 * MIB);
    struct fab_wr wr = new_wr(0, 0, 8 * MIB, 1);
    post_all(&wr, 1);
    int64_t end = now_ns() + (int64_t)(next_random() % 800000);
    while (now_ns() < end)
        poll_nic();
    stop_server();
    int rc = provider->lane_close(me.lane);
    CHECK(rc == 0 || rc == -EINPROGRESS, "lane_close %d", rc);
    *(rc ? inside : outside) += 1;
    if (rc) {
        CHECK(me.done == 0, "reported while the owner may still read");
        kill(server_pid, SIGCONT);
        close_lane();
    }
    CHECK(me.done == 1, "%llu reported", (unsigned long long)me.done);
    me.lane = NULL;
    memset(me.src.base, 2, 8 * MIB); /* poison */
    kill(server_pid, SIGCONT);
    sleep_ms(10);
    struct report r = order((struct order){.type = O_SCAN, .value = 2});
    CHECK(r.ok, "reused source memory was copied");
    quit();
}

static void test_stop(void)
{
    int inside = 0, outside = 0;
    for (int i = 0; i < 16 || (i < 200 && !(inside && outside)); i++)
        stop_writer(&inside, &outside);
    printf("  writer stopped inside a copy: %d, outside: %d\n", inside, outside);
    CHECK(inside && outside, "both cases should come up");
    inside = outside = 0;
    for (int i = 0; i < 16; i++)
        stop_owner(i % 2 ? "staging" : NULL, &inside, &outside);
    printf("  owner stopped inside a copy: %d, outside: %d\n", inside, outside);
}

/* The asker closes while the owner copies: its sources may be reused at once. */
static void test_pull_close(void)
{
    for (int i = 0; i < 12; i++) {
        struct setup setup = {.dst_bytes = 8 * MIB,
                              .src_bytes = 8 * MIB,
                              .src_shared = i % 3 == 0,
                              .mode = i % 3 == 2 ? "staging" : NULL};
        begin(&setup);
        memset(me.src.base, 1, 8 * MIB);
        struct fab_wr wrs[8];
        for (uint64_t k = 0; k < 8; k++)
            wrs[k] = new_wr(k * MIB, k * MIB, MIB, 1);
        post_all(wrs, 8);
        int64_t end = now_ns() + (int64_t)(next_random() % 1000000);
        while (now_ns() < end)
            poll_nic();
        if (!close_lane())
            break;
        CHECK(me.done == 8, "%llu of 8 reported", (unsigned long long)me.done);
        memset(me.src.base, 2, 8 * MIB); /* poison: must never arrive */
        sleep_ms(20);
        struct report r = order((struct order){.type = O_SCAN, .value = 2});
        CHECK(r.ok, "reused source memory was copied");
        CHECK(r.imms >= 8 - me.failed, "%llu counted", (unsigned long long)r.imms);
        quit();
    }
}

/* Memory that its owner could take away while we write to it. */
static void test_bad_memory(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    struct fab_remote *remote;
    int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(ftruncate(fd, MIB) == 0, "ftruncate");
    CHECK(provider->import(me.lane, 5, MIB, fd, false, &remote) == -EPERM, "unsealed");
    fd = memfd_create("half", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(ftruncate(fd, MIB / 2) == 0, "ftruncate");
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == 0, "seal");
    CHECK(provider->import(me.lane, 5, MIB, fd, false, &remote) == -EINVAL, "too small");
    fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
    CHECK(provider->import(me.lane, 5, MIB, fd, false, &remote) < 0, "no memfd at all");
    CHECK(provider->import(me.lane, 5, MIB, -1, false, &remote) == -EBADF, "no fd");
    CHECK(provider->import(me.lane, 5, 0, -1, true, &remote) == 0, "pulled");
    provider->unimport(remote);
    struct fab_wr wr = new_wr(0, MIB - 10, 11, 1);
    post_all(&wr, 1);
    CHECK(me.failed == 1 && me.last_status == -EINVAL, "out of bounds: %d", me.last_status);
    wr = new_wr(MIB - 10, 0, 11, 1);
    post_all(&wr, 1);
    CHECK(me.failed == 2, "source out of bounds");
    quit();
}

/* Pulls that the owner must refuse. */
static void test_bad_pull(void)
{
    struct setup setup = {.dst_bytes = MIB, .src_bytes = 2 * MIB};
    begin(&setup);
    struct fab_remote *good = me.remote, *bad;
    CHECK(provider->import(me.lane, 999, 2 * MIB, -1, true, &bad) == 0, "import");
    me.remote = bad;
    write_and_wait(0, 0, 100, 1);
    CHECK(me.failed == 1 && me.last_status == -EACCES, "unknown region: %d", me.last_status);
    provider->unimport(bad);
    CHECK(provider->import(me.lane, 11, 2 * MIB, -1, true, &bad) == 0, "import");
    me.remote = bad; /* says more than there is: not even the part that fits may land */
    memset(me.src.base, 9, 2 * MIB);
    write_and_wait(0, MIB / 2, MIB, 1);
    CHECK(me.failed == 2 && me.last_status == -EACCES, "too long: %d", me.last_status);
    struct report r = order((struct order){.type = O_SCAN, .value = 9});
    CHECK(r.ok && r.imms == 0, "a part of a refused write has landed");
    me.remote = good;
    write_and_wait(0, 0, 100, 1);
    CHECK(me.failed == 2, "a good one after it: %d", me.last_status);
    munmap(me.src.base + MIB, MIB); /* the source vanishes: an error, no crash */
    if (((struct local_lane *)me.lane)->peer_reads) {
        write_and_wait(MIB - 100, 0, 200, 1);
        CHECK(me.failed == 3 && me.last_status == -EFAULT, "no source: %d", me.last_status);
    }
    provider->unimport(bad);
    me.src.length = MIB;
    quit();
}

/* ---- hostile and unlucky peers ---- */

static int raw_connect(const uint8_t *blob)
{
    struct local_end end;
    int rc = fab_local_dial(blob, &end);
    if (rc)
        return -1;
    close(end.pidfd);
    return end.sock;
}

static void send_garbage(int sock, int kind)
{
    uint8_t bytes[FAB_FRAME_MAX + 512];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)next_random();
    struct local_note note = {.magic = LOCAL_NOTE_MAGIC,
                              .version = LOCAL_VERSION,
                              .type = LOCAL_SETUP,
                              .number = (uint32_t)next_random(),
                              .serial = sizeof(struct local_inbox)};
    int fds[4] = {sock, sock, sock, sock};
    switch (kind % 8) {
    case 0: /* noise */
        fab_local_send(sock, bytes, 1 + next_random() % FAB_FRAME_MAX, NULL, 0);
        break;
    case 1: /* too long */
        fab_local_send(sock, bytes, sizeof bytes, NULL, 0);
        break;
    case 2: /* the right magic, the wrong length */
        fab_local_send(sock, &note, sizeof note - 1 - next_random() % 30, NULL, 0);
        break;
    case 3: /* descriptors that are no memory */
        fab_local_send(sock, &note, sizeof note, fds, 2);
        fab_local_send(sock, bytes, 100, NULL, 0);
        break;
    case 4: /* too few or too many of them */
        fab_local_send(sock, &note, sizeof note, fds, next_random() % 2 ? 1 : 4);
        break;
    case 5: /* another version, another type */
        note.version = 99;
        fab_local_send(sock, &note, sizeof note, fds, 2);
        break;
    case 6: /* a hello without SETUP */
        bytes[0] = 0xB1;
        bytes[1] = 0xFA;
        fab_local_send(sock, bytes, 200, fds, 3);
        break;
    default: /* silence */
        break;
    }
}

/* Strangers send rubbish before, between and instead of handshakes. */
static void test_garbage_connections(void)
{
    enum { STRANGERS = 200 };
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    start_server(&setup);
    uint8_t blob[LOCAL_NAME_BYTES];
    hear(blob, sizeof blob);
    int socks[STRANGERS];
    for (int i = 0; i < STRANGERS; i++) {
        socks[i] = raw_connect(blob);
        if (socks[i] < 0)
            continue;
        fcntl(socks[i], F_SETFL, O_NONBLOCK);
        send_garbage(socks[i], i);
        if (i % 3 == 0) {
            close(socks[i]);
            socks[i] = -1;
        }
    }
    sleep_ms(50);
    open_nic();
    open_region(&me.src, MIB, false, 22);
    connect_to(blob);
    AWAIT(me.remote, "no grant");
    write_and_wait(0, 0, MIB, 1);
    for (int i = 0; i < STRANGERS; i++)
        if (socks[i] >= 0)
            close(socks[i]);
    quit();
}

/* Rubbish on a lane that stands: it goes down, the process does not. */
static void test_garbage_on_lane(void)
{
    for (int kind = 0; kind < 7; kind++) {
        struct setup setup = {
            .dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB, .mode = "staging"};
        begin(&setup);
        struct local_lane *lane = (struct local_lane *)me.lane;
        for (int i = 0; i < 3; i++)
            send_garbage(lane->end.sock, kind);
        sleep_ms(5);
        struct report r = order((struct order){.type = O_CHECK});
        /* Noise and foreign frames are the core's to judge, all else ends the lane. */
        CHECK(r.down == (kind != 0 && kind != 6), "kind %d: down %d", kind, (int)r.down);
        quit();
    }
}

/* A peer scribbles over everything that the server shares with it. */
static void test_scribble(void)
{
    for (int i = 0; i < 16; i++) {
        struct setup setup = {.dst_shared = i & 1,
                              .dst_bytes = MIB,
                              .src_bytes = MIB,
                              .mode = i & 2 ? "staging" : NULL};
        begin(&setup);
        struct local_lane *lane = (struct local_lane *)me.lane;
        write_and_wait(0, 0, MIB, 1);
        uint64_t *words = (uint64_t *)(void *)lane->out;
        size_t count = sizeof *lane->out / sizeof *words;
        for (int n = 0; n < 200000; n++) {
            uint64_t junk = next_random();
            words[next_random() % count] = n & 1 ? junk : junk % 5;
            lane->bell->bits[next_random() % LOCAL_WORDS] = junk;
        }
        memset(lane->out->imms, 0xff, sizeof lane->out->imms);
        for (size_t k = 0; k < LOCAL_PULLS; k++) /* well-formed, with wild contents */
            lane->out->pulls[k] =
                (struct local_pull){.state = LOCAL_PULL_POSTED,
                                    .from = (uint32_t)(next_random() % 4),
                                    .serial = next_random() % 3,
                                    .source = next_random(),
                                    .region = 11,
                                    .offset = next_random() % (2 * MIB),
                                    .length = next_random() >> (next_random() % 64)};
        lane->out->closed = 0;
        lane->bell->bits[lane->out_bit / 64] |= UINT64_C(1) << (lane->out_bit % 64);
        sleep_ms(20);
        struct report r = order((struct order){.type = O_SCAN, .value = 300});
        CHECK(r.pid == server_pid, "the server is gone");
        lane->out->busy = 0; /* else its fence is pending, rightly, as long as we live */
        lane->out->pulling = 0;
        quit();
    }
}

/* The first hellos are answered without a lane; the last one on the same connection gets in. */
static void test_challenge(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB, .challenges = 3};
    begin(&setup);
    write_and_wait(0, 0, MIB, 1);
    quit();
}

/* A newcomer that goes away while the core holds its origin, in one process for once. */
static void test_origin_gone(void)
{
    memset(&me, 0, sizeof me);
    unsetenv("FABRIC_LOCAL_PULL");
    open_nic();
    me.hold_origin = true;
    struct fab_lane *lane;
    CHECK(provider->lane_open(me.nic, NULL, &lane) == 0, "lane_open");
    CHECK(provider->lane_connect(lane, me.nic->info.blob, 5) == -EINVAL, "short blob");
    uint8_t nobody[LOCAL_NAME_BYTES] = {1};
    int rc = provider->lane_connect(lane, nobody, sizeof nobody);
    CHECK(rc == -ECONNREFUSED, "nobody there: %d", rc);
    CHECK(provider->lane_connect(lane, me.nic->info.blob, LOCAL_NAME_BYTES) == 0, "connect");
    CHECK(provider->lane_connect(lane, me.nic->info.blob, LOCAL_NAME_BYTES) == 0, "again");
    struct frame f = {.magic = 0xFAB1, .type = T_HELLO};
    for (int i = 0; i < 3; i++)
        CHECK(provider->lane_send(lane, (uint8_t *)&f, sizeof f, NULL) == 0, "hello");
    AWAIT(me.held, "no hello");
    for (int i = 0; i < 1000; i++)
        poll_nic();
    CHECK(me.hellos == 1, "a claimed origin says nothing more: %u", me.hellos);
    CHECK(provider->lane_close(lane) == 0, "close");
    AWAIT(me.gone == 1, "origin_gone");
    close_all();
}

/* More newcomers at once than there are places for; all of them in one process. */
static void test_crowd(void)
{
    static struct fab_lane *hosts[CROWD];
    memset(&me, 0, sizeof me);
    open_nic();
    me.crowd = true;
    struct frame f = {.magic = 0xFAB1, .type = T_HELLO};
    for (int i = 0; i < CROWD; i++) {
        CHECK(provider->lane_open(me.nic, NULL, &hosts[i]) == 0, "lane_open");
        int rc = provider->lane_connect(hosts[i], me.nic->info.blob, LOCAL_NAME_BYTES);
        CHECK(rc == 0, "lane_connect %d", rc);
        rc = provider->lane_send(hosts[i], (uint8_t *)&f, sizeof f, NULL);
        CHECK(rc == 0, "hello %d", rc);
    }
    AWAIT(me.welcomes == CROWD, "%u welcomes", me.welcomes);
    for (uint32_t round = 0; round < 100; round++) {
        struct fab_wr wr = {.imm = round, .flags = FAB_WR_IMM};
        for (int i = 0; i < CROWD; i++) {
            AWAIT(provider->post(hosts[i], &wr, 1) == 1, "post there");
            AWAIT(provider->post(me.guests[i], &wr, 1) == 1, "post back");
        }
        AWAIT(me.imms == (round + 1) * 2 * CROWD, "%llu immediates", (unsigned long long)me.imms);
    }
    for (int i = 0; i < CROWD; i++) {
        CHECK(provider->lane_close(hosts[i]) == 0, "close");
        CHECK(provider->lane_close(me.guests[i]) == 0, "close");
    }
    close_all();
}

static void test_options(void)
{
    struct fab_nic *nic;
    struct fab_nic_options options = {.name = "eth7", .sink = &sink};
    CHECK(provider->nic_open(&options, &nic) == -ENODEV, "unknown name");
    options.name = "local0";
    setenv("FABRIC_LOCAL_PULL", "telepathy", 1);
    CHECK(provider->nic_open(&options, &nic) == -EINVAL, "bad mode");
    CHECK(strstr(reason, "telepathy"), "reason: %s", reason);
    unsetenv("FABRIC_LOCAL_PULL");
    fab_nic_info info;
    CHECK(provider->list(&info, 1) == 1 && info.kind == FAB_KIND_LOCAL && info.ordered, "list");
    CHECK(provider->list(NULL, 0) == 1, "list of none");
}

/* In a forked child the engine gives up its descriptors; the parent does not notice. */
static void test_fork(void)
{
    int before = count_entries("/proc/self/fd");
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    write_and_wait(0, 0, MIB, 1);
    pid_t child = fork();
    if (child == 0) {
        provider->after_fork(me.nic);
        close(line);
        _exit(count_entries("/proc/self/fd") != before);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "descriptors are left in the child");
    write_and_wait(0, 0, MIB, 1);
    quit();
}

/* ---- rough figures ---- */

static int compare(const void *a, const void *b)
{
    const int64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void bench_ping(void)
{
    enum { ROUNDS = 200000 };
    static int64_t times[ROUNDS];
    struct setup setup = {.dst_shared = true,
                          .dst_bytes = MIB,
                          .src_bytes = MIB,
                          .src_shared = true,
                          .grants = true,
                          .server = echo_server};
    begin(&setup);
    for (uint64_t i = 0; i < ROUNDS; i++) {
        int64_t began = now_ns();
        struct fab_wr wr = new_wr(0, 0, 8, 1);
        provider->post(me.lane, &wr, 1);
        while (me.imms <= i)
            poll_nic();
        times[i] = now_ns() - began;
    }
    qsort(times, ROUNDS, sizeof *times, compare);
    printf("ping-pong of 8 bytes: p50 %lld ns, p99 %lld ns\n", (long long)times[ROUNDS / 2],
           (long long)times[ROUNDS / 100 * 99]);
    close_all();
    kill_server();
}

static void bench_bytes(const char *what, struct setup setup, uint64_t size, uint64_t footprint)
{
    setup.dst_bytes = setup.src_bytes = footprint;
    begin(&setup);
    uint64_t count = 8 * (UINT64_C(1) << 30) / 4 / size, chains = count / WRS;
    int64_t began = 0;
    for (uint64_t c = 0; c < chains + footprint / size / WRS; c++) {
        if (c == footprint / size / WRS)
            began = now_ns(); /* all pages have been touched */
        struct fab_wr wrs[WRS];
        for (uint64_t i = 0; i < WRS; i++)
            wrs[i] =
                new_wr((c * WRS + i) * size % footprint, (c * WRS + i) * size % footprint, size, 1);
        uint64_t done = me.done;
        post_all(wrs, WRS);
        while (me.done < done + WRS)
            poll_nic();
    }
    double seconds = (double)(now_ns() - began) / 1e9;
    printf("%s, %llu KiB each, footprint %llu MiB: %.1f GB/s\n", what,
           (unsigned long long)size / 1024, (unsigned long long)(footprint / MIB),
           (double)(chains * WRS * size) / seconds / 1e9);
    quit();
}

static void bench_idle(void)
{
    struct setup setup = {.dst_shared = true, .dst_bytes = MIB, .src_bytes = MIB};
    begin(&setup);
    int64_t began = now_ns();
    for (int i = 0; i < 2000000; i++)
        poll_nic();
    printf("idle poll: %lld ns\n", (long long)(now_ns() - began) / 2000000);
    quit();
}

static void bench(void)
{
    bench_idle();
    bench_ping();
    struct setup direct = {.dst_shared = true}, memfd = {.src_shared = true}, vm = {0};
    struct setup staged = {.mode = "staging"};
    const uint64_t each[] = {16384, MIB};
    for (int i = 0; i < 2; i++) {
        bench_bytes("direct", direct, each[i], 32 * MIB);
        bench_bytes("direct", direct, each[i], 512 * MIB);
        bench_bytes("pull from memfd", memfd, each[i], 32 * MIB);
        bench_bytes("pull from process", vm, each[i], 32 * MIB);
        bench_bytes("pull from staging", staged, each[i], 32 * MIB);
    }
}

/* ---- main ---- */

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"options", test_options},
    {"direct", test_direct},
    {"pull_memfd", test_pull_memfd},
    {"pull_auto", test_pull_auto},
    {"pull_vm", test_pull_vm},
    {"pull_staged", test_pull_staged},
    {"pull_many_sources", test_pull_many_sources},
    {"order", test_order},
    {"ring_full", test_ring_full},
    {"room_wakes", test_room_wakes},
    {"sleep", test_sleep},
    {"sleepers", test_sleepers},
    {"frames", test_frames},
    {"kill", test_kill},
    {"fence", test_fence},
    {"stop", test_stop},
    {"pull_close", test_pull_close},
    {"bad_memory", test_bad_memory},
    {"bad_pull", test_bad_pull},
    {"garbage_connections", test_garbage_connections},
    {"garbage_on_lane", test_garbage_on_lane},
    {"scribble", test_scribble},
    {"challenge", test_challenge},
    {"origin_gone", test_origin_gone},
    {"crowd", test_crowd},
    {"fork", test_fork},
};

static void run_test(size_t i)
{
    int fds = count_entries("/proc/self/fd"), shm = count_entries("/dev/shm");
    int64_t began = now_ns();
    int failed = failures;
    tests[i].run();
    int fds_after = count_entries("/proc/self/fd"), shm_after = count_entries("/dev/shm");
    CHECK(fds == fds_after, "%d file descriptors before, %d after", fds, fds_after);
    CHECK(shm == shm_after, "%d entries in /dev/shm before, %d after", shm, shm_after);
    printf("%-20s %s %6lld ms\n", tests[i].name, failures == failed ? "ok  " : "FAIL",
           (long long)(now_ns() - began) / 1000000);
}

int main(int argc, char **argv)
{
    seed = (uint64_t)now_ns() ^ (uint64_t)getpid();
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        bench();
        return failures != 0;
    }
    if (argc > 1)
        seed = strtoull(argv[1], NULL, 0);
    printf("seed %llu\n", (unsigned long long)seed);
    signal(SIGPIPE, SIG_DFL); /* the provider must never raise it */
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (argc < 3 || !strcmp(argv[2], tests[i].name))
            run_test(i);
    printf(failures ? "%d failures\n" : "all good\n", failures);
    return failures != 0;
}
