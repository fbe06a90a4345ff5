/* The place of the verbs provider, which this version does not have: it says which RDMA devices
 * there are, or why there are none, so that `fabric info` and provider="verbs" can tell. */
#include "dl.h"
#include "provider.h"

static int verbs_list(fab_nic_info *out, uint32_t max)
{
    (void)out;
    (void)max;
    return fab_verbs_unavailable();
}

static int verbs_nic_open(const struct fab_nic_options *options, struct fab_nic **out)
{
    (void)options;
    (void)out;
    return fab_verbs_unavailable();
}

const struct fab_provider fab_provider_verbs = {
    .name = "verbs",
    .kind = FAB_KIND_VERBS,
    .list = verbs_list,
    .nic_open = verbs_nic_open,
};
