/* Who carries which bytes: pure arithmetic, tested alone.
 *
 * A range of `length` bytes is cut for `lanes` lanes into shares that are disjoint and add up to
 * it, in order; a share never starts inside a cache line of the range (FAB_SHARD_ALIGN) except
 * after the last one. A range too short to be worth several lanes gets fewer: the number of
 * shares is the number of pieces in its immediate, and depends on length and lanes only, so that
 * fail-over cannot change it.
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
/* Share `index` of `pieces`. */
struct fab_span fab_shard_bytes(uint64_t length, uint32_t index, uint32_t pieces);
/* Items [begin, end) of `count` for share `index` of `shares`: sizes differ by at most one. */
struct fab_span fab_shard_items(uint64_t count, uint32_t index, uint32_t shares);

#endif
