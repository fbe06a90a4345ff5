/* Log lines and error texts; the contract is in log.h. */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fabric.h"
#include "providers/provider.h"

#define LINE_MAX_BYTES 1024

static _Thread_local char error_text[LINE_MAX_BYTES];
static _Thread_local int error_code;
static _Thread_local char reason[FAB_TEXT_MAX * 2];

static pthread_once_t log_once = PTHREAD_ONCE_INIT;
static int log_fd = STDERR_FILENO;
static enum fab_log_level log_level = FAB_LOG_WARN;

static const char *const level_names[] = {"error", "warn", "info", "debug"};

static void log_setup(void)
{
    const char *level = getenv("FABRIC_LOG_LEVEL");
    for (int i = 0; level && i < 4; i++)
        if (!strcasecmp(level, level_names[i]))
            log_level = (enum fab_log_level)i;
    const char *file = getenv("FABRIC_LOG_FILE");
    if (file && *file) {
        int fd = open(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
        if (fd >= 0)
            log_fd = fd;
    }
}

void fab_log(enum fab_log_level level, const char *format, ...)
{
    pthread_once(&log_once, log_setup);
    if (level > log_level)
        return;
    char line[LINE_MAX_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct tm parts;
    gmtime_r(&now.tv_sec, &parts);
    size_t used = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &parts);
    used += (size_t)snprintf(line + used, sizeof line - used, ".%03ldZ fabric %s [%d] ",
                             now.tv_nsec / 1000000, level_names[level], (int)getpid());
    va_list args;
    va_start(args, format);
    int more = vsnprintf(line + used, sizeof line - used - 1, format, args);
    va_end(args);
    used += more < 0 ? 0 : (size_t)more;
    if (used > sizeof line - 2)
        used = sizeof line - 2;
    line[used] = '\n';
    ssize_t written = write(log_fd, line, used + 1); /* one call: lines never mix */
    (void)written;                                   /* there is nowhere to report it */
}

static int set_error(int code, const char *format, va_list args)
{
    error_code = code;
    vsnprintf(error_text, sizeof error_text, format, args);
    return code;
}

int fab_error(int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    set_error(code, format, args);
    va_end(args);
    reason[0] = 0;
    return code;
}

int fab_error_why(int code, int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    set_error(code, format, args);
    va_end(args);
    size_t used = strlen(error_text);
    snprintf(error_text + used, sizeof error_text - used, ": %s", fab_take_reason(error));
    return code;
}

const char *fab_take_reason(int error)
{
    static _Thread_local char taken[sizeof reason];
    if (reason[0])
        memcpy(taken, reason, sizeof taken);
    else
        snprintf(taken, sizeof taken, "%s (errno %d)", strerror(error < 0 ? -error : error),
                 error < 0 ? -error : error);
    reason[0] = 0;
    return taken;
}

void fab_fail_text(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
}

void fab_text(char *out, size_t size, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(out, size, format, args);
    va_end(args);
}

const char *fab_error_text(void)
{
    return error_text;
}

int fab_error_code(void)
{
    return error_code;
}
