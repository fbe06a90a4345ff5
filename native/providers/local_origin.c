/* Connections that are not lanes yet.
 *
 * Contract
 * - There are at most LOCAL_ORIGINS. In a crowd a newcomer takes the place of the one that has
 *   been silent longest, if that had its chance, and else stays in the listener's backlog. Where
 *   the core holds all of them it is refused.
 * - A waiting origin is closed after LOCAL_ORIGIN_NS. Its SETUP comes first and is kept; its
 *   first frame goes to sink->hello and makes it *claimed*.
 * - From a claimed one nothing is read: what its peer sends meanwhile waits in the socket for the
 *   lane that it becomes. When the core drops it, or answers it without opening a lane (a
 *   CHALLENGE), it waits again, and its next frame is another hello.
 * - Once it has been claimed, its end is reported by origin_gone, unless it was dropped.
 * - An origin's memory is valid as long as its NIC's.
 */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "local.h"

static uint32_t index_of(const struct local_nic *nic, const struct fab_origin *origin)
{
    return (uint32_t)(origin - nic->origins);
}

static void forget_setup(struct fab_origin *origin)
{
    if (origin->set_up) {
        close(origin->inbox_fd);
        close(origin->bell_fd);
    }
    origin->set_up = false;
}

static bool is_waiting(const struct fab_origin *origin)
{
    return origin->state == LOCAL_O_WAITING || origin->state == LOCAL_O_ANSWERED;
}

/* Reads on, for as long as a silent connection is kept. */
static void wait_for_frame(struct local_nic *nic, struct fab_origin *origin, int state)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    origin->state = state;
    origin->deadline = (int64_t)now.tv_sec * INT64_C(1000000000) + now.tv_nsec + LOCAL_ORIGIN_NS;
    fab_local_watch(nic, EPOLL_CTL_MOD, origin->end.sock, EPOLLIN, LOCAL_E_ORIGIN,
                    index_of(nic, origin));
}

/* The connection is of no use any more. */
static void end_origin(struct local_nic *nic, struct fab_origin *origin)
{
    if (origin->state != LOCAL_O_WAITING)
        nic->base.sink->origin_gone(&nic->base, origin);
    fab_local_origin_close(nic, origin);
}

/* A free place, made if need be. NULL: there is none; `crowded` tells that one is due soon. */
static struct fab_origin *find_place(struct local_nic *nic, int64_t now, bool *crowded)
{
    struct fab_origin *oldest = NULL;
    *crowded = false;
    for (uint32_t i = 0; i < LOCAL_ORIGINS; i++) {
        struct fab_origin *origin = &nic->origins[i];
        if (origin->state == LOCAL_O_FREE)
            return origin;
        if (is_waiting(origin) && (!oldest || origin->deadline < oldest->deadline))
            oldest = origin;
    }
    if (!oldest)
        return NULL;
    *crowded = now < oldest->deadline - LOCAL_ORIGIN_NS + LOCAL_ORIGIN_SAFE_NS;
    if (*crowded)
        return NULL;
    end_origin(nic, oldest);
    return oldest;
}

int fab_local_origin_accept(struct local_nic *nic, int64_t now)
{
    for (int n = 0; n < LOCAL_ACCEPTS; n++) {
        bool crowded;
        struct local_end end;
        struct fab_origin *origin = find_place(nic, now, &crowded);
        if (crowded || fab_local_accept(nic, &end) <= 0)
            return n;
        if (!origin) {
            fab_local_end_close(&end);
            continue;
        }
        *origin = (struct fab_origin){
            .state = LOCAL_O_WAITING, .end = end, .deadline = now + LOCAL_ORIGIN_NS};
        nic->origin_count++;
        fab_local_watch(nic, EPOLL_CTL_ADD, end.sock, EPOLLIN, LOCAL_E_ORIGIN,
                        index_of(nic, origin));
    }
    return LOCAL_ACCEPTS;
}

/* Our own packets: the first one has to be SETUP, and no other belongs here. */
static int take_setup(struct fab_origin *origin, const struct local_note *note,
                      struct local_packet *packet)
{
    if (note->type == LOCAL_WAKE)
        return 0;
    if (note->type != LOCAL_SETUP || origin->set_up || packet->fd_count != 2)
        return -EPROTO;
    origin->setup = *note;
    origin->inbox_fd = packet->fds[0];
    origin->bell_fd = packet->fds[1];
    origin->set_up = true;
    packet->fd_count = 0;
    return 0;
}

static int take_hello(struct local_nic *nic, struct fab_origin *origin,
                      const struct local_packet *packet)
{
    if (!origin->set_up)
        return -EPROTO;
    origin->state = LOCAL_O_CLAIMED;
    fab_local_watch(nic, EPOLL_CTL_MOD, origin->end.sock, 0, LOCAL_E_ORIGIN, index_of(nic, origin));
    /* The origin may be dropped or a lane when this returns. */
    nic->base.sink->hello(&nic->base, origin, packet->bytes, packet->length);
    return 0;
}

/* Reads one packet. 1: one of ours, go on; 0: enough; else the connection is of no use. */
static int read_packet(struct local_nic *nic, struct fab_origin *origin)
{
    struct local_packet *packet = &nic->packet;
    struct local_note note;
    int rc = fab_local_receive(origin->end.sock, packet);
    if (rc <= 0)
        return rc;
    if (fab_local_is_note(packet, &note)) {
        rc = take_setup(origin, &note, packet);
        rc = rc ? rc : 1;
    } else {
        rc = take_hello(nic, origin, packet);
    }
    fab_local_packet_drop(packet);
    return rc;
}

int fab_local_origin_event(struct local_nic *nic, struct fab_origin *origin)
{
    if (origin->state == LOCAL_O_FREE)
        return 0;
    if (origin->state == LOCAL_O_CLAIMED) { /* only a hangup is watched for */
        end_origin(nic, origin);
        return 1;
    }
    int rc = read_packet(nic, origin);
    if (rc > 0) /* SETUP and hello are sent together */
        rc = read_packet(nic, origin);
    if (rc < 0)
        end_origin(nic, origin);
    return 1;
}

void fab_local_origin_expire(struct local_nic *nic, int64_t now)
{
    for (uint32_t i = 0; nic->origin_count && i < LOCAL_ORIGINS; i++) {
        struct fab_origin *origin = &nic->origins[i];
        if (is_waiting(origin) && now > origin->deadline)
            end_origin(nic, origin);
    }
}

void fab_local_origin_take(struct local_nic *nic, struct fab_origin *origin)
{
    origin->end.sock = origin->end.pidfd = -1;
    fab_local_origin_close(nic, origin);
}

void fab_local_origin_close(struct local_nic *nic, struct fab_origin *origin)
{
    forget_setup(origin);
    if (origin->end.sock >= 0)
        fab_local_watch(nic, EPOLL_CTL_DEL, origin->end.sock, 0, LOCAL_E_ORIGIN, 0);
    fab_local_end_close(&origin->end);
    origin->state = LOCAL_O_FREE;
    nic->origin_count--;
}

int fab_local_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                           uint32_t blob_len, const uint8_t *bytes, uint32_t length)
{
    struct local_nic *nic = (struct local_nic *)base;
    (void)blob; /* the connection knows where to */
    (void)blob_len;
    if (origin->state == LOCAL_O_FREE)
        return -ENOTCONN;
    if (origin->state == LOCAL_O_CLAIMED)
        wait_for_frame(nic, origin, LOCAL_O_ANSWERED);
    return fab_local_send(origin->end.sock, bytes, length, NULL, 0);
}

void fab_local_origin_drop(struct fab_nic *base, struct fab_origin *origin)
{
    if (origin->state == LOCAL_O_CLAIMED || origin->state == LOCAL_O_ANSWERED)
        wait_for_frame((struct local_nic *)base, origin, LOCAL_O_WAITING);
}

void fab_local_origin_after_fork(struct fab_origin *origin)
{
    if (origin->state == LOCAL_O_FREE)
        return;
    forget_setup(origin);
    fab_local_end_close(&origin->end);
    origin->state = LOCAL_O_FREE;
}
