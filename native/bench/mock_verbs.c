/* A libibverbs of one NIC that exists in this process only: it costs next to nothing, so that what
 * the verbs provider costs can be seen (tests/instructions.py).
 *
 * Contract
 * - FABRIC_LIBIBVERBS names this library. It has what providers/dl.h asks for, and nothing else.
 * - A work request is carried out while it is posted: its bytes are copied, the receive that it
 *   takes and its own completion are in their queues when ibv_post_send() returns. Queue pairs find
 *   each other by number, whichever engine of the process opened them.
 * - Nothing is ever lost, late or refused. What only a bug could ask for (a queue that overruns, an
 *   immediate for which no receive is posted) ends the program.
 * - One call posts or polls at a time; the others wait. ibv_create_ah() and ibv_modify_qp() may be called
 *   by any thread.
 * - mock_posted_ns tells when ibv_post_send() was called first since somebody made it 0 (raw_submit.c).
 * - Nothing is freed but by the end of the process.
 */
#include <endian.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#undef ibv_query_port

enum { QPS = 64, CQ_PLACES = 1 << 16, RECEIVES = 1 << 13, GRH = 40 };

struct receives {
    uint32_t head, tail;
    struct {
        uint64_t wr_id, address;
    } ring[RECEIVES];
};

struct mock_cq {
    struct ibv_cq base;
    uint32_t head, tail;
    struct ibv_wc ring[CQ_PLACES];
};

struct mock_srq {
    struct ibv_srq base;
    struct receives receives;
};

struct mock_qp {
    struct ibv_qp base;
    uint32_t to; /* number of the other one */
    struct receives own, *receives;
};

_Atomic int64_t mock_posted_ns;

static pthread_mutex_t data_path = PTHREAD_MUTEX_INITIALIZER;
static struct mock_qp *qps[QPS]; /* by number */
static uint32_t qp_count = 1;
static struct ibv_device the_device = {.name = "mock0"};

static void must(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "mock verbs: %s\n", what);
    exit(1);
}

static void *make(size_t bytes)
{
    void *made = calloc(1, bytes);
    must(made != NULL, "out of memory");
    return made;
}

/* ---- the way of a work request ---- */

static void complete(struct ibv_cq *cq, const struct ibv_wc *wc)
{
    struct mock_cq *mock = (struct mock_cq *)cq;
    must(mock->tail - mock->head < (uint32_t)cq->cqe, "a completion queue overran");
    mock->ring[mock->tail++ % CQ_PLACES] = *wc;
}

static void take_receive(struct mock_qp *to, const struct ibv_send_wr *wr, uint32_t before,
                         enum ibv_wc_opcode opcode)
{
    struct receives *r = to->receives;
    must(r->head != r->tail, "no receive is posted");
    uint32_t at = r->head++ % RECEIVES;
    struct ibv_wc wc = {.wr_id = r->ring[at].wr_id,
                        .opcode = opcode,
                        .imm_data = wr->imm_data,
                        .qp_num = to->base.qp_num,
                        .wc_flags = opcode == IBV_WC_RECV ? 0 : IBV_WC_WITH_IMM};
    if (opcode == IBV_WC_RECV) {
        wc.byte_len = before + wr->sg_list[0].length;
        memcpy((uint8_t *)(uintptr_t)r->ring[at].address + before,
               (const void *)(uintptr_t)wr->sg_list[0].addr, wr->sg_list[0].length);
    }
    complete(to->base.recv_cq, &wc);
}

static void write_there(const struct ibv_send_wr *wr)
{
    if (wr->num_sge)
        memcpy((void *)(uintptr_t)wr->wr.rdma.remote_addr,
               (const void *)(uintptr_t)wr->sg_list[0].addr, wr->sg_list[0].length);
}

static void carry_out(struct mock_qp *qp, const struct ibv_send_wr *wr)
{
    int is_ud = qp->base.qp_type == IBV_QPT_UD;
    uint32_t number = is_ud ? wr->wr.ud.remote_qpn : qp->to;
    must(number && number < qp_count, "no such queue pair");
    struct mock_qp *to = qps[number];
    struct ibv_wc wc = {.wr_id = wr->wr_id, .qp_num = qp->base.qp_num};
    if (!to) { /* destroyed: nobody acknowledges, which a datagram does not wait for */
        wc.status = is_ud ? IBV_WC_SUCCESS : IBV_WC_RETRY_EXC_ERR;
    } else if (wr->opcode == IBV_WR_SEND) {
        wc.opcode = IBV_WC_SEND;
        take_receive(to, wr, is_ud ? GRH : 0, IBV_WC_RECV);
    } else {
        wc.opcode = IBV_WC_RDMA_WRITE;
        write_there(wr);
        if (wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
            take_receive(to, wr, 0, IBV_WC_RECV_RDMA_WITH_IMM);
    }
    if ((wr->send_flags & IBV_SEND_SIGNALED) || wc.status != IBV_WC_SUCCESS)
        complete(qp->base.send_cq, &wc);
}

static void note_posted(void)
{
    struct timespec t;
    if (atomic_load_explicit(&mock_posted_ns, memory_order_relaxed))
        return;
    clock_gettime(CLOCK_MONOTONIC, &t);
    atomic_store_explicit(&mock_posted_ns, (int64_t)t.tv_sec * 1000000000 + t.tv_nsec,
                          memory_order_relaxed);
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    (void)bad;
    note_posted();
    pthread_mutex_lock(&data_path);
    for (; wr; wr = wr->next)
        carry_out((struct mock_qp *)qp, wr);
    pthread_mutex_unlock(&data_path);
    return 0;
}

static void add_receives(struct receives *r, const struct ibv_recv_wr *wr)
{
    for (; wr; wr = wr->next) {
        must(r->tail - r->head < RECEIVES, "too many receives");
        uint32_t at = r->tail++ % RECEIVES;
        r->ring[at].wr_id = wr->wr_id;
        r->ring[at].address = wr->num_sge ? wr->sg_list[0].addr : 0;
    }
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    (void)bad;
    pthread_mutex_lock(&data_path);
    add_receives(&((struct mock_qp *)qp)->own, wr);
    pthread_mutex_unlock(&data_path);
    return 0;
}

static int post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    (void)bad;
    pthread_mutex_lock(&data_path);
    add_receives(&((struct mock_srq *)srq)->receives, wr);
    pthread_mutex_unlock(&data_path);
    return 0;
}

static int poll_cq(struct ibv_cq *cq, int most, struct ibv_wc *out)
{
    struct mock_cq *mock = (struct mock_cq *)cq;
    int n = 0;
    pthread_mutex_lock(&data_path);
    while (n < most && mock->head != mock->tail)
        out[n++] = mock->ring[mock->head++ % CQ_PLACES];
    pthread_mutex_unlock(&data_path);
    return n;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited)
{
    (void)cq;
    (void)solicited;
    return 0;
}

/* ---- device ---- */

struct ibv_device **ibv_get_device_list(int *count)
{
    static struct ibv_device *list[2];
    list[0] = &the_device;
    if (count)
        *count = 1;
    return list;
}

void ibv_free_device_list(struct ibv_device **list)
{
    (void)list;
}

const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

int ibv_fork_init(void)
{
    return 0;
}

struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    struct ibv_context *context = make(sizeof *context);
    context->device = device;
    context->ops.post_send = post_send;
    context->ops.post_recv = post_recv;
    context->ops.post_srq_recv = post_srq_recv;
    context->ops.poll_cq = poll_cq;
    context->ops.req_notify_cq = req_notify_cq;
    context->cmd_fd = -1;
    context->async_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return context;
}

int ibv_close_device(struct ibv_context *context)
{
    (void)context;
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *out)
{
    (void)context;
    *out = (struct ibv_device_attr){.max_qp = QPS,
                                    .max_qp_wr = 1024,
                                    .max_cqe = CQ_PLACES,
                                    .max_srq = QPS,
                                    .max_srq_wr = RECEIVES,
                                    .phys_port_cnt = 1};
    return 0;
}

int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *out)
{
    struct ibv_port_attr *attr = (struct ibv_port_attr *)out;
    (void)context;
    (void)port;
    attr->state = IBV_PORT_ACTIVE;
    attr->max_mtu = attr->active_mtu = IBV_MTU_4096;
    attr->gid_tbl_len = 1;
    attr->pkey_tbl_len = 1;
    attr->max_msg_sz = 1u << 30;
    attr->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
}

int ibv_query_pkey(struct ibv_context *context, uint8_t port, int index, __be16 *out)
{
    (void)context;
    (void)port;
    (void)index;
    *out = htobe16(0xffff);
    return 0;
}

int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port, uint32_t index,
                      struct ibv_gid_entry *out, uint32_t flags, size_t size)
{
    static const uint8_t address[16] = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = 1};
    (void)context;
    (void)flags;
    (void)size;
    *out = (struct ibv_gid_entry){
        .gid_index = index, .port_num = port, .gid_type = IBV_GID_TYPE_ROCE_V2};
    memcpy(out->gid.raw, address, sizeof address);
    return 0;
}

int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *out)
{
    (void)context;
    (void)out;
    return -1;
}

void ibv_ack_async_event(struct ibv_async_event *event)
{
    (void)event;
}

const char *ibv_event_type_str(enum ibv_event_type type)
{
    (void)type;
    return "an event of the mock";
}

const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    (void)status;
    return "a status of the mock";
}

/* ---- memory ---- */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct ibv_pd *pd = make(sizeof *pd);
    pd->context = context;
    return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd)
{
    (void)pd;
    return 0;
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *address, size_t length, uint64_t iova,
                                unsigned access)
{
    struct ibv_mr *mr = make(sizeof *mr);
    (void)iova;
    (void)access;
    *mr = (struct ibv_mr){
        .context = pd->context, .pd = pd, .addr = address, .length = length, .lkey = 1, .rkey = 2};
    return mr;
}

struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova,
                                 int fd, int access)
{
    (void)pd;
    (void)offset;
    (void)length;
    (void)iova;
    (void)fd;
    (void)access;
    return NULL;
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
    (void)mr;
    return 0;
}

/* ---- queues ---- */

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    struct ibv_comp_channel *channel = make(sizeof *channel);
    channel->context = context;
    channel->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return channel;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    (void)channel;
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int places, void *user,
                             struct ibv_comp_channel *channel, int vector)
{
    struct mock_cq *cq = make(sizeof *cq);
    (void)vector;
    cq->base.context = context;
    cq->base.channel = channel;
    cq->base.cq_context = user;
    cq->base.cqe = places;
    return &cq->base;
}

int ibv_resize_cq(struct ibv_cq *cq, int places)
{
    cq->cqe = places;
    return 0;
}

int ibv_destroy_cq(struct ibv_cq *cq)
{
    (void)cq;
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **user)
{
    (void)channel;
    (void)cq;
    (void)user;
    return -1;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned count)
{
    (void)cq;
    (void)count;
}

struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *attr)
{
    struct mock_srq *srq = make(sizeof *srq);
    (void)attr;
    srq->base.context = pd->context;
    srq->base.pd = pd;
    return &srq->base;
}

int ibv_destroy_srq(struct ibv_srq *srq)
{
    (void)srq;
    return 0;
}

/* ---- queue pairs ---- */

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
    must(qp_count < QPS, "too many queue pairs");
    struct mock_qp *qp = make(sizeof *qp);
    qp->base.context = pd->context;
    qp->base.pd = pd;
    qp->base.send_cq = attr->send_cq;
    qp->base.recv_cq = attr->recv_cq;
    qp->base.srq = attr->srq;
    qp->base.qp_type = attr->qp_type;
    qp->base.qp_num = qp_count;
    qp->receives = attr->srq ? &((struct mock_srq *)attr->srq)->receives : &qp->own;
    qps[qp_count++] = qp;
    return &qp->base;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    if (mask & IBV_QP_DEST_QPN)
        ((struct mock_qp *)qp)->to = attr->dest_qp_num;
    if (mask & IBV_QP_STATE)
        qp->state = attr->qp_state;
    return 0;
}

int ibv_destroy_qp(struct ibv_qp *qp)
{
    pthread_mutex_lock(&data_path);
    qps[qp->qp_num] = NULL;
    pthread_mutex_unlock(&data_path);
    return 0;
}

struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
    struct ibv_ah *ah = make(sizeof *ah);
    (void)attr;
    ah->context = pd->context;
    ah->pd = pd;
    return ah;
}

int ibv_destroy_ah(struct ibv_ah *ah)
{
    (void)ah;
    return 0;
}
