/* Packets between processes, and the thread that is the NIC.
 *
 * A queue pair is a datagram socket in the abstract namespace: a name that ends with its process. The
 * network drops nothing, and when a receiver's socket is full the sender keeps the packet.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "emulator.h"

#define MAGIC 0x0efae0efu
#define BACKLOG_NS 50000u     /* between attempts to send to a socket that is full */
#define LOOK_NS 20000000u     /* between looks for peers that do not answer */
#define FOLDER_BYTES 40u /* of the folder's name that go into a socket's */

static struct work *works; /* under way */
static int poller = -1, kicker = -1;
static bool backlog; /* something could not be sent */

/* ---- names ---- */

static size_t append(struct sockaddr_un *name, size_t at, const void *bytes, size_t count)
{
    memcpy(name->sun_path + at, bytes, count);
    return at + count;
}

/* In bytes, without printf: each packet asks for a name. */
static socklen_t name_of(struct sockaddr_un *out, const union ibv_gid *gid, uint32_t qpn)
{
    const char *folder =
        strrchr(getenv("EFA_EMULATOR_DIR"), '/'); /* unique to the run: two do not meet */
    size_t n = append(out, 0, "\0efa", 4);

    out->sun_family = AF_UNIX;
    n = append(out, n, folder, strnlen(folder, FOLDER_BYTES));
    n = append(out, n, gid->raw, sizeof gid->raw);
    n = append(out, n, &qpn, sizeof qpn);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
}

static void *nic(void *unused);

static int start_thread(void)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = QPS_MAX};
    pthread_t thread;

    poller = epoll_create1(EPOLL_CLOEXEC);
    kicker = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (poller < 0 || kicker < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, kicker, &event))
        return errno;
    return pthread_create(&thread, NULL, nic, NULL);
}

int efa_bind(struct qp *qp)
{
    static uint32_t last;
    struct sockaddr_un name;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = qp->ib.qp_base.handle};
    int rc = poller < 0 ? start_thread() : 0, bytes = 8 << 20;

    if (rc)
        return rc;
    qp->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (qp->fd < 0)
        return errno;
    (void)setsockopt(qp->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    last = last % QPN_MAX + 1;
    qp->ib.qp_base.qp_num = last;
    socklen_t length = name_of(&name, &qp->device->gid, last);
    if (bind(qp->fd, (struct sockaddr *)&name, length) ||
        epoll_ctl(poller, EPOLL_CTL_ADD, qp->fd, &event)) {
        rc = errno;
        (void)close(qp->fd);
    }
    return rc;
}

void efa_unbind(struct qp *qp)
{
    (void)epoll_ctl(poller, EPOLL_CTL_DEL, qp->fd, NULL);
    (void)close(qp->fd);
}

void efa_kick(void)
{
    uint64_t one = 1;
    ssize_t n = write(kicker, &one, sizeof one);

    (void)n; /* full: it is awake */
}

/* ---- work under way ---- */

void efa_send_work(struct work *w)
{
    struct work **end = &works;

    w->head.magic = MAGIC;
    w->since = efa_now();
    w->next = NULL;
    while (*end)
        end = &(*end)->next;
    *end = w;
}

static void unlink_work(struct work *w)
{
    struct work **link = &works;

    while (*link != w)
        link = &(*link)->next;
    *link = w->next;
}

static bool is_reply(const struct work *w)
{
    return w->head.type == P_ACK || w->head.type == P_DATA;
}

void efa_finish(struct work *w, uint32_t status)
{
    unlink_work(w);
    if (is_reply(w))
        free(w);
    else
        efa_work_done(w, status);
}

void efa_drop_work(struct qp *qp, bool report)
{
    for (struct work *w = works, *next; w; w = next) {
        next = w->next;
        if (w->qp != qp)
            continue;
        if (report) {
            efa_finish(w, DONE_FLUSHED);
        } else {
            unlink_work(w);
            free(w);
        }
    }
}

struct work *efa_find_work(const struct qp *qp, uint64_t message)
{
    for (struct work *w = works; w; w = w->next)
        if (w->qp == qp && w->head.message == message && !is_reply(w))
            return w;
    return NULL;
}

bool efa_reply(const struct qp *qp, const struct head *to, enum packet_type type, uint32_t status,
               uint64_t total)
{
    struct work *w = calloc(1, sizeof *w);

    if (!w)
        return false;
    w->qp = (struct qp *)qp;
    w->to = to->from;
    w->head = (struct head){.type = (uint8_t)type,
                            .status = (uint8_t)status,
                            .message = to->message,
                            .from = qp->device->gid,
                            .src_qpn = to->dst_qpn,
                            .dst_qpn = to->src_qpn,
                            .rkey = to->rkey,
                            .addr = to->addr,
                            .total = total};
    efa_send_work(w);
    return true;
}

/* ---- sending ---- */

/* The bytes of the next packet. False: a key is not valid (any more). */
static bool fill(const struct work *w, uint8_t *to, uint32_t length)
{
    if (length == 0)
        return true;
    if (w->is_inline) {
        memcpy(to, w->data + w->head.offset, length);
        return true;
    }
    if (w->head.type != P_DATA)
        return efa_gather(w->sges, w->count, w->head.offset, to, length);
    const uint8_t *from =
        efa_translate(w->head.rkey, w->head.addr + w->head.offset, length, IBV_ACCESS_REMOTE_READ);
    if (from)
        memcpy(to, from, length);
    return from;
}

static uint32_t next_length(const struct work *w)
{
    uint64_t left = w->head.total - w->head.offset;

    if (w->head.type == P_READ || w->head.type == P_ACK)
        return 0;
    if (w->head.type == P_SEND)
        return (uint32_t)left;
    return left < SEGMENT ? (uint32_t)left : SEGMENT;
}

/* One packet. 1: sent; 0: not now; -1: the work has ended. */
static int send_packet(struct work *w)
{
    struct {
        struct head head;
        uint8_t bytes[MTU];
    } packet;
    struct sockaddr_un name;
    uint32_t length = next_length(w);

    packet.head = w->head;
    packet.head.length = length;
    if (!fill(w, packet.bytes, length)) {
        efa_finish(w, DONE_BAD_LKEY);
        return -1;
    }
    socklen_t name_length = name_of(&name, &w->to, w->head.dst_qpn);
    if (sendto(w->qp->fd, &packet, sizeof packet.head + length, MSG_DONTWAIT,
               (struct sockaddr *)&name, name_length) < 0) {
        if (errno == EAGAIN || errno == ENOBUFS)
            return 0;
        efa_finish(w, DONE_BAD_QPN); /* nobody has that name: the queue pair was destroyed */
        return -1;
    }
    w->since = efa_now();
    w->head.offset += length;
    w->sent = length == 0 || w->head.offset == w->head.total;
    if (w->sent && (is_reply(w) || w->qp->datagram)) {
        efa_finish(w, DONE_OK);
        return -1;
    }
    return 1;
}

/* A burst of each, so that a long message does not hold up the others. */
static void send_all(void)
{
    backlog = false;
    for (struct work *w = works, *next; w; w = next) {
        next = w->next;
        int rc = 1;
        if (efa_device_gone(w->qp->device))
            continue;
        for (int i = 0; i < BURST && rc == 1 && !w->sent; i++)
            rc = send_packet(w);
        if (rc >= 0 && !w->sent)
            backlog = true;
    }
}

static void give_up_on_the_silent(void)
{
    uint64_t now = efa_now(), limit = (uint64_t)efa_control->unresponsive_ms * 1000000u;

    for (struct work *w = works, *next; w; w = next) {
        next = w->next;
        if (now > w->since && now - w->since > limit)
            efa_finish(w, DONE_UNRESPONSIVE);
    }
}

/* ---- receiving ---- */

/* True: there may be more. */
static bool receive_some(struct qp *qp)
{
    for (int i = 0; i < BURST; i++) {
        struct packet *p = efa_packet_get();
        if (!p)
            return true;
        ssize_t n = recv(qp->fd, p, sizeof p->head + MTU, MSG_DONTWAIT);
        bool good = n >= (ssize_t)sizeof p->head && p->head.magic == MAGIC &&
                    (size_t)n == sizeof p->head + p->head.length;
        if (!good || efa_device_gone(qp->device)) {
            efa_packet_put(p);
            if (n < 0)
                return false;
            continue;
        }
        p->qp = qp;
        efa_arrived(p);
    }
    return true;
}

static void receive_all(const struct epoll_event *events, int count)
{
    for (int i = 0; i < count; i++) {
        uint64_t kicks;
        if (events[i].data.u32 == QPS_MAX) {
            ssize_t n = read(kicker, &kicks, sizeof kicks);
            (void)n;
        } else if (efa_qps[events[i].data.u32]) {
            (void)receive_some(efa_qps[events[i].data.u32]);
        }
    }
}

/* ---- the thread ---- */

static void sleep_until(uint64_t due)
{
    struct pollfd fd = {.fd = poller, .events = POLLIN};
    uint64_t now = efa_now();
    uint64_t left = due > now ? due - now : 0;
    struct timespec t = {.tv_sec = (time_t)(left / 1000000000u),
                         .tv_nsec = (long)(left % 1000000000u)};

    (void)ppoll(&fd, 1, due == UINT64_MAX ? NULL : &t, NULL);
}

static uint64_t earlier(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

static void *nic(void *unused)
{
    uint64_t due = UINT64_MAX, look = 0;
    struct epoll_event events[64];

    (void)unused;
    for (;;) {
        sleep_until(due);
        pthread_mutex_lock(&efa_lock);
        receive_all(events, epoll_wait(poller, events, 64, 0));
        uint64_t delivery = efa_deliver(), now = efa_now();
        send_all();
        if (works && now >= look) {
            give_up_on_the_silent();
            look = now + LOOK_NS;
        }
        due = delivery ? delivery : UINT64_MAX;
        if (backlog)
            due = earlier(due, now + BACKLOG_NS);
        if (works)
            due = earlier(due, look);
        pthread_mutex_unlock(&efa_lock);
    }
    return NULL;
}
