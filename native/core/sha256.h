/* SHA-256 (FIPS 180-4) and HMAC (RFC 2104), for the handshake's shared secret. Written here
 * because nothing but libc may be linked; checked against the standards' own vectors. */
#ifndef FAB_SHA256_H
#define FAB_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define FAB_MAC_BYTES 32

void fab_sha256(const uint8_t *bytes, size_t length, uint8_t out[FAB_MAC_BYTES]);
/* HMAC-SHA256 over `label` (a C string, without its zero) followed by `bytes`. */
void fab_hmac(const uint8_t *key, size_t key_length, const char *label, const uint8_t *bytes,
              size_t length, uint8_t out[FAB_MAC_BYTES]);
/* 1 when equal; takes the same time wherever they differ. */
int fab_mac_equal(const uint8_t a[FAB_MAC_BYTES], const uint8_t b[FAB_MAC_BYTES]);

#endif
