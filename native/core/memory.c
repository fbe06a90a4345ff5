/* Regions; the contract is in memory.h. */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keys.h"
#include "lanes.h"
#include "peer.h"
#include "session.h"
#include "worker.h"

#define HUGE_PAGE (2u << 20)
#define NUMA_NODES 1024
#define QUIESCE_DEFAULT_TIMEOUTS 1 /* times peer_timeout, where the caller gives no timeout */

static bool bit(const uint64_t *bits, uint32_t i)
{
    return bits[i / 64] >> (i % 64) & 1;
}

static void set_bit(uint64_t *bits, uint32_t i)
{
    bits[i / 64] |= UINT64_C(1) << (i % 64);
}

static void clear_bit(uint64_t *bits, uint32_t i)
{
    bits[i / 64] &= ~(UINT64_C(1) << (i % 64));
}

/* ---- lookup ---- */

static int no_region(void)
{
    return fab_error(FAB_E_INVALID, "the region was deregistered");
}

struct fab_region *fab_region_get(struct fab_engine *e, int64_t handle)
{
    struct fab_region *r = fab_slot_get(&e->regions, handle);
    if (r && r->closing) {
        fab_region_put(e, r);
        r = NULL;
    }
    if (!r)
        no_region();
    return r;
}

/* The mapping stays: its views are the caller's, who ends it with fab_unmap(). */
static void release_memory(struct fab_region *r)
{
    if (r->memfd >= 0 && !r->origin)
        close(r->memfd);
    r->memfd = -1;
}

/* A region that the caller never gets to see. */
static void discard_region(struct fab_engine *e, struct fab_region *r)
{
    fab_unmap((uint64_t)(uintptr_t)r->base, r->mapped);
    fab_slot_kill(r);
    fab_region_put(e, r);
}

void fab_region_put(struct fab_engine *e, struct fab_region *r)
{
    if (!fab_slot_put(r))
        return;
    release_memory(r);
    fab_slot_free(&e->regions, r);
}

/* ---- registration ---- */

/* Some providers pin the memory, which takes a second for some gigabytes: the others' transfers do
 * not wait for that. */
static int register_one(struct fab_engine *e, struct fab_nic *nic, const struct fab_memory *memory,
                        struct fab_mr **mr, fab_key *key)
{
    if (nic->provider->pins)
        return nic->provider->mr_reg(nic, memory, mr, key);
    fab_lock(e);
    int rc = nic->provider->mr_reg(nic, memory, mr, key);
    fab_unlock(e);
    return rc;
}

static int unregister_one(struct fab_engine *e, struct fab_nic *nic, struct fab_mr *mr)
{
    if (nic->provider->pins)
        return nic->provider->mr_dereg(nic, mr);
    fab_lock(e);
    int rc = nic->provider->mr_dereg(nic, mr);
    fab_unlock(e);
    return rc;
}

/* Without the lock. Nobody finds the region any more, or not yet. A NIC that does not let go of it
 * keeps its registration: 0, or the error. */
static int unregister(struct fab_engine *e, struct fab_region *r)
{
    struct fab_nic *stuck = NULL;
    fab_lock(e);
    int result = fab_keys_forget_region(e, r, &stuck);
    fab_unlock(e);
    if (result)
        return fab_error_why(FAB_E_SYSTEM, result,
                             "%s does not take a key to the region back; do not free its memory, "
                             "and try again",
                             stuck->info.name);
    for (uint32_t i = 0; i < e->nic_count; i++) {
        int rc = r->mrs[i] ? unregister_one(e, e->nics[i], r->mrs[i]) : 0;
        if (rc)
            result =
                fab_error_why(FAB_E_SYSTEM, rc,
                              "%s does not let go of the region; do not free its memory, and try "
                              "again",
                              e->nics[i]->info.name);
        else
            r->mrs[i] = NULL;
    }
    return result;
}

static int register_with_nics(struct fab_engine *e, struct fab_region *r)
{
    struct fab_memory memory = {.base = r->base,
                                .length = r->length,
                                .number = (uint64_t)fab_slot_handle(r),
                                .kind = r->kind,
                                .device = r->device,
                                .memfd = r->memfd,
                                .dmabuf_fd = -1};
    uint32_t taken = 0;
    for (uint32_t i = 0; i < e->nic_count; i++) {
        struct fab_nic *nic = e->nics[i];
        int rc = register_one(e, nic, &memory, &r->mrs[i], &r->keys[i]);
        taken += !rc;
        if (!rc)
            continue;
        r->mrs[i] = NULL;
        /* A NIC that has no path for this kind of memory is no hindrance to one that has. */
        if (rc == -ENOTSUP && (taken || i + 1 < e->nic_count))
            continue;
        unregister(e, r);
        return fab_error_why(rc == -EINVAL || rc == -EFAULT ? FAB_E_INVALID : FAB_E_SYSTEM, rc,
                             "%s cannot register %llu bytes at %p", nic->info.name,
                             (unsigned long long)r->length, (void *)r->base);
    }
    return 0;
}

/* A region slot, filled but not registered. NULL with the error set. Without the lock. */
static struct fab_region *new_region(struct fab_engine *e, uint8_t *base, uint64_t length)
{
    fab_lock(e); /* the end of a session looks at the holders of all slots, also of free ones */
    struct fab_region *r = fab_slot_alloc(&e->regions);
    if (r)
        memset((char *)r + sizeof r->slot, 0, sizeof *r - sizeof r->slot);
    fab_unlock(e);
    if (!r) {
        fab_error(FAB_E_FULL, "%d regions are registered, the limit; deregister some",
                  FAB_MAX_REGIONS);
        return NULL;
    }
    r->base = base;
    r->length = length;
    r->memfd = -1;
    fab_random(&r->secret, sizeof r->secret);
    return r;
}

static int64_t finish_region(struct fab_engine *e, struct fab_region *r)
{
    int64_t result = register_with_nics(e, r);
    if (!result)
        return fab_slot_handle(r);
    discard_region(e, r);
    return result;
}

int64_t fab_region_register(fab_engine *e, uint64_t base, uint64_t length, int kind, int device)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = 0;
    if (!length || !base || base + length < base)
        result = fab_error(FAB_E_INVALID,
                           "cannot register %llu bytes at %#llx: at least one byte "
                           "of mapped memory is needed",
                           (unsigned long long)length, (unsigned long long)base);
    else if (kind != FAB_MEM_HOST && kind != FAB_MEM_CUDA)
        result = fab_error(FAB_E_INVALID, "memory kind %d is unknown", kind);
    struct fab_region *r = result ? NULL : new_region(e, (uint8_t *)(uintptr_t)base, length);
    if (r) {
        r->kind = kind;
        r->device = device;
        result = finish_region(e, r);
    } else if (!result) {
        result = fab_error_code();
    }
    fab_leave(e);
    return result;
}

/* ---- allocation ---- */

static int bind_numa(uint8_t *base, uint64_t length, int node)
{
    unsigned long mask[NUMA_NODES / (8 * sizeof(unsigned long))] = {0};
    if (node < 0)
        return 0;
    if (node >= NUMA_NODES)
        return fab_error(FAB_E_INVALID, "NUMA node %d is out of range (limit %d)", node,
                         NUMA_NODES);
    mask[(unsigned)node / (8 * sizeof *mask)] |= 1ul << ((unsigned)node % (8 * sizeof *mask));
    if (syscall(SYS_mbind, base, length, MPOL_BIND, mask, (unsigned long)NUMA_NODES, 0ul))
        return fab_error(FAB_E_INVALID, "cannot bind memory to NUMA node %d: %s", node,
                         strerror(errno));
    return 0;
}

/* First touch costs ten times a copy, so it is paid here and not in the first transfer. */
static int prefault(uint8_t *base, uint64_t length)
{
    if (!madvise(base, length, MADV_POPULATE_WRITE))
        return 0;
    if (errno != EINVAL)
        return fab_error(FAB_E_SYSTEM, "cannot populate %llu bytes: %s", (unsigned long long)length,
                         strerror(errno));
    long page = sysconf(_SC_PAGESIZE); /* a kernel before 5.14 */
    for (uint64_t i = 0; i < length; i += (uint64_t)page)
        *(volatile uint8_t *)(base + i) = 0;
    return 0;
}

/* A sealed memfd: it can neither shrink nor grow, so that no mapper can ever be made to fault. */
static int make_memfd(uint64_t size, int huge)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0u);
    int fd = memfd_create("fabric", flags);
    if (fd < 0)
        return fab_error(FAB_E_SYSTEM, "memfd_create: %s", strerror(errno));
    if (ftruncate(fd, (off_t)size) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        int error = errno;
        close(fd);
        return fab_error(FAB_E_SYSTEM, "cannot make %llu bytes of shared memory: %s",
                         (unsigned long long)size, strerror(error));
    }
    return fd;
}

static int map_region(struct fab_region *r, int huge, int numa, int populate)
{
    uint64_t page = huge ? HUGE_PAGE : (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t size = (r->length + page - 1) / page * page;
    int fd = make_memfd(size, huge);
    if (fd < 0)
        return fd;
    r->memfd = fd;
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return fab_error(FAB_E_SYSTEM, "cannot map %llu bytes%s: %s", (unsigned long long)size,
                         huge ? " of huge pages; reserve some (sysctl vm.nr_hugepages)" : "",
                         strerror(errno));
    r->base = base;
    r->mapped = size;
    int rc = bind_numa(base, size, numa);
    if (!rc && populate)
        rc = prefault(base, size);
    return rc;
}

int64_t fab_region_alloc(fab_engine *e, uint64_t length, int huge, int numa, int populate)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = 0;
    if (!length || length > INT64_MAX / 2)
        result = fab_error(FAB_E_INVALID, "cannot allocate %llu bytes", (unsigned long long)length);
    struct fab_region *r = result ? NULL : new_region(e, NULL, length);
    if (r) {
        result = map_region(r, huge, numa, populate);
        if (!result) {
            result = finish_region(e, r);
        } else {
            discard_region(e, r);
        }
    } else if (!result) {
        result = fab_error_code();
    }
    fab_leave(e);
    return result;
}

void fab_unmap(uint64_t base, uint64_t mapped)
{
    if (mapped)
        munmap((void *)(uintptr_t)base, mapped);
}

static int64_t make_alias(struct fab_engine *e, struct fab_region *origin, const uint8_t *engine_id)
{
    fab_lock(e); /* counted before it is made: the origin cannot go meanwhile */
    bool closing = atomic_load(&origin->closing);
    origin->aliases += !closing;
    fab_unlock(e);
    if (closing)
        return fab_error(FAB_E_INVALID, "the region is being deregistered");
    struct fab_region *r = new_region(e, origin->base, origin->length);
    int64_t result = r ? 0 : fab_error_code();
    if (r) {
        r->kind = origin->kind;
        r->device = origin->device;
        r->memfd = origin->memfd;
        r->origin = origin;
        r->restricted = true;
        memcpy(r->only, engine_id, sizeof r->only);
        result = finish_region(e, r);
    }
    if (result < 0) {
        fab_lock(e);
        origin->aliases--;
        fab_unlock(e);
    }
    return result;
}

int64_t fab_region_alias(fab_engine *e, int64_t region, const uint8_t *engine_id)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result = FAB_E_INVALID;
    struct fab_region *origin = fab_region_get(e, region);
    if (origin && origin->origin)
        fab_error(FAB_E_INVALID, "the region is itself made for one peer");
    else if (origin)
        result = make_alias(e, origin, engine_id);
    if (origin)
        fab_region_put(e, origin);
    fab_leave(e);
    return result;
}

int fab_region_get_info(fab_engine *e, int64_t region, fab_region_info *out)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_region *r = fab_region_get(e, region);
    if (r) {
        memset(out, 0, sizeof *out);
        out->base = (uint64_t)(uintptr_t)r->base;
        out->length = r->length;
        out->mapped = r->mapped;
        out->kind = r->kind;
        out->device = r->device;
        out->pulled = r->memfd < 0;
        out->region = (uint64_t)region;
        out->secret = r->secret;
        out->key_count = e->nic_count;
        memcpy(out->keys, r->keys, sizeof out->keys);
        fab_region_put(e, r);
    }
    fab_leave(e);
    return r ? 0 : FAB_E_INVALID;
}

/* ---- grants ---- */

void fab_memory_on_grant_request(struct fab_peer *p, struct fab_reader *r)
{
    uint64_t region = fab_get_u64(r), secret = fab_get_u64(r);
    uint32_t number = fab_get_u32(r);
    if (r->bad || p->asked_count == 2 * FAB_GRANTS_ASKED) {
        r->bad = true; /* one that asks more than it may is answered nothing */
        return;
    }
    for (uint32_t i = 0; i < p->asked_count; i++)
        if (p->asked[i].region == region && p->asked[i].number == number)
            return; /* it came twice, over two lanes */
    p->asked[p->asked_count].region = region;
    p->asked[p->asked_count].number = number;
    p->asked[p->asked_count++].secret = secret;
}

static int check_grant(const struct fab_peer *p, const struct fab_region *r, uint64_t secret,
                       uint32_t nic)
{
    if (!r || r->quiescing || r->secret != secret || !r->mrs[nic])
        return FAB_E_INVALID;
    return r->restricted && memcmp(r->only, p->id, sizeof r->only) ? FAB_E_INVALID : 0;
}

static int no_key(const struct fab_peer *p, const struct fab_region *r)
{
    fab_log(FAB_LOG_WARN, "peer %s: no key for %llu bytes at %p: %s", p->label,
            (unsigned long long)r->length, (void *)r->base, fab_take_reason(-EIO));
    return FAB_E_SYSTEM;
}

static bool answer_grant(struct fab_peer *p, uint64_t number, uint64_t secret, uint32_t question)
{
    struct fab_engine *e = p->engine;
    struct fab_region *r = fab_slot_get(&e->regions, (int64_t)number);
    const struct fab_lane *lane = fab_lane_for_frames(p);
    uint32_t nic = lane ? lane->nic->index : 0;
    int code = check_grant(p, r, secret, nic);
    const fab_key *keys = NULL;
    uint32_t key_count = 0;
    if (!code && fab_keys_give(p, r, &keys, &key_count))
        code = no_key(p, r);
    struct fab_writer w;
    fab_frame_begin(&w, FAB_F_GRANT, p->theirs);
    fab_put_u64(&w, number);
    fab_put_u64(&w, secret);
    fab_put_u32(&w, question);
    fab_put_u32(&w, (uint32_t)code);
    fab_put_u32(&w, !code && r->memfd < 0);
    fab_put_u64(&w, code ? 0 : r->length);
    fab_put_u32(&w, key_count);
    for (uint32_t i = 0; i < key_count; i++) {
        fab_put_u64(&w, keys[i].addr);
        fab_put_u64(&w, keys[i].rkey);
    }
    /* The holder is noted first: from the moment the frame is out, it may write. */
    if (!code)
        set_bit(r->holders, p->slot.index);
    bool sent = fab_session_send(p, &w, code ? NULL : r->mrs[nic]);
    if (r)
        fab_region_put(e, r);
    return sent;
}

int fab_memory_answer_grants(struct fab_peer *p)
{
    int n = 0;
    while (p->asked_count &&
           answer_grant(p, p->asked[0].region, p->asked[0].secret, p->asked[0].number)) {
        p->asked_count--;
        memmove(p->asked, p->asked + 1, p->asked_count * sizeof *p->asked);
        n++;
    }
    return n;
}

uint8_t *fab_memory_destination(struct fab_lane *lane, uint64_t number, uint64_t offset,
                                uint64_t length)
{
    struct fab_peer *p = fab_lane_peer(lane);
    if (!p)
        return NULL;
    struct fab_engine *e = p->engine;
    struct fab_region *r = fab_slot_get(&e->regions, (int64_t)number);
    uint8_t *at = NULL;
    if (r && bit(r->holders, p->slot.index) && offset <= r->length && length <= r->length - offset)
        at = r->base + offset;
    if (r)
        fab_region_put(e, r); /* the region cannot go while the caller holds the lock */
    return at;
}

/* ---- deregistration ---- */

int fab_memory_ask_quiesce(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    int n = 0;
    bool more = false;
    uint32_t touched = atomic_load_explicit(&e->regions.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        if (!fab_slot_live(r) || !r->closing || !bit(r->ask, p->slot.index))
            continue;
        struct fab_writer w;
        fab_frame_begin(&w, FAB_F_QUIESCE, p->theirs);
        fab_put_u64(&w, (uint64_t)fab_slot_handle(r));
        fab_put_u32(&w, r->question);
        if (fab_session_send(p, &w, NULL))
            clear_bit(r->ask, p->slot.index), p->quiesce_open++, n++;
        else
            more = true;
    }
    p->due_quiesce = more;
    return n;
}

void fab_memory_on_quiesced(struct fab_peer *p, struct fab_reader *r)
{
    struct fab_engine *e = p->engine;
    struct fab_region *region = fab_slot_get(&e->regions, (int64_t)fab_get_u64(r));
    uint32_t number = fab_get_u32(r);
    if (!region)
        return;
    if (region->closing && number == region->question && bit(region->quiet, p->slot.index)) {
        p->quiesce_open -= p->quiesce_open > 0;
        clear_bit(region->quiet, p->slot.index);
        clear_bit(region->holders, p->slot.index);
        e->dirty = true;
    }
    fab_region_put(e, region);
}

void fab_regions_forget_holder(struct fab_peer *p)
{
    struct fab_engine *e = p->engine;
    uint32_t touched = atomic_load_explicit(&e->regions.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        r->unfenced |= p->no_fence && bit(r->holders, p->slot.index);
        clear_bit(r->holders, p->slot.index);
        clear_bit(r->ask, p->slot.index);
        clear_bit(r->quiet, p->slot.index);
    }
    e->dirty = true;
}

static bool any_bit(const uint64_t *bits)
{
    uint64_t all = 0;
    for (size_t i = 0; i < FAB_MAX_PEERS / 64; i++)
        all |= bits[i];
    return all != 0;
}

static int region_unused(struct fab_engine *e, void *arg)
{
    (void)e;
    struct fab_region *r = arg;
    return !atomic_load_explicit(&r->busy, memory_order_acquire);
}

static int region_quiet(struct fab_engine *e, void *arg)
{
    struct fab_region *r = arg;
    fab_lock(e);
    bool waiting = any_bit(r->quiet);
    fab_unlock(e);
    return !waiting;
}

static void ask_holders(struct fab_engine *e, struct fab_region *r)
{
    r->quiescing = true;
    r->question = ++e->questions;
    memcpy(r->ask, r->holders, sizeof r->ask);
    memcpy(r->quiet, r->holders, sizeof r->quiet);
    for (uint32_t i = 0; i < FAB_MAX_PEERS; i++) {
        if (!bit(r->ask, i))
            continue;
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        p->due_quiesce = true;
        fab_peer_busy(p);
    }
}

/* Holders that did not answer lose their session. */
static void fence_holders(struct fab_engine *e, struct fab_region *r)
{
    for (uint32_t i = 0; i < FAB_MAX_PEERS; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        if (!bit(r->quiet, i))
            continue;
        fab_session_told(p);
        fab_session_end(p, FAB_E_UNREACHABLE, "it did not let go of a region that was deregistered",
                        true);
    }
}

/* Without the lock. */
static int remove_region(struct fab_engine *e, struct fab_region *r)
{
    int rc = unregister(e, r);
    fab_lock(e);
    if (rc) { /* nobody uses it any more, but it may be tried again */
        r->stuck = true;
        fab_unlock(e);
        return rc;
    }
    if (r->origin) {
        r->origin->aliases--;
        r->memfd = -1;
    }
    fab_slot_kill(r);
    fab_slot_put(r);
    fab_unlock(e);
    return 0;
}

/* Marks it, so that nothing new begins. `again`: only a NIC has to let go of it. */
static int begin_closing(struct fab_engine *e, struct fab_region *r, bool *again)
{
    int rc = 0;
    fab_lock(e);
    *again = r->stuck;
    if (r->aliases)
        rc = fab_error(FAB_E_INVALID,
                       "%u descriptors made for single peers show this region; "
                       "deregister those first",
                       r->aliases);
    else if (atomic_exchange(&r->closing, true) && !r->stuck)
        rc = fab_error(FAB_E_INVALID, "the region is being deregistered already");
    if (!rc)
        r->stuck = false; /* whoever comes meanwhile is told that it is being deregistered */
    fab_unlock(e);
    return rc;
}

/* Our own use first: if that does not end, nobody else is disturbed. */
static int deregister(struct fab_engine *e, struct fab_region *r, int64_t timeout)
{
    int64_t until = fab_now() + timeout;
    bool again;
    int rc = begin_closing(e, r, &again);
    if (rc)
        return rc;
    if (again)
        return remove_region(e, r);
    rc = fab_wait(e, region_unused, r, timeout);
    if (rc != 1) {
        atomic_store(&r->closing, false);
        return rc == FAB_E_CLOSED ? rc
                                  : fab_error(FAB_E_TIMEOUT,
                                              "%u transfers still read from the "
                                              "region after %.3f s; it stays registered",
                                              atomic_load(&r->busy), (double)timeout / 1e9);
    }
    fab_lock(e);
    ask_holders(e, r);
    fab_unlock(e);
    int64_t left = until - fab_now();
    fab_wait(e, region_quiet, r, left > 0 ? left : 0);
    fab_lock(e);
    e->now = fab_now();
    fence_holders(e, r);
    if (any_bit(r->quiet))
        rc = fab_error(FAB_E_FENCE_PENDING,
                       "a peer may still be inside a write to the region; it stays registered: do "
                       "not free or reuse it, and try again");
    else if (r->unfenced)
        rc = fab_error(FAB_E_FENCE_UNSUPPORTED,
                       "a peer is gone that could write to the region, and its provider cannot "
                       "fence it: writes it began may still land until this engine is closed; the "
                       "region stays registered: do not free or reuse it before");
    else
        rc = 0;
    if (rc) {
        r->quiescing = false;
        atomic_store(&r->closing, false);
    }
    fab_unlock(e);
    return rc ? rc : remove_region(e, r);
}

int fab_region_deregister(fab_engine *e, int64_t region, int64_t timeout)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    if (timeout < 0)
        timeout = QUIESCE_DEFAULT_TIMEOUTS * e->config.peer_timeout_ns;
    struct fab_region *r = fab_slot_get(&e->regions, region); /* also one that is stuck */
    int rc = r ? deregister(e, r, timeout) : no_region();
    if (r)
        fab_region_put(e, r);
    fab_leave(e);
    return rc;
}

/* ---- engine ---- */

int fab_doorbell_open(struct fab_engine *e)
{
    long page = sysconf(_SC_PAGESIZE);
    e->doorbell =
        mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (e->doorbell == MAP_FAILED) {
        e->doorbell = NULL;
        return fab_error(FAB_E_SYSTEM, "mmap: %s", strerror(errno));
    }
    e->doorbell_bytes = (uint64_t)page;
    struct fab_memory memory = {
        .base = e->doorbell, .length = e->doorbell_bytes, .memfd = -1, .dmabuf_fd = -1};
    for (uint32_t i = 0; i < e->nic_count; i++) {
        struct fab_nic *nic = e->nics[i];
        int rc = nic->provider->mr_reg(nic, &memory, &e->doorbell_mrs[i], &nic->info.doorbell);
        if (rc)
            return fab_error_why(FAB_E_SYSTEM, rc, "%s cannot register the doorbell page",
                                 nic->info.name);
    }
    return 0;
}

void fab_regions_unregister(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->regions.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        if (fab_slot_live(r))
            unregister(e, r);
    }
    for (uint32_t i = 0; i < e->nic_count; i++) {
        if (e->doorbell_mrs[i])
            e->nics[i]->provider->mr_dereg(e->nics[i], e->doorbell_mrs[i]);
        e->doorbell_mrs[i] = NULL;
    }
}

void fab_regions_fini(struct fab_engine *e)
{
    uint32_t touched = atomic_load_explicit(&e->regions.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        if (fab_slot_live(r))
            release_memory(r);
    }
    if (e->doorbell)
        munmap(e->doorbell, (size_t)sysconf(_SC_PAGESIZE));
}
