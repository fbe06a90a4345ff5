/* Tables of things that handles name.
 *
 * A handle is `generation << 32 | index + 1`. Each item starts with a struct fab_slot, whose one
 * atomic word holds generation, a live bit and a reference count, so that a handle can be turned
 * into a pointer without any lock, and a stale one is refused. The item's memory is never given
 * back before the table is, so looking at a dead item is harmless.
 *
 * - fab_slot_alloc(): a live item with one reference, the owner's.
 * - fab_slot_get(): one more reference, or NULL when the handle is stale.
 * - fab_slot_kill(): from here on the handle is stale; references stay.
 * - fab_slot_put(): true when that was the last reference of a killed item: the caller then
 *   cleans it and calls fab_slot_free().
 */
#ifndef FAB_SLOTS_H
#define FAB_SLOTS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fab_slot {
    _Atomic uint64_t word;
    _Atomic uint32_t next_free; /* index + 1 */
    uint32_t index;
};

/* Zeroed memory for a table, whose pages cost nothing until they are touched. (calloc would hand out
 * memory of an engine that was closed, and touch all of it.) NULL: there is none. */
void *fab_table_alloc(size_t items, size_t item_size);
void fab_table_free(void *table, size_t items, size_t item_size);

struct fab_slots {
    uint8_t *items;
    size_t item_size;
    uint32_t capacity;
    _Atomic uint64_t free_head; /* tag << 32 | index + 1 */
    _Atomic uint32_t touched;   /* items ever used */
    _Atomic uint32_t live;
};

/* What of a word is said by its handle: the generation above, and this bit. */
#define FAB_SLOT_LIVE ((uint64_t)1 << 31)

int fab_slots_init(struct fab_slots *slots, size_t item_size, uint32_t capacity);
void fab_slots_fini(struct fab_slots *slots);
void *fab_slot_alloc(struct fab_slots *slots); /* NULL: full. The item past its slot is as left */
int64_t fab_slot_handle(const void *item);
void *fab_slot_get(struct fab_slots *slots, int64_t handle);
void fab_slot_ref(void *item);
bool fab_slot_kill(void *item); /* false: was dead already */
bool fab_slot_kill_unused(void *item); /* kills it only if the owner's reference is the last */
bool fab_slot_put(void *item);
void fab_slot_free(struct fab_slots *slots, void *item);
bool fab_slot_live(const void *item);

/* The item at an index below `touched`, live or not. */
static inline void *fab_slot_at(const struct fab_slots *slots, uint32_t index)
{
    return slots->items + (size_t)index * slots->item_size;
}

/* The slot that a handle names, which may be another one's by now. NULL: there never was such. */
static inline struct fab_slot *fab_slot_named(const struct fab_slots *slots, int64_t handle)
{
    uint32_t number = (uint32_t)handle;
    if (handle <= 0 || !number ||
        number > atomic_load_explicit(&slots->touched, memory_order_acquire))
        return NULL;
    return fab_slot_at(slots, number - 1);
}

/* As fab_slot_get, without a reference: for whoever holds the lock that items are killed under, and to
 * find out whether one was alive until now. */
static inline void *fab_slot_peek(const struct fab_slots *slots, int64_t handle)
{
    struct fab_slot *slot = fab_slot_named(slots, handle);
    if (!slot)
        return NULL;
    uint64_t word = atomic_load_explicit(&slot->word, memory_order_acquire);
    return word >> 32 == (uint64_t)handle >> 32 && (word & FAB_SLOT_LIVE) ? slot : NULL;
}

#endif
