/* Where the providers' events enter the core. */
#ifndef FAB_SINK_H
#define FAB_SINK_H

#include "providers/provider.h"

extern const struct fab_sink fab_core_sink;

#endif
