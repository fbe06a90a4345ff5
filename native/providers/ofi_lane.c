/* Lanes of the libfabric provider.
 *
 * A lane's slots are all its operations: a window of work requests and a pool of frames. Each is
 * in a free list, waiting, or under way at libfabric, which hands it back once.
 *
 * A post to a peer that is not connected (yet, or any more) makes libfabric try to connect and
 * returns -EAGAIN. Such attempts cost system calls and may go on for a connect deadline, so after
 * one a lane is gated for a time that doubles from 20 us to 2 ms.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/ofi.h"

static struct ofi_nic *nic_of(const struct ofi_lane *lane)
{
    return (struct ofi_nic *)lane->base.nic;
}

void ofi_lane_down(struct ofi_lane *lane, int error, const char *text)
{
    if (lane->down)
        return;
    lane->down = true;
    ofi_lane_forget(lane);
    if (!lane->closing)
        lane->base.nic->sink->lane_down(&lane->base, error, text);
}

bool ofi_lane_gated(const struct ofi_lane *lane)
{
    return lane->retry_at && ofi_now() < lane->retry_at;
}

/* Whatever keeps a connection from being made is no verdict on a NIC: it may still come up. A
 * lane's endpoint that is gone never comes back. */
static bool is_later(const struct ofi_lane *lane, ssize_t rc)
{
    if (rc == -FI_EAGAIN)
        return true;
    if (lane->peer_token)
        return false;
    return rc == -ECONNREFUSED || rc == -ECONNRESET || rc == -ENETUNREACH || rc == -EHOSTUNREACH ||
           rc == -ETIMEDOUT || rc == -EPIPE || rc == -ENOTCONN;
}

int ofi_lane_verdict(struct ofi_lane *lane, ssize_t rc)
{
    if (rc == 0) {
        lane->retry_at = 0;
        lane->retry_ns = 0;
        return 1;
    }
    if (!is_later(lane, rc))
        return -rc < 256 ? (int)rc : -EIO;
    if (lane->writes_out || lane->sends_out)
        return 0; /* connected, and full: a completion makes room */
    lane->retry_ns = lane->retry_ns ? 2 * lane->retry_ns : OFI_RETRY_MIN_NS;
    if (lane->retry_ns > OFI_RETRY_MAX_NS)
        lane->retry_ns = OFI_RETRY_MAX_NS;
    lane->retry_at = ofi_now() + lane->retry_ns;
    return 0;
}

/* ---- who is meant ---- */

struct ofi_lane *ofi_lane_of_token(const struct ofi_nic *nic, uint32_t low)
{
    uint32_t index = low & 0xffff;
    struct ofi_lane *lane = index < nic->lane_slots ? nic->lanes[index] : NULL;

    return lane && (uint32_t)lane->token == low ? lane : NULL;
}

struct ofi_lane *ofi_lane_of_source(const struct ofi_nic *nic, fi_addr_t from)
{
    return from < nic->source_slots ? nic->sources[from].lane : NULL;
}

static int grow_lanes(struct ofi_nic *nic)
{
    uint32_t slots = nic->lane_slots ? 2 * nic->lane_slots : 16;

    if (nic->lane_slots >= OFI_MAX_LANES)
        return -ENOSPC;
    struct ofi_lane **lanes = realloc(nic->lanes, slots * sizeof(struct ofi_lane *));
    if (!lanes)
        return -ENOMEM;
    memset(lanes + nic->lane_slots, 0, (slots - nic->lane_slots) * sizeof(struct ofi_lane *));
    nic->lanes = lanes;
    nic->lane_slots = slots;
    return 0;
}

/* Enters the lane in the table; its token is random but for its place there. */
static int enter(struct ofi_nic *nic, struct ofi_lane *lane)
{
    uint32_t index = 0;
    int rc = nic->lane_count == nic->lane_slots ? grow_lanes(nic) : 0;

    if (rc == 0)
        rc = ofi_random(&lane->token);
    if (rc)
        return rc;
    while (nic->lanes[index])
        index++;
    lane->token = (lane->token | 1ull << 63) & ~0xffffull;
    lane->token |= index;
    lane->index = index;
    nic->lanes[index] = lane;
    nic->lane_count++;
    return 0;
}

static void leave(struct ofi_nic *nic, const struct ofi_lane *lane)
{
    nic->lanes[lane->index] = NULL;
    nic->lane_count--;
}

/* The lane that is pointed at a queue pair. */
static struct ofi_lane *pointed_at(const struct ofi_nic *nic, const uint8_t *queue)
{
    for (uint32_t i = 0; i < nic->lane_slots; i++) {
        struct ofi_lane *lane = nic->lanes[i];
        if (lane && lane->pointed && lane->peer_token &&
            memcmp(lane->peer_address, queue, OFI_QUEUE_NAME) == 0)
            return lane;
    }
    return NULL;
}

/* On a shared endpoint: immediates from a queue pair belong to the lane that points there. */
static void attribute(struct ofi_nic *nic, const uint8_t *queue)
{
    struct ofi_lane *lane = pointed_at(nic, queue);

    for (uint64_t i = 0; i < nic->source_slots; i++)
        if (nic->sources[i].held && memcmp(nic->sources[i].queue, queue, OFI_QUEUE_NAME) == 0)
            nic->sources[i].lane = lane;
}

static int grow_sources(struct ofi_nic *nic, fi_addr_t from)
{
    uint64_t slots = from + 64;
    struct ofi_source *sources = realloc(nic->sources, slots * sizeof(*sources));

    if (!sources)
        return -ENOMEM;
    memset(sources + nic->source_slots, 0, (slots - nic->source_slots) * sizeof(*sources));
    nic->sources = sources;
    nic->source_slots = slots;
    return 0;
}

int ofi_source_hold(struct ofi_nic *nic, fi_addr_t from, const uint8_t *address, uint32_t most)
{
    if (from < nic->source_slots && nic->sources[from].held)
        return 0;
    int rc = from < most ? 0 : -ENOSPC;
    if (rc)
        fab_fail_text("%s %s: it has had %u peers since it was opened, the limit", nic->kind->name,
                      nic->base.info.name, most);
    else if (from >= nic->source_slots)
        rc = grow_sources(nic, from);
    if (rc) { /* nothing was sent to it yet */
        (void)fi_av_remove(nic->port.av, &from, 1, 0);
        return rc;
    }
    struct ofi_source *source = &nic->sources[from];
    source->held = true;
    memcpy(source->queue, address, OFI_QUEUE_NAME);
    source->lane = pointed_at(nic, address);
    return 0;
}

/* Forgets where the lane pointed. An address vector of its own dies with the lane; on a shared one
 * the address stays. efa numbers the messages of each address, on both sides: were it removed here
 * and not there, the next message would be taken for an old one, and libfabric ends the process. */
static void unpoint(struct ofi_lane *lane)
{
    struct ofi_nic *nic = nic_of(lane);

    if (!lane->pointed || nic->kind->lane_endpoints)
        return;
    lane->pointed = false;
    attribute(nic, lane->peer_address);
}

/* ---- open ---- */

/* A closed lane's peer that was only slow may still connect to its address. So that it does not
 * reach another lane there, addresses are not used again for the next OFI_PORT_MEMORY lanes. */
static bool port_is_fresh(struct ofi_nic *nic, const struct ofi_port *port)
{
    const struct sockaddr_in *in = (const void *)port->address; /* sin6_port is at the same place */
    uint32_t number = ntohs(in->sin_port);
    uint64_t bit = 1ull << (number & 63);

    if ((nic->used_ports[0][number >> 6] | nic->used_ports[1][number >> 6]) & bit)
        return false;
    if (nic->used_count++ == OFI_PORT_MEMORY) {
        memcpy(nic->used_ports[1], nic->used_ports[0], sizeof(nic->used_ports[1]));
        memset(nic->used_ports[0], 0, sizeof(nic->used_ports[0]));
        nic->used_count = 1;
    }
    nic->used_ports[0][number >> 6] |= bit;
    return true;
}

static void discard(struct ofi_port *port)
{
    struct ofi_domain *domain = port->domain;

    (void)ofi_port_shut(port);
    ofi_port_free(port);
    if (domain->lane)
        ofi_domain_close(domain);
}

/* A queue follows the first endpoint that was bound to it for ever, so each has its own. */
static int try_own_port(struct ofi_nic *nic, struct ofi_lane *lane)
{
    if (nic->kind->lane_queues) {
        int rc = ofi_domain_open(nic, lane, &lane->domain);
        if (rc)
            return rc;
    }
    int rc = ofi_port_open(&lane->own, lane->domain, lane);
    if (rc && lane->domain != nic->data) {
        ofi_domain_close(lane->domain);
        lane->domain = nic->data;
    }
    return rc;
}

static int open_own_port(struct ofi_nic *nic, struct ofi_lane *lane)
{
    struct ofi_port used[OFI_PORT_TRIES]; /* kept open meanwhile, so that the next one differs */
    int tries = 0;
    int rc = -EADDRINUSE;

    while (tries < OFI_PORT_TRIES) {
        rc = try_own_port(nic, lane);
        if (rc || port_is_fresh(nic, &lane->own))
            break;
        used[tries++] = lane->own;
        lane->own.ep = NULL;
        lane->own.av = NULL;
        lane->domain = nic->data;
        rc = -EADDRINUSE;
    }
    while (tries > 0)
        discard(&used[--tries]);
    if (rc == 0)
        rc = ofi_port_receive(&lane->own, OFI_LANE_RECVS);
    if (rc == 0 && lane->domain->lane) {
        rc = ofi_domain_watch(lane->domain);
        rc = rc ? ofi_fail(nic, "setting up waiting", rc) : 0;
    }
    return rc;
}

static int open_slots(struct ofi_nic *nic, struct ofi_lane *lane)
{
    for (uint32_t i = OFI_WINDOW; i-- > 0;) {
        lane->writes[i].kind = OFI_WRITE;
        lane->writes[i].lane = lane;
        lane->writes[i].next = lane->free_writes;
        lane->free_writes = &lane->writes[i];
    }
    for (int i = 0; i < OFI_BREAKS; i++) {
        lane->breaks[i].kind = OFI_BREAK;
        lane->breaks[i].lane = lane;
    }
    int rc = ofi_pool_open(&lane->sends, nic->data, OFI_LANE_SENDS, OFI_SEND);
    return rc ? ofi_fail(nic, "getting memory for frames", rc) : 0;
}

/* Takes everything about the lane out of the completion queue. Its endpoint is closed, so the
 * queue holds all there will be, ahead of what comes later: either every operation has shown up,
 * or a read that empties the queue ends it. */
static void drain(struct ofi_domain *domain, struct ofi_lane *lane)
{
    do {
        if (ofi_domain_full(domain))
            (void)ofi_handle_queued(domain, OFI_BATCH);
        (void)ofi_domain_read(domain);
        ofi_handle_lane(domain, lane);
    } while (!domain->dry && lane->writes_out + lane->sends_out + lane->port->recvs_out > 0);
}

static void free_lane(struct ofi_nic *nic, struct ofi_lane *lane)
{
    if (lane->port == &lane->own)
        ofi_port_free(&lane->own);
    ofi_pool_close(&lane->sends);
    if (lane->domain->lane)
        ofi_domain_close(lane->domain);
    if (nic->lanes[lane->index] == lane)
        leave(nic, lane);
    free(lane);
}

int ofi_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out)
{
    struct ofi_nic *nic = (struct ofi_nic *)base;
    int rc = ofi_credit_admit(nic);
    if (rc)
        return rc;
    struct ofi_lane *lane = calloc(1, sizeof(*lane));

    (void)origin; /* always NULL: the first frame's blob says whom to connect to */
    if (!lane)
        return -ENOMEM;
    lane->base.nic = base;
    lane->base.window = OFI_WINDOW;
    lane->port = nic->kind->lane_endpoints ? &lane->own : &nic->port;
    lane->domain = nic->data;
    rc = enter(nic, lane);
    if (rc) {
        free(lane);
        return rc;
    }
    rc = open_slots(nic, lane);
    if (rc == 0 && lane->port == &lane->own)
        rc = open_own_port(nic, lane);
    if (rc) {
        lane->closing = true;
        (void)ofi_port_shut(&lane->own);
        drain(lane->domain, lane);
        free_lane(nic, lane);
        return rc;
    }
    ofi_blob_join(lane->port, lane->token, lane->base.blob, &lane->base.blob_len);
    *out = &lane->base;
    return 0;
}

/* ---- connect ---- */

static int point_at(struct ofi_lane *lane, const uint8_t *address)
{
    struct ofi_nic *nic = nic_of(lane);
    fi_addr_t to;

    if (fi_av_insert(lane->port->av, address, 1, &to, 0, NULL) != 1)
        return -EINVAL;
    if (!nic->kind->lane_endpoints) {
        int rc = ofi_source_hold(nic, to, address, OFI_SOURCES);
        if (rc)
            return rc;
    }
    unpoint(lane);
    lane->to = to;
    lane->pointed = true;
    memcpy(lane->peer_address, address, lane->port->address_len);
    return 0;
}

int ofi_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length)
{
    struct ofi_lane *lane = (struct ofi_lane *)base;
    struct ofi_nic *nic = nic_of(lane);
    const uint8_t *address = blob + OFI_TOKEN_BYTES;
    uint64_t token;

    if (lane->down)
        return -ENOTCONN;
    if (!ofi_blob_split(lane->port, blob, length, &token)) {
        fab_fail_text("%s %s: the peer's address has %u bytes, %zu were expected", nic->kind->name,
                      nic->base.info.name, length, OFI_TOKEN_BYTES + lane->port->address_len);
        return -EINVAL;
    }
    if (token != lane->peer_token)
        ofi_lane_forget(lane); /* they were meant for another */
    if (!lane->pointed || memcmp(address, lane->peer_address, lane->port->address_len) != 0) {
        int rc = point_at(lane, address);
        if (rc)
            return rc;
    }
    lane->peer_token = token;
    lane->retry_at = 0;
    lane->retry_ns = 0;
    if (!nic->kind->lane_endpoints)
        attribute(nic, lane->peer_address);
    return 0;
}

/* ---- post ---- */

static ssize_t post_one(struct ofi_lane *lane, const struct fab_wr *wr, uint64_t flags)
{
    const struct ofi_kind *kind = nic_of(lane)->kind;
    const struct ofi_mr *mr = (const struct ofi_mr *)wr->mr;
    struct ofi_slot *slot = lane->free_writes;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)wr->src, .iov_len = wr->length};
    void *desc = mr ? mr->desc : NULL;
    struct fi_rma_iov remote = {.addr = wr->addr, .len = wr->length, .key = wr->rkey};
    struct fi_msg_rma msg = {
        .msg_iov = &iov,
        .desc = &desc,
        .iov_count = wr->length ? 1 : 0,
        .addr = lane->to,
        .rma_iov = &remote,
        .rma_iov_count = 1,
        .context = &slot->context,
        .data = wr->imm,
    };

    if (!wr->length && kind->source_needed) {
        iov.iov_base = lane->sends.memory;
        iov.iov_len = remote.len = kind->empty_bytes;
        desc = lane->sends.desc;
        msg.iov_count = 1;
    }
    if (kind->cq_data_size >= 8)
        msg.data |= lane->peer_token << 32;
    if (wr->flags & FAB_WR_IMM)
        flags |= FI_REMOTE_CQ_DATA;
    return fi_writemsg(lane->port->ep, &msg, flags | FI_COMPLETION);
}

/* What a chain of writes still has to prove. */
struct run {
    struct ofi_fifo held;
    uint32_t count;
    uint64_t bytes;
};

static bool proves(const struct run *run, const struct fab_wr *wr, bool last)
{
    return last || run->count + 1 >= OFI_PROOF_WRITES || run->bytes + wr->length >= OFI_PROOF_BYTES;
}

static void taken(struct ofi_lane *lane, const struct fab_wr *wr, bool held, struct run *run)
{
    struct ofi_slot *slot = lane->free_writes;

    lane->free_writes = slot->next;
    slot->wr_id = wr->wr_id;
    slot->bytes = wr->length;
    slot->run = held ? NULL : run->held.head;
    slot->held = held;
    slot->ended = false;
    slot->error = 0;
    lane->writes_out++;
    nic_of(lane)->writes_out++;
    lane->imms_sent += wr->flags & FAB_WR_IMM ? 1 : 0;
    lane->bytes_out += wr->length;
    if (held) {
        ofi_fifo_push(&run->held, slot);
        run->count++;
        run->bytes += wr->length;
    } else {
        memset(run, 0, sizeof(*run));
    }
}

/* Lanes share a send queue on efa: peers that take nothing must not fill it. Each may have twice as
 * many writes there as are left, so N that are stuck leave one part in 2 N + 1 (the "dynamic
 * threshold" of shared-memory switches, Choudhury and Hahne 1998). */
static int share_left(const struct ofi_lane *lane)
{
    const struct ofi_nic *nic = (const struct ofi_nic *)lane->base.nic;
    int out = (int)lane->writes_out;
    int left = (int)nic->info->tx_attr->size - OFI_FRAMES_ROOM - (int)nic->writes_out;

    if (nic->kind->lane_endpoints)
        return OFI_WINDOW;
    if (left <= 0 || out > 2 * left)
        return 0;
    int more = (2 * left - out) / 3;
    return more ? more : out == 0;
}

/* How many of n fit the window, the credit, and the bytes that may be under way (one always does). */
static int fitting(const struct ofi_lane *lane, const struct fab_wr *wrs, int n)
{
    uint64_t bytes = lane->bytes_out;
    uint32_t credit = ofi_credit_left(lane);
    int room = OFI_WINDOW - (int)lane->writes_out;
    int share = share_left(lane);
    int count = 0;

    if (room > share)
        room = share;

    while (count < n && count < room && bytes < OFI_BYTES_OUT) {
        if ((wrs[count].flags & FAB_WR_IMM) && credit-- == 0)
            break;
        bytes += wrs[count++].length;
    }
    return count;
}

/* A chain ended early. Whatever it still had to prove cannot be proven any more: a write posted
 * later may travel on another connection. */
static int cut_short(struct ofi_lane *lane, const struct run *run, int taken_count, int verdict,
                     ssize_t rc)
{
    char text[FAB_TEXT_MAX];

    if (verdict == 0 && !run->held.head)
        return taken_count;
    (void)snprintf(text, sizeof(text), "%s %.40s: libfabric refused a write: %.100s",
                   nic_of(lane)->kind->name, lane->base.nic->info.name,
                   nic_of(lane)->lib->strerror((int)-rc));
    ofi_lane_down(lane, verdict ? verdict : -ENOBUFS, text);
    return taken_count ? taken_count : verdict;
}

int ofi_post(struct fab_lane *base, const struct fab_wr *wrs, int n)
{
    struct ofi_lane *lane = (struct ofi_lane *)base;
    bool delivery = nic_of(lane)->kind->delivery;
    bool emulated = nic_of(lane)->emulated; /* by messages, which prove nothing and keep no order */
    /* On efa a chain that libfabric cuts short (-FI_EAGAIN) never gets its doorbell, so what it took
     * would never complete. */
    bool chains = nic_of(lane)->kind->lane_endpoints;
    struct run run = {.count = 0};

    if (lane->down)
        return -ENOTCONN;
    if (!lane->pointed || !lane->peer_token || ofi_lane_gated(lane))
        return 0;
    int count = fitting(lane, wrs, n);
    for (int i = 0; i < count; i++) {
        bool last = i + 1 == count;
        bool held = delivery && !proves(&run, &wrs[i], last);
        uint64_t flags = (last || !chains ? 0 : FI_MORE) |
                         ((delivery && !held) || emulated ? FI_DELIVERY_COMPLETE : 0);
        ssize_t rc = post_one(lane, &wrs[i], flags);
        int verdict = ofi_lane_verdict(lane, rc);
        if (verdict <= 0)
            return cut_short(lane, &run, i, verdict, rc);
        taken(lane, &wrs[i], held, &run);
    }
    return count;
}

/* ---- close ---- */

/* Gives the last frames (a BYE) a short time to be taken. A dead peer never takes them. */
static void linger(struct ofi_domain *domain, struct ofi_lane *lane)
{
    uint64_t end = ofi_now() + OFI_LINGER_NS;

    while ((lane->sends_out || lane->waiting.head) && ofi_now() < end && !ofi_domain_full(domain)) {
        if (ofi_lane_flush(lane))
            return;
        (void)ofi_domain_read(domain);
        ofi_handle_lane(domain, lane);
    }
}

/* A write that our own NIC refuses: its source is registered in the listener's domain. */
static ssize_t post_break(struct ofi_lane *lane)
{
    const struct ofi_nic *nic = nic_of(lane);
    struct iovec iov = {.iov_base = nic->replies.memory, .iov_len = OFI_FRAME_BYTES};
    void *desc = nic->replies.desc;
    struct fi_rma_iov remote = {.len = OFI_FRAME_BYTES};
    struct fi_msg_rma msg = {
        .msg_iov = &iov,
        .desc = &desc,
        .iov_count = 1,
        .addr = lane->to,
        .rma_iov = &remote,
        .rma_iov_count = 1,
        .context = &lane->breaks[lane->breaks_tried].context,
    };

    return fi_writemsg(lane->port->ep, &msg, FI_COMPLETION);
}

static bool has_broken(const struct ofi_lane *lane)
{
    return lane->breaks_tried == OFI_BREAKS && lane->breaks_out == 0;
}

static void try_to_break(struct ofi_lane *lane)
{
    uint32_t out = lane->writes_out + lane->sends_out + lane->breaks_out;
    ssize_t rc = lane->breaks_tried < OFI_BREAKS ? post_break(lane) : -FI_EAGAIN;

    if (rc == 0) {
        lane->breaks_tried++;
        lane->breaks_out++;
    } else if (rc != -FI_EAGAIN || !out) {
        lane->breaks_tried = OFI_BREAKS; /* there is no connection */
    }
    (void)ofi_domain_read(lane->domain);
    (void)ofi_handle_queued(lane->domain, OFI_BATCH);
}

/* Whether the lane can be closed (ofi.h says why not): its connection is broken, and all that came
 * on it is read. Where writes of ours are stuck at the NIC, because the peer takes none, the ones
 * that break it are stuck as well; then it is enough that the peer is quiet. */
static bool is_calm(struct ofi_lane *lane)
{
    uint64_t now = ofi_now();
    bool first = lane->quiet_since == 0;

    if (first && (lane->down || !lane->pointed || !lane->peer_token))
        return true; /* it broke by itself, or was never made */
    if (first || lane->domain->events != lane->quiet_events)
        lane->quiet_since = now;
    do
        try_to_break(lane);
    while (first && !has_broken(lane) && ofi_now() - now < OFI_LINGER_NS);
    lane->quiet_events = lane->domain->events;
    if (!has_broken(lane))
        return now - lane->quiet_since > OFI_QUIET_NS;
    while (ofi_domain_read(lane->domain) > 0)
        (void)ofi_handle_queued(lane->domain, OFI_BATCH);
    return true;
}

/* What libfabric did not hand back was in the endpoint that is closed now. */
static void cancel_writes(struct ofi_lane *lane)
{
    const struct fab_sink *sink = lane->base.nic->sink;
    bool idle[OFI_WINDOW] = {false};

    for (struct ofi_slot *slot = lane->free_writes; slot; slot = slot->next)
        idle[slot - lane->writes] = true;
    for (uint32_t i = 0; i < OFI_WINDOW && lane->writes_out; i++) {
        if (idle[i])
            continue;
        lane->writes_out--;
        nic_of(lane)->writes_out--;
        sink->completed(&lane->base, lane->writes[i].wr_id, -ECANCELED);
    }
}

void ofi_lanes_exhume(struct ofi_nic *nic, bool all)
{
    struct ofi_lane *lane;

    struct ofi_lane **link = &nic->graves;

    nic->last_grave = NULL;
    while ((lane = *link)) {
        bool old = lane->port == &lane->own
                       ? nic->grave_count > OFI_GRAVES || ofi_now() - lane->buried_at > OFI_GRAVE_NS
                       : !lane->sends_out;
        if (all || old) {
            ofi_handle_lane(lane->domain, lane); /* what names it and was read, but not handled */
            *link = lane->grave;
            nic->grave_count--;
            free_lane(nic, lane);
        } else {
            nic->last_grave = lane;
            link = &lane->grave;
        }
    }
}

/* Seen on libfabric 1.17: when the other side closes the connection at the same moment, the error
 * completion of a write can come after fi_close() of the endpoint and after a read that emptied
 * the queue. It names one of this lane's slots, so these outlive the lane for a while. */
static void bury(struct ofi_nic *nic, struct ofi_lane *lane)
{
    lane->buried = true;
    lane->buried_at = ofi_now();
    lane->grave = NULL;
    leave(nic, lane);
    if (nic->last_grave)
        nic->last_grave->grave = lane;
    else
        nic->graves = lane;
    nic->last_grave = lane;
    nic->grave_count++;
    ofi_lanes_exhume(nic, false);
}

/* The endpoint is shared: our own work requests must end by themselves. The peer's keys are gone, so
 * what it raised is in the queue by now, and is taken out before its address may mean another lane.
 * Of an emulated write libfabric asks the key only once, before it takes the first bytes. */
static int close_shared(struct ofi_nic *nic, struct ofi_lane *lane)
{
    drain(nic->data, lane);
    ofi_lanes_exhume(nic, false);
    bool crowded = nic->grave_count >= OFI_GHOSTS && lane->peer_token;
    if (lane->writes_out || (lane->sends_out && crowded))
        return -EINPROGRESS;
    bool was_peer = lane->peer_token;
    unpoint(lane);
    if (lane->sends_out)
        bury(nic, lane); /* frames to a peer that takes none: all they touch is the lane's own */
    else
        free_lane(nic, lane);
    return nic->emulated && was_peer ? -ENOTSUP : 0;
}

int ofi_lane_close(struct fab_lane *base)
{
    struct ofi_lane *lane = (struct ofi_lane *)base;
    struct ofi_nic *nic = nic_of(lane);

    if (!lane->closing && lane->port == &lane->own) {
        lane->closing = true;
        linger(lane->domain, lane);
    }
    lane->closing = true;
    ofi_lane_forget(lane);
    if (lane->port != &lane->own)
        return close_shared(nic, lane);
    if (nic->kind->breaks_first && !is_calm(lane))
        return -EINPROGRESS;
    if (ofi_port_shut(&lane->own))
        return -EINPROGRESS;
    drain(lane->domain, lane);
    cancel_writes(lane);
    if (lane->domain->lane)
        free_lane(nic, lane); /* nothing comes late on a queue that is closed */
    else
        bury(nic, lane);
    return 0;
}
