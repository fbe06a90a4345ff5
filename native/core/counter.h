/* Counters: ids, sums, early arrivals, void ids.
 *
 * Invariants (ARCHITECTURE.md, "Counting"): a cell's sum only grows while it is open; an immediate
 * whose generation is not the slot's is dropped and counted as stale; counts of user ids that
 * nobody opened yet are kept, charged to the peer that sent them, up to FAB_MAX_EARLY_IDS ids; a
 * void cell stays void until its id is released. All functions need the progress lock.
 */
#ifndef FAB_COUNTER_H
#define FAB_COUNTER_H

#include "engine.h"

#define FAB_ID_ENGINE_BIT (1u << 27)
#define FAB_ID_MASK 0x0fffffffu

int fab_counters_init(struct fab_engine *e);
void fab_counters_fini(struct fab_engine *e);
/* `times` immediates `imm` arrived from `peer`. */
void fab_count(struct fab_engine *e, struct fab_peer *peer, uint32_t imm, uint32_t times);
/* `peer` says that ranges under `id` will never be complete. */
void fab_void_id(struct fab_engine *e, struct fab_peer *peer, uint32_t id);
/* Sets the error that says why the cell is void, and returns its code. */
int fab_void_error(const struct fab_cell *cell);
/* What its session made void for others is over; what it counted too early to be kept is dropped. */
void fab_counters_end_session(struct fab_engine *e, struct fab_peer *peer);
/* Its early arrivals are dropped, save under ids that others counted under as well: those stay, charged to
 * its place in the table of peers. */
void fab_counters_forget_peer(struct fab_engine *e, struct fab_peer *peer);

#endif
