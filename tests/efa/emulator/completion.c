/* Completion queues. One that overruns ends the process with a line that says so: on the device
 * everything bound to it would be lost, and nothing but the software in front of it prevents that. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

void efa_complete(struct cq *cq, const struct completion *completion)
{
    uint32_t limit = efa_control->cq_limit && efa_control->cq_limit < cq->places
                         ? efa_control->cq_limit
                         : cq->places;

    if (cq->tail - cq->head >= limit) {
        efa_count(C_CQ_OVERRUNS, 1);
        (void)fprintf(stderr, "efa-emulator: a completion queue of %u places was overrun\n", limit);
        abort();
    }
    cq->ring[cq->tail++ % cq->places] = *completion;
    efa_count_most(C_CQ_MOST, cq->tail - cq->head);
    if (cq->armed && cq->ib.channel) {
        void *event = cq;
        cq->armed = false;
        ssize_t n = write(cq->ib.channel->refcnt, &event, sizeof event);
        (void)n; /* a pipe has room for more events than there are queues */
    }
}

static enum ibv_wc_status status_of(uint32_t done)
{
    switch (done) {
    case DONE_OK:
        return IBV_WC_SUCCESS;
    case DONE_FLUSHED:
        return IBV_WC_WR_FLUSH_ERR;
    case DONE_BAD_LKEY:
        return IBV_WC_LOC_PROT_ERR;
    case DONE_BAD_ADDRESS:
        return IBV_WC_REM_ACCESS_ERR;
    case DONE_ABORT:
        return IBV_WC_REM_ABORT_ERR;
    case DONE_BAD_QPN:
        return IBV_WC_REM_INV_RD_REQ_ERR;
    case DONE_RNR:
        return IBV_WC_RNR_RETRY_EXC_ERR;
    case DONE_BAD_LENGTH:
        return IBV_WC_REM_INV_REQ_ERR;
    case DONE_UNRESPONSIVE:
        return IBV_WC_RESP_TIMEOUT_ERR;
    case DONE_UNKNOWN_PEER:
        return IBV_WC_REM_ABORT_ERR;
    default:
        return IBV_WC_GENERAL_ERR;
    }
}

static bool is_send(enum ibv_wc_opcode opcode)
{
    return !(opcode & IBV_WC_RECV);
}

/* 0, or ENOENT: the queue is empty. */
static int next(struct cq *cq)
{
    int rc = ENOENT;

    pthread_mutex_lock(&efa_lock);
    if (cq->head != cq->tail) {
        cq->now = cq->ring[cq->head++ % cq->places];
        if (efa_control->old_opcodes && is_send(cq->now.opcode))
            cq->now.opcode = IBV_WC_SEND;
        rc = 0;
    }
    pthread_mutex_unlock(&efa_lock);
    if (rc == 0) {
        cq->ib.wr_id = cq->now.wr_id;
        cq->ib.status = status_of(cq->now.status);
    }
    return rc;
}

static int start_poll(struct ibv_cq_ex *cq, struct ibv_poll_cq_attr *attr)
{
    (void)attr;
    return next((struct cq *)cq);
}

static int next_poll(struct ibv_cq_ex *cq)
{
    return next((struct cq *)cq);
}

static void end_poll(struct ibv_cq_ex *cq)
{
    (void)cq;
}

#define READER(name, type, field)                 \
    static type read_##name(struct ibv_cq_ex *cq) \
    {                                             \
        return ((struct cq *)cq)->now.field;      \
    }
READER(opcode, enum ibv_wc_opcode, opcode)
READER(vendor_err, uint32_t, status)
READER(byte_len, uint32_t, bytes)
READER(imm, __be32, imm)
READER(qp_num, uint32_t, qpn)
READER(src_qp, uint32_t, src_qpn)
READER(flags, unsigned, flags)
READER(slid, uint32_t, handle)

static uint8_t read_nothing(struct ibv_cq_ex *cq)
{
    (void)cq;
    return 0;
}

static struct cq *cq_of(struct efadv_cq *dv)
{
    return (struct cq *)((char *)dv - offsetof(struct cq, dv));
}

static int read_sgid(struct efadv_cq *dv, union ibv_gid *gid)
{
    struct cq *cq = cq_of(dv);

    if (cq->now.handle != UNKNOWN_HANDLE)
        return -ENOENT;
    *gid = cq->now.gid;
    return 0;
}

static int read_unsolicited(struct efadv_cq *dv)
{
    return cq_of(dv)->now.unsolicited;
}

int efa_poll_cq(struct ibv_cq *ib, int count, struct ibv_wc *out)
{
    struct cq *cq = (struct cq *)ib;
    int n = 0;

    for (; n < count && next(cq) == 0; n++)
        out[n] = (struct ibv_wc){.wr_id = cq->ib.wr_id,
                                 .status = cq->ib.status,
                                 .opcode = cq->now.opcode,
                                 .vendor_err = cq->now.status,
                                 .byte_len = cq->now.bytes,
                                 .imm_data = cq->now.imm,
                                 .qp_num = cq->now.qpn,
                                 .src_qp = cq->now.src_qpn,
                                 .wc_flags = cq->now.flags,
                                 .slid = (uint16_t)cq->now.handle};
    return n;
}

int efa_request_notify(struct ibv_cq *ib, int solicited)
{
    (void)solicited;
    pthread_mutex_lock(&efa_lock);
    ((struct cq *)ib)->armed = true;
    pthread_mutex_unlock(&efa_lock);
    return 0;
}

struct ibv_cq_ex *efa_create_cq(struct ibv_context *context, struct ibv_cq_init_attr_ex *attr)
{
    struct cq *cq = attr->cqe && attr->cqe <= CQES_MAX ? calloc(1, sizeof *cq) : NULL;

    if (!cq) {
        errno = EINVAL;
        return NULL;
    }
    for (cq->places = 1; cq->places < attr->cqe;)
        cq->places *= 2;
    /* Not from the heap, which would keep as much once it is freed: tests measure the process. */
    cq->ring = mmap(NULL, cq->places * sizeof *cq->ring, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (cq->ring == MAP_FAILED) {
        free(cq);
        return NULL;
    }
    cq->ib.context = context;
    cq->ib.channel = attr->channel;
    cq->ib.cq_context = attr->cq_context;
    cq->ib.cqe = (int)cq->places;
    cq->ib.start_poll = start_poll;
    cq->ib.next_poll = next_poll;
    cq->ib.end_poll = end_poll;
    cq->ib.read_opcode = read_opcode;
    cq->ib.read_vendor_err = read_vendor_err;
    cq->ib.read_byte_len = read_byte_len;
    cq->ib.read_imm_data = read_imm;
    cq->ib.read_qp_num = read_qp_num;
    cq->ib.read_src_qp = read_src_qp;
    cq->ib.read_wc_flags = read_flags;
    cq->ib.read_slid = read_slid;
    cq->ib.read_sl = read_nothing;
    cq->ib.read_dlid_path_bits = read_nothing;
    cq->dv.dv.wc_read_sgid = read_sgid;
    cq->dv.wc_is_unsolicited = read_unsolicited;
    return &cq->ib;
}

EXPORT struct ibv_cq_ex *efadv_create_cq(struct ibv_context *context,
                                         struct ibv_cq_init_attr_ex *attr,
                                         struct efadv_cq_init_attr *efa_attr, uint32_t room)
{
    (void)efa_attr;
    (void)room;
    return efa_create_cq(context, attr);
}

EXPORT struct efadv_cq *efadv_cq_from_ibv_cq_ex(struct ibv_cq_ex *cq)
{
    return &((struct cq *)cq)->dv.dv;
}

EXPORT int ibv_destroy_cq(struct ibv_cq *ib)
{
    struct cq *cq = (struct cq *)ib;

    (void)munmap(cq->ring, cq->places * sizeof *cq->ring);
    free(cq);
    return 0;
}

/* ---- channels: the reading end is fd, the writing end is kept in refcnt ---- */

EXPORT struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    struct ibv_comp_channel *channel = calloc(1, sizeof *channel);
    int ends[2];

    if (!channel || pipe2(ends, O_CLOEXEC)) {
        free(channel);
        return NULL;
    }
    channel->context = context;
    channel->fd = ends[0];
    channel->refcnt = ends[1];
    return channel;
}

EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    (void)close(channel->fd);
    (void)close(channel->refcnt);
    free(channel);
    return 0;
}

EXPORT int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
    void *event;

    if (read(channel->fd, &event, sizeof event) != (ssize_t)sizeof event)
        return -1;
    *cq = event;
    *context = (*cq)->cq_context;
    return 0;
}

EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned count)
{
    (void)cq;
    (void)count;
}
