/* Engines that come to know each other; what is what is said in raw_far.h. */
#include "raw_far.h"

#include <string.h>

int64_t raw_must(int64_t rc)
{
    if (rc < 0)
        raw_fail("%s", fab_error_text());
    return rc;
}

fab_engine *raw_open_engine(const char *provider, const char *nic, int cpu)
{
    fab_engine_config config = {.provider = provider,
                                .nics = nic ? &nic : NULL,
                                .nic_count = nic != NULL,
                                .spin_us = RAW_SPIN_US,
                                .cpu = cpu,
                                .peer_timeout_ns = RAW_TIMEOUT_NS};
    fab_engine *engine = fab_engine_open(&config);
    if (!engine)
        raw_fail("%s", fab_error_text());
    return engine;
}

void raw_describe(fab_engine *engine, int64_t region, struct raw_far *out)
{
    memset(out, 0, sizeof *out);
    raw_must(fab_engine_get_info(engine, &out->info));
    raw_must(fab_engine_nic(engine, 0, &out->nic));
    raw_must(fab_region_get_info(engine, region, &out->region));
}

int64_t raw_meet(fab_engine *engine, const struct raw_far *far, int64_t *peer)
{
    fab_peer_address address = {.label = far->info.label, .nic_count = 1, .nics = &far->nic};
    memcpy(address.id, far->info.id, sizeof address.id);
    int64_t known = raw_must(fab_peer_add(engine, &address));
    if (peer)
        *peer = known;
    fab_descriptor d = {.region = far->region.region,
                        .secret = far->region.secret,
                        .length = far->region.length,
                        .kind = far->region.kind,
                        .device = far->region.device,
                        .key_count = far->region.key_count,
                        .keys = far->region.keys};
    return raw_must(fab_remote_add(engine, known, &d));
}

void raw_finish(fab_engine *engine, int64_t transfer)
{
    if (raw_must(transfer) == FAB_DONE)
        return;
    raw_must(fab_transfer_wait(engine, transfer, RAW_TIMEOUT_NS));
    raw_must(fab_transfer_release(engine, transfer));
}
