/* What C users and tests of the engine include. */
#ifndef FAB_FABRIC_H
#define FAB_FABRIC_H

#include <stddef.h>
#include <stdint.h>

#include "fabric_abi.h"

#endif
