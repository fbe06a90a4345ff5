/* Many engines on real verbs NICs, in one process, so that sanitizers see all of them: handshakes
 * that collide, lanes that come and go, a completion queue that has to grow.
 *
 * test_verbs_device [seed]. Status 77: this machine has fewer than two verbs NICs.
 */
#include <pthread.h>

#include "check.h"

#define ENGINES 12
#define ROUNDS 3
#define BYTES UINT64_C(300000)
#define IMM 7

static fab_nic_info nics[FAB_MAX_NICS];
static const char *names[2][2]; /* in both orders */

struct member {
    fab_engine *engine;
    int64_t counter, region;
    int64_t peers[ENGINES - 1], remotes[ENGINES - 1];
    pthread_t thread;
};

static struct member members[ENGINES];

static void open_members(uint32_t nic_count)
{
    for (uint32_t i = 0; i < ENGINES; i++) {
        fab_engine_config config = check_config("verbs", names[i % 2], nic_count);
        members[i].engine = check_open(&config);
        members[i].counter = OK(fab_counter_open(members[i].engine, IMM, 1));
        members[i].region = OK(fab_region_alloc(members[i].engine, ENGINES * BYTES, 0, -1, 1));
    }
    for (uint32_t i = 0; i < ENGINES; i++)
        for (uint32_t k = 0, n = 0; k < ENGINES; k++) {
            if (k == i)
                continue;
            struct member *m = &members[i];
            m->peers[n] = check_peer(m->engine, members[k].engine);
            m->remotes[n] =
                check_remote(m->engine, m->peers[n], members[k].engine, members[k].region);
            n++;
        }
}

/* Raises an immediate at everybody, and writes to a place of its own in everybody's region. */
static void *greet(void *arg)
{
    struct member *m = arg;
    uint64_t own = (uint64_t)(m - members);
    fab_target targets[ENGINES - 1];
    for (uint32_t i = 0; i < ENGINES - 1; i++)
        targets[i] = (fab_target){.remote = m->remotes[i],
                                  .src_offset = own * BYTES,
                                  .dst_offset = own * BYTES,
                                  .length = BYTES};
    check_done(m->engine, fab_imm(m->engine, m->peers, ENGINES - 1, IMM, 0, -1));
    check_done(m->engine, fab_scatter(m->engine, m->region, targets, ENGINES - 1, IMM, 0, -1));
    check_count(m->engine, m->counter, 2 * (ENGINES - 1));
    return NULL;
}

static void check_bytes(void)
{
    static uint8_t expected[BYTES];
    for (uint32_t i = 0; i < ENGINES; i++) {
        check_paint(expected, BYTES, i);
        for (uint32_t k = 0; k < ENGINES; k++)
            CHECK(!memcmp(check_base(members[k].engine, members[k].region) + i * BYTES, expected,
                          BYTES),
                  "engine %u holds other bytes of engine %u", k, i);
    }
}

static void check_lanes(uint32_t nic_count)
{
    for (uint32_t i = 0; i < ENGINES; i++)
        for (uint32_t k = 0; k < ENGINES - 1; k++) {
            fab_peer_info info;
            OK(fab_peer_get_info(members[i].engine, members[i].peers[k], &info));
            SAME(info.state, FAB_P_UP);
            SAME(info.lanes, nic_count);
        }
}

static void close_members(void)
{
    for (uint32_t i = 0; i < ENGINES; i++) {
        fab_region_info info;
        OK(fab_region_get_info(members[i].engine, members[i].region, &info));
        fab_engine_free(members[i].engine);
        fab_unmap(info.base, info.mapped);
    }
}

static void round_of(uint32_t nic_count)
{
    open_members(nic_count);
    for (uint32_t i = 0; i < ENGINES; i++)
        check_paint(check_base(members[i].engine, members[i].region) + i * BYTES, BYTES, i);
    for (uint32_t i = 0; i < ENGINES; i++)
        pthread_create(&members[i].thread, NULL, greet, &members[i]);
    for (uint32_t i = 0; i < ENGINES; i++)
        pthread_join(members[i].thread, NULL);
    check_bytes();
    check_lanes(nic_count);
    close_members();
    printf("%d engines of %u NICs: all to all\n", ENGINES, nic_count);
}

int main(int argc, char **argv)
{
    check_begin(argc, argv);
    if (fab_list_nics("verbs", nics, FAB_MAX_NICS) < 2) {
        printf("skipped: two verbs NICs are needed; %s\n", fab_error_text());
        return SKIPPED;
    }
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 2; k++)
            names[i][k] = nics[(i + k) % 2].name;
    for (int i = 0; i < ROUNDS; i++) {
        round_of(1);
        round_of(2);
    }
    return 0;
}
