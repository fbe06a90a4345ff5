/* Declarations of libefa that are newer than Debian 12's rdma-core 44, in our own words: what the
 * public ABI says of capabilities, flags and structs. */
#ifndef EFADV_NEWER_H
#define EFADV_NEWER_H

#include <infiniband/efadv.h>

#define EFA_CAPS_RDMA_READ (1u << 0)
#define EFA_CAPS_RNR_RETRY (1u << 1)
#define EFA_CAPS_CQ_WITH_SGID (1u << 2)
#define EFA_CAPS_RDMA_WRITE (1u << 3)             /* rdma-core 46 */
#define EFA_CAPS_UNSOLICITED_WRITE_RECV (1u << 4) /* 52 */

#define EFA_QP_UNSOLICITED_WRITE_RECV (1u << 0)

/* struct efadv_qp_init_attr of rdma-core 52; before, flags and sl were reserved. */
struct efadv_qp_init_attr_newer {
    uint64_t comp_mask;
    uint32_t driver_qp_type;
    uint16_t flags;
    uint8_t sl;
    uint8_t reserved;
};

/* struct efadv_cq has one more function. */
struct efadv_cq_newer {
    struct efadv_cq dv;
    int (*wc_is_unsolicited)(struct efadv_cq *cq);
};

#endif
