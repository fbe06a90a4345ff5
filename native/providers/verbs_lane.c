/* Lanes of the verbs provider: open, connect, post, close. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "providers/verbs.h"

enum { LANE_PLACES = VERBS_WINDOW + VERBS_FRAME_SENDS, PSN_MASK = 0xffffff };

/* ---- the tables of lanes ---- */

static uint32_t hash(uint32_t qpn)
{
    return qpn * 2654435761u; /* Knuth's multiplicative hash */
}

struct verbs_lane *verbs_lane_of_qpn(const struct verbs_nic *nic, uint32_t qpn)
{
    for (uint32_t i = hash(qpn); nic->qpn_slots; i++) {
        uint32_t at = i & (nic->qpn_slots - 1);
        if (!nic->qpns[at].lane)
            return NULL;
        if (nic->qpns[at].qpn == qpn)
            return nic->qpns[at].lane;
    }
    return NULL;
}

static void enter_qpn(struct verbs_nic *nic, uint32_t qpn, struct verbs_lane *lane)
{
    uint32_t i = hash(qpn);

    while (nic->qpns[i & (nic->qpn_slots - 1)].lane)
        i++;
    nic->qpns[i & (nic->qpn_slots - 1)].qpn = qpn;
    nic->qpns[i & (nic->qpn_slots - 1)].lane = lane;
}

static void rebuild_qpns(struct verbs_nic *nic)
{
    memset(nic->qpns, 0, nic->qpn_slots * sizeof(*nic->qpns));
    for (uint32_t i = 0; i < nic->lane_slots; i++)
        if (nic->lanes[i]) {
            enter_qpn(nic, nic->lanes[i]->write_qpn, nic->lanes[i]);
            enter_qpn(nic, nic->lanes[i]->frame_qpn, nic->lanes[i]);
        }
}

static int grow_tables(struct verbs_nic *nic)
{
    uint32_t slots = nic->lane_slots ? 2 * nic->lane_slots : 16;

    if (slots > VERBS_MAX_LANES)
        return -ENOSPC;
    void *qpns = realloc(nic->qpns, 4 * slots * sizeof(*nic->qpns)); /* two a lane, half empty */
    if (!qpns)
        return -ENOMEM;
    nic->qpns = qpns;
    struct verbs_lane **lanes = realloc(nic->lanes, slots * sizeof(struct verbs_lane *));
    if (!lanes)
        return -ENOMEM;
    memset(lanes + nic->lane_slots, 0, (slots - nic->lane_slots) * sizeof(struct verbs_lane *));
    nic->lanes = lanes;
    nic->lane_slots = slots;
    nic->qpn_slots = 4 * slots;
    rebuild_qpns(nic);
    return 0;
}

static uint64_t random_bits(void)
{
    uint64_t bits = 0;

    (void)getrandom(&bits, sizeof(bits), 0); /* 8 bytes: never interrupted, never short */
    return bits;
}

/* Enters the lane; its token is random but for its place in the table, and never 0. */
static int enter(struct verbs_nic *nic, struct verbs_lane *lane)
{
    int rc = nic->lane_count == nic->lane_slots ? grow_tables(nic) : 0;

    if (rc)
        return rc;
    lane->index = 0;
    while (nic->lanes[lane->index])
        lane->index++;
    lane->token = (random_bits() | 1ull << 63) & ~0xffffull;
    lane->token |= lane->index;
    nic->lanes[lane->index] = lane;
    nic->lane_count++;
    enter_qpn(nic, lane->write_qpn, lane);
    enter_qpn(nic, lane->frame_qpn, lane);
    return 0;
}

/* ---- open ---- */

static struct ibv_qp *make_pair(struct verbs_nic *nic, struct ibv_srq *srq, uint32_t sends,
                                uint32_t inline_bytes)
{
    struct ibv_qp_init_attr init = {
        .send_cq = nic->cq,
        .recv_cq = nic->cq,
        .srq = srq,
        .cap = {.max_send_wr = sends, .max_send_sge = 1, .max_inline_data = inline_bytes},
        .qp_type = IBV_QPT_RC};

    errno = 0;
    return nic->lib->create_qp(nic->pd, &init);
}

static int open_pairs(struct verbs_nic *nic, struct verbs_lane *lane)
{
    lane->inline_bytes = VERBS_INLINE;
    lane->write_qp = make_pair(nic, nic->imms.srq, lane->base.window, VERBS_INLINE);
    if (!lane->write_qp) { /* not every device has inline writes */
        lane->inline_bytes = 0;
        lane->write_qp = make_pair(nic, nic->imms.srq, lane->base.window, 0);
    }
    if (lane->write_qp)
        lane->frame_qp = make_pair(nic, nic->frames.srq, VERBS_FRAME_SENDS, 0);
    if (!lane->frame_qp)
        return verbs_fail(nic, "making a queue pair", errno ? errno : ENOMEM);
    lane->write_qpn = lane->write_qp->qp_num;
    lane->frame_qpn = lane->frame_qp->qp_num;
    lane->write_psn = (uint32_t)random_bits() & PSN_MASK;
    lane->frame_psn = (uint32_t)random_bits() & PSN_MASK;
    int rc = verbs_qp_init(nic, lane->write_qp, IBV_ACCESS_REMOTE_WRITE);
    if (rc == 0)
        rc = verbs_qp_init(nic, lane->frame_qp, 0);
    return rc ? verbs_fail(nic, "preparing a queue pair", rc) : 0;
}

/* 0, also where the device is gone and its queue pairs with it. */
static int close_pair(struct verbs_nic *nic, struct ibv_qp **qp)
{
    int rc = *qp ? nic->lib->destroy_qp(*qp) : 0;

    if (rc && rc != EIO && !nic->fatal)
        return verbs_fail(nic, "destroying a queue pair", rc);
    *qp = NULL;
    return 0;
}

static void write_blob(struct verbs_nic *nic, struct verbs_lane *lane)
{
    struct verbs_blob blob = verbs_blob_of_nic(nic);

    blob.token = lane->token;
    blob.write_qpn = lane->write_qpn;
    blob.write_psn = lane->write_psn;
    blob.frame_qpn = lane->frame_qpn;
    blob.frame_psn = lane->frame_psn;
    verbs_blob_write(&blob, lane->base.blob);
    lane->base.blob_len = VERBS_BLOB;
}

int verbs_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;
    struct verbs_lane *lane = calloc(1, sizeof(*lane));

    (void)origin; /* always NULL: the first frame's blob says whom to connect to */
    if (!lane)
        return -ENOMEM;
    lane->base.nic = base;
    lane->base.window =
        VERBS_WINDOW < nic->device.max_qp_wr ? VERBS_WINDOW : (uint32_t)nic->device.max_qp_wr;
    lane->job.lane = lane;
    int rc = verbs_cq_reserve(nic, LANE_PLACES);
    if (rc) {
        free(lane);
        return rc;
    }
    rc = open_pairs(nic, lane);
    if (rc == 0)
        rc = enter(nic, lane);
    if (rc) {
        (void)close_pair(nic, &lane->write_qp);
        (void)close_pair(nic, &lane->frame_qp);
        verbs_cq_release(nic, LANE_PLACES);
        free(lane);
        return rc;
    }
    write_blob(nic, lane);
    *out = &lane->base;
    return 0;
}

/* ---- the end ---- */

static uint64_t now_ns(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Gives the last frames (a BYE) a short time to be acknowledged. A dead peer never does. */
static void linger(struct verbs_nic *nic, struct verbs_lane *lane)
{
    uint64_t begin = now_ns(), now = begin;

    if (lane->base.given_up || !nic->base.info.up || now < nic->no_linger_before)
        return;
    while (!lane->down && verbs_frames_out(lane) && now < begin + VERBS_LINGER_NS) {
        verbs_cq_drain(nic);
        verbs_events_of(nic, lane);
        now = now_ns();
    }
    /* Many that die at once cost the living a tenth of their time at the most. */
    nic->no_linger_before = now + 9 * (now - begin);
}

static void stop_pairs(struct verbs_nic *nic, struct verbs_lane *lane)
{
    struct ibv_qp_attr error = {.qp_state = IBV_QPS_ERR};

    (void)nic->lib->modify_qp(lane->write_qp, &error, IBV_QP_STATE);
    (void)nic->lib->modify_qp(lane->frame_qp, &error, IBV_QP_STATE);
}

/* A queue pair in error holds no receive of the shared queue once it says so; destroyed before, it
 * may take one along. Not every device says it (rdma_rxe does not): one that once did not is not
 * waited for again. */
static void await_last_receives(struct verbs_nic *nic, const struct verbs_lane *lane)
{
    uint64_t end = now_ns() + VERBS_LAST_WQE_NS;
    bool late = false;

    while (lane->connected && lane->last_wqes < 2 && !nic->no_last_wqe && !nic->fatal && !late) {
        verbs_async(nic);
        late = now_ns() >= end;
    }
    nic->no_last_wqe |= late;
}

static void cancel_writes(struct verbs_lane *lane)
{
    const struct fab_sink *sink = lane->base.nic->sink;

    while (lane->tail != lane->head)
        sink->completed(&lane->base, lane->ring[lane->tail++ % VERBS_WINDOW], -ECANCELED);
}

static void forget(struct verbs_nic *nic, struct verbs_lane *lane)
{
    nic->lanes[lane->index] = NULL;
    nic->lane_count--;
    rebuild_qpns(nic);
    verbs_ah_retire(nic, lane->way.ah);
    verbs_cq_release(nic, LANE_PLACES);
    free(lane);
}

/* The lane's setup does not run. */
static int close_idle(struct verbs_nic *nic, struct verbs_lane *lane)
{
    bool first = !lane->lingered;

    lane->lingered = true;
    if (first && lane->base.established)
        linger(nic, lane);
    if (lane->write_qp && lane->frame_qp)
        stop_pairs(nic, lane);
    if (first)
        await_last_receives(nic, lane);
    verbs_cq_drain(nic);
    verbs_events_of(nic, lane);
    if (close_pair(nic, &lane->write_qp) || close_pair(nic, &lane->frame_qp))
        return -EINPROGRESS;
    verbs_cq_drain(nic); /* so that no later queue pair with the same number inherits anything */
    verbs_events_of(nic, lane);
    cancel_writes(lane);
    verbs_frames_close(lane);
    forget(nic, lane);
    return 0;
}

/* ---- connect ---- */

static void set_up(struct verbs_nic *nic, struct verbs_lane *lane)
{
    lane->job.to = lane->peer;
    lane->job.connect = lane->peer.token != 0;
    verbs_setup_submit(nic, &lane->job);
}

int verbs_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length)
{
    struct verbs_lane *lane = (struct verbs_lane *)base;
    struct verbs_nic *nic = (struct verbs_nic *)base->nic;
    struct verbs_blob to;

    if (lane->down)
        return -ENOTCONN;
    int rc = verbs_blob_read(nic, blob, length, &to);
    if (rc)
        return rc;
    if (base->to_lane && !to.token) {
        fab_fail_text("verbs %s: the address of the peer's lane is a NIC's", base->nic->info.name);
        return -EINVAL;
    }
    if (lane->peer.token) {
        fab_fail_text("verbs %s: the lane is connected already", base->nic->info.name);
        return -EALREADY;
    }
    if (to.token)
        lane->waiting_length = 0; /* a first frame, which was answered */
    lane->peer = to;
    lane->pointed = false;
    lane->again = !verbs_setup_revoke(nic, &lane->job);
    if (!lane->again)
        set_up(nic, lane);
    return 0;
}

void verbs_lane_ready(struct verbs_lane *lane)
{
    struct verbs_nic *nic = verbs_nic_of(lane);
    struct verbs_job *job = &lane->job;

    verbs_ah_retire(nic, lane->way.ah);
    lane->way = (struct verbs_way){.ah = job->ah,
                                   .qpn = job->to.ud_qpn,
                                   .qkey = job->to.ud_qkey,
                                   .mtu = verbs_mtu_bytes(job->to.mtu),
                                   .token = job->to.token};
    job->ah = NULL;
    if (lane->abandoned) {
        (void)close_idle(nic, lane);
        return;
    }
    if (lane->again && !lane->closing) {
        lane->again = false;
        set_up(nic, lane);
        return;
    }
    if (job->rc || lane->closing) {
        verbs_lane_down(lane, -job->rc, job->why);
        return;
    }
    lane->pointed = true;
    lane->connected = job->connect;
    verbs_lane_flush(lane);
}

void verbs_lane_down(struct verbs_lane *lane, int error, const char *text)
{
    if (lane->down)
        return;
    lane->down = true;
    if (!lane->closing && !lane->abandoned)
        lane->base.nic->sink->lane_down(&lane->base, error, text);
}

/* ---- post ---- */

static void build(const struct verbs_lane *lane, const struct fab_wr *wr, uint32_t sequence,
                  struct ibv_send_wr *out, struct ibv_sge *sge)
{
    const struct verbs_mr *mr = (const struct verbs_mr *)wr->mr;

    *out = (struct ibv_send_wr){
        .wr_id = (uint64_t)lane->index << 40 | (uint64_t)sequence << 8 | VERBS_WRITE,
        .opcode = wr->flags & FAB_WR_IMM ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE,
        .imm_data = htobe32(wr->imm),
    };
    out->wr.rdma.remote_addr = wr->addr;
    out->wr.rdma.rkey = (uint32_t)wr->rkey;
    if (!wr->length)
        return;
    *sge = (struct ibv_sge){
        .addr = (uintptr_t)wr->src, .length = (uint32_t)wr->length, .lkey = mr->mr->lkey};
    out->sg_list = sge;
    out->num_sge = 1;
    if (mr->host && wr->length <= lane->inline_bytes)
        out->send_flags = IBV_SEND_INLINE;
}

int verbs_post(struct fab_lane *base, const struct fab_wr *wrs, int n)
{
    struct verbs_lane *lane = (struct verbs_lane *)base;
    struct ibv_send_wr chain[VERBS_BATCH], *bad = NULL;
    struct ibv_sge sges[VERBS_BATCH];
    int room = (int)(base->window - (lane->head - lane->tail));

    if (lane->down)
        return -ENOTCONN;
    if (!lane->connected)
        return 0;
    n = n < room ? n : room;
    n = n < VERBS_BATCH ? n : VERBS_BATCH;
    if (n <= 0)
        return 0;
    for (int i = 0; i < n; i++) {
        build(lane, &wrs[i], lane->head + (uint32_t)i, &chain[i], &sges[i]);
        chain[i].next = i + 1 < n ? &chain[i + 1] : NULL;
        lane->ring[(lane->head + (uint32_t)i) % VERBS_WINDOW] = wrs[i].wr_id;
    }
    chain[n - 1].send_flags |= IBV_SEND_SIGNALED;
    int rc = ibv_post_send(lane->write_qp, chain, &bad);
    /* A library that does not say which was the first it refused may have taken all. */
    int taken = rc && bad >= chain && bad < chain + n ? (int)(bad - chain) : n;
    lane->head += (uint32_t)taken;
    if (rc) { /* what was taken has no signalled one behind it: only closing the lane ends it */
        verbs_lane_down(lane, verbs_fail(verbs_nic_of(lane), "posting a write", rc),
                        "the device refused a work request");
        return taken ? taken : -rc;
    }
    return n;
}

/* ---- close, and lanes that are given up ---- */

int verbs_lane_close(struct fab_lane *base)
{
    struct verbs_lane *lane = (struct verbs_lane *)base;
    struct verbs_nic *nic = (struct verbs_nic *)base->nic;

    lane->closing = true;
    if (!verbs_setup_revoke(nic, &lane->job)) {
        (void)verbs_setup_poll(nic);
        if (!verbs_setup_revoke(nic, &lane->job))
            return -EINPROGRESS; /* a second or two at the most: the kernel's own limit */
    }
    return close_idle(nic, lane);
}

void verbs_lane_abandon(struct fab_lane *base)
{
    struct verbs_lane *lane = (struct verbs_lane *)base;
    struct verbs_nic *nic = (struct verbs_nic *)base->nic;

    base->peer = NULL;
    lane->closing = lane->abandoned = true;
    if (verbs_setup_revoke(nic, &lane->job)) /* else when its setup has ended */
        (void)close_idle(nic, lane);
}
