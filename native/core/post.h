/* From ranges to work requests: shares, chains, windows, acknowledgements.
 *
 * A transfer's ranges are cut into shares, one for each lane that takes part; a share is numbered
 * work requests, posted in order. Work request `n` of a share is part `n % per_range` of range
 * `n / per_range`; the last part of a range carries the immediate. Where a lane keeps no order, the
 * last part waits until the earlier ones of its share were acknowledged. Functions need the
 * progress lock.
 */
#ifndef FAB_POST_H
#define FAB_POST_H

#include "engine.h"

/* Puts a transfer on its peer's queue; the peer's session is UP or will be. */
void fab_post_enqueue(struct fab_transfer *t);
/* Posts what windows allow, messages included. Returns how many things were posted. */
int fab_post_peer(struct fab_peer *peer);
/* sink->completed */
void fab_post_completed(struct fab_lane *lane, uint64_t wr_id, int status);
/* A lane of the peer is closed: what it did not begin goes to others. */
void fab_post_lane_gone(struct fab_peer *peer, uint32_t lane, const char *text);
/* The session is over: every transfer to the peer drains. */
void fab_transfers_fail_peer(struct fab_peer *peer, int code, const char *text);
/* The peer is fenced: what waited for that ends. */
void fab_transfers_settle_peer(struct fab_peer *peer);
void fab_transfers_check_deadlines(struct fab_peer *peer);

#endif
