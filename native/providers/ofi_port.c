/* Endpoints, the slots of their operations, and blobs: token (8 bytes, little-endian) and then
 * the endpoint's address as libfabric gives it. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "providers/ofi.h"

void ofi_pool_give(struct ofi_pool *pool, struct ofi_slot *slot)
{
    slot->next = pool->free;
    pool->free = slot;
}

struct ofi_slot *ofi_pool_take(struct ofi_pool *pool)
{
    struct ofi_slot *slot = pool->free;

    if (slot)
        pool->free = slot->next;
    return slot;
}

void ofi_fifo_push(struct ofi_fifo *fifo, struct ofi_slot *slot)
{
    slot->next = NULL;
    if (fifo->tail)
        fifo->tail->next = slot;
    else
        fifo->head = slot;
    fifo->tail = slot;
}

struct ofi_slot *ofi_fifo_pop(struct ofi_fifo *fifo)
{
    struct ofi_slot *slot = fifo->head;

    fifo->head = slot->next;
    if (!fifo->head)
        fifo->tail = NULL;
    return slot;
}

int ofi_pool_open(struct ofi_pool *pool, struct ofi_domain *domain, uint32_t count,
                  enum ofi_slot_kind kind)
{
    struct ofi_mr mr = {.fid = NULL};
    size_t bytes = (size_t)count * OFI_FRAME_BYTES;

    pool->count = count;
    pool->slots = calloc(count, sizeof(*pool->slots));
    pool->memory = calloc(1, bytes);
    if (!pool->slots || !pool->memory)
        return -ENOMEM;
    if (domain->nic->info->domain_attr->mr_mode & FI_MR_LOCAL) {
        struct fab_memory memory = {
            .base = pool->memory, .length = bytes, .memfd = -1, .dmabuf_fd = -1};
        int rc = ofi_mr_open(domain, &memory, FI_SEND | FI_RECV, &mr);
        if (rc)
            return rc;
    }
    pool->mr = mr.fid;
    pool->desc = mr.desc;
    for (uint32_t i = count; i-- > 0;) {
        pool->slots[i].kind = kind;
        pool->slots[i].frame = pool->memory + (size_t)i * OFI_FRAME_BYTES;
        ofi_pool_give(pool, &pool->slots[i]);
    }
    return 0;
}

void ofi_pool_close(struct ofi_pool *pool)
{
    if (pool->mr)
        (void)fi_close(&pool->mr->fid);
    free(pool->memory);
    free(pool->slots);
    memset(pool, 0, sizeof(*pool));
}

int ofi_port_recv(struct ofi_port *port, struct ofi_slot *slot)
{
    ssize_t rc = fi_recv(port->ep, slot->frame, OFI_FRAME_BYTES, port->recvs.desc, FI_ADDR_UNSPEC,
                         &slot->context);

    if (rc)
        return (int)rc;
    port->recvs_out++;
    return 0;
}

static int open_endpoint(struct ofi_port *port)
{
    const struct ofi_kind *kind = port->domain->nic->kind;
    struct fi_av_attr av = {.type = FI_AV_TABLE};
    int rc = fi_endpoint(port->domain->fid, port->domain->nic->info, &port->ep, port);

    if (rc == 0)
        rc = fi_av_open(port->domain->fid, &av, &port->av, port);
    if (rc == 0)
        rc = fi_ep_bind(port->ep, &port->av->fid, 0);
    if (rc == 0)
        rc = fi_ep_bind(port->ep, &port->domain->cq->fid, FI_TRANSMIT | FI_RECV);
    if (rc == 0 && kind->before_enable)
        rc = kind->before_enable(port->ep);
    if (rc == 0)
        rc = fi_enable(port->ep);
    if (rc == 0) {
        port->address_len = sizeof(port->address);
        rc = fi_getname(&port->ep->fid, port->address, &port->address_len);
    }
    return rc;
}

int ofi_port_open(struct ofi_port *port, struct ofi_domain *domain, struct ofi_lane *lane)
{
    const struct ofi_kind *kind = domain->nic->kind;

    memset(port, 0, sizeof(*port));
    port->domain = domain;
    port->lane = lane;
    int rc = open_endpoint(port);
    if (rc)
        rc = ofi_fail(domain->nic,
                      rc == -EINVAL && kind->lane_queues ? "opening an endpoint (" OFI_UNIVERSE_ENV
                                                           "=" OFI_UNIVERSE " may help)"
                                                         : "opening an endpoint",
                      rc);
    else if (kind->after_enable)
        rc = kind->after_enable(domain->nic, port->ep); /* has its own text */
    if (rc == 0 && ofi_is_tcp(kind))
        ofi_pending_begin(port);
    if (rc) {
        (void)ofi_port_shut(port);
        ofi_port_free(port);
    }
    return rc;
}

int ofi_port_receive(struct ofi_port *port, uint32_t recvs)
{
    struct ofi_slot *slot;
    int rc = ofi_pool_open(&port->recvs, port->domain, recvs, OFI_RECV);

    while (rc == 0 && (slot = ofi_pool_take(&port->recvs))) {
        slot->port = port;
        rc = ofi_port_recv(port, slot);
    }
    return rc ? ofi_fail(port->domain->nic, "posting receive buffers", rc) : 0;
}

int ofi_port_shut(struct ofi_port *port)
{
    if (port->ep && ofi_is_tcp(port->domain->nic->kind))
        ofi_pending_end(port);
    int rc = port->ep ? fi_close(&port->ep->fid) : 0;

    if (rc == 0)
        port->ep = NULL;
    return rc;
}

void ofi_port_free(struct ofi_port *port)
{
    if (port->av)
        (void)fi_close(&port->av->fid);
    port->av = NULL;
    ofi_pool_close(&port->recvs);
}

bool ofi_blob_split(const struct ofi_port *port, const uint8_t *blob, uint32_t length,
                    uint64_t *token)
{
    if (length != OFI_TOKEN_BYTES + port->address_len)
        return false;
    memcpy(token, blob, OFI_TOKEN_BYTES);
    *token = le64toh(*token);
    return true;
}

void ofi_blob_join(const struct ofi_port *port, uint64_t token, uint8_t *blob, uint32_t *length)
{
    token = htole64(token);
    memcpy(blob, &token, OFI_TOKEN_BYTES);
    memcpy(blob + OFI_TOKEN_BYTES, port->address, port->address_len);
    *length = (uint32_t)(OFI_TOKEN_BYTES + port->address_len);
}
