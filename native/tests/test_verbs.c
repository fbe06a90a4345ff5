/* The verbs provider's decisions, without a device: which GID, which timeout, what is asked of
 * libibverbs for each kind of memory, what an address looks like on the wire.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <unistd.h>

#include "check.h"
#include "providers/verbs.h"

/* ---- GID ---- */

static struct ibv_gid_entry gid(uint32_t index, const char *text, uint32_t type)
{
    struct ibv_gid_entry entry = {.gid_index = index, .gid_type = type};
    CHECK(inet_pton(AF_INET6, text, entry.gid.raw) == 1, "%s", text);
    return entry;
}

static void test_gid(void)
{
    const struct ibv_gid_entry table[] = {
        gid(0, "fe80::1", IBV_GID_TYPE_ROCE_V1),
        gid(1, "fe80::1", IBV_GID_TYPE_ROCE_V2),
        gid(2, "::ffff:10.9.0.1", IBV_GID_TYPE_ROCE_V1),
        gid(3, "::ffff:10.9.0.1", IBV_GID_TYPE_ROCE_V2),
        gid(4, "2001:db8::1", IBV_GID_TYPE_ROCE_V1),
        gid(5, "2001:db8::1", IBV_GID_TYPE_ROCE_V2),
        gid(6, "::ffff:10.9.0.2", IBV_GID_TYPE_ROCE_V2),
        gid(7, "::", IBV_GID_TYPE_ROCE_V2),
    };
    SAME(verbs_gid_choose(table, 8, false), 3); /* IPv4 and v2; the first of two */
    SAME(verbs_gid_choose(table, 8, true), 5);
    SAME(verbs_gid_choose(table, 3, false), 2); /* the family counts for more than the version */
    SAME(verbs_gid_choose(table, 3, true), 2);  /* another family is better than none */
    SAME(verbs_gid_choose(table + 4, 1, false), 4);
    SAME((uint64_t)verbs_gid_choose(table, 2, false), (uint64_t)-1); /* link-local only */
    SAME((uint64_t)verbs_gid_choose(table + 7, 1, false), (uint64_t)-1); /* unset */
    SAME((uint64_t)verbs_gid_choose(table, 0, false), (uint64_t)-1);
}

/* ---- timeouts ---- */

static void test_ack_timeout(void)
{
    for (int64_t timeout = 50 * MSEC; timeout < 1000 * SECOND; timeout += timeout / 7) {
        uint8_t t = verbs_ack_timeout(timeout);
        uint64_t all = ((uint64_t)VERBS_ACK_UNIT_NS << t) * (VERBS_RETRIES + 1);
        CHECK(t >= 8 && t <= 31, "%u", t);
        CHECK((t == 8 || all <= (uint64_t)timeout / 4) &&
                  (t == 31 || 2 * all > (uint64_t)timeout / 4),
              "all retries of %u take %.3f s of %.3f s", t, (double)all / 1e9,
              (double)timeout / 1e9);
    }
    SAME(verbs_ack_timeout(0), 8);
    SAME(verbs_ack_timeout(INT64_MAX), 31);
    SAME(verbs_mtu_bytes(IBV_MTU_256), 256);
    SAME(verbs_mtu_bytes(IBV_MTU_4096), 4096);
}

/* ---- memory ---- */

static struct {
    int plain, dmabuf; /* calls */
    uint64_t offset, iova;
    size_t length;
    int fd;
    unsigned access;
    bool refuse_dmabuf;
} asked;

static struct ibv_mr fake_mr = {.rkey = 4711, .lkey = 4712};

static struct ibv_mr *fake_reg_mr(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
                                  unsigned access)
{
    (void)pd;
    asked.plain++;
    asked.offset = (uintptr_t)addr;
    asked.length = length;
    asked.iova = iova;
    asked.access = access;
    return &fake_mr;
}

static struct ibv_mr *fake_reg_dmabuf(struct ibv_pd *pd, uint64_t offset, size_t length,
                                      uint64_t iova, int fd, int access)
{
    (void)pd;
    asked.dmabuf++;
    if (asked.refuse_dmabuf) {
        errno = EOPNOTSUPP;
        return NULL;
    }
    asked.offset = offset;
    asked.length = length;
    asked.iova = iova;
    asked.fd = fd;
    asked.access = (unsigned)access;
    return &fake_mr;
}

static int fake_dereg(struct ibv_mr *mr)
{
    SAME(mr->rkey, 4711);
    return 0;
}

static void register_one(const struct fab_memory *memory)
{
    static const struct fab_libibverbs lib = {
        .reg_mr_iova2 = fake_reg_mr, .reg_dmabuf_mr = fake_reg_dmabuf, .dereg_mr = fake_dereg};
    struct verbs_nic nic = {.lib = &lib};
    struct fab_mr *mr;
    fab_key key = {0, 0};
    bool refuse = asked.refuse_dmabuf;
    memset(&asked, 0, sizeof asked);
    asked.refuse_dmabuf = refuse;
    SAME(verbs_mr_reg(&nic.base, memory, &mr, &key), 0);
    SAME(key.addr, (uintptr_t)memory->base);
    SAME(key.rkey, 4711);
    SAME(((struct verbs_mr *)mr)->host, memory->kind == FAB_MEM_HOST);
    SAME(asked.access,
         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_RELAXED_ORDERING);
    SAME(asked.iova, (uintptr_t)memory->base);
    SAME(asked.length, memory->length);
    SAME(verbs_mr_dereg(&nic.base, mr), 0);
}

static void test_memory(void)
{
    static uint8_t bytes[100];
    struct fab_memory memory = {
        .base = bytes, .length = sizeof bytes, .memfd = -1, .dmabuf_fd = -1};
    register_one(&memory);
    SAME(asked.plain, 1);
    SAME(asked.dmabuf, 0);
    memory.kind = FAB_MEM_CUDA;
    memory.dmabuf_fd = 42;
    memory.dmabuf_offset = 8192;
    register_one(&memory);
    SAME(asked.plain, 0);
    SAME(asked.fd, 42);
    SAME(asked.offset, 8192);
    asked.refuse_dmabuf = true; /* then by address: the kernel's peer memory */
    register_one(&memory);
    SAME(asked.dmabuf, 1);
    SAME(asked.plain, 1);
    asked.refuse_dmabuf = false;
    memory.dmabuf_fd = -1; /* none given, and no libcuda to export one */
    register_one(&memory);
    SAME(asked.dmabuf, 0);
    SAME(asked.plain, 1);
}

/* ---- addresses ---- */

static struct verbs_blob random_blob(void)
{
    struct verbs_blob b = {.link = IBV_LINK_LAYER_ETHERNET,
                           .mtu = (uint8_t)(IBV_MTU_256 + check_random(5)),
                           .lid = (uint16_t)check_random(65536),
                           .ud_qpn = (uint32_t)check_random(1 << 24),
                           .ud_qkey = (uint32_t)check_next(&check_state),
                           .token = check_next(&check_state),
                           .write_qpn = (uint32_t)check_random(1 << 24),
                           .write_psn = (uint32_t)check_random(1 << 24),
                           .frame_qpn = (uint32_t)check_random(1 << 24),
                           .frame_psn = (uint32_t)check_random(1 << 24)};
    check_paint(b.gid.raw, sizeof b.gid.raw, check_next(&check_state));
    return b;
}

static void test_blob(void)
{
    struct verbs_nic nic = {.link_layer = IBV_LINK_LAYER_ETHERNET};
    uint8_t bytes[VERBS_BLOB];
    for (int i = 0; i < 1000; i++) {
        struct verbs_blob b = random_blob(), back;
        memset(&back, 0, sizeof back);
        verbs_blob_write(&b, bytes);
        SAME(verbs_blob_read(&nic, bytes, VERBS_BLOB, &back), 0);
        CHECK(b.link == back.link && b.mtu == back.mtu && b.lid == back.lid &&
                  !memcmp(&b.gid, &back.gid, sizeof b.gid) && b.ud_qpn == back.ud_qpn &&
                  b.ud_qkey == back.ud_qkey && b.token == back.token &&
                  b.write_qpn == back.write_qpn && b.write_psn == back.write_psn &&
                  b.frame_qpn == back.frame_qpn && b.frame_psn == back.frame_psn,
              "a field is lost");
    }
    struct verbs_blob out;
    SAME((uint64_t)verbs_blob_read(&nic, bytes, VERBS_BLOB - 1, &out), (uint64_t)-EINVAL);
    SAME((uint64_t)verbs_blob_read(&nic, bytes, 0, &out), (uint64_t)-EINVAL);
    bytes[1] = IBV_LINK_LAYER_INFINIBAND;
    SAME((uint64_t)verbs_blob_read(&nic, bytes, VERBS_BLOB, &out), (uint64_t)-EHOSTUNREACH);
    bytes[1] = IBV_LINK_LAYER_ETHERNET;
    bytes[2] = 6;
    SAME((uint64_t)verbs_blob_read(&nic, bytes, VERBS_BLOB, &out), (uint64_t)-EINVAL);
    bytes[2] = IBV_MTU_1024;
    bytes[0] = 2;
    SAME((uint64_t)verbs_blob_read(&nic, bytes, VERBS_BLOB, &out), (uint64_t)-EINVAL);
}

int main(int argc, char **argv)
{
    check_begin(argc, argv);
    test_gid();
    test_ack_timeout();
    test_memory();
    test_blob();
    return 0;
}
