/* Sessions: the handshake, liveness, and the end (ARCHITECTURE.md, "Session").
 *
 * All functions need the progress lock unless they say otherwise. None of them closes a lane from
 * within a sink function: what a sink function finds out is noted (fab_session_doom) and carried
 * out by fab_session_serve() later in the same turn.
 */
#ifndef FAB_SESSION_H
#define FAB_SESSION_H

#include "engine.h"

/* First use: IDLE or DEAD -> CONNECTING, which lifts the bar; or DEAD with the reason. */
void fab_session_start(struct fab_peer *peer);
/* Somebody here is told PeerUnreachable: what the peer has begun will not land (S9), and it stays out
 * until its address is used again (S6). */
void fab_session_told(struct fab_peer *peer);
/* The session is to end in this turn. The first reason is kept. */
void fab_session_doom(struct fab_peer *peer, int code, const char *text);
/* Ends a doomed session, and bars the peer if somebody here is told so. */
void fab_session_carry_out_doom(struct fab_peer *peer);
/* Ends it now: transfers drain, lanes are closed. */
void fab_session_end(struct fab_peer *peer, int code, const char *text, bool goodbye);
/* When the engine is freed: the lanes that could not be closed went with their NICs. */
void fab_session_abandon(struct fab_peer *peer);
/* Control frames that are due, retransmission, the end of doomed sessions. Returns how many
 * things happened. */
int fab_session_serve(struct fab_peer *peer);
/* Somebody comes: peers with whom there is no business are asked whether they are still there. */
void fab_session_doubt_idle(struct fab_engine *e);
/* Liveness and deadlines; every FAB_TICK_NS. */
void fab_session_tick(struct fab_peer *peer);
/* A frame on one of the peer's lanes; a first frame on none. */
void fab_session_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd);
void fab_session_hello(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                       uint32_t length);
void fab_session_origin_gone(struct fab_nic *nic, struct fab_origin *origin);
/* Carries out a VOID that had to wait. */
void fab_session_carry_out_voids(struct fab_peer *peer);
/* Sends one frame; true: it is on its way. */
bool fab_session_send(struct fab_peer *peer, struct fab_writer *w, const struct fab_mr *attach);
/* Admits newcomers, or has the application asked; refuses those that waited too long. */
int fab_newcomers_serve(struct fab_engine *e);
void fab_newcomers_tick(struct fab_engine *e);

#endif
