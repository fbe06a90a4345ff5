/* What a completion means, and what the device tells of itself. */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "providers/verbs.h"

/* Immediates of one lane in a row, reported together. */
struct run {
    struct verbs_lane *lane;
    uint32_t imm, times;
};

static void flush_run(struct run *run)
{
    if (run->times)
        run->lane->base.nic->sink->imm(&run->lane->base, run->imm, run->times);
    run->times = 0;
}

static int errno_of(enum ibv_wc_status status)
{
    switch (status) {
    case IBV_WC_SUCCESS:
        return 0;
    case IBV_WC_WR_FLUSH_ERR:
        return -ECANCELED;
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
        return -EFAULT;
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
        return -EINVAL;
    case IBV_WC_REM_ACCESS_ERR:
        return -EACCES;
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
    case IBV_WC_RESP_TIMEOUT_ERR:
        return -ETIMEDOUT;
    default:
        return -EIO;
    }
}

static void lane_broke(struct verbs_lane *lane, enum ibv_wc_status status, const char *what)
{
    char text[FAB_TEXT_MAX];

    if (status == IBV_WC_WR_FLUSH_ERR && lane->down)
        return;
    (void)snprintf(text, sizeof(text), "verbs %.60s: %s: %s", lane->base.nic->info.name, what,
                   verbs_nic_of(lane)->lib->wc_status_str(status));
    verbs_lane_down(lane, errno_of(status), text);
}

/* Whether such a completion says that all work requests before it succeeded. RC completes in order,
 * and of an unsignalled one only a failure is told. So a success proves it, and the first failure
 * that came as the peer's answer, or as the lack of one to the oldest request. A flush says nothing
 * of those before it; nor does a local error, which strikes where requests are sent, not where they
 * are acknowledged (rdma_rxe reports one as soon as a link is down). */
static bool proves(const struct verbs_lane *lane, enum ibv_wc_status status)
{
    switch (status) {
    case IBV_WC_SUCCESS:
        return true;
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_OP_ERR:
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
        return !lane->down;
    default:
        return false;
    }
}

static void write_ended(struct verbs_lane *lane, uint32_t sequence, enum ibv_wc_status status)
{
    const struct fab_sink *sink = lane->base.nic->sink;
    int before = proves(lane, status) ? 0 : -ECANCELED;

    if (sequence - lane->tail >= lane->head - lane->tail)
        return; /* not under way */
    while (lane->tail != sequence)
        sink->completed(&lane->base, lane->ring[lane->tail++ % VERBS_WINDOW], before);
    sink->completed(&lane->base, lane->ring[lane->tail++ % VERBS_WINDOW], errno_of(status));
    if (status)
        lane_broke(lane, status, "a write failed");
}

static struct verbs_lane *lane_of_wr(const struct verbs_nic *nic, const struct ibv_wc *wc)
{
    uint64_t index = wc->wr_id >> 40;
    struct verbs_lane *lane = index < nic->lane_slots ? nic->lanes[index] : NULL;

    if (!lane || (lane->write_qpn != wc->qp_num && lane->frame_qpn != wc->qp_num))
        return NULL;
    return lane;
}

static void imm_came(struct verbs_nic *nic, const struct ibv_wc *wc, struct run *run)
{
    struct verbs_lane *lane = verbs_lane_of_qpn(nic, wc->qp_num);

    nic->imms.missing++;
    if (wc->status && lane)
        lane_broke(lane, wc->status, "receiving an immediate failed");
    if (wc->status || wc->opcode != IBV_WC_RECV_RDMA_WITH_IMM || !lane)
        return;
    uint32_t imm = be32toh(wc->imm_data);
    if (run->times && (run->lane != lane || run->imm != imm))
        flush_run(run);
    *run = (struct run){.lane = lane, .imm = imm, .times = run->times + 1};
}

static void frame_came(struct verbs_nic *nic, const struct ibv_wc *wc)
{
    uint32_t buffer = (uint32_t)(wc->wr_id >> 8);
    struct verbs_lane *lane = verbs_lane_of_qpn(nic, wc->qp_num);

    if (wc->status && lane)
        lane_broke(lane, wc->status, "receiving a frame failed");
    else if (lane && wc->opcode == IBV_WC_RECV && wc->byte_len <= FAB_FRAME_MAX)
        nic->base.sink->frame(&lane->base, verbs_frame_buffer(nic, buffer), wc->byte_len, -1);
    (void)verbs_frame_recv(nic, buffer); /* fails only where the device is gone */
}

static void handle(struct verbs_nic *nic, const struct ibv_wc *wc, struct run *run)
{
    struct verbs_lane *lane;

    if ((wc->wr_id & 0xff) == VERBS_IMM) {
        imm_came(nic, wc, run);
        return;
    }
    flush_run(run);
    switch (wc->wr_id & 0xff) {
    case VERBS_WRITE:
        lane = lane_of_wr(nic, wc);
        if (lane)
            write_ended(lane, (uint32_t)(wc->wr_id >> 8), wc->status);
        break;
    case VERBS_SEND:
        lane = lane_of_wr(nic, wc);
        if (!lane)
            break;
        if (wc->status)
            lane_broke(lane, wc->status, "a frame failed");
        verbs_frame_sent(lane, (uint32_t)(wc->wr_id >> 8) & 0xff, wc->status);
        break;
    case VERBS_FRAME:
        frame_came(nic, wc);
        break;
    case VERBS_UD_RECV:
        nic->ud_recvs_out--;
        nic->ud_broken |= wc->status != IBV_WC_SUCCESS;
        if (wc->status)
            break; /* verbs_ud_repair() posts them all again */
        verbs_contact_received(nic, (uint32_t)(wc->wr_id >> 8), wc->byte_len);
        (void)verbs_ud_recv(nic, (uint32_t)(wc->wr_id >> 8));
        break;
    case VERBS_UD_SEND:
        verbs_contact_sent(nic, (uint32_t)(wc->wr_id >> 8), wc->status);
        break;
    default:
        break;
    }
}

int verbs_events(struct verbs_nic *nic, int budget)
{
    struct ibv_wc batch[VERBS_BATCH];
    struct run run = {.times = 0};
    int done = 0, n = 1;

    while (done < budget && verbs_cq_next(nic, &batch[0])) {
        handle(nic, &batch[0], &run);
        done++;
    }
    while (done < budget && n > 0 && !nic->queued) {
        n = ibv_poll_cq(nic->cq, VERBS_BATCH, batch);
        for (int i = 0; i < n; i++)
            handle(nic, &batch[i], &run);
        done += n > 0 ? n : 0;
    }
    flush_run(&run);
    if (nic->imms.missing)
        verbs_imms_refill(nic);
    return done;
}

void verbs_events_of(struct verbs_nic *nic, struct verbs_lane *lane)
{
    struct run run = {.times = 0};
    struct ibv_wc wc;

    for (uint32_t i = nic->queued; i > 0 && verbs_cq_next(nic, &wc); i--) {
        if (wc.qp_num == lane->write_qpn || wc.qp_num == lane->frame_qpn)
            handle(nic, &wc, &run);
        else
            nic->queue[(nic->queue_head + nic->queued++) % nic->cq_depth] = wc;
    }
    flush_run(&run);
    if (nic->imms.missing)
        verbs_imms_refill(nic);
}

/* ---- asynchronous events ---- */

static void port_changed(struct verbs_nic *nic, const char *text)
{
    bool was_up = nic->base.info.up;

    if (verbs_port_read(nic) || nic->fatal)
        nic->base.info.up = 0;
    if (nic->base.sink->nic_state && was_up != (bool)nic->base.info.up)
        nic->base.sink->nic_state(&nic->base, text);
}

static void lane_event(struct verbs_nic *nic, const struct ibv_qp *qp, enum ibv_event_type type)
{
    struct verbs_lane *lane = verbs_lane_of_qpn(nic, qp->qp_num);
    char text[FAB_TEXT_MAX];

    if (!lane)
        return;
    (void)snprintf(text, sizeof(text), "verbs %.60s: %s", nic->base.info.name,
                   nic->lib->event_type_str(type));
    verbs_lane_down(lane, -EIO, text);
}

static void last_wqe(struct verbs_nic *nic, const struct ibv_qp *qp)
{
    struct verbs_lane *lane = verbs_lane_of_qpn(nic, qp->qp_num);

    if (lane)
        lane->last_wqes++;
}

static void on_async(struct verbs_nic *nic, const struct ibv_async_event *event)
{
    switch (event->event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
        lane_event(nic, event->element.qp, event->event_type);
        break;
    case IBV_EVENT_QP_LAST_WQE_REACHED:
        last_wqe(nic, event->element.qp);
        break;
    case IBV_EVENT_CQ_ERR: /* cannot happen while places are accounted for */
    case IBV_EVENT_SRQ_ERR:
    case IBV_EVENT_DEVICE_FATAL:
        nic->fatal = true;
        port_changed(nic, nic->lib->event_type_str(event->event_type));
        break;
    case IBV_EVENT_PORT_ACTIVE:
    case IBV_EVENT_PORT_ERR:
        if (event->element.port_num == nic->port)
            port_changed(nic, nic->lib->event_type_str(event->event_type));
        break;
    default:
        break;
    }
}

void verbs_async(struct verbs_nic *nic)
{
    struct pollfd fd = {.fd = nic->context->async_fd, .events = POLLIN};
    struct ibv_async_event event;

    nic->look_async = false;
    while (poll(&fd, 1, 0) == 1 && nic->lib->get_async_event(nic->context, &event) == 0) {
        on_async(nic, &event);
        nic->lib->ack_async_event(&event);
    }
}
