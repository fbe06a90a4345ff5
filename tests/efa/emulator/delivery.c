/* What arrives. Each packet is given a time from the seeded generator, up to the reorder window away,
 * and is handled at that time: so segments of one message, and messages, overtake each other. */
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

enum { STILL_HERE = 255 }; /* status of an acknowledgement that says: wait */
#define WAIT_TRIES 100u /* tries for a receive between two of those */

static struct packet *spare;
static struct packet *waiting[PACKETS_MAX]; /* a heap by time */
static uint32_t waiting_count, packet_count;
static uint64_t last_serial, highest;

/* ---- packets ---- */

struct packet *efa_packet_get(void)
{
    struct packet *p = spare;

    if (p) {
        spare = p->next;
        return p;
    }
    if (packet_count == PACKETS_MAX)
        return NULL;
    packet_count++;
    return malloc(sizeof *p);
}

void efa_packet_put(struct packet *p)
{
    p->next = spare;
    spare = p;
}

static bool before(const struct packet *one, const struct packet *other)
{
    return one->due != other->due ? one->due < other->due : one->serial < other->serial;
}

static void swap(uint32_t i, uint32_t k)
{
    struct packet *p = waiting[i];

    waiting[i] = waiting[k];
    waiting[k] = p;
}

static void push(struct packet *p)
{
    uint32_t i = waiting_count++;

    waiting[i] = p;
    for (; i && before(waiting[i], waiting[(i - 1) / 2]); i = (i - 1) / 2)
        swap(i, (i - 1) / 2);
}

static struct packet *pop(void)
{
    struct packet *p = waiting[0];
    uint32_t i = 0;

    waiting[0] = waiting[--waiting_count];
    for (;;) {
        uint32_t least = i;
        for (uint32_t k = 2 * i + 1; k <= 2 * i + 2 && k < waiting_count; k++)
            if (before(waiting[k], waiting[least]))
                least = k;
        if (least == i)
            return p;
        swap(i, least);
        i = least;
    }
}

void efa_arrived(struct packet *p)
{
    uint64_t window = efa_control->reorder_ns;

    p->serial = ++last_serial;
    p->tries = 0;
    p->due = efa_now() + efa_control->delay_ns + (window ? efa_random() % window : 0);
    push(p);
}

/* ---- what a packet does ---- */

static void answer(const struct packet *p, uint32_t status)
{
    if (!(p->head.flags & IS_DATAGRAM))
        (void)efa_reply(p->qp, &p->head, P_ACK, status, 0);
}

static struct completion completion_of(const struct packet *p, enum ibv_wc_opcode opcode)
{
    bool imm = p->head.flags & HAS_IMM;

    return (struct completion){.opcode = opcode,
                               .imm = p->head.imm,
                               .flags = imm ? IBV_WC_WITH_IMM : 0,
                               .qpn = p->qp->ib.qp_base.qp_num,
                               .src_qpn = p->head.src_qpn,
                               .handle = efa_handle_of(&p->head.from),
                               .gid = p->head.from};
}

/* Nothing was posted to receive it. True: it waits for that. */
static bool waits(struct packet *p)
{
    efa_count(C_RNR, 1);
    p->tries++;
    if (p->head.rnr_retry != RNR_FOREVER && p->tries > p->head.rnr_retry) {
        answer(p, DONE_RNR);
        return false;
    }
    if (p->tries % WAIT_TRIES == 0)
        answer(p, STILL_HERE);
    p->due = efa_now() + RNR_NS;
    return true;
}

/* True: the packet waits. So also the next two. */
static bool on_send(struct packet *p)
{
    struct qp *qp = p->qp;
    bool datagram = p->head.flags & IS_DATAGRAM;
    static const uint8_t no_header[GRH_BYTES];

    if (p->head.qkey != qp->qkey) {
        answer(p, DONE_BAD_QPN);
        return false;
    }
    if (!efa_has_receive(qp))
        return !datagram && waits(p);
    struct receive *r = efa_take_receive(qp);
    struct completion c = completion_of(p, IBV_WC_RECV);
    uint32_t into = datagram ? GRH_BYTES : 0;
    bool fits = efa_scatter(r->sges, r->count, 0, no_header, into) &&
                efa_scatter(r->sges, r->count, into, p->bytes, p->head.length);
    c.wr_id = r->wr_id;
    c.bytes = p->head.length + into;
    c.flags |= datagram ? IBV_WC_GRH : 0;
    c.status = fits ? DONE_OK : DONE_BAD_LENGTH;
    efa_complete(qp->recv_cq, &c);
    answer(p, fits ? DONE_OK : DONE_BAD_LENGTH);
    return false;
}

static struct arrival **find_arrival(struct qp *qp, const struct head *h)
{
    struct arrival **link = &qp->arrivals;

    while (*link && ((*link)->head.message != h->message || (*link)->head.src_qpn != h->src_qpn ||
                     memcmp(&(*link)->head.from, &h->from, sizeof h->from) != 0))
        link = &(*link)->next;
    return link;
}

static void raise_imm(struct packet *p, struct arrival *a)
{
    struct completion c = completion_of(p, IBV_WC_RECV_RDMA_WITH_IMM);

    c.bytes = (uint32_t)p->head.total;
    c.unsolicited = p->qp->unsolicited;
    if (!c.unsolicited)
        c.wr_id = efa_take_receive(p->qp)->wr_id;
    efa_count(c.unsolicited ? C_IMMS_UNSOLICITED : C_IMMS_SOLICITED, 1);
    efa_complete(p->qp->recv_cq, &c);
    a->raised = true;
}

static void place(struct packet *p, struct arrival *a)
{
    const struct head *h = &p->head;

    efa_count(C_SEGMENTS, 1);
    if (a->status || (h->flags & NOT_TO_BE_EXECUTED))
        return;
    uint8_t *to = efa_translate(h->rkey, h->addr + h->offset, h->length, IBV_ACCESS_REMOTE_WRITE);
    if (to)
        memcpy(to, p->bytes, h->length);
    else
        a->status = DONE_BAD_ADDRESS;
    if (!to)
        efa_count(C_BAD_KEYS, 1);
}

static uint32_t admit(const struct packet *p)
{
    if (p->head.qkey != p->qp->qkey)
        return DONE_BAD_QPN;
    return efa_handle_of(&p->head.from) == UNKNOWN_HANDLE ? DONE_UNKNOWN_PEER : DONE_OK;
}

static void end_write(struct packet *p, struct arrival **link)
{
    struct arrival *a = *link;
    uint8_t flags = p->head.flags;
    uint32_t status = a->status;

    if (flags & (NOT_TO_BE_EXECUTED | ACK_IS_LOST)) {
        efa_count(C_INJECTED, 1);
        status = DONE_ABORT;
    }
    *link = a->next;
    for (struct arrival *other = p->qp->arrivals; other; other = other->next)
        if (other->serial < a->serial) {
            efa_count(C_MESSAGES_OVERTAKEN, 1);
            break;
        }
    free(a);
    answer(p, status);
}

static bool on_write(struct packet *p)
{
    struct arrival **link = find_arrival(p->qp, &p->head), *a = *link;
    uint64_t got = (a ? a->got : 0) + p->head.length;
    bool imm = (p->head.flags & HAS_IMM) && !(p->head.flags & NOT_TO_BE_EXECUTED);
    bool early = efa_control->faults & FAULT_EARLY_IMM;

    if (imm && (got == p->head.total || early) && !p->qp->unsolicited && !efa_has_receive(p->qp))
        return waits(p);
    if (!a) {
        a = calloc(1, sizeof *a);
        if (!a)
            abort();
        a->head = p->head;
        a->serial = p->serial;
        a->status = admit(p);
        *link = a;
    }
    place(p, a);
    a->got = got;
    if (imm && !a->raised && !a->status && (got == p->head.total || early))
        raise_imm(p, a);
    if (got == p->head.total)
        end_write(p, link);
    return false;
}

static void on_read(struct packet *p)
{
    const struct head *h = &p->head;
    bool good = efa_translate(h->rkey, h->addr, h->total, IBV_ACCESS_REMOTE_READ);

    if (good && !admit(p)) {
        (void)efa_reply(p->qp, h, P_DATA, DONE_OK, h->total);
        return;
    }
    efa_count(C_BAD_KEYS, 1);
    answer(p, DONE_BAD_ADDRESS);
}

static void on_data(struct packet *p)
{
    struct work *w = efa_find_work(p->qp, p->head.message);

    if (!w)
        return;
    w->since = efa_now();
    if (!efa_scatter(w->sges, w->count, p->head.offset, p->bytes, p->head.length)) {
        efa_finish(w, DONE_BAD_LKEY);
        return;
    }
    w->received += p->head.length;
    if (w->received == w->head.total)
        efa_finish(w, DONE_OK);
}

static void on_ack(struct packet *p)
{
    struct work *w = efa_find_work(p->qp, p->head.message);

    if (w && p->head.status == STILL_HERE)
        w->since = efa_now();
    else if (w)
        efa_finish(w, p->head.status);
}

static bool handle(struct packet *p)
{
    switch (p->head.type) {
    case P_SEND:
        return on_send(p);
    case P_WRITE:
        return on_write(p);
    case P_READ:
        on_read(p);
        return false;
    case P_DATA:
        on_data(p);
        return false;
    case P_ACK:
        on_ack(p);
        return false;
    default:
        return false;
    }
}

uint64_t efa_deliver(void)
{
    uint64_t now = efa_now();

    while (waiting_count && waiting[0]->due <= now) {
        struct packet *p = pop();
        if (p->qp && p->serial < highest)
            efa_count(C_OVERTAKEN, 1);
        else
            highest = p->serial;
        if (p->qp && handle(p))
            push(p);
        else
            efa_packet_put(p);
    }
    return waiting_count ? waiting[0]->due : 0;
}

/* Packets that wait for it are put away when their time comes. */
void efa_forget_arrivals(struct qp *qp)
{
    for (uint32_t i = 0; i < waiting_count; i++)
        if (waiting[i]->qp == qp)
            waiting[i]->qp = NULL;
    while (qp->arrivals) {
        struct arrival *a = qp->arrivals;
        qp->arrivals = a->next;
        free(a);
    }
}
