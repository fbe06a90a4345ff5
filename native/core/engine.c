/* An engine's life: open, close, free, and what a fork does to it.
 *
 * Order of the end: fab_engine_close() lets transfers drain, says goodbye to every peer, closes
 * their lanes, stops the worker, closes the NICs. Memory from fab_region_alloc() stays mapped until
 * fab_engine_free(), since views of it may still be around. Calls that are under way when an engine
 * closes return FAB_E_CLOSED; fab_engine_free() waits for them.
 */
#include "engine.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "counter.h"
#include "handshake.h"
#include "memory.h"
#include "message.h"
#include "peer.h"
#include "post.h"
#include "remote.h"
#include "session.h"
#include "sink.h"
#include "trace.h"
#include "watch.h"
#include "worker.h"

#ifndef FAB_VERSION /* the build passes the package's */
#define FAB_VERSION "unknown"
#endif
#define MAX_COUNTER_HANDLES (FAB_MAX_COUNTERS + FAB_MAX_USER_IDS)
#define DEFAULT_PEER_TIMEOUT_NS (10 * NS_PER_S)
#define DEFAULT_CLOSE_NS (5 * NS_PER_S)
#define CLOSE_LANES_TRIES 100 /* of a millisecond each, for peers inside a write */

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fab_engine *all_engines;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

const char *fab_version(void)
{
    return FAB_VERSION;
}

int fab_enter(struct fab_engine *e)
{
    if (atomic_load_explicit(&e->forked, memory_order_relaxed))
        return fab_error(FAB_E_CLOSED, "this engine belongs to the parent process; "
                                       "open one of your own after the fork");
    atomic_fetch_add_explicit(&e->calls, 1, memory_order_acquire);
    if (!atomic_load_explicit(&e->closed, memory_order_acquire))
        return 0;
    fab_leave(e);
    return fab_error(FAB_E_CLOSED, "the engine is closed");
}

void fab_leave(struct fab_engine *e)
{
    atomic_fetch_sub_explicit(&e->calls, 1, memory_order_release);
}

/* ---- fork ---- */

static void before_fork(void)
{
    pthread_mutex_lock(&all_lock);
}

static void after_fork_parent(void)
{
    pthread_mutex_unlock(&all_lock);
}

/* What else of ours the child holds open. */
static void close_shared(struct fab_engine *e)
{
    for (uint32_t i = 0; i < atomic_load(&e->regions.touched); i++) {
        struct fab_region *r = fab_slot_at(&e->regions, i);
        if (r->memfd >= 0 && fab_slot_live(r) && !r->origin)
            close(r->memfd);
    }
    for (uint32_t i = 0; i < atomic_load(&e->queues.touched); i++) {
        struct fab_queue *q = fab_slot_at(&e->queues, i);
        if (fab_slot_live(q))
            close(q->fd);
    }
}

/* The child has no worker, and must not keep our sockets alive after we die. */
static void after_fork_child(void)
{
    for (struct fab_engine *e = all_engines; e; e = e->all_next) {
        atomic_store(&e->forked, true);
        for (uint32_t i = 0; i < e->nic_count; i++)
            e->nics[i]->provider->after_fork(e->nics[i]);
        close(e->wake_fd);
        close_shared(e);
    }
    all_engines = NULL;
    pthread_mutex_unlock(&all_lock);
}

static void install_fork_handlers(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

static void join_all(struct fab_engine *e)
{
    pthread_once(&fork_once, install_fork_handlers);
    pthread_mutex_lock(&all_lock);
    e->all_next = all_engines;
    all_engines = e;
    pthread_mutex_unlock(&all_lock);
}

bool fab_no_engines(void)
{
    pthread_mutex_lock(&all_lock);
    bool none = !all_engines;
    pthread_mutex_unlock(&all_lock);
    return none;
}

static void leave_all(struct fab_engine *e)
{
    pthread_mutex_lock(&all_lock);
    struct fab_engine **link = &all_engines;
    while (*link && *link != e)
        link = &(*link)->all_next;
    if (*link)
        *link = e->all_next;
    pthread_mutex_unlock(&all_lock);
}

/* ---- open ---- */

static int open_nic(struct fab_engine *e, const struct fab_provider *provider, const char *name)
{
    if (e->nic_count == FAB_MAX_NICS)
        return fab_error(FAB_E_INVALID, "more than %d NICs", FAB_MAX_NICS);
    struct fab_nic_options options = {.name = name,
                                      .sink = &fab_core_sink,
                                      .engine = e,
                                      .index = e->nic_count,
                                      .engine_id = e->id,
                                      .peer_timeout_ns = e->config.peer_timeout_ns,
                                      .turn = fab_engine_turn};
    int rc = provider->nic_open(&options, &e->nics[e->nic_count]);
    if (rc)
        return fab_error_why(rc == -EINVAL ? FAB_E_INVALID : FAB_E_UNAVAILABLE, rc,
                             "provider %s, NIC %s", provider->name, name ? name : "(any)");
    e->step = provider->step;
    e->quick |= provider->post_now != NULL;
    fab_nic_stats *stats = &e->nic_stats[e->nic_stats_count++];
    memcpy(stats->name, e->nics[e->nic_count]->info.name, sizeof stats->name);
    e->nic_count++;
    return 0;
}

/* The NICs of one provider: those named, or its first. `local` has one, which needs no naming. */
static int open_provider(struct fab_engine *e, const char *name, const fab_engine_config *c)
{
    const struct fab_provider *provider = fab_provider_named(name);
    if (!provider)
        return fab_error(
            FAB_E_INVALID,
            "unknown provider \"%s\"; there are local, tcp, efa, verbs, rxm, sim, auto", name);
    if (provider->kind == FAB_KIND_LOCAL || !c->nic_count)
        return open_nic(e, provider, NULL);
    int rc = 0;
    for (uint32_t i = 0; !rc && i < c->nic_count; i++)
        rc = open_nic(e, provider, c->nics[i]);
    return rc;
}

/* "auto": local, and the best network provider that opens here. */
static int open_auto(struct fab_engine *e, const fab_engine_config *c)
{
    static const char *const networks[] = {"efa", "verbs", "tcp"};
    int rc = open_provider(e, "local", c);
    for (size_t i = 0; !rc && i < sizeof networks / sizeof *networks; i++) {
        uint32_t before = e->nic_count;
        if (!open_provider(e, networks[i], c) || e->nic_count > before)
            return 0;
        fab_log(FAB_LOG_INFO, "auto: %s", fab_error_text());
    }
    return rc;
}

static int open_listed(struct fab_engine *e, const fab_engine_config *c)
{
    char list[FAB_TEXT_MAX], *save = NULL;
    if (snprintf(list, sizeof list, "%s", c->provider) >= (int)sizeof list)
        return fab_error(FAB_E_INVALID, "the list of providers is too long");
    int rc = 0;
    for (char *name = strtok_r(list, ",", &save); name && !rc; name = strtok_r(NULL, ",", &save))
        rc = open_provider(e, name, c);
    return !rc && !e->nic_count ? fab_error(FAB_E_INVALID, "no provider was named") : rc;
}

static int check_config(const fab_engine_config *c)
{
    if (c->secret_len > FAB_MAX_SECRET || !c->secret != !c->secret_len)
        return fab_error(FAB_E_INVALID, "a shared secret of %u bytes; 1 to %d are possible",
                         c->secret_len, FAB_MAX_SECRET);
    if (c->nic_count > FAB_MAX_NICS)
        return fab_error(FAB_E_INVALID, "%u NICs; the limit is %d", c->nic_count, FAB_MAX_NICS);
    if (c->spin_us > 1000000)
        return fab_error(FAB_E_INVALID, "spin_us is %u; the limit is a second", c->spin_us);
    if (c->peer_timeout_ns < 0 || (c->peer_timeout_ns && c->peer_timeout_ns < 50 * NS_PER_MS))
        return fab_error(FAB_E_INVALID, "peer_timeout is %.3f s; at least 0.05 s is needed",
                         (double)c->peer_timeout_ns / 1e9);
    if (c->cpu >= CPU_SETSIZE)
        return fab_error(FAB_E_INVALID, "CPU %d is out of range", c->cpu);
    return 0;
}

static void take_config(struct fab_engine *e, const fab_engine_config *c)
{
    e->config = *c;
    if (!e->config.peer_timeout_ns)
        e->config.peer_timeout_ns = DEFAULT_PEER_TIMEOUT_NS;
    if (c->secret_len)
        memcpy(e->secret, c->secret, c->secret_len);
    e->config.provider = NULL; /* what the caller owns is not ours to keep */
    e->config.nics = NULL;
    e->config.secret = NULL;
    e->config.label = NULL;
    if (c->label) {
        fab_text(e->label, sizeof e->label, "%s", c->label);
    } else {
        char host[FAB_NAME_MAX - 16] = "";
        gethostname(host, sizeof host - 1);
        fab_text(e->label, sizeof e->label, "%s:%d", host, (int)getpid());
    }
}

static int init_tables(struct fab_engine *e)
{
    int rc = fab_slots_init(&e->transfers, sizeof(struct fab_transfer), FAB_MAX_TRANSFERS);
    rc |= fab_slots_init(&e->regions, sizeof(struct fab_region), FAB_MAX_REGIONS);
    rc |= fab_slots_init(&e->imports, sizeof(struct fab_import), FAB_MAX_REMOTES);
    rc |= fab_slots_init(&e->counters, sizeof(struct fab_counter), MAX_COUNTER_HANDLES);
    rc |= fab_slots_init(&e->peers, sizeof(struct fab_peer), FAB_MAX_PEERS);
    rc |= fab_slots_init(&e->queues, sizeof(struct fab_queue), FAB_MAX_QUEUES);
    rc |= fab_slots_init(&e->watches, sizeof(struct fab_watch), FAB_MAX_WATCHES);
    rc |= fab_counters_init(e);
    e->commands = fab_table_alloc(FAB_COMMANDS, sizeof *e->commands);
    e->barred = fab_table_alloc(FAB_BARRED, sizeof *e->barred);
    e->newcomers = calloc(FAB_NEWCOMERS, sizeof *e->newcomers);
    e->message_watch = FAB_NO_WATCH;
    if (rc || !e->commands || !e->barred || !e->newcomers)
        return fab_error(FAB_E_SYSTEM, "out of memory for the engine's tables");
    for (uint64_t i = 0; i < FAB_COMMANDS; i++)
        atomic_init(&e->commands[i].turn, i);
    return 0;
}

/* Without the lock: nobody else is in the engine, not yet or not any more. */
static void close_nics(struct fab_engine *e)
{
    fab_regions_unregister(e);
    fab_lock(e);
    for (uint32_t i = 0; i < e->nic_count; i++)
        e->nics[i]->provider->nic_close(e->nics[i]);
    e->nic_count = 0;
    fab_unlock(e);
}

static void fini_tables(struct fab_engine *e)
{
    uint32_t touched = atomic_load(&e->peers.touched);
    for (uint32_t i = 0; i < touched; i++)
        fab_session_abandon(fab_slot_at(&e->peers, i));
    fab_messages_fini(e);
    fab_remotes_fini(e);
    fab_regions_fini(e);
    fab_queues_fini(e);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        free(p->nics);
        free(p->voids);
        free(p->held_voids);
    }
    touched = atomic_load(&e->transfers.touched);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_transfer *t = fab_slot_at(&e->transfers, i);
        free(t->pages);
        free(t->bytes);
    }
    struct fab_slots *all[] = {&e->transfers, &e->regions, &e->imports, &e->counters,
                               &e->peers,     &e->queues,  &e->watches};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fab_slots_fini(all[i]);
    fab_counters_fini(e);
    fab_trace_free(e);
    fab_table_free(e->commands, FAB_COMMANDS, sizeof *e->commands);
    fab_table_free(e->barred, FAB_BARRED, sizeof *e->barred);
    free(e->newcomers);
}

static int open_parts(struct fab_engine *e, const fab_engine_config *c)
{
    int rc = init_tables(e);
    if (!rc && (fab_random(e->id, sizeof e->id) || fab_random(e->cookie_key, sizeof e->cookie_key)))
        rc = fab_error(FAB_E_SYSTEM, "getrandom: %s", strerror(errno));
    e->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (!rc && e->wake_fd < 0)
        rc = fab_error(FAB_E_SYSTEM, "eventfd: %s", strerror(errno));
    if (!rc)
        rc = !c->provider || !strcmp(c->provider, "auto") ? open_auto(e, c) : open_listed(e, c);
    if (!rc)
        rc = fab_doorbell_open(e);
    e->now = fab_now();
    if (!rc)
        rc = fab_worker_start(e);
    return rc;
}

fab_engine *fab_engine_open(const fab_engine_config *c)
{
    if (check_config(c))
        return NULL;
    struct fab_engine *e = calloc(1, sizeof *e);
    if (!e) {
        fab_error(FAB_E_SYSTEM, "out of memory");
        return NULL;
    }
    pthread_mutex_init(&e->lock, NULL);
    take_config(e, c);
    if (!open_parts(e, c)) {
        join_all(e);
        return e;
    }
    close_nics(e);
    fab_close_fd(e->wake_fd);
    fini_tables(e);
    pthread_mutex_destroy(&e->lock);
    free(e);
    return NULL;
}

/* ---- close ---- */

static int all_quiet(struct fab_engine *e, void *arg)
{
    (void)arg;
    bool quiet = true;
    fab_lock(e);
    uint32_t touched = atomic_load(&e->peers.touched);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        quiet &= !p->queue.head && !p->inflight.head && !p->sending.head && !p->sent.head &&
                 !p->void_count;
    }
    fab_unlock(e);
    return quiet;
}

static bool sessions_over(struct fab_engine *e)
{
    bool over = true;
    uint32_t touched = atomic_load(&e->peers.touched);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        fab_session_end(p, FAB_E_UNREACHABLE, "the engine was closed", true);
        fab_session_tick(p); /* closes the lanes of one that is fencing */
        over &= atomic_load(&p->state) != FAB_P_FENCING;
    }
    return over;
}

static void end_sessions(struct fab_engine *e)
{
    for (int i = 0; i < CLOSE_LANES_TRIES; i++) {
        fab_lock(e);
        e->now = fab_now();
        fab_handshake_close_dropped(e);
        bool over = sessions_over(e) && !e->dropped_count;
        fab_unlock(e);
        if (over)
            return;
        fab_pause(e, NS_PER_MS);
    }
    fab_log(FAB_LOG_WARN,
            "closed while a peer was inside a write, or a lane being connected: its NIC ends it");
}

int fab_engine_close(fab_engine *e, int64_t timeout)
{
    if (atomic_load(&e->forked) || atomic_exchange(&e->closing, true))
        return 0;
    fab_wait(e, all_quiet, NULL, timeout < 0 ? DEFAULT_CLOSE_NS : timeout);
    end_sessions(e);
    fab_lock(e);
    fab_watches_close(e);
    atomic_store_explicit(&e->closed, true, memory_order_release);
    e->dirty = true;
    fab_unlock(e);
    fab_worker_stop(e);
    leave_all(e);
    while (atomic_load_explicit(&e->calls, memory_order_acquire)) {
        fab_lock(e); /* waiters leave as soon as they see `closed` */
        e->dirty = true;
        fab_unlock(e);
        fab_pause(e, 100 * NS_PER_US);
    }
    close_nics(e);
    close(e->wake_fd);
    return 0;
}

void fab_engine_free(fab_engine *e)
{
    if (!e || atomic_load(&e->forked)) /* in a forked child nothing may be touched */
        return;
    fab_engine_close(e, 0);
    fini_tables(e);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* ---- what it tells ---- */

int fab_engine_get_info(fab_engine *e, fab_engine_info *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->id, e->id, sizeof out->id);
    memcpy(out->label, e->label, sizeof out->label);
    out->nic_count = e->nic_count;
    out->closed = atomic_load(&e->closed) || atomic_load(&e->forked);
    return 0;
}

int fab_engine_nic(fab_engine *e, uint32_t index, fab_nic_info *out)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    int rc = 0;
    if (index < e->nic_count)
        *out = e->nics[index]->info;
    else
        rc = fab_error(FAB_E_INVALID, "NIC %u of %u", index, e->nic_count);
    fab_leave(e);
    return rc;
}

int fab_list_nics(const char *provider, fab_nic_info *out, uint32_t max)
{
    const struct fab_provider *p = fab_provider_named(provider);
    if (!p)
        return fab_error(FAB_E_INVALID, "unknown provider \"%s\"", provider);
    int n = p->list(out, max);
    return n > 0 ? n : fab_error_why(FAB_E_UNAVAILABLE, n ? n : -ENODEV, "%s", provider);
}

/* ---- disconnect ---- */

struct leaving {
    struct fab_peer *peer;
    uint32_t losses; /* before: a new session may begin before we look */
};

static int session_is_over(struct fab_engine *e, void *arg)
{
    (void)e;
    const struct leaving *l = arg;
    uint32_t state = atomic_load_explicit(&l->peer->state, memory_order_acquire);
    return state == FAB_P_IDLE || state == FAB_P_DEAD ||
           atomic_load_explicit(&l->peer->losses, memory_order_acquire) != l->losses;
}

int fab_disconnect(fab_engine *e, int64_t peer, int64_t timeout)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    struct fab_peer *p = fab_peer_get(e, peer);
    int rc = p ? 0 : FAB_E_INVALID;
    if (p) {
        fab_lock(e);
        e->now = fab_now();
        struct leaving leaving = {p, atomic_load(&p->losses)};
        fab_random(&p->fence, sizeof p->fence);
        fab_bar(e, p);
        fab_session_end(p, FAB_E_UNREACHABLE, "disconnected", true);
        fab_unlock(e);
        rc = fab_wait(e, session_is_over, &leaving,
                      timeout < 0 ? e->config.peer_timeout_ns : timeout);
        if (rc == 1)
            rc = p->no_fence ? fab_error(FAB_E_FENCE_UNSUPPORTED,
                                         "provider %s cannot fence %s alone: writes it began may "
                                         "still land",
                                         p->provider->name, p->label)
                             : 0;
        else if (rc == FAB_E_TIMEOUT)
            rc = fab_error(FAB_E_FENCE_PENDING,
                           "%s may still be inside a write; its regions stay "
                           "registered. Call again, or wait until it dies",
                           p->label);
        fab_peer_put(e, p);
    }
    fab_leave(e);
    return rc;
}
