/* Copies that the owner of the memory makes: asking for them, and serving the peer's.
 *
 * Contract
 * - The asker says where the bytes are: in a memfd of its own that the peer maps (sent once per
 *   registration, LOCAL_SOURCES of them at a time, the oldest give way), in its process, or in
 *   its staging ring. FABRIC_LOCAL_PULL=vm or staging fixes the way; auto takes the first of these
 *   that works.
 * - The owner copies under its own progress lock, up to LOCAL_CHUNK at a time, into what
 *   sink->destination allows, under the asker's permit: once that is revoked no request starts
 *   any more. It counts the immediate after the copy, unless the permit was revoked meanwhile,
 *   and answers then.
 * - A source that cannot be read fails its request, never the reader: mappings are of sealed
 *   memfds, and process_vm_readv tells. After each such call the process is checked to be alive,
 *   so what was read was not another one's that got the same pid.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "local.h"

/* ================ asking ================ */

static struct local_shown *find_shown(struct local_lane *lane, const void *what)
{
    for (int i = 0; i < LOCAL_SOURCES; i++)
        if (lane->shown[i].what == what)
            return &lane->shown[i];
    return NULL;
}

static int send_mapping(struct local_lane *lane, enum local_note_type type, uint64_t serial,
                        uint64_t length, int fd)
{
    struct local_note note = {.magic = LOCAL_NOTE_MAGIC,
                              .version = LOCAL_VERSION,
                              .type = (uint8_t)type,
                              .serial = serial,
                              .length = length};
    return fab_local_lane_packet(lane, &note, sizeof note, &fd, fd >= 0);
}

/* Where the peer finds `what`. NULL: not now, or the lane has failed. */
static struct local_shown *show(struct local_lane *lane, const void *what, uint64_t length, int fd)
{
    struct local_shown *shown = find_shown(lane, what);
    if (shown)
        return shown;
    shown = &lane->shown[(lane->last_serial + 1) % LOCAL_SOURCES];
    if (shown->serial && shown->last > lane->answered)
        return NULL; /* a request under way names what stands here */
    int rc = send_mapping(lane, LOCAL_MAP, lane->last_serial + 1, length, fd);
    if (rc) {
        if (rc != -EAGAIN)
            fab_local_fail(lane, rc, "sending memory to process %d: %s", (int)lane->end.pid,
                           strerror(-rc));
        return NULL;
    }
    if (shown->serial && !shown->what)
        lane->unmaps--; /* the new one takes its place */
    *shown =
        (struct local_shown){.serial = ++lane->last_serial, .what = what, .last = lane->answered};
    return shown;
}

void fab_local_hide(struct local_lane *lane, const void *what)
{
    struct local_shown *shown = find_shown(lane, what);
    if (!shown)
        return;
    shown->what = NULL;
    lane->unmaps++;
    fab_local_unmaps(lane);
}

void fab_local_unmaps(struct local_lane *lane)
{
    for (int i = 0; lane->unmaps && !lane->fault && i < LOCAL_SOURCES; i++) {
        struct local_shown *shown = &lane->shown[i];
        if (!shown->serial || shown->what)
            continue;
        if (send_mapping(lane, LOCAL_UNMAP, shown->serial, 0, -1))
            return;
        shown->serial = 0;
        lane->unmaps--;
    }
}

/* The staging ring: bytes [staging_head, staging_tail) are behind requests under way. */
static bool open_staging(struct local_lane *lane)
{
    if (lane->staging)
        return true;
    void *map;
    int rc = fab_local_share("llm-fabric staging", LOCAL_STAGING, &map, &lane->staging_fd);
    if (rc) {
        fab_local_fail(lane, rc, "staging memory of %llu bytes: %s",
                       (unsigned long long)LOCAL_STAGING, strerror(-rc));
        return false;
    }
    lane->staging = map;
    return true;
}

/* Stages up to `length` bytes in one piece; returns how many, and where. 0: no room. */
static uint64_t stage(struct local_lane *lane, const uint8_t *from, uint64_t length, uint64_t *at)
{
    uint64_t place = lane->staging_tail % LOCAL_STAGING;
    uint64_t room = LOCAL_STAGING - (lane->staging_tail - lane->staging_head);
    uint64_t n = length < LOCAL_CHUNK ? length : LOCAL_CHUNK;
    n = n < LOCAL_STAGING - place ? n : LOCAL_STAGING - place;
    n = n < room ? n : room;
    memcpy(lane->staging + place, from, n);
    lane->staging_tail += n;
    *at = place;
    return n;
}

/* One request as it is about to be put. */
struct request {
    uint32_t from;
    uint64_t serial, source, length;
    uint32_t staged;
};

static bool from_mapped(struct local_lane *lane, const struct fab_mr *mr, const uint8_t *src,
                        struct request *out)
{
    struct local_shown *shown = show(lane, mr, mr->length, mr->memfd);
    if (!shown)
        return false;
    shown->last = lane->asked + 1;
    out->from = LOCAL_FROM_MAPPED;
    out->serial = shown->serial;
    out->source = (uint64_t)(src - mr->base);
    return true;
}

static bool from_staging(struct local_lane *lane, const uint8_t *src, struct request *out)
{
    struct local_nic *nic = fab_local_nic(lane);
    if (!nic->allowance || !open_staging(lane))
        return false;
    struct local_shown *shown = show(lane, lane, LOCAL_STAGING, lane->staging_fd);
    if (!shown)
        return false;
    out->length = stage(lane, src, out->length, &out->source);
    if (!out->length)
        return false;
    shown->last = lane->asked + 1;
    out->from = LOCAL_FROM_MAPPED;
    out->serial = shown->serial;
    out->staged = (uint32_t)out->length;
    fab_local_spend(nic, out->length);
    return true;
}

/* Fills in where the next bytes of `work` are. False: not now; or work->status is set. */
static bool choose_source(struct local_lane *lane, struct local_work *work, struct request *out)
{
    enum local_pull_mode mode = fab_local_nic(lane)->mode;
    const struct fab_wr *wr = &work->wr;
    const uint8_t *src = wr->src + work->moved;
    *out = (struct request){.length = wr->length - work->moved};
    if (!wr->length)
        return true;
    if (mode == LOCAL_MODE_AUTO && wr->mr->memfd >= 0)
        return from_mapped(lane, wr->mr, src, out);
    if (mode != LOCAL_MODE_STAGING && lane->peer_reads) {
        out->from = LOCAL_FROM_PROCESS;
        out->source = (uint64_t)(uintptr_t)src;
        return true;
    }
    if (mode == LOCAL_MODE_VM) {
        work->status = -EPERM; /* asked for, and not permitted here */
        return false;
    }
    return from_staging(lane, src, out);
}

static void put_request(struct local_lane *lane, const struct local_work *work,
                        const struct request *request, bool last)
{
    const struct fab_wr *wr = &work->wr;
    struct local_pull *slot = fab_local_pull_at(lane->out, (uint32_t)lane->asked);
    slot->from = request->from;
    slot->flags = last ? wr->flags & FAB_WR_IMM : 0;
    slot->imm = wr->imm;
    slot->serial = request->serial;
    slot->source = request->source;
    slot->region = wr->length ? wr->remote->number : 0;
    slot->offset = wr->addr + work->moved;
    slot->length = request->length;
    atomic_store_explicit(&slot->state, LOCAL_PULL_POSTED, memory_order_release);
    lane->staged[lane->asked % LOCAL_PULLS] = request->staged;
    lane->asked++;
    lane->to_ring = true;
}

void fab_local_ask(struct local_lane *lane, struct local_work *work)
{
    while (!work->issued && !work->status) {
        struct request request;
        if (lane->asked - lane->answered == LOCAL_PULLS || !choose_source(lane, work, &request))
            break;
        bool last = work->moved + request.length == work->wr.length;
        put_request(lane, work, &request, last);
        work->moved += request.length;
        work->asked++;
        work->issued = last;
    }
    if (work->status)
        work->issued = true; /* what is under way is waited for, nothing is added */
}

int fab_local_answers(struct local_lane *lane)
{
    int n = 0;
    while (lane->asked != lane->answered &&
           fab_local_pull_is(lane->out, (uint32_t)lane->answered, LOCAL_PULL_DONE)) {
        struct local_pull *slot = fab_local_pull_at(lane->out, (uint32_t)lane->answered);
        int32_t status = slot->status;
        atomic_store_explicit(&slot->state, LOCAL_PULL_FREE, memory_order_relaxed);
        /* Answers come in order, so this one is for the oldest work request. */
        struct local_work *work = &lane->work[lane->head % LOCAL_WORK];
        lane->staging_head += lane->staged[lane->answered % LOCAL_PULLS];
        lane->answered++;
        work->asked--;
        if (status && !work->status)
            work->status = status < 0 && status > -4096 ? status : -EPROTO;
        fab_local_settle(lane);
        n++;
    }
    return n;
}

/* ================ serving ================ */

static struct local_source *find_source(struct local_lane *lane, uint64_t serial)
{
    struct local_source *source = &lane->sources[serial % LOCAL_SOURCES];
    return source->map && source->serial == serial ? source : NULL;
}

static void unmap_source(struct local_source *source)
{
    fab_local_unmap(source->map, source->length);
    *source = (struct local_source){0};
}

void fab_local_map_note(struct local_lane *lane, const struct local_note *note,
                        struct local_packet *packet)
{
    struct local_source *source = &lane->sources[note->serial % LOCAL_SOURCES];
    if (note->type == LOCAL_UNMAP) {
        if (source->serial == note->serial)
            unmap_source(source);
        return;
    }
    unmap_source(source);
    /* Where this fails, the requests that name it fail. */
    if (packet->fd_count == 1 &&
        fab_local_map(packet->fds[0], note->length, PROT_READ, &source->map) == 0) {
        source->serial = note->serial;
        source->length = note->length;
    }
}

/* A part of a request that is about to be copied. */
struct step {
    struct local_pull request;
    uint8_t *to;
    const uint8_t *from; /* NULL: in the peer's process */
    uint64_t address;
    uint64_t n;
    int status;
};

/* Reads the request at `index` once; everything after works on the copy. */
static bool read_request(struct local_lane *lane, uint32_t index, struct local_pull *out)
{
    struct local_pull *slot = fab_local_pull_at(lane->in, index);
    if (!fab_local_pull_is(lane->in, index, LOCAL_PULL_POSTED))
        return false;
    out->from = slot->from;
    out->flags = slot->flags;
    out->imm = slot->imm;
    out->serial = slot->serial;
    out->source = slot->source;
    out->region = slot->region;
    out->offset = slot->offset;
    out->length = slot->length;
    atomic_signal_fence(memory_order_seq_cst); /* the compiler shall not read it again */
    return true;
}

static int find_mapped(struct local_lane *lane, struct step *step, uint64_t done, bool first)
{
    const struct local_pull *r = &step->request;
    struct local_source *source = find_source(lane, r->serial);
    if (!source) { /* its packet was sent before the request: it is in the socket */
        if (!first)
            return -EAGAIN; /* reading it could unmap what earlier steps point to */
        int n = fab_local_lane_packets(lane);
        source = find_source(lane, r->serial);
        if (!source)
            return n == LOCAL_PACKETS ? -EAGAIN : -EFAULT;
    }
    if (r->source > source->length || r->length > source->length - r->source)
        return -EFAULT;
    step->from = (const uint8_t *)source->map + r->source + done;
    return 0;
}

/* Checks a request of which `done` bytes are copied, and finds both ends of the next ones. */
static int prepare(struct local_lane *lane, struct step *step, uint64_t done, uint64_t most,
                   bool first)
{
    const struct local_pull *r = &step->request;
    if (r->from == LOCAL_FROM_NOTHING)
        return r->length ? -EINVAL : 0;
    if (r->from != LOCAL_FROM_MAPPED && r->from != LOCAL_FROM_PROCESS)
        return -EINVAL;
    if (!r->length || r->source + r->length < r->source || r->offset + r->length < r->offset)
        return -EINVAL;
    if (r->from == LOCAL_FROM_MAPPED) {
        int rc = find_mapped(lane, step, done, first);
        if (rc)
            return rc;
    }
    step->n = r->length - done < most ? r->length - done : most;
    step->address = r->source + done;
    /* All that is left of it, so that no part lands of what is refused as a whole. */
    step->to = lane->base.nic->sink->destination(&lane->base, r->region, r->offset + done,
                                                 r->length - done);
    return step->to ? 0 : -EACCES;
}

/* Up to a chunk of what is asked for; a step with a status or a part of a request is the last. */
static int gather(struct local_lane *lane, struct step *steps)
{
    uint64_t most = LOCAL_CHUNK, done = lane->served_bytes;
    int count = 0;
    while (count < LOCAL_IOVECS && most) {
        struct step *step = &steps[count];
        *step = (struct step){0};
        if (!read_request(lane, lane->served + (uint32_t)count, &step->request))
            break;
        step->status = prepare(lane, step, done, most, count == 0);
        if (step->status == -EAGAIN) { /* packets are read in the next turn */
            fab_local_lane_pend(lane);
            break;
        }
        count++;
        most -= step->n;
        if (step->status || done + step->n < step->request.length)
            break;
        done = 0;
    }
    return count;
}

/* Reads steps [0, count) from the peer's process. Where the kernel stops early the step that it
 * stopped in is cut, or gets a status; returns how many steps were looked at. */
static int copy_process(struct local_lane *lane, struct step *steps, int count)
{
    struct iovec to[LOCAL_IOVECS], from[LOCAL_IOVECS];
    for (int i = 0; i < count; i++) {
        to[i] = (struct iovec){steps[i].to, steps[i].n};
        from[i] = (struct iovec){(void *)(uintptr_t)steps[i].address, steps[i].n};
    }
    ssize_t got =
        process_vm_readv(lane->end.pid, to, (unsigned long)count, from, (unsigned long)count, 0);
    if (got <= 0) {
        steps[0].status = got < 0 ? -errno : -EFAULT;
        steps[0].n = 0;
        return 1;
    }
    if (fab_local_dead(&lane->end)) {
        steps[0].status = -ESRCH;
        return 1;
    }
    uint64_t left = (uint64_t)got;
    for (int i = 0; i < count; i++) {
        if (left < steps[i].n) {
            steps[i].n = left; /* asked again from here, it gets its status */
            return i + 1;
        }
        left -= steps[i].n;
    }
    return count;
}

static bool from_process(const struct step *step)
{
    return step->n && !step->from && !step->status;
}

/* Steps of equal length are one copy (local_copy.h). Returns how many were looked at. */
static int copy_mapped(struct local_lane *lane, const struct step *steps, int count)
{
    struct local_span spans[LOCAL_SPANS];
    int n = 0;
    if (!steps->n || steps->status)
        return 1;
    while (n < count && n < LOCAL_SPANS && steps[n].from && !steps[n].status &&
           steps[n].n == steps->n) {
        spans[n] = (struct local_span){steps[n].to, steps[n].from};
        n++;
    }
    fab_local_copy(&fab_local_nic(lane)->cache, spans, n, steps->n);
    return n;
}

/* Copies all steps; returns how many are valid. */
static int copy_steps(struct local_lane *lane, struct step *steps, int count)
{
    for (int i = 0; i < count;) {
        if (!from_process(&steps[i])) {
            i += copy_mapped(lane, steps + i, count - i);
            continue;
        }
        int run = 1;
        while (i + run < count && from_process(&steps[i + run]))
            run++;
        int looked = copy_process(lane, steps + i, run);
        i += looked;
        struct step *last = &steps[i - 1];
        if (looked < run || last->status)
            return i;
    }
    return count;
}

static void answer(struct local_lane *lane, int status)
{
    struct local_pull *slot = fab_local_pull_at(lane->in, lane->served);
    slot->status = status;
    atomic_store_explicit(&slot->state, LOCAL_PULL_DONE, memory_order_release);
    lane->served++;
    lane->served_bytes = 0;
    lane->to_ring = true;
}

/* Counts and answers what is finished; returns how many requests that were. */
static int finish_steps(struct local_lane *lane, const struct step *steps, int count)
{
    const struct fab_sink *sink = lane->base.nic->sink;
    int n = 0;
    for (int i = 0; i < count; i++) {
        const struct step *step = &steps[i];
        lane->served_bytes += step->n;
        if (!step->status && lane->served_bytes < step->request.length)
            break;
        if (!step->status && (step->request.flags & FAB_WR_IMM))
            sink->imm(&lane->base, step->request.imm, 1);
        answer(lane, step->status);
        n++;
    }
    return n;
}

int fab_local_serve(struct local_lane *lane)
{
    struct local_nic *nic = fab_local_nic(lane);
    struct step steps[LOCAL_IOVECS];
    int n = 0;
    if (!fab_local_pull_is(lane->in, lane->served, LOCAL_PULL_POSTED))
        return 0;
    while (nic->allowance && !lane->fault) {
        int count = gather(lane, steps);
        if (!count)
            return n;
        if (!fab_local_enter(&lane->in->pulling, &lane->in->closed))
            return n; /* the asker has ended the session */
        count = copy_steps(lane, steps, count);
        bool closed = atomic_load_explicit(&lane->in->closed, memory_order_acquire);
        fab_local_leave(&lane->in->pulling);
        if (closed)
            return n;
        for (int i = 0; i < count; i++)
            fab_local_spend(nic,
                            steps[i].n > LOCAL_REQUEST_BYTES ? steps[i].n : LOCAL_REQUEST_BYTES);
        n += finish_steps(lane, steps, count);
    }
    if (!lane->fault && fab_local_pull_is(lane->in, lane->served, LOCAL_PULL_POSTED))
        fab_local_lane_pend(lane);
    return n;
}

void fab_local_pull_free(struct local_lane *lane)
{
    for (int i = 0; i < LOCAL_SOURCES; i++)
        unmap_source(&lane->sources[i]);
    fab_local_unmap(lane->staging, LOCAL_STAGING);
    if (lane->staging_fd >= 0)
        close(lane->staging_fd);
}
