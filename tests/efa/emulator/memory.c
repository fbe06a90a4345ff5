/* Memory regions. A key is a place in a table and is not used again before all others were, so that
 * whoever writes with the key of a region that is gone is refused, and does not hit another. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "emulator.h"

static struct region *regions[KEYS_MAX];
static uint32_t last_key;

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct ibv_pd *pd = calloc(1, sizeof *pd);

    if (pd)
        pd->context = context;
    return pd;
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
    free(pd);
    return 0;
}

static uint32_t free_key(void)
{
    for (uint32_t i = 0; i < KEYS_MAX; i++) {
        last_key = last_key % (KEYS_MAX - 1) + 1; /* never 0 */
        if (!regions[last_key])
            return last_key;
    }
    return 0;
}

static struct ibv_mr *add_region(struct ibv_pd *pd, void *addr, uint8_t *base, size_t length,
                                 uint64_t iova, int access)
{
    struct region *r = calloc(1, sizeof *r);

    if (!r)
        return NULL;
    pthread_mutex_lock(&efa_lock);
    uint32_t key = free_key();
    if (key)
        regions[key] = r;
    efa_count(C_MRS, 1);
    pthread_mutex_unlock(&efa_lock);
    if (!key) {
        free(r);
        errno = ENOMEM;
        return NULL;
    }
    r->ib = (struct ibv_mr){.context = pd->context,
                            .pd = pd,
                            .addr = addr,
                            .length = length,
                            .handle = key,
                            .lkey = key,
                            .rkey = key};
    r->base = base;
    r->iova = iova;
    r->access = access;
    return &r->ib;
}

EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
    return add_region(pd, addr, addr, length, (uintptr_t)addr, access);
}

EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
                                       unsigned access)
{
    return add_region(pd, addr, addr, length, iova, (int)access);
}

/* Works with whatever can be mapped: a memfd stands in for a GPU's dma-buf. */
EXPORT struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length,
                                        uint64_t iova, int fd, int access)
{
    uint64_t into = offset % 4096;
    uint8_t *base =
        mmap(NULL, length + into, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(offset - into));

    if (base == MAP_FAILED)
        return NULL;
    struct ibv_mr *mr = add_region(pd, NULL, base + into, length, iova, access);
    if (!mr) {
        (void)munmap(base, length + into);
        return NULL;
    }
    ((struct region *)mr)->mapped = true;
    efa_count(C_DMABUF_MRS, 1);
    return mr;
}

EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
    struct region *r = (struct region *)mr;

    pthread_mutex_lock(&efa_lock);
    regions[mr->rkey] = NULL;
    pthread_mutex_unlock(&efa_lock);
    if (r->mapped) {
        uint64_t into = (uintptr_t)r->base % 4096;
        (void)munmap(r->base - into, mr->length + into);
    }
    free(r);
    return 0;
}

uint8_t *efa_translate(uint32_t key, uint64_t addr, uint64_t length, int access)
{
    const struct region *r = key < KEYS_MAX ? regions[key] : NULL;

    if (!r || (r->access & access) != access || addr < r->iova || addr - r->iova > r->ib.length ||
        length > r->ib.length - (addr - r->iova))
        return NULL;
    return r->base + (addr - r->iova);
}

/* One part of a list at a time; `step` is given memory of ours. */
static bool walk(const struct ibv_sge *sges, int count, uint64_t offset, uint64_t length,
                 int access, uint8_t *to, const uint8_t *from)
{
    for (int i = 0; i < count && length; i++) {
        if (offset >= sges[i].length) {
            offset -= sges[i].length;
            continue;
        }
        uint64_t n = sges[i].length - offset < length ? sges[i].length - offset : length;
        uint8_t *memory = efa_translate(sges[i].lkey, sges[i].addr + offset, n, access);
        if (!memory)
            return false;
        if (to) {
            memcpy(to, memory, n);
            to += n;
        } else {
            memcpy(memory, from, n);
            from += n;
        }
        length -= n;
        offset = 0;
    }
    return length == 0;
}

bool efa_gather(const struct ibv_sge *sges, int count, uint64_t offset, uint8_t *to,
                uint64_t length)
{
    return walk(sges, count, offset, length, 0, to, NULL);
}

bool efa_scatter(const struct ibv_sge *sges, int count, uint64_t offset, const uint8_t *from,
                 uint64_t length)
{
    return walk(sges, count, offset, length, IBV_ACCESS_LOCAL_WRITE, NULL, from);
}
