/* libfabric and libibverbs, opened when first needed.
 *
 * Contract
 * - Nothing is linked: each library is opened once per process with RTLD_NOW | RTLD_LOCAL and
 *   never closed (providers leave threads and exit handlers behind).
 * - FABRIC_LIBFABRIC and FABRIC_LIBIBVERBS name another file to open.
 * - A missing library is no error of the process: each caller gets the same sentence, which says
 *   what file was wanted, what to install and which variable names another one.
 * - Any thread may call these functions at any time.
 */
#ifndef FAB_DL_H
#define FAB_DL_H

#include <rdma/fabric.h>
#include <stdint.h>

/* What libfabric exports and we use; everything else in its headers is inline. fi_allocinfo() is
 * inline too but calls fi_dupinfo: use dupinfo(NULL). */
struct fab_libfabric {
    int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
                   const struct fi_info *hints, struct fi_info **info);
    void (*freeinfo)(struct fi_info *info);
    struct fi_info *(*dupinfo)(const struct fi_info *info);
    int (*fabric)(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context);
    const char *(*strerror)(int error);
    uint32_t version; /* of the library that was loaded */
};

/* NULL: not here, and fab_fail_text() has the reason. */
const struct fab_libfabric *fab_libfabric(void);

/* Says in fab_fail_text() why there is no NIC of kind "verbs". Returns a negative errno. */
int fab_verbs_unavailable(void);

#endif
