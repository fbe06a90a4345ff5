/* A trace: what happened to transfers, lanes, peers and counters, as the last so many events.
 *
 * Off unless somebody asked for it, at the price of one branch. The ring is bounded; when it is full
 * the oldest events make room, and are counted. Functions need the progress lock unless they say
 * otherwise.
 */
#ifndef FAB_TRACE_H
#define FAB_TRACE_H

#include "engine.h"

void fab_trace_add_transfer(struct fab_engine *e, const struct fab_transfer *t, int what);
void fab_trace_add_peer(struct fab_peer *p, int what, uint32_t lane, int code, const char *text);
void fab_trace_count(struct fab_engine *e, uint32_t id, uint64_t value);
void fab_trace_free(struct fab_engine *e);

static inline bool fab_tracing(const struct fab_engine *e)
{
    return __builtin_expect(e->trace != NULL, 0);
}

/* A scatter or barrier tells of its submission and its end only: the rest is its parts'. */
static inline void fab_trace_transfer(struct fab_engine *e, const struct fab_transfer *t, int what)
{
    if (fab_tracing(e))
        fab_trace_add_transfer(e, t, what);
}

static inline void fab_trace_peer(struct fab_peer *p, int what, const char *text)
{
    if (fab_tracing(p->engine))
        fab_trace_add_peer(p, what, 0, 0, text);
}

static inline void fab_trace_lane(struct fab_peer *p, uint32_t lane, uint32_t state,
                                  const char *text)
{
    if (fab_tracing(p->engine))
        fab_trace_add_peer(p, FAB_TRACE_LANE, lane, (int)state, text);
}

#endif
