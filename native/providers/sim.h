/* What the files of the simulator share.
 *
 *   sim.c        the world: clock, chance, engines' turns, history; what tests do to it
 *   sim_event.c  what is under way, and what happens when it arrives
 *   sim_nic.c    NICs and lanes: the vtables
 *
 * Contract
 * - A world takes over this process's clock (fab_now) and its chance (fab_random): while it is open,
 *   time moves in fab_sim_step() only, and the same seed with the same calls gives the same history.
 *   Everything runs in one thread. Engines on "sim" NICs have no worker thread.
 * - A work request travels alone. Its source is read, and its bytes are placed, at the moment when it
 *   arrives; the answer travels back. A lane that keeps order delivers in the order of posting, and
 *   nothing behind what was lost.
 * - When a lane breaks or is closed, what it had under way is reported as cancelled at once. Some of
 *   that has left the NIC, with its bytes: it still lands, later, as long as the other half is open.
 * - Fences are lane_close() of the half that is written to (it may take some time: -EINPROGRESS), or,
 *   in a world of the kind FAB_SIM_KEYS, mr_dereg(), as on EFA.
 * - First frames may be lost, doubled and late. Frames of a connected lane arrive once, or break it:
 *   also those to a lane that is closed, save where the endpoint is shared (FAB_SIM_KEYS). Where lanes
 *   break one by one (FAB_SIM_ORDERED), those that were under way are lost or late, and reported; and
 *   what had arrived by then is handled before a lane is closed.
 * - A NIC that is down, dead or cut off takes nothing; who sends to it learns so after SIM_RETRY_NS.
 *   A hung engine gets no turns, but its memory is written to. A dead one is written to no more.
 */
#ifndef FAB_SIM_H
#define FAB_SIM_H

#include "providers/provider.h"

enum {
    SIM_NICS = 256,
    SIM_LANES = 1 << 20, /* that a world ever opens */
    SIM_KEYS = 1 << 20,  /* and registrations */
    SIM_EVENTS = 1 << 20, /* under way */
    SIM_WINDOW = 64,      /* work requests of a lane */
    SIM_FRAMES = FAB_CONTROL_FRAMES + FAB_MESSAGE_FRAMES + 8,
    SIM_ROUNDS = 64,      /* turns of each engine without time passing */
    SIM_BLOB_BYTES = 12,
    SIM_MAX_WRITE = 64 << 10,
    SIM_MILLION = 1000000,
    SIM_SLOW = 20, /* times as long on a slow lane */
    SIM_TRIES = 8, /* of a frame that finds no way */
};

#define SIM_RETRY_NS 20000000
#define SIM_FENCE_NS 30000000 /* that closing a lane takes at most */
#define SIM_LATE_NS 2000000000 /* that the copy of a first frame comes after it, at most */
#define SIM_IDLE_NS 10000000 /* that one step lets pass when nothing is under way */
#define SIM_HISTORY (4u << 20) /* bytes that are kept */

struct sim_nic;

struct sim_wr {
    uint64_t wr_id;
    struct sim_event *event; /* its write, until that has arrived */
};

struct sim_lane {
    struct fab_lane base;
    struct sim_nic *nic;
    uint32_t id;
    uint32_t peer_nic, peer_lane; /* peer_lane 0: pointed at a NIC */
    bool pointed, down, closing, calm;
    bool told; /* that it is down */
    bool gap;  /* a write to it was lost */
    int64_t closes_at;
    uint32_t slow; /* factor of its delays */
    int64_t last; /* when the last one arrives, where order is kept */
    uint32_t writes_out, frames_out;
    struct sim_wr writes[SIM_WINDOW]; /* writes_out of them, in order */
    char reason[FAB_TEXT_MAX];
};

struct sim_mr {
    struct sim_nic *nic;
    uint8_t *base;
    uint64_t length;
    uint64_t rkey;
    bool remote;
};

enum sim_kind { SIM_WRITE, SIM_ANSWER, SIM_FRAME, SIM_HELLO };
enum sim_fate { SIM_WELL, SIM_LOST, SIM_UNANSWERED };

struct sim_event {
    enum sim_kind kind;
    enum sim_fate fate;
    int64_t at, late; /* late: beyond the usual delay */
    uint64_t serial;
    uint32_t from_nic, to_nic, from_lane, to_lane; /* from_lane 0: it has none (any more) */
    uint32_t tries;
    int status;
    struct fab_wr wr;
    uint32_t length;
    uint8_t *bytes; /* of a frame; of a write whose lane is gone */
};

/* What poll() finds. */
enum sim_news { SIM_GOT_IMM, SIM_GOT_ANSWER, SIM_GOT_FRAME, SIM_GOT_HELLO, SIM_LOST_FRAME };

struct sim_item {
    struct sim_item *next;
    enum sim_news what;
    uint32_t lane;
    uint32_t imm;
    uint64_t wr_id;
    int status;
    uint32_t length;
    uint8_t bytes[];
};

struct sim_nic {
    struct fab_nic base;
    uint32_t id; /* place in the world, plus one */
    int state; /* FAB_SIM_UP ... */
    bool state_told;
    int (*turn)(void *engine);
    struct sim_item *head, *tail;
};

struct sim_world {
    fab_sim_config config;
    uint64_t chance;
    int64_t now;
    uint64_t serial, steps;
    struct sim_nic *nics[SIM_NICS];
    uint32_t nic_count; /* that there ever were */
    uint64_t cut[SIM_NICS][SIM_NICS / 64];
    struct sim_lane **lanes; /* by id */
    uint32_t lane_count, lane_slots;
    struct sim_mr **keys; /* by key */
    uint32_t key_count, key_slots;
    struct sim_event **heap;
    uint32_t heap_count, heap_slots;
    char *history;
    uint64_t history_used, history_dropped, digest;
};

/* sim.c */
extern struct sim_world *sim_world; /* NULL: none is open */
uint64_t sim_chance(uint64_t below);    /* 0 to below - 1 */
bool sim_happens(uint32_t of_a_million);
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void sim_note(const char *format, ...); /* a line of the history */
struct sim_lane *sim_lane_of(uint32_t id); /* NULL: it is closed */
struct sim_nic *sim_nic_of(uint32_t id);
struct sim_mr *sim_mr_of(uint64_t rkey);
bool sim_reaches(uint32_t from_nic, uint32_t to_nic);
bool sim_ordered(void);
/* Makes room for one more at `*slots` places; -ENOSPC at `most`. */
int sim_grow(void **table, uint32_t *slots, uint32_t count, size_t size, uint32_t most);

/* sim_event.c */
struct sim_event *sim_event_new(enum sim_kind kind, const struct sim_lane *from);
/* Sends it on its way; takes it over. */
void sim_event_send(struct sim_event *event, const struct sim_lane *lane);
void sim_event_free(struct sim_event *event);
struct sim_event *sim_event_next(void); /* the first; NULL: none */
void sim_events_run(void);              /* all that are due */
/* The lane has left them: takes the bytes along, or makes them never arrive. */
void sim_events_orphan(struct sim_lane *lane);
/* The same, where nobody is there any more who could be told. */
void sim_events_forget(const struct sim_lane *lane);
void sim_item_give(struct sim_nic *nic, struct sim_item *item);

#endif
