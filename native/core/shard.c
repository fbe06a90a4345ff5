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

uint32_t fab_shard_worthy(uint64_t length, uint32_t count, uint32_t *lanes, uint32_t *weights)
{
    while (count > 1) {
        uint64_t total = 0;
        uint32_t least = 0;
        for (uint32_t i = 0; i < count; i++) {
            total += weights[i];
            least = weights[i] < weights[least] ? i : least;
        }
        if ((unsigned __int128)length * weights[least] / total >= FAB_SHARD_MIN / 2)
            break;
        for (uint32_t i = least; i + 1 < count; i++) {
            lanes[i] = lanes[i + 1];
            weights[i] = weights[i + 1];
        }
        count--;
    }
    return count;
}

struct fab_span fab_shard_items(uint64_t count, uint32_t index, uint32_t shares,
                                const uint32_t *weights)
{
    uint64_t before = 0, total = 0, own = weights ? weights[index] : 1;
    for (uint32_t i = 0; i < shares; i++) {
        uint64_t weight = weights ? weights[i] : 1;
        before += i < index ? weight : 0;
        total += weight;
    }
    unsigned __int128 items = count;
    return (struct fab_span){(uint64_t)(items * before / total),
                             (uint64_t)(items * (before + own) / total)};
}

struct fab_span fab_shard_bytes(uint64_t length, uint32_t index, uint32_t pieces,
                                const uint32_t *weights)
{
    uint64_t blocks = length / FAB_SHARD_ALIGN;
    struct fab_span span = fab_shard_items(blocks, index, pieces, weights);
    span.begin *= FAB_SHARD_ALIGN;
    span.end = index + 1 == pieces ? length : span.end * FAB_SHARD_ALIGN;
    return span;
}
