/* SHA-256 and HMAC; sha256.h says why this is here. */
#include "sha256.h"

#include <string.h>

#define BLOCK 64

struct sha {
    uint32_t state[8];
    uint64_t total;
    uint8_t block[BLOCK];
    size_t used;
};

/* FIPS 180-4, 4.2.2: fractional parts of the cube roots of the first 64 primes. */
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, unsigned n)
{
    return x >> n | x << (32 - n);
}

static void expand(const uint8_t *block, uint32_t w[64])
{
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
               (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
}

static void compress(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64], v[8];
    expand(block, w);
    memcpy(v, state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t choose = (v[4] & v[5]) ^ (~v[4] & v[6]);
        uint32_t t1 = v[7] + s1 + choose + round_constants[i] + w[i];
        uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + s0 + majority;
    }
    for (int i = 0; i < 8; i++)
        state[i] += v[i];
}

static void start(struct sha *s)
{
    /* FIPS 180-4, 5.3.3: fractional parts of the square roots of the first 8 primes. */
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->state, first, sizeof first);
    s->total = 0;
    s->used = 0;
}

static void feed(struct sha *s, const uint8_t *bytes, size_t length)
{
    s->total += length;
    while (length) {
        size_t n = BLOCK - s->used < length ? BLOCK - s->used : length;
        memcpy(s->block + s->used, bytes, n);
        s->used += n;
        bytes += n;
        length -= n;
        if (s->used == BLOCK) {
            compress(s->state, s->block);
            s->used = 0;
        }
    }
}

static void finish(struct sha *s, uint8_t out[FAB_MAC_BYTES])
{
    uint64_t bits = s->total * 8;
    static const uint8_t padding[BLOCK] = {0x80};
    size_t pad = s->used < 56 ? 56 - s->used : 120 - s->used;
    feed(s, padding, pad);
    uint8_t tail[8];
    for (int i = 0; i < 8; i++)
        tail[i] = (uint8_t)(bits >> (56 - 8 * i));
    feed(s, tail, sizeof tail);
    for (int i = 0; i < FAB_MAC_BYTES; i++)
        out[i] = (uint8_t)(s->state[i / 4] >> (24 - 8 * (i % 4)));
}

void fab_sha256(const uint8_t *bytes, size_t length, uint8_t out[FAB_MAC_BYTES])
{
    struct sha s;
    start(&s);
    feed(&s, bytes, length);
    finish(&s, out);
}

void fab_hmac(const uint8_t *key, size_t key_length, const char *label, const uint8_t *bytes,
              size_t length, uint8_t out[FAB_MAC_BYTES])
{
    uint8_t pad[BLOCK] = {0};
    if (key_length > BLOCK)
        fab_sha256(key, key_length, pad);
    else
        memcpy(pad, key, key_length);
    struct sha s;
    for (int i = 0; i < BLOCK; i++)
        pad[i] ^= 0x36;
    start(&s);
    feed(&s, pad, BLOCK);
    feed(&s, (const uint8_t *)label, strlen(label));
    feed(&s, bytes, length);
    uint8_t inner[FAB_MAC_BYTES];
    finish(&s, inner);
    for (int i = 0; i < BLOCK; i++)
        pad[i] ^= 0x36 ^ 0x5c;
    start(&s);
    feed(&s, pad, BLOCK);
    feed(&s, inner, sizeof inner);
    finish(&s, out);
}

int fab_mac_equal(const uint8_t a[FAB_MAC_BYTES], const uint8_t b[FAB_MAC_BYTES])
{
    uint8_t differ = 0;
    for (int i = 0; i < FAB_MAC_BYTES; i++)
        differ |= (uint8_t)(a[i] ^ b[i]);
    return differ == 0;
}
