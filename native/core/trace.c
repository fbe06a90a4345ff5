/* The trace; its contract is in trace.h. */
#include "trace.h"

#include <stdlib.h>
#include <string.h>

#include "worker.h"

struct fab_trace {
    uint64_t head, tail; /* taken, and ever added; what lies between is in the ring */
    uint64_t lost;       /* since the last look */
    uint32_t room;
    fab_trace_event *events;
};

/* The next place, cleared. */
static fab_trace_event *next(struct fab_engine *e, int what)
{
    struct fab_trace *trace = e->trace;
    if (trace->tail - trace->head == trace->room) {
        trace->head++;
        trace->lost++;
    }
    fab_trace_event *event = &trace->events[trace->tail++ % trace->room];
    memset(event, 0, sizeof *event);
    event->time = fab_now();
    event->what = what;
    event->imm = FAB_NO_IMM;
    return event;
}

static void name_peer(fab_trace_event *event, const struct fab_peer *p)
{
    memcpy(event->name, p->label, sizeof event->name);
}

void fab_trace_add_transfer(struct fab_engine *e, const struct fab_transfer *t, int what)
{
    const struct fab_transfer *whole = t->parent ? t->parent : t;
    fab_trace_event *event = next(e, what);
    event->transfer = fab_slot_handle(t);
    event->parent = t->parent ? fab_slot_handle(t->parent) : 0;
    event->op = (int32_t)whole->op;
    event->imm = t->imm;
    event->bytes = t->kind == FAB_K_PAGES ? t->length * t->count : t->length;
    event->ranges = what == FAB_TRACE_END ? t->acknowledged : t->count;
    event->code = what == FAB_TRACE_END ? t->code : 0;
    if (what == FAB_TRACE_SUBMIT && whole->submitted)
        event->time = whole->submitted;
    if (t->peer)
        name_peer(event, t->peer);
    fab_text(event->text, sizeof event->text, "%s", t->text);
}

void fab_trace_add_peer(struct fab_peer *p, int what, uint32_t lane, int code, const char *text)
{
    fab_trace_event *event = next(p->engine, what);
    name_peer(event, p);
    event->lane = lane;
    event->code = code;
    fab_text(event->text, sizeof event->text, "%s", text);
}

void fab_trace_count(struct fab_engine *e, uint32_t id, uint64_t value)
{
    if (!fab_tracing(e))
        return;
    fab_trace_event *event = next(e, FAB_TRACE_COUNT);
    event->imm = id;
    event->ranges = value;
}

void fab_trace_free(struct fab_engine *e)
{
    struct fab_trace *trace = e->trace;
    atomic_store(&e->traced, false);
    e->trace = NULL;
    if (trace)
        fab_table_free(trace->events, trace->room, sizeof *trace->events);
    free(trace);
}

/* ---- API ---- */

int fab_trace_begin(fab_engine *e, uint32_t events)
{
    if (!events || events > FAB_MAX_TRACE)
        return fab_error(FAB_E_INVALID, "a trace of %u events; 1 to %d are possible", events,
                         FAB_MAX_TRACE);
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int rc = 0;
    struct fab_trace *trace = calloc(1, sizeof *trace);
    if (trace)
        trace->events = fab_table_alloc(events, sizeof *trace->events);
    if (!trace || !trace->events) {
        free(trace);
        rc = fab_error(FAB_E_SYSTEM, "out of memory for a trace of %u events", events);
    } else {
        trace->room = events;
        fab_lock(e);
        bool taken = e->trace;
        if (!taken)
            e->trace = trace;
        atomic_store(&e->traced, true);
        fab_unlock(e);
        if (taken) {
            fab_table_free(trace->events, events, sizeof *trace->events);
            free(trace);
            rc = fab_error(FAB_E_INVALID, "the engine is being traced already");
        }
    }
    fab_leave(e);
    return rc;
}

/* Also of a closed engine: how it ended is part of the trace. */
static int refuse_forked(struct fab_engine *e)
{
    return atomic_load(&e->forked)
               ? fab_error(FAB_E_CLOSED, "the engine belongs to the parent process")
               : 0;
}

int fab_trace_read(fab_engine *e, fab_trace_event *out, uint32_t max, uint64_t *lost)
{
    *lost = 0;
    if (refuse_forked(e))
        return FAB_E_CLOSED;
    uint32_t n = 0;
    fab_lock(e);
    struct fab_trace *trace = e->trace;
    while (trace && n < max && trace->head < trace->tail)
        out[n++] = trace->events[trace->head++ % trace->room];
    if (trace) {
        *lost = trace->lost;
        trace->lost = 0;
    }
    fab_unlock(e);
    return trace ? (int)n : fab_error(FAB_E_INVALID, "the engine is not being traced");
}

int fab_trace_end(fab_engine *e)
{
    if (refuse_forked(e))
        return FAB_E_CLOSED;
    fab_lock(e);
    fab_trace_free(e);
    fab_unlock(e);
    return 0;
}
