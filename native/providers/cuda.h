/* What a NIC needs to know of GPU memory: a dma-buf for it.
 *
 * libcuda is looked for in the process (RTLD_NOLOAD): memory of kind CUDA came from it, so it is
 * loaded; we never load it, nor make a context.
 */
#ifndef FAB_CUDA_H
#define FAB_CUDA_H

#include <stdint.h>

/* A dma-buf file descriptor, to be closed, for the GPU memory [base, base + length); *offset is
 * where in it `base` lies. 0, or a negative errno with its text. */
int fab_cuda_dmabuf(const void *base, uint64_t length, int *fd, uint64_t *offset);

#endif
