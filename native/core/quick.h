/* Transfers that are done before their submission returns: short writes and immediates where the
 * provider can finish them at once, which is `local`.
 *
 * Contract
 * - True: the range is at the receiver, and counted there if it was to be. There never was a transfer:
 *   no handle, nothing to wait for, nothing that can fail later.
 * - False: nothing was done (where a lane broke meanwhile, some pages were written and none counted)
 *   and no error is set. Something is not as usual (no session, no grant, work
 *   that goes first, a bad argument, the progress lock is taken, a trace, the 1 of 64 that is timed),
 *   and the caller submits in the ordinary way, which knows what to do or say.
 * - Regions, imports and peers are looked up under the progress lock, and are given up under it: none
 *   of them needs a reference meanwhile, and none that is being given up is used.
 */
#ifndef FAB_QUICK_H
#define FAB_QUICK_H

#include "engine.h"

bool fab_quick_write(struct fab_engine *e, int64_t region, uint64_t src, int64_t remote,
                     uint64_t dst, uint64_t length, int64_t imm);

#define FAB_QUICK_PAGES 1024
#define FAB_QUICK_BYTES (256 << 10) /* of all pages: they are copied under the progress lock */

struct fab_page_write { /* as fab_write_pages() has it */
    int64_t region, remote, imm;
    const int32_t *from, *to;
    uint32_t count;
    uint64_t bytes, src_stride, dst_stride, src, dst;
};

bool fab_quick_pages(struct fab_engine *e, const struct fab_page_write *w);
bool fab_quick_imm(struct fab_engine *e, int64_t peer, int64_t imm);

#endif
