/* Life and death of a lane, its packets, its bell.
 *
 * Contract
 * - A lane fails once (fab_local_fail); the core hears of it from poll(), after the immediates
 *   and the frames that the peer had sent before. A failed lane takes no work and makes no
 *   copies.
 * - Closing revokes both permits at once: the peer's to write here, and the peer's to read our
 *   sources for copies that we asked for. It is done when nobody is inside, or the peer's process
 *   is dead; until then it returns -EINPROGRESS and touches nothing.
 * - What lane_send() took is in the kernel, so a BYE arrives although the lane is closed next.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <unistd.h>

#include "local.h"

void fab_local_fail(struct local_lane *lane, int error, const char *format, ...)
{
    if (lane->fault)
        return;
    lane->fault = error;
    va_list args;
    va_start(args, format);
    vsnprintf(lane->why, sizeof lane->why, format, args);
    va_end(args);
    fab_local_lane_pend(lane);
}

void fab_local_lane_pend(struct local_lane *lane)
{
    fab_local_nic(lane)->pending[lane->bit / 64] |= UINT64_C(1) << (lane->bit % 64);
}

/* ---- birth ---- */

static int free_bit(const struct local_nic *nic)
{
    for (int i = 0; i < LOCAL_LANES; i++)
        if (!nic->lanes[i])
            return i;
    return -1;
}

static void release(struct local_lane *lane);

/* Most of a lane is its queue of work, which an idle one never touches: from the kernel, page by page, it costs
 * three pages instead of thirteen. (calloc() writes zeros over memory that it has used before.) */
static struct local_lane *map_lane(void)
{
    void *at = mmap(NULL, sizeof(struct local_lane), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void unmap_lane(struct local_lane *lane)
{
    munmap(lane, sizeof *lane);
}

static int new_lane(struct local_nic *nic, struct local_lane **out)
{
    int bit = free_bit(nic);
    if (bit < 0) {
        fab_fail_text("all %d lanes of %s are in use", LOCAL_LANES, nic->base.info.name);
        return -ENOSPC;
    }
    struct local_lane *lane = map_lane();
    if (!lane)
        return -ENOMEM;
    lane->base.nic = &nic->base;
    lane->base.window = LOCAL_WORK;
    /* Either side may be told the NIC's name again; an open connection stays as it is. */
    memcpy(lane->base.blob, nic->base.info.blob, LOCAL_NAME_BYTES);
    lane->base.blob_len = LOCAL_NAME_BYTES;
    lane->bit = (uint32_t)bit;
    lane->end = (struct local_end){.sock = -1, .pidfd = -1};
    lane->in_fd = lane->staging_fd = -1;
    if (getrandom(&lane->nonce, sizeof lane->nonce, 0) != (ssize_t)sizeof lane->nonce) {
        unmap_lane(lane);
        return -EIO;
    }
    void *map;
    int rc = fab_local_share("llm-fabric inbox", sizeof *lane->in, &map, &lane->in_fd);
    if (rc) {
        unmap_lane(lane);
        return rc;
    }
    lane->in = map;
    atomic_store(&lane->in->sleeping, nic->armed);
    nic->lanes[bit] = lane;
    nic->words = nic->words > lane->bit / 64 ? nic->words : lane->bit / 64 + 1;
    *out = lane;
    return 0;
}

/* The connection stands: hands out our inbox. */
static int send_setup(struct local_lane *lane)
{
    struct local_note note = {.magic = LOCAL_NOTE_MAGIC,
                              .version = LOCAL_VERSION,
                              .type = LOCAL_SETUP,
                              .number = lane->bit,
                              .serial = sizeof *lane->in,
                              .address = (uint64_t)(uintptr_t)&lane->nonce,
                              .nonce = lane->nonce};
    const int fds[] = {lane->in_fd, fab_local_nic(lane)->bell_fd};
    int rc = fab_local_send(lane->end.sock, &note, sizeof note, fds, 2);
    if (rc) {
        fab_fail_text("sending our side of the shared memory: errno %d", -rc);
        return rc;
    }
    close(lane->in_fd);
    lane->in_fd = -1;
    return 0;
}

static bool can_read(const struct local_lane *lane, const struct local_note *setup)
{
    uint64_t seen = ~setup->nonce;
    struct iovec here = {&seen, sizeof seen};
    struct iovec there = {(void *)(uintptr_t)setup->address, sizeof seen};
    return lane->end.pid > 0 &&
           process_vm_readv(lane->end.pid, &here, 1, &there, 1, 0) == (ssize_t)sizeof seen &&
           seen == setup->nonce;
}

/* The peer's SETUP: maps its inbox and bell, and says whether we can read its memory. */
static int take_setup(struct local_lane *lane, const struct local_note *note, int inbox_fd,
                      int bell_fd)
{
    if (lane->out || note->number >= LOCAL_LANES || note->serial != sizeof *lane->out)
        return -EPROTO;
    void *inbox, *bell;
    int rc = fab_local_map(inbox_fd, sizeof *lane->out, PROT_READ | PROT_WRITE, &inbox);
    if (rc)
        return rc;
    rc = fab_local_map(bell_fd, sizeof *lane->bell, PROT_READ | PROT_WRITE, &bell);
    if (rc) {
        fab_local_unmap(inbox, sizeof *lane->out);
        return rc;
    }
    lane->out = inbox;
    lane->bell = bell;
    lane->out_bit = note->number;
    return 0;
}

static int send_reads(struct local_lane *lane, const struct local_note *setup)
{
    struct local_note note = {.magic = LOCAL_NOTE_MAGIC,
                              .version = LOCAL_VERSION,
                              .type = LOCAL_READS,
                              .number = can_read(lane, setup)};
    return fab_local_lane_packet(lane, &note, sizeof note, NULL, 0);
}

static int adopt(struct local_lane *lane, struct fab_origin *origin)
{
    struct local_nic *nic = fab_local_nic(lane);
    lane->end = origin->end;
    int rc = take_setup(lane, &origin->setup, origin->inbox_fd, origin->bell_fd);
    if (!rc)
        rc = send_setup(lane);
    if (!rc)
        rc = send_reads(lane, &origin->setup);
    if (rc) {
        lane->end.sock = lane->end.pidfd = -1; /* still the origin's */
        return rc;
    }
    fab_local_watch(nic, EPOLL_CTL_MOD, lane->end.sock, EPOLLIN, LOCAL_E_SOCKET, lane->bit);
    fab_local_watch(nic, EPOLL_CTL_ADD, lane->end.pidfd, EPOLLIN, LOCAL_E_PIDFD, lane->bit);
    return 0;
}

int fab_local_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out)
{
    struct local_nic *nic = (struct local_nic *)base;
    struct local_lane *lane;
    if (origin && (origin->state == LOCAL_O_FREE || !origin->set_up))
        return -ENOTCONN;
    int rc = new_lane(nic, &lane);
    if (!rc && origin) {
        rc = adopt(lane, origin);
        if (rc)
            release(lane); /* the origin is still one, and can be told */
        else
            fab_local_origin_take(nic, origin);
    }
    if (!rc)
        *out = &lane->base;
    return rc;
}

int fab_local_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length)
{
    struct local_lane *lane = (struct local_lane *)base;
    struct local_nic *nic = fab_local_nic(lane);
    if (length != LOCAL_NAME_BYTES) {
        fab_fail_text("the address of a same-host NIC has %d bytes, not %u", LOCAL_NAME_BYTES,
                      length);
        return -EINVAL;
    }
    if (lane->end.sock >= 0)
        return 0;
    int rc = fab_local_dial(blob, &lane->end);
    if (rc)
        return rc;
    rc = send_setup(lane);
    if (rc) {
        fab_local_end_close(&lane->end);
        return rc;
    }
    fab_local_watch(nic, EPOLL_CTL_ADD, lane->end.sock, EPOLLIN, LOCAL_E_SOCKET, lane->bit);
    fab_local_watch(nic, EPOLL_CTL_ADD, lane->end.pidfd, EPOLLIN, LOCAL_E_PIDFD, lane->bit);
    return 0;
}

/* ---- packets ---- */

/* The socket is full: epoll tells when it is not. */
static void await_room(struct local_lane *lane, bool wanted)
{
    if (lane->armed_out == wanted)
        return;
    lane->armed_out = wanted;
    fab_local_watch(fab_local_nic(lane), EPOLL_CTL_MOD, lane->end.sock,
                    wanted ? EPOLLIN | EPOLLOUT : EPOLLIN, LOCAL_E_SOCKET, lane->bit);
}

static void ring(struct local_lane *lane)
{
    _Atomic uint64_t *word = &lane->bell->bits[lane->out_bit / 64];
    uint64_t bit = UINT64_C(1) << (lane->out_bit % 64);
    /* What we put comes before our look at the bit: if it is still set, the peer looks later. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!(atomic_load_explicit(word, memory_order_relaxed) & bit))
        atomic_fetch_or(word, bit);
}

int fab_local_lane_packet(struct local_lane *lane, const void *bytes, size_t length, const int *fds,
                          uint32_t fd_count)
{
    int rc = fab_local_send(lane->end.sock, bytes, length, fds, fd_count);
    if (rc == -EAGAIN)
        await_room(lane, true);
    if (rc == 0 && lane->out) { /* a sleeper is woken by the socket itself */
        atomic_store_explicit(&lane->out->mail, ++lane->mail_sent, memory_order_release);
        ring(lane);
    }
    return rc;
}

int fab_local_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                        const struct fab_mr *attach)
{
    struct local_lane *lane = (struct local_lane *)base;
    if (lane->end.sock < 0 || lane->closing)
        return -ENOTCONN;
    if (lane->fault)
        return lane->fault;
    if (length == 0 || length > FAB_FRAME_MAX)
        return -EMSGSIZE;
    bool with_fd = attach && attach->memfd >= 0;
    int rc = fab_local_lane_packet(lane, bytes, length, with_fd ? &attach->memfd : NULL, with_fd);
    if (rc && rc != -EAGAIN)
        fab_local_fail(lane, rc, "sending to process %d: %s", (int)lane->end.pid, strerror(-rc));
    return rc;
}

static int take_note(struct local_lane *lane, const struct local_note *note,
                     struct local_packet *packet)
{
    switch (note->type) {
    case LOCAL_SETUP: {
        if (packet->fd_count != 2)
            return -EPROTO;
        int rc = take_setup(lane, note, packet->fds[0], packet->fds[1]);
        return rc ? rc : send_reads(lane, note);
    }
    case LOCAL_READS:
        if (!lane->out)
            return -EPROTO;
        lane->peer_reads = note->number == 1;
        lane->ready = true;
        return 0;
    case LOCAL_MAP:
    case LOCAL_UNMAP:
        fab_local_map_note(lane, note, packet);
        return 0;
    case LOCAL_WAKE:
        return 0;
    default:
        return -EPROTO;
    }
}

static void take_frame(struct local_lane *lane, struct local_packet *packet)
{
    int fd = packet->fd_count ? packet->fds[0] : -1;
    if (packet->fd_count)
        packet->fds[0] = -1; /* the core's now */
    fab_local_nic(lane)->base.sink->frame(&lane->base, packet->bytes, packet->length, fd);
}

/* Reads one packet. 1: did; 0: there is none; else the lane has failed. */
static int read_packet(struct local_lane *lane)
{
    struct local_packet *packet = &fab_local_nic(lane)->packet;
    struct local_note note;
    int rc = fab_local_receive(lane->end.sock, packet);
    if (rc == -ECONNRESET) {
        /* Linux reports a reset once before what is still in the queue; an end it repeats. */
        rc = fab_local_receive(lane->end.sock, packet);
    }
    if (rc < 0)
        fab_local_fail(lane, rc, "process %d closed the connection: %s", (int)lane->end.pid,
                       strerror(-rc));
    if (rc <= 0)
        return rc;
    if (fab_local_is_note(packet, &note)) {
        int bad = take_note(lane, &note, packet);
        if (bad)
            fab_local_fail(lane, bad, "process %d sent a packet of type %u that is no good: %s",
                           (int)lane->end.pid, note.type, strerror(-bad));
    } else {
        take_frame(lane, packet);
    }
    fab_local_packet_drop(packet);
    return 1;
}

int fab_local_lane_packets(struct local_lane *lane)
{
    if (lane->end.sock < 0 || lane->down || lane->closing)
        return 0;
    lane->mail_seen = atomic_load_explicit(&lane->in->mail, memory_order_acquire);
    int n = 0;
    while (n < LOCAL_PACKETS && read_packet(lane) > 0)
        n++;
    if (n == LOCAL_PACKETS) { /* there may be more: look again */
        lane->mail_seen--;
        fab_local_lane_pend(lane);
    }
    lane->last_packets += lane->fault ? (uint32_t)n : 0;
    return n;
}

int fab_local_lane_event(struct local_lane *lane, uint32_t events)
{
    if (events & EPOLLOUT) { /* whoever waited for room tries again */
        await_room(lane, false);
        fab_local_lane_pend(lane);
    }
    return fab_local_lane_packets(lane) + 1;
}

/* ---- bell ---- */

static void put_raised(struct local_lane *lane)
{
    if (!lane->raised_times)
        return;
    fab_local_imm_put(lane->out, lane->imm_tail++, lane->raised, lane->raised_times);
    lane->raised_times = 0;
    lane->to_ring = true;
}

void fab_local_lane_flush(struct local_lane *lane)
{
    put_raised(lane);
    if (!lane->to_ring)
        return;
    lane->to_ring = false;
    ring(lane);
    /* ring() has fenced: either we see that the peer sleeps, or it sees what we put. */
    if (!atomic_load_explicit(&lane->out->sleeping, memory_order_relaxed) ||
        !atomic_exchange(&lane->out->sleeping, 0))
        return;
    struct local_note note = {
        .magic = LOCAL_NOTE_MAGIC, .version = LOCAL_VERSION, .type = LOCAL_WAKE};
    /* Where the socket is full, what fills it wakes the peer. */
    fab_local_send(lane->end.sock, &note, sizeof note, NULL, 0);
}

/* ---- turns ---- */

static int take_imms(struct local_lane *lane, int budget)
{
    const struct fab_sink *sink = lane->base.nic->sink;
    int n = 0;
    for (uint32_t imm, times; n < budget; n++) {
        times = fab_local_imm_peek(lane->in, lane->imm_head, &imm);
        if (!times)
            break;
        fab_local_imm_empty(lane->in, lane->imm_head++);
        sink->imm(&lane->base, imm, times);
    }
    if (!n)
        return 0;
    if (n == budget)
        fab_local_lane_pend(lane);
    /* Orders the emptied slots before the look; the peer fences between the two as well. */
    atomic_thread_fence(memory_order_seq_cst);
    if (lane->out && atomic_load_explicit(&lane->in->hungry, memory_order_relaxed)) {
        atomic_store_explicit(&lane->in->hungry, 0, memory_order_relaxed);
        lane->to_ring = true;
    }
    return n;
}

/* All that came before is read, as far as we are willing: tells the core. */
static int go_down(struct local_lane *lane)
{
    struct local_nic *nic = fab_local_nic(lane);
    uint32_t imm;
    if (fab_local_imm_peek(lane->in, lane->imm_head, &imm) ||
        (lane->last_packets < LOCAL_LAST_PACKETS &&
         fab_local_lane_packets(lane) == LOCAL_PACKETS)) {
        fab_local_lane_pend(lane);
        return 1;
    }
    lane->down = true;
    if (lane->end.sock >= 0) {
        fab_local_watch(nic, EPOLL_CTL_DEL, lane->end.sock, 0, LOCAL_E_SOCKET, 0);
        fab_local_watch(nic, EPOLL_CTL_DEL, lane->end.pidfd, 0, LOCAL_E_PIDFD, 0);
        if (fab_local_dead(&lane->end))
            snprintf(lane->why, sizeof lane->why, "process %d has exited", (int)lane->end.pid);
    }
    nic->base.sink->lane_down(&lane->base, lane->fault, lane->why);
    return 1;
}

int fab_local_lane_turn(struct local_lane *lane, int budget)
{
    if (lane->down || lane->closing)
        return 0;
    int n = take_imms(lane, budget);
    if (atomic_load_explicit(&lane->in->mail, memory_order_acquire) != lane->mail_seen)
        n += fab_local_lane_packets(lane);
    if (lane->fault)
        return n + go_down(lane);
    if (!lane->ready)
        return n;
    n += fab_local_answers(lane);
    /* Both kinds of copy share one allowance; so that neither starves they take turns. */
    lane->serve_first = !lane->serve_first;
    if (lane->serve_first)
        n += fab_local_serve(lane);
    n += fab_local_work(lane);
    if (!lane->serve_first)
        n += fab_local_serve(lane);
    fab_local_lane_flush(lane);
    return n;
}

bool fab_local_lane_waiting(struct local_lane *lane)
{
    uint32_t imm;
    if (lane->down || lane->closing)
        return false;
    return fab_local_imm_peek(lane->in, lane->imm_head, &imm) ||
           atomic_load_explicit(&lane->in->mail, memory_order_acquire) != lane->mail_seen ||
           (lane->ready && fab_local_pull_is(lane->in, lane->served, LOCAL_PULL_POSTED) &&
            !atomic_load_explicit(&lane->in->closed, memory_order_relaxed)) ||
           (lane->asked != lane->answered &&
            fab_local_pull_is(lane->out, (uint32_t)lane->answered, LOCAL_PULL_DONE));
}

/* ---- death ---- */

static void revoke_permits(struct local_lane *lane)
{
    struct local_nic *nic = fab_local_nic(lane);
    lane->closing = true;
    if (lane->end.sock >= 0 && !lane->down) {
        fab_local_watch(nic, EPOLL_CTL_DEL, lane->end.sock, 0, LOCAL_E_SOCKET, 0);
        fab_local_watch(nic, EPOLL_CTL_DEL, lane->end.pidfd, 0, LOCAL_E_PIDFD, 0);
    }
    atomic_store_explicit(&lane->in->revoked, 1, memory_order_relaxed);
    if (lane->out)
        atomic_store_explicit(&lane->out->closed, 1, memory_order_relaxed);
    /* Pairs with the fence in fab_local_enter(). */
    atomic_thread_fence(memory_order_seq_cst);
}

static bool peer_inside(const struct local_lane *lane)
{
    return atomic_load_explicit(&lane->in->busy, memory_order_acquire) ||
           (lane->out && atomic_load_explicit(&lane->out->pulling, memory_order_acquire));
}

static void release(struct local_lane *lane)
{
    struct local_nic *nic = fab_local_nic(lane);
    fab_local_end_close(&lane->end);
    if (lane->in_fd >= 0)
        close(lane->in_fd);
    fab_local_pull_free(lane);
    fab_local_unmap(lane->in, sizeof *lane->in);
    fab_local_unmap(lane->out, sizeof *lane->out);
    fab_local_unmap(lane->bell, sizeof *lane->bell);
    nic->lanes[lane->bit] = NULL;
    nic->pending[lane->bit / 64] &= ~(UINT64_C(1) << (lane->bit % 64));
    unmap_lane(lane);
}

int fab_local_lane_close(struct fab_lane *base)
{
    struct local_lane *lane = (struct local_lane *)base;
    if (!lane->closing)
        revoke_permits(lane);
    if (peer_inside(lane) && !fab_local_dead(&lane->end)) {
        fab_fail_text("process %d is inside a copy", (int)lane->end.pid);
        return -EINPROGRESS;
    }
    if (lane->out)
        fab_local_answers(lane);
    fab_local_cancel(lane);
    release(lane);
    return 0;
}

void fab_local_lane_after_fork(struct local_lane *lane)
{
    fab_local_end_close(&lane->end);
    if (lane->in_fd >= 0)
        close(lane->in_fd);
    if (lane->staging_fd >= 0)
        close(lane->staging_fd);
}
