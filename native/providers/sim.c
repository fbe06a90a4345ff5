/* The simulated world: its clock, its chance, and what tests do to it. The contract is in sim.h. */
#include "providers/sim.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sim_world *sim_world;

/* ---- chance: SplitMix64 (Steele, Lea, Flood 2014) ---- */

static uint64_t draw(void)
{
    uint64_t z = sim_world->chance += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t sim_chance(uint64_t below)
{
    return below ? draw() % below : 0;
}

bool sim_happens(uint32_t of_a_million)
{
    return of_a_million && sim_chance(SIM_MILLION) < of_a_million;
}

static int random_bytes(void *out, size_t length)
{
    uint8_t *to = out;

    for (size_t i = 0; i < length; i++)
        to[i] = (uint8_t)draw();
    return 0;
}

static int64_t clock_of_world(void)
{
    return sim_world->now;
}

/* ---- history ---- */

void sim_note(const char *format, ...)
{
    char line[256];
    va_list args;
    int n = snprintf(line, sizeof line, "%.6f ", (double)sim_world->now / 1e9);

    va_start(args, format);
    n += vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    va_end(args);
    if (n > (int)sizeof line - 2)
        n = (int)sizeof line - 2;
    line[n++] = '\n';
    for (int i = 0; i < n; i++) /* FNV-1a */
        sim_world->digest = (sim_world->digest ^ (uint8_t)line[i]) * 0x100000001b3u;
    if (sim_world->history_used + (uint64_t)n > SIM_HISTORY) {
        sim_world->history_dropped += sim_world->history_used;
        sim_world->history_used = 0;
    }
    memcpy(sim_world->history + sim_world->history_used, line, (size_t)n);
    sim_world->history_used += (uint64_t)n;
}

int64_t fab_sim_history(char *out, uint64_t size)
{
    if (!sim_world)
        return 0;
    uint64_t n = sim_world->history_used < size ? sim_world->history_used : size;
    memcpy(out, sim_world->history + sim_world->history_used - n, n);
    return (int64_t)n;
}

uint64_t fab_sim_digest(void)
{
    return sim_world ? sim_world->digest : 0;
}

/* ---- who is who ---- */

struct sim_lane *sim_lane_of(uint32_t id)
{
    return id && id <= sim_world->lane_count ? sim_world->lanes[id - 1] : NULL;
}

struct sim_nic *sim_nic_of(uint32_t id)
{
    return id && id <= sim_world->nic_count ? sim_world->nics[id - 1] : NULL;
}

struct sim_mr *sim_mr_of(uint64_t rkey)
{
    uint32_t index = (uint32_t)rkey;
    struct sim_mr *mr = index && index <= sim_world->key_count ? sim_world->keys[index - 1] : NULL;

    return mr && mr->rkey == rkey ? mr : NULL;
}

static bool takes(uint32_t id)
{
    const struct sim_nic *nic = sim_nic_of(id);

    return nic && (nic->state == FAB_SIM_UP || nic->state == FAB_SIM_HUNG);
}

bool sim_reaches(uint32_t from, uint32_t to)
{
    /* What was under way when its NIC was closed is on the wire. */
    if ((sim_nic_of(from) && !takes(from)) || !takes(to))
        return false;
    return !(sim_world->cut[from - 1][(to - 1) / 64] >> ((to - 1) % 64) & 1);
}

bool sim_ordered(void)
{
    return sim_world->config.flavour == FAB_SIM_ORDERED;
}

int sim_grow(void **table, uint32_t *slots, uint32_t count, size_t size, uint32_t most)
{
    if (count < *slots)
        return 0;
    uint32_t more = *slots ? 2 * *slots : 64;
    if (more > most)
        return -ENOSPC;
    void *grown = realloc(*table, more * size);
    if (!grown)
        return -ENOMEM;
    *table = grown;
    *slots = more;
    return 0;
}

/* ---- time ---- */

static uint32_t engines_awake(struct sim_nic *out[SIM_NICS])
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < sim_world->nic_count; i++) {
        struct sim_nic *nic = sim_world->nics[i];
        bool known = !nic || nic->state == FAB_SIM_HUNG || nic->state == FAB_SIM_DEAD;
        for (uint32_t k = 0; k < n && !known; k++)
            known = out[k]->base.engine == nic->base.engine;
        if (!known)
            out[n++] = nic;
    }
    return n;
}

/* Everybody's turn, in any order, until nobody finds anything to do. */
static int take_turns(void)
{
    struct sim_nic *awake[SIM_NICS];
    int total = 0;

    for (int round = 0; round < SIM_ROUNDS; round++) {
        uint32_t n = engines_awake(awake);
        int done = 0;
        while (n > 0) {
            uint32_t pick = (uint32_t)sim_chance(n);
            done += awake[pick]->turn(awake[pick]->base.engine);
            awake[pick] = awake[--n];
        }
        total += done;
        if (!done)
            break;
    }
    return total;
}

int fab_sim_step(int64_t until)
{
    if (!sim_world)
        return FAB_E_INVALID;
    int n = take_turns();
    int64_t to = sim_world->now + SIM_IDLE_NS;
    const struct sim_event *next = sim_event_next();
    if (next && next->at < to)
        to = next->at;
    if (until >= 0 && until < to)
        to = until;
    if (to > sim_world->now)
        sim_world->now = to;
    sim_world->steps++;
    sim_events_run();
    return n;
}

int64_t fab_sim_now(void)
{
    return sim_world ? sim_world->now : 0;
}

/* ---- the life of a world ---- */

static int check(const fab_sim_config *c)
{
    const uint32_t chances[] = {c->slow_lanes,    c->lost_writes,     c->lost_answers,
                                c->lost_contacts, c->double_contacts, c->slow_fences,
                                c->stuck_regions};

    for (size_t i = 0; i < sizeof chances / sizeof *chances; i++)
        if (chances[i] > SIM_MILLION) {
            fab_fail_text("a chance of %u in a million", chances[i]);
            return FAB_E_INVALID;
        }
    if (c->flavour < FAB_SIM_UNORDERED || c->flavour > FAB_SIM_KEYS || c->delay_ns < 0 ||
        c->jitter_ns < 0 || c->delay_ns > 1000000000 || c->jitter_ns > 1000000000)
        return FAB_E_INVALID;
    return 0;
}

int fab_sim_begin(const fab_sim_config *config)
{
    if (sim_world || check(config) || !fab_no_engines())
        return FAB_E_INVALID;
    sim_world = calloc(1, sizeof *sim_world);
    char *history = malloc(SIM_HISTORY);
    if (!sim_world || !history) {
        free(sim_world);
        free(history);
        sim_world = NULL;
        return FAB_E_SYSTEM;
    }
    sim_world->history = history;
    sim_world->config = *config;
    sim_world->chance = config->seed;
    sim_world->now = 1000000000; /* the core takes 0 for never */
    sim_world->digest = 0xcbf29ce484222325u;
    fab_time_is(clock_of_world, random_bytes);
    return 0;
}

int fab_sim_set(const fab_sim_config *config)
{
    if (!sim_world || check(config) || config->flavour != sim_world->config.flavour)
        return FAB_E_INVALID;
    sim_world->config = *config;
    return 0;
}

int fab_sim_end(void)
{
    if (!sim_world)
        return 0;
    if (!fab_no_engines())
        return FAB_E_INVALID;
    fab_time_is(NULL, NULL);
    for (uint32_t i = 0; i < sim_world->heap_count; i++)
        sim_event_free(sim_world->heap[i]);
    free(sim_world->heap);
    free(sim_world->lanes);
    free(sim_world->keys);
    free(sim_world->history);
    free(sim_world);
    sim_world = NULL;
    return 0;
}

static struct sim_nic *named(const char *name)
{
    for (uint32_t i = 0; sim_world && i < sim_world->nic_count; i++)
        if (sim_world->nics[i] && !strcmp(sim_world->nics[i]->base.info.name, name))
            return sim_world->nics[i];
    return NULL;
}

int fab_sim_nic(const char *name, int state)
{
    struct sim_nic *nic = named(name);

    if (!nic || state < FAB_SIM_UP || state > FAB_SIM_DEAD)
        return FAB_E_INVALID;
    sim_note("NIC %s: state %d", name, state);
    nic->state_told &= (nic->state == FAB_SIM_DOWN) == (state == FAB_SIM_DOWN);
    nic->state = state;
    return 0;
}

static void set_cut(uint32_t from, uint32_t to, int on)
{
    uint64_t bit = UINT64_C(1) << ((to - 1) % 64);
    uint64_t *word = &sim_world->cut[from - 1][(to - 1) / 64];

    *word = on ? *word | bit : *word & ~bit;
}

int fab_sim_cut(const char *from, const char *to, int on)
{
    const struct sim_nic *one = named(from), *other = named(to);

    if (!one || !other)
        return FAB_E_INVALID;
    sim_note("%s -> %s: %s", from, to, on ? "cut" : "whole again");
    set_cut(one->id, other->id, on);
    return 0;
}
