/* Control frames of the libfabric provider.
 *
 * On the wire a frame is the token of the lane it is meant for (8 bytes, little-endian; 0: the
 * NIC) and then the caller's bytes. A frame with a foreign token is dropped.
 *
 * lane_send() copies a frame into one of the lane's slots; there it waits until libfabric takes
 * it, which may be long while a connection is being made. Towards a NIC only the newest frame
 * waits: first frames are sent again until they are answered.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "providers/ofi.h"

static void fill(struct ofi_slot *slot, uint64_t token, const uint8_t *bytes, uint32_t length)
{
    token = htole64(token);
    memcpy(slot->frame, &token, OFI_TOKEN_BYTES);
    memcpy(slot->frame + OFI_TOKEN_BYTES, bytes, length);
    slot->length = OFI_TOKEN_BYTES + length;
}

static ssize_t post_frame(struct ofi_port *port, struct ofi_slot *slot, void *desc, fi_addr_t to,
                          uint64_t flags)
{
    struct iovec iov = {.iov_base = slot->frame, .iov_len = slot->length};
    struct fi_msg msg = {
        .msg_iov = &iov,
        .desc = &desc,
        .iov_count = 1,
        .addr = to,
        .context = &slot->context,
    };

    return fi_sendmsg(port->ep, &msg, FI_COMPLETION | flags);
}

int ofi_lane_flush(struct ofi_lane *lane)
{
    struct ofi_nic *nic = (struct ofi_nic *)lane->base.nic;

    while (lane->waiting.head && !ofi_lane_gated(lane)) {
        struct ofi_slot *slot = lane->waiting.head;
        uint64_t flags = nic->kind->delivery && !slot->contact ? FI_DELIVERY_COMPLETE : 0;
        ssize_t rc = post_frame(lane->port, slot, lane->sends.desc, lane->to, flags);
        int verdict = ofi_lane_verdict(lane, rc);
        if (verdict <= 0)
            return verdict;
        (void)ofi_fifo_pop(&lane->waiting);
        nic->waiting_frames--;
        lane->sends_out++;
    }
    return 0;
}

void ofi_lane_forget(struct ofi_lane *lane)
{
    struct ofi_nic *nic = (struct ofi_nic *)lane->base.nic;

    while (lane->waiting.head) {
        ofi_pool_give(&lane->sends, ofi_fifo_pop(&lane->waiting));
        nic->waiting_frames--;
    }
}

int ofi_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                  const struct fab_mr *attach)
{
    struct ofi_lane *lane = (struct ofi_lane *)base;
    struct ofi_nic *nic = (struct ofi_nic *)base->nic;

    (void)attach; /* a key says all that a peer needs */
    if (length > FAB_FRAME_MAX)
        return -EMSGSIZE;
    if (!lane->pointed)
        return -ENOTCONN; /* a lane that is down may still get a BYE out, on a new connection */
    if (!lane->peer_token)
        ofi_lane_forget(lane);
    struct ofi_slot *slot = ofi_pool_take(&lane->sends);
    if (!slot)
        return -EAGAIN;
    slot->lane = lane;
    slot->contact = !lane->peer_token;
    fill(slot, lane->peer_token, bytes, length);
    ofi_fifo_push(&lane->waiting, slot);
    nic->waiting_frames++;
    (void)ofi_lane_flush(lane); /* poll() meets the same error and reports it */
    return 0;
}

int ofi_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                     uint32_t blob_len, const uint8_t *bytes, uint32_t length)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;
    uint64_t token;

    (void)origin; /* we have none: the blob says where to answer */
    if (length > FAB_FRAME_MAX || !ofi_blob_split(&nic->port, blob, blob_len, &token))
        return -EINVAL;
    struct ofi_slot *slot = ofi_pool_take(&nic->replies);
    if (!slot)
        return -EAGAIN;
    if (fi_av_insert(nic->port.av, blob + OFI_TOKEN_BYTES, 1, &slot->to, 0, NULL) != 1) {
        ofi_pool_give(&nic->replies, slot);
        return -EINVAL;
    }
    int rc = nic->kind->lane_endpoints
                 ? 0
                 : ofi_source_hold(nic, slot->to, blob + OFI_TOKEN_BYTES, OFI_STRANGERS);
    if (rc) {
        ofi_pool_give(&nic->replies, slot);
        return rc;
    }
    fill(slot, token, bytes, length);
    slot->deadline = ofi_now() + OFI_REPLY_NS;
    ofi_fifo_push(&nic->waiting, slot);
    ofi_replies_flush(nic);
    return 0;
}

void ofi_reply_end(struct ofi_nic *nic, struct ofi_slot *slot)
{
    if (nic->kind->lane_endpoints) /* a shared one keeps addresses, see unpoint() */
        (void)fi_av_remove(nic->port.av, &slot->to, 1, 0);
    ofi_pool_give(&nic->replies, slot);
}

/* One look at each waiting reply; those that find no connection go to the end. */
void ofi_replies_flush(struct ofi_nic *nic)
{
    struct ofi_fifo waiting = nic->waiting;
    uint64_t now = ofi_now();

    nic->waiting = (struct ofi_fifo){NULL, NULL};
    while (waiting.head) {
        struct ofi_slot *slot = ofi_fifo_pop(&waiting);
        ssize_t rc = post_frame(&nic->port, slot, nic->replies.desc, slot->to, 0);
        if (rc == -FI_EAGAIN && now < slot->deadline)
            ofi_fifo_push(&nic->waiting, slot);
        else if (rc)
            ofi_reply_end(nic, slot);
    }
}

void ofi_frame_received(struct ofi_port *port, struct ofi_slot *slot, uint32_t length)
{
    struct ofi_nic *nic = port->domain->nic;
    const struct fab_sink *sink = nic->base.sink;
    const uint8_t *bytes = slot->frame + OFI_TOKEN_BYTES;
    struct ofi_lane *lane;
    uint64_t token;

    if (length < OFI_TOKEN_BYTES)
        return;
    memcpy(&token, slot->frame, OFI_TOKEN_BYTES);
    token = le64toh(token);
    length -= OFI_TOKEN_BYTES;
    if (token == 0) {
        if (!port->lane)
            sink->hello(&nic->base, NULL, bytes, length);
        return;
    }
    lane = ofi_lane_of_token(nic, (uint32_t)token);
    if (!lane || lane->token != token || lane->port != port || lane->closing)
        return;
    if (!ofi_credit_take(lane, bytes, length))
        sink->frame(&lane->base, bytes, length, -1);
}
