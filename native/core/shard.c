/* Sharding arithmetic; the contract is in shard.h. */
#include "shard.h"

#include "fabric.h"

uint32_t fab_shard_pieces(uint64_t length, uint32_t lanes)
{
    if (lanes > FAB_MAX_LANES)
        lanes = FAB_MAX_LANES;
    uint64_t worth = length / FAB_SHARD_MIN;
    if (worth < 1 || lanes < 1)
        return 1;
    return worth < lanes ? (uint32_t)worth : lanes;
}

struct fab_span fab_shard_items(uint64_t count, uint32_t index, uint32_t shares)
{
    uint64_t each = count / shares, extra = count % shares;
    uint64_t before = index < extra ? index : extra;
    struct fab_span span = {index * each + before, 0};
    span.end = span.begin + each + (index < extra ? 1 : 0);
    return span;
}

struct fab_span fab_shard_bytes(uint64_t length, uint32_t index, uint32_t pieces)
{
    uint64_t blocks = length / FAB_SHARD_ALIGN;
    struct fab_span span = fab_shard_items(blocks, index, pieces);
    span.begin *= FAB_SHARD_ALIGN;
    span.end = index + 1 == pieces ? length : span.end * FAB_SHARD_ALIGN;
    return span;
}
