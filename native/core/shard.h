/* Who carries which bytes: pure arithmetic, tested alone.
 *
 * A range of `length` bytes is cut for `lanes` lanes into shares that are disjoint and add up to
 * it, in order; a share never starts inside a cache line of the range (FAB_SHARD_ALIGN) except
 * after the last one. A range too short to be worth several lanes gets fewer: the number of
 * shares is the number of pieces in its immediate; it is fixed when the range is cut, and fail-over
 * does not change it.
 */
#ifndef FAB_SHARD_H
#define FAB_SHARD_H

#include <stdint.h>

#define FAB_SHARD_ALIGN 4096
#define FAB_SHARD_MIN 65536 /* bytes below which a lane more costs more than it brings */

struct fab_span {
    uint64_t begin;
    uint64_t end;
};

/* How many shares a range of `length` gets; at least 1, at most min(lanes, 16). */
uint32_t fab_shard_pieces(uint64_t length, uint32_t lanes);
/* Drops the slowest lanes until every one that stays carries FAB_SHARD_MIN / 2 or is alone; returns
 * how many stay, in their order. */
uint32_t fab_shard_worthy(uint64_t length, uint32_t count, uint32_t *lanes, uint32_t *weights);
/* Share `index` of `pieces`, in proportion to `weights` (1 to 1000; NULL: all the same). */
struct fab_span fab_shard_bytes(uint64_t length, uint32_t index, uint32_t pieces,
                                const uint32_t *weights);
/* Items [begin, end) of `count` for share `index` of `shares`: with equal weights sizes differ by at
 * most one. */
struct fab_span fab_shard_items(uint64_t count, uint32_t index, uint32_t shares,
                                const uint32_t *weights);

#endif
