/* Arguments, the loop over standard input, and what the kinds share; the contract is in raw.h. */
#include "raw.h"

#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 128

static const struct raw_kind *const kinds[] = {&raw_memcpy, &raw_ofi, &raw_engine, &raw_crowd,
                                               &raw_submit};
static pid_t child;

void raw_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "_raw: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    _exit(1); /* the other process dies with this one */
}

int64_t raw_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void raw_sample(struct raw_result *result, int64_t ns)
{
    static uint64_t state;
    uint64_t at = result->seen++;
    if (at >= RAW_SAMPLES) /* a reservoir: each latency is as likely to be kept */
        at = next_random(&state) % result->seen;
    if (at < RAW_SAMPLES)
        result->ns[at] = ns;
}

uint32_t *raw_shuffle(uint32_t count, uint64_t seed)
{
    uint32_t *order = malloc(sizeof *order * (count ? count : 1));
    if (!order)
        raw_fail("out of memory");
    for (uint32_t i = 0; i < count; i++) {
        uint32_t k = (uint32_t)(next_random(&seed) % (i + 1));
        order[i] = order[k];
        order[k] = i;
    }
    return order;
}

void *raw_memory(uint64_t bytes)
{
    int fd = memfd_create("llm-fabric raw", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        raw_fail("%llu bytes of shared memory: %s", (unsigned long long)bytes, strerror(errno));
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (at == MAP_FAILED)
        raw_fail("%llu bytes of shared memory: %s", (unsigned long long)bytes, strerror(errno));
    close(fd);
    return at;
}

static void pin(int cpu)
{
    cpu_set_t set;
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((unsigned)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        raw_fail("cannot run on CPU %d: %s", cpu, strerror(errno));
}

int raw_fork(const struct raw_options *options, int *link)
{
    int ends[2];
    pid_t parent = getpid();
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        raw_fail("socketpair: %s", strerror(errno));
    fflush(stdout);
    child = fork();
    if (child < 0)
        raw_fail("fork: %s", strerror(errno));
    *link = ends[child == 0];
    close(ends[child != 0]);
    pin(options->cpus[child == 0]);
    if (child)
        return 1;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    return 0;
}

void raw_put(int link, const void *bytes, uint32_t length)
{
    if (send(link, bytes, length, MSG_NOSIGNAL) != (ssize_t)length)
        raw_fail("the other process is gone");
}

void raw_get(int link, void *bytes, uint32_t length)
{
    if (recv(link, bytes, length, MSG_WAITALL) != (ssize_t)length)
        raw_fail("the other process is gone");
}

/* ---- results ---- */

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void print_percentile(const struct raw_result *r, const char *name, double part)
{
    uint64_t n = r->seen < RAW_SAMPLES ? r->seen : RAW_SAMPLES;
    if (n)
        printf(", \"%s\": %.3f", name, (double)r->ns[(uint64_t)((double)(n - 1) * part)] / 1e3);
    else
        printf(", \"%s\": null", name);
}

static void print_result(struct raw_result *r)
{
    uint64_t n = r->seen < RAW_SAMPLES ? r->seen : RAW_SAMPLES;
    qsort(r->ns, n, sizeof *r->ns, ascending);
    printf("{\"iters\": %llu, \"seconds\": %.9f, \"bytes\": %llu", (unsigned long long)r->iters,
           r->seconds, (unsigned long long)r->bytes);
    print_percentile(r, "p50_us", 0.5);
    print_percentile(r, "p99_us", 0.99);
    print_percentile(r, "p999_us", 0.999);
    printf("}\n");
    fflush(stdout);
}

/* ---- arguments ---- */

__attribute__((noreturn)) static void usage(const char *why, const char *what)
{
    fprintf(stderr,
            "_raw: %s%s\n"
            "usage: _raw KIND --op OP [--bytes N] [--pages N] [--window N] [--walk BYTES]\n"
            "            [--provider NAME] [--delivery] [--cpus A,B] [--peers N]\n",
            why, what);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        fprintf(stderr, "  %s: %s\n", kinds[i]->name, kinds[i]->ops);
    exit(2);
}

static uint64_t number(const char *text, uint64_t low, uint64_t high)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || *text < '0' || *text > '9' || value < low || value > high) {
        char why[LINE_BYTES];
        snprintf(why, sizeof why, "not a number from %llu to %llu: ", (unsigned long long)low,
                 (unsigned long long)high);
        usage(why, text);
    }
    return value;
}

static void parse(int argc, char **argv, struct raw_options *o)
{
    static const struct option names[] = {{"op", 1, NULL, 'o'},       {"bytes", 1, NULL, 'b'},
                                          {"pages", 1, NULL, 'p'},    {"window", 1, NULL, 'w'},
                                          {"walk", 1, NULL, 'k'},     {"provider", 1, NULL, 'r'},
                                          {"delivery", 0, NULL, 'd'}, {"cpus", 1, NULL, 'c'},
                                          {"peers", 1, NULL, 'n'},    {NULL, 0, NULL, 0}};
    int c;
    while ((c = getopt_long(argc, argv, "", names, NULL)) != -1) {
        if (c == 'o')
            o->op = optarg;
        else if (c == 'b')
            o->bytes = number(optarg, 1, UINT64_C(1) << 34);
        else if (c == 'p')
            o->pages = (uint32_t)number(optarg, 1, 1 << 20);
        else if (c == 'w')
            o->window = (uint32_t)number(optarg, 1, 4096);
        else if (c == 'k')
            o->walk = number(optarg, 1, UINT64_C(1) << 36);
        else if (c == 'r')
            o->provider = optarg;
        else if (c == 'd')
            o->delivery = true;
        else if (c == 'n')
            o->peers = (uint32_t)number(optarg, 1, RAW_PEERS);
        else if (c != 'c')
            exit(2);
        else if (sscanf(optarg, "%d,%d", &o->cpus[0], &o->cpus[1]) != 2)
            usage("--cpus takes two numbers: ", optarg);
    }
    if (optind != argc)
        usage("unexpected: ", argv[optind]);
}

static bool has_op(const struct raw_kind *kind, const char *op)
{
    size_t length = strlen(op);
    for (const char *at = kind->ops; (at = strstr(at, op)); at++)
        if (length && (at == kind->ops || at[-1] == ' ') && (at[length] == 0 || at[length] == ' '))
            return true;
    return false;
}

static const struct raw_kind *find(int argc, char **argv)
{
    for (size_t i = 0; argc > 1 && i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i]->name, argv[1]))
            return kinds[i];
    usage("no such kind: ", argc > 1 ? argv[1] : "");
}

int main(int argc, char **argv)
{
    static struct raw_result result;
    const struct raw_kind *kind = find(argc, argv);
    struct raw_options o = {.op = "",
                            .provider = "tcp",
                            .bytes = 8,
                            .pages = 1,
                            .window = 1,
                            .peers = 1,
                            .cpus = {-1, -1}};
    parse(argc - 1, argv + 1, &o);
    if (!has_op(kind, o.op))
        usage("no such op: ", o.op);
    uint64_t call = o.bytes * o.pages; /* at most 2^54 */
    o.walk = o.walk > call ? o.walk : call;
    char about[LINE_BYTES] = "", line[LINE_BYTES];
    kind->open(&o, about, sizeof about);
    printf("{\"ready\": \"%s\"}\n", about);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        double seconds;
        if (sscanf(line, "run %lf", &seconds) != 1 || !(seconds > 0 && seconds <= 3600))
            raw_fail("not `run SECONDS`: %s", line);
        result.iters = result.bytes = result.seen = 0;
        kind->run(&o, seconds, &result);
        print_result(&result);
    }
    kind->close();
    if (child) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    return 0;
}
