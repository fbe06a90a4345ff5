/* What an application was told by somebody: addresses of NICs and descriptors of memory, with anything in
 * them, used for writes and messages. They are refused with a reason, or what was begun with them ends;
 * nobody else's transfers are touched.
 */
#include "fuzz.h"

static void fill_nics(struct fuzz_input *in, fab_nic_info nics[FAB_MAX_NICS], uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint8_t how = fuzz_u8(in);
        if (how & 1)
            nics[i].kind = fuzz_u8(in) % 8;
        if (how & 2)
            nics[i].blob_len = (uint32_t)fuzz_u16(in);
        if (how & 4)
            fuzz_eat(in, nics[i].blob, how >> 3 & 15);
        if (how & 128)
            nics[i].max_write = fuzz_u64(in);
    }
}

static int64_t add_peer(struct fuzz_pair *p, struct fuzz_input *in)
{
    fab_nic_info nics[FAB_MAX_NICS + 1] = {0};
    fab_peer_address address = fuzz_address(p->b, nics);
    uint8_t how = fuzz_u8(in);
    for (uint32_t i = address.nic_count; i < FAB_MAX_NICS; i++)
        nics[i] = nics[i % address.nic_count];
    if (how & 1)
        address.id[0] = (uint8_t)(address.id[0] + fuzz_u8(in));
    if (how & 2)
        address.nic_count = fuzz_u8(in) % (FAB_MAX_NICS + 2);
    if (how & 4)
        address.label = NULL;
    fill_nics(in, nics, address.nic_count < FAB_MAX_NICS ? address.nic_count : FAB_MAX_NICS);
    return fab_peer_add(p->a, &address);
}

static int64_t add_remote(struct fuzz_pair *p, struct fuzz_input *in, int64_t peer)
{
    fab_region_info info = p->info;
    fab_descriptor d = fuzz_describe(&info);
    uint8_t how = fuzz_u8(in);
    if (how & 1)
        d.region = fuzz_u64(in);
    if (how & 2)
        d.secret = fuzz_u64(in);
    if (how & 4)
        d.offset = fuzz_u64(in);
    if (how & 8)
        d.length = fuzz_u64(in);
    if (how & 16)
        d.kind = fuzz_u8(in);
    if (how & 32)
        d.key_count = fuzz_u8(in);
    if (how & 64)
        fuzz_eat(in, (void *)(uintptr_t)d.keys, 16);
    return fab_remote_add(p->a, peer, &d);
}

static void use(struct fuzz_pair *p, struct fuzz_input *in, int64_t peer, int64_t remote)
{
    int32_t page = fuzz_u8(in);
    uint16_t at = fuzz_u16(in) % 8192, length = fuzz_u16(in) % 8192;
    (void)fab_transfer_release(p->a, fab_write(p->a, p->mine, 0, remote, at, length, 5, 0, 0));
    (void)fab_transfer_release(p->a, fab_write_pages(p->a, p->mine, remote, &page, &page, 1, length,
                                                     at, at, 0, 0, 5, 0, 0));
    (void)fab_transfer_release(p->a, fab_send(p->a, peer, "text", 4, 0));
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    struct fuzz_input in = {bytes, size};
    struct fuzz_pair p;
    uint8_t how = fuzz_u8(&in);
    fuzz_open(&p, how, NULL, false);
    if (how & 8)
        fuzz_meet(&p);
    while (in.left) {
        int64_t peer = add_peer(&p, &in);
        int64_t remote = add_remote(&p, &in, peer > 0 ? peer : p.to_b);
        use(&p, &in, peer, remote);
        fuzz_steps(fuzz_u8(&in) % 8);
        if (remote > 0)
            (void)fab_remote_release(p.a, remote);
    }
    fuzz_close(&p);
    return 0;
}
