/* Connections that libfabric has accepted and not yet read from (tcp).
 *
 * It accepts a connection in one turn, and reads the first message of it in another. Anybody who connects
 * and takes a while to speak, a peer that was stopped or a stranger, makes use of what that leaves open:
 *
 * - What it keeps in between points at the endpoint, also once that is closed: the message then ends in
 *   memory that was freed (xnet_pep_close() in prov/net of 1.17, in prov/tcp later; mended by
 *   ofiwg/libfabric pull request 12709). So before an endpoint is closed, nobody is let in any more, and
 *   who has not spoken is dropped.
 * - It reads with a blocking recv(): half a message stops the thread, with all its locks. So what is
 *   accepted inherits a time limit.
 *
 * libfabric has no call that tells of such connections, but the kernel does: they have the endpoint's own
 * address, as only accepted ones have, and nothing of them was read.
 *
 * Left: where errno happens to be EAGAIN, 1.17 forgets a connection that ended before its first message
 * was whole, and its descriptor (xnet_run_conn() takes the old errno for the reason).
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "providers/ofi.h"

#define TURNS 64 /* looks at one endpoint, */
#define PATIENT \
    48 /* so many of them before its listening socket is shut down, which logs a warning */
#define FORGOTTEN 4   /* looks after which who is still unread is none that libfabric will read */
#define MOST_FILES 65536 /* that are looked at where /proc cannot be */
#define HALF_MESSAGE_US 4000 /* how long the rest of a first message may take */
#define KERNEL_CLOSED 7      /* TCP_CLOSE and TCP_LISTEN of the kernel, which no header for */
#define KERNEL_LISTENS 10    /* programs has */

/* What to do with the listening socket. */
enum deed { LOOK, HURRY, DEAFEN, SHUT };

enum state { OTHER, LISTENS, SILENT, UNREAD };

struct seen {
    uint32_t waiting; /* connections that libfabric has not accepted yet, */
    uint32_t ended;   /* those that it had, which said nothing and are ended now, */
    uint32_t unread;  /* and those that said something */
};

/* Whether two addresses are the same; a wildcard is any address of its port. */
static bool is_at(const struct sockaddr_storage *own, const struct sockaddr_storage *at)
{
    if (own->ss_family != at->ss_family)
        return false;
    if (own->ss_family == AF_INET) {
        const struct sockaddr_in *a = (const void *)own;
        const struct sockaddr_in *b = (const void *)at;
        return a->sin_port == b->sin_port && (a->sin_addr.s_addr == b->sin_addr.s_addr ||
                                              a->sin_addr.s_addr == htonl(INADDR_ANY));
    }
    if (own->ss_family == AF_INET6) {
        const struct sockaddr_in6 *a = (const void *)own;
        const struct sockaddr_in6 *b = (const void *)at;
        return a->sin6_port == b->sin6_port &&
               (IN6_IS_ADDR_UNSPECIFIED(&a->sin6_addr) ||
                (!memcmp(&a->sin6_addr, &b->sin6_addr, sizeof(a->sin6_addr)) &&
                 a->sin6_scope_id == b->sin6_scope_id));
    }
    return false;
}

static enum state state_of(int fd, const struct sockaddr_storage *own, struct tcp_info *info)
{
    const size_t needed =
        offsetof(struct tcp_info, tcpi_bytes_received) + sizeof(info->tcpi_bytes_received);
    struct sockaddr_storage at = {0};
    socklen_t at_len = sizeof(at);
    socklen_t info_len = sizeof(*info);
    int queued = 0;

    memset(info, 0, sizeof(*info));
    if (getsockname(fd, (struct sockaddr *)&at, &at_len) || !is_at(own, &at))
        return OTHER;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &info_len) || info->tcpi_state == KERNEL_CLOSED)
        return OTHER;
    if (info->tcpi_state == KERNEL_LISTENS)
        return LISTENS;
    if (info_len < needed)
        return OTHER; /* Linux before 4.1 does not tell */
    if (!info->tcpi_bytes_received)
        return SILENT;
    /* A FIN counts as a byte that was received, but cannot be read. */
    if (ioctl(fd, FIONREAD, &queued) == 0 && (uint64_t)queued + 1 >= info->tcpi_bytes_received)
        return UNREAD;
    return OTHER;
}

/* Nobody is let in any more: the kernel drops what comes for the listening socket. */
static void deafen(int fd)
{
    struct sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
    struct sock_fprog program = {.len = 1, .filter = &drop};

    if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)))
        (void)shutdown(fd, SHUT_RDWR);
}

static void act(int fd, enum state state, enum deed deed)
{
    const struct timeval limit = {.tv_usec = HALF_MESSAGE_US};
    const struct sockaddr nobody = {.sa_family = AF_UNSPEC};

    if (state == SILENT)
        (void)connect(fd, &nobody, sizeof(nobody)); /* an error at once, and not an end of file */
    else if (deed == HURRY)
        (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    else if (deed == DEAFEN)
        deafen(fd);
    else
        (void)shutdown(fd, SHUT_RDWR);
}

/* The number may belong to another file by now, so act on a copy that was looked at once more; or
 * without, if there is no room for one. */
static void act_on_copy(int fd, const struct sockaddr_storage *own, enum state state,
                        enum deed deed)
{
    struct tcp_info info;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    if (state_of(copy < 0 ? fd : copy, own, &info) == state)
        act(copy < 0 ? fd : copy, state, deed);
    if (copy >= 0)
        (void)close(copy);
}

static void look_at(int fd, const struct sockaddr_storage *own, enum deed deed, struct seen *seen)
{
    struct tcp_info info;
    enum state state = state_of(fd, own, &info);
    bool silent = state == SILENT && deed != HURRY;

    if (state == LISTENS)
        seen->waiting += info.tcpi_unacked; /* of a listening socket: those in its queue */
    seen->unread += state == UNREAD;
    seen->ended += silent;
    if (silent || (state == LISTENS && deed != LOOK))
        act_on_copy(fd, own, state, deed);
}

static struct seen look(const struct sockaddr_storage *own, enum deed deed)
{
    struct seen seen = {0};
    struct rlimit most = {0};
    DIR *open_files = opendir("/proc/thread-self/fd");
    const struct dirent *entry;

    while (open_files && (entry = readdir(open_files))) {
        char *rest;
        long fd = strtol(entry->d_name, &rest, 10);

        if (*entry->d_name != '.' && !*rest)
            look_at((int)fd, own, deed, &seen);
    }
    if (open_files) {
        (void)closedir(open_files);
        return seen;
    }
    (void)getrlimit(RLIMIT_NOFILE, &most);
    for (int fd = 0; (rlim_t)fd < most.rlim_cur && fd < MOST_FILES; fd++)
        look_at(fd, own, deed, &seen);
    return seen;
}

static bool address_of(const struct ofi_port *port, struct sockaddr_storage *own)
{
    memset(own, 0, sizeof(*own));
    if (port->address_len < sizeof(own->ss_family) || port->address_len > sizeof(*own))
        return false;
    memcpy(own, port->address, port->address_len);
    return true;
}

void ofi_pending_begin(const struct ofi_port *port)
{
    struct sockaddr_storage own;

    if (address_of(port, &own))
        (void)look(&own, HURRY);
}

/* Once nobody comes in, nobody waits, and all who are in have said something that is read or was
 * forgotten, one more turn has read the last of it. */
void ofi_pending_end(struct ofi_port *port)
{
    struct sockaddr_storage own;
    uint32_t unread = UINT32_MAX;
    int same = 0; /* looks that found no fewer of them than the one before */

    if (!address_of(port, &own))
        return;
    for (int turn = 0; turn < TURNS; turn++) {
        enum deed deed = turn == 0 ? DEAFEN : turn == PATIENT ? SHUT : LOOK;
        struct seen seen = look(&own, deed);

        if (ofi_domain_full(port->domain) && !(port->lane && port->lane->closing))
            return; /* it closes with its NIC, or was never used */
        if (ofi_domain_full(port->domain))
            (void)ofi_handle_queued(port->domain, OFI_BATCH);
        (void)ofi_domain_read(port->domain);
        same = seen.unread < unread ? 0 : same + 1;
        if (turn > 0 && !seen.waiting && !seen.ended && (!seen.unread || same == FORGOTTEN))
            return;
        unread = seen.unread;
    }
}
