/* Whether places lie inside of memory, without overflow. */
#ifndef FAB_SPAN_H
#define FAB_SPAN_H

#include <stdbool.h>
#include <stdint.h>

static inline bool fab_fits(uint64_t offset, uint64_t length, uint64_t limit)
{
    return offset <= limit && length <= limit - offset;
}

/* The lowest and the highest of page numbers, and 0. */
struct fab_reach {
    int32_t low, high;
};

static inline struct fab_reach fab_reach(const int32_t *pages, uint32_t count)
{
    struct fab_reach r = {0, 0};
    for (uint32_t i = 0; i < count; i++) { /* one pass that the compiler can vectorise */
        r.low = pages[i] < r.low ? pages[i] : r.low;
        r.high = pages[i] > r.high ? pages[i] : r.high;
    }
    return r;
}

/* Bytes from the first of page 0 to the last of page `high`. False: more than 64 bits have. */
static inline bool fab_page_span(int32_t high, uint64_t stride, uint64_t bytes, uint64_t *span)
{
    return !__builtin_mul_overflow((uint64_t)high, stride, span) &&
           !__builtin_add_overflow(*span, bytes, span);
}

#endif
