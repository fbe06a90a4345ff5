/* What may block, on a thread of its own: address handles and the way of queue pairs to RTS.
 *
 * On RoCE the kernel resolves the other side's MAC address in both, and waits a second or more for
 * a host that does not answer; the worker must not. Jobs are done one after the other, those of
 * lanes before answers to strangers, who could keep us busy with addresses of nobody. A job's lane
 * exists until the job has ended: who closes a lane takes the job back, or waits.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "providers/verbs.h"

enum { HOPS = 255 };

static struct ibv_ah_attr ah_attr_of(const struct verbs_nic *nic, const struct verbs_blob *to)
{
    struct ibv_ah_attr attr = {
        .dlid = to->lid, .sl = nic->options.service_level, .port_num = nic->port};

    /* Ethernet is always addressed by GID; InfiniBand only across subnets. */
    if (nic->link_layer == IBV_LINK_LAYER_ETHERNET ||
        to->gid.global.subnet_prefix != nic->gid.global.subnet_prefix) {
        attr.is_global = 1;
        attr.grh.dgid = to->gid;
        attr.grh.sgid_index = (uint8_t)nic->gid_index;
        attr.grh.hop_limit = HOPS;
        attr.grh.traffic_class = nic->options.traffic_class;
    }
    return attr;
}

int verbs_qp_init(struct verbs_nic *nic, struct ibv_qp *qp, unsigned access)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT,
                               .pkey_index = nic->pkey_index,
                               .port_num = nic->port,
                               .qp_access_flags = access,
                               .qkey = nic->qkey};
    int last = qp->qp_type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;

    return nic->lib->modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | last);
}

static int to_rtr(struct verbs_nic *nic, struct ibv_qp *qp, const struct verbs_job *job,
                  uint32_t qpn, uint32_t psn)
{
    const struct verbs_blob *to = &job->to;
    uint8_t mtu = to->mtu < job->mtu ? to->mtu : job->mtu;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR,
                               .path_mtu = mtu,
                               .dest_qp_num = qpn,
                               .rq_psn = psn,
                               .max_dest_rd_atomic = 1,
                               .min_rnr_timer = VERBS_RNR_TIMER,
                               .ah_attr = ah_attr_of(nic, to)};

    return nic->lib->modify_qp(qp, &attr,
                               IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                   IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                                   IBV_QP_MIN_RNR_TIMER);
}

static int to_rts(struct verbs_nic *nic, struct ibv_qp *qp, uint32_t psn)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS,
                               .sq_psn = psn,
                               .timeout = nic->ack_timeout,
                               .retry_cnt = VERBS_RETRIES,
                               .rnr_retry = VERBS_RNR_FOREVER,
                               .max_rd_atomic = 1};

    return nic->lib->modify_qp(qp, &attr,
                               IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                   IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
}

static int connect_pairs(struct verbs_nic *nic, const struct verbs_job *job)
{
    struct verbs_lane *lane = job->lane;
    int rc = to_rtr(nic, lane->write_qp, job, job->to.write_qpn, job->to.write_psn);

    if (rc == 0)
        rc = to_rtr(nic, lane->frame_qp, job, job->to.frame_qpn, job->to.frame_psn);
    if (rc == 0)
        rc = to_rts(nic, lane->write_qp, lane->write_psn);
    if (rc == 0)
        rc = to_rts(nic, lane->frame_qp, lane->frame_psn);
    return rc;
}

static void do_job(struct verbs_nic *nic, struct verbs_job *job)
{
    struct ibv_ah_attr attr = ah_attr_of(nic, &job->to);
    const char *what = "finding the way to the peer";

    job->rc = 0;
    errno = 0;
    job->ah = nic->lib->create_ah(nic->pd, &attr);
    if (!job->ah)
        job->rc = errno ? errno : EHOSTUNREACH;
    if (job->rc == 0 && job->connect) {
        what = "connecting a queue pair";
        job->rc = connect_pairs(nic, job);
    }
    if (job->rc)
        (void)snprintf(job->why, sizeof(job->why), "verbs %.60s: %s failed: %s",
                       nic->base.info.name, what, strerror(job->rc));
}

static void *setup_main(void *arg)
{
    struct verbs_nic *nic = arg;
    struct verbs_setup *s = &nic->setup;
    uint64_t one = 1;

    (void)pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        struct verbs_job **from = s->first ? &s->first : &s->strangers;
        struct verbs_job *job = *from;
        if (!job) {
            (void)pthread_cond_wait(&s->more, &s->lock);
            continue;
        }
        *from = job->next;
        job->state = VERBS_RUNNING;
        (void)pthread_mutex_unlock(&s->lock);
        do_job(nic, job);
        (void)pthread_mutex_lock(&s->lock);
        job->state = VERBS_ENDED;
        job->next = s->ended;
        s->ended = job;
        atomic_store_explicit(&s->any_ended, true, memory_order_release);
        ssize_t n = write(s->wake_fd, &one, sizeof(one));
        (void)n; /* an eventfd this far from its limit always takes it */
    }
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

int verbs_setup_open(struct verbs_nic *nic)
{
    struct verbs_setup *s = &nic->setup;
    sigset_t all, before;

    (void)pthread_mutex_init(&s->lock, NULL);
    (void)pthread_cond_init(&s->more, NULL);
    s->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (s->wake_fd < 0)
        return verbs_fail(nic, "making an eventfd", errno);
    (void)sigfillset(&all); /* signals are the application's, on its own threads */
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&s->thread, NULL, setup_main, nic);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return verbs_fail(nic, "starting the setup thread", rc);
    s->runs = true;
    (void)pthread_setname_np(s->thread, "fabric-setup");
    return 0;
}

static void end_reply(struct verbs_nic *nic, struct verbs_job *job)
{
    verbs_ah_retire(nic, job->ah);
    free(job->frame);
    free(job);
    nic->setup.replies--;
}

static void reply(struct verbs_nic *nic, struct verbs_job *job)
{
    struct verbs_way way = {.ah = job->ah,
                            .qpn = job->to.ud_qpn,
                            .qkey = job->to.ud_qkey,
                            .mtu = verbs_mtu_bytes(job->to.mtu),
                            .token = job->to.token};

    if (job->rc == 0) /* best effort: who is not answered asks again */
        (void)verbs_contact_send(nic, &way, job->frame, job->length);
    end_reply(nic, job);
}

static void finish(struct verbs_nic *nic, struct verbs_job *job)
{
    job->state = VERBS_IDLE;
    if (job->lane)
        verbs_lane_ready(job->lane);
    else
        reply(nic, job);
}

void verbs_setup_submit(struct verbs_nic *nic, struct verbs_job *job)
{
    struct verbs_setup *s = &nic->setup;

    (void)pthread_mutex_lock(&s->lock);
    job->state = VERBS_QUEUED;
    job->mtu = (uint8_t)nic->port_attr.active_mtu;
    job->next = job->lane ? NULL : s->strangers;
    if (!job->lane)
        s->strangers = job;
    else if (s->first)
        s->last->next = job;
    else
        s->first = job;
    if (job->lane)
        s->last = job;
    (void)pthread_cond_signal(&s->more);
    (void)pthread_mutex_unlock(&s->lock);
}

bool verbs_setup_revoke(struct verbs_nic *nic, struct verbs_job *job)
{
    struct verbs_setup *s = &nic->setup;
    struct verbs_job *before = NULL;

    (void)pthread_mutex_lock(&s->lock);
    if (job->state == VERBS_QUEUED) {
        struct verbs_job **link = &s->first;
        while (*link != job) {
            before = *link;
            link = &before->next;
        }
        *link = job->next;
        if (s->last == job)
            s->last = before;
        job->state = VERBS_IDLE;
    }
    bool idle = job->state == VERBS_IDLE;
    (void)pthread_mutex_unlock(&s->lock);
    return idle;
}

int verbs_setup_poll(struct verbs_nic *nic)
{
    struct verbs_setup *s = &nic->setup;
    uint64_t count;
    int n = 0;

    if (!atomic_load_explicit(&s->any_ended, memory_order_acquire))
        return 0;
    (void)pthread_mutex_lock(&s->lock);
    struct verbs_job *job = s->ended, *next;
    s->ended = NULL;
    atomic_store_explicit(&s->any_ended, false, memory_order_relaxed);
    ssize_t got = read(s->wake_fd, &count, sizeof(count));
    (void)got;
    (void)pthread_mutex_unlock(&s->lock);
    for (; job; job = next, n++) {
        next = job->next;
        finish(nic, job);
    }
    return n;
}

void verbs_setup_close(struct verbs_nic *nic)
{
    struct verbs_setup *s = &nic->setup;

    if (s->runs) {
        (void)pthread_mutex_lock(&s->lock);
        s->stop = true;
        (void)pthread_cond_signal(&s->more);
        (void)pthread_mutex_unlock(&s->lock);
        (void)pthread_join(s->thread, NULL);
        s->runs = false;
        for (struct verbs_job *job = s->strangers, *next; job; job = next) {
            next = job->next;
            end_reply(nic, job);
        }
        s->strangers = NULL;
        (void)verbs_setup_poll(nic); /* frees abandoned lanes */
    }
    if (s->wake_fd >= 0)
        (void)close(s->wake_fd);
    s->wake_fd = -1;
}
