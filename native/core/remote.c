/* Imported descriptors and grants; the contract is in remote.h. */
#include "remote.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lanes.h"
#include "peer.h"
#include "session.h"
#include "worker.h"

/* ---- grants ---- */

static struct fab_grant *find_grant(struct fab_peer *p, uint64_t region)
{
    struct fab_grant *g = p->grants;
    while (g && g->region != region)
        g = g->next;
    return g;
}

static struct fab_grant *get_grant(struct fab_peer *p, uint64_t region, uint64_t secret)
{
    struct fab_grant *g = p->grants;
    while (g && (g->region != region || g->secret != secret))
        g = g->next;
    if (g)
        return g;
    g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->peer = p;
    g->region = region;
    g->secret = secret;
    g->next = p->grants;
    p->grants = g;
    p->grant_count++;
    return g;
}

static void let_go(struct fab_grant *g)
{
    free(g->keys);
    g->keys = NULL;
    g->key_count = 0;
    if (g->remote)
        g->peer->provider->unimport(g->remote);
    g->remote = NULL;
}

static void free_grant(struct fab_grant *g)
{
    struct fab_grant **link = &g->peer->grants;
    while (*link != g)
        link = &(*link)->next;
    *link = g->next;
    g->peer->grant_count--;
    let_go(g);
    free(g);
}

/* Gives back what nobody uses. A grant that the owner believes we hold is kept, as a name only, so
 * that a QUIESCE finds it. */
static void settle_grant(struct fab_grant *g)
{
    if (g->users || g->outstanding)
        return;
    if (g->state == FAB_G_HELD) {
        let_go(g);
        g->state = FAB_G_NEW;
    } else if (g->state != FAB_G_ASKED && !g->due_quiesced) {
        free_grant(g);
    }
}

static void ask(struct fab_grant *g)
{
    struct fab_peer *p = g->peer;
    struct fab_writer w;
    if (p->grants_open == FAB_GRANTS_ASKED)
        return;
    fab_frame_begin(&w, FAB_F_GRANT_REQ, p->theirs);
    fab_put_u64(&w, g->region);
    fab_put_u64(&w, g->secret);
    fab_put_u32(&w, p->grants_asked + 1);
    if (!fab_session_send(p, &w, NULL)) {
        fab_peer_busy(p);
        return;
    }
    g->asked = ++p->grants_asked;
    g->state = FAB_G_ASKED;
    p->grants_open++;
}

int fab_grant_ready(struct fab_grant *g, const char **why)
{
    switch (g->state) {
    case FAB_G_HELD:
        return 1;
    case FAB_G_NEW:
        ask(g);
        return 0;
    case FAB_G_ASKED:
        return 0;
    case FAB_G_REFUSED:
        *why =
            g->code == FAB_E_SYSTEM
                ? "the owner could not register the region for this peer; its log says why"
                : "the owner refused the descriptor: its region was deregistered, or it was made "
                  "for another peer, or it was tampered with";
        return FAB_E_FAILED;
    default:
        *why = "the region was deregistered by its owner";
        return FAB_E_FAILED;
    }
}

void fab_grant_begin(struct fab_grant *g)
{
    g->outstanding++;
}

void fab_grant_end(struct fab_grant *g)
{
    g->outstanding--;
    if (g->due_quiesced) {
        g->peer->due_quiesced = true;
        fab_peer_busy(g->peer);
    }
    settle_grant(g);
}

static int hold(struct fab_grant *g, uint64_t length, bool pulled, int *fd)
{
    const struct fab_provider *provider = g->peer->provider;
    g->length = length;
    if (!provider->import)
        return 0;
    int owned = *fd;
    *fd = -1;
    return provider->import(fab_lane_for_frames(g->peer), g->region, length, owned, pulled,
                            &g->remote);
}

/* 0: well, also where there are none. */
static int read_keys(struct fab_reader *r, struct fab_grant *g)
{
    uint32_t count = fab_get_u32(r);
    if (r->bad || count > FAB_MAX_NICS || r->length - r->at != count * 16) {
        r->bad = true;
        return -EPROTO;
    }
    if (!count)
        return 0;
    g->keys = calloc(count, sizeof *g->keys);
    if (!g->keys)
        return -ENOMEM;
    for (g->key_count = 0; g->key_count < count; g->key_count++) {
        g->keys[g->key_count].addr = fab_get_u64(r);
        g->keys[g->key_count].rkey = fab_get_u64(r);
    }
    return 0;
}

void fab_remote_on_grant(struct fab_peer *p, struct fab_reader *r, int *fd)
{
    uint64_t region = fab_get_u64(r), secret = fab_get_u64(r);
    uint32_t number = fab_get_u32(r);
    int code = (int)fab_get_u32(r);
    bool pulled = fab_get_u32(r);
    uint64_t length = fab_get_u64(r);
    struct fab_grant *g = p->grants;
    while (g && (g->region != region || g->secret != secret))
        g = g->next;
    if (r->bad || !g || g->state != FAB_G_ASKED || g->asked != number)
        return;
    let_go(g);
    int rc = read_keys(r, g);
    if (r->bad)
        return;
    p->grants_open--;
    g->code = code;
    if (code)
        rc = -EACCES;
    else if (!rc)
        rc = hold(g, length, pulled, fd);
    g->state = rc ? FAB_G_REFUSED : FAB_G_HELD;
    if (rc && !code)
        fab_log(FAB_LOG_WARN, "peer %s: cannot use granted region %#llx: %s", p->label,
                (unsigned long long)region, fab_take_reason(rc));
    settle_grant(g);
}

/* ---- the owner takes a region back ---- */

void fab_remote_on_quiesce(struct fab_peer *p, struct fab_reader *r)
{
    uint64_t region = fab_get_u64(r);
    uint32_t number = fab_get_u32(r);
    struct fab_grant *g = r->bad ? NULL : find_grant(p, region);
    if (r->bad)
        return;
    if (!g && p->grant_count < FAB_MAX_REGIONS) /* never used here: a name to answer through */
        g = get_grant(p, region, 0);
    for (; g; g = g->next) {
        if (g->region != region)
            continue;
        if (g->state == FAB_G_ASKED)
            p->grants_open--;
        g->state = FAB_G_REVOKED;
        g->due_quiesced = true;
        g->quiesced = number;
    }
    p->due_quiesced = true;
}

static bool region_idle(const struct fab_peer *p, uint64_t region)
{
    for (const struct fab_grant *g = p->grants; g; g = g->next)
        if (g->region == region && g->outstanding)
            return false;
    return true;
}

int fab_remote_answer_quiesce(struct fab_peer *p)
{
    int n = 0;
    bool more = false;
    for (struct fab_grant *g = p->grants, *next; g; g = next) {
        next = g->next;
        if (!g->due_quiesced || !region_idle(p, g->region))
            continue;
        struct fab_writer w;
        fab_frame_begin(&w, FAB_F_QUIESCED, p->theirs);
        fab_put_u64(&w, g->region);
        fab_put_u32(&w, g->quiesced);
        if (!fab_session_send(p, &w, NULL)) {
            more = true;
            break;
        }
        n++;
        g->due_quiesced = false;
        let_go(g);
        settle_grant(g);
    }
    p->due_quiesced = more;
    return n;
}

void fab_remotes_end_session(struct fab_peer *p)
{
    for (struct fab_grant *g = p->grants, *next; g; g = next) {
        next = g->next;
        let_go(g);
        g->due_quiesced = false;
        /* What the owner took back stays taken; all else is asked for anew next time. */
        if (g->state != FAB_G_REVOKED)
            g->state = FAB_G_NEW;
        if (!g->users && !g->outstanding)
            free_grant(g);
    }
    p->grants_open = 0;
}

/* ---- imports ---- */

struct fab_import *fab_import_get(struct fab_engine *e, int64_t handle)
{
    struct fab_import *i = fab_slot_get(&e->imports, handle);
    if (!i)
        fab_error(FAB_E_INVALID, "the descriptor is not imported here, or was released");
    return i;
}

void fab_import_put_locked(struct fab_engine *e, struct fab_import *i)
{
    if (!fab_slot_put(i))
        return;
    i->grant->users--;
    settle_grant(i->grant);
    fab_peer_put(e, i->peer);
    free(i->keys);
    i->keys = NULL;
    fab_slot_free(&e->imports, i);
}

void fab_import_put(struct fab_engine *e, struct fab_import *i)
{
    fab_lock(e);
    fab_import_put_locked(e, i);
    fab_unlock(e);
}

static int fill_import(struct fab_import *i, struct fab_peer *p, const fab_descriptor *d)
{
    i->keys = calloc(d->key_count ? d->key_count : 1, sizeof *i->keys);
    i->grant = get_grant(p, d->region, d->secret);
    if (!i->keys || !i->grant) {
        free(i->keys);
        return fab_error(FAB_E_SYSTEM, "out of memory");
    }
    memcpy(i->keys, d->keys, d->key_count * sizeof *i->keys);
    i->key_count = d->key_count;
    i->grant->users++;
    i->peer = p;
    i->offset = d->offset;
    i->length = d->length;
    i->kind = d->kind;
    i->device = d->device;
    fab_slot_ref(p);
    return 0;
}

static int64_t add_import(struct fab_engine *e, struct fab_peer *p, const fab_descriptor *d)
{
    if (d->key_count > FAB_MAX_NICS || d->offset + d->length < d->offset)
        return fab_error(FAB_E_INVALID,
                         "a descriptor of %llu bytes at offset %llu with %u keys "
                         "(limit %d)",
                         (unsigned long long)d->length, (unsigned long long)d->offset, d->key_count,
                         FAB_MAX_NICS);
    if (p->nics && d->key_count != p->nic_count)
        return fab_error(FAB_E_INVALID, "the descriptor has %u keys, its engine %u NICs",
                         d->key_count, p->nic_count);
    struct fab_import *i = fab_slot_alloc(&e->imports);
    if (!i)
        return fab_error(FAB_E_FULL, "%d descriptors are imported, the limit; release some",
                         FAB_MAX_REMOTES);
    int rc = fill_import(i, p, d);
    if (!rc)
        return fab_slot_handle(i);
    fab_slot_kill(i);
    if (fab_slot_put(i))
        fab_slot_free(&e->imports, i);
    return rc;
}

int64_t fab_remote_add(fab_engine *e, int64_t peer, const fab_descriptor *d)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_peer *p = fab_peer_get(e, peer);
    int64_t result = FAB_E_INVALID;
    if (p) {
        fab_lock(e);
        result = add_import(e, p, d);
        fab_unlock(e);
        fab_peer_put(e, p);
    }
    fab_leave(e);
    return result;
}

int fab_remote_release(fab_engine *e, int64_t remote)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_import *i = fab_import_get(e, remote);
    if (i) {
        fab_lock(e);
        if (fab_slot_kill(i))
            fab_import_put_locked(e, i);
        fab_import_put_locked(e, i);
        fab_unlock(e);
    }
    fab_leave(e);
    return i ? 0 : FAB_E_INVALID;
}

void fab_remotes_fini(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->imports.touched, memory_order_acquire);
    for (uint32_t k = 0; k < touched; k++) {
        struct fab_import *i = fab_slot_at(&e->imports, k);
        if (fab_slot_kill(i))
            fab_import_put_locked(e, i);
        free(i->keys); /* a transfer that never ended holds it still, and its grant */
        i->keys = NULL;
    }
    touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t k = 0; k < touched; k++) {
        struct fab_peer *p = fab_slot_at(&e->peers, k);
        while (p->grants)
            free_grant(p->grants);
    }
}
