/* Counters; the contract is in counter.h. */
#include "counter.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "peer.h"
#include "trace.h"
#include "watch.h"
#include "worker.h"

#define GENERATIONS 2048u
#define USER_BUCKETS 65536u /* power of two */
#define MAX_TARGET (UINT64_MAX / FAB_PIECE_UNIT)

int fab_counters_init(struct fab_engine *e)
{
    e->cells = fab_table_alloc(FAB_MAX_COUNTERS + FAB_MAX_USER_IDS, sizeof *e->cells);
    e->user_heads = fab_table_alloc(USER_BUCKETS, sizeof *e->user_heads);
    return e->cells && e->user_heads ? 0 : -ENOMEM;
}

void fab_counters_fini(struct fab_engine *e)
{
    fab_table_free(e->cells, FAB_MAX_COUNTERS + FAB_MAX_USER_IDS, sizeof *e->cells);
    fab_table_free(e->user_heads, USER_BUCKETS, sizeof *e->user_heads);
}

/* ---- cells of user ids ---- */

static uint32_t hash_of(uint32_t id)
{
    return id * 2654435761u >> 16 & (USER_BUCKETS - 1);
}

static void note_lost(struct fab_engine *e, uint32_t id)
{
    e->lost_ids[hash_of(id) / 64] |= UINT64_C(1) << (hash_of(id) % 64);
}

static bool is_lost(const struct fab_engine *e, uint32_t id)
{
    return e->lost_ids[hash_of(id) / 64] >> (hash_of(id) % 64) & 1;
}

static uint32_t *user_bucket(struct fab_engine *e, uint32_t id)
{
    return &e->user_heads[hash_of(id)];
}

static struct fab_cell *find_user(struct fab_engine *e, uint32_t id)
{
    for (uint32_t at = *user_bucket(e, id); at; at = e->cells[at - 1].next)
        if (e->cells[at - 1].id == id)
            return &e->cells[at - 1];
    return NULL;
}

static struct fab_cell *add_user(struct fab_engine *e, uint32_t id)
{
    uint32_t at = e->user_free;
    if (at)
        e->user_free = e->cells[at - 1].next;
    else if (e->user_touched < FAB_MAX_USER_IDS)
        at = FAB_MAX_COUNTERS + ++e->user_touched;
    else
        return NULL;
    struct fab_cell *cell = &e->cells[at - 1];
    uint32_t *bucket = user_bucket(e, id);
    uint32_t flags = FAB_CELL_USED | (is_lost(e, id) ? FAB_CELL_VOID | FAB_CELL_OVERFLOWED : 0);
    *cell = (struct fab_cell){.id = id, .watch = FAB_NO_WATCH, .next = *bucket};
    atomic_store_explicit(&cell->flags, flags, memory_order_relaxed);
    *bucket = at;
    return cell;
}

static void drop_user(struct fab_engine *e, struct fab_cell *cell)
{
    uint32_t at = (uint32_t)(cell - e->cells) + 1;
    uint32_t *link = user_bucket(e, cell->id);
    while (*link != at)
        link = &e->cells[*link - 1].next;
    *link = cell->next;
    atomic_store_explicit(&cell->flags, 0, memory_order_relaxed);
    cell->next = e->user_free;
    e->user_free = at;
}

static void uncharge(struct fab_engine *e, struct fab_cell *cell)
{
    if (!cell->early)
        return;
    struct fab_peer *peer = fab_slot_at(&e->peers, cell->early - 1);
    peer->early_ids--;
    cell->early = 0;
}

static void void_cell(struct fab_engine *e, struct fab_cell *cell, uint32_t why)
{
    atomic_fetch_or_explicit(&cell->flags, FAB_CELL_VOID | why, memory_order_release);
    fab_watch_cell_changed(e, cell);
    e->dirty = true;
}

/* More early ids than the bound: from now on nothing that this peer counts under ids of the
 * user's choice can be trusted, and what it counted early neither. */
static void overflow(struct fab_engine *e, struct fab_peer *peer, uint32_t id, uint32_t times)
{
    e->stats.imm_overflow += times;
    note_lost(e, id); /* another peer may count under it before it is opened */
    peer->lost_ids = true;
    if (peer->early_overflow)
        return;
    peer->early_overflow = true;
    fab_log(FAB_LOG_WARN,
            "peer %s sent immediates under more than %d ids that nobody opened; "
            "its user ids are void",
            peer->label, FAB_MAX_EARLY_IDS);
    for (uint32_t i = 0; i < e->user_touched; i++) {
        struct fab_cell *cell = &e->cells[FAB_MAX_COUNTERS + i];
        if (cell->early == peer->slot.index + 1)
            void_cell(e, cell, FAB_CELL_OVERFLOWED);
    }
}

/* All cells of user ids are taken, by whomever: the id is void when it is opened while a session lasts in
 * which this happened. So is another one with the same hash, which costs a count and spares a list. */
static void lose(struct fab_engine *e, struct fab_peer *peer, uint32_t id, uint32_t times)
{
    e->stats.imm_overflow += times;
    note_lost(e, id);
    if (!peer->lost_ids)
        fab_log(FAB_LOG_WARN,
                "peer %s sent immediates under ids that nobody opened while all %d were taken; "
                "those are void",
                peer->label, FAB_MAX_USER_IDS);
    peer->lost_ids = true;
}

void fab_counters_end_session(struct fab_engine *e, struct fab_peer *peer)
{
    if (peer->early_overflow)
        fab_counters_forget_peer(e, peer);
    peer->early_overflow = false;
    bool any = peer->lost_ids;
    peer->lost_ids = false;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; any && i < touched; i++) {
        const struct fab_peer *other = fab_slot_at(&e->peers, i);
        if (fab_slot_live(other) && other->lost_ids)
            return;
    }
    if (any)
        memset(e->lost_ids, 0, sizeof e->lost_ids);
}

static struct fab_cell *early_cell(struct fab_engine *e, struct fab_peer *peer, uint32_t id)
{
    if (peer->early_ids >= FAB_MAX_EARLY_IDS)
        return NULL;
    struct fab_cell *cell = add_user(e, id);
    if (!cell)
        return NULL;
    cell->early = peer->slot.index + 1;
    peer->early_ids++;
    if (peer->early_overflow)
        atomic_fetch_or_explicit(&cell->flags, FAB_CELL_VOID | FAB_CELL_OVERFLOWED,
                                 memory_order_relaxed);
    return cell;
}

void fab_counters_forget_peer(struct fab_engine *e, struct fab_peer *peer)
{
    for (uint32_t i = 0; peer->early_ids && i < e->user_touched; i++) {
        struct fab_cell *cell = &e->cells[FAB_MAX_COUNTERS + i];
        uint32_t flags = atomic_load_explicit(&cell->flags, memory_order_relaxed);
        if (cell->early != peer->slot.index + 1 || (flags & FAB_CELL_SHARED))
            continue; /* what others counted stays, charged to the peer's place in the table */
        uncharge(e, cell);
        drop_user(e, cell); /* what is charged to a peer, nobody has opened */
    }
}

/* ---- counting ---- */

static struct fab_cell *engine_cell(struct fab_engine *e, uint32_t id)
{
    struct fab_cell *cell = &e->cells[id & 0xffff];
    uint32_t flags = atomic_load_explicit(&cell->flags, memory_order_relaxed);
    return (flags & FAB_CELL_OPEN) && cell->id == (id >> 16 & (GENERATIONS - 1)) ? cell : NULL;
}

/* The cell of a user id. NULL: there is no place for it, which has been dealt with. */
static struct fab_cell *user_cell(struct fab_engine *e, struct fab_peer *peer, uint32_t id,
                                  uint32_t times)
{
    struct fab_cell *cell = find_user(e, id);
    if (cell && cell->early && cell->early != peer->slot.index + 1)
        atomic_fetch_or_explicit(&cell->flags, FAB_CELL_SHARED, memory_order_relaxed);
    if (cell)
        return cell;
    bool full = peer->early_ids >= FAB_MAX_EARLY_IDS;
    cell = early_cell(e, peer, id);
    if (!cell && full)
        overflow(e, peer, id, times);
    else if (!cell)
        lose(e, peer, id, times);
    return cell;
}

void fab_count(struct fab_engine *e, struct fab_peer *peer, uint32_t imm, uint32_t times)
{
    uint32_t id = imm & FAB_ID_MASK, pieces = (imm >> 28) + 1;
    struct fab_cell *cell;
    if (id & FAB_ID_ENGINE_BIT) {
        cell = engine_cell(e, id);
        if (!cell) {
            e->stats.imm_stale += times;
            return;
        }
    } else {
        cell = user_cell(e, peer, id, times);
        if (!cell)
            return;
    }
    e->stats.rx_imms += times;
    peer->rx_imms += times;
    uint64_t add = (uint64_t)(FAB_PIECE_UNIT / pieces) * times;
    /* Release: whoever reads the sum sees the bytes that it stands for. */
    atomic_fetch_add_explicit(&cell->sum, add, memory_order_release);
    if (cell->watch != FAB_NO_WATCH)
        fab_watch_cell_changed(e, cell);
    e->dirty = true;
}

void fab_void_id(struct fab_engine *e, struct fab_peer *peer, uint32_t id)
{
    struct fab_cell *cell;
    if (id & FAB_ID_ENGINE_BIT) {
        cell = engine_cell(e, id);
    } else {
        cell = user_cell(e, peer, id, 0);
    }
    if (cell)
        void_cell(e, cell, 0);
}

int fab_void_error(const struct fab_cell *cell)
{
    if (atomic_load(&cell->flags) & FAB_CELL_OVERFLOWED)
        return fab_error(FAB_E_VOID,
                         "the counter is void: a peer sent immediates under ids that nobody had "
                         "opened, under more than %d or while all %d were taken; open counters "
                         "before they are used, or let the engine choose their ids",
                         FAB_MAX_EARLY_IDS, FAB_MAX_USER_IDS);
    return fab_error(FAB_E_VOID, "the counter is void: a write under its id failed or was "
                                 "cancelled; use a fresh id");
}

/* ---- opening and closing ---- */

/* The first cell in use of [first, first + count), or the end. */
static uint32_t first_used(const struct fab_engine *e, uint32_t first, uint32_t count)
{
    uint32_t i = first;
    while (i < first + count && !(e->cell_bits[i / 64] >> (i % 64) & 1))
        i++;
    return i;
}

/* `count` free cells in a row, searched from where the last search ended, so that a slot rests as
 * long as possible before its number comes again. */
static int find_run(struct fab_engine *e, uint32_t count)
{
    uint32_t at = e->cell_cursor;
    for (uint32_t looked = 0; looked <= FAB_MAX_COUNTERS + count;) {
        if (at + count > FAB_MAX_COUNTERS) {
            looked += FAB_MAX_COUNTERS - at;
            at = 0;
        }
        uint32_t used = first_used(e, at, count);
        if (used == at + count) {
            e->cell_cursor = at + count;
            return (int)at;
        }
        looked += used + 1 - at;
        at = used + 1;
    }
    return -1;
}

/* A generation that none of the cells had last; GENERATIONS: each of them was some cell's last. */
static uint32_t fresh_generation(const struct fab_engine *e, uint32_t first, uint32_t count)
{
    bool last[GENERATIONS] = {false};
    for (uint32_t i = first; i < first + count; i++)
        last[e->cells[i].id % GENERATIONS] = true;
    for (uint32_t i = 1; i <= GENERATIONS; i++) {
        uint32_t generation = (e->cells[first].id + i) % GENERATIONS;
        if (!last[generation])
            return generation;
    }
    return GENERATIONS;
}

static int open_engine_cells(struct fab_engine *e, struct fab_counter *c, uint32_t count)
{
    int first = count && count <= FAB_MAX_COUNTERS ? find_run(e, count) : -1;
    if (first < 0)
        return fab_error(FAB_E_FULL, "no %u counters in a row are free (limit %d); close some",
                         count, FAB_MAX_COUNTERS);
    uint32_t generation = fresh_generation(e, (uint32_t)first, count);
    if (generation == GENERATIONS)
        return fab_error(FAB_E_FULL,
                         "%u counters in a row had all %u generations before; ask for blocks of "
                         "less than %u",
                         count, GENERATIONS, GENERATIONS);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = (uint32_t)first + i;
        struct fab_cell *cell = &e->cells[at];
        e->cell_bits[at / 64] |= UINT64_C(1) << (at % 64);
        atomic_store_explicit(&cell->sum, 0, memory_order_relaxed);
        cell->id = generation;
        cell->opens = 1;
        cell->watch = FAB_NO_WATCH;
        atomic_store_explicit(&cell->flags, FAB_CELL_OPEN, memory_order_release);
    }
    c->first = (uint32_t)first;
    c->count = count;
    c->id = FAB_ID_ENGINE_BIT | generation << 16 | (uint32_t)first;
    return 0;
}

static int open_user_cell(struct fab_engine *e, struct fab_counter *c, uint32_t id)
{
    struct fab_cell *cell = find_user(e, id);
    if (!cell) {
        cell = add_user(e, id);
        if (!cell)
            return fab_error(FAB_E_FULL, "the table of user ids is full (limit %d); close counters",
                             FAB_MAX_USER_IDS);
        if (fab_peer_any_overflowed(e))
            atomic_fetch_or_explicit(&cell->flags, FAB_CELL_VOID | FAB_CELL_OVERFLOWED,
                                     memory_order_relaxed);
    }
    uncharge(e, cell);
    cell->opens++;
    atomic_fetch_or_explicit(&cell->flags, FAB_CELL_OPEN, memory_order_relaxed);
    c->first = (uint32_t)(cell - e->cells);
    c->count = 1;
    c->id = id;
    return 0;
}

int64_t fab_counter_open(fab_engine *e, int64_t id, uint32_t count)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int64_t result;
    if (id > FAB_USER_ID_MAX || id < -1)
        result = fab_error(FAB_E_INVALID, "counter id %lld is out of range: 0 to %d, or none",
                           (long long)id, FAB_USER_ID_MAX);
    else if (!count || count > FAB_MAX_COUNTERS || (id >= 0 && count != 1))
        result = fab_error(FAB_E_INVALID, "%u counters asked for; 1 to %d (1 with an id)", count,
                           FAB_MAX_COUNTERS);
    else {
        fab_lock(e);
        struct fab_counter *c = fab_slot_alloc(&e->counters);
        if (!c)
            result = fab_error(FAB_E_FULL, "%u counters are open, the limit", e->counters.capacity);
        else {
            result = id < 0 ? open_engine_cells(e, c, count) : open_user_cell(e, c, (uint32_t)id);
            if (!result) {
                result = fab_slot_handle(c);
            } else {
                fab_slot_kill(c);
                if (fab_slot_put(c))
                    fab_slot_free(&e->counters, c);
            }
        }
        fab_unlock(e);
    }
    fab_leave(e);
    return result;
}

static void close_cell(struct fab_engine *e, uint32_t at)
{
    struct fab_cell *cell = &e->cells[at];
    if (--cell->opens)
        return;
    fab_watch_cell_closed(e, cell);
    if (at < FAB_MAX_COUNTERS) {
        atomic_store_explicit(&cell->flags, 0, memory_order_release);
        e->cell_bits[at / 64] &= ~(UINT64_C(1) << (at % 64));
    } else {
        drop_user(e, cell);
    }
}

static struct fab_counter *get_counter(struct fab_engine *e, int64_t handle)
{
    struct fab_counter *c = fab_slot_get(&e->counters, handle);
    if (!c)
        fab_error(FAB_E_INVALID, "the counter is closed");
    return c;
}

static void put_counter(struct fab_engine *e, struct fab_counter *c)
{
    if (fab_slot_put(c))
        fab_slot_free(&e->counters, c);
}

int fab_counter_close(fab_engine *e, int64_t counter)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_counter *c = get_counter(e, counter);
    int result = c ? 0 : FAB_E_INVALID;
    if (c) {
        fab_lock(e);
        if (fab_slot_kill(c)) {
            for (uint32_t i = 0; i < c->count; i++)
                close_cell(e, c->first + i);
            e->dirty = true;
            fab_slot_put(c);
        }
        fab_unlock(e);
        put_counter(e, c);
    }
    fab_leave(e);
    return result;
}

/* ---- reading and waiting ---- */

int64_t fab_counter_id(fab_engine *e, int64_t counter)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_counter *c = get_counter(e, counter);
    int64_t id = c ? (int64_t)c->id : FAB_E_INVALID;
    if (c)
        put_counter(e, c);
    fab_leave(e);
    return id;
}

const uint64_t *fab_counter_cell(fab_engine *e, int64_t counter, uint32_t index)
{
    struct fab_counter *c = fab_slot_get(&e->counters, counter);
    if (!c)
        return NULL;
    const uint64_t *cell =
        index < c->count ? (const uint64_t *)&e->cells[c->first + index].sum : NULL;
    put_counter(e, c);
    return cell;
}

int fab_counter_reached(fab_engine *e, int64_t counter, const uint64_t *sum, uint64_t target)
{
    const struct fab_cell *cell = (const struct fab_cell *)sum; /* its first field */
    uint64_t value = atomic_load_explicit(&cell->sum, memory_order_acquire);
    return value >= target * FAB_PIECE_UNIT &&
           !(atomic_load_explicit(&cell->flags, memory_order_acquire) & FAB_CELL_VOID) &&
           !atomic_load_explicit(&e->traced, memory_order_relaxed) &&
           !atomic_load_explicit(&e->closed, memory_order_acquire) &&
           !atomic_load_explicit(&e->forked, memory_order_relaxed) &&
           /* last: a closed counter's cell may be somebody else's */
           fab_slot_peek(&e->counters, counter);
}

int64_t fab_counter_value(fab_engine *e, int64_t counter, uint32_t index)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_counter *c = get_counter(e, counter);
    int64_t value = FAB_E_INVALID;
    if (c && index >= c->count)
        value = fab_error(FAB_E_INVALID, "index %u of a block of %u counters", index, c->count);
    else if (c)
        value =
            (int64_t)(atomic_load_explicit(&e->cells[c->first + index].sum, memory_order_acquire) /
                      FAB_PIECE_UNIT);
    if (c)
        put_counter(e, c);
    fab_leave(e);
    return value;
}

struct counter_wait {
    struct fab_counter *counter;
    uint32_t first, count;
    const uint64_t *targets;
    struct fab_peer_set peers;
};

static int counter_ready(struct fab_engine *e, void *arg)
{
    struct counter_wait *w = arg;
    bool all = true, is_void = false;
    for (uint32_t i = 0; i < w->count; i++) {
        struct fab_cell *cell = &e->cells[w->first + i];
        uint64_t sum = atomic_load_explicit(&cell->sum, memory_order_acquire);
        is_void |= atomic_load_explicit(&cell->flags, memory_order_acquire) & FAB_CELL_VOID;
        all &= sum >= w->targets[i] * FAB_PIECE_UNIT;
    }
    if (!fab_slot_live(w->counter)) /* last: a closed counter's cells may be somebody else's */
        return FAB_E_CLOSED;
    if (is_void)
        return FAB_E_VOID;
    if (all)
        return 1;
    return fab_peer_set_lost(&w->peers);
}

static void mark_missing(struct fab_engine *e, const struct counter_wait *w, uint8_t *missing)
{
    for (uint32_t i = 0; missing && i < w->count; i++) {
        uint64_t sum = atomic_load_explicit(&e->cells[w->first + i].sum, memory_order_acquire);
        missing[i] = sum < w->targets[i] * FAB_PIECE_UNIT;
    }
}

static int wait_text(struct fab_engine *e, const struct counter_wait *w, int code, int64_t timeout)
{
    uint64_t value =
        atomic_load_explicit(&e->cells[w->first].sum, memory_order_acquire) / FAB_PIECE_UNIT;
    switch (code) {
    case FAB_E_TIMEOUT:
        return fab_error(code, "counter %#x is at %llu of %llu after %.3f s (%u counters)",
                         w->counter->id, (unsigned long long)value,
                         (unsigned long long)w->targets[0], (double)timeout / 1e9, w->count);
    case FAB_E_VOID:
        for (uint32_t i = 0; i < w->count; i++)
            if (atomic_load(&e->cells[w->first + i].flags) & FAB_CELL_VOID)
                return fab_void_error(&e->cells[w->first + i]);
        return fab_error(code, "the counter is void");
    case FAB_E_UNREACHABLE:
    case FAB_E_FENCE_PENDING:
        fab_lock(e);
        code = fab_peer_set_error(&w->peers);
        fab_unlock(e);
        return code;
    case FAB_E_CLOSED:
        return fab_error(code, "the counter or its engine was closed during the wait");
    default:
        return code;
    }
}

/* Of a block, its first counter stands for all. */
static void trace_reached(struct fab_engine *e, const struct counter_wait *w)
{
    uint32_t offset = w->first - w->counter->first;
    fab_lock(e);
    fab_trace_count(e, w->counter->id + offset, w->targets[0]);
    fab_unlock(e);
}

static int wait_open(struct fab_engine *e, struct counter_wait *w, const int64_t *peers,
                     uint32_t peer_count, int64_t timeout, uint8_t *missing)
{
    int code = counter_ready(e, w); /* the common case first: it is there already */
    if (!code) {
        code = fab_peer_set_open(e, &w->peers, peers, peer_count);
        if (code)
            return code;
        code = fab_wait(e, counter_ready, w, timeout);
    }
    mark_missing(e, w, missing);
    if (code == FAB_E_TIMEOUT && timeout)
        fab_peer_set_timed_out(&w->peers);
    if (code == 1 && atomic_load_explicit(&e->traced, memory_order_relaxed))
        trace_reached(e, w);
    if (code == 1)
        code = 0;
    else
        code = wait_text(e, w, code, timeout);
    fab_peer_set_close(e, &w->peers);
    return code;
}

int fab_counter_wait(fab_engine *e, int64_t counter, uint32_t offset, const uint64_t *targets,
                     uint32_t count, int64_t timeout, const int64_t *peers, uint32_t peer_count,
                     uint8_t *missing)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_counter *c = get_counter(e, counter);
    int code = c ? 0 : FAB_E_INVALID;
    if (c && (offset > c->count || count > c->count - offset || !count))
        code = fab_error(FAB_E_INVALID, "%u targets from %u for a block of %u counters", count,
                         offset, c->count);
    for (uint32_t i = 0; !code && i < count; i++)
        if (targets[i] > MAX_TARGET)
            code = fab_error(FAB_E_INVALID, "target %llu is above the limit %llu",
                             (unsigned long long)targets[i], (unsigned long long)MAX_TARGET);
    if (!code) {
        struct counter_wait w = {c, c->first + offset, count, targets, {0}};
        code = wait_open(e, &w, peers, peer_count, timeout, missing);
    }
    if (c)
        put_counter(e, c);
    fab_leave(e);
    return code;
}

int fab_counter_await(fab_engine *e, int64_t counter, uint64_t target, int64_t timeout)
{
    return fab_counter_wait(e, counter, 0, &target, 1, timeout, NULL, 0, NULL);
}

int64_t fab_watch_counter(fab_engine *e, int64_t queue, int64_t counter, uint32_t index,
                          uint64_t target, const int64_t *peers, uint32_t peer_count, uint64_t tag)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_counter *c = get_counter(e, counter);
    int64_t result = c ? 0 : FAB_E_INVALID;
    if (c && (index >= c->count || target > MAX_TARGET))
        result =
            fab_error(FAB_E_INVALID, "counter %u of a block of %u, target %llu (limit %llu)", index,
                      c->count, (unsigned long long)target, (unsigned long long)MAX_TARGET);
    if (!result) {
        fab_lock(e);
        result = !fab_slot_live(c)
                     ? fab_error(FAB_E_CLOSED, "the counter was closed")
                     : fab_watch_cell(e, queue, c->first + index, target, peers, peer_count, tag);
        fab_unlock(e);
        if (result > 0)
            fab_rouse(e);
    }
    if (c)
        put_counter(e, c);
    fab_leave(e);
    return result;
}
