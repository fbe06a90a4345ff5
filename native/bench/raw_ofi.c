/* A loop over libfabric and nothing else: what an engine on the same provider can at best reach. Both
 * processes poll. NIC and endpoint are chosen as our provider does, so that they are the same. */
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_rma.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "providers/ofi.h"
#include "raw.h"

#define BATCH 64
#define NAME_BYTES 128
#define LOOKS 64 /* polls between looks at the link, or between yields */

struct far { /* what one process tells the other */
    uint64_t name_length, key, address;
    uint8_t name[NAME_BYTES];
};

static struct {
    struct fid_domain *domain;
    struct fid_cq *cq;
    struct fid_av *av;
    struct fid_ep *ep;
    struct fid_mr *mr;
    struct far far;
    fi_addr_t peer;
    uint8_t *memory;
    struct fi_context2 *contexts;
    int64_t *begun; /* when each call under way was begun */
    uint32_t *sources, *destinations;
    uint64_t count, at; /* writes that fill the buffer; the next one */
    uint64_t posted, done, arrived;
    uint64_t flags;
    int link;
} raw;

static void must(int64_t rc, const char *what)
{
    if (rc < 0)
        raw_fail("%s: %s", what, fab_libfabric()->strerror((int)-rc));
}

static const struct ofi_kind *kind_named(const char *name)
{
    if (!strcmp(name, "tcp"))
        return &ofi_tcp;
    if (!strcmp(name, "efa"))
        return &ofi_efa;
    raw_fail("provider %s has no raw loop: tcp or efa", name);
}

static void open_endpoint(const struct raw_options *o)
{
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fi_cq_attr cq = {.format = FI_CQ_FORMAT_DATA, .size = 8192};
    struct fi_av_attr av = {.type = FI_AV_TABLE, .count = 1};
    if (ofi_choose(kind_named(o->provider), NULL, &info))
        raw_fail("no NIC of provider %s", o->provider);
    must(fab_libfabric()->fabric(info->fabric_attr, &fabric, NULL), "fi_fabric");
    must(fi_domain(fabric, info, &raw.domain, NULL), "fi_domain");
    must(fi_cq_open(raw.domain, &cq, &raw.cq, NULL), "fi_cq_open");
    must(fi_av_open(raw.domain, &av, &raw.av, NULL), "fi_av_open");
    must(fi_endpoint(raw.domain, info, &raw.ep, NULL), "fi_endpoint");
    must(fi_ep_bind(raw.ep, &raw.cq->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind");
    must(fi_ep_bind(raw.ep, &raw.av->fid, 0), "fi_ep_bind");
    must(fi_enable(raw.ep), "fi_enable");
    must(fi_mr_reg(raw.domain, raw.memory, o->walk, FI_WRITE | FI_REMOTE_WRITE, 0, 1, 0, &raw.mr,
                   NULL),
         "fi_mr_reg");
    struct far here = {.name_length = NAME_BYTES, .key = fi_mr_key(raw.mr)};
    if (info->domain_attr->mr_mode & FI_MR_VIRT_ADDR)
        here.address = (uint64_t)(uintptr_t)raw.memory;
    size_t length = NAME_BYTES;
    must(fi_getname(&raw.ep->fid, here.name, &length), "fi_getname");
    raw_put(raw.link, &here, sizeof here);
    raw_get(raw.link, &raw.far, sizeof raw.far);
    if (fi_av_insert(raw.av, raw.far.name, 1, &raw.peer, 0, NULL) != 1)
        raw_fail("fi_av_insert");
}

/* ---- work ---- */

static int64_t poll_queue(void)
{
    struct fi_cq_data_entry entries[BATCH];
    struct fi_cq_err_entry error = {0};
    ssize_t n = fi_cq_read(raw.cq, entries, BATCH);
    if (n == -FI_EAVAIL && fi_cq_readerr(raw.cq, &error, 0) > 0)
        raw_fail("a write failed: %s", fab_libfabric()->strerror(error.err));
    for (ssize_t i = 0; i < n; i++) {
        raw.arrived += (entries[i].flags & FI_REMOTE_WRITE) != 0;
        raw.done += (entries[i].flags & FI_REMOTE_WRITE) == 0;
    }
    return n > 0 ? n : 0;
}

static void post(uint64_t from, uint64_t to, uint64_t bytes, uint64_t contexts)
{
    struct iovec iov = {raw.memory + from, bytes};
    void *desc = fi_mr_desc(raw.mr);
    struct fi_rma_iov remote = {raw.far.address + to, bytes, raw.far.key};
    struct fi_msg_rma msg = {.msg_iov = &iov,
                             .desc = &desc,
                             .iov_count = 1,
                             .addr = raw.peer,
                             .rma_iov = &remote,
                             .rma_iov_count = 1,
                             .context = &raw.contexts[raw.posted % contexts],
                             .data = 1};
    ssize_t rc;
    while ((rc = fi_writemsg(raw.ep, &msg, raw.flags)) == -FI_EAGAIN)
        poll_queue();
    must(rc, "fi_writemsg");
    raw.posted++;
}

static void post_call(const struct raw_options *o)
{
    uint64_t contexts = (uint64_t)o->pages * o->window;
    for (uint32_t i = 0; i < o->pages; i++) {
        uint64_t from = raw.sources ? raw.sources[raw.at] : raw.at;
        uint64_t to = raw.destinations ? raw.destinations[raw.at] : raw.at;
        post(from * o->bytes, to * o->bytes, o->bytes, contexts);
        raw.at = raw.at + 1 < raw.count ? raw.at + 1 : 0;
    }
}

static void run_writes(const struct raw_options *o, int64_t end, struct raw_result *out)
{
    uint64_t calls = 0, ended = 0;
    int64_t now = raw_now();
    raw.posted = raw.done = 0;
    while (now < end || ended < calls) {
        while (now < end && calls - ended < o->window) {
            raw.begun[calls++ % o->window] = now;
            post_call(o);
        }
        poll_queue();
        now = raw_now();
        for (; ended < calls && raw.done >= (ended + 1) * o->pages; ended++)
            raw_sample(out, now - raw.begun[ended % o->window]);
    }
    out->iters = calls;
    out->bytes = calls * o->pages * o->bytes;
}

static void wait_arrivals(uint64_t target)
{
    for (uint32_t i = 1; raw.arrived < target; i++)
        if (!poll_queue() && i % LOOKS == 0)
            sched_yield();
}

static void run_roundtrips(const struct raw_options *o, int64_t end, struct raw_result *out)
{
    int64_t now = raw_now();
    while (now < end) {
        uint64_t target = raw.arrived + 1;
        int64_t then = now;
        post(0, 0, o->bytes, o->window);
        wait_arrivals(target);
        now = raw_now();
        raw_sample(out, now - then);
        out->iters++;
    }
    out->bytes = 2 * out->iters * o->bytes;
}

/* ---- the second process: progress while the first one runs, and answers ---- */

static bool told_to_stop(void)
{
    char byte;
    ssize_t n = recv(raw.link, &byte, 1, MSG_DONTWAIT);
    if (n == 0)
        exit(0);
    return n == 1;
}

__attribute__((noreturn)) static void serve(const struct raw_options *o)
{
    bool answers = !strcmp(o->op, "roundtrip");
    char byte;
    for (;;) {
        raw_get(raw.link, &byte, 1);
        uint64_t answered = raw.arrived;
        for (uint32_t i = 1; i % LOOKS || !told_to_stop(); i++) {
            if (!poll_queue() && i % LOOKS == 0)
                sched_yield();
            for (; answers && answered < raw.arrived; answered++)
                post(0, 0, o->bytes, o->window);
        }
        raw_put(raw.link, &byte, 1);
    }
}

/* ---- kind ---- */

static void open_ofi(const struct raw_options *o, char *about, int size)
{
    bool first = raw_fork(o, &raw.link);
    const struct fab_libfabric *lib = fab_libfabric();
    if (!lib)
        raw_fail("libfabric was not found");
    raw.count = o->walk / o->bytes;
    if (raw.count > UINT32_MAX)
        raw_fail("more than 2^32 pages to walk");
    raw.memory = raw_memory(o->walk);
    raw.contexts = calloc((uint64_t)o->pages * o->window, sizeof *raw.contexts);
    raw.begun = calloc(o->window, sizeof *raw.begun);
    if (!raw.contexts || !raw.begun)
        raw_fail("out of memory");
    if (!strcmp(o->op, "pages")) {
        raw.sources = raw_shuffle((uint32_t)raw.count, 1);
        raw.destinations = raw_shuffle((uint32_t)raw.count, 2);
    }
    raw.flags = FI_COMPLETION | FI_REMOTE_CQ_DATA |
                (o->delivery ? FI_DELIVERY_COMPLETE : FI_TRANSMIT_COMPLETE);
    open_endpoint(o);
    if (!first)
        serve(o);
    snprintf(about, (size_t)size, "libfabric %u.%u, %s, writes complete when %s",
             FI_MAJOR(lib->version), FI_MINOR(lib->version), o->provider,
             o->delivery ? "delivered" : "transmitted");
}

static void run_ofi(const struct raw_options *o, double seconds, struct raw_result *out)
{
    char byte = 0;
    raw_put(raw.link, &byte, 1);
    int64_t begin = raw_now(), end = begin + (int64_t)(seconds * 1e9);
    if (!strcmp(o->op, "roundtrip"))
        run_roundtrips(o, end, out);
    else
        run_writes(o, end, out);
    out->seconds = (double)(raw_now() - begin) / 1e9;
    raw_put(raw.link, &byte, 1);
    raw_get(raw.link, &byte, 1);
}

static void close_ofi(void)
{
    free(raw.contexts);
    free(raw.begun);
    free(raw.sources);
    free(raw.destinations);
}

const struct raw_kind raw_ofi = {
    .name = "ofi",
    .ops = "write pages roundtrip",
    .open = open_ofi,
    .run = run_ofi,
    .close = close_ofi,
};
