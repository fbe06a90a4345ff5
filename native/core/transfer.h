/* Transfers: slots, checks at submission, and the one end each has.
 *
 * State machine and invariants T1 to T5: ARCHITECTURE.md, "Transfer". A slot has two references
 * besides the transient ones: the user's handle, until fab_transfer_release(), and the engine's,
 * until the end. Functions need the progress lock unless they say otherwise.
 */
#ifndef FAB_TRANSFER_H
#define FAB_TRANSFER_H

#include "engine.h"

/* From the command ring, or inline by the submitter. */
void fab_transfer_start(struct fab_engine *e, struct fab_transfer *t);
void fab_transfer_do_cancel(struct fab_engine *e, struct fab_transfer *t);
/* All its ranges are acknowledged. */
void fab_transfer_done(struct fab_transfer *t);
/* Goes to DRAINING with this reason; ends at once when nothing is outstanding. The first reason
 * is kept. */
void fab_transfer_fail(struct fab_transfer *t, int code, const char *text);
/* Ends a draining transfer whose work requests have all been reported. */
void fab_transfer_settle(struct fab_transfer *t);
void fab_transfer_put(struct fab_engine *e, struct fab_transfer *t);

void fab_list_append(struct fab_list *list, struct fab_transfer *t);
void fab_list_remove(struct fab_transfer *t); /* from the list it is on, if any */

#endif
