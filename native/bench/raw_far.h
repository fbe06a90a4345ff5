/* What programs with our engine in them have in common: an engine, and how it comes to know another. */
#ifndef RAW_FAR_H
#define RAW_FAR_H

#include "fabric.h"
#include "raw.h"

#define RAW_SPIN_US 50
#define RAW_TIMEOUT_NS INT64_C(10000000000)

/* What another engine needs to know of one; it may be sent as it is. */
struct raw_far {
    fab_engine_info info;
    fab_nic_info nic;
    fab_region_info region;
    int64_t id; /* of a counter */
};

int64_t raw_must(int64_t rc); /* ends the program where it is an error */
fab_engine *raw_open_engine(const char *provider, const char *nic, int cpu);
void raw_describe(fab_engine *engine, int64_t region, struct raw_far *out);
/* Returns a handle of its memory; `peer` gets one of the engine, and may be NULL. */
int64_t raw_meet(fab_engine *engine, const struct raw_far *far, int64_t *peer);
void raw_finish(fab_engine *engine, int64_t transfer); /* waits for it, and releases it */

#endif
