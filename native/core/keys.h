/* Keys that fence.
 *
 * Some NICs cannot stop one peer alone: its writes come to an endpoint that all peers share, and
 * closing its lane stops nothing (fab_nic.fences is false; EFA). There a peer is fenced by its keys.
 * A region's own registration admits no peer. Each peer that is granted the region gets one of its
 * own, and one of the doorbell for each lane; what it could write with is taken back before its
 * session counts as over, and nobody else notices. So also an immediate without bytes cannot come
 * late. Functions need the progress lock.
 */
#ifndef FAB_KEYS_H
#define FAB_KEYS_H

#include "engine.h"

/* The peer's keys to the region, one for each NIC of this engine, made where they are not there yet;
 * *count is 0 where keys are no fence: the descriptor's are valid then. 0, or a negative errno. */
int fab_keys_give(struct fab_peer *peer, struct fab_region *region, const fab_key **keys,
                  uint32_t *count);
/* The doorbell of the peer's lane; *key is valid when 0 is returned. */
int fab_keys_bell(struct fab_peer *peer, uint32_t lane, fab_key *key);
/* Takes back everything that the peer was given. False: a NIC did not let go yet; call again. */
bool fab_keys_revoke(struct fab_peer *peer);
/* Takes back everything about a region. 0, or a negative errno with *nic set. */
int fab_keys_forget_region(struct fab_engine *e, struct fab_region *region, struct fab_nic **nic);

#endif
