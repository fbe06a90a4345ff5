/* A libfabric domain, its completion queue and its registrations.
 *
 * Completions are copied into a bounded queue of our own and handled from there, so that arm()
 * can look without acting, and lane_close() can take out what belongs to one lane. Only a read of
 * the completion queue makes a software provider do its work, for all endpoints of the domain.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "providers/ofi.h"

#define MR_DMABUF (1ull << 40) /* FI_MR_DMABUF, from 1.20 */

/* struct fi_mr_dmabuf of 1.20. */
struct mr_dmabuf {
    int fd;
    uint64_t offset;
    size_t len;
    void *base_addr;
};

/* Newer libraries have longer structs; their extra fields must be there, and zero. */
union roomy_mr_attr {
    struct fi_mr_attr attr;
    uint8_t room[sizeof(struct fi_mr_attr) + 128];
};

union roomy_error {
    struct fi_cq_err_entry entry;
    uint8_t room[sizeof(struct fi_cq_err_entry) + 128];
};

/* As long as the device makes them, where only credit keeps it from overrunning. libfabric may change
 * the attributes. */
static int open_queue(struct ofi_domain *domain, bool waits, struct fid_cq **out)
{
    bool credits = domain->nic->kind->credits;
    uint32_t places = credits ? OFI_PLACES : OFI_QUEUE;
    int rc;

    do {
        struct fi_cq_attr attr = {
            .size = places,
            .format = FI_CQ_FORMAT_DATA,
            .wait_obj = waits ? FI_WAIT_FD : FI_WAIT_NONE,
        };
        rc = fi_cq_open(domain->fid, &attr, out, domain);
        domain->places = places;
        places /= 2;
    } while (rc == -FI_EINVAL && credits && places >= OFI_PLACES_MIN);
    return rc;
}

/* Software providers: the fd of a queue stays readable once it was (1.17 never resets it), so
 * the queue that we read has none, and one that never gets an entry lends us the fd that follows
 * the domain's sockets. Elsewhere the queue's own fd is the one that an interrupt raises. */
static int open_queues(struct ofi_domain *domain)
{
    bool software = ofi_is_tcp(domain->nic->kind);
    int rc = open_queue(domain, !software, &domain->cq);

    if (software)
        return rc ? rc : open_queue(domain, true, &domain->waker);
    if (rc == 0) {
        domain->waker = domain->cq;
        return 0;
    }
    domain->nic->can_sleep = false; /* efa before 2.3, or on a device without interrupts */
    return open_queue(domain, false, &domain->cq);
}

int ofi_domain_open(struct ofi_nic *nic, struct ofi_lane *lane, struct ofi_domain **out)
{
    struct ofi_domain *domain = calloc(1, sizeof(*domain));

    if (!domain)
        return -ENOMEM;
    domain->nic = nic;
    domain->lane = lane;
    int rc = 0;
    if (lane)
        domain->fid = nic->data->fid;
    else
        rc = fi_domain(nic->fabric, nic->info, &domain->fid, domain);
    if (rc == 0)
        rc = open_queues(domain);
    if (rc) {
        rc = ofi_fail(nic, "opening the domain", rc);
        ofi_domain_close(domain);
        return rc;
    }
    *out = domain;
    return 0;
}

void ofi_domain_close(struct ofi_domain *domain)
{
    if (!domain)
        return;
    if (domain->lane)
        ofi_domain_unwatch(domain);
    if (domain->waker && domain->waker != domain->cq)
        (void)fi_close(&domain->waker->fid);
    if (domain->cq)
        (void)fi_close(&domain->cq->fid);
    if (domain->fid && !domain->lane)
        (void)fi_close(&domain->fid->fid);
    free(domain);
}

bool ofi_domain_full(const struct ofi_domain *domain)
{
    return domain->queued + OFI_BATCH > OFI_QUEUE;
}

static struct ofi_event *queue_tail(struct ofi_domain *domain)
{
    domain->events++;
    return &domain->queue[(domain->head + domain->queued++) % OFI_QUEUE];
}

static int read_error(struct ofi_domain *domain)
{
    union roomy_error e = {.room = {0}};

    if (fi_cq_readerr(domain->cq, &e.entry, 0) <= 0)
        return 0;
    *queue_tail(domain) = (struct ofi_event){
        .slot = e.entry.op_context,
        .flags = e.entry.flags,
        .data = e.entry.data,
        .from = FI_ADDR_NOTAVAIL,
        .error = e.entry.err > 0 && e.entry.err < 256 ? e.entry.err : EIO,
        .prov_errno = e.entry.prov_errno,
    };
    return 1;
}

int ofi_domain_read(struct ofi_domain *domain)
{
    struct fi_cq_data_entry entries[OFI_BATCH];
    fi_addr_t from[OFI_BATCH];
    bool sources = !domain->nic->kind->lane_endpoints;
    ssize_t n = sources ? fi_cq_readfrom(domain->cq, entries, OFI_BATCH, from)
                        : fi_cq_read(domain->cq, entries, OFI_BATCH);

    /* A read also stops in front of an error: only one that finds nothing has emptied it. */
    domain->dry = n <= 0 && n != -FI_EAVAIL;
    domain->more = n == -FI_EAVAIL || n == OFI_BATCH;
    if (n == -FI_EAVAIL)
        return read_error(domain);
    for (ssize_t i = 0; i < n; i++)
        *queue_tail(domain) = (struct ofi_event){
            .slot = entries[i].op_context,
            .flags = entries[i].flags,
            .data = entries[i].data,
            .from = sources ? from[i] : FI_ADDR_NOTAVAIL,
            .length = (uint32_t)entries[i].len,
        };
    return n > 0 ? (int)n : 0;
}

static int register_once(struct ofi_domain *domain, struct fi_mr_attr *attr, uint64_t flags,
                         struct ofi_mr *out)
{
    int mode = domain->nic->info->domain_attr->mr_mode;

    /* Our own keys are random: whoever was not given one cannot guess it. */
    if (!(mode & FI_MR_PROV_KEY) && ofi_random(&attr->requested_key))
        return -EIO;
    if (domain->nic->info->domain_attr->mr_key_size == 4)
        attr->requested_key &= UINT32_MAX;
    int rc = fi_mr_regattr(domain->fid, attr, flags, &out->fid);
    if (rc == 0)
        out->desc = mode & FI_MR_LOCAL ? fi_mr_desc(out->fid) : NULL;
    return rc;
}

int ofi_mr_open(struct ofi_domain *domain, const struct fab_memory *memory, uint64_t access,
                struct ofi_mr *out)
{
    struct iovec iov = {.iov_base = memory->base, .iov_len = memory->length};
    struct mr_dmabuf dmabuf = {
        .fd = memory->dmabuf_fd,
        .offset = memory->dmabuf_offset,
        .len = memory->length,
        .base_addr = memory->base - memory->dmabuf_offset,
    };
    union roomy_mr_attr a = {.room = {0}};
    uint64_t flags = 0;

    a.attr.mr_iov = &iov;
    a.attr.iov_count = 1;
    a.attr.access = access;
    if (memory->kind == FAB_MEM_CUDA) {
        a.attr.iface = FI_HMEM_CUDA;
        a.attr.device.cuda = memory->device;
        if (memory->dmabuf_fd >= 0 && domain->nic->lib->version >= FI_VERSION(1, 20)) {
            a.attr.mr_iov = (const struct iovec *)(const void *)&dmabuf;
            flags = MR_DMABUF;
        }
    }
    int rc = register_once(domain, &a.attr, flags, out);
    if (rc == -FI_ENOKEY) /* that key is taken */
        rc = register_once(domain, &a.attr, flags, out);
    return rc;
}
