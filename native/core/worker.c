/* Turns, naps and sleep; the contract is in worker.h. */
#include "worker.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "handshake.h"
#include "peer.h"
#include "post.h"
#include "session.h"
#include "transfer.h"

#define SPINS_PER_YIELD 64
#define SPINS_PER_TURN 8 /* while nothing new is to be seen: what was left over goes on */
#define LOCK_TRIES 16 /* of a submitter, before it leaves its transfer to whoever has the lock */
#define GLANCES 64    /* between two turns of a worker that finds nothing */
#define BUSY_SLEEP_NS NS_PER_MS /* how soon to retry what a provider would not take */
#define IDLE_TICK_NS (2 * FAB_TICK_NS) /* between ticks while nothing else happens */
#define WAITING_TICK_NS (8 * FAB_TICK_NS)
#define HELPER_ARM_TRIES 8
#define GIVE_WAY_NS \
    (50 * NS_PER_MS) /* how long the worker lets somebody else have the lock first */
#define LATE_TICK_NS (100 * NS_PER_MS)

void fab_close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- futex on event_seq ---- */

static void futex_sleep(_Atomic uint32_t *word, uint32_t seen, int64_t ns)
{
    struct timespec t = {.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, ns < 0 ? NULL : &t, NULL, 0);
}

void fab_wake_waiters(struct fab_engine *e)
{
    atomic_fetch_add_explicit(&e->event_seq, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&e->sleepers, memory_order_seq_cst))
        syscall(SYS_futex, &e->event_seq, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* ---- the lock ---- */

bool fab_trylock(struct fab_engine *e)
{
    return !pthread_mutex_trylock(&e->lock);
}

void fab_lock(struct fab_engine *e)
{
    if (fab_trylock(e))
        return;
    atomic_fetch_add_explicit(&e->lock_wanted, 1, memory_order_seq_cst);
    pthread_mutex_lock(&e->lock);
    atomic_fetch_sub_explicit(&e->lock_wanted, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&e->lock_handed, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&e->giving_way, memory_order_seq_cst))
        syscall(SYS_futex, &e->lock_handed, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static int take_commands(struct fab_engine *e);

/* Unlocks; true: peers are left with something to do. */
static bool unlock_quietly(struct fab_engine *e)
{
    for (;;) {
        bool left = e->busy;
        if (e->dirty)
            fab_wake_waiters(e);
        e->dirty = false;
        pthread_mutex_unlock(&e->lock);
        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&e->commands_waiting, memory_order_relaxed) || !fab_trylock(e))
            return left;
        take_commands(e);
    }
}

void fab_unlock(struct fab_engine *e)
{
    if (unlock_quietly(e))
        fab_kick(e);
}

/* ---- commands: a bounded ring of many producers and the lock's holder (D. Vyukov's queue) ---- */

void fab_command(struct fab_engine *e, uint32_t transfer, bool cancel)
{
    uint64_t at = atomic_fetch_add_explicit(&e->command_tail, 1, memory_order_relaxed);
    struct fab_command *c = &e->commands[at % FAB_COMMANDS];
    /* A start and a cancel of every transfer fit, so the place is free or about to be. */
    while (atomic_load_explicit(&c->turn, memory_order_acquire) != at)
        sched_yield();
    c->value = (uint64_t)transfer << 1 | cancel;
    atomic_store_explicit(&c->turn, at + 1, memory_order_release);
    atomic_fetch_add_explicit(&e->commands_waiting, 1, memory_order_seq_cst);
    if (fab_trylock(e)) {
        take_commands(e);
        fab_unlock(e);
    }
}

static int take_commands(struct fab_engine *e)
{
    int n = 0;
    for (; n < FAB_COMMANDS_PER_TURN; n++) {
        struct fab_command *c = &e->commands[e->command_head % FAB_COMMANDS];
        if (atomic_load_explicit(&c->turn, memory_order_acquire) != e->command_head + 1)
            break;
        struct fab_transfer *t = fab_slot_at(&e->transfers, (uint32_t)(c->value >> 1));
        bool cancel = c->value & 1;
        atomic_store_explicit(&c->turn, e->command_head + FAB_COMMANDS, memory_order_release);
        e->command_head++;
        atomic_fetch_sub_explicit(&e->commands_waiting, 1, memory_order_relaxed);
        if (cancel)
            fab_transfer_do_cancel(e, t);
        else
            fab_transfer_start(e, t);
    }
    return n;
}

static bool trylock_in_order(struct fab_engine *e)
{
    if (!fab_trylock(e))
        return false;
    while (take_commands(e))
        ;
    if (!atomic_load_explicit(&e->commands_waiting, memory_order_seq_cst))
        return true;
    fab_unlock(e); /* one is being written: ours has to go behind it */
    return false;
}

bool fab_trylock_soon(struct fab_engine *e)
{
    for (int i = 0; i < LOCK_TRIES; i++) {
        if (trylock_in_order(e))
            return true;
        relax();
    }
    return false;
}

/* ---- a turn ---- */

static void tick(struct fab_engine *e)
{
    /* What we did not hear while we did not run is not the peers' silence. */
    int64_t late = e->last_tick ? e->now - e->last_tick - LATE_TICK_NS : 0;
    e->last_tick = e->now;
    e->next_tick = e->now + FAB_TICK_NS;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        if (!fab_slot_live(p))
            continue;
        if (late > 0 && p->last_heard + late < e->now)
            p->last_heard += late;
        else if (late > 0)
            p->last_heard = e->now;
        fab_session_tick(p);
    }
    fab_newcomers_tick(e);
}

int fab_serve(struct fab_engine *e)
{
    int n = 0;
    struct fab_peer *list = e->busy;
    e->busy = NULL;
    while (list) {
        struct fab_peer *p = list;
        list = p->busy_next;
        p->in_busy = false;
        n += fab_session_serve(p);
        n += fab_post_peer(p);
    }
    return n;
}

int fab_turn(struct fab_engine *e)
{
    e->now = fab_now(); /* deadlines start from it: never from before a sleep */
    int n = take_commands(e);
    for (uint32_t i = 0; i < e->nic_count; i++) {
        e->nics[i]->now = e->now;
        int got = e->nics[i]->provider->poll(e->nics[i], FAB_EVENTS_PER_TURN);
        n += got > 0 ? got : 0;
    }
    if (e->newcomer_count)
        n += fab_newcomers_serve(e);
    if (e->dropped_count)
        fab_handshake_close_dropped(e);
    if (e->now >= e->next_tick)
        tick(e);
    if (e->busy) /* after the tick: what that finds to do is not left for another waking */
        n += fab_serve(e);
    return n;
}

/* Without the lock: something new may be there. It may also be that nobody can tell. */
static bool worth_a_turn(struct fab_engine *e)
{
    if (atomic_load_explicit(&e->commands_waiting, memory_order_relaxed))
        return true;
    for (uint32_t i = 0; i < e->nic_count; i++)
        if (!e->nics[i]->provider->glance || e->nics[i]->provider->glance(e->nics[i]))
            return true;
    return false;
}

/* ---- the worker ---- */

static void wake_worker(struct fab_engine *e)
{
    uint64_t one = 1;
    ssize_t n = write(e->wake_fd, &one, sizeof one);
    (void)n; /* an eventfd this far from its limit always takes it */
}

void fab_kick(struct fab_engine *e)
{
    uint32_t asleep = FAB_SLEEPING;
    if (!atomic_compare_exchange_strong_explicit(&e->worker_state, &asleep, FAB_AWAKE,
                                                 memory_order_seq_cst, memory_order_seq_cst))
        return;
    wake_worker(e);
}

static void drain_wake(struct fab_engine *e)
{
    uint64_t count;
    ssize_t n = read(e->wake_fd, &count, sizeof count);
    (void)n; /* EAGAIN: it was a NIC */
}

static bool arm_all(struct fab_engine *e)
{
    for (uint32_t i = 0; i < e->nic_count; i++)
        if (e->nics[i]->provider->arm(e->nics[i]) != 0) {
            for (uint32_t k = 0; k <= i; k++)
                e->nics[k]->provider->disarm(e->nics[k]);
            return false;
        }
    e->armed = true;
    return true;
}

static void disarm_all(struct fab_engine *e)
{
    if (!e->armed)
        return;
    e->armed = false;
    for (uint32_t i = 0; i < e->nic_count; i++)
        e->nics[i]->provider->disarm(e->nics[i]);
}

static bool any_business(struct fab_engine *e)
{
    bool any = e->newcomer_count || e->dropped_count;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched; i++) {
        struct fab_peer *p = fab_slot_at(&e->peers, i);
        bool business = fab_slot_live(p) && fab_peer_has_business(p);
        p->in_business &= business; /* nobody ticks while the worker sleeps for ever */
        any |= business;
    }
    return any;
}

static bool any_work(const struct fab_engine *e)
{
    bool any = e->newcomer_count || e->dropped_count;
    uint32_t touched = atomic_load_explicit(&e->peers.touched, memory_order_acquire);
    for (uint32_t i = 0; i < touched && !any; i++) {
        const struct fab_peer *p = fab_slot_at(&e->peers, i);
        any = fab_slot_live(p) && fab_peer_has_work(p);
    }
    return any;
}

/* Until the next tick. Where others are only waited for it is there to notice that they are silent. */
static int64_t tick_in(const struct fab_engine *e)
{
    int64_t ns = e->config.peer_timeout_ns / 64;
    if (ns < IDLE_TICK_NS || any_work(e))
        return IDLE_TICK_NS;
    return ns < WAITING_TICK_NS ? ns : WAITING_TICK_NS;
}

/* With the lock. How long the worker may sleep; 0: not at all. */
static int64_t prepare_sleep(struct fab_engine *e)
{
    atomic_store_explicit(&e->worker_state, FAB_SLEEPING, memory_order_seq_cst);
    if (atomic_load_explicit(&e->stop, memory_order_acquire) || /* a nap took the event that told */
        atomic_load_explicit(&e->commands_waiting, memory_order_seq_cst) || !arm_all(e)) {
        atomic_store_explicit(&e->worker_state, FAB_AWAKE, memory_order_seq_cst);
        return 0;
    }
    return e->busy ? BUSY_SLEEP_NS : any_business(e) ? tick_in(e) : -1;
}

static void block(struct fab_engine *e, int64_t ns)
{
    struct pollfd fds[FAB_MAX_NICS + 1];
    fds[0] = (struct pollfd){.fd = e->wake_fd, .events = POLLIN};
    for (uint32_t i = 0; i < e->nic_count; i++)
        fds[i + 1] = (struct pollfd){.fd = e->nics[i]->wait_fd, .events = POLLIN};
    struct timespec t = {.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
    ppoll(fds, e->nic_count + 1, ns < 0 ? NULL : &t, NULL);
    drain_wake(e);
}

static void sleep_or_not(struct fab_engine *e)
{
    fab_lock(e);
    int64_t ns = prepare_sleep(e);
    e->stats.worker_sleeps += ns != 0;
    unlock_quietly(e); /* what it leaves is why `ns` is short */
    if (!ns)
        return;
    block(e, ns);
    atomic_store_explicit(&e->worker_state, FAB_AWAKE, memory_order_seq_cst);
    fab_lock(e);
    disarm_all(e);
    fab_unlock(e);
}

/* True: helpers were active since the last look, so the worker has napped. Who goes to sleep after helping
 * takes that back (fab_rouse()): for it the state is NAPPING from before the look on. */
static bool nap_if_helped(struct fab_engine *e)
{
    struct pollfd p = {.fd = e->wake_fd, .events = POLLIN};
    struct timespec t = {.tv_nsec = FAB_NAP_NS};
    if (!atomic_load_explicit(&e->helped, memory_order_relaxed))
        return false;
    atomic_store_explicit(&e->worker_state, FAB_NAPPING, memory_order_seq_cst);
    bool helped = atomic_exchange_explicit(&e->helped, 0, memory_order_seq_cst);
    if (helped && ppoll(&p, 1, &t, NULL) > 0)
        drain_wake(e);
    atomic_store_explicit(&e->worker_state, FAB_AWAKE, memory_order_seq_cst);
    return helped;
}

/* A mutex is not fair: who sleeps on it would not get it as long as the worker has work. So after each
 * turn the worker lets one of them go first. */
static void give_way(struct fab_engine *e)
{
    uint32_t handed = atomic_load_explicit(&e->lock_handed, memory_order_seq_cst);
    if (!atomic_load_explicit(&e->lock_wanted, memory_order_relaxed))
        return;
    atomic_store_explicit(&e->giving_way, true, memory_order_seq_cst);
    if (atomic_load_explicit(&e->lock_wanted, memory_order_seq_cst)) {
        struct timespec most = {.tv_nsec = GIVE_WAY_NS};
        syscall(SYS_futex, &e->lock_handed, FUTEX_WAIT_PRIVATE, handed, &most, NULL, 0);
    }
    atomic_store_explicit(&e->giving_way, false, memory_order_relaxed);
}

static int worker_turn(struct fab_engine *e, bool napped)
{
    fab_lock(e);
    int n = fab_turn(e);
    e->stats.worker_turns++;
    e->stats.worker_naps += napped;
    fab_unlock(e);
    give_way(e);
    return n;
}

/* A turn that finds nothing still takes the lock, and a submitter who comes meanwhile would leave its
 * copies to this thread, and to its cache. */
static void linger(struct fab_engine *e)
{
    sched_yield(); /* a helper may want this CPU */
    for (int i = 0; i < GLANCES; i++) {
        relax();
        if (worth_a_turn(e) || atomic_load_explicit(&e->helped, memory_order_relaxed))
            return;
    }
}

static void *worker_main(void *arg)
{
    struct fab_engine *e = arg;
    int64_t last_work = fab_now(), spin = (int64_t)e->config.spin_us * NS_PER_US;
    while (!atomic_load_explicit(&e->stop, memory_order_acquire)) {
        bool helped = nap_if_helped(e);
        if (helped) {
            if (atomic_load_explicit(&e->helpers, memory_order_relaxed) &&
                atomic_load_explicit(&e->helped, memory_order_acquire))
                continue; /* they are at it still */
            last_work = 0; /* one quiet turn after the nap, then sleep */
        }
        if (worker_turn(e, helped)) {
            last_work = helped ? 0 : fab_now();
        } else if (fab_now() - last_work < spin) {
            linger(e);
        } else if (!atomic_load_explicit(&e->helped, memory_order_acquire)) {
            sleep_or_not(e);
        }
    }
    return NULL;
}

static int pin(pthread_attr_t *attributes, int cpu)
{
    if (cpu < 0)
        return 0;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((unsigned)cpu, &set);
    return pthread_attr_setaffinity_np(attributes, sizeof set, &set);
}

int fab_worker_start(struct fab_engine *e)
{
    if (e->step)
        return 0;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    int rc = pin(&attributes, e->config.cpu);
    if (!rc)
        rc = pthread_create(&e->worker, &attributes, worker_main, e);
    pthread_attr_destroy(&attributes);
    if (rc)
        return fab_error(FAB_E_SYSTEM, "cannot start the worker thread on CPU %d: %s",
                         e->config.cpu, strerror(rc));
    e->worker_runs = true;
    pthread_setname_np(e->worker, "fabric-worker");
    return 0;
}

void fab_worker_stop(struct fab_engine *e)
{
    if (!e->worker_runs)
        return;
    atomic_store_explicit(&e->stop, true, memory_order_release);
    wake_worker(e);
    pthread_join(e->worker, NULL);
    e->worker_runs = false;
}

/* ---- waiters ---- */

/* One turn by a waiter, if nobody else is at it. `look`: also where nothing seems to be there. */
static void help(struct fab_engine *e, bool look)
{
    if (!look && !worth_a_turn(e)) {
        relax();
        return;
    }
    if (atomic_load_explicit(&e->lock_wanted, memory_order_relaxed) || !fab_trylock(e)) {
        relax();
        return;
    }
    disarm_all(e);
    if (!fab_turn(e))
        relax();
    e->stats.helper_turns++;
    atomic_store_explicit(&e->helped, 1, memory_order_relaxed);
    fab_unlock(e);
}

/* The last helper leaves: if the worker sleeps, the NICs have to be armed again for it. */
static void leave_help(struct fab_engine *e)
{
    atomic_fetch_sub_explicit(&e->helpers, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&e->worker_state, memory_order_seq_cst) != FAB_SLEEPING)
        return;
    fab_lock(e);
    bool asleep = atomic_load_explicit(&e->worker_state, memory_order_seq_cst) == FAB_SLEEPING;
    bool armed = e->armed || !asleep; /* who is awake arms for itself */
    for (int i = 0; !armed && !e->busy && i < HELPER_ARM_TRIES; i++) {
        armed = arm_all(e);
        if (!armed)
            fab_turn(e);
    }
    bool left = !armed || e->busy || any_business(e);
    fab_unlock(e);
    if (left)
        fab_kick(e);
}

/* A helper goes to sleep, or leaves a watch behind: a worker that naps because of it is to go on, or what
 * comes next would wait for the end of the nap, on both sides of a conversation. */
void fab_rouse(struct fab_engine *e)
{
    if (atomic_load_explicit(&e->helpers, memory_order_relaxed))
        return;
    atomic_store_explicit(&e->helped, 0, memory_order_seq_cst);
    if (atomic_load_explicit(&e->worker_state, memory_order_seq_cst) == FAB_NAPPING)
        wake_worker(e);
}

int fab_engine_progress(fab_engine *e)
{
    if (fab_enter(e))
        return FAB_E_CLOSED;
    atomic_fetch_add_explicit(&e->helpers, 1, memory_order_relaxed);
    fab_lock(e);
    disarm_all(e);
    int n = fab_turn(e);
    fab_unlock(e);
    leave_help(e);
    fab_leave(e);
    return n;
}

int fab_engine_turn(void *engine)
{
    struct fab_engine *e = engine;
    if (atomic_load_explicit(&e->closed, memory_order_acquire) || !fab_trylock(e))
        return 0;
    int n = fab_turn(e);
    fab_unlock(e);
    return n;
}

void fab_pause(struct fab_engine *e, int64_t ns)
{
    if (e->step) {
        e->step(fab_now() + ns);
        return;
    }
    struct timespec t = {.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
    nanosleep(&t, NULL);
}

/* Simulated time passes because somebody waits. */
static int wait_in_steps(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
                         int64_t timeout)
{
    int64_t until = timeout < 0 ? INT64_MAX : fab_now() + timeout;
    for (;;) {
        int rc = ready(e, arg);
        if (rc)
            return rc;
        if (atomic_load_explicit(&e->closed, memory_order_acquire))
            return fab_error(FAB_E_CLOSED, "the engine was closed");
        if (fab_now() >= until)
            return FAB_E_TIMEOUT;
        e->step(until);
    }
}

static int spin(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
                int64_t until)
{
    int rc = 0;
    atomic_fetch_add_explicit(&e->helpers, 1, memory_order_relaxed);
    for (unsigned i = 1; !(rc = ready(e, arg)); i++) {
        help(e, i % SPINS_PER_TURN == 1);
        if (i % SPINS_PER_YIELD == 0) {
            sched_yield();
            if (fab_now() >= until || atomic_load_explicit(&e->closed, memory_order_relaxed))
                break;
        }
    }
    leave_help(e);
    return rc;
}

int fab_wait_quietly(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
                     int64_t timeout)
{
    if (e->step)
        return wait_in_steps(e, ready, arg, timeout);
    int64_t until = timeout < 0 ? INT64_MAX : fab_now() + timeout;
    int rc = 0;
    atomic_fetch_add_explicit(&e->sleepers, 1, memory_order_seq_cst);
    for (;;) {
        uint32_t seen = atomic_load_explicit(&e->event_seq, memory_order_seq_cst);
        rc = ready(e, arg);
        if (rc)
            break;
        if (atomic_load_explicit(&e->closed, memory_order_acquire)) {
            rc = fab_error(FAB_E_CLOSED, "the engine was closed");
            break;
        }
        int64_t left = timeout < 0 ? -1 : until - fab_now();
        if (timeout >= 0 && left <= 0) {
            rc = FAB_E_TIMEOUT;
            break;
        }
        futex_sleep(&e->event_seq, seen, left);
    }
    atomic_fetch_sub_explicit(&e->sleepers, 1, memory_order_relaxed);
    return rc;
}

int fab_wait(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
             int64_t timeout)
{
    int rc = ready(e, arg);
    if (rc)
        return rc;
    if (!timeout) { /* a look, with one turn so that polling alone makes progress */
        atomic_fetch_add_explicit(&e->helpers, 1, memory_order_relaxed);
        help(e, true);
        leave_help(e);
        if (atomic_load_explicit(&e->watches.live, memory_order_relaxed))
            fab_rouse(e); /* who looks does not help on, and an event loop waits */
        rc = ready(e, arg);
        return rc ? rc : FAB_E_TIMEOUT;
    }
    if (e->step)
        return wait_in_steps(e, ready, arg, timeout);
    int64_t start = fab_now(), spin_ns = (int64_t)e->config.spin_us * NS_PER_US;
    if (timeout > 0 && timeout < spin_ns)
        spin_ns = timeout;
    rc = spin(e, ready, arg, start + spin_ns);
    if (rc)
        return rc;
    fab_rouse(e);
    int64_t left = timeout;
    if (timeout > 0) {
        left = timeout - (fab_now() - start);
        left = left > 0 ? left : 0;
    }
    return fab_wait_quietly(e, ready, arg, left);
}
