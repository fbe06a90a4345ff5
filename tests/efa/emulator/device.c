/* Devices: their list, a sysfs tree for them, and what they can do.
 *
 * The tree is made by tests/efa/run, in $EFA_EMULATOR_DIR/sys. A process is a node of the network: its
 * devices have GIDs of its own, from its process id, so that libfabric does not take two processes
 * for neighbours and use shared memory. State belongs to the process that first asks for devices, so
 * a parent may have loaded this before it forked.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "emulator.h"

pthread_mutex_t efa_lock = PTHREAD_MUTEX_INITIALIZER;
static struct device devices[DEVICES_MAX];
static int device_count;
static pid_t owner;

static void make_device(struct device *d, int index, const char *sys)
{
    uint32_t pid = (uint32_t)getpid();

    memset(d, 0, sizeof *d);
    d->index = index;
    d->ib.node_type = IBV_NODE_UNSPECIFIED;
    d->ib.transport_type = IBV_TRANSPORT_UNSPECIFIED;
    (void)snprintf(d->ib.name, sizeof d->ib.name, "rdmap%ds0", FIRST_BUS + index);
    (void)snprintf(d->ib.dev_name, sizeof d->ib.dev_name, "uverbs%d", index);
    (void)snprintf(d->ib.dev_path, sizeof d->ib.dev_path, "%.200s/class/infiniband_verbs/uverbs%d",
                   sys, index);
    (void)snprintf(d->ib.ibdev_path, sizeof d->ib.ibdev_path, "%.200s/class/infiniband/%.20s", sys,
                   d->ib.name);
    d->gid.raw[0] = 0xfe;
    d->gid.raw[1] = 0x80;
    d->gid.raw[8] = 0x0e;
    memcpy(d->gid.raw + 10, &pid, sizeof pid);
    d->gid.raw[15] = (uint8_t)(index + 1);
}

static void begin(void)
{
    char sys[256];

    if (owner == getpid())
        return;
    owner = getpid();
    efa_control_open();
    if (!efa_control)
        return;
    (void)snprintf(sys, sizeof sys, "%.200s/sys", getenv("EFA_EMULATOR_DIR"));
    device_count = (int)(efa_control->devices < DEVICES_MAX ? efa_control->devices : DEVICES_MAX);
    for (int i = 0; i < device_count; i++)
        make_device(&devices[i], i, sys);
}

EXPORT struct ibv_device **ibv_get_device_list(int *count)
{
    pthread_mutex_lock(&efa_lock);
    begin();
    pthread_mutex_unlock(&efa_lock);
    struct ibv_device **list = calloc((size_t)device_count + 1, sizeof(struct ibv_device *));
    for (int i = 0; list && i < device_count; i++)
        list[i] = &devices[i].ib;
    if (count)
        *count = device_count;
    return list;
}

EXPORT void ibv_free_device_list(struct ibv_device **list)
{
    free(list);
}

EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

EXPORT enum ibv_fork_status ibv_is_fork_initialized(void)
{
    return IBV_FORK_UNNEEDED;
}

EXPORT int ibv_fork_init(void)
{
    return 0;
}

struct device *efa_device_of(struct ibv_context *context)
{
    return (struct device *)context->device;
}

/* ---- attributes ---- */

/* Callers may know an older and shorter struct. */
static void answer(void *to, size_t room, const void *from, size_t size)
{
    memset(to, 0, room);
    memcpy(to, from, room < size ? room : size);
}

static int query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr,
                      size_t room)
{
    bool gone = efa_device_gone(efa_device_of(context));
    struct ibv_port_attr a = {
        .state = gone ? IBV_PORT_DOWN : IBV_PORT_ACTIVE,
        .max_mtu = IBV_MTU_4096,
        .active_mtu = IBV_MTU_4096,
        .gid_tbl_len = 1,
        .max_msg_sz = MTU,
        .pkey_tbl_len = 1,
        .active_width = 2,
        .active_speed = 64,
        .phys_state = 5,
        .link_layer = IBV_LINK_LAYER_UNSPECIFIED,
    };

    if (port != 1)
        return EINVAL;
    answer(attr, room, &a, sizeof a);
    return 0;
}

EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port,
                          struct _compat_ibv_port_attr *attr)
{
    /* The old struct ends before port_cap_flags2. */
    return query_port(context, port, (struct ibv_port_attr *)(void *)attr,
                      offsetof(struct ibv_port_attr, port_cap_flags2));
}

EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
    (void)context;
    *attr = (struct ibv_device_attr){
        .fw_ver = "emulator",
        .node_guid = 1,
        .max_mr_size = 1ull << 40,
        .page_size_cap = 0xfffff000,
        .vendor_id = 0x1d0f,
        .vendor_part_id = 0xefa2,
        .hw_ver = 0xefa2,
        .max_qp = QPS_MAX,
        .max_qp_wr = RECVS_MAX,
        .max_sge = SGES_MAX,
        .max_sge_rd = 1,
        .max_cq = 512,
        .max_cqe = CQES_MAX,
        .max_mr = KEYS_MAX - 1,
        .max_pd = 256,
        .max_ah = HANDLES_MAX - 1,
        .phys_port_cnt = 1,
        .max_pkeys = 1,
    };
    return 0;
}

static int query_device_ex(struct ibv_context *context,
                           const struct ibv_query_device_ex_input *input,
                           struct ibv_device_attr_ex *attr, size_t room)
{
    (void)input;
    memset(attr, 0, room);
    return ibv_query_device(context, &attr->orig_attr);
}

EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
    if (port != 1 || index != 0)
        return EINVAL;
    *gid = efa_device_of(context)->gid;
    return 0;
}

EXPORT int efadv_query_device(struct ibv_context *context, struct efadv_device_attr *attr,
                              uint32_t room)
{
    uint32_t caps = EFA_CAPS_RDMA_READ | EFA_CAPS_RNR_RETRY | EFA_CAPS_CQ_WITH_SGID |
                    EFA_CAPS_RDMA_WRITE |
                    (efa_control->solicited ? 0 : EFA_CAPS_UNSOLICITED_WRITE_RECV);
    struct efadv_device_attr a = {
        .max_sq_wr = SENDS_MAX,
        .max_rq_wr = RECVS_MAX,
        .max_sq_sge = SGES_MAX,
        .max_rq_sge = SGES_MAX,
        .inline_buf_size = INLINE_MAX,
        .device_caps = caps,
        .max_rdma_size = RDMA_MAX,
    };

    (void)context;
    answer(attr, room, &a, sizeof a);
    return 0;
}

/* ---- contexts ---- */

EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    struct context *c = calloc(1, sizeof *c);

    if (!c)
        return NULL;
    c->device = (struct device *)device;
    c->v.sz = sizeof c->v;
    c->v.query_port = query_port;
    c->v.query_device_ex = query_device_ex;
    c->v.create_cq_ex = efa_create_cq;
    c->v.create_qp_ex = efa_create_datagram_qp;
    struct ibv_context *context = &c->v.context;
    context->device = device;
    context->abi_compat = __VERBS_ABI_IS_EXTENDED;
    context->cmd_fd = context->async_fd = -1;
    context->num_comp_vectors = 1;
    context->ops.poll_cq = efa_poll_cq;
    context->ops.req_notify_cq = efa_request_notify;
    context->ops.post_send = efa_post_send;
    context->ops.post_recv = efa_post_recv;
    return context;
}

EXPORT int ibv_close_device(struct ibv_context *context)
{
    free((char *)context - offsetof(struct context, v.context));
    return 0;
}
