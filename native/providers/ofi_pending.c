/* Connections that libfabric has accepted and not yet read from (tcp).
 *
 * It accepts a connection in one turn, and reads the first message of it in another. What it keeps in
 * between points at the endpoint, also when that was closed meanwhile: the message then ends in memory
 * that was freed (prov/net in 1.17, prov/tcp later; "TODO: We need to abort any outstanding active
 * connection requests" in its own xnet_pep_close(), mended by ofiwg/libfabric pull request 12709).
 * Anybody can bring this about who connects and takes a while to speak: a peer that was stopped, or a
 * stranger. libfabric has no call that tells of them, but the kernel does. Such a connection has the
 * endpoint's own address, as only accepted ones have, and not a byte has come on it.
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "providers/ofi.h"

#define TURNS 64 /* looks at one endpoint, */
#define PATIENT \
    48 /* so many of them before its listening socket is shut down, which logs a warning */
#define KERNEL_LISTENS 10 /* TCP_LISTEN of the kernel, which no header for programs has */

/* What to do with the listening socket. */
enum deed { LOOK, DEAFEN, SHUT };

enum state { OTHER, LISTENS, PENDING };

struct seen {
    uint32_t waiting; /* connections that libfabric has not accepted yet */
    uint32_t ended;   /* and those that it had, which are ended now */
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
               (!memcmp(&a->sin6_addr, &b->sin6_addr, sizeof(a->sin6_addr)) ||
                IN6_IS_ADDR_UNSPECIFIED(&a->sin6_addr));
    }
    return false;
}

static enum state state_of(int fd, const struct sockaddr_storage *own, struct tcp_info *info)
{
    struct sockaddr_storage at = {0};
    socklen_t at_len = sizeof(at);
    socklen_t info_len = sizeof(*info);

    memset(info, 0, sizeof(*info));
    if (getsockname(fd, (struct sockaddr *)&at, &at_len) || !is_at(own, &at))
        return OTHER;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &info_len))
        return OTHER;
    if (info->tcpi_state == KERNEL_LISTENS)
        return LISTENS;
    if (info_len <
        offsetof(struct tcp_info, tcpi_bytes_received) + sizeof(info->tcpi_bytes_received))
        return OTHER; /* Linux before 4.1 does not tell */
    return info->tcpi_bytes_received ? OTHER : PENDING;
}

/* Nobody is let in any more: the kernel drops what comes for the listening socket. */
static void deafen(int fd)
{
    struct sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
    struct sock_fprog program = {.len = 1, .filter = &drop};

    (void)setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program));
}

/* The number may belong to another file by now, so act on a copy that was looked at once more. */
static void act(int fd, const struct sockaddr_storage *own, enum state state, enum deed deed)
{
    struct tcp_info info;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    if (copy < 0)
        return;
    if (state_of(copy, own, &info) == state) {
        if (state == LISTENS && deed == DEAFEN)
            deafen(copy);
        else
            (void)shutdown(copy, SHUT_RDWR);
    }
    (void)close(copy);
}

static void look_at(int fd, const struct sockaddr_storage *own, enum deed deed, struct seen *seen)
{
    struct tcp_info info;
    enum state state = state_of(fd, own, &info);

    if (state == LISTENS)
        seen->waiting += info.tcpi_unacked; /* of a listening socket: those in its queue */
    if (state == PENDING)
        seen->ended++;
    if (state == PENDING || (state == LISTENS && deed != LOOK))
        act(fd, own, state, deed);
}

static struct seen look(const struct sockaddr_storage *own, enum deed deed)
{
    struct seen seen = {0};
    DIR *open_files = opendir("/proc/self/fd");
    const struct dirent *entry;

    while (open_files && (entry = readdir(open_files))) {
        char *rest;
        long fd = strtol(entry->d_name, &rest, 10);

        if (*entry->d_name != '.' && !*rest)
            look_at((int)fd, own, deed, &seen);
    }
    if (open_files)
        (void)closedir(open_files);
    return seen;
}

/* Once nobody comes in, nobody waits, and all who are in have said something, one more turn reads
 * what they said. */
void ofi_pending_end(struct ofi_port *port)
{
    struct sockaddr_storage own = {0};

    if (port->address_len < sizeof(own.ss_family) || port->address_len > sizeof(own))
        return;
    memcpy(&own, port->address, port->address_len);
    for (int turn = 0; turn < TURNS; turn++) {
        enum deed deed = turn == 0 ? DEAFEN : turn == PATIENT ? SHUT : LOOK;
        struct seen seen = look(&own, deed);

        if (ofi_domain_full(port->domain) && !port->lane)
            return; /* the listener closes with its NIC: no turn will come that could read */
        if (ofi_domain_full(port->domain))
            (void)ofi_handle_queued(port->domain, OFI_BATCH);
        (void)ofi_domain_read(port->domain);
        if (turn > 0 && !seen.waiting && !seen.ended)
            return;
    }
}
