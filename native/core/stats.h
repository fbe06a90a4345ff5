/* What an engine counts and times.
 *
 * A transfer's time runs from its submission to its end, and is kept by FAB_OP_* in histograms, if it
 * was done; one that failed is counted by its code. The clock is read once for a transfer, at
 * submission: all else that happens to it happens in a turn, whose time is known. But on `local` a
 * short write ends before its submission returns, in less time than a few looks at the clock take.
 * Where they do, one of 64 is timed, and the others count as that one. Functions need the progress
 * lock unless they say otherwise.
 */
#ifndef FAB_STATS_H
#define FAB_STATS_H

#include "engine.h"
#include "trace.h"

#define FAB_SHORT_BYTES 16384 /* what is copied in about a microsecond */
#define FAB_UNTIMED 63        /* short transfers in a row that count as the one before them */

void fab_stats_note_submitted(struct fab_engine *e, struct fab_transfer *t, bool left);
void fab_stats_note_posted(struct fab_transfer *t);
void fab_stats_ended(struct fab_engine *e, struct fab_transfer *t, uint32_t state);
/* A session is up over these lanes. */
void fab_stats_lanes(struct fab_peer *p);
/* The peer's entry is given back: its NICs keep what they have carried. */
void fab_stats_forget(struct fab_peer *p);
uint64_t fab_stats_peer_pieces(const struct fab_peer *p);
uint32_t fab_bucket(uint64_t ns);

/* A transfer without a record took so long, all of it. */
void fab_stats_timed(struct fab_timing *timing, int64_t ns);

/* Before a transfer is started by its submitter. */
static inline void fab_stats_submit(struct fab_engine *e, struct fab_transfer *t)
{
    struct fab_timing *timing = &e->timing[t->op];
    e->submitting = true;
    if (timing->quick && timing->untimed < FAB_UNTIMED && t->length <= FAB_SHORT_BYTES &&
        t->count == 1 && !e->trace)
        timing->untimed++;
    else
        t->submitted = e->now = fab_now();
}

/* After that. `left`: it has not ended. */
static inline void fab_stats_submitted(struct fab_engine *e, struct fab_transfer *t, bool left)
{
    e->submitting = false;
    if (left || t->submitted)
        fab_stats_note_submitted(e, t, left);
}

/* The first of a transfer was posted. */
static inline void fab_stats_posted(struct fab_engine *e, struct fab_transfer *t)
{
    t->posted = true;
    if (t->submitted || t->parent || fab_tracing(e))
        fab_stats_note_posted(t);
}

/* Of work requests: one ended, and with it `bytes` of a range. */
static inline void fab_stats_acknowledged(struct fab_peer *p, const struct fab_lane *lane,
                                          uint64_t bytes)
{
    struct fab_lane_counts *counts = &p->counts[lane->number];
    counts->tx_pieces++;
    counts->tx_bytes += bytes;
}

#endif
