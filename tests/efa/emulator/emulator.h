/* What the files of the emulated EFA device share.
 *
 *   device.c      the list of devices, their sysfs tree, what they can do
 *   memory.c      protection domains, memory regions, keys
 *   address.c     address handles
 *   completion.c  completion queues and channels
 *   queue_pair.c  queue pairs: SRD and UD, work requests in
 *   transport.c   packets between processes, the NIC's thread
 *   delivery.c    what arrives: in a seeded order, into memory, into receives
 *   control.c     the file that faults are set in and counters are read from
 *
 * It stands in for libibverbs and libefa (LD_PRELOAD), so that libfabric's own efa provider runs on
 * a machine without EFA. It is an emulator: reliable and unordered as SRD is, with the limits and the
 * error codes that the public headers name, and with timing and failures of our own invention.
 *
 * One lock guards everything but a chain of work requests that is being built (ibv_wr_start() to
 * ibv_wr_complete()): that is its queue pair's, and nothing of it is under way before it is complete, as
 * without a doorbell. All packets are sent and handled by one thread for each process,
 * which sleeps while there is nothing to do.
 */
#ifndef EFA_EMULATOR_H
#define EFA_EMULATOR_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "efadv_newer.h"

/* What the headers turn into macros, and we define. */
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_get_device_list

#define EXPORT __attribute__((visibility("default")))

enum {
    DEVICES_MAX = 16,
    FIRST_BUS = 16, /* PCI bus of device 0; it is called rdmap16s0 */
    MTU = 8928,
    SEGMENT = 8192,    /* of a message in one packet */
    INLINE_MAX = 32,
    SGES_MAX = 2,
    SENDS_MAX = 256,   /* work requests of a send queue */
    RECVS_MAX = 8192,
    CQES_MAX = 32768,
    KEYS_MAX = 1 << 16,
    HANDLES_MAX = 4096,
    QPS_MAX = 256,     /* of a process */
    QPN_MAX = 60000,
    PACKETS_MAX = 4096, /* received and not yet handled */
    BURST = 64,         /* packets sent or received in one turn for one queue pair */
    UNKNOWN_HANDLE = 0xffff,
    GRH_BYTES = 40,
    RNR_FOREVER = 7,
};

#define RDMA_MAX (1u << 30)
#define RNR_NS 1000000u /* between looks for a receive */

/* enum efa_io_comp_status, as the device reports it in vendor_err */
enum {
    DONE_OK = 0,
    DONE_FLUSHED = 1,
    DONE_QP_ERROR = 2,
    DONE_BAD_LKEY = 5,
    DONE_BAD_ADDRESS = 7,
    DONE_ABORT = 8,
    DONE_BAD_QPN = 9,
    DONE_RNR = 10,
    DONE_BAD_LENGTH = 11,
    DONE_UNRESPONSIVE = 13,
    DONE_UNKNOWN_PEER = 14,
};

/* Counters of one process, in the control file; README.md has the layout. */
enum counter {
    C_WRITES,          /* RDMA writes asked for, without immediate */
    C_WRITE_IMMS,      /* with one */
    C_WRITE_BYTES,
    C_SENDS,
    C_SEND_BYTES,
    C_READS,
    C_IMMS_UNSOLICITED, /* immediates raised without a receive */
    C_IMMS_SOLICITED,   /* with one */
    C_RNR,              /* arrivals that found no receive */
    C_CQ_OVERRUNS,
    C_CQ_MOST,          /* most completions that waited in a queue */
    C_BAD_KEYS,         /* refused: key, range or access */
    C_INJECTED,         /* errors that the control file asked for */
    C_SEGMENTS,         /* packets of writes that arrived */
    C_OVERTAKEN,        /* packets that were handled before one that had come earlier */
    C_MESSAGES_OVERTAKEN, /* writes that were whole before one that had begun earlier */
    C_MRS,              /* registrations made */
    C_DMABUF_MRS,
    COUNTERS,
};

enum { FAULT_EARLY_IMM = 1, FAULT_RNR = 2 };

/* The head of the control file. */
struct control {
    char magic[8];
    uint32_t processes; /* slots taken */
    uint32_t faults;    /* FAULT_* */
    uint64_t reorder_ns, delay_ns;
    uint32_t lost_acks;  /* of a million writes: executed, and reported as failed */
    uint32_t lost_writes; /* not executed, and reported as failed */
    uint64_t gone;       /* devices that are away, by bit */
    uint32_t gone_pid;   /* for this process alone; 0: for all */
    uint32_t cq_limit;   /* places of a completion queue; 0: as many as asked for */
    uint64_t seed;
    uint32_t devices;
    uint32_t unresponsive_ms;
    uint32_t old_opcodes; /* completions of all sends are IBV_WC_SEND, as before rdma-core 46 */
    uint32_t solicited;   /* no unsolicited receives */
};

struct device {
    struct ibv_device ib;
    int index;
    union ibv_gid gid;
};

struct context {
    struct device *device;
    struct verbs_context v; /* last, as its size is libibverbs's */
};

struct region {
    struct ibv_mr ib;
    uint8_t *base; /* in this process; of a dma-buf: our mapping */
    uint64_t iova;
    int access;
    bool mapped;
};

struct handle {
    struct ibv_ah ib;
    uint32_t number;
};

struct completion {
    uint64_t wr_id;
    enum ibv_wc_opcode opcode;
    uint32_t status; /* DONE_* */
    uint32_t bytes, imm, flags, qpn, src_qpn, handle;
    union ibv_gid gid;
    bool unsolicited;
};

struct cq {
    struct ibv_cq_ex ib;
    struct efadv_cq_newer dv;
    struct completion *ring, now;
    uint32_t places, head, tail;
    bool armed;
};

struct receive {
    uint64_t wr_id;
    int count;
    struct ibv_sge sges[SGES_MAX];
};

enum packet_type { P_SEND = 1, P_WRITE, P_READ, P_DATA, P_ACK };
enum { HAS_IMM = 1, IS_DATAGRAM = 2, NOT_TO_BE_EXECUTED = 4, ACK_IS_LOST = 8 };

struct head {
    uint32_t magic;
    uint8_t type, flags, status, rnr_retry;
    uint64_t message;
    union ibv_gid from;
    uint32_t src_qpn, dst_qpn, qkey, imm;
    uint64_t addr;
    uint32_t rkey, length;
    uint64_t total, offset;
};

struct packet {
    struct head head;
    uint8_t bytes[MTU];
    uint64_t due, serial;
    uint32_t tries;
    struct qp *qp;
    struct packet *next;
};

/* A work request under way. */
struct work {
    struct work *next;
    struct qp *qp;
    struct head head; /* of its next packet */
    union ibv_gid to;
    uint64_t wr_id, since, received;
    int count;
    struct ibv_sge sges[SGES_MAX];
    uint8_t data[INLINE_MAX];
    bool is_inline, sent;
};

/* A write that arrives in pieces. */
struct arrival {
    struct arrival *next;
    struct head head; /* of its first packet */
    uint64_t got, serial;
    uint32_t status;
    bool raised;
};

struct qp {
    struct ibv_qp_ex ib;
    struct device *device;
    struct cq *send_cq, *recv_cq;
    bool datagram, unsolicited, dead;
    uint32_t qkey, outstanding, send_places, recv_places, rnr_retry;
    int fd;
    struct receive *recvs;
    uint32_t recv_head, recv_tail;
    struct work *chain, **chain_end, *current; /* between wr_start and wr_complete */
    int error;
    struct arrival *arrivals;
};

extern pthread_mutex_t efa_lock;
extern struct control *efa_control;
extern struct qp *efa_qps[QPS_MAX];

/* control.c */
void efa_control_open(void);
void efa_count(enum counter counter, uint64_t by);
void efa_count_most(enum counter counter, uint64_t value);
bool efa_device_gone(const struct device *device);
uint64_t efa_random(void); /* of this process's generator */
bool efa_chance(uint32_t of_a_million);
uint64_t efa_now(void);

/* device.c */
struct device *efa_device_of(struct ibv_context *context);

/* memory.c: where a key leads to, or NULL */
uint8_t *efa_translate(uint32_t key, uint64_t addr, uint64_t length, int access);
/* Copies between a scatter list and bytes, from `offset` of the list on. False: a bad key. */
bool efa_gather(const struct ibv_sge *sges, int count, uint64_t offset, uint8_t *to,
                uint64_t length);
bool efa_scatter(const struct ibv_sge *sges, int count, uint64_t offset, const uint8_t *from,
                 uint64_t length);

/* address.c */
bool efa_gid_of(uint32_t handle, union ibv_gid *gid);
uint32_t efa_handle_of(const union ibv_gid *gid); /* UNKNOWN_HANDLE */

/* completion.c */
int efa_poll_cq(struct ibv_cq *cq, int count, struct ibv_wc *out);
int efa_request_notify(struct ibv_cq *cq, int solicited);
struct ibv_cq_ex *efa_create_cq(struct ibv_context *context, struct ibv_cq_init_attr_ex *attr);
void efa_complete(struct cq *cq, const struct completion *completion);

/* queue_pair.c */
int efa_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int efa_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
struct ibv_qp *efa_create_datagram_qp(struct ibv_context *context,
                                      struct ibv_qp_init_attr_ex *attr);
bool efa_has_receive(const struct qp *qp);
struct receive *efa_take_receive(struct qp *qp);
void efa_work_done(struct work *work, uint32_t status);

/* transport.c */
int efa_bind(struct qp *qp); /* 0, or an errno */
void efa_unbind(struct qp *qp);
void efa_send_work(struct work *work);
void efa_drop_work(struct qp *qp, bool report); /* everything of it that is under way */
struct work *efa_find_work(const struct qp *qp, uint64_t message);
/* Sends an answer to where a packet came from; P_DATA: `total` bytes that it asked to read. */
bool efa_reply(const struct qp *qp, const struct head *to, enum packet_type type, uint32_t status,
               uint64_t total);
void efa_finish(struct work *work, uint32_t status); /* takes it out of the list, and reports it */
void efa_kick(void);

/* delivery.c */
struct packet *efa_packet_get(void); /* NULL: too many wait */
void efa_packet_put(struct packet *packet);
void efa_arrived(struct packet *packet);
uint64_t efa_deliver(void); /* handles what is due; when the next is, 0: never */
void efa_forget_arrivals(struct qp *qp);

#endif
