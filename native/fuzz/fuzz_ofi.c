/* What the libfabric provider reads before the core does: tokens in front of frames, frames of credit,
 * the token and immediate of a peer's write, and blobs. libfabric is not needed: a NIC of which only the
 * parts exist that receive.
 */
#include "fuzz.h"
#include "providers/ofi.h"

enum { LANES = 3, CREDIT = 0x0c4ed17c };

static struct ofi_nic nic;
static struct ofi_domain domain;
static struct ofi_lane lanes[LANES];
static struct ofi_lane *slots[LANES] = {&lanes[0], NULL, &lanes[2]};
static uint32_t imms;

/* The bytes are read to the last: a sanitizer sees it where they are not all there. */
static void look(const uint8_t *bytes, uint32_t length)
{
    volatile uint8_t sum = 0;
    MUST(length <= FAB_FRAME_MAX);
    for (uint32_t i = 0; i < length; i++)
        sum = (uint8_t)(sum + bytes[i]);
}

static void on_hello(struct fab_nic *base, struct fab_origin *origin, const uint8_t *bytes,
                     uint32_t length)
{
    MUST(base == &nic.base && !origin);
    look(bytes, length);
}

static void on_frame(struct fab_lane *lane, const uint8_t *bytes, uint32_t length, int fd)
{
    MUST(lane == &lanes[0].base && fd < 0); /* the other one is closing */
    look(bytes, length);
}

static void on_imm(struct fab_lane *lane, uint32_t imm, uint32_t times)
{
    (void)imm;
    MUST((lane == &lanes[0].base || lane == &lanes[2].base) && times == 1);
    imms++;
}

static const struct fab_sink sink = {.hello = on_hello, .frame = on_frame, .imm = on_imm};

static void open_nic(struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    nic.base.sink = &sink;
    nic.kind = how & 1 ? &ofi_efa : &ofi_tcp;
    nic.lanes = slots;
    nic.lane_slots = LANES;
    domain.nic = &nic;
    memset(lanes, 0, sizeof lanes);
    for (uint32_t i = 0; i < LANES; i++) {
        lanes[i].base.nic = &nic.base;
        lanes[i].token = (uint64_t)(9 + i) << 32 | 5 << 16 | i;
        lanes[i].port = &nic.port;
        lanes[i].imms_sent = lanes[i].imms_known = how & 2 ? fuzz_u32(in) : 0;
        lanes[i].imms_sent += how >> 2 & 63;
    }
    lanes[2].closing = true;
}

static uint64_t any_token(struct fuzz_input *in)
{
    uint8_t which = fuzz_u8(in) % 8;
    if (which < LANES)
        return lanes[which].token;
    return which == LANES ? 0 : which == 4 ? lanes[0].token ^ fuzz_u64(in) : fuzz_u64(in);
}

static void give_frame(struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    uint64_t token = any_token(in);
    uint32_t length = fuzz_u8(in) % 4 ? 8 : fuzz_u16(in) % (FAB_FRAME_MAX + 1);
    uint32_t head[2] = {how & 2 ? CREDIT : fuzz_u32(in), lanes[0].imms_known + fuzz_u8(in)};
    struct ofi_port port = {.domain = &domain, .lane = how & 1 ? &lanes[0] : NULL};
    struct ofi_slot slot = {.kind = OFI_RECV, .port = &port};
    uint32_t left = ofi_credit_left(&lanes[0]);
    lanes[0].port = how & 8 ? &nic.port : &port;
    length += OFI_TOKEN_BYTES;
    slot.frame = malloc(length);
    MUST(slot.frame);
    fuzz_eat(in, slot.frame, length);
    memcpy(slot.frame, &token, sizeof token);
    if (length >= 2 * OFI_TOKEN_BYTES)
        memcpy(slot.frame + OFI_TOKEN_BYTES, head, sizeof head);
    if (how & 4)
        length = fuzz_u8(in) % OFI_TOKEN_BYTES; /* not even a token */
    ofi_frame_received(&port, &slot, length);
    free(slot.frame);
    MUST(ofi_credit_left(&lanes[0]) >= left); /* nothing that comes takes credit away */
    MUST(lanes[0].imms_sent - lanes[0].imms_known <= 63);
}

static void give_write(struct fuzz_input *in)
{
    uint32_t before = imms;
    struct ofi_event event = {.flags = FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA,
                              .data = any_token(in) << 32 | fuzz_u32(in),
                              .from = fuzz_u64(in)};
    if (fuzz_u8(in) % 8 == 0)
        event.flags = fuzz_u64(in);
    ofi_handle(&domain, &event);
    MUST(imms - before <= 1);
}

static void give_blob(struct fuzz_input *in)
{
    struct ofi_port port = {.domain = &domain};
    uint32_t length = fuzz_u8(in) % (FAB_BLOB_MAX + 1);
    uint64_t token;
    uint8_t again[FAB_BLOB_MAX], *blob = malloc(length ? length : 1);
    MUST(blob);
    port.address_len = fuzz_u8(in) % (sizeof port.address + 1);
    fuzz_eat(in, blob, length);
    if (ofi_blob_split(&port, blob, length, &token)) {
        memcpy(port.address, blob + OFI_TOKEN_BYTES, port.address_len);
        ofi_blob_join(&port, token, again, &length);
        MUST(length == OFI_TOKEN_BYTES + port.address_len && !memcmp(again, blob, length));
    }
    free(blob);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    open_nic(&in);
    while (in.left) {
        uint8_t step = fuzz_u8(&in) % 4;
        if (step == 0)
            give_blob(&in);
        else if (step == 1 && nic.kind == &ofi_tcp) /* elsewhere the lane would send credit */
            give_write(&in);
        else
            give_frame(&in);
    }
    return 0;
}
