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

#include <infiniband/verbs.h>
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

/* What libibverbs exports and we use; posting and polling are inline, through the context. Each line:
 * result, name, version of the symbol, arguments. */
#define FAB_IBV_FUNCTIONS(X)                                                                      \
    X(struct ibv_device **, get_device_list, "IBVERBS_1.1", (int *))                              \
    X(void, free_device_list, "IBVERBS_1.1", (struct ibv_device **))                              \
    X(const char *, get_device_name, "IBVERBS_1.1", (struct ibv_device *))                        \
    X(int, fork_init, "IBVERBS_1.1", (void))                                                      \
    X(struct ibv_context *, open_device, "IBVERBS_1.1", (struct ibv_device *))                    \
    X(int, close_device, "IBVERBS_1.1", (struct ibv_context *))                                   \
    X(int, query_device, "IBVERBS_1.1", (struct ibv_context *, struct ibv_device_attr *))         \
    X(int, query_port, "IBVERBS_1.1", (struct ibv_context *, uint8_t, struct ibv_port_attr *))    \
    X(int, query_pkey, "IBVERBS_1.1", (struct ibv_context *, uint8_t, int, __be16 *))             \
    X(struct ibv_pd *, alloc_pd, "IBVERBS_1.1", (struct ibv_context *))                           \
    X(int, dealloc_pd, "IBVERBS_1.1", (struct ibv_pd *))                                          \
    X(struct ibv_mr *, reg_mr_iova2, "IBVERBS_1.8",                                               \
      (struct ibv_pd *, void *, size_t, uint64_t, unsigned))                                      \
    X(int, dereg_mr, "IBVERBS_1.1", (struct ibv_mr *))                                            \
    X(struct ibv_comp_channel *, create_comp_channel, "IBVERBS_1.0", (struct ibv_context *))      \
    X(int, destroy_comp_channel, "IBVERBS_1.0", (struct ibv_comp_channel *))                      \
    X(struct ibv_cq *, create_cq, "IBVERBS_1.1",                                                  \
      (struct ibv_context *, int, void *, struct ibv_comp_channel *, int))                        \
    X(int, resize_cq, "IBVERBS_1.1", (struct ibv_cq *, int))                                      \
    X(int, destroy_cq, "IBVERBS_1.1", (struct ibv_cq *))                                          \
    X(int, get_cq_event, "IBVERBS_1.1", (struct ibv_comp_channel *, struct ibv_cq **, void **))   \
    X(void, ack_cq_events, "IBVERBS_1.1", (struct ibv_cq *, unsigned))                            \
    X(struct ibv_srq *, create_srq, "IBVERBS_1.1", (struct ibv_pd *, struct ibv_srq_init_attr *)) \
    X(int, destroy_srq, "IBVERBS_1.1", (struct ibv_srq *))                                        \
    X(struct ibv_qp *, create_qp, "IBVERBS_1.1", (struct ibv_pd *, struct ibv_qp_init_attr *))    \
    X(int, modify_qp, "IBVERBS_1.1", (struct ibv_qp *, struct ibv_qp_attr *, int))                \
    X(int, destroy_qp, "IBVERBS_1.1", (struct ibv_qp *))                                          \
    X(struct ibv_ah *, create_ah, "IBVERBS_1.1", (struct ibv_pd *, struct ibv_ah_attr *))         \
    X(int, destroy_ah, "IBVERBS_1.1", (struct ibv_ah *))                                          \
    X(int, get_async_event, "IBVERBS_1.1", (struct ibv_context *, struct ibv_async_event *))      \
    X(void, ack_async_event, "IBVERBS_1.1", (struct ibv_async_event *))                           \
    X(const char *, event_type_str, "IBVERBS_1.1", (enum ibv_event_type))                         \
    X(const char *, wc_status_str, "IBVERBS_1.1", (enum ibv_wc_status))                           \
    X(int, query_gid_ex, "IBVERBS_1.11",                                                          \
      (struct ibv_context *, uint32_t, uint32_t, struct ibv_gid_entry *, uint32_t, size_t))       \
    X(struct ibv_mr *, reg_dmabuf_mr, "IBVERBS_1.12",                                             \
      (struct ibv_pd *, uint64_t, size_t, uint64_t, int, int))

struct fab_libibverbs {
#define FAB_IBV_FIELD(result, name, version, arguments) result(*name) arguments;
    FAB_IBV_FUNCTIONS(FAB_IBV_FIELD)
#undef FAB_IBV_FIELD
};

/* NULL: not here, and fab_fail_text() has the reason. */
const struct fab_libibverbs *fab_libibverbs(void);

#endif
