/* The lanes of a peer: which of them work, what becomes of one that breaks, how it comes back
 * (ARCHITECTURE.md, "Lane").
 *
 * A session lives as long as one of its lanes does. What is outstanding on a lane that breaks
 * fails, with the NIC's name; what was not begun goes to the others; control frames go over any
 * lane that works. Only providers that say so (`repairs`) have this: with the others the session
 * ends with its first lane. All functions need the progress lock. Like sessions, lanes are closed
 * only between turns of the provider: what a sink function finds out is noted, and carried out by
 * fab_lanes_serve().
 */
#ifndef FAB_LANES_H
#define FAB_LANES_H

#include "engine.h"

#define FAB_LANE_RETRY_NS (NS_PER_S / 4) /* between attempts to open a lane again; doubled each */
#define FAB_LANE_TRIES 8 /* then only when a NIC comes back, or beside other business */
#define FAB_LANE_STABLE_NS (10 * NS_PER_S) /* a lane that was up so long starts counting anew */

/* A session begins with the lanes that the handshake opened, or ends. Only the one that the
 * handshake took is known to work; the others have to prove it. */
void fab_lanes_begin(struct fab_peer *p);
/* The session is over, and its lanes are closed. */
void fab_lanes_close(struct fab_peer *p, const char *why);
void fab_lanes_forget(struct fab_peer *p);
/* The handshake told the speed of the peer's NICs (Mbit/s, 0: unknown), in lane order. */
void fab_lanes_weigh(struct fab_peer *p, const uint32_t *speeds);

/* The lane that control frames take; NULL: there is none. */
struct fab_lane *fab_lane_for_frames(const struct fab_peer *p);
bool fab_lane_works(const struct fab_peer *p, uint32_t i);
/* Picks up to `most` lanes that work for a transfer, in turns by weight. Returns how many. */
uint32_t fab_lanes_pick(struct fab_peer *p, uint32_t most, uint32_t out[FAB_MAX_LANES],
                        uint32_t weights[FAB_MAX_LANES]);

/* The lane is unusable. Ends the session where it was the last. */
void fab_lane_broke(struct fab_lane *lane, const char *text);
/* sink->frame_lost and sink->nic_state */
void fab_lane_frame_lost(struct fab_lane *lane, const uint8_t *bytes, uint32_t length);
void fab_lanes_nic_state(struct fab_nic *nic, const char *text);

/* Closes broken lanes and sends what is due about them. Returns how many things happened. */
int fab_lanes_serve(struct fab_peer *p);
/* Opens lanes again; gives up attempts, and lanes that are silent while others are not: a device may
 * retransmit for ever. */
void fab_lanes_tick(struct fab_peer *p);
/* Lanes that broke are not closed yet. */
bool fab_lanes_closing(const struct fab_peer *p);
/* A frame of the session came over this lane. */
void fab_lanes_heard(struct fab_peer *p, const struct fab_lane *lane);
/* An immediate or a completion did. */
void fab_lane_alive(struct fab_lane *lane);
bool fab_lanes_have_business(const struct fab_peer *p);

void fab_lanes_on_down(struct fab_peer *p, struct fab_reader *r);
void fab_lanes_on_open(struct fab_peer *p, struct fab_reader *r);
void fab_lanes_on_opened(struct fab_peer *p, struct fab_reader *r);
void fab_lanes_on_ready(struct fab_peer *p, struct fab_reader *r);
void fab_lanes_on_wanted(struct fab_peer *p, struct fab_reader *r);
void fab_lanes_on_probe(struct fab_peer *p, struct fab_reader *r);

#endif
