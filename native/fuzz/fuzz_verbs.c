/* What the verbs provider reads before the core does: UD datagrams, which anybody on the network can
 * send, and blobs of NICs and lanes. No device is needed: a NIC of which only the parts exist that
 * receive.
 *
 * The bytes of a datagram are those that belong at its place in the frame. So a frame that is put
 * together must be whole, whatever came twice, late, or with another cut.
 */
#include <errno.h>

#include "fuzz.h"
#include "providers/verbs.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

enum { TOKEN = 1 << 16 | 1, ABANDONED = 1 << 16 | 2, ROOM = VERBS_GRH + VERBS_UD_MTU };

static struct verbs_nic nic;
static struct verbs_lane lanes[3];
static struct verbs_lane *slots[] = {NULL, &lanes[1], &lanes[2]};

static uint8_t byte_at(uint32_t place)
{
    return (uint8_t)(place * 37 ^ place >> 8);
}

static void check_frame(const uint8_t *bytes, uint32_t length)
{
    MUST(length && length <= FAB_FRAME_MAX);
    for (uint32_t i = 0; i < length; i++)
        MUST(bytes[i] == byte_at(i));
}

static void on_hello(struct fab_nic *base, struct fab_origin *origin, const uint8_t *bytes,
                     uint32_t length)
{
    MUST(base == &nic.base && !origin);
    check_frame(bytes, length);
}

static void on_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    MUST(lane == &lanes[1].base && fd < 0);
    check_frame(bytes, length);
}

static const struct fab_sink sink = {.hello = on_hello, .frame = on_frame};

static void open_nic(void)
{
    nic.base.sink = &sink;
    nic.link_layer = IBV_LINK_LAYER_ETHERNET;
    nic.lanes = slots;
    nic.lane_slots = 3;
    lanes[1].token = TOKEN;
    lanes[2].token = ABANDONED;
    lanes[2].abandoned = true;
    /* Receives of datagrams begin where those of frames end. */
    nic.memory = malloc((size_t)VERBS_FRAME_RECVS * FAB_FRAME_MAX + ROOM);
    nic.partials = calloc(VERBS_PARTIALS, sizeof *nic.partials);
    MUST(nic.memory && nic.partials);
}

static void put16(uint8_t *at, uint16_t value)
{
    memcpy(at, &value, sizeof value);
}

/* A header that could be one, of a frame that is cut in some way. Returns the datagram's bytes. */
static uint32_t write_header(struct fuzz_input *in, uint8_t *at)
{
    static const uint64_t tokens[] = {0, TOKEN, ABANDONED, 2 << 16 | 1};
    uint8_t how = fuzz_u8(in), who = fuzz_u8(in);
    uint32_t length = 1 + fuzz_u16(in) % (FAB_FRAME_MAX + 64), count = 1 + fuzz_u8(in) % 32;
    uint32_t chunk = (length + count - 1) / count;
    count = (length + chunk - 1) / chunk;
    uint32_t number = fuzz_u8(in) % count;
    uint32_t here = number + 1 == count ? length - number * chunk : chunk;
    uint64_t token = tokens[who & 3];
    memset(at, 0, VERBS_DATAGRAM);
    put16(at, 0xFAB3);
    at[2] = 1;
    at[4] = who >> 2 & 3; /* serial */
    at[8] = who >> 4 & 1; /* source */
    memcpy(at + 16, &token, sizeof token);
    put16(at + 24, (uint16_t)number);
    put16(at + 26, (uint16_t)count);
    put16(at + 28, (uint16_t)length);
    put16(at + 30, (uint16_t)chunk);
    if (how & 1)
        at[fuzz_u8(in) % VERBS_DATAGRAM] = fuzz_u8(in);
    if (how & 2)
        put16(at + 24 + 2 * (fuzz_u8(in) & 3), fuzz_u16(in));
    if (how & 4)
        here = fuzz_u16(in) % (VERBS_UD_MTU - VERBS_DATAGRAM);
    return VERBS_DATAGRAM + here;
}

static void give_datagram(struct fuzz_input *in)
{
    uint8_t *at = verbs_ud_recv_buffer(&nic, 0), *header = at + VERBS_GRH;
    uint16_t number, chunk;
    ASAN_UNPOISON_MEMORY_REGION(at, ROOM);
    uint32_t length = write_header(in, header);
    if (length > VERBS_UD_MTU) /* no port takes it */
        length = VERBS_UD_MTU;
    memcpy(&number, header + 24, sizeof number);
    memcpy(&chunk, header + 30, sizeof chunk);
    for (uint32_t i = VERBS_DATAGRAM; i < length; i++)
        header[i] = byte_at((uint32_t)number * chunk + i - VERBS_DATAGRAM);
    if (fuzz_u8(in) % 16 == 0)
        length = fuzz_u8(in) % VERBS_DATAGRAM;
    ASAN_POISON_MEMORY_REGION(header + length, (size_t)VERBS_UD_MTU - length);
    verbs_contact_received(&nic, 0, VERBS_GRH + length);
}

static void give_blob(struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in), again[VERBS_BLOB];
    uint32_t length = how & 1 ? fuzz_u8(in) % (FAB_BLOB_MAX + 1) : VERBS_BLOB;
    uint8_t *blob = malloc(length ? length : 1);
    struct verbs_blob read = {0}, same = {0};
    MUST(blob);
    fuzz_eat(in, blob, length);
    if (length > 2 && !(how & 2)) {
        blob[0] = 1;
        blob[1] = IBV_LINK_LAYER_ETHERNET;
        blob[2] = (uint8_t)(blob[2] % 7);
    }
    int rc = verbs_blob_read(&nic, blob, length, &read);
    free(blob);
    if (rc)
        return;
    MUST(verbs_mtu_bytes(read.mtu) >= 256 && verbs_mtu_bytes(read.mtu) <= VERBS_UD_MTU);
    verbs_blob_write(&read, again);
    MUST(!verbs_blob_read(&nic, again, VERBS_BLOB, &same));
    MUST(same.token == read.token && same.frame_psn == read.frame_psn && same.lid == read.lid &&
         same.ud_qkey == read.ud_qkey && same.write_qpn == read.write_qpn &&
         !memcmp(&same.gid, &read.gid, sizeof same.gid));
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    if (!nic.memory)
        open_nic();
    memset(nic.partials, 0, VERBS_PARTIALS * sizeof *nic.partials);
    nic.partial_clock = 0;
    while (in.left)
        if (fuzz_u8(&in) % 8)
            give_datagram(&in);
        else
            give_blob(&in);
    return 0;
}
