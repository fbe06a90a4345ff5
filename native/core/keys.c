/* Keys that fence; the contract is in keys.h. */
#include "keys.h"

#include <errno.h>
#include <stdlib.h>

/* What one peer was given of one region. */
struct fab_shown {
    struct fab_shown *next; /* of the same region */
    struct fab_peer *peer;
    struct fab_mr *mrs[FAB_MAX_NICS];
    fab_key keys[FAB_MAX_NICS];
};

/* Whether a session over this NIC needs keys of its own. */
static bool needs_keys(const struct fab_nic *nic, const struct fab_peer *p)
{
    return !nic->fences && nic->provider == p->provider;
}

static bool needed(const struct fab_peer *p)
{
    for (uint32_t i = 0; i < p->engine->nic_count; i++)
        if (needs_keys(p->engine->nics[i], p))
            return true;
    return false;
}

/* What a NIC does not let go of stays noted. */
static int take_back(struct fab_engine *e, struct fab_shown *s, struct fab_nic **nic)
{
    int result = 0;
    for (uint32_t i = 0; i < e->nic_count; i++) {
        int rc = s->mrs[i] ? e->nics[i]->provider->mr_dereg(e->nics[i], s->mrs[i]) : 0;
        if (!rc) {
            s->mrs[i] = NULL;
            continue;
        }
        result = rc;
        *nic = e->nics[i];
    }
    return result;
}

static int show(struct fab_engine *e, const struct fab_region *r, struct fab_shown *s)
{
    struct fab_memory memory = {.base = r->base,
                                .length = r->length,
                                .number = (uint64_t)fab_slot_handle(r),
                                .kind = r->kind,
                                .device = r->device,
                                .memfd = r->memfd,
                                .dmabuf_fd = -1,
                                .remote = true};
    for (uint32_t i = 0; i < e->nic_count; i++) {
        struct fab_nic *nic = e->nics[i];
        s->keys[i] = r->keys[i];
        if (!needs_keys(nic, s->peer) || !r->mrs[i])
            continue;
        int rc = nic->provider->mr_reg(nic, &memory, &s->mrs[i], &s->keys[i]);
        if (rc) {
            s->mrs[i] = NULL;
            return rc;
        }
    }
    return 0;
}

int fab_keys_give(struct fab_peer *p, struct fab_region *r, const fab_key **keys, uint32_t *count)
{
    struct fab_engine *e = p->engine;
    struct fab_shown *s = r->shown;
    *count = 0;
    if (!needed(p))
        return 0;
    while (s && s->peer != p)
        s = s->next;
    if (!s) {
        s = calloc(1, sizeof *s);
        if (!s)
            return -ENOMEM;
        s->peer = p;
        int rc = show(e, r, s);
        if (rc) {
            struct fab_nic *nic;
            if (take_back(e, s, &nic)) /* it was told to nobody: memory is all that is lost */
                fab_log(FAB_LOG_WARN, "%s does not let go of a region", nic->info.name);
            free(s);
            return rc;
        }
        s->next = r->shown;
        r->shown = s;
    }
    *keys = s->keys;
    *count = e->nic_count;
    return 0;
}

int fab_keys_bell(struct fab_peer *p, uint32_t lane, fab_key *key)
{
    struct fab_engine *e = p->engine;
    struct fab_nic *nic = p->lanes[lane]->nic;
    *key = nic->info.doorbell;
    if (nic->fences)
        return 0;
    struct fab_bell *bell = &p->bells[lane];
    if (bell->mr && bell->nic != nic) { /* of an attempt to connect that was given up */
        int rc = bell->nic->provider->mr_dereg(bell->nic, bell->mr);
        if (rc)
            return rc;
        bell->mr = NULL;
    }
    if (!bell->mr) {
        struct fab_memory memory = {.base = e->doorbell,
                                    .length = e->doorbell_bytes,
                                    .memfd = -1,
                                    .dmabuf_fd = -1,
                                    .remote = true};
        int rc = nic->provider->mr_reg(nic, &memory, &bell->mr, &bell->key);
        if (rc) {
            bell->mr = NULL;
            return rc;
        }
        bell->nic = nic;
    }
    *key = bell->key;
    return 0;
}

static bool revoke_bells(struct fab_peer *p)
{
    bool all = true;
    for (uint32_t i = 0; i < FAB_MAX_LANES; i++) {
        struct fab_bell *bell = &p->bells[i];
        if (bell->mr && bell->nic->provider->mr_dereg(bell->nic, bell->mr))
            all = false;
        else
            bell->mr = NULL;
    }
    return all;
}

bool fab_keys_revoke(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    bool all = revoke_bells(p);
    uint32_t touched = atomic_load_explicit(&e->regions.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        struct fab_shown **link = &r->shown;
        while (*link && (*link)->peer != p)
            link = &(*link)->next;
        struct fab_shown *s = *link;
        struct fab_nic *nic;
        if (!s)
            continue;
        if (take_back(e, s, &nic)) {
            all = false;
            continue;
        }
        *link = s->next;
        free(s);
    }
    return all;
}

int fab_keys_forget_region(struct fab_engine *e, struct fab_region *r, struct fab_nic **nic)
{
    while (r->shown) {
        struct fab_shown *s = r->shown;
        int rc = take_back(e, s, nic);
        if (rc)
            return rc;
        r->shown = s->next;
        free(s);
    }
    return 0;
}
