/* Messages: small two-sided payloads, in order per peer, over the control frames.
 *
 * A message of up to 64 KiB is cut into fragments of at most 4 KiB, numbered through the session.
 * A peer may have FAB_MESSAGE_FRAMES fragments that its receiver's application has not taken yet:
 * the receiver grants by number (`limit` of ACK), so a burst waits at the sender and never
 * overruns anything. Fragments may arrive in any order inside that window. A send is done when
 * the receiver's engine holds all of it. Functions need the progress lock.
 */
#ifndef FAB_MESSAGE_H
#define FAB_MESSAGE_H

#include "engine.h"

void fab_messages_begin_session(struct fab_peer *peer);
void fab_messages_end_session(struct fab_peer *peer);
void fab_messages_fini(struct fab_engine *e);
/* Starts a transfer of kind FAB_K_MESSAGE. */
void fab_message_start(struct fab_peer *peer, struct fab_transfer *t);
/* Sends what credit allows. Returns how many fragments went out. */
int fab_message_post(struct fab_peer *peer);
bool fab_message_send_ack(struct fab_peer *peer);
void fab_message_on_fragment(struct fab_peer *peer, struct fab_reader *r);
void fab_message_on_ack(struct fab_peer *peer, struct fab_reader *r);

#endif
