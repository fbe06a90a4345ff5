/* What the libfabric provider asks for when it registers memory, without a device: for host memory,
 * for GPU memory with and without a dma-buf, in old libraries and new ones.
 */
#include <errno.h>

#include "check.h"
#include "providers/ofi.h"

/* As libfabric 1.20 declares them. */
#define NEWER_MR_DMABUF (1ull << 40)
struct newer_dmabuf {
    int fd;
    uint64_t offset;
    size_t len;
    void *base_addr;
};

static struct {
    struct fi_mr_attr attr;
    struct iovec iov;
    struct newer_dmabuf dmabuf;
    uint64_t flags;
    uint64_t keys[2]; /* asked for, by try */
    int tries, taken; /* that many tries are told that the key is taken */
} asked;

static struct fid_mr answer = {.mem_desc = &asked, .key = 4711};

static int regattr(struct fid *fid, const struct fi_mr_attr *attr, uint64_t flags,
                   struct fid_mr **out)
{
    (void)fid;
    asked.attr = *attr;
    asked.flags = flags;
    asked.keys[asked.tries & 1] = attr->requested_key;
    if (flags & NEWER_MR_DMABUF)
        memcpy(&asked.dmabuf, attr->mr_iov, sizeof asked.dmabuf);
    else
        asked.iov = *attr->mr_iov;
    if (asked.tries++ < asked.taken)
        return -FI_ENOKEY;
    *out = &answer;
    return 0;
}

static struct fi_ops_mr operations = {.size = sizeof operations, .regattr = regattr};
static struct fid_domain fid = {.mr = &operations};
static struct fi_domain_attr domain_attr;
static struct fi_info info = {.domain_attr = &domain_attr};
static struct fab_libfabric library;
static struct ofi_nic nic = {.lib = &library, .info = &info};
static struct ofi_domain domain = {.nic = &nic, .fid = &fid};
static uint8_t bytes[20000];

static struct ofi_mr register_one(const struct fab_memory *memory, uint64_t access)
{
    struct ofi_mr mr = {.fid = NULL};
    memset(&asked, 0, sizeof asked);
    SAME(ofi_mr_open(&domain, memory, access, &mr), 0);
    CHECK(mr.fid == &answer, "another registration came back");
    SAME(asked.attr.iov_count, 1);
    SAME(asked.attr.access, access);
    return mr;
}

static struct fab_memory host(void)
{
    return (struct fab_memory){.base = bytes, .length = sizeof bytes, .memfd = -1, .dmabuf_fd = -1};
}

static void test_host(void)
{
    struct fab_memory memory = host();
    domain_attr.mr_mode = FI_MR_LOCAL | FI_MR_PROV_KEY;
    library.version = FI_VERSION(1, 22);
    struct ofi_mr mr = register_one(&memory, FI_REMOTE_WRITE);
    CHECK(mr.desc == &asked, "the descriptor is lost");
    CHECK(asked.iov.iov_base == bytes, "other memory");
    SAME(asked.iov.iov_len, sizeof bytes);
    SAME(asked.attr.iface, FI_HMEM_SYSTEM);
    SAME(asked.flags, 0);
    SAME(asked.keys[0], 0); /* the provider chooses */
    domain_attr.mr_mode = FI_MR_PROV_KEY;
    mr = register_one(&memory, FI_WRITE);
    CHECK(!mr.desc, "a descriptor where none is needed");
}

/* Keys of our own are random, fit, and are tried once more. */
static void test_keys(void)
{
    struct fab_memory memory = host();
    domain_attr.mr_mode = 0;
    domain_attr.mr_key_size = 8;
    register_one(&memory, FI_REMOTE_WRITE);
    uint64_t first = asked.keys[0];
    register_one(&memory, FI_REMOTE_WRITE);
    CHECK(first && asked.keys[0] && first != asked.keys[0], "keys are not random");
    domain_attr.mr_key_size = 4;
    register_one(&memory, FI_REMOTE_WRITE);
    CHECK(asked.keys[0] <= UINT32_MAX, "a key of more than four bytes");
    struct ofi_mr mr = {.fid = NULL};
    memset(&asked, 0, sizeof asked);
    asked.taken = 1;
    SAME(ofi_mr_open(&domain, &memory, FI_WRITE, &mr), 0);
    SAME(asked.tries, 2);
    CHECK(asked.keys[0] != asked.keys[1], "the same key again");
    memset(&asked, 0, sizeof asked);
    asked.taken = 2;
    SAME((uint64_t)ofi_mr_open(&domain, &memory, FI_WRITE, &mr), (uint64_t)-FI_ENOKEY);
}

static void test_gpu(void)
{
    struct fab_memory memory = host();
    memory.kind = FAB_MEM_CUDA;
    memory.device = 3;
    domain_attr.mr_mode = FI_MR_LOCAL | FI_MR_PROV_KEY | FI_MR_HMEM;
    library.version = FI_VERSION(2, 5);
    register_one(&memory, FI_REMOTE_WRITE); /* libfabric finds the way */
    SAME(asked.attr.iface, FI_HMEM_CUDA);
    SAME((uint64_t)asked.attr.device.cuda, 3);
    SAME(asked.flags, 0);
    memory.dmabuf_fd = 42;
    memory.dmabuf_offset = 8192;
    register_one(&memory, FI_REMOTE_WRITE);
    SAME(asked.flags, NEWER_MR_DMABUF);
    SAME(asked.attr.iface, FI_HMEM_CUDA);
    SAME((uint64_t)asked.dmabuf.fd, 42);
    SAME(asked.dmabuf.offset, 8192);
    SAME(asked.dmabuf.len, sizeof bytes);
    CHECK((uint8_t *)asked.dmabuf.base_addr + 8192 == bytes, "the region is not at its address");
    library.version = FI_VERSION(1, 19); /* knows no dma-buf */
    register_one(&memory, FI_REMOTE_WRITE);
    SAME(asked.flags, 0);
    CHECK(asked.iov.iov_base == bytes, "other memory");
}

int main(int argc, char **argv)
{
    check_begin(argc, argv);
    test_host();
    test_keys();
    test_gpu();
    return 0;
}
