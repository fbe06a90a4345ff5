/* Goes into the generated extension before the wrappers: what the cdef's names are. */
#include "fabric.h"
