/* Queue pairs: reliable datagrams without order (SRD) and plain ones (UD). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

struct qp *efa_qps[QPS_MAX];
static uint64_t last_message;

static struct qp *qp_of(struct ibv_qp_ex *ib)
{
    return (struct qp *)ib;
}

/* ---- receives ---- */

bool efa_has_receive(const struct qp *qp)
{
    return qp->recv_head != qp->recv_tail && !(efa_control->faults & FAULT_RNR);
}

struct receive *efa_take_receive(struct qp *qp)
{
    return &qp->recvs[qp->recv_head++ % qp->recv_places];
}

int efa_post_recv(struct ibv_qp *ib, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct qp *qp = (struct qp *)ib;
    int rc = 0;

    pthread_mutex_lock(&efa_lock);
    for (; wr && rc == 0; wr = rc ? wr : wr->next) {
        if (wr->num_sge > SGES_MAX)
            rc = EINVAL;
        else if (qp->recv_tail - qp->recv_head >= qp->recv_places)
            rc = ENOMEM;
        if (rc)
            break;
        struct receive *r = &qp->recvs[qp->recv_tail++ % qp->recv_places];
        r->wr_id = wr->wr_id;
        r->count = wr->num_sge;
        memcpy(r->sges, wr->sg_list, (size_t)wr->num_sge * sizeof *r->sges);
    }
    pthread_mutex_unlock(&efa_lock);
    if (rc)
        *bad = wr;
    return rc;
}

/* ---- work requests in ---- */

static void start(struct ibv_qp_ex *ib)
{
    struct qp *qp = qp_of(ib);

    qp->chain = NULL;
    qp->chain_end = &qp->chain;
    qp->current = NULL;
    qp->error = 0;
}

static struct work *add(struct ibv_qp_ex *ib, enum packet_type type)
{
    static struct work spare; /* a chain that has failed goes on, and is thrown away */
    struct qp *qp = qp_of(ib);
    struct work *w = calloc(1, sizeof *w);

    if (!w) {
        qp->error = ENOMEM;
        memset(&spare, 0, sizeof spare);
        qp->current = &spare;
        return qp->current;
    }
    w->qp = qp;
    w->wr_id = ib->wr_id;
    w->head = (struct head){.type = (uint8_t)type,
                            .flags = qp->datagram ? IS_DATAGRAM : 0,
                            .rnr_retry = (uint8_t)qp->rnr_retry,
                            .message = __atomic_add_fetch(&last_message, 1, __ATOMIC_RELAXED),
                            .from = qp->device->gid,
                            .src_qpn = ib->qp_base.qp_num};
    *qp->chain_end = w;
    qp->chain_end = &w->next;
    qp->current = w;
    return w;
}

static void add_send(struct ibv_qp_ex *ib)
{
    (void)add(ib, P_SEND);
}

static void add_send_imm(struct ibv_qp_ex *ib, __be32 imm)
{
    struct work *w = add(ib, P_SEND);

    w->head.flags |= HAS_IMM;
    w->head.imm = imm;
}

static struct work *add_rdma(struct ibv_qp_ex *ib, enum packet_type type, uint32_t rkey,
                             uint64_t addr)
{
    struct work *w = add(ib, type);

    w->head.rkey = rkey;
    w->head.addr = addr;
    return w;
}

static void add_read(struct ibv_qp_ex *ib, uint32_t rkey, uint64_t addr)
{
    (void)add_rdma(ib, P_READ, rkey, addr);
}

static void add_write(struct ibv_qp_ex *ib, uint32_t rkey, uint64_t addr)
{
    (void)add_rdma(ib, P_WRITE, rkey, addr);
}

static void add_write_imm(struct ibv_qp_ex *ib, uint32_t rkey, uint64_t addr, __be32 imm)
{
    struct work *w = add_rdma(ib, P_WRITE, rkey, addr);

    w->head.flags |= HAS_IMM;
    w->head.imm = imm;
}

static void set_sges(struct ibv_qp_ex *ib, size_t count, const struct ibv_sge *sges)
{
    struct qp *qp = qp_of(ib);
    struct work *w = qp->current;

    if (count > SGES_MAX) {
        qp->error = EINVAL;
        return;
    }
    w->count = (int)count;
    for (size_t i = 0; i < count; i++) {
        w->sges[i] = sges[i];
        w->head.total += sges[i].length;
    }
}

static void set_sge(struct ibv_qp_ex *ib, uint32_t lkey, uint64_t addr, uint32_t length)
{
    struct ibv_sge sge = {.addr = addr, .length = length, .lkey = lkey};

    set_sges(ib, 1, &sge);
}

/* The device has inline data for sends only. */
static void set_inline_list(struct ibv_qp_ex *ib, size_t count, const struct ibv_data_buf *buffers)
{
    struct qp *qp = qp_of(ib);
    struct work *w = qp->current;

    w->is_inline = true;
    for (size_t i = 0; i < count; i++) {
        if (w->head.type != P_SEND || w->head.total + buffers[i].length > INLINE_MAX) {
            qp->error = EINVAL;
            return;
        }
        memcpy(w->data + w->head.total, buffers[i].addr, buffers[i].length);
        w->head.total += buffers[i].length;
    }
}

static void set_inline(struct ibv_qp_ex *ib, void *addr, size_t length)
{
    struct ibv_data_buf buffer = {.addr = addr, .length = length};

    set_inline_list(ib, 1, &buffer);
}

static void set_address(struct ibv_qp_ex *ib, struct ibv_ah *ah, uint32_t qpn, uint32_t qkey)
{
    struct qp *qp = qp_of(ib);
    struct work *w = qp->current;

    if (!efa_gid_of(((struct handle *)ah)->number, &w->to))
        qp->error = EINVAL;
    w->head.dst_qpn = qpn;
    w->head.qkey = qkey;
}

static uint32_t length_of(const struct work *chain)
{
    uint32_t n = 0;

    for (; chain; chain = chain->next)
        n++;
    return n;
}

static bool fits(const struct work *w)
{
    return w->head.total <= (w->head.type == P_SEND ? MTU : RDMA_MAX);
}

static void count_work(struct work *w)
{
    bool imm = w->head.flags & HAS_IMM;

    if (w->head.type == P_SEND) {
        efa_count(C_SENDS, 1);
        efa_count(C_SEND_BYTES, w->head.total);
    } else if (w->head.type == P_READ) {
        efa_count(C_READS, 1);
    } else {
        efa_count(imm ? C_WRITE_IMMS : C_WRITES, 1);
        efa_count(C_WRITE_BYTES, w->head.total);
        if (efa_chance(efa_control->lost_writes))
            w->head.flags |= NOT_TO_BE_EXECUTED;
        else if (efa_chance(efa_control->lost_acks))
            w->head.flags |= ACK_IS_LOST;
    }
}

static int complete(struct ibv_qp_ex *ib)
{
    struct qp *qp = qp_of(ib);
    int rc = qp->error;

    pthread_mutex_lock(&efa_lock);
    if (rc == 0 && ib->qp_base.state != IBV_QPS_RTS)
        rc = EINVAL;
    if (rc == 0 && qp->outstanding + length_of(qp->chain) > qp->send_places)
        rc = ENOMEM;
    for (struct work *w = qp->chain; w && rc == 0; w = w->next)
        rc = fits(w) ? 0 : EINVAL;
    for (struct work *w = qp->chain, *next; w; w = next) {
        next = w->next;
        if (rc) {
            free(w);
            continue;
        }
        count_work(w);
        qp->outstanding++;
        efa_send_work(w);
    }
    qp->chain = NULL;
    pthread_mutex_unlock(&efa_lock);
    if (rc == 0)
        efa_kick();
    return rc;
}

static void give_up(struct ibv_qp_ex *ib)
{
    qp_of(ib)->error = ECANCELED;
    (void)complete(ib);
}

/* The older way in, which the provider uses for UD. */
int efa_post_send(struct ibv_qp *ib, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct ibv_qp_ex *qp = (struct ibv_qp_ex *)ib;
    struct ibv_send_wr *first = wr;

    start(qp);
    for (; wr; wr = wr->next) {
        qp->wr_id = wr->wr_id;
        if (wr->opcode == IBV_WR_SEND_WITH_IMM)
            add_send_imm(qp, wr->imm_data);
        else if (wr->opcode == IBV_WR_SEND)
            add_send(qp);
        else {
            add_send(qp);
            qp_of(qp)->error = EINVAL;
        }
        if (wr->send_flags & IBV_SEND_INLINE)
            for (int i = 0; i < wr->num_sge; i++)
                set_inline(qp, (void *)(uintptr_t)wr->sg_list[i].addr, wr->sg_list[i].length);
        else
            set_sges(qp, (size_t)wr->num_sge, wr->sg_list);
        set_address(qp, wr->wr.ud.ah, wr->wr.ud.remote_qpn, wr->wr.ud.remote_qkey);
    }
    int rc = complete(qp);
    if (rc)
        *bad = first;
    return rc;
}

/* ---- completions ---- */

static enum ibv_wc_opcode opcode_of(uint8_t type)
{
    if (type == P_WRITE)
        return IBV_WC_RDMA_WRITE;
    return type == P_READ ? IBV_WC_RDMA_READ : IBV_WC_SEND;
}

/* The work is no longer in any list; it is freed. */
void efa_work_done(struct work *w, uint32_t status)
{
    struct completion c = {.wr_id = w->wr_id,
                           .opcode = opcode_of(w->head.type),
                           .status = status,
                           .bytes = (uint32_t)w->head.total,
                           .qpn = w->qp->ib.qp_base.qp_num};

    w->qp->outstanding--;
    efa_complete(w->qp->send_cq, &c);
    free(w);
}

/* ---- life ---- */

static void set_functions(struct ibv_qp_ex *ib)
{
    ib->wr_start = start;
    ib->wr_send = add_send;
    ib->wr_send_imm = add_send_imm;
    ib->wr_rdma_read = add_read;
    ib->wr_rdma_write = add_write;
    ib->wr_rdma_write_imm = add_write_imm;
    ib->wr_set_sge = set_sge;
    ib->wr_set_sge_list = set_sges;
    ib->wr_set_inline_data = set_inline;
    ib->wr_set_inline_data_list = set_inline_list;
    ib->wr_set_ud_addr = set_address;
    ib->wr_complete = complete;
    ib->wr_abort = give_up;
}

static struct qp *make(struct ibv_context *context, const struct ibv_qp_init_attr_ex *attr)
{
    struct qp *qp = calloc(1, sizeof *qp);

    if (!qp)
        return NULL;
    qp->recv_places = attr->cap.max_recv_wr ? attr->cap.max_recv_wr : 1;
    qp->send_places = attr->cap.max_send_wr;
    qp->rnr_retry = RNR_FOREVER;
    qp->fd = -1;
    qp->device = efa_device_of(context);
    qp->send_cq = (struct cq *)attr->send_cq;
    qp->recv_cq = (struct cq *)attr->recv_cq;
    qp->recvs = calloc(qp->recv_places, sizeof *qp->recvs);
    struct ibv_qp *base = &qp->ib.qp_base;
    base->context = context;
    base->pd = attr->pd;
    base->send_cq = attr->send_cq;
    base->recv_cq = attr->recv_cq;
    base->qp_context = attr->qp_context;
    base->qp_type = attr->qp_type;
    base->state = IBV_QPS_RESET;
    set_functions(&qp->ib);
    if (qp->recvs)
        return qp;
    free(qp);
    return NULL;
}

static struct ibv_qp *create(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr,
                             bool datagram, bool unsolicited)
{
    const struct ibv_qp_cap *cap = &attr->cap;
    struct qp *qp = NULL;
    uint32_t slot = 0;

    errno = EINVAL;
    if (cap->max_send_wr <= SENDS_MAX && cap->max_recv_wr <= RECVS_MAX &&
        cap->max_send_sge <= SGES_MAX && cap->max_recv_sge <= SGES_MAX &&
        cap->max_inline_data <= INLINE_MAX)
        qp = make(context, attr);
    if (!qp)
        return NULL;
    qp->datagram = datagram;
    qp->unsolicited = unsolicited && !efa_control->solicited;
    pthread_mutex_lock(&efa_lock);
    while (slot < QPS_MAX && efa_qps[slot])
        slot++;
    qp->ib.qp_base.handle = slot;
    int rc = slot < QPS_MAX ? efa_bind(qp) : ENOMEM;
    if (rc == 0)
        efa_qps[slot] = qp;
    pthread_mutex_unlock(&efa_lock);
    if (rc == 0)
        return &qp->ib.qp_base;
    free(qp->recvs);
    free(qp);
    errno = rc;
    return NULL;
}

struct ibv_qp *efa_create_datagram_qp(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr)
{
    return create(context, attr, true, false);
}

EXPORT struct ibv_qp *efadv_create_qp_ex(struct ibv_context *context,
                                         struct ibv_qp_init_attr_ex *attr,
                                         struct efadv_qp_init_attr *efa_attr, uint32_t room)
{
    struct efadv_qp_init_attr_newer newer = {0};

    memcpy(&newer, efa_attr, room < sizeof newer ? room : sizeof newer);
    return create(context, attr, false, newer.flags & EFA_QP_UNSOLICITED_WRITE_RECV);
}

EXPORT struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *qp)
{
    return (struct ibv_qp_ex *)qp;
}

static void flush_receives(struct qp *qp)
{
    while (qp->recv_head != qp->recv_tail) {
        struct completion c = {.wr_id = efa_take_receive(qp)->wr_id,
                               .opcode = IBV_WC_RECV,
                               .status = DONE_FLUSHED,
                               .qpn = qp->ib.qp_base.qp_num};
        efa_complete(qp->recv_cq, &c);
    }
}

EXPORT int ibv_modify_qp(struct ibv_qp *ib, struct ibv_qp_attr *attr, int mask)
{
    struct qp *qp = (struct qp *)ib;

    pthread_mutex_lock(&efa_lock);
    if (mask & IBV_QP_QKEY)
        qp->qkey = attr->qkey;
    if (mask & IBV_QP_RNR_RETRY)
        qp->rnr_retry = attr->rnr_retry;
    if (mask & IBV_QP_STATE)
        ib->state = attr->qp_state;
    if ((mask & IBV_QP_STATE) && attr->qp_state == IBV_QPS_ERR) {
        efa_drop_work(qp, true);
        flush_receives(qp);
    }
    pthread_mutex_unlock(&efa_lock);
    return 0;
}

EXPORT int ibv_query_qp_data_in_order(struct ibv_qp *qp, enum ibv_wr_opcode opcode, uint32_t flags)
{
    (void)qp;
    (void)opcode;
    (void)flags;
    return 0;
}

/* Completions of a queue pair that is gone are not handed out any more. */
static void purge(struct cq *cq, uint32_t qpn)
{
    uint32_t kept = cq->head;

    for (uint32_t i = cq->head; i != cq->tail; i++)
        if (cq->ring[i % cq->places].qpn != qpn)
            cq->ring[kept++ % cq->places] = cq->ring[i % cq->places];
    cq->tail = kept;
}

EXPORT int ibv_destroy_qp(struct ibv_qp *ib)
{
    struct qp *qp = (struct qp *)ib;

    pthread_mutex_lock(&efa_lock);
    qp->dead = true;
    efa_unbind(qp);
    efa_drop_work(qp, false);
    efa_forget_arrivals(qp);
    efa_qps[ib->handle] = NULL;
    purge(qp->send_cq, ib->qp_num);
    purge(qp->recv_cq, ib->qp_num);
    pthread_mutex_unlock(&efa_lock);
    free(qp->recvs);
    free(qp);
    return 0;
}
