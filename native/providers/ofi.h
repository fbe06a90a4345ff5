/* What the files of the libfabric provider share.
 *
 *   ofi_info.c    which NICs there are, and how to ask libfabric for one
 *   ofi_domain.c  domains and their completion queues: events in, in order
 *   ofi_port.c    endpoints, their receive buffers, and registered memory for frames
 *   ofi_pending.c strangers that hold libfabric up, or that it reads once their endpoint is closed
 *   ofi_frame.c   control frames: queued, sent, received, answered to strangers
 *   ofi_event.c   what a completion means
 *   ofi_lane.c    lanes: open, connect, post, close
 *   ofi_credit.c  how many immediates may be under way
 *   ofi.c         NICs, poll, arm; the vtables
 *
 * Contract
 * - tcp: every lane has an endpoint of its own, and closing that is the fence. First frames go to
 *   the NIC's listener, whose domain holds no remotely writable memory, so that nobody who is not
 *   let in can write. Where ofi_kind.lane_endpoints is false (efa), the listener carries all,
 *   and keys are the fence: a region is registered for its owner without FI_REMOTE_WRITE, and once
 *   more for each peer. That asks for FI_MR_LOCAL even where efa does without: then it has no cache
 *   of registrations, which would hand out the same key twice and keep it valid after fi_close().
 * - tcp, efa: one completion queue per domain. A queue that was read empty proves that nothing is
 *   pending on any lane of the domain, which is what arm() needs; with a queue for each lane,
 *   reading one may fill another that was looked at before. What is left of a closed lane in the
 *   queue is taken out before lane_close() returns.
 * - On tcp the immediate travels in the low half of eight bytes of CQ data and the receiving
 *   lane's token in the high half: no late or foreign write can count for a lane. efa has only
 *   four bytes there; the source address names the lane. rxm has four bytes and no source address,
 *   so there a lane has a completion queue of its own (ofi_kind.lane_queues), and whoever connects
 *   to its endpoint counts for it. Nothing moves on one queue of rxm because another is read.
 * - Lanes keep no order (fab_nic_info.ordered is 0), also on tcp: libfabric silently makes a new
 *   connection when one breaks, so a later work request can succeed where an earlier one failed.
 * - On tcp a local completion means only "in the socket". So every frame but those of first contact
 *   asks for delivery completion, and of a chain of writes its last and some in between. Such a
 *   completion proves what was posted before it in the same post(): nothing in post() can change
 *   the connection, and one connection keeps order. Writes are reported when they are proven.
 *   (Asking for it on every write costs an acknowledgement each, a system call at both ends.)
 * - rxm (verbs under ofi_rxm): a completion of a write is the remote NIC's acknowledgement. Closing
 *   a connection on which something was received and not yet read crashes libfabric: it posts that
 *   receive buffer again, on the endpoint that it has just freed. So lane_close() first breaks the
 *   connection: it posts two writes out of memory of another protection domain. The NIC refuses
 *   the first, which ends the queue pair for both directions without a word to the peer; the
 *   second comes back flushed, as proof. What was received by then is read, and then it is closed.
 *   The same crash is left where the peer closes: between the moments when libfabric looks for
 *   completions and for closed connections, a last frame and the close would both have to arrive.
 */
#ifndef FAB_OFI_H
#define FAB_OFI_H

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/dl.h"
#include "providers/provider.h"

enum {
    OFI_TOKEN_BYTES = 8,          /* before the address in a blob and before a frame's bytes */
    OFI_FRAME_BYTES = OFI_TOKEN_BYTES + FAB_FRAME_MAX,
    OFI_WINDOW = 128,             /* work requests of a lane under way */
    OFI_BYTES_OUT = 32 << 20,     /* and their bytes, so that frames do not wait long */
    OFI_PROOF_WRITES = 16,        /* writes of a chain that one delivery completion proves */
    OFI_PROOF_BYTES = 1 << 20,    /* or the fewer that carry this many bytes */
    OFI_LANE_RECVS = 16,          /* where a lane has an endpoint; more wait in the socket */
    OFI_LANE_SENDS = FAB_CONTROL_FRAMES + FAB_MESSAGE_FRAMES + 8,
    OFI_NIC_RECVS = 256,
    OFI_SOURCES = 65536,          /* addresses that a shared endpoint has sent to, */
    OFI_STRANGERS = OFI_SOURCES / 2, /* not so many because of strangers */
    OFI_QUEUE_NAME = 18,          /* of an EFA address: GID and queue pair; its key follows */
    OFI_EFA_RECVS = 1024,         /* that libfabric posts on its own account */
    OFI_FRAMES_ROOM = 32,         /* of a shared send queue, which writes leave to frames */
    OFI_REPLIES = 32,             /* frames to strangers under way */
    OFI_BATCH = 64,               /* completions of one read */
    OFI_QUEUE = 1024,             /* events of a domain read and not yet handled */
    OFI_IMMS = 64,                /* immediates of a lane that the receiver has not read */
    OFI_PLACES = 32768, /* of a completion queue that only credit protects, if there are */
    OFI_PLACES_MIN = 4096,
    OFI_MAX_LANES = FAB_MAX_PEERS * FAB_MAX_LANES,
    OFI_LISTEN_TURN = 8, /* the listener's domain is polled once in so many polls */
    OFI_PORT_MEMORY = 4096, /* lane addresses that are not used again, at least */
    OFI_PORT_TRIES = 16,
    OFI_BREAKS = 2,
};

#define OFI_LINGER_NS 20000000u /* lane_close waits for frames to be taken (BYE) */
#define OFI_QUIET_NS 1000000000u /* it waits as long for a peer that takes nothing */
#define OFI_REPLY_NS 2000000000u /* an answer to a stranger is given up */
#define OFI_RETRY_MIN_NS 20000u /* between posts that find no connection yet */
#define OFI_RETRY_MAX_NS 2000000u
#define OFI_NAP_MIN_NS 50000u /* between looks at a queue that cannot wake us */
#define OFI_NAP_MAX_NS 20000000u
#define OFI_GRAVES 64 /* closed lanes kept for completions that come late, */
#define OFI_GRAVE_NS 5000000000u /* and for how long */
#define OFI_GHOST_NS 500000000u  /* closing a NIC waits so long for them */
#define OFI_GHOST_NAP_US 200u
#define OFI_GHOSTS 256 /* closed lanes of a shared endpoint whose frames are under way */
#define OFI_MAX_WRITE (1ull << 30)
#define OFI_UNIVERSE_ENV "FI_UNIVERSE_SIZE"
#define OFI_UNIVERSE "64" /* peers that talk to a listener at the same time, about */

struct ofi_nic;
struct ofi_lane;
struct ofi_port;

/* What differs between the kinds. */
struct ofi_kind {
    int kind;
    const char *name;
    const char *env; /* names the NIC that is taken when none is asked for */
    bool lane_endpoints; /* a lane has an endpoint of its own, so lanes can be fenced */
    bool lane_queues; /* and a completion queue, which tells whose an immediate is */
    bool breaks_first; /* and is safe to close only once its connection is broken */
    bool delivery; /* local completions prove nothing; one connection keeps order */
    bool device_memory; /* GPU memory can be registered */
    bool remote_needed; /* writes of length 0 must name the doorbell */
    bool source_needed; /* and registered memory of ours */
    size_t empty_bytes;      /* so many bytes of it go to the doorbell instead of none */
    bool credits; /* the completion queue can overrun */
    bool local_keys; /* always register with FI_MR_LOCAL */
    bool one_process;        /* not in a child of a process that used it */
    uint64_t caps; /* beyond FI_MSG | FI_RMA */
    enum fi_progress progress;
    size_t cq_data_size; /* 8 also carries the lane's token */
    uint32_t api_min; /* of libfabric */
    uint32_t api_max; /* asked for */
    /* Before and after the endpoint is enabled; 0 or a negative errno with its text. */
    int (*before_enable)(struct fid_ep *ep);
    int (*after_enable)(struct ofi_nic *nic, struct fid_ep *ep);
};

/* The native RDM provider over TCP: software, whose work is done by reading a queue. */
static inline bool ofi_is_tcp(const struct ofi_kind *kind)
{
    return kind->lane_endpoints && !kind->lane_queues;
}

enum ofi_slot_kind { OFI_WRITE = 1, OFI_SEND, OFI_RECV, OFI_REPLY, OFI_BREAK };

/* One operation's context: libfabric hands it back with the completion. */
struct ofi_slot {
    struct fi_context2 context; /* libfabric's while the operation is under way; first */
    struct ofi_slot *next; /* free, or waiting to be sent */
    struct ofi_lane *lane; /* OFI_WRITE, OFI_SEND, OFI_BREAK */
    struct ofi_port *port; /* OFI_RECV */
    enum ofi_slot_kind kind;
    bool contact; /* OFI_SEND: to a NIC; its loss is of no consequence */
    uint32_t length; /* of the frame, token included */
    uint8_t *frame;
    uint64_t wr_id; /* OFI_WRITE, and so are the next five */
    uint64_t bytes;
    struct ofi_slot *run; /* writes that this one's delivery proves, in order */
    bool held; /* waits for such a proof */
    bool ended; /* held, and libfabric is done with it */
    int error; /* an errno above 0, if it is known to have failed */
    fi_addr_t to; /* OFI_REPLY */
    uint64_t deadline; /* OFI_REPLY */
};

/* Slots with a frame buffer each, registered where the domain asks for it. */
struct ofi_pool {
    struct ofi_slot *slots;
    struct ofi_slot *free;
    uint8_t *memory;
    struct fid_mr *mr;
    void *desc;
    uint32_t count;
};

struct ofi_fifo {
    struct ofi_slot *head;
    struct ofi_slot *tail;
};

/* A completion or an error, copied out of a completion queue. */
struct ofi_event {
    struct ofi_slot *slot; /* NULL: of a write by the peer */
    uint64_t flags;
    uint64_t data;
    fi_addr_t from;
    uint32_t length;
    int error; /* 0, or an errno above 0 */
    int prov_errno;
};

struct ofi_domain {
    struct ofi_nic *nic;
    struct ofi_lane *lane; /* whose queue this is, in the domain of nic->data; else NULL */
    struct fid_domain *fid;
    struct fid_cq *cq;
    struct fid_cq *waker; /* the queue whose file descriptor wakes us; may be cq itself */
    uint32_t head; /* of queue */
    uint32_t queued;
    uint32_t events; /* read so far */
    uint32_t places; /* of cq */
    bool dry; /* the last read found cq empty */
    bool more; /* it found as much as it takes, or an error: there may be more */
    struct ofi_event queue[OFI_QUEUE];
};

/* An endpoint with its address vector and receive buffers. */
struct ofi_port {
    struct ofi_domain *domain;
    struct ofi_lane *lane; /* whose it is; NULL: the NIC's */
    struct fid_ep *ep;
    struct fid_av *av;
    struct ofi_pool recvs;
    uint32_t recvs_out;
    uint8_t address[FAB_BLOB_MAX - OFI_TOKEN_BYTES];
    size_t address_len;
};

struct ofi_mr {
    struct fid_mr *fid;
    void *desc;
};

struct ofi_lane {
    struct fab_lane base;
    struct ofi_port *port; /* its own, or the NIC's */
    struct ofi_port own;
    struct ofi_domain *domain; /* whose queue has its events */
    uint64_t token; /* what frames and immediates to this lane must show */
    uint64_t peer_token; /* of the lane at the other end; 0: we point at a NIC */
    uint8_t peer_address[FAB_BLOB_MAX];
    fi_addr_t to;
    bool pointed; /* `to` is valid */
    bool down;
    bool closing;
    bool buried; /* closed; completions that come late are for nobody */
    uint64_t buried_at;
    struct ofi_lane *grave; /* the next buried one, older first */
    uint32_t index; /* in nic->lanes */
    uint32_t writes_out;
    uint32_t sends_out;
    uint32_t imms_sent; /* ofi_credit.c */
    uint32_t imms_known; /* of these the peer has read so many */
    uint32_t imms_read; /* of the peer's */
    uint32_t imms_told;
    uint32_t breaks_tried; /* of breaks[] */
    uint32_t breaks_out;
    uint32_t quiet_events; /* of the domain, when last looked at */
    uint64_t quiet_since; /* it had no event; 0: closing has not begun */
    uint64_t bytes_out;
    uint64_t retry_at; /* no post before; 0: no gate */
    uint64_t retry_ns;
    struct ofi_fifo waiting; /* frames that could not be posted yet */
    struct ofi_pool sends;
    struct ofi_slot *free_writes;
    struct ofi_slot writes[OFI_WINDOW];
    struct ofi_slot breaks[OFI_BREAKS];
};

/* A remote address on an endpoint that lanes share. With an immediate comes no more of it than the
 * device and the queue pair (`queue`), and libfabric takes the address that it was given last with
 * these for the source. One queue pair is one peer, so all such addresses mean the same lane. */
struct ofi_source {
    struct ofi_lane *lane; /* the one that immediates from there belong to */
    uint8_t queue[OFI_QUEUE_NAME];
    bool held; /* this entry is in use */
};

struct ofi_nic {
    struct fab_nic base;
    const struct ofi_kind *kind;
    const struct fab_libfabric *lib;
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct ofi_domain *data; /* holds the registered memory */
    struct ofi_domain *listen; /* of the listener; may be data itself */
    struct ofi_port port; /* the listener */
    struct ofi_pool replies;
    struct ofi_fifo waiting; /* replies that could not be posted yet */
    struct ofi_lane *graves, *last_grave;
    uint32_t grave_count;
    struct ofi_lane **lanes; /* by index; NULL: free */
    uint32_t lane_slots;
    uint32_t lane_count;
    uint32_t waiting_frames; /* of all lanes */
    uint32_t writes_out; /* of all lanes */
    struct ofi_source *sources;
    uint64_t source_slots;
    uint64_t used_ports[2][1024]; /* bitmaps: ports of earlier lanes, recent and older */
    uint32_t used_count;
    uint32_t turn;
    uint32_t next_lane; /* whose queue is polled first */
    bool credit_owed; /* a lane could not tell what it has read */
    bool recvs_owed; /* a receive buffer could not be posted again */
    bool emulated; /* libfabric makes messages of writes: no key ends one that has begun */
    bool can_sleep;
    uint64_t nap_ns; /* the last one, where it cannot */
    bool timer_set;
    int timer_fd; /* wakes for what waits for a connection */
};

/* ofi_lane.c: frees the buried lanes that are old enough, or all. */
void ofi_lanes_exhume(struct ofi_nic *nic, bool all);

/* ofi_info.c */
extern const struct ofi_kind ofi_tcp, ofi_efa, ofi_rxm;
int ofi_list(const struct ofi_kind *kind, fab_nic_info *out, uint32_t max);
/* The fi_info of the NIC called `name` (NULL: the default), to be freed. */
int ofi_choose(const struct ofi_kind *kind, const char *name, struct fi_info **out);
void ofi_describe(const struct ofi_kind *kind, const struct fi_info *info, fab_nic_info *out);
int ofi_fail(const struct ofi_nic *nic, const char *what, ssize_t rc); /* text; returns rc */
uint64_t ofi_now(void);
int ofi_random(uint64_t *out);

/* ofi.c: lets the domain's queue wake us. */
int ofi_domain_watch(struct ofi_domain *domain);
void ofi_domain_unwatch(struct ofi_domain *domain);

/* ofi_domain.c */
/* lane: only a queue, for this lane, in the domain of nic->data; NULL: a domain and its queue. */
int ofi_domain_open(struct ofi_nic *nic, struct ofi_lane *lane, struct ofi_domain **out);
void ofi_domain_close(struct ofi_domain *domain);
/* Moves completions into the queue, up to a batch; sets dry. Returns how many. */
int ofi_domain_read(struct ofi_domain *domain);
bool ofi_domain_full(const struct ofi_domain *domain);
int ofi_mr_open(struct ofi_domain *domain, const struct fab_memory *memory, uint64_t access,
                struct ofi_mr *out);

/* ofi_port.c */
int ofi_pool_open(struct ofi_pool *pool, struct ofi_domain *domain, uint32_t count,
                  enum ofi_slot_kind kind);
void ofi_pool_close(struct ofi_pool *pool);
struct ofi_slot *ofi_pool_take(struct ofi_pool *pool);
void ofi_pool_give(struct ofi_pool *pool, struct ofi_slot *slot);
void ofi_fifo_push(struct ofi_fifo *fifo, struct ofi_slot *slot);
struct ofi_slot *ofi_fifo_pop(struct ofi_fifo *fifo);
int ofi_port_open(struct ofi_port *port, struct ofi_domain *domain, struct ofi_lane *lane);
int ofi_port_receive(struct ofi_port *port, uint32_t recvs); /* posts that many buffers */
/* Closes the endpoint; its memory stays until ofi_port_free(). */
int ofi_port_shut(struct ofi_port *port);
/* tcp: whoever connects may not hold us up; and is let go of before the endpoint is. */
void ofi_pending_begin(const struct ofi_port *port);
void ofi_pending_end(struct ofi_port *port);
void ofi_port_free(struct ofi_port *port);
int ofi_port_recv(struct ofi_port *port, struct ofi_slot *slot);
/* Splits a blob into token and address; false: it is none of ours. */
bool ofi_blob_split(const struct ofi_port *port, const uint8_t *blob, uint32_t length,
                    uint64_t *token);
void ofi_blob_join(const struct ofi_port *port, uint64_t token, uint8_t *blob, uint32_t *length);

/* ofi_frame.c */
int ofi_lane_send(struct fab_lane *base, const uint8_t *bytes, uint32_t length,
                  const struct fab_mr *attach);
/* Posts waiting frames as far as possible. 0, or the negative errno that stopped it for good. */
int ofi_lane_flush(struct ofi_lane *lane);
void ofi_lane_forget(struct ofi_lane *lane); /* drops waiting frames */
int ofi_origin_reply(struct fab_nic *base, struct fab_origin *origin, const uint8_t *blob,
                     uint32_t blob_len, const uint8_t *bytes, uint32_t length);
void ofi_replies_flush(struct ofi_nic *nic);
void ofi_reply_end(struct ofi_nic *nic, struct ofi_slot *slot);
void ofi_frame_received(struct ofi_port *port, struct ofi_slot *slot, uint32_t length);

/* ofi_credit.c */
/* 0: there is room for one more lane; -ENOSPC with its text. */
int ofi_credit_admit(const struct ofi_nic *nic);
/* Immediates that may be posted now. */
uint32_t ofi_credit_left(const struct ofi_lane *lane);
/* Tells the peer what was read of its immediates, if it is time. */
void ofi_credit_tell(struct ofi_lane *lane);
void ofi_credit_pay(struct ofi_nic *nic); /* for all lanes */
/* True: the frame was one of credit. */
bool ofi_credit_take(struct ofi_lane *lane, const uint8_t *bytes, uint32_t length);

/* ofi_lane.c */
int ofi_lane_open(struct fab_nic *base, struct fab_origin *origin, struct fab_lane **out);
int ofi_lane_connect(struct fab_lane *base, const uint8_t *blob, uint32_t length);
int ofi_lane_close(struct fab_lane *base);
int ofi_post(struct fab_lane *base, const struct fab_wr *wrs, int n);
void ofi_lane_down(struct ofi_lane *lane, int error, const char *text);
/* What a post returned: 1 it was taken, 0 later (and not before retry_at), or it as it is. */
int ofi_lane_verdict(struct ofi_lane *lane, ssize_t rc);
bool ofi_lane_gated(const struct ofi_lane *lane);
struct ofi_lane *ofi_lane_of_token(const struct ofi_nic *nic, uint32_t low);
struct ofi_lane *ofi_lane_of_source(const struct ofi_nic *nic, fi_addr_t from);
/* On a shared endpoint: notes an address that was inserted in its address vector. Negative, with its
 * text where `most` are there: it was not noted, and is removed again. */
int ofi_source_hold(struct ofi_nic *nic, fi_addr_t from, const uint8_t *address, uint32_t most);

/* ofi_event.c */
/* Acts on one event; drops frames of a lane that is closing. */
void ofi_handle(struct ofi_domain *domain, const struct ofi_event *event);
/* Handles up to `most` queued events. */
int ofi_handle_queued(struct ofi_domain *domain, int most);
/* Handles what the queue holds of one lane and leaves the rest, in order. */
void ofi_handle_lane(struct ofi_domain *domain, struct ofi_lane *lane);

#endif
