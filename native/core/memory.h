/* Regions: registered local memory, who was granted it, and how it is given back.
 *
 * State machine and invariants: ARCHITECTURE.md, "Region". A region's number on the wire is its
 * handle. Functions need the progress lock unless they say otherwise.
 */
#ifndef FAB_MEMORY_H
#define FAB_MEMORY_H

#include "engine.h"

/* Without the lock: a referenced region that is not closing, or NULL with the error set. */
struct fab_region *fab_region_get(struct fab_engine *e, int64_t handle);
void fab_region_put(struct fab_engine *e, struct fab_region *region);

void fab_memory_on_grant_request(struct fab_peer *peer, struct fab_reader *r);
int fab_memory_answer_grants(struct fab_peer *peer);
int fab_memory_ask_quiesce(struct fab_peer *peer);
void fab_memory_on_quiesced(struct fab_peer *peer, struct fab_reader *r);
/* The peer's session is over: it holds nothing any more. */
void fab_regions_forget_holder(struct fab_peer *peer);
/* sink->destination: memory of region `number` that the lane's peer may write to, or NULL. */
uint8_t *fab_memory_destination(struct fab_lane *lane, uint64_t number, uint64_t offset,
                                uint64_t length);
/* The engine closes: registrations go, memory stays until fab_regions_fini(). */
void fab_regions_unregister(struct fab_engine *e);
void fab_regions_fini(struct fab_engine *e);
int fab_doorbell_open(struct fab_engine *e);

#endif
