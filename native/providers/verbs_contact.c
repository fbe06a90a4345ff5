/* First frames, as UD datagrams.
 *
 * A frame may be longer than a datagram (the path MTU, 1024 bytes on many RoCE ports), so it is cut
 * into up to 32 of one size, which are put together again at the other side. A frame of which a
 * datagram is lost is lost: the handshake sends it again, under another serial number. Incomplete
 * ones are kept in a bounded table, from which the oldest make room.
 *
 *   offset  type  field                       offset  type  field
 *        0  u16   magic 0xFAB3                    16  u64   token of the lane; 0: the NIC
 *        2  u8    version 1                       24  u16   number of this datagram
 *        3  u8    0                               26  u16   datagrams of the frame, 1 to 32
 *        4  u32   serial of the frame             28  u16   bytes of the frame
 *        8  u64   source: random, of the NIC      30  u16   bytes of every datagram but the last
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "providers/verbs.h"

enum { MAGIC = 0xFAB3, VERSION = 1, PIECES_MAX = 32 };

struct datagram {
    uint32_t serial;
    uint64_t source, token;
    uint16_t number, count, length, chunk;
};

static void put16(uint8_t *at, uint16_t value)
{
    value = htole16(value);
    memcpy(at, &value, sizeof(value));
}

static uint16_t get16(const uint8_t *at)
{
    uint16_t value;

    memcpy(&value, at, sizeof(value));
    return le16toh(value);
}

static void put64(uint8_t *at, uint64_t value)
{
    value = htole64(value);
    memcpy(at, &value, sizeof(value));
}

static uint64_t get64(const uint8_t *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return le64toh(value);
}

static void write_header(uint8_t *at, const struct datagram *d)
{
    uint32_t serial = htole32(d->serial);

    put16(at, MAGIC);
    at[2] = VERSION;
    at[3] = 0;
    memcpy(at + 4, &serial, sizeof(serial));
    put64(at + 8, d->source);
    put64(at + 16, d->token);
    put16(at + 24, d->number);
    put16(at + 26, d->count);
    put16(at + 28, d->length);
    put16(at + 30, d->chunk);
}

/* False: it is none of ours, or says what cannot be. */
static bool read_header(const uint8_t *at, uint32_t length, struct datagram *d)
{
    if (length < VERBS_DATAGRAM || get16(at) != MAGIC || at[2] != VERSION)
        return false;
    memcpy(&d->serial, at + 4, sizeof(d->serial));
    d->serial = le32toh(d->serial);
    d->source = get64(at + 8);
    d->token = get64(at + 16);
    d->number = get16(at + 24);
    d->count = get16(at + 26);
    d->length = get16(at + 28);
    d->chunk = get16(at + 30);
    if (!d->count || d->count > PIECES_MAX || d->number >= d->count || d->length > FAB_FRAME_MAX)
        return false;
    uint32_t before = (uint32_t)(d->count - 1) * d->chunk; /* bytes ahead of the last */
    uint32_t here = length - VERBS_DATAGRAM;
    if (before >= d->length || d->length - before > d->chunk)
        return false;
    return here == (d->number + 1 == d->count ? d->length - before : d->chunk);
}

/* ---- sending ---- */

static int free_buffers(const struct verbs_nic *nic)
{
    return __builtin_popcountll(nic->ud_sends_free);
}

static int post_datagram(struct verbs_nic *nic, const struct verbs_way *way, uint32_t buffer,
                         uint32_t length)
{
    struct ibv_sge sge = {.addr = (uintptr_t)verbs_ud_send_buffer(nic, buffer),
                          .length = length,
                          .lkey = nic->memory_mr->lkey};
    struct ibv_send_wr wr = {.wr_id = (uint64_t)buffer << 8 | VERBS_UD_SEND,
                             .sg_list = &sge,
                             .num_sge = 1,
                             .opcode = IBV_WR_SEND,
                             .send_flags = IBV_SEND_SIGNALED};
    struct ibv_send_wr *bad;

    wr.wr.ud.ah = way->ah;
    wr.wr.ud.remote_qpn = way->qpn;
    wr.wr.ud.remote_qkey = way->qkey;
    return ibv_post_send(nic->ud, &wr, &bad);
}

int verbs_contact_send(struct verbs_nic *nic, const struct verbs_way *way, const uint8_t *bytes,
                       uint32_t length)
{
    uint32_t own = verbs_mtu_bytes(nic->port_attr.active_mtu);
    uint32_t chunk = (way->mtu < own ? way->mtu : own) - VERBS_DATAGRAM;
    uint32_t count = (length + chunk - 1) / chunk;
    struct datagram d = {.serial = nic->serial++,
                         .source = nic->source,
                         .token = way->token,
                         .count = (uint16_t)count,
                         .length = (uint16_t)length,
                         .chunk = (uint16_t)chunk};

    if (nic->ud_broken)
        return -EAGAIN;
    if (free_buffers(nic) < (int)count)
        return -EAGAIN;
    for (uint32_t at = 0; at < length; at += chunk, d.number++) {
        uint32_t buffer = (uint32_t)__builtin_ctzll(nic->ud_sends_free);
        uint32_t here = length - at < chunk ? length - at : chunk;
        uint8_t *out = verbs_ud_send_buffer(nic, buffer);
        write_header(out, &d);
        memcpy(out + VERBS_DATAGRAM, bytes + at, here);
        int rc = post_datagram(nic, way, buffer, VERBS_DATAGRAM + here);
        if (rc)
            return verbs_fail(nic, "sending a datagram", rc);
        nic->ud_sends_free &= ~(1ull << buffer);
        nic->ud_posted++;
    }
    return 0;
}

/* An address handle that datagrams under way may still need: rdma_rxe looks it up when it sends,
 * and a queue pair whose handle is missing then breaks. */
void verbs_ah_retire(struct verbs_nic *nic, struct ibv_ah *ah)
{
    struct verbs_grave *grave = NULL;

    if (!ah)
        return;
    if (nic->ud_posted != nic->ud_ended)
        grave = calloc(1, sizeof(*grave));
    if (!grave) { /* none is under way, or (out of memory) one gets lost */
        (void)nic->lib->destroy_ah(ah);
        return;
    }
    *grave = (struct verbs_grave){.ah = ah, .after = nic->ud_posted, .next = nic->graves};
    nic->graves = grave;
}

void verbs_ahs_bury(struct verbs_nic *nic, bool all)
{
    struct verbs_grave **link = &nic->graves;

    while (*link) {
        struct verbs_grave *grave = *link;
        if (!all && (int32_t)(nic->ud_ended - grave->after) < 0) {
            link = &grave->next;
            continue;
        }
        *link = grave->next;
        (void)nic->lib->destroy_ah(grave->ah);
        free(grave);
    }
}

void verbs_contact_sent(struct verbs_nic *nic, uint32_t buffer, bool failed)
{
    nic->ud_sends_free |= 1ull << buffer;
    nic->ud_ended++;
    nic->ud_broken |= failed;
    if (nic->graves)
        verbs_ahs_bury(nic, false);
}

/* ---- receiving ---- */

static struct verbs_partial *partial_of(struct verbs_nic *nic, const struct datagram *d)
{
    struct verbs_partial *oldest = &nic->partials[0];

    for (int i = 0; i < VERBS_PARTIALS; i++) {
        struct verbs_partial *p = &nic->partials[i];
        if (p->have && p->source == d->source && p->serial == d->serial && p->token == d->token)
            return p->count == d->count && p->length == d->length && p->chunk == d->chunk ? p
                                                                                          : NULL;
        if (p->age < oldest->age)
            oldest = p;
    }
    *oldest = (struct verbs_partial){.source = d->source,
                                     .token = d->token,
                                     .serial = d->serial,
                                     .count = d->count,
                                     .length = d->length,
                                     .chunk = d->chunk,
                                     .age = ++nic->partial_clock};
    return oldest;
}

static void deliver(struct verbs_nic *nic, uint64_t token, const uint8_t *bytes, uint32_t length)
{
    const struct fab_sink *sink = nic->base.sink;
    struct verbs_lane *lane;

    if (!token) {
        sink->hello(&nic->base, NULL, bytes, length);
        return;
    }
    lane = (token & 0xffff) < nic->lane_slots ? nic->lanes[token & 0xffff] : NULL;
    if (lane && lane->token == token && !lane->abandoned)
        sink->frame(&lane->base, bytes, length, -1);
}

void verbs_contact_received(struct verbs_nic *nic, uint32_t buffer, uint32_t length)
{
    const uint8_t *bytes = verbs_ud_recv_buffer(nic, buffer) + VERBS_GRH;
    struct datagram d;

    if (length < VERBS_GRH || !read_header(bytes, length - VERBS_GRH, &d))
        return;
    bytes += VERBS_DATAGRAM;
    if (d.count == 1) {
        deliver(nic, d.token, bytes, d.length);
        return;
    }
    struct verbs_partial *p = partial_of(nic, &d);
    if (!p)
        return;
    memcpy(p->bytes + (size_t)d.number * d.chunk, bytes, length - VERBS_GRH - VERBS_DATAGRAM);
    p->have |= 1u << d.number;
    if (p->have != (uint32_t)((1ull << d.count) - 1))
        return;
    p->have = 0;
    p->age = 0;
    deliver(nic, p->token, p->bytes, p->length);
}

/* ---- strangers ---- */

int verbs_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                       uint32_t blob_len, const uint8_t *bytes, uint32_t length)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;
    struct verbs_job *job;

    (void)origin; /* a first frame says everything: its first lane is where to answer */
    if (nic->setup.replies == VERBS_REPLIES || length > FAB_FRAME_MAX)
        return -EAGAIN;
    job = calloc(1, sizeof(*job));
    if (!job)
        return -ENOMEM;
    int rc = verbs_blob_read(nic, blob, blob_len, &job->to);
    job->frame = rc ? NULL : malloc(length);
    if (!job->frame) {
        free(job);
        return rc ? rc : -ENOMEM;
    }
    memcpy(job->frame, bytes, length);
    job->length = length;
    nic->setup.replies++;
    verbs_setup_submit(nic, job);
    return 0;
}

void verbs_origin_drop(struct fab_nic *base, struct fab_origin *origin)
{
    (void)base;
    (void)origin;
}

/* ---- the queue pair ---- */

static int start_ud(struct verbs_nic *nic)
{
    struct ibv_qp_attr rtr = {.qp_state = IBV_QPS_RTR};
    struct ibv_qp_attr rts = {.qp_state = IBV_QPS_RTS};
    int rc = verbs_qp_init(nic, nic->ud, 0);

    for (uint32_t i = 0; rc == 0 && i < VERBS_UD_RECVS; i++)
        rc = verbs_ud_recv(nic, i);
    if (rc == 0)
        rc = nic->lib->modify_qp(nic->ud, &rtr, IBV_QP_STATE);
    if (rc == 0)
        rc = nic->lib->modify_qp(nic->ud, &rts, IBV_QP_STATE | IBV_QP_SQ_PSN);
    return rc;
}

void verbs_ud_repair(struct verbs_nic *nic)
{
    struct ibv_qp_attr error = {.qp_state = IBV_QPS_ERR}, reset = {.qp_state = IBV_QPS_RESET};

    if (nic->ud_posted != nic->ud_ended || nic->ud_recvs_out) {
        (void)nic->lib->modify_qp(nic->ud, &error, IBV_QP_STATE); /* flushes the rest */
        return;
    }
    int rc = nic->lib->modify_qp(nic->ud, &reset, IBV_QP_STATE);
    if (rc == 0)
        rc = start_ud(nic);
    nic->ud_broken = rc != 0;
}

int verbs_ud_open(struct verbs_nic *nic)
{
    struct ibv_qp_init_attr init = {.send_cq = nic->cq,
                                    .recv_cq = nic->cq,
                                    .cap = {.max_send_wr = VERBS_UD_SENDS,
                                            .max_recv_wr = VERBS_UD_RECVS,
                                            .max_send_sge = 1,
                                            .max_recv_sge = 1},
                                    .qp_type = IBV_QPT_UD};

    nic->partials = calloc(VERBS_PARTIALS, sizeof(*nic->partials));
    if (!nic->partials)
        return -ENOMEM;
    int rc = verbs_cq_reserve(nic, VERBS_UD_SENDS + VERBS_UD_RECVS);
    if (rc)
        return rc;
    nic->ud = nic->lib->create_qp(nic->pd, &init);
    if (!nic->ud)
        return verbs_fail(nic, "making a UD queue pair", errno);
    rc = start_ud(nic);
    nic->ud_sends_free = ~0ull;
    return rc ? verbs_fail(nic, "starting a UD queue pair", rc) : 0;
}
