/* NICs over libfabric: "tcp", "efa" and "rxm"; the contract is in ofi.h and provider.h. */
#include "providers/ofi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* ---- NIC ---- */

static int watch_fd(struct ofi_nic *nic, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};

    return epoll_ctl(nic->base.wait_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int ofi_domain_watch(struct ofi_domain *domain)
{
    int fd = -1;

    if (!domain->waker)
        return 0;
    int rc = fi_control(&domain->waker->fid, FI_GETWAIT, &fd);
    return rc ? rc : watch_fd(domain->nic, fd);
}

/* Closing the file descriptor is not enough where a forked child has it, too. */
void ofi_domain_unwatch(struct ofi_domain *domain)
{
    int fd = -1;

    if (domain->waker && fi_control(&domain->waker->fid, FI_GETWAIT, &fd) == 0)
        (void)epoll_ctl(domain->nic->base.wait_fd, EPOLL_CTL_DEL, fd, NULL);
}

static int open_waiting(struct ofi_nic *nic)
{
    nic->base.wait_fd = epoll_create1(EPOLL_CLOEXEC);
    nic->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int rc = nic->base.wait_fd < 0 || nic->timer_fd < 0 ? -errno : watch_fd(nic, nic->timer_fd);
    if (rc == 0)
        rc = ofi_domain_watch(nic->data);
    if (rc == 0 && nic->listen != nic->data)
        rc = ofi_domain_watch(nic->listen);
    return rc ? ofi_fail(nic, "setting up waiting", rc) : 0;
}

static int open_domains(struct ofi_nic *nic)
{
    int rc = nic->lib->fabric(nic->info->fabric_attr, &nic->fabric, NULL);

    if (rc)
        return ofi_fail(nic, "opening the fabric", rc);
    rc = ofi_domain_open(nic, NULL, &nic->data);
    if (rc == 0 && nic->kind->lane_endpoints)
        return ofi_domain_open(nic, NULL, &nic->listen);
    nic->listen = nic->data;
    return rc;
}

static int poll_domain(struct ofi_domain *domain, int budget)
{
    int done = ofi_handle_queued(domain, budget);

    do {
        (void)ofi_domain_read(domain);
        done += ofi_handle_queued(domain, OFI_BATCH);
    } while (domain->more && done < budget);
    return done;
}

/* Frames that are under way, BYE among them, get some time: libfabric 2.5's efa can crash where an
 * endpoint is closed with a send outstanding, since it still reads the completion. */
static void await_ghosts(struct ofi_nic *nic)
{
    uint64_t until = ofi_now() + OFI_GHOST_NS;

    while (nic->graves && !nic->kind->lane_endpoints && ofi_now() < until) {
        if (poll_domain(nic->data, OFI_BATCH) == 0)
            (void)usleep(OFI_GHOST_NAP_US);
        ofi_lanes_exhume(nic, false);
    }
}

static void ofi_nic_close(struct fab_nic *base)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;

    await_ghosts(nic);
    (void)ofi_port_shut(&nic->port);
    ofi_lanes_exhume(nic, true);
    ofi_port_free(&nic->port);
    ofi_pool_close(&nic->replies);
    if (nic->listen != nic->data)
        ofi_domain_close(nic->listen);
    ofi_domain_close(nic->data);
    if (nic->fabric)
        (void)fi_close(&nic->fabric->fid);
    if (nic->timer_fd >= 0)
        (void)close(nic->timer_fd);
    if (nic->base.wait_fd >= 0)
        (void)close(nic->base.wait_fd);
    nic->lib->freeinfo(nic->info);
    free(nic->sources);
    free(nic->lanes);
    free(nic);
}

static int nic_start(struct ofi_nic *nic)
{
    int rc = open_domains(nic);

    if (rc == 0)
        rc = open_waiting(nic);
    if (rc == 0)
        rc = ofi_pool_open(&nic->replies, nic->listen, OFI_REPLIES, OFI_REPLY);
    if (rc == 0)
        rc = ofi_port_open(&nic->port, nic->listen, NULL);
    if (rc == 0)
        rc = ofi_port_receive(&nic->port, OFI_NIC_RECVS);
    if (rc == 0)
        ofi_blob_join(&nic->port, 0, nic->base.info.blob, &nic->base.info.blob_len);
    return rc;
}

static int nic_open(const struct fab_provider *provider, const struct ofi_kind *kind,
                    const struct fab_nic_options *options, struct fab_nic **out)
{
    struct ofi_nic *nic = calloc(1, sizeof(*nic));

    if (!nic)
        return -ENOMEM;
    nic->base.provider = provider;
    nic->base.sink = options->sink;
    nic->base.engine = options->engine;
    nic->base.index = options->index;
    nic->base.wait_fd = -1;
    nic->base.remote_needed = kind->remote_needed;
    nic->base.fences = kind->lane_endpoints;
    nic->timer_fd = -1;
    nic->kind = kind;
    nic->can_sleep = true;
    int rc = ofi_choose(kind, options->name, &nic->info);
    if (rc) {
        free(nic);
        return rc;
    }
    nic->lib = fab_libfabric();
    ofi_describe(kind, nic->info, &nic->base.info);
    rc = nic_start(nic);
    if (rc) {
        ofi_nic_close(&nic->base);
        return rc;
    }
    *out = &nic->base;
    return 0;
}

/* ---- memory ---- */

static int ofi_mr_reg(struct fab_nic *base, const struct fab_memory *memory, struct fab_mr **out,
                      fab_key *key)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;
    bool virtual = nic->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR;
    uint64_t access = FI_WRITE | FI_SEND | FI_RECV;

    if (memory->kind != FAB_MEM_HOST && !(nic->info->caps & FI_HMEM)) {
        fab_fail_text("%s %s cannot reach GPU memory", nic->kind->name, base->info.name);
        return -ENOTSUP;
    }
    struct ofi_mr *mr = calloc(1, sizeof(*mr));
    if (!mr)
        return -ENOMEM;
    if (base->fences)
        access |= FI_REMOTE_WRITE;
    else if (memory->remote)
        access = FI_REMOTE_WRITE;
    int rc = ofi_mr_open(nic->data, memory, access, mr);
    if (rc) {
        free(mr);
        return ofi_fail(nic, "registering memory", rc);
    }
    key->addr = virtual ? (uint64_t)(uintptr_t)memory->base : 0;
    key->rkey = fi_mr_key(mr->fid);
    *out = (struct fab_mr *)mr;
    return 0;
}

static int ofi_mr_dereg(struct fab_nic *base, struct fab_mr *opaque)
{
    struct ofi_mr *mr = (struct ofi_mr *)opaque;
    int rc = fi_close(&mr->fid->fid);

    if (rc)
        return ofi_fail((struct ofi_nic *)base, "deregistering memory", rc);
    free(mr);
    return 0;
}

/* Origins: a first frame says everything, so there is nothing to keep. */
static void ofi_origin_drop(struct fab_nic *base, struct fab_origin *origin)
{
    (void)base;
    (void)origin;
}

/* ---- progress ---- */

/* Queues of lanes, one after the other; the next poll goes on where the budget ended this one. */
static int poll_lanes(struct ofi_nic *nic, int budget)
{
    int done = 0;

    for (uint32_t i = 0; i < nic->lane_slots && done < budget; i++) {
        struct ofi_lane *lane = nic->lanes[nic->next_lane++ % nic->lane_slots];
        if (lane)
            done += poll_domain(lane->domain, OFI_BATCH);
    }
    return done;
}

static void flush_lanes(struct ofi_nic *nic)
{
    for (uint32_t i = 0; i < nic->lane_slots; i++) {
        struct ofi_lane *lane = nic->lanes[i];
        int rc = lane && lane->waiting.head ? ofi_lane_flush(lane) : 0;
        if (rc) {
            ofi_lane_down(lane, rc, "libfabric refused a control frame");
            ofi_lane_forget(lane);
        }
    }
}

/* True: all receive buffers of the port are posted. */
static bool refill(struct ofi_port *port)
{
    struct ofi_slot *slot;

    while ((slot = ofi_pool_take(&port->recvs)))
        if (ofi_port_recv(port, slot)) {
            ofi_pool_give(&port->recvs, slot);
            return false;
        }
    return true;
}

/* Receive buffers that could not be posted again when they were used. */
static void refill_all(struct ofi_nic *nic)
{
    nic->recvs_owed = !refill(&nic->port);
    for (uint32_t i = 0; i < nic->lane_slots; i++) {
        struct ofi_lane *lane = nic->lanes[i];
        if (lane && lane->port == &lane->own && !lane->closing && !refill(&lane->own))
            nic->recvs_owed = true;
    }
}

static int ofi_poll(struct fab_nic *base, int budget)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;
    int done = nic->kind->lane_queues ? poll_lanes(nic, budget) : poll_domain(nic->data, budget);

    if (nic->listen != nic->data && (nic->lane_count == 0 || ++nic->turn % OFI_LISTEN_TURN == 0)) {
        done += poll_domain(nic->listen, budget);
    }
    if (nic->graves && !nic->kind->lane_endpoints)
        ofi_lanes_exhume(nic, false);
    if (nic->recvs_owed)
        refill_all(nic);
    if (nic->credit_owed)
        ofi_credit_pay(nic);
    if (nic->waiting_frames)
        flush_lanes(nic);
    if (nic->waiting.head)
        ofi_replies_flush(nic);
    if (done)
        nic->nap_ns = 0;
    return done;
}

/* ---- sleep ---- */

/* When to look again for what waits for a connection; 0: never. */
static uint64_t next_retry(const struct ofi_nic *nic, uint64_t now)
{
    uint64_t first = nic->waiting.head || nic->recvs_owed ? now + OFI_RETRY_MAX_NS : 0;

    for (uint32_t i = 0; i < nic->lane_slots; i++) {
        const struct ofi_lane *lane = nic->lanes[i];
        if (!lane || !lane->retry_at || (lane->retry_at <= now && !lane->waiting.head))
            continue;
        if (!first || lane->retry_at < first)
            first = lane->retry_at;
    }
    return first;
}

/* Setting a timer also takes back a tick that was not read. */
static void set_timer(struct ofi_nic *nic, uint64_t at)
{
    struct itimerspec spec = {
        .it_value = {.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)},
    };

    if (!at && !nic->timer_set)
        return;
    (void)timerfd_settime(nic->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
    nic->timer_set = at != 0;
}

static bool has_event(struct ofi_domain *domain)
{
    struct fid *fid = domain->waker ? &domain->waker->fid : NULL;

    if (domain->queued || ofi_domain_read(domain) > 0)
        return true;
    return fid && fi_trywait(domain->nic->fabric, &fid, 1) == -FI_EAGAIN;
}

static bool lanes_have_event(const struct ofi_nic *nic)
{
    for (uint32_t i = 0; i < nic->lane_slots; i++)
        if (nic->lanes[i] && has_event(nic->lanes[i]->domain))
            return true;
    return false;
}

/* Where no file descriptor tells of completions, a timer does: each nap is half of the quiet so far,
 * so that what comes after a quiet of T is noticed within 1.5 T, and OFI_NAP_MAX_NS at most. */
static uint64_t next_nap(struct ofi_nic *nic)
{
    nic->nap_ns = nic->nap_ns ? nic->nap_ns + nic->nap_ns / 2 : OFI_NAP_MIN_NS;
    if (nic->nap_ns > OFI_NAP_MAX_NS)
        nic->nap_ns = OFI_NAP_MAX_NS;
    return nic->nap_ns;
}

static uint64_t sooner(uint64_t one, uint64_t other)
{
    return one && one < other ? one : other;
}

static int ofi_arm(struct fab_nic *base)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;
    uint64_t now = ofi_now();
    uint64_t retry = next_retry(nic, now);

    if (retry && retry <= now)
        return 1;
    if (!nic->can_sleep)
        retry = sooner(retry, now + next_nap(nic));
    set_timer(nic, retry);
    return (nic->kind->lane_queues ? lanes_have_event(nic) : has_event(nic->data)) ||
           (nic->listen != nic->data && has_event(nic->listen));
}

static void ofi_disarm(struct fab_nic *base)
{
    set_timer((struct ofi_nic *)base, 0);
}

/* libfabric's objects belong to the parent; calling into them could write to its sockets. */
static void ofi_after_fork(struct fab_nic *base)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;

    (void)close(nic->timer_fd);
    (void)close(nic->base.wait_fd);
    nic->timer_fd = -1;
    nic->base.wait_fd = -1;
}

/* ---- vtables ---- */

static int tcp_list(fab_nic_info *out, uint32_t max)
{
    return ofi_list(&ofi_tcp, out, max);
}

static int efa_list(fab_nic_info *out, uint32_t max)
{
    return ofi_list(&ofi_efa, out, max);
}

static int rxm_list(fab_nic_info *out, uint32_t max)
{
    return ofi_list(&ofi_rxm, out, max);
}

static int tcp_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    return nic_open(&fab_provider_tcp, &ofi_tcp, options, out);
}

static int efa_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    return nic_open(&fab_provider_efa, &ofi_efa, options, out);
}

static int rxm_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    return nic_open(&fab_provider_rxm, &ofi_rxm, options, out);
}

/* import and unimport are NULL: a work request's address and key say all. */
#define OFI_SHARED                                                                                \
    .nic_close = ofi_nic_close, .mr_reg = ofi_mr_reg, .mr_dereg = ofi_mr_dereg,                   \
    .lane_open = ofi_lane_open, .lane_connect = ofi_lane_connect, .lane_close = ofi_lane_close,   \
    .lane_send = ofi_lane_send, .origin_reply = ofi_origin_reply, .origin_drop = ofi_origin_drop, \
    .post = ofi_post, .poll = ofi_poll, .arm = ofi_arm, .disarm = ofi_disarm,                     \
    .after_fork = ofi_after_fork

const struct fab_provider fab_provider_tcp = {
    .name = "tcp",
    .kind = FAB_KIND_OFI_TCP,
    .list = tcp_list,
    .nic_open = tcp_nic_open,
    OFI_SHARED,
};

const struct fab_provider fab_provider_efa = {
    .name = "efa",
    .kind = FAB_KIND_OFI_EFA,
    .list = efa_list,
    .nic_open = efa_nic_open,
    OFI_SHARED,
};

const struct fab_provider fab_provider_rxm = {
    .name = "rxm",
    .kind = FAB_KIND_OFI_RXM,
    .list = rxm_list,
    .nic_open = rxm_nic_open,
    OFI_SHARED,
};
