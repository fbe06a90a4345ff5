/* Sealed shared memory; the contract is in local_inbox.h. */
#include "local_inbox.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U /* Linux 6.3; some systems insist on it */
#endif

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int new_memfd(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    return fd;
}

static int map_fd(int fd, size_t bytes, int protection, void **map)
{
    void *at = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    /* A forked child has no business here, and copying the page tables costs the parent. */
    madvise(at, bytes, MADV_DONTFORK);
    *map = at;
    return 0;
}

int fab_local_share(const char *name, size_t bytes, void **map, int *fd)
{
    int made = new_memfd(name);
    if (made < 0) {
        int error = errno;
        fab_fail_text("memfd_create of %zu bytes: errno %d", bytes, error);
        return -error;
    }
    int rc = 0;
    if (ftruncate(made, (off_t)bytes) < 0 || fcntl(made, F_ADD_SEALS, SEALS) < 0)
        rc = -errno;
    if (!rc)
        rc = map_fd(made, bytes, PROT_READ | PROT_WRITE, map);
    if (rc) {
        close(made);
        fab_fail_text("shared memory of %zu bytes: errno %d", bytes, -rc);
        return rc;
    }
    *fd = made;
    return 0;
}

int fab_local_map(int fd, size_t bytes, int protection, void **map)
{
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS) {
        fab_fail_text("the peer's memory is not a sealed memfd (seals %#x)", (unsigned)seals);
        return -EPERM;
    }
    struct stat about;
    if (fstat(fd, &about) < 0)
        return -errno;
    if (about.st_size < 0 || (uint64_t)about.st_size < bytes || !bytes) {
        fab_fail_text("the peer's memory has %lld bytes, %zu were announced",
                      (long long)about.st_size, bytes);
        return -EINVAL;
    }
    int rc = map_fd(fd, bytes, protection, map);
    if (rc)
        fab_fail_text("mmap of %zu bytes of the peer's memory: errno %d", bytes, -rc);
    return rc;
}

void fab_local_unmap(void *map, size_t bytes)
{
    if (map)
        munmap(map, bytes);
}
