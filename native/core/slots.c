/* Handle tables; the contract is in slots.h. */
#include "slots.h"

#include <errno.h>
#include <sys/mman.h>

#define LIVE_BIT FAB_SLOT_LIVE
#define REF_MASK (LIVE_BIT - 1)
#define GENERATION_MASK 0x7fffffffu

void *fab_table_alloc(size_t items, size_t item_size)
{
    void *table = mmap(NULL, items * item_size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return table == MAP_FAILED ? NULL : table;
}

void fab_table_free(void *table, size_t items, size_t item_size)
{
    if (table)
        munmap(table, items * item_size);
}

int fab_slots_init(struct fab_slots *slots, size_t item_size, uint32_t capacity)
{
    slots->items = fab_table_alloc(capacity, item_size);
    slots->item_size = item_size;
    slots->capacity = capacity;
    atomic_init(&slots->free_head, 0);
    atomic_init(&slots->touched, 0);
    atomic_init(&slots->live, 0);
    return slots->items ? 0 : -ENOMEM;
}

void fab_slots_fini(struct fab_slots *slots)
{
    fab_table_free(slots->items, slots->capacity, slots->item_size);
    slots->items = NULL;
}

static struct fab_slot *pop_free(struct fab_slots *slots)
{
    uint64_t head = atomic_load_explicit(&slots->free_head, memory_order_acquire);
    while ((uint32_t)head) {
        struct fab_slot *slot = fab_slot_at(slots, (uint32_t)head - 1);
        uint64_t next = atomic_load_explicit(&slot->next_free, memory_order_relaxed);
        /* The tag makes a head that was popped and pushed meanwhile a different one. */
        uint64_t wanted = ((head >> 32) + 1) << 32 | next;
        if (atomic_compare_exchange_weak_explicit(&slots->free_head, &head, wanted,
                                                  memory_order_acq_rel, memory_order_acquire))
            return slot;
    }
    return NULL;
}

static struct fab_slot *take_fresh(struct fab_slots *slots)
{
    uint32_t index = atomic_load_explicit(&slots->touched, memory_order_relaxed);
    do {
        if (index == slots->capacity)
            return NULL;
    } while (!atomic_compare_exchange_weak_explicit(&slots->touched, &index, index + 1,
                                                    memory_order_acq_rel, memory_order_relaxed));
    struct fab_slot *slot = fab_slot_at(slots, index);
    slot->index = index;
    return slot;
}

void *fab_slot_alloc(struct fab_slots *slots)
{
    struct fab_slot *slot = pop_free(slots);
    if (!slot)
        slot = take_fresh(slots);
    if (!slot)
        return NULL;
    uint64_t word = atomic_load_explicit(&slot->word, memory_order_relaxed);
    uint64_t generation = word >> 32 & GENERATION_MASK;
    if (!generation)
        generation = 1;
    atomic_fetch_add_explicit(&slots->live, 1, memory_order_relaxed);
    atomic_store_explicit(&slot->word, generation << 32 | LIVE_BIT | 1, memory_order_release);
    return slot;
}

int64_t fab_slot_handle(const void *item)
{
    const struct fab_slot *slot = item;
    uint64_t word = atomic_load_explicit(&slot->word, memory_order_relaxed);
    return (int64_t)((word >> 32) << 32 | (slot->index + 1));
}

static bool is_named(uint64_t word, int64_t handle)
{
    return word >> 32 == (uint64_t)handle >> 32 && (word & LIVE_BIT);
}

void *fab_slot_get(struct fab_slots *slots, int64_t handle)
{
    struct fab_slot *slot = fab_slot_named(slots, handle);
    if (!slot)
        return NULL;
    uint64_t word = atomic_load_explicit(&slot->word, memory_order_acquire);
    do {
        if (!is_named(word, handle))
            return NULL;
    } while (!atomic_compare_exchange_weak_explicit(&slot->word, &word, word + 1,
                                                    memory_order_acq_rel, memory_order_acquire));
    return slot;
}

void fab_slot_ref(void *item)
{
    struct fab_slot *slot = item;
    atomic_fetch_add_explicit(&slot->word, 1, memory_order_relaxed);
}

bool fab_slot_kill(void *item)
{
    struct fab_slot *slot = item;
    return atomic_fetch_and_explicit(&slot->word, ~LIVE_BIT, memory_order_acq_rel) & LIVE_BIT;
}

bool fab_slot_kill_unused(void *item)
{
    struct fab_slot *slot = item;
    uint64_t word = atomic_load_explicit(&slot->word, memory_order_relaxed);
    if ((word & (LIVE_BIT | REF_MASK)) != (LIVE_BIT | 1))
        return false;
    return atomic_compare_exchange_strong_explicit(&slot->word, &word, word & ~LIVE_BIT,
                                                   memory_order_acq_rel, memory_order_relaxed);
}

bool fab_slot_put(void *item)
{
    struct fab_slot *slot = item;
    uint64_t word = atomic_fetch_sub_explicit(&slot->word, 1, memory_order_acq_rel) - 1;
    return !(word & LIVE_BIT) && !(word & REF_MASK);
}

bool fab_slot_live(const void *item)
{
    const struct fab_slot *slot = item;
    return atomic_load_explicit(&slot->word, memory_order_acquire) & LIVE_BIT;
}

void fab_slot_free(struct fab_slots *slots, void *item)
{
    struct fab_slot *slot = item;
    uint64_t generation = atomic_load_explicit(&slot->word, memory_order_relaxed) >> 32;
    generation = (generation + 1) & GENERATION_MASK;
    atomic_store_explicit(&slot->word, (generation ? generation : 1) << 32, memory_order_release);
    atomic_fetch_sub_explicit(&slots->live, 1, memory_order_relaxed);
    uint64_t head = atomic_load_explicit(&slots->free_head, memory_order_relaxed);
    uint64_t wanted;
    do {
        atomic_store_explicit(&slot->next_free, (uint32_t)head, memory_order_relaxed);
        wanted = ((head >> 32) + 1) << 32 | (slot->index + 1);
    } while (!atomic_compare_exchange_weak_explicit(&slots->free_head, &head, wanted,
                                                    memory_order_acq_rel, memory_order_relaxed));
}
