/* libfabric and libibverbs by dlopen; the contract is in dl.h.
 *
 * Symbols are taken at the versions that the 1.17 and rdma-core 44 headers declare, so that a
 * newer library hands out structs of the layout that this file was compiled for.
 */
#include "providers/dl.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

#include "providers/provider.h"

struct library {
    const char *name;
    const char *file;
    const char *env;
    const char *package;
    void *handle;
    const void *landmark; /* an address inside it */
    char why[FAB_TEXT_MAX];
};

static struct library fabric_library = {
    .name = "libfabric",
    .file = "libfabric.so.1",
    .env = "FABRIC_LIBFABRIC",
    .package = "libfabric1",
};

static struct library verbs_library = {
    .name = "libibverbs",
    .file = "libibverbs.so.1",
    .env = "FABRIC_LIBIBVERBS",
    .package = "libibverbs1",
};

static struct fab_libfabric libfabric;
static struct fab_libibverbs libibverbs;
static bool libibverbs_ready;

/* dlopen, after which signals do what they did before. libfabric links libraries (libpsm2,
 * libinfinipath) whose constructors take SIGINT, SIGTERM, SIGSEGV and others to print a backtrace
 * and leave: an application that embeds us would lose its Ctrl-C. */
static void *open_quietly(const char *file)
{
    struct sigaction before[NSIG];
    bool known[NSIG] = {false};

    for (int i = 1; i < NSIG; i++)
        known[i] = !sigaction(i, NULL, &before[i]);
    void *handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    for (int i = 1; i < NSIG; i++)
        if (known[i])
            (void)sigaction(i, &before[i], NULL);
    return handle;
}

static bool library_open(struct library *lib)
{
    const char *chosen = getenv(lib->env);
    const char *file = chosen && *chosen ? chosen : lib->file;

    lib->handle = open_quietly(file);
    if (lib->handle)
        return true;
    (void)snprintf(lib->why, sizeof(lib->why),
                   "%s cannot be loaded (%.120s): install the Debian package %s, or set %s to the "
                   "path of %s",
                   file, dlerror(), lib->package, lib->env, lib->file);
    return false;
}

/* dlsym gives an object pointer; copying it is how POSIX makes a function pointer of it. */
static bool library_symbol(struct library *lib, const char *symbol, const char *version, void *out)
{
    void *address = dlvsym(lib->handle, symbol, version);

    if (!address)
        address = dlsym(lib->handle, symbol);
    if (!address) {
        (void)snprintf(lib->why, sizeof(lib->why), "%s has no symbol %s: it is no usable %s",
                       lib->file, symbol, lib->name);
        return false;
    }
    lib->landmark = address;
    memcpy(out, &address, sizeof(address));
    return true;
}

static void fabric_load(void)
{
    struct library *lib = &fabric_library;
    uint32_t (*version)(void);

    if (!library_open(lib) ||
        !library_symbol(lib, "fi_getinfo", "FABRIC_1.3", &libfabric.getinfo) ||
        !library_symbol(lib, "fi_freeinfo", "FABRIC_1.3", &libfabric.freeinfo) ||
        !library_symbol(lib, "fi_dupinfo", "FABRIC_1.3", &libfabric.dupinfo) ||
        !library_symbol(lib, "fi_fabric", "FABRIC_1.1", &libfabric.fabric) ||
        !library_symbol(lib, "fi_strerror", "FABRIC_1.0", &libfabric.strerror) ||
        !library_symbol(lib, "fi_version", "FABRIC_1.0", &version))
        return;
    libfabric.version = version();
}

/* The symbol of each function: `ibv_` and its name, but for one that is inline in the header. */
static const char *verbs_symbol(const char *name, char out[64])
{
    const char *prefix = strcmp(name, "query_gid_ex") == 0 ? "_ibv_" : "ibv_";

    (void)snprintf(out, 64, "%s%s", prefix, name);
    return out;
}

/* From Linux 5.12 on, fork() copies pinned pages for the child, and the parent keeps those that the
 * NIC writes to. */
static bool fork_copies_pinned_pages(void)
{
    struct utsname name;
    unsigned major = 0, minor = 0;

    return uname(&name) == 0 && sscanf(name.release, "%u.%u", &major, &minor) == 2 &&
           (major > 5 || (major == 5 && minor >= 12));
}

/* Before 5.12 registered pages must be kept out of children, which is to be asked for before the
 * first device is opened. A child then crashes on whatever else lies in those pages, so this is not
 * asked for without need. */
static void verbs_load(void)
{
    struct library *lib = &verbs_library;
    char symbol[64];

    if (!library_open(lib))
        return;
#define LOAD(result, name, version, arguments)                                        \
    if (!library_symbol(lib, verbs_symbol(#name, symbol), version, &libibverbs.name)) \
        return;
    FAB_IBV_FUNCTIONS(LOAD)
#undef LOAD
    if (!fork_copies_pinned_pages())
        (void)libibverbs.fork_init();
    libibverbs_ready = true;
}

const struct fab_libfabric *fab_libfabric(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    (void)pthread_once(&once, fabric_load);
    if (libfabric.version)
        return &libfabric;
    fab_fail_text("%s", fabric_library.why);
    return NULL;
}

const struct fab_libibverbs *fab_libibverbs(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    (void)pthread_once(&once, verbs_load);
    if (libibverbs_ready)
        return &libibverbs;
    fab_fail_text("%s", verbs_library.why);
    return NULL;
}

static const char *real_path(const struct library *lib, char buffer[PATH_MAX])
{
    Dl_info info;

    if (!dladdr(lib->landmark, &info) || !info.dli_fname)
        return lib->file;
    return realpath(info.dli_fname, buffer) ? buffer : info.dli_fname;
}

/* libibverbs tells its version only by its file name: libibverbs.so.1.14.44.0. */
static const char *version_in(const char *path)
{
    const char *suffix = strstr(path, ".so.");

    return suffix ? suffix + strlen(".so.") : "unknown";
}

int fab_library(const char *name, char *path, uint32_t path_size, char *version,
                uint32_t version_size)
{
    char buffer[PATH_MAX];
    const char *file;

    if (strcmp(name, fabric_library.name) == 0) {
        if (!fab_libfabric())
            return FAB_E_UNAVAILABLE;
        file = real_path(&fabric_library, buffer);
        (void)snprintf(version, version_size, "%u.%u", FI_MAJOR(libfabric.version),
                       FI_MINOR(libfabric.version));
    } else if (strcmp(name, verbs_library.name) == 0) {
        if (!fab_libibverbs())
            return FAB_E_UNAVAILABLE;
        file = real_path(&verbs_library, buffer);
        (void)snprintf(version, version_size, "%s", version_in(file));
    } else {
        fab_fail_text("library is '%.40s'; known are libfabric and libibverbs", name);
        return FAB_E_INVALID;
    }
    (void)snprintf(path, path_size, "%s", file);
    return 0;
}
