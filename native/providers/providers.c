/* The table of providers. */
#include <string.h>

#include "providers/provider.h"

static const struct fab_provider *const providers[] = {
    &fab_provider_local, &fab_provider_tcp,   &fab_provider_efa,
    &fab_provider_rxm,   &fab_provider_verbs, &fab_provider_sim,
};

enum { PROVIDERS = sizeof(providers) / sizeof(providers[0]) };

const struct fab_provider *fab_provider_named(const char *name)
{
    for (int i = 0; i < PROVIDERS; i++)
        if (strcmp(providers[i]->name, name) == 0)
            return providers[i];
    return NULL;
}
