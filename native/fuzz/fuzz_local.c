/* What a process of the same user may do to the same-host provider: packets with any bytes and file
 * descriptors before and after it is let in, and anything written to the memory that it shares. The
 * provider is driven by its vtable; the other end of the connection is this program.
 *
 * Whatever comes, no memory but the granted region's is written, every work request is reported once, the
 * lane closes as soon as nobody is inside, and no file descriptor is left.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "providers/local.h"

enum { REGION = 1, TARGET = 4096, SOURCE = 8192, FDS = 5, GUARD = 0x5a };
enum step { NOTE, FRAME, IMM, PULL, ANSWER, SCRIBBLE, POST, POLL, ADMIT, SAY, STEPS };

static const struct fab_provider *const provider = &fab_provider_local;

static struct {
    struct fab_nic *nic;
    struct fab_lane *lane;
    struct fab_origin *origin;
    struct local_end end; /* the stranger's */
    struct local_inbox *in; /* what it lets the provider write to */
    struct local_inbox *out; /* the provider's, once it gave it */
    struct local_bell *bell;
    int in_fd, bell_fd;
    int fds[FDS]; /* what it attaches to packets */
    struct fab_mr *mr;
    struct fab_remote *remote;
    uint8_t *target, *source;
    uint32_t pulls, imms, answers;
    uint64_t taken, reported;
} the;

/* ---- the core's part ---- */

static void on_imm(struct fab_lane *lane, uint32_t imm, uint32_t times)
{
    (void)imm;
    MUST(lane == the.lane && times);
}

static void on_completed(struct fab_lane *lane, uint64_t wr_id, int status)
{
    MUST(lane == the.lane && status <= 0 && wr_id == the.reported); /* it keeps the order */
    the.reported++;
}

static void on_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    MUST(lane == the.lane && length && length <= sizeof((struct local_packet *)0)->bytes && bytes);
    if (fd >= 0)
        close(fd);
}

static void on_hello(struct fab_nic *nic, struct fab_origin *origin, const uint8_t *bytes,
                     uint32_t length)
{
    MUST(nic == the.nic && length && bytes);
    the.origin = origin;
}

static void on_origin_gone(struct fab_nic *nic, struct fab_origin *origin)
{
    MUST(nic == the.nic);
    if (the.origin == origin)
        the.origin = NULL;
}

static void on_lane_down(struct fab_lane *lane, int error, const char *text)
{
    MUST(lane == the.lane && error < 0 && text[0]);
}

static uint8_t *on_destination(struct fab_lane *lane, uint64_t number, uint64_t offset,
                               uint64_t length)
{
    MUST(lane == the.lane);
    if (number != REGION || offset > TARGET || length > TARGET - offset)
        return NULL;
    return the.target + offset;
}

static const struct fab_sink sink = {.imm = on_imm,
                                     .completed = on_completed,
                                     .frame = on_frame,
                                     .hello = on_hello,
                                     .origin_gone = on_origin_gone,
                                     .lane_down = on_lane_down,
                                     .destination = on_destination};

static void poll_nic(void)
{
    (void)provider->arm(the.nic); /* looks at all lanes, */
    provider->disarm(the.nic); /* and the next poll at all sockets */
    the.nic->now = fab_now();
    (void)provider->poll(the.nic, 64);
    const struct local_lane *lane = (const struct local_lane *)the.lane;
    if (!lane)
        return;
    MUST(lane->asked - lane->answered <= LOCAL_PULLS && lane->tail - lane->head <= LOCAL_WORK);
    MUST(lane->staging_tail - lane->staging_head <= LOCAL_STAGING);
}

static void admit(bool yes)
{
    if (!the.origin)
        return;
    if (!yes || the.lane || provider->lane_open(the.nic, the.origin, &the.lane)) {
        if (the.origin)
            provider->origin_drop(the.nic, the.origin);
    }
    the.origin = NULL;
}

/* What the core does with an answer that needs no lane, and with a frame of its own. */
static void say(struct fuzz_input *in)
{
    static const uint8_t frame[16] = {0xB1, 0xFA};
    if (the.lane)
        (void)provider->lane_send(the.lane, frame, 1 + fuzz_u8(in) % sizeof frame, NULL);
    else if (the.origin)
        (void)provider->origin_reply(the.nic, the.origin, NULL, 0, frame, sizeof frame);
}

/* ---- the stranger's ---- */

static int make_memfd(size_t bytes, bool sealed)
{
    void *map;
    int fd;
    if (!sealed) {
        fd = memfd_create("unsealed", MFD_CLOEXEC);
        MUST(fd >= 0 && !ftruncate(fd, (off_t)bytes));
        return fd;
    }
    MUST(!fab_local_share("sealed", bytes, &map, &fd));
    fab_local_unmap(map, bytes);
    return fd;
}

/* The provider connects to us, as it does to whom an address names. */
static void be_dialled(void)
{
    static const uint8_t name[LOCAL_NAME_BYTES] = {1, 2, 3};
    uint8_t own[LOCAL_NAME_BYTES];
    pid_t pid = getpid();
    memcpy(own, name, sizeof own);
    memcpy(own + 4, &pid, sizeof pid); /* several of us may run */
    int listener = fab_local_listen(own);
    MUST(listener >= 0);
    MUST(!provider->lane_open(the.nic, NULL, &the.lane));
    MUST(provider->lane_connect(the.lane, own, sizeof own - 1));
    MUST(!provider->lane_connect(the.lane, own, sizeof own));
    the.end = (struct local_end){
        .sock = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), .pidfd = -1};
    MUST(the.end.sock >= 0);
    close(listener);
}

static void open_all(uint8_t how)
{
    static const char *const modes[] = {"auto", "vm", "staging"};
    static const struct fab_nic_options options = {.sink = &sink};
    void *map;
    memset(&the, 0, sizeof the);
    setenv("FABRIC_LOCAL_PULL", modes[how % 3], 1);
    MUST(!provider->nic_open(&options, &the.nic));
    if (how & 4)
        be_dialled();
    else
        MUST(!fab_local_dial(the.nic->info.blob, &the.end));
    MUST(!fab_local_share("inbox", sizeof *the.in, &map, &the.in_fd));
    the.in = map;
    MUST(!fab_local_share("bell", sizeof *the.bell, &map, &the.bell_fd));
    the.bell = map;
    the.fds[0] = the.in_fd;
    the.fds[1] = the.bell_fd;
    the.fds[2] = make_memfd(SOURCE, true);
    the.fds[3] = make_memfd(sizeof *the.in, false);
    the.fds[4] = open("/dev/null", O_RDWR | O_CLOEXEC);
    the.target = malloc(TARGET);
    the.source = malloc(SOURCE);
    MUST(the.fds[4] >= 0 && the.target && the.source);
    memset(the.target, GUARD, TARGET);
    memset(the.source, 1, SOURCE);
    struct fab_memory memory = {
        .base = the.source, .length = SOURCE, .number = 2, .memfd = -1, .dmabuf_fd = -1};
    fab_key key;
    MUST(!provider->mr_reg(the.nic, &memory, &the.mr, &key));
    MUST(!provider->import(the.lane, REGION, TARGET, -1, true,
                           &the.remote)); /* belongs to no lane */
}

static void close_all(void)
{
    poll_nic();
    the.in->busy = the.in->pulling = 0; /* nobody is inside, whatever was scribbled */
    if (the.out)
        the.out->busy = the.out->pulling = 0;
    admit(false);
    if (the.lane)
        MUST(!provider->lane_close(the.lane));
    MUST(the.reported == the.taken);
    provider->unimport(the.remote);
    MUST(!provider->mr_dereg(the.nic, the.mr));
    provider->nic_close(the.nic);
    fab_local_end_close(&the.end);
    fab_local_unmap(the.in, sizeof *the.in);
    fab_local_unmap(the.bell, sizeof *the.bell);
    fab_local_unmap(the.out, sizeof *the.out);
    for (int i = 0; i < FDS; i++)
        close(the.fds[i]);
    free(the.target);
    free(the.source);
}

/* Reads what the provider said, and maps its inbox. */
static void listen_to_it(void)
{
    struct local_packet packet;
    struct local_note note;
    while (fab_local_receive(the.end.sock, &packet) > 0) {
        void *map;
        if (fab_local_is_note(&packet, &note) && note.type == LOCAL_SETUP && !the.out) {
            MUST(packet.fd_count == 2);
            MUST(!fab_local_map(packet.fds[0], sizeof *the.out, PROT_READ | PROT_WRITE, &map));
            the.out = map;
        }
        fab_local_packet_drop(&packet);
    }
}

static void give_packet(struct fuzz_input *in, const void *bytes, size_t length, uint32_t wanted)
{
    int fds[LOCAL_PACKET_FDS];
    uint8_t how = fuzz_u8(in);
    uint32_t count = how & 1 ? how >> 1 & 3 : wanted;
    for (uint32_t i = 0; i < count; i++)
        fds[i] = the.fds[how & 8 ? fuzz_u8(in) % FDS : wanted == 1 ? 2 : i];
    if (the.end.sock >= 0)
        (void)fab_local_send(the.end.sock, bytes, length, fds, count);
    if (how >> 4 == 15)
        fab_local_end_close(&the.end);
}

static void give_note(struct fuzz_input *in)
{
    uint8_t type = fuzz_u8(in), how = fuzz_u8(in);
    struct local_note note = {.magic = LOCAL_NOTE_MAGIC,
                              .version = LOCAL_VERSION,
                              .type = type % (LOCAL_WAKE + 2),
                              .number = type & 128 ? fuzz_u32(in) : 1,
                              .length = type & 64 ? fuzz_u64(in) : SOURCE,
                              .address = (uint64_t)(uintptr_t)&the.taken,
                              .nonce = the.taken};
    note.serial = note.type == LOCAL_SETUP ? sizeof *the.in : fuzz_u8(in) % 66;
    if (how & 1)
        fuzz_eat(in, &note.serial, sizeof note.serial);
    if (how & 2)
        fuzz_eat(in, &note.address, sizeof note.address);
    if (how & 4)
        note.version = fuzz_u8(in);
    size_t length = how & 8 ? fuzz_u8(in) % sizeof note : sizeof note;
    give_packet(in, &note, length ? length : 1,
                note.type == LOCAL_SETUP ? 2 : note.type == LOCAL_MAP);
}

static void give_frame(struct fuzz_input *in)
{
    uint8_t bytes[FAB_FRAME_MAX + 64] = {0xB1, 0xFA};
    uint32_t length = fuzz_u8(in) % 8 ? 16 : 1 + fuzz_u16(in) % sizeof bytes;
    fuzz_eat(in, bytes + 2, 14);
    give_packet(in, bytes, length, 0);
}

/* ---- the memory that both share ---- */

static void ring(void)
{
    struct local_nic *nic = (struct local_nic *)the.nic;
    atomic_store(&nic->bell->bits[0], UINT64_MAX);
}

/* A request to copy into the region, as the protocol has it or nearly. */
static void give_pull(struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    struct local_pull *slot = &the.out->pulls[the.pulls++ % LOCAL_PULLS];
    slot->from = fuzz_u8(in) % 8 ? 1u + (how & 1) : fuzz_u32(in);
    slot->flags = fuzz_u8(in);
    slot->imm = fuzz_u32(in);
    slot->serial = fuzz_u8(in) % 66;
    slot->source = fuzz_u16(in);
    slot->region = REGION;
    slot->offset = fuzz_u16(in) % (TARGET + 8);
    slot->length = fuzz_u16(in) % (TARGET + 8);
    if (slot->from == LOCAL_FROM_PROCESS)
        slot->source = (uint64_t)(uintptr_t)the.source + slot->source % SOURCE;
    if (how & 2)
        fuzz_eat(in, &slot->source, 8);
    if (how & 4)
        fuzz_eat(in, &slot->offset, 8);
    if (how & 8)
        fuzz_eat(in, &slot->length, 8);
    if (how & 16)
        slot->region = fuzz_u8(in);
    atomic_store(&slot->state, LOCAL_PULL_POSTED);
}

/* It says that it has copied what the provider asked for, or that it could not. */
static void give_answer(struct fuzz_input *in)
{
    struct local_pull *slot = &the.in->pulls[the.answers++ % LOCAL_PULLS];
    slot->status = (int32_t)(fuzz_u8(in) % 4 ? 0 : fuzz_u32(in));
    atomic_store(&slot->state, fuzz_u8(in) % 8 ? LOCAL_PULL_DONE : fuzz_u32(in));
}

static void scribble(struct fuzz_input *in)
{
    struct local_inbox *box = fuzz_u8(in) & 1 ? the.in : the.out;
    uint32_t at = fuzz_u8(in) % 4 ? fuzz_u8(in) * 4u : fuzz_u16(in);
    uint32_t word = fuzz_u32(in);
    if (at <= sizeof *box - sizeof word)
        memcpy((uint8_t *)box + at, &word, sizeof word);
}

static void post(struct fuzz_input *in)
{
    uint16_t length = fuzz_u16(in) % TARGET;
    struct fab_wr wr = {.wr_id = the.taken,
                        .src = the.source,
                        .mr = length ? the.mr : NULL,
                        .remote = length ? the.remote : NULL,
                        .length = length,
                        .imm = fuzz_u8(in),
                        .flags = fuzz_u8(in) & FAB_WR_IMM};
    int rc = provider->post(the.lane, &wr, 1);
    MUST(rc <= 1);
    the.taken += rc == 1;
}

static void shared_step(struct fuzz_input *in, enum step step)
{
    if (!the.lane || !the.out)
        return;
    if (step == IMM)
        the.out->imms[the.imms++ % LOCAL_IMMS] = fuzz_u8(in) % 8 ? 1ull << 32 | 7 : fuzz_u64(in);
    else if (step == PULL)
        give_pull(in);
    else if (step == ANSWER)
        give_answer(in);
    else if (step == SCRIBBLE)
        scribble(in);
    else if (step == POST)
        post(in);
    ring();
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    int lowest = dup(0);
    close(lowest);
    open_all(fuzz_u8(&in));
    while (in.left) {
        enum step step = (enum step)(fuzz_u8(&in) % STEPS);
        if (step == NOTE) {
            give_note(&in);
        } else if (step == FRAME) {
            give_frame(&in);
        } else if (step == SAY) {
            say(&in);
        } else if (step == POLL || step == ADMIT) {
            poll_nic();
            if (step == ADMIT)
                admit(fuzz_u8(&in) % 4);
            if (the.end.sock >= 0)
                listen_to_it();
        } else {
            shared_step(&in, step);
        }
    }
    close_all();
    int after = dup(0);
    MUST(after == lowest);
    close(after);
    return 0;
}
