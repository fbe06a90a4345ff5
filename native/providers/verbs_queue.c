/* The completion queue and its places, and the receive queues. The contract is in verbs.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "providers/verbs.h"

enum {
    FRAME_BYTES = VERBS_FRAME_RECVS * FAB_FRAME_MAX,
    UD_RECV_BYTES = VERBS_GRH + VERBS_UD_MTU,
    UD_RECVS_AT = FRAME_BYTES,
    UD_SENDS_AT = UD_RECVS_AT + VERBS_UD_RECVS * UD_RECV_BYTES,
    MEMORY_BYTES = UD_SENDS_AT + VERBS_UD_SENDS * VERBS_UD_MTU,
};

/* ---- completion queue ---- */

int verbs_cq_open(struct verbs_nic *nic)
{
    int depth = nic->device.max_cqe < VERBS_CQ_START ? nic->device.max_cqe : VERBS_CQ_START;

    nic->channel = nic->lib->create_comp_channel(nic->context);
    if (!nic->channel)
        return verbs_fail(nic, "making a completion channel", errno);
    nic->cq = nic->lib->create_cq(nic->context, depth, NULL, nic->channel, 0);
    if (!nic->cq)
        return verbs_fail(nic, "making a completion queue", errno);
    nic->cq_depth = (uint32_t)nic->cq->cqe;
    nic->queue = calloc(nic->cq_depth, sizeof(*nic->queue));
    return nic->queue ? 0 : -ENOMEM;
}

/* Completions that were taken out and wait move to the front of the larger queue. */
static int grow_queue(struct verbs_nic *nic, uint32_t depth)
{
    struct ibv_wc *queue = calloc(depth, sizeof(*queue));

    if (!queue)
        return -ENOMEM;
    for (uint32_t i = 0; i < nic->queued; i++)
        queue[i] = nic->queue[(nic->queue_head + i) % nic->cq_depth];
    free(nic->queue);
    nic->queue = queue;
    nic->queue_head = 0;
    nic->cq_depth = depth;
    return 0;
}

int verbs_cq_reserve(struct verbs_nic *nic, uint32_t places)
{
    uint64_t wanted = (uint64_t)nic->cq_reserved + places;

    if (wanted > nic->cq_depth) {
        uint64_t depth = 2 * wanted;
        if (depth > (uint64_t)nic->device.max_cqe)
            depth = (uint64_t)nic->device.max_cqe;
        int rc = depth < wanted ? ENOSPC : nic->lib->resize_cq(nic->cq, (int)depth);
        if (rc) {
            fab_fail_text("verbs %s: its completion queue of %u places is full and cannot grow "
                          "beyond %d (%s); use fewer peers or more NICs",
                          nic->base.info.name, nic->cq_depth, nic->device.max_cqe, strerror(rc));
            return -ENOSPC;
        }
        rc = grow_queue(nic, (uint32_t)nic->cq->cqe);
        if (rc)
            return rc;
    }
    nic->cq_reserved += places;
    return 0;
}

void verbs_cq_release(struct verbs_nic *nic, uint32_t places)
{
    nic->cq_reserved -= places;
}

void verbs_cq_drain(struct verbs_nic *nic)
{
    struct ibv_wc batch[VERBS_BATCH];
    uint32_t taken = 0;
    int n;

    /* What was there when we began is among the first cq_depth. */
    while (taken < nic->cq_depth && (n = ibv_poll_cq(nic->cq, VERBS_BATCH, batch)) > 0) {
        for (int i = 0; i < n; i++)
            nic->queue[(nic->queue_head + nic->queued++) % nic->cq_depth] = batch[i];
        taken += (uint32_t)n;
    }
}

bool verbs_cq_next(struct verbs_nic *nic, struct ibv_wc *out)
{
    if (!nic->queued)
        return false;
    *out = nic->queue[nic->queue_head];
    nic->queue_head = (nic->queue_head + 1) % nic->cq_depth;
    nic->queued--;
    return true;
}

/* ---- buffers ---- */

uint8_t *verbs_frame_buffer(const struct verbs_nic *nic, uint32_t buffer)
{
    return nic->memory + (size_t)buffer * FAB_FRAME_MAX;
}

uint8_t *verbs_ud_recv_buffer(const struct verbs_nic *nic, uint32_t buffer)
{
    return nic->memory + UD_RECVS_AT + (size_t)buffer * UD_RECV_BYTES;
}

uint8_t *verbs_ud_send_buffer(const struct verbs_nic *nic, uint32_t buffer)
{
    return nic->memory + UD_SENDS_AT + (size_t)buffer * VERBS_UD_MTU;
}

/* ---- receives ---- */

int verbs_srq_open(struct verbs_nic *nic, struct verbs_srq *srq, uint32_t depth)
{
    if (depth > (uint32_t)nic->device.max_srq_wr)
        depth = (uint32_t)nic->device.max_srq_wr;
    struct ibv_srq_init_attr attr = {.attr = {.max_wr = depth, .max_sge = 1}};
    srq->srq = nic->lib->create_srq(nic->pd, &attr);
    if (!srq->srq)
        return verbs_fail(nic, "making a shared receive queue", errno);
    srq->depth = depth;
    return verbs_cq_reserve(nic, depth);
}

/* Receives for immediates need no memory. Posted in chains, so that a burst costs few doorbells. */
void verbs_imms_refill(struct verbs_nic *nic)
{
    struct ibv_recv_wr chain[VERBS_IMM_REFILL], *bad = chain;

    while (nic->imms.missing) {
        uint32_t n = nic->imms.missing < VERBS_IMM_REFILL ? nic->imms.missing : VERBS_IMM_REFILL;
        for (uint32_t i = 0; i < n; i++)
            chain[i] =
                (struct ibv_recv_wr){.wr_id = VERBS_IMM, .next = i + 1 < n ? &chain[i + 1] : NULL};
        if (ibv_post_srq_recv(nic->imms.srq, chain, &bad)) {
            if (bad > chain && bad < chain + n)
                nic->imms.missing -= (uint32_t)(bad - chain);
            return; /* the next poll tries again */
        }
        nic->imms.missing -= n;
    }
}

int verbs_frame_recv(struct verbs_nic *nic, uint32_t buffer)
{
    struct ibv_sge sge = {.addr = (uintptr_t)verbs_frame_buffer(nic, buffer),
                          .length = FAB_FRAME_MAX,
                          .lkey = nic->memory_mr->lkey};
    struct ibv_recv_wr wr = {
        .wr_id = (uint64_t)buffer << 8 | VERBS_FRAME, .sg_list = &sge, .num_sge = 1};
    struct ibv_recv_wr *bad;

    return ibv_post_srq_recv(nic->frames.srq, &wr, &bad);
}

int verbs_ud_recv(struct verbs_nic *nic, uint32_t buffer)
{
    struct ibv_sge sge = {.addr = (uintptr_t)verbs_ud_recv_buffer(nic, buffer),
                          .length = UD_RECV_BYTES,
                          .lkey = nic->memory_mr->lkey};
    struct ibv_recv_wr wr = {
        .wr_id = (uint64_t)buffer << 8 | VERBS_UD_RECV, .sg_list = &sge, .num_sge = 1};
    struct ibv_recv_wr *bad;

    int rc = ibv_post_recv(nic->ud, &wr, &bad);
    nic->ud_recvs_out += rc == 0;
    return rc;
}

int verbs_receives_open(struct verbs_nic *nic)
{
    nic->memory =
        mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (nic->memory == MAP_FAILED) {
        nic->memory = NULL;
        return -ENOMEM;
    }
    nic->memory_size = MEMORY_BYTES;
    nic->memory_mr = nic->lib->reg_mr_iova2(nic->pd, nic->memory, MEMORY_BYTES,
                                            (uintptr_t)nic->memory, IBV_ACCESS_LOCAL_WRITE);
    if (!nic->memory_mr)
        return verbs_fail(nic, "pinning memory for frames (see ulimit -l)", errno);
    int rc = verbs_srq_open(nic, &nic->imms, VERBS_IMM_RECVS);
    if (rc == 0)
        rc = verbs_srq_open(nic, &nic->frames, VERBS_FRAME_RECVS);
    if (rc)
        return rc;
    nic->imms.missing = nic->imms.depth;
    verbs_imms_refill(nic);
    for (uint32_t i = 0; i < nic->frames.depth; i++)
        if ((rc = verbs_frame_recv(nic, i)))
            return verbs_fail(nic, "posting receives", rc);
    return 0;
}
