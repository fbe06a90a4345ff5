/* What the benchmark measures us against: programs of two processes without our engine in them, and some
 * without Python. `fabric bench` starts them as `_raw KIND --op OP ...`.
 *
 * Contract
 * - Once set up, a line of JSON with "ready" is printed. Then each line `run SECONDS` on standard input
 *   is answered by a line of JSON: iterations, seconds, payload bytes, and the latency of an iteration.
 * - The end of standard input ends both processes. The second one never outlives the first.
 * - A fault is one line on standard error and status 1; wrong arguments have status 2.
 */
#ifndef RAW_H
#define RAW_H

#include <stdbool.h>
#include <stdint.h>

#define RAW_PEERS 1000
#define RAW_SAMPLES (1u << 18) /* latencies kept of one run; later ones replace random ones */

struct raw_options {
    const char *op;
    const char *provider;
    uint64_t bytes; /* of one write or page */
    uint32_t pages; /* of one call */
    uint32_t window; /* calls under way */
    uint64_t walk; /* bytes of the buffer that calls go through in turn */
    bool delivery; /* a write is complete when it is in the target's memory */
    uint32_t peers; /* that one engine writes to */
    int cpus[2]; /* of the two processes; -1: any */
};

struct raw_result {
    uint64_t iters, bytes;
    double seconds;
    uint64_t seen; /* latencies offered */
    int64_t ns[RAW_SAMPLES];
};

struct raw_kind {
    const char *name;
    const char *ops; /* with spaces between */
    /* Makes the second process and everything else; says in `about` what was set up. */
    void (*open)(const struct raw_options *options, char *about, int size);
    void (*run)(const struct raw_options *options, double seconds, struct raw_result *out);
    void (*close)(void);
};

extern const struct raw_kind raw_memcpy, raw_ofi, raw_engine, raw_crowd, raw_submit;

__attribute__((format(printf, 1, 2), noreturn)) void raw_fail(const char *format, ...);
int64_t raw_now(void);
void raw_sample(struct raw_result *result, int64_t ns);
/* Forks. In the child 0 is returned, which dies with its parent; `link` is a socket to the other. */
int raw_fork(const struct raw_options *options, int *link);
void raw_put(int link, const void *bytes, uint32_t length);
void raw_get(int link, void *bytes, uint32_t length);
/* Numbers 0 to count - 1 in random order, always the same; to be freed. */
uint32_t *raw_shuffle(uint32_t count, uint64_t seed);
void *raw_memory(uint64_t bytes); /* shared with children, populated */

#endif
