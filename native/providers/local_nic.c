/* The NIC of the same-host provider: open and close, registrations, poll and arm, the vtable.
 *
 * Contract
 * - There is one, "local0", on every host. Who can connect to its socket is on the same host.
 * - An idle poll() makes no system call but one look at the sockets every LOCAL_SWEEP_NS: peers
 *   set a bit in our bell for everything they put into shared memory or into a socket.
 * - The bell is shared with all peers, so what one of them scribbles there may hide another's
 *   bit: every LOCAL_SCAN_NS, and before sleeping, all lanes are looked at.
 * - A turn copies about LOCAL_TURN_BYTES; lanes that have more to copy take turns.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "local.h"

#define LOCAL_NIC_NAME "local0"

/* ---- open and close ---- */

static void fill_info(fab_nic_info *info)
{
    memset(info, 0, sizeof *info);
    info->kind = FAB_KIND_LOCAL;
    snprintf(info->provider, sizeof info->provider, "local");
    snprintf(info->name, sizeof info->name, LOCAL_NIC_NAME);
    info->max_write = UINT64_MAX / 2;
    info->ordered = 1;
    info->up = 1;
}

static int local_list(fab_nic_info *out, uint32_t max)
{
    if (max)
        fill_info(out);
    return 1;
}

static int read_mode(enum local_pull_mode *mode)
{
    static const char *const names[] = {"auto", "vm", "staging"};
    const char *wanted = getenv("FABRIC_LOCAL_PULL");
    *mode = LOCAL_MODE_AUTO;
    if (!wanted || !*wanted)
        return 0;
    for (int i = 0; i < 3; i++)
        if (!strcmp(wanted, names[i])) {
            *mode = (enum local_pull_mode)i;
            return 0;
        }
    fab_fail_text("FABRIC_LOCAL_PULL is '%.32s'; it takes auto, vm or staging", wanted);
    return -EINVAL;
}

static void close_fds(struct local_nic *nic)
{
    int *const fds[] = {&nic->epoll, &nic->listener, &nic->spare, &nic->bell_fd};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

static int open_socket(struct local_nic *nic)
{
    fab_nic_info *info = &nic->base.info;
    if (getrandom(info->blob, LOCAL_NAME_BYTES, 0) != LOCAL_NAME_BYTES)
        return -EIO;
    info->blob_len = LOCAL_NAME_BYTES;
    nic->listener = fab_local_listen(info->blob);
    if (nic->listener < 0)
        return nic->listener;
    nic->epoll = epoll_create1(EPOLL_CLOEXEC);
    nic->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (nic->epoll < 0 || nic->spare < 0)
        return -errno;
    fab_local_watch(nic, EPOLL_CTL_ADD, nic->listener, EPOLLIN, LOCAL_E_LISTENER, 0);
    nic->base.wait_fd = nic->epoll;
    return 0;
}

static int open_bell(struct local_nic *nic)
{
    void *map;
    int rc = fab_local_share("llm-fabric bell", sizeof *nic->bell, &map, &nic->bell_fd);
    if (rc == 0)
        nic->bell = map;
    return rc;
}

static void local_close(struct fab_nic *base)
{
    struct local_nic *nic = (struct local_nic *)base;
    for (uint32_t i = 0; nic->origin_count && i < LOCAL_ORIGINS; i++)
        if (nic->origins[i].state != LOCAL_O_FREE)
            fab_local_origin_close(nic, &nic->origins[i]);
    close_fds(nic);
    fab_local_unmap(nic->bell, sizeof *nic->bell);
    fab_local_cache_close(&nic->cache);
    free(nic);
}

static int local_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    if (options->name && strcmp(options->name, LOCAL_NIC_NAME) != 0) {
        fab_fail_text("no NIC '%.32s' here: the same-host provider has " LOCAL_NIC_NAME " only",
                      options->name);
        return -ENODEV;
    }
    enum local_pull_mode mode;
    int rc = read_mode(&mode);
    if (rc)
        return rc;
    struct local_nic *nic = calloc(1, sizeof *nic);
    if (!nic)
        return -ENOMEM;
    fill_info(&nic->base.info);
    nic->base.provider = &fab_provider_local;
    nic->base.sink = options->sink;
    nic->base.engine = options->engine;
    nic->base.index = options->index;
    nic->base.fences = true;
    nic->mode = mode;
    nic->epoll = nic->listener = nic->spare = nic->bell_fd = -1;
    rc = fab_local_cache_open(&nic->cache);
    if (!rc)
        rc = open_bell(nic);
    if (!rc) {
        rc = open_socket(nic);
        if (rc)
            fab_fail_text("opening " LOCAL_NIC_NAME ": errno %d", -rc);
    }
    if (rc) {
        local_close(&nic->base);
        return rc;
    }
    *out = &nic->base;
    return 0;
}

/* ---- memory ---- */

static int local_mr_reg(struct fab_nic *base, const struct fab_memory *memory, struct fab_mr **out,
                        fab_key *key)
{
    (void)base; /* a registration becomes known to lanes when they need it */
    if (memory->kind != FAB_MEM_HOST) {
        fab_fail_text(LOCAL_NIC_NAME " moves host memory only");
        return -ENOTSUP;
    }
    struct fab_mr *mr = malloc(sizeof *mr);
    if (!mr)
        return -ENOMEM;
    *mr = (struct fab_mr){.base = memory->base,
                          .length = memory->length,
                          .number = memory->number,
                          .memfd = memory->memfd};
    *out = mr;
    /* Peers name an offset: the region lies elsewhere in each of them. */
    *key = (fab_key){.addr = 0, .rkey = memory->number};
    return 0;
}

static int local_mr_dereg(struct fab_nic *base, struct fab_mr *mr)
{
    struct local_nic *nic = (struct local_nic *)base;
    for (uint32_t i = 0; i < nic->words * 64; i++)
        if (nic->lanes[i])
            fab_local_hide(nic->lanes[i], mr);
    free(mr);
    return 0;
}

static int local_import(struct fab_lane *lane, uint64_t number, uint64_t length, int fd,
                        bool pulled, struct fab_remote **out)
{
    (void)lane; /* a mapping belongs to nobody */
    void *map = NULL;
    int rc = 0;
    struct fab_remote *remote = malloc(sizeof *remote);
    if (!remote)
        rc = -ENOMEM;
    if (!rc && !pulled) {
        if (fd < 0)
            fab_fail_text("the grant of region %llu came without its memory",
                          (unsigned long long)number);
        rc = fd < 0 ? -EBADF : fab_local_map(fd, length, PROT_READ | PROT_WRITE, &map);
    }
    if (fd >= 0)
        close(fd);
    if (rc) {
        free(remote);
        return rc;
    }
    *remote = (struct fab_remote){.number = number, .length = length, .map = map};
    *out = remote;
    return 0;
}

static void local_unimport(struct fab_remote *remote)
{
    fab_local_unmap(remote->map, remote->length);
    free(remote);
}

/* ---- turns ---- */

static int lane_event(struct local_nic *nic, const struct epoll_event *event, uint32_t index)
{
    struct local_lane *lane = index < LOCAL_LANES ? nic->lanes[index] : NULL;
    if (!lane)
        return 0;
    if (event->data.u64 >> 32 == LOCAL_E_PIDFD) {
        fab_local_fail(lane, -ECONNRESET, "process %d has exited", (int)lane->end.pid);
        return 1;
    }
    return fab_local_lane_event(lane, event->events);
}

static int sweep(struct local_nic *nic, int64_t now)
{
    struct epoll_event events[LOCAL_EVENTS];
    int count = epoll_wait(nic->epoll, events, LOCAL_EVENTS, 0), n = 0;
    for (int i = 0; i < count; i++) {
        uint32_t index = (uint32_t)events[i].data.u64;
        switch ((enum local_event)(events[i].data.u64 >> 32)) {
        case LOCAL_E_LISTENER:
            n += fab_local_origin_accept(nic, now);
            break;
        case LOCAL_E_ORIGIN:
            n += fab_local_origin_event(nic, &nic->origins[index]);
            break;
        case LOCAL_E_SOCKET:
        case LOCAL_E_PIDFD:
            n += lane_event(nic, &events[i], index);
            break;
        }
    }
    /* Where something came, more is likely to follow at once: a handshake has several steps. */
    nic->next_sweep = count > 0 ? now : now + LOCAL_SWEEP_NS;
    fab_local_origin_expire(nic, now);
    return n;
}

static void scan(struct local_nic *nic)
{
    for (uint32_t i = 0; i < nic->words * 64; i++) {
        struct local_lane *lane = nic->lanes[i];
        if (!lane)
            continue;
        if (fab_local_lane_waiting(lane))
            fab_local_lane_pend(lane);
        if (lane->unmaps)
            fab_local_unmaps(lane);
    }
}

/* Adds what peers rang for to the pending lanes. True: there are some. */
static bool collect(struct local_nic *nic)
{
    uint64_t any = 0;
    for (uint32_t w = 0; w < nic->words; w++) {
        if (atomic_load_explicit(&nic->bell->bits[w], memory_order_relaxed)) {
            nic->pending[w] |= atomic_exchange(&nic->bell->bits[w], 0);
            /* The bit goes before our look at the lane: what is put later rings again. */
            atomic_thread_fence(memory_order_seq_cst);
        }
        any |= nic->pending[w];
    }
    return any != 0;
}

/* The first set bit at or after `from`, wrapping around, which is then cleared. -1: none. */
static int take_bit(uint64_t *words, uint32_t count, uint32_t from)
{
    uint32_t w = from / 64 < count ? from / 64 : 0;
    uint64_t mask = ~UINT64_C(0) << (from % 64);
    for (uint32_t k = 0; k <= count; k++) {
        uint64_t bits = words[w] & mask;
        if (bits) {
            int bit = __builtin_ctzll(bits);
            words[w] &= ~(UINT64_C(1) << bit);
            return (int)(w * 64) + bit;
        }
        mask = ~UINT64_C(0);
        w = w + 1 < count ? w + 1 : 0;
    }
    return -1;
}

/* One turn of every pending lane, as far as events and bytes go. */
static int run_lanes(struct local_nic *nic, int budget)
{
    uint64_t todo[LOCAL_WORDS];
    uint32_t words = nic->words; /* most engines use one of them */
    for (uint32_t w = 0; w < words; w++) {
        todo[w] = nic->pending[w];
        nic->pending[w] = 0;
    }
    int n = 0, bit;
    while (n < budget && nic->allowance && (bit = take_bit(todo, words, nic->cursor)) >= 0) {
        nic->cursor = (uint32_t)bit + 1;
        if (nic->lanes[bit]) /* a peer may ring for what is not there */
            n += fab_local_lane_turn(nic->lanes[bit], budget - n);
    }
    for (uint32_t w = 0; w < words; w++)
        nic->pending[w] |= todo[w];
    return n;
}

static bool local_glance(const struct fab_nic *base)
{
    const struct local_nic *nic = (const struct local_nic *)base;
    uint32_t words = atomic_load_explicit(&nic->words, memory_order_relaxed);
    for (uint32_t w = 0; w < words; w++)
        if (atomic_load_explicit(&nic->bell->bits[w], memory_order_relaxed))
            return true;
    return false;
}

static int local_poll(struct fab_nic *base, int budget)
{
    struct local_nic *nic = (struct local_nic *)base;
    int64_t now = base->now;
    int n = 0;
    nic->allowance = LOCAL_TURN_BYTES;
    if (now >= nic->next_sweep)
        n += sweep(nic, now);
    if (now >= nic->next_scan) {
        nic->next_scan = now + LOCAL_SCAN_NS;
        scan(nic);
    }
    if (!collect(nic))
        return n;
    n += run_lanes(nic, budget > n ? budget - n : 1);
    /* Bytes that moved are something that happened, too. */
    return n ? n : nic->allowance < LOCAL_TURN_BYTES;
}

static void tell_sleeping(struct local_nic *nic, bool sleeping)
{
    nic->armed = sleeping;
    for (uint32_t i = 0; i < nic->words * 64; i++)
        if (nic->lanes[i] && !nic->lanes[i]->closing)
            atomic_store_explicit(&nic->lanes[i]->in->sleeping, sleeping, memory_order_relaxed);
}

static int local_arm(struct fab_nic *base)
{
    struct local_nic *nic = (struct local_nic *)base;
    tell_sleeping(nic, true);
    /* Orders `sleeping` before our look: a peer that puts something later sees it. */
    atomic_thread_fence(memory_order_seq_cst);
    scan(nic);
    if (!collect(nic))
        return 0;
    tell_sleeping(nic, false);
    return 1;
}

static void local_disarm(struct fab_nic *base)
{
    struct local_nic *nic = (struct local_nic *)base;
    tell_sleeping(nic, false);
    nic->next_sweep = 0; /* what woke us came through the sockets */
}

static void local_after_fork(struct fab_nic *base)
{
    struct local_nic *nic = (struct local_nic *)base;
    for (uint32_t i = 0; i < nic->words * 64; i++)
        if (nic->lanes[i])
            fab_local_lane_after_fork(nic->lanes[i]);
    for (uint32_t i = 0; i < LOCAL_ORIGINS; i++)
        fab_local_origin_after_fork(&nic->origins[i]);
    close_fds(nic);
}

const struct fab_provider fab_provider_local = {
    .name = "local",
    .kind = FAB_KIND_LOCAL,
    .list = local_list,
    .nic_open = local_open,
    .nic_close = local_close,
    .mr_reg = local_mr_reg,
    .mr_dereg = local_mr_dereg,
    .lane_open = fab_local_lane_open,
    .lane_connect = fab_local_lane_connect,
    .lane_close = fab_local_lane_close,
    .lane_send = fab_local_lane_send,
    .origin_reply = fab_local_origin_reply,
    .origin_drop = fab_local_origin_drop,
    .import = local_import,
    .unimport = local_unimport,
    .post = fab_local_post,
    .post_now = fab_local_post_now,
    .pages_now = fab_local_pages_now,
    .poll = local_poll,
    .glance = local_glance,
    .arm = local_arm,
    .disarm = local_disarm,
    .after_fork = local_after_fork,
};
