/* Which NICs libfabric has for a kind, and how it is asked for one.
 *
 * tcp is the native RDM provider, which is called "net" up to 1.17 and "tcp" from 1.18 on. Its
 * NICs are network interfaces; where none is named, the first one that leaves this machine is
 * taken, and loopback if there is no other. efa needs 1.18: below, writes are emulated. rxm is
 * verbs under ofi_rxm; its NICs are RDMA devices with an IP address, and FI_VERBS_IFACE and the
 * like are libfabric's own.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "providers/ofi.h"

/* Newer than the headers that we build on. */
enum {
    OPT_CUDA_API_PERMITTED = 10,
    OPT_SHARED_MEMORY_PERMITTED = 11,
    OPT_EFA_EMULATED_WRITE = -(0xefa << 16) + 2,
};

static int efa_before_enable(struct fid_ep *ep)
{
    bool no = false;

    /* Both options may be unknown to an older library, which then has no such hidden path. */
    (void)fi_setopt(&ep->fid, FI_OPT_ENDPOINT, OPT_SHARED_MEMORY_PERMITTED, &no, sizeof(no));
    (void)fi_setopt(&ep->fid, FI_OPT_ENDPOINT, OPT_CUDA_API_PERMITTED, &no, sizeof(no));
    return 0;
}

static bool emulation_allowed(void)
{
    const char *allow = getenv("FABRIC_EFA_ALLOW_EMULATED");

    return allow && strcmp(allow, "1") == 0;
}

static int efa_after_enable(struct ofi_nic *nic, struct fid_ep *ep)
{
    bool emulated = true;
    size_t size = sizeof(emulated);
    int rc = fi_getopt(&ep->fid, FI_OPT_ENDPOINT, OPT_EFA_EMULATED_WRITE, &emulated, &size);

    nic->emulated = rc || emulated;
    if (!nic->emulated || emulation_allowed())
        return 0;
    fab_fail_text("efa would emulate RDMA writes with messages on this device: a completion "
                  "would prove less; FABRIC_EFA_ALLOW_EMULATED=1 permits it");
    return -EOPNOTSUPP;
}

const struct ofi_kind ofi_tcp = {
    .kind = FAB_KIND_OFI_TCP,
    .name = "tcp",
    .env = "FABRIC_TCP_NIC",
    .lane_endpoints = true,
    .delivery = true,
    .progress = FI_PROGRESS_MANUAL,
    .cq_data_size = 8,
    .api_min = FI_VERSION(1, 16),
    .api_max = FI_VERSION(1, 17),
};

const struct ofi_kind ofi_efa = {
    .kind = FAB_KIND_OFI_EFA,
    .name = "efa",
    .env = "FABRIC_EFA_NIC",
    .device_memory = true,
    .remote_needed = true,
    /* libfabric 2.5 can crash in a write of no bytes, and efa-direct has none before 2.6. */
    .source_needed = true,
    .empty_bytes = 1,
    .credits = true,
    .local_keys = true,
    .one_process = true,
    .caps = FI_SOURCE,
    .progress = FI_PROGRESS_UNSPEC,
    .cq_data_size = 4,
    .api_min = FI_VERSION(1, 18),
    .api_max = FI_VERSION(1, 22),
    .before_enable = efa_before_enable,
    .after_enable = efa_after_enable,
};

/* For networks that one trusts: whoever finds a lane's endpoint can raise immediates on it, as
 * neither a token nor a source address comes with them, and keys have 32 bits. */
const struct ofi_kind ofi_rxm = {
    .kind = FAB_KIND_OFI_RXM,
    .name = "rxm",
    .env = "FABRIC_RXM_NIC",
    .lane_endpoints = true,
    .lane_queues = true,
    .breaks_first = true,
    .source_needed = true,
    .progress = FI_PROGRESS_MANUAL,
    .cq_data_size = 4,
    .api_min = FI_VERSION(1, 17),
    .api_max = FI_VERSION(1, 17),
};

uint64_t ofi_now(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int ofi_random(uint64_t *out)
{
    return getrandom(out, sizeof(*out), 0) == (ssize_t)sizeof(*out) ? 0 : -EIO;
}

int ofi_fail(const struct ofi_nic *nic, const char *what, ssize_t rc)
{
    int error = rc < 0 && -rc < 256 ? (int)rc : -EIO; /* libfabric's own numbers begin at 256 */

    fab_fail_text("%s %s: %s failed: %s", nic->kind->name, nic->base.info.name, what,
                  nic->lib->strerror((int)-rc));
    return error;
}

static const char *provider_of(const struct ofi_kind *kind, const struct fab_libfabric *lib)
{
    if (kind->kind == FAB_KIND_OFI_RXM)
        return "verbs;ofi_rxm";
    if (kind->kind != FAB_KIND_OFI_TCP)
        return kind->name;
    return lib->version < FI_VERSION(1, 18) ? "net" : "tcp";
}

static struct fi_info *make_hints(const struct ofi_kind *kind, const struct fab_libfabric *lib,
                                  uint64_t more_caps)
{
    struct fi_info *hints = lib->dupinfo(NULL);

    if (!hints)
        return NULL;
    hints->caps = FI_MSG | FI_RMA | kind->caps | more_caps;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    if (more_caps & FI_HMEM)
        hints->domain_attr->mr_mode |= FI_MR_HMEM;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = kind->progress;
    hints->domain_attr->cq_data_size = kind->cq_data_size;
    if (kind->credits)
        hints->rx_attr->size = OFI_EFA_RECVS;
    hints->fabric_attr->prov_name = strdup(provider_of(kind, lib));
    return hints;
}

/* ofi_rxm gives every endpoint a verbs queue with 256 places for each peer of a "universe", by
 * default for 1024 peers: more than SoftRoCE has, and 16 MiB of pinned memory for a lane that has
 * one peer. Only the environment says otherwise, and libfabric reads it once, in the process's
 * first fi_getinfo(): where that was ours for another provider, the user has to set it. */
static int getinfo_of_few(const struct fab_libfabric *lib, uint32_t version,
                          const struct fi_info *hints, struct fi_info **out)
{
    bool ours = !getenv(OFI_UNIVERSE_ENV);

    if (ours)
        (void)setenv(OFI_UNIVERSE_ENV, OFI_UNIVERSE, 1);
    int rc = lib->getinfo(version, NULL, NULL, 0, hints, out);
    if (ours)
        (void)unsetenv(OFI_UNIVERSE_ENV);
    return rc;
}

static int get_info(const struct ofi_kind *kind, const struct fab_libfabric *lib,
                    uint64_t more_caps, struct fi_info **out)
{
    uint32_t version = lib->version < kind->api_max ? lib->version : kind->api_max;
    struct fi_info *hints = make_hints(kind, lib, more_caps);

    if (!hints)
        return -FI_ENOMEM;
    int rc = kind->lane_queues ? getinfo_of_few(lib, version, hints, out)
                               : lib->getinfo(version, NULL, NULL, 0, hints, out);
    lib->freeinfo(hints);
    for (struct fi_info *info = rc ? NULL : *out; info && kind->local_keys; info = info->next)
        info->domain_attr->mr_mode |= FI_MR_LOCAL;
    return rc;
}

/* libfabric's efa keeps what it found and opened, and knows nothing of forks. */
static bool same_process(void)
{
    static _Atomic pid_t first;
    pid_t none = 0;

    (void)atomic_compare_exchange_strong(&first, &none, getpid());
    return first == getpid();
}

/* Everything that libfabric has for this kind, to be freed. */
static int all_infos(const struct ofi_kind *kind, const struct fab_libfabric **lib,
                     struct fi_info **out)
{
    int rc = -FI_ENODATA;

    *lib = fab_libfabric();
    if (!*lib)
        return -ENOENT;
    if (kind->one_process && !same_process()) {
        fab_fail_text(
            "%s was used by the process that this one was forked from, and libfabric cannot "
            "begin anew: start this process by exec (multiprocessing: spawn)",
            kind->name);
        return -EOPNOTSUPP;
    }
    if ((*lib)->version < kind->api_min && !(kind == &ofi_efa && emulation_allowed())) {
        fab_fail_text("%s needs libfabric %u.%u or later; the one loaded is %u.%u "
                      "(FABRIC_LIBFABRIC names another)%s",
                      kind->name, FI_MAJOR(kind->api_min), FI_MINOR(kind->api_min),
                      FI_MAJOR((*lib)->version), FI_MINOR((*lib)->version),
                      kind == &ofi_efa ? ": it would emulate RDMA writes with messages, which "
                                         "FABRIC_EFA_ALLOW_EMULATED=1 permits"
                                       : "");
        return -EOPNOTSUPP;
    }
    if (kind->device_memory)
        rc = get_info(kind, *lib, FI_HMEM, out);
    if (rc)
        rc = get_info(kind, *lib, 0, out);
    if (rc == 0)
        return 0;
    fab_fail_text("libfabric %u.%u has no %s NIC on this machine (provider %s: %s)",
                  FI_MAJOR((*lib)->version), FI_MINOR((*lib)->version), kind->name,
                  provider_of(kind, *lib), (*lib)->strerror(-rc));
    return -ENODEV;
}

enum { RANK_FIRST, RANK_V6, RANK_LOOPBACK, RANK_LOOPBACK_V6, RANKS };

/* How much we like it as a default: smaller is better; RANKS: not usable. */
static int rank_of(const struct ofi_kind *kind, const struct fab_libfabric *lib,
                   const struct fi_info *info)
{
    /* An exact name: "tcp;ofi_rxm" also answers to "tcp". */
    if (strcmp(info->fabric_attr->prov_name, provider_of(kind, lib)) != 0)
        return RANKS;
    if (kind->kind == FAB_KIND_OFI_EFA) /* efa-direct cannot write zero bytes before 2.6 */
        return strcmp(info->fabric_attr->name, "efa-direct") == 0 ? RANKS : RANK_FIRST;
    if (info->addr_format == FI_SOCKADDR_IN) {
        const struct sockaddr_in *in = info->src_addr;
        return (ntohl(in->sin_addr.s_addr) >> 24) == 127 ? RANK_LOOPBACK : RANK_FIRST;
    }
    if (info->addr_format == FI_SOCKADDR_IN6) {
        const struct sockaddr_in6 *in6 = info->src_addr;
        if (IN6_IS_ADDR_LINKLOCAL(&in6->sin6_addr))
            return RANKS;
        return IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr) ? RANK_LOOPBACK_V6 : RANK_V6;
    }
    return RANKS;
}

static bool has_address(const struct fi_info *info, const char *name)
{
    char text[INET6_ADDRSTRLEN] = "";

    if (info->addr_format == FI_SOCKADDR_IN)
        (void)inet_ntop(AF_INET, &((const struct sockaddr_in *)info->src_addr)->sin_addr, text,
                        sizeof(text));
    else if (info->addr_format == FI_SOCKADDR_IN6)
        (void)inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)info->src_addr)->sin6_addr, text,
                        sizeof(text));
    return *text && strcmp(text, name) == 0;
}

static bool answers_to(const struct fi_info *info, const char *name)
{
    return !name || strcmp(info->domain_attr->name, name) == 0 || has_address(info, name);
}

void ofi_describe(const struct ofi_kind *kind, const struct fi_info *info, fab_nic_info *out)
{
    uint64_t most = info->ep_attr->max_msg_size;

    memset(out, 0, sizeof(*out));
    out->kind = kind->kind;
    (void)snprintf(out->provider, sizeof(out->provider), "%s", info->fabric_attr->prov_name);
    (void)snprintf(out->name, sizeof(out->name), "%s", info->domain_attr->name);
    out->max_write = most < OFI_MAX_WRITE ? most : OFI_MAX_WRITE;
    if (info->nic && info->nic->link_attr)
        out->speed_bps = info->nic->link_attr->speed;
    out->ordered = 0;
    out->up = 1;
}

static bool listed(const fab_nic_info *out, uint32_t count, const char *name)
{
    for (uint32_t i = 0; i < count; i++)
        if (strncmp(out[i].name, name, sizeof(out[i].name) - 1) == 0)
            return true;
    return false;
}

int ofi_list(const struct ofi_kind *kind, fab_nic_info *out, uint32_t max)
{
    const struct fab_libfabric *lib;
    struct fi_info *all;
    uint32_t count = 0;
    int rc = all_infos(kind, &lib, &all);

    if (rc)
        return rc;
    for (int rank = 0; rank < RANKS; rank++)
        for (const struct fi_info *info = all; info && count < max; info = info->next)
            if (rank_of(kind, lib, info) == rank && !listed(out, count, info->domain_attr->name))
                ofi_describe(kind, info, &out[count++]);
    lib->freeinfo(all);
    return (int)count;
}

int ofi_choose(const struct ofi_kind *kind, const char *name, struct fi_info **out)
{
    const struct fab_libfabric *lib;
    struct fi_info *all;
    const struct fi_info *best = NULL;
    int rc = all_infos(kind, &lib, &all);

    if (rc)
        return rc;
    if (!name)
        name = getenv(kind->env);
    for (int rank = 0; rank < RANKS && !best; rank++)
        for (const struct fi_info *info = all; info && !best; info = info->next)
            if (rank_of(kind, lib, info) == rank && answers_to(info, name))
                best = info;
    *out = best ? lib->dupinfo(best) : NULL;
    lib->freeinfo(all);
    if (*out)
        return 0;
    fab_fail_text("there is no %s NIC called '%s' on this machine", kind->name, name ? name : "");
    return -ENODEV;
}
