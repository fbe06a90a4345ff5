/* Turns: who does the engine's work, and who sleeps.
 *
 * Whoever holds the progress lock may run fab_turn(). The worker thread does it when nobody else
 * does; waiters do it themselves while they spin (`helpers`). Protocol of sleep:
 * - the worker stores SLEEPING under the lock after arming every NIC and looking at the commands
 *   once more, and blocks on the NICs' descriptors and wake_fd;
 * - who leaves work behind that no NIC will signal calls fab_kick();
 * - helpers and the worker that spins look without the lock (glance) before they take a turn;
 * - after helpers were active the worker naps; the last helper that goes to sleep ends that nap,
 *   and so does who leaves a watch behind (fab_rouse);
 * - a helper that finds the worker asleep disarms the NICs while it helps, so that peers do not
 *   pay for waking it, and arms them again when it leaves;
 * - fab_unlock() takes the commands that came while the lock was held, and wakes the worker when
 *   peers are left with something to do, so nothing is forgotten.
 */
#ifndef FAB_WORKER_H
#define FAB_WORKER_H

#include "engine.h"

int fab_worker_start(struct fab_engine *e);
void fab_worker_stop(struct fab_engine *e);

void fab_lock(struct fab_engine *e);
bool fab_trylock(struct fab_engine *e);
/* As fab_trylock, but never overtakes a command that was queued before; and tries for about a
 * microsecond, as a turn that finds nothing takes less. */
bool fab_trylock_soon(struct fab_engine *e);
void fab_unlock(struct fab_engine *e);
/* With the lock: one bounded turn. Returns how many things happened. */
int fab_turn(struct fab_engine *e);
/* With the lock: the part of a turn that serves peers with something to do. */
int fab_serve(struct fab_engine *e);
/* Without the lock: the worker is to look, if it sleeps. */
void fab_kick(struct fab_engine *e);

/* Tells blocked waiters that something changed. Needs no lock. */
void fab_wake_waiters(struct fab_engine *e);

/* Queues a start (cancel = false) or a cancel of a transfer for the next turn. */
void fab_command(struct fab_engine *e, uint32_t transfer, bool cancel);

/* Waits until ready() returns nonzero, helping meanwhile; returns that, or FAB_E_TIMEOUT, or
 * FAB_E_CLOSED. ready() is called without the lock. */
int fab_wait(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
             int64_t timeout);
/* The same without helping: for threads that wait for rare things. */
int fab_wait_quietly(struct fab_engine *e, int (*ready)(struct fab_engine *, void *), void *arg,
                     int64_t timeout);

/* Nobody is left who would help: a worker that naps because somebody did is to go on. */
void fab_rouse(struct fab_engine *e);

/* A turn by whoever moves simulated time; 0 where the engine is closed. */
int fab_engine_turn(void *engine);
/* Lets time pass, without the lock. */
void fab_pause(struct fab_engine *e, int64_t ns);

void fab_close_fd(int fd);

#endif
