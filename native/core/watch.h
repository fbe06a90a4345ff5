/* Completion queues: what event loops wait on.
 *
 * A watch is put on a transfer, a counter or the message inbox, and posts exactly one event to its
 * queue, or none if it is taken back first. A queue has one eventfd; it is written when an event
 * comes while the queue is armed, and the queue is armed when a drain leaves it empty. A watch is
 * refused when its event might find no place, so a queue cannot overflow. All functions
 * need the progress lock.
 */
#ifndef FAB_WATCH_H
#define FAB_WATCH_H

#include "engine.h"

void fab_watch_cell_changed(struct fab_engine *e, struct fab_cell *cell);
void fab_watch_cell_closed(struct fab_engine *e, struct fab_cell *cell);
void fab_watch_transfer_ended(struct fab_engine *e, struct fab_transfer *t);
void fab_watch_message_came(struct fab_engine *e);
/* A peer's session is over, or its fence is stuck: watches that depend on it end with `code`. */
void fab_watch_peer_lost(struct fab_engine *e, struct fab_peer *peer, int code);
/* 0: holds already. */
int64_t fab_watch_cell(struct fab_engine *e, int64_t queue, uint32_t cell, uint64_t target,
                       const int64_t *peers, uint32_t peer_count, uint64_t tag);
/* The engine closes: every watch ends with FAB_E_CLOSED. */
void fab_watches_close(struct fab_engine *e);
void fab_queues_fini(struct fab_engine *e);

#endif
