/* AF_UNIX sockets that keep packets apart, with file descriptors in them, and who is at the other
 * end.
 *
 * Contract
 * - Nothing blocks, no SIGPIPE is raised, and every descriptor is close-on-exec.
 * - A connection is accepted or dialled only when the other end is a process of the same user
 *   that we hold a pidfd of: a forked child may keep a dead peer's socket open for ever, so a
 *   hangup alone does not tell of death.
 * - The listening socket lives in the abstract namespace: no file is left behind by SIGKILL.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "local.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif

static socklen_t fill_name(struct sockaddr_un *at, const uint8_t name[LOCAL_NAME_BYTES])
{
    memset(at, 0, sizeof *at);
    at->sun_family = AF_UNIX;
    /* sun_path[0] stays 0: abstract. The rest is what `ss -x` shows. */
    int used = snprintf(at->sun_path + 1, sizeof at->sun_path - 1, "llm-fabric-");
    for (int i = 0; i < LOCAL_NAME_BYTES; i++)
        used += snprintf(at->sun_path + 1 + used, sizeof at->sun_path - 1 - (size_t)used, "%02x",
                         name[i]);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)used);
}

static int new_socket(void)
{
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return sock < 0 ? -errno : sock;
}

int fab_local_listen(uint8_t name[LOCAL_NAME_BYTES])
{
    struct sockaddr_un at;
    socklen_t length = fill_name(&at, name);
    int sock = new_socket();
    if (sock < 0)
        return sock;
    if (bind(sock, (struct sockaddr *)&at, length) < 0 || listen(sock, LOCAL_BACKLOG) < 0) {
        int error = errno;
        close(sock);
        return -error;
    }
    return sock;
}

static int open_pidfd(int sock, pid_t pid)
{
    int pidfd;
    socklen_t length = sizeof pidfd;
    /* Names the process that connected even when its pid has been used again. */
    if (getsockopt(sock, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) == 0)
        return pidfd;
    if (errno != ENOPROTOOPT)
        return -errno;
    pidfd = (int)syscall(SYS_pidfd_open, pid, 0U);
    return pidfd < 0 ? -errno : pidfd;
}

/* Fills pid and pidfd of a connected socket. */
static int identify(struct local_end *end)
{
    struct ucred who;
    socklen_t length = sizeof who;
    if (getsockopt(end->sock, SOL_SOCKET, SO_PEERCRED, &who, &length) < 0)
        return -errno;
    if (who.uid != geteuid()) {
        fab_fail_text("the process at the other end belongs to user %u, we to user %u",
                      (unsigned)who.uid, (unsigned)geteuid());
        return -EACCES;
    }
    end->pid = who.pid;
    end->pidfd = open_pidfd(end->sock, who.pid);
    if (end->pidfd < 0) {
        fab_fail_text("no pidfd of process %d: errno %d", (int)who.pid, -end->pidfd);
        return end->pidfd;
    }
    return 0;
}

int fab_local_dial(const uint8_t name[LOCAL_NAME_BYTES], struct local_end *end)
{
    struct sockaddr_un at;
    socklen_t length = fill_name(&at, name);
    *end = (struct local_end){.sock = new_socket(), .pidfd = -1};
    if (end->sock < 0)
        return end->sock;
    int rc = 0;
    if (connect(end->sock, (struct sockaddr *)&at, length) < 0) {
        rc = -errno;
        fab_fail_text("connecting to the peer's socket on this host: errno %d", -rc);
    }
    if (!rc)
        rc = identify(end);
    if (rc)
        fab_local_end_close(end);
    return rc;
}

/* With no descriptor left, a waiting connection would keep the listener readable for ever: take
 * it with the spare one and close it. */
static void refuse_with_spare(struct local_nic *nic)
{
    close(nic->spare);
    int sock = accept4(nic->listener, NULL, NULL, SOCK_CLOEXEC);
    if (sock >= 0)
        close(sock);
    nic->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

int fab_local_accept(struct local_nic *nic, struct local_end *end)
{
    for (int i = 0; i < LOCAL_ACCEPTS; i++) {
        int sock = accept4(nic->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (sock < 0 && (errno == EMFILE || errno == ENFILE)) {
            refuse_with_spare(nic);
            return -EMFILE;
        }
        if (sock < 0)
            return 0;
        *end = (struct local_end){.sock = sock, .pidfd = -1};
        if (identify(end) == 0)
            return 1;
        fab_local_end_close(end);
    }
    return 0;
}

void fab_local_end_close(struct local_end *end)
{
    if (end->sock >= 0)
        close(end->sock);
    if (end->pidfd >= 0)
        close(end->pidfd);
    end->sock = end->pidfd = -1;
}

bool fab_local_dead(const struct local_end *end)
{
    struct pollfd look = {.fd = end->pidfd, .events = POLLIN};
    return end->pidfd >= 0 && poll(&look, 1, 0) > 0;
}

static bool for_now(int error)
{
    /* ETOOMANYREFS: too many descriptors of this user are on their way. */
    return error == EAGAIN || error == ENOBUFS || error == ENOMEM || error == EINTR ||
           error == ETOOMANYREFS;
}

int fab_local_send(int sock, const void *bytes, size_t length, const int *fds, uint32_t fd_count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * LOCAL_PACKET_FDS)];
    } control;
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd_count) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.room;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(head), fds, sizeof(int) * fd_count);
    }
    if (sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return 0;
    return for_now(errno) ? -EAGAIN : -errno;
}

/* Keeps the first descriptors and closes what is too many. */
static void collect_fds(struct msghdr *message, struct local_packet *packet)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (packet->fd_count < LOCAL_PACKET_FDS)
                packet->fds[packet->fd_count++] = fd;
            else
                close(fd);
        }
    }
}

int fab_local_receive(int sock, struct local_packet *packet)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * LOCAL_PACKET_FDS)];
    } control;
    struct iovec part = {.iov_base = packet->bytes, .iov_len = sizeof packet->bytes};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.room,
                             .msg_controllen = sizeof control.room};
    packet->fd_count = 0;
    ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0)
        return for_now(errno) ? 0 : -errno;
    collect_fds(&message, packet);
    packet->length = (uint32_t)got;
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        fab_local_packet_drop(packet);
        return -EPROTO; /* too long, or too many descriptors, or none left on our side */
    }
    /* Nobody sends empty packets: this is the end of the stream. */
    return got ? 1 : -ECONNRESET;
}

void fab_local_packet_drop(struct local_packet *packet)
{
    for (uint32_t i = 0; i < packet->fd_count; i++)
        if (packet->fds[i] >= 0)
            close(packet->fds[i]);
    packet->fd_count = 0;
}

bool fab_local_is_note(const struct local_packet *packet, struct local_note *note)
{
    uint16_t magic;
    if (packet->length < sizeof magic)
        return false;
    memcpy(&magic, packet->bytes, sizeof magic);
    if (magic != LOCAL_NOTE_MAGIC)
        return false;
    memset(note, 0, sizeof *note);
    if (packet->length == sizeof *note)
        memcpy(note, packet->bytes, sizeof *note);
    if (note->version != LOCAL_VERSION)
        note->type = 0;
    return true;
}

void fab_local_watch(struct local_nic *nic, int op, int fd, uint32_t events, enum local_event kind,
                     uint32_t index)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)kind << 32 | index};
    epoll_ctl(nic->epoll, op, fd, &event);
}
