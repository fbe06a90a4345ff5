/* Address handles: one number for each GID, as on the device. A peer whose GID has none here is
 * unknown, and RDMA of its is refused. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

static struct {
    union ibv_gid gid;
    uint32_t uses;
} table[HANDLES_MAX];

uint32_t efa_handle_of(const union ibv_gid *gid)
{
    for (uint32_t i = 1; i < HANDLES_MAX; i++)
        if (table[i].uses && memcmp(&table[i].gid, gid, sizeof *gid) == 0)
            return i;
    return UNKNOWN_HANDLE;
}

bool efa_gid_of(uint32_t number, union ibv_gid *gid)
{
    if (number >= HANDLES_MAX || !table[number].uses)
        return false;
    *gid = table[number].gid;
    return true;
}

static uint32_t take(const union ibv_gid *gid)
{
    uint32_t i = efa_handle_of(gid);

    if (i == UNKNOWN_HANDLE)
        for (i = 1; i < HANDLES_MAX && table[i].uses; i++)
            ;
    if (i >= HANDLES_MAX)
        return UNKNOWN_HANDLE;
    table[i].gid = *gid;
    table[i].uses++;
    return i;
}

EXPORT struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
    struct handle *h = calloc(1, sizeof *h);

    if (!h)
        return NULL;
    pthread_mutex_lock(&efa_lock);
    h->number = take(&attr->grh.dgid);
    pthread_mutex_unlock(&efa_lock);
    if (h->number == UNKNOWN_HANDLE) {
        free(h);
        errno = ENOMEM;
        return NULL;
    }
    h->ib.context = pd->context;
    h->ib.pd = pd;
    h->ib.handle = h->number;
    return &h->ib;
}

EXPORT int ibv_destroy_ah(struct ibv_ah *ah)
{
    struct handle *h = (struct handle *)ah;

    pthread_mutex_lock(&efa_lock);
    table[h->number].uses--;
    pthread_mutex_unlock(&efa_lock);
    free(h);
    return 0;
}

EXPORT int efadv_query_ah(struct ibv_ah *ah, struct efadv_ah_attr *attr, uint32_t room)
{
    struct efadv_ah_attr a = {.ahn = (uint16_t)((struct handle *)ah)->number};

    memset(attr, 0, room);
    memcpy(attr, &a, room < sizeof a ? room : sizeof a);
    return 0;
}
