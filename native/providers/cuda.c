/* dma-bufs of GPU memory; the contract is in cuda.h. */
#include "providers/cuda.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "providers/provider.h"

enum { DMA_BUF_FD = 1 }; /* CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, CUDA 11.7 */

typedef int (*range_handle_fn)(void *handle, uintptr_t address, size_t size, int type,
                               unsigned long long flags);

static range_handle_fn find_export(void)
{
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *symbol = cuda ? dlsym(cuda, "cuMemGetHandleForAddressRange") : NULL;
    range_handle_fn function = NULL;

    if (symbol)
        memcpy(&function, &symbol, sizeof(function));
    return function;
}

int fab_cuda_dmabuf(const void *base, uint64_t length, int *fd, uint64_t *offset)
{
    range_handle_fn export = find_export();
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t start = (uintptr_t)base & ~(page - 1);
    uint64_t end = ((uintptr_t)base + length + page - 1) & ~(page - 1);

    if (!export) {
        fab_fail_text("libcuda with dma-buf export (CUDA 11.7) is not loaded in this process");
        return -ENOTSUP;
    }
    int rc = export(fd, start, end - start, DMA_BUF_FD, 0);
    if (rc) {
        fab_fail_text("CUDA does not export a dma-buf of %llu bytes at %p (CUresult %d)",
                      (unsigned long long)length, base, rc);
        return -ENOTSUP;
    }
    *offset = (uintptr_t)base - start;
    return 0;
}
