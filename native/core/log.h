/* Log lines and error texts.
 *
 * A log line goes to stderr, or to the file FABRIC_LOG_FILE names, when its level is at or above
 * FABRIC_LOG_LEVEL (error, warn, info, debug; default warn). It says what, which NIC or peer, and
 * the errno. Error texts belong to the calling thread until its next failing call.
 */
#ifndef FAB_LOG_H
#define FAB_LOG_H

#include <stddef.h>

enum fab_log_level { FAB_LOG_ERROR, FAB_LOG_WARN, FAB_LOG_INFO, FAB_LOG_DEBUG };

__attribute__((format(printf, 2, 3))) void fab_log(enum fab_log_level level, const char *format,
                                                   ...);
/* Sets the calling thread's error and returns `code`. */
__attribute__((format(printf, 2, 3))) int fab_error(int code, const char *format, ...);
/* The same, keeping the reason that a provider left by fab_fail_text(). */
__attribute__((format(printf, 3, 4))) int fab_error_why(int code, int error, const char *format,
                                                        ...);
/* The reason that a provider left, or strerror(error). Forgets it. */
const char *fab_take_reason(int error);

/* snprintf that may cut: for texts, where half of one is better than none. */
__attribute__((format(printf, 3, 4))) void fab_text(char *out, size_t size, const char *format,
                                                    ...);

#endif
