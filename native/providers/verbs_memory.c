/* Registered memory: host memory by address, GPU memory by dma-buf, or by the kernel's peer memory
 * where there is no dma-buf. Relaxed ordering is always asked for: what a count proves does not
 * depend on the order of writes, and without it PCIe holds a fast NIC back. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "providers/cuda.h"
#include "providers/verbs.h"

enum {
    ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_RELAXED_ORDERING,
};

/* The address that work requests name is the memory's own, so the offset inside the dma-buf must
 * lie as the address does within a page. */
static struct ibv_mr *register_dmabuf(struct verbs_nic *nic, const struct fab_memory *memory,
                                      int fd, uint64_t offset)
{
    return nic->lib->reg_dmabuf_mr(nic->pd, offset, memory->length, (uintptr_t)memory->base, fd,
                                   ACCESS);
}

static struct ibv_mr *register_address(struct verbs_nic *nic, const struct fab_memory *memory)
{
    return nic->lib->reg_mr_iova2(nic->pd, memory->base, memory->length, (uintptr_t)memory->base,
                                  ACCESS);
}

static struct ibv_mr *register_gpu(struct verbs_nic *nic, const struct fab_memory *memory)
{
    int fd = memory->dmabuf_fd;
    uint64_t offset = memory->dmabuf_offset;

    if (fd < 0 && fab_cuda_dmabuf(memory->base, memory->length, &fd, &offset))
        return register_address(nic, memory);
    struct ibv_mr *mr = register_dmabuf(nic, memory, fd, offset);
    if (memory->dmabuf_fd < 0)
        (void)close(fd);
    return mr ? mr : register_address(nic, memory);
}

int verbs_mr_reg(struct fab_nic *base, const struct fab_memory *memory, struct fab_mr **out,
                 fab_key *key)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;
    struct verbs_mr *mr = calloc(1, sizeof(*mr));

    if (!mr)
        return -ENOMEM;
    errno = 0;
    mr->host = memory->kind == FAB_MEM_HOST;
    mr->mr = mr->host ? register_address(nic, memory) : register_gpu(nic, memory);
    if (!mr->mr) {
        int error = errno ? errno : EIO;
        free(mr);
        if (error == ENOMEM || error == EAGAIN)
            fab_fail_text("verbs %s cannot pin %llu bytes: raise the limit of locked memory "
                          "(ulimit -l)",
                          base->info.name, (unsigned long long)memory->length);
        else
            (void)verbs_fail(nic,
                             memory->kind == FAB_MEM_HOST ? "registering memory"
                                                          : "registering GPU memory (dma-buf, then "
                                                            "peer memory)",
                             error);
        return memory->kind == FAB_MEM_HOST ? -error : -ENOTSUP;
    }
    key->addr = (uintptr_t)memory->base;
    key->rkey = mr->mr->rkey;
    *out = (struct fab_mr *)mr;
    return 0;
}

int verbs_mr_dereg(struct fab_nic *base, struct fab_mr *opaque)
{
    struct verbs_nic *nic = (struct verbs_nic *)base;
    struct verbs_mr *mr = (struct verbs_mr *)opaque;
    int rc = nic->lib->dereg_mr(mr->mr);

    if (rc && !nic->fatal)
        return verbs_fail(nic, "deregistering memory", rc);
    free(mr);
    return 0;
}
