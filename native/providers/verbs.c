/* NICs over ibverbs; the contract is in verbs.h and provider.h. */
#include "providers/verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

/* ---- NIC ---- */

static int watch_fd(struct verbs_nic *nic, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};

    return epoll_ctl(nic->base.wait_fd, EPOLL_CTL_ADD, fd, &event) ? errno : 0;
}

/* Wakes for completions, for what the device tells of itself, and for setups that ended. */
static int open_waiting(struct verbs_nic *nic)
{
    int flags = fcntl(nic->channel->fd, F_GETFL);
    int rc = fcntl(nic->channel->fd, F_SETFL, flags | O_NONBLOCK) < 0 ? errno : 0;

    nic->base.wait_fd = epoll_create1(EPOLL_CLOEXEC);
    if (rc == 0 && nic->base.wait_fd < 0)
        rc = errno;
    if (rc == 0)
        rc = watch_fd(nic, nic->channel->fd);
    if (rc == 0)
        rc = watch_fd(nic, nic->context->async_fd);
    if (rc == 0)
        rc = watch_fd(nic, nic->setup.wake_fd);
    return rc ? verbs_fail(nic, "setting up waiting", rc) : 0;
}

static int start(struct verbs_nic *nic)
{
    struct {
        uint64_t source;
        uint32_t qkey, serial;
    } dice;

    if (getrandom(&dice, sizeof(dice), 0) != sizeof(dice))
        return -errno;
    nic->source = dice.source;
    nic->serial = dice.serial;
    nic->qkey = dice.qkey & 0x7fffffff; /* the highest bit asks for a privileged one */
    nic->pd = nic->lib->alloc_pd(nic->context);
    if (!nic->pd)
        return verbs_fail(nic, "making a protection domain", errno);
    int rc = verbs_cq_open(nic);
    if (rc == 0)
        rc = verbs_receives_open(nic);
    if (rc == 0)
        rc = verbs_ud_open(nic);
    if (rc == 0)
        rc = verbs_setup_open(nic);
    return rc ? rc : open_waiting(nic);
}

static void close_queues(struct verbs_nic *nic)
{
    if (nic->ud)
        (void)nic->lib->destroy_qp(nic->ud);
    verbs_ahs_bury(nic, true);
    if (nic->imms.srq)
        (void)nic->lib->destroy_srq(nic->imms.srq);
    if (nic->frames.srq)
        (void)nic->lib->destroy_srq(nic->frames.srq);
    if (nic->cq)
        (void)nic->lib->destroy_cq(nic->cq);
    if (nic->channel)
        (void)nic->lib->destroy_comp_channel(nic->channel);
    if (nic->memory_mr)
        (void)nic->lib->dereg_mr(nic->memory_mr);
    if (nic->memory)
        (void)munmap(nic->memory, nic->memory_size);
    if (nic->pd)
        (void)nic->lib->dealloc_pd(nic->pd);
}

static void verbs_nic_close(struct fab_nic *base)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;

    verbs_setup_close(nic);
    for (uint32_t i = 0; i < nic->lane_slots; i++) /* whose setup ran while their session ended */
        if (nic->lanes[i])
            verbs_lane_abandon(&nic->lanes[i]->base);
    if (nic->base.wait_fd >= 0)
        (void)close(nic->base.wait_fd);
    close_queues(nic);
    if (nic->context)
        (void)nic->lib->close_device(nic->context);
    free(nic->queue);
    free(nic->partials);
    free(nic->lanes);
    free(nic->qpns);
    free(nic);
}

static int verbs_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    struct verbs_nic *nic = calloc(1, sizeof(*nic));
    struct verbs_blob blob;

    if (!nic)
        return -ENOMEM;
    nic->base.provider = &fab_provider_verbs;
    nic->base.sink = options->sink;
    nic->base.engine = options->engine;
    nic->base.index = options->index;
    nic->base.wait_fd = nic->setup.wake_fd = -1;
    nic->base.fences = true;
    nic->lib = fab_libibverbs();
    int rc = nic->lib ? verbs_options_read(&nic->options) : -ENOENT;
    if (rc == 0)
        rc = verbs_device_open(nic, options->name);
    if (rc == 0)
        rc = start(nic);
    if (rc) {
        verbs_nic_close(&nic->base);
        return rc;
    }
    nic->ack_timeout = nic->options.ack_timeout >= 0 ? (uint8_t)nic->options.ack_timeout
                                                     : verbs_ack_timeout(options->peer_timeout_ns);
    blob = verbs_blob_of_nic(nic);
    verbs_blob_write(&blob, nic->base.info.blob);
    nic->base.info.blob_len = VERBS_BLOB;
    *out = &nic->base;
    return 0;
}

/* ---- progress ---- */

static int verbs_poll(struct fab_nic *base, int budget)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;
    int done = verbs_events(nic, budget);

    done += verbs_setup_poll(nic);
    if (nic->look_async || ++nic->turn % VERBS_ASYNC_TURNS == 0) {
        verbs_async(nic);
        if (nic->ud_broken && !nic->fatal)
            verbs_ud_repair(nic);
    }
    return done;
}

/* Takes the notifications that came; unacknowledged ones would keep the queue from being closed. */
static void take_notifications(struct verbs_nic *nic)
{
    struct ibv_cq *cq;
    void *context;
    unsigned count = 0;

    while (nic->lib->get_cq_event(nic->channel, &cq, &context) == 0)
        count++;
    if (count)
        nic->lib->ack_cq_events(nic->cq, count);
}

static int verbs_arm(struct fab_nic *base)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;

    if (nic->fatal) { /* its descriptors stay readable for ever, and say nothing any more */
        (void)epoll_ctl(nic->base.wait_fd, EPOLL_CTL_DEL, nic->context->async_fd, NULL);
        (void)epoll_ctl(nic->base.wait_fd, EPOLL_CTL_DEL, nic->channel->fd, NULL);
        return 0;
    }
    if (ibv_req_notify_cq(nic->cq, 0))
        return 1;
    verbs_cq_drain(nic); /* what came before it was asked for gives no notification */
    return nic->queued > 0;
}

static void verbs_disarm(struct fab_nic *base)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;

    take_notifications(nic);
    nic->look_async = true;
}

/* The device belongs to the parent; its descriptors must not outlive it here. */
static void verbs_after_fork(struct fab_nic *base)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;

    (void)close(nic->base.wait_fd);
    (void)close(nic->channel->fd);
    (void)close(nic->context->async_fd);
    (void)close(nic->context->cmd_fd);
    (void)close(nic->setup.wake_fd);
}

/* import and unimport are NULL: a work request's address and key say all. */
const struct fab_provider fab_provider_verbs = {
    .name = "verbs",
    .kind = FAB_KIND_VERBS,
    .pins = true,
    .repairs = true,
    .list = verbs_list,
    .nic_open = verbs_nic_open,
    .nic_close = verbs_nic_close,
    .mr_reg = verbs_mr_reg,
    .mr_dereg = verbs_mr_dereg,
    .lane_open = verbs_lane_open,
    .lane_connect = verbs_lane_connect,
    .lane_close = verbs_lane_close,
    .lane_abandon = verbs_lane_abandon,
    .lane_send = verbs_lane_send,
    .origin_reply = verbs_origin_reply,
    .origin_drop = verbs_origin_drop,
    .post = verbs_post,
    .poll = verbs_poll,
    .arm = verbs_arm,
    .disarm = verbs_disarm,
    .after_fork = verbs_after_fork,
};
