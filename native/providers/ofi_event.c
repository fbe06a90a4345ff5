/* What a completion means.
 *
 * An operation of ours is told by its slot, never by flags, which are undefined in errors. What
 * has no slot was done by the peer: a write, told by FI_REMOTE_WRITE (some providers set
 * FI_REMOTE_CQ_DATA on the initiator's own completion too).
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "providers/ofi.h"

static struct ofi_lane *lane_written(const struct ofi_domain *domain, const struct ofi_event *event)
{
    const struct ofi_nic *nic = domain->nic;

    if (domain->lane)
        return domain->lane;
    if (nic->kind->cq_data_size < 8)
        return ofi_lane_of_source(nic, event->from);
    return ofi_lane_of_token(nic, (uint32_t)(event->data >> 32));
}

/* A write with an immediate by the peer, whole or (with an error) broken off. */
static bool is_written(const struct ofi_event *event)
{
    const uint64_t both = FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA;

    return !event->slot && (event->flags & both) == both;
}

/* The lane that an event concerns, or NULL. */
static struct ofi_lane *lane_of(const struct ofi_domain *domain, const struct ofi_event *event)
{
    if (is_written(event))
        return lane_written(domain, event);
    if (!event->slot || event->slot->kind == OFI_REPLY)
        return NULL;
    return event->slot->kind == OFI_RECV ? event->slot->port->lane : event->slot->lane;
}

static void down(struct ofi_domain *domain, struct ofi_lane *lane, const char *what,
                 const struct ofi_event *event)
{
    char reason[96] = "";
    char text[FAB_TEXT_MAX];
    const char *error = event->error == ECANCELED ? "the connection was lost"
                                                  : domain->nic->lib->strerror(event->error);

    if (!lane->closing) /* rxm asks the queue's endpoint, which may be gone */
        (void)fi_cq_strerror(domain->cq, event->prov_errno, NULL, reason, sizeof(reason));
    (void)snprintf(text, sizeof(text), "%s %.40s: %s failed: %.60s (%.40s says: %.60s)",
                   domain->nic->kind->name, domain->nic->base.info.name, what, error,
                   domain->nic->base.info.provider, reason);
    ofi_lane_down(lane, -event->error, text);
}

static void report_write(struct ofi_domain *domain, struct ofi_slot *slot, int error)
{
    struct ofi_lane *lane = slot->lane;
    uint64_t wr_id = slot->wr_id;

    lane->writes_out--;
    domain->nic->writes_out--;
    lane->bytes_out -= slot->bytes;
    slot->next = lane->free_writes;
    lane->free_writes = slot;
    domain->nic->base.sink->completed(&lane->base, wr_id, -error);
}

/* The writes before this one in its chain share its fate, unless they have a worse one. */
static void report_run(struct ofi_domain *domain, struct ofi_slot *slot, int error)
{
    struct ofi_slot *next;

    for (struct ofi_slot *held = slot->run; held; held = next) {
        next = held->next;
        if (held->error == 0)
            held->error = error;
        held->held = false;
        if (held->ended)
            report_write(domain, held, held->error);
    }
}

/* Where keys are the fence, a key that is refused says that the peer has ended the session, and not
 * that this one write was wrong. */
static int verdict_on_write(const struct ofi_domain *domain, int error)
{
    bool refused = error == EACCES || error == EFAULT || error == EINVAL || error == EPERM;

    return refused && !domain->nic->kind->lane_endpoints ? ECONNRESET : error;
}

static void write_ended(struct ofi_domain *domain, const struct ofi_event *event)
{
    struct ofi_slot *slot = event->slot;
    struct ofi_lane *lane = slot->lane;

    if (event->error) {
        slot->error = verdict_on_write(domain, event->error);
        down(domain, lane, "a write", event);
    }
    if (slot->held) {
        slot->ended = true;
    } else {
        report_run(domain, slot, slot->error);
        report_write(domain, slot, slot->error);
    }
}

static void send_ended(struct ofi_domain *domain, const struct ofi_event *event)
{
    struct ofi_slot *slot = event->slot;
    struct ofi_lane *lane = slot->lane;
    bool matters = event->error && !slot->contact;

    lane->sends_out--;
    ofi_pool_give(&lane->sends, slot);
    if (matters)
        down(domain, lane, "a control frame", event);
}

/* A receive fails when its connection breaks in the middle of a frame. */
static void recv_ended(struct ofi_domain *domain, const struct ofi_event *event)
{
    struct ofi_slot *slot = event->slot;
    struct ofi_port *port = slot->port;
    struct ofi_lane *lane = port->lane;

    port->recvs_out--;
    if (lane && lane->closing)
        return;
    if (!event->error)
        ofi_frame_received(port, slot, event->length);
    else if (lane && lane->peer_token)
        down(domain, lane, "receiving a control frame", event);
    if (ofi_port_recv(port, slot)) {
        ofi_pool_give(&port->recvs, slot);
        domain->nic->recvs_owed = true;
    }
}

/* The peer sees the failure of a write that broke off, if it lives; here it is the only sign that
 * the connection was lost. */
static void written(struct ofi_domain *domain, const struct ofi_event *event)
{
    struct ofi_lane *lane = lane_written(domain, event);

    if (lane && event->error) {
        down(domain, lane, "a write by the peer", event);
    } else if (lane) {
        domain->nic->base.sink->imm(&lane->base, (uint32_t)event->data, 1);
        lane->imms_read++;
        ofi_credit_tell(lane);
    }
}

/* A completion of a lane that was closed before: it was reported when the lane was. */
static bool comes_late(const struct ofi_event *event)
{
    const struct ofi_slot *slot = event->slot;
    struct ofi_lane *lane = NULL;

    if (slot && (slot->kind == OFI_WRITE || slot->kind == OFI_SEND))
        lane = slot->lane;
    else if (slot && slot->kind == OFI_RECV)
        lane = slot->port->lane;
    if (!lane || !lane->buried)
        return false;
    if (slot->kind == OFI_SEND && lane->sends_out)
        lane->sends_out--; /* a ghost is kept for these (close_shared) */
    return true;
}

void ofi_handle(struct ofi_domain *domain, const struct ofi_event *event)
{
    if (comes_late(event))
        return;
    if (is_written(event))
        written(domain, event);
    if (!event->slot)
        return;
    switch (event->slot->kind) {
    case OFI_WRITE:
        write_ended(domain, event);
        break;
    case OFI_SEND:
        send_ended(domain, event);
        break;
    case OFI_RECV:
        recv_ended(domain, event);
        break;
    case OFI_REPLY:
        ofi_reply_end(domain->nic, event->slot);
        break;
    case OFI_BREAK:
        event->slot->lane->breaks_out--;
        break;
    }
}

int ofi_handle_queued(struct ofi_domain *domain, int most)
{
    int done = 0;

    for (; domain->queued && done < most; done++) {
        struct ofi_event event = domain->queue[domain->head];
        domain->head = (domain->head + 1) % OFI_QUEUE;
        domain->queued--;
        ofi_handle(domain, &event);
    }
    return done;
}

void ofi_handle_lane(struct ofi_domain *domain, struct ofi_lane *lane)
{
    uint32_t kept = 0;
    uint32_t queued = domain->queued;

    for (uint32_t i = 0; i < queued; i++) {
        struct ofi_event event = domain->queue[(domain->head + i) % OFI_QUEUE];
        if (lane_of(domain, &event) == lane)
            ofi_handle(domain, &event);
        else
            domain->queue[(domain->head + kept++) % OFI_QUEUE] = event;
    }
    domain->queued = kept;
}
