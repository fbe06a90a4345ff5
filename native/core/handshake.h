/* The handshake: HELLO, CHALLENGE, WELCOME, READY, REFUSE (ARCHITECTURE.md, "Session" and "Who may
 * connect"). All functions need the progress lock. */
#ifndef FAB_HANDSHAKE_H
#define FAB_HANDSHAKE_H

#include "engine.h"

/* Retransmission and deadline of a session that is CONNECTING. */
void fab_handshake_tick(struct fab_peer *peer);
/* A handshake frame that came on a lane of the peer. */
void fab_handshake_frame(struct fab_peer *peer, const struct fab_header *header,
                         struct fab_reader *reader);
bool fab_handshake_send_welcome(struct fab_peer *peer);
/* Lanes of attempts that were given up and could not be closed at once. */
void fab_handshake_close_dropped(struct fab_engine *engine);
/* Both sides know each other: CONNECTING -> UP. */
void fab_handshake_up(struct fab_peer *peer);

#endif
