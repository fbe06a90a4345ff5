/* Units of the core, against its internal headers: sharding, SHA-256, frames, handle tables,
 * counters. No provider but `local` is opened, and no peer is ever connected.
 *
 * test_core [seed]
 */
#include <errno.h>
#include <pthread.h>

#include "check.h"
#include "core/counter.h"
#include "core/frame.h"
#include "core/peer.h"
#include "core/sha256.h"
#include "core/shard.h"
#include "core/slots.h"
#include "core/stats.h"
#include "core/worker.h"

/* ---- sharding ---- */

static const uint32_t lane_counts[] = {1, 2, 3, 5, 16};

/* Shares follow each other without gap or overlap from 0 to the length. */
static void check_cut(uint64_t length, uint32_t pieces)
{
    uint64_t at = 0;
    for (uint32_t i = 0; i < pieces; i++) {
        struct fab_span span = fab_shard_bytes(length, i, pieces, NULL);
        CHECK(span.begin == at && span.end >= at, "share %u of %u of %llu bytes is %llu to %llu", i,
              pieces, (unsigned long long)length, (unsigned long long)span.begin,
              (unsigned long long)span.end);
        CHECK(span.begin % FAB_SHARD_ALIGN == 0, "share %u of %u of %llu bytes starts at %llu", i,
              pieces, (unsigned long long)length, (unsigned long long)span.begin);
        at = span.end;
    }
    SAME(at, length);
}

static void check_pieces(uint64_t length, uint32_t lanes)
{
    uint32_t n = fab_shard_pieces(length, lanes);
    CHECK(n >= 1 && n <= lanes && n <= FAB_MAX_LANES, "%u pieces of %llu bytes on %u lanes", n,
          (unsigned long long)length, lanes);
    check_cut(length, n);
    uint64_t least = UINT64_MAX, most = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct fab_span span = fab_shard_bytes(length, i, n, NULL);
        uint64_t size = span.end - span.begin;
        least = size < least ? size : least;
        most = size > most ? size : most;
    }
    CHECK(most - least < UINT64_C(2) * FAB_SHARD_ALIGN, "shares of %llu to %llu bytes",
          (unsigned long long)least, (unsigned long long)most);
    CHECK(n == 1 || least >= FAB_SHARD_MIN / 2, "%u shares of %llu bytes, the least of %llu", n,
          (unsigned long long)length, (unsigned long long)least);
}

static void check_length(uint64_t length)
{
    for (size_t i = 0; i < sizeof lane_counts / sizeof *lane_counts; i++) {
        check_cut(length, lane_counts[i]);
        check_pieces(length, lane_counts[i]);
    }
    for (uint32_t lanes = 1; lanes < FAB_MAX_LANES; lanes++)
        CHECK(fab_shard_pieces(length, lanes) <= fab_shard_pieces(length, lanes + 1),
              "fewer pieces of %llu bytes on more lanes", (unsigned long long)length);
}

static void test_shard_bytes(void)
{
    static const uint64_t known_bad[] = {16385, 32771, 65537};
    static const uint32_t known_lanes[] = {2, 4, 4};
    for (size_t i = 0; i < 3; i++)
        check_cut(known_bad[i], known_lanes[i]);
    for (uint64_t length = 0; length <= 40; length++) /* below the number of lanes, too */
        check_length(length);
    static const uint64_t units[] = {FAB_SHARD_ALIGN, FAB_SHARD_MIN};
    for (size_t u = 0; u < 2; u++)
        for (uint64_t k = 1; k <= 40; k++)
            for (uint64_t d = 0; d <= 4; d++)
                check_length(units[u] * k + d - 2);
    for (uint64_t d = 0; d < 200; d++) {
        check_length((UINT64_C(1) << 63) + d * 4095 - 400000);
        check_length(UINT64_MAX - d * 4097);
    }
    for (int i = 0; i < 20000; i++)
        check_length(check_next(&check_state) >> check_random(64));
    SAME(fab_shard_pieces(1 << 30, 0), 1);
    SAME(fab_shard_pieces(1 << 30, 1000), FAB_MAX_LANES);
}

static void check_items(uint64_t count, uint32_t shares)
{
    uint64_t at = 0, least = UINT64_MAX, most = 0;
    for (uint32_t i = 0; i < shares; i++) {
        struct fab_span span = fab_shard_items(count, i, shares, NULL);
        SAME(span.begin, at);
        CHECK(span.end >= at, "share %u of %u of %llu items ends before it begins", i, shares,
              (unsigned long long)count);
        at = span.end;
        uint64_t size = span.end - span.begin;
        least = size < least ? size : least;
        most = size > most ? size : most;
    }
    SAME(at, count);
    CHECK(most - least <= 1, "%llu items on %u shares: %llu to %llu", (unsigned long long)count,
          shares, (unsigned long long)least, (unsigned long long)most);
}

/* Shares follow each other, add up, and are as large as their weights say, to a block. */
static void check_weighted(uint64_t length, uint32_t n, const uint32_t *weights)
{
    uint64_t at = 0, total = 0;
    for (uint32_t i = 0; i < n; i++)
        total += weights[i];
    for (uint32_t i = 0; i < n; i++) {
        struct fab_span span = fab_shard_bytes(length, i, n, weights);
        SAME(span.begin, at);
        CHECK(span.end >= at && (i + 1 == n || span.end % FAB_SHARD_ALIGN == 0), "share %u", i);
        double size = (double)(span.end - span.begin);
        double fair = (double)length * weights[i] / (double)total;
        CHECK(size > fair - 2 * FAB_SHARD_ALIGN && size < fair + 2 * FAB_SHARD_ALIGN,
              "share %u of %llu bytes has %.0f, %.0f are fair", i, (unsigned long long)length, size,
              fair);
        at = span.end;
    }
    SAME(at, length);
}

static void test_shard_weights(void)
{
    static const uint32_t half[] = {1000, 500};
    SAME(fab_shard_bytes(3 << 20, 0, 2, half).end, 2 << 20);
    SAME(fab_shard_items(3, 0, 2, half).end, 2);
    for (int i = 0; i < 20000; i++) {
        uint32_t lanes[FAB_MAX_LANES], weights[FAB_MAX_LANES];
        uint32_t n = 1 + (uint32_t)check_random(FAB_MAX_LANES);
        uint64_t length = check_random(UINT64_C(1) << (1 + check_random(40)));
        for (uint32_t k = 0; k < n; k++) {
            lanes[k] = k;
            weights[k] = 1 + (uint32_t)check_random(1000);
        }
        check_weighted(length, n, weights);
        uint32_t m = fab_shard_worthy(length, n, lanes, weights);
        CHECK(m >= 1 && m <= n, "%u of %u lanes", m, n);
        check_weighted(length, m, weights);
        for (uint32_t k = 0; k < m; k++) {
            struct fab_span span = fab_shard_bytes(length, k, m, weights);
            CHECK(m == 1 || span.end > span.begin, "an empty share of %llu bytes on %u lanes",
                  (unsigned long long)length, m);
            CHECK(!k || lanes[k] > lanes[k - 1], "lanes out of order");
        }
    }
}

static void test_shard_items(void)
{
    for (uint32_t shares = 1; shares <= FAB_MAX_LANES; shares++) {
        for (uint64_t count = 0; count < 100; count++)
            check_items(count, shares);
        for (int i = 0; i < 1000; i++)
            check_items(check_next(&check_state) >> check_random(64), shares);
        check_items(UINT64_MAX, shares);
    }
}

/* ---- SHA-256 and HMAC ---- */

static void check_mac(const uint8_t mac[FAB_MAC_BYTES], const char *hex)
{
    char text[2 * FAB_MAC_BYTES + 1];
    for (int i = 0; i < FAB_MAC_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", mac[i]);
    CHECK(!strcmp(text, hex), "%s, not %s", text, hex);
}

static void test_sha256(void)
{
    static const struct {
        const char *text, *hex;
    } vectors[] = {/* FIPS 180-4, and the empty text */
                   {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
                   {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
                   {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
                   {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno"
                    "ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
                    "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"}};
    uint8_t mac[FAB_MAC_BYTES];
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        fab_sha256((const uint8_t *)vectors[i].text, strlen(vectors[i].text), mac);
        check_mac(mac, vectors[i].hex);
    }
    uint8_t *million = malloc(1000000);
    CHECK(million, "out of memory");
    memset(million, 'a', 1000000);
    fab_sha256(million, 1000000, mac);
    check_mac(mac, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

static void check_hmac(uint8_t key_byte, size_t key_length, const char *key_text, const char *text,
                       size_t length, const char *hex)
{
    uint8_t key[256], mac[FAB_MAC_BYTES];
    for (size_t i = 0; i < key_length; i++)
        key[i] = key_text ? (uint8_t)key_text[i] : key_byte ? key_byte : (uint8_t)(i + 1);
    fab_hmac(key, key_length, "", (const uint8_t *)text, length, mac);
    check_mac(mac, hex);
    for (size_t cut = 0; cut <= length && cut < 80; cut++) { /* label and bytes are one text */
        char label[96] = "";
        memcpy(label, text, cut);
        if (strlen(label) != cut)
            break;
        fab_hmac(key, key_length, label, (const uint8_t *)text + cut, length - cut, mac);
        check_mac(mac, hex);
    }
}

static void test_hmac(void) /* RFC 4231; its case 5 only cuts the result */
{
    char dd[50], cd[50];
    memset(dd, 0xdd, sizeof dd);
    memset(cd, 0xcd, sizeof cd);
    check_hmac(0x0b, 20, NULL, "Hi There", 8,
               "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    check_hmac(0, 4, "Jefe", "what do ya want for nothing?", 28,
               "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    check_hmac(0xaa, 20, NULL, dd, sizeof dd,
               "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
    check_hmac(0, 25, NULL, cd, sizeof cd,
               "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b");
    const char *hashed = "Test Using Larger Than Block-Size Key - Hash Key First";
    check_hmac(0xaa, 131, NULL, hashed, strlen(hashed),
               "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    const char *larger = "This is a test using a larger than block-size key and a larger than "
                         "block-size data. The key needs to be hashed before being used by the "
                         "HMAC algorithm.";
    check_hmac(0xaa, 131, NULL, larger, strlen(larger),
               "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2");
    uint8_t a[FAB_MAC_BYTES] = {0}, b[FAB_MAC_BYTES] = {0};
    CHECK(fab_mac_equal(a, b), "equal macs differ");
    for (int i = 0; i < FAB_MAC_BYTES * 8; i++) {
        b[i / 8] ^= (uint8_t)(1 << i % 8);
        CHECK(!fab_mac_equal(a, b), "bit %d does not matter", i);
        b[i / 8] ^= (uint8_t)(1 << i % 8);
    }
}

/* ---- times ---- */

/* Bucket i begins where the header says; longer times never fall into an earlier one. */
static void test_buckets(void)
{
    for (uint64_t i = 4; i < FAB_BUCKETS; i++) {
        uint64_t begin = (4 + i % 4) << (i / 4 - 1);
        SAME(fab_bucket(begin), i);
        SAME(fab_bucket(begin - 1), i - 1);
    }
    for (uint64_t ns = 0; ns < 4; ns++)
        SAME(fab_bucket(ns), ns);
    SAME(fab_bucket(UINT64_MAX), FAB_BUCKETS - 1);
    for (int i = 0; i < 1000; i++) {
        uint64_t ns = check_next(&check_state) >> check_random(64);
        CHECK(fab_bucket(ns) <= fab_bucket(ns + ns / 4 + 1), "%llu ns", (unsigned long long)ns);
    }
}

/* ---- frames ---- */

/* The bodies as ARCHITECTURE.md has them: I is 16 bytes, q u64, i u32, t a text, b up to 4096 bytes
 * to the end, v a count and as many ids. HELLO and WELCOME have a test of their own. */
static const char *const bodies[FAB_F_LAST + 1] = {
    [FAB_F_CHALLENGE] = "IqI", [FAB_F_READY] = "",        [FAB_F_REFUSE] = "Iqit",
    [FAB_F_BYE] = "it",        [FAB_F_PING] = "q",        [FAB_F_PONG] = "q",
    [FAB_F_MESSAGE] = "iiib",  [FAB_F_ACK] = "ii",        [FAB_F_VOID] = "iv",
    [FAB_F_VOIDED] = "i",      [FAB_F_GRANT_REQ] = "qqi", [FAB_F_GRANT] = "qqiiiqi",
    [FAB_F_QUIESCE] = "qi",    [FAB_F_QUIESCED] = "qi"};

static void put_field(struct fab_writer *w, char field, uint64_t *state)
{
    uint8_t bytes[FAB_FRAGMENT_MAX];
    char text[FAB_TEXT_MAX] = "";
    uint64_t value = check_next(state);
    check_paint(bytes, sizeof bytes, value);
    if (field == 'I') {
        fab_put(w, bytes, 16);
    } else if (field == 'q') {
        fab_put_u64(w, value);
    } else if (field == 'i') {
        fab_put_u32(w, (uint32_t)value);
    } else if (field == 'b') {
        fab_put(w, bytes, value % (sizeof bytes + 1));
    } else if (field == 'v') {
        fab_put_u32(w, (uint32_t)(value % 257));
        fab_put(w, bytes, value % 257 * 4);
    } else {
        memset(text, 'x', value % sizeof text);
        fab_put_text(w, text);
    }
}

/* Reads the field; with `state`, it must be what put_field() wrote from the same state. */
static void get_field(struct fab_reader *r, char field, uint64_t *state)
{
    uint8_t want[FAB_FRAGMENT_MAX], got[FAB_FRAGMENT_MAX] = {0};
    char text[FAB_TEXT_MAX];
    uint64_t value = state ? check_next(state) : 0, size = 16;
    if (state)
        check_paint(want, sizeof want, value);
    if (field == 'q') {
        uint64_t v = fab_get_u64(r);
        CHECK(!state || v == value, "u64");
    } else if (field == 'i') {
        uint32_t v = fab_get_u32(r);
        CHECK(!state || v == (uint32_t)value, "u32");
    } else if (field == 't') {
        memset(text, '!', sizeof text);
        fab_get_text(r, text, sizeof text);
        CHECK(memchr(text, 0, sizeof text), "a text without an end");
        CHECK(!state || strlen(text) == value % sizeof text, "text");
    } else {
        if (field == 'v')
            size = (uint64_t)fab_get_u32(r) * 4;
        if (field == 'b')
            size = r->length - r->at;
        if (size > sizeof got)
            size = sizeof got;
        fab_get(r, got, size);
        CHECK(!state || !memcmp(got, want, size), "bytes");
    }
    CHECK(r->at <= r->length, "read past the end");
}

static void read_body(struct fab_reader *r, uint8_t type, uint64_t *state)
{
    for (const char *field = bodies[type]; field && *field; field++)
        get_field(r, *field, state);
}

/* The bytes in a block of just their size, so that a sanitizer sees any read past their end. */
static uint8_t *exact(const uint8_t *bytes, uint32_t length)
{
    uint8_t *copy = malloc(length ? length : 1);
    CHECK(copy, "out of memory");
    memcpy(copy, bytes, length);
    return copy;
}

static void make_frame(struct fab_writer *w, enum fab_frame_type type, uint64_t state)
{
    fab_frame_begin(w, type, state);
    for (const char *field = bodies[type]; field && *field; field++)
        put_field(w, *field, &state);
    fab_frame_end(w);
}

static void check_cut_frame(const struct fab_writer *w, uint32_t length)
{
    struct fab_header h;
    struct fab_reader r;
    uint8_t *cut = exact(w->bytes, length);
    SAME(fab_read_header(&r, cut, length, &h), -EPROTO); /* the length in it is another */
    if (length >= FAB_FRAME_HEADER) {
        memcpy(cut + 4, &length, sizeof length);
        CHECK(!fab_read_header(&r, cut, length, &h), "a header was refused");
        read_body(&r, h.type, NULL);
        CHECK(!fab_read_end(&r) || h.type == FAB_F_MESSAGE, "a cut frame of type %u was whole",
              h.type);
    }
    free(cut);
}

static void test_frames(void)
{
    for (int round = 0; round < 20; round++)
        for (int type = FAB_F_HELLO; type <= FAB_F_LAST; type++) {
            struct fab_writer w;
            struct fab_header h;
            struct fab_reader r;
            uint64_t state = check_next(&check_state), again = state;
            if (!bodies[type])
                continue;
            make_frame(&w, (enum fab_frame_type)type, state);
            uint8_t *bytes = exact(w.bytes, w.used);
            CHECK(!fab_read_header(&r, bytes, w.used, &h), "type %d", type);
            CHECK(h.type == type && h.length == w.used && h.session == state, "type %d", type);
            read_body(&r, h.type, &again);
            CHECK(fab_read_end(&r), "type %d was not read to its end", type);
            free(bytes);
            for (uint32_t cut = 0; cut < w.used; cut += 1 + cut / 100)
                check_cut_frame(&w, cut);
        }
}

static void test_bad_headers(void)
{
    struct fab_writer w;
    struct fab_header h;
    struct fab_reader r;
    uint8_t bytes[FAB_FRAME_MAX + 1] = {0};
    make_frame(&w, FAB_F_PING, 1);
    static const struct {
        int at, value;
    } bad[] = {{0, 0xB2},           {1, 0},   {2, 0}, {2, 2},  {3, 0},
               {3, FAB_F_LAST + 1}, {3, 255}, {4, 0}, {4, 25}, {7, 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memcpy(bytes, w.bytes, w.used);
        bytes[bad[i].at] = (uint8_t)bad[i].value;
        CHECK(fab_read_header(&r, bytes, w.used, &h) == -EPROTO, "byte %d may be %d", bad[i].at,
              bad[i].value);
    }
    memcpy(bytes, w.bytes, w.used);
    uint32_t length = sizeof bytes;
    memcpy(bytes + 4, &length, sizeof length);
    SAME(fab_read_header(&r, bytes, length, &h), -EPROTO);
    length--;
    memcpy(bytes + 4, &length, sizeof length);
    SAME(fab_read_header(&r, bytes, length, &h), 0);
    SAME(fab_read_header(&r, NULL, 0, &h), -EPROTO);
}

static void random_hello(struct fab_hello *h)
{
    memset(h, 0, sizeof *h);
    check_paint(h->from, 2 * FAB_ENGINE_ID_BYTES, check_next(&check_state));
    h->session = check_next(&check_state) | 1;
    h->answers = check_next(&check_state);
    h->attempt = check_next(&check_state);
    h->kind = (uint32_t)check_random(7);
    h->nic_count = 1 + (uint32_t)check_random(FAB_MAX_NICS);
    h->lane_count = 1 + (uint32_t)check_random(FAB_MAX_LANES);
    h->fragments = FAB_MESSAGE_FRAMES + (uint32_t)check_random(100);
    h->peer_timeout = check_next(&check_state);
    check_paint(h->nonce, 32, check_next(&check_state));
    memset(h->label, 'l', check_random(FAB_NAME_MAX));
    h->contact = (uint32_t)check_random(h->lane_count);
    for (uint32_t i = 0; i < h->lane_count; i++) {
        h->lanes[i].speed = (uint32_t)check_next(&check_state);
        h->lanes[i].from_nic = (uint32_t)check_random(FAB_MAX_NICS);
        h->lanes[i].to_nic = (uint32_t)check_random(FAB_MAX_NICS);
        h->lanes[i].blob_len = (uint32_t)check_random(FAB_BLOB_MAX + 1);
        h->lanes[i].doorbell.addr = check_next(&check_state);
        h->lanes[i].doorbell.rkey = check_next(&check_state);
        check_paint(h->lanes[i].blob, FAB_BLOB_MAX, check_next(&check_state));
    }
    check_paint(h->mac, sizeof h->mac, check_next(&check_state));
}

static void write_hello(struct fab_writer *w, struct fab_hello *h)
{
    fab_frame_begin(w, FAB_F_HELLO, 0);
    fab_put_hello(w, h);
    fab_put(w, h->mac, sizeof h->mac);
    fab_frame_end(w);
}

static int read_hello(const uint8_t *bytes, uint32_t length, struct fab_hello *out)
{
    struct fab_header h;
    struct fab_reader r;
    memset(out, 0, sizeof *out);
    int rc = fab_read_header(&r, bytes, length, &h);
    if (!rc)
        rc = fab_read_hello(&r, out);
    CHECK(r.at <= r.length, "read past the end");
    return rc;
}

/* What the core relies on after fab_read_hello() said yes. */
static void check_hello(const struct fab_hello *h)
{
    CHECK(h->lane_count >= 1 && h->lane_count <= FAB_MAX_LANES, "%u lanes", h->lane_count);
    CHECK(h->nic_count >= 1 && h->nic_count <= FAB_MAX_NICS, "%u NICs", h->nic_count);
    CHECK(h->session && memchr(h->label, 0, sizeof h->label), "session or label");
    for (uint32_t i = 0; i < h->lane_count; i++)
        CHECK(h->lanes[i].from_nic < FAB_MAX_NICS && h->lanes[i].to_nic < FAB_MAX_NICS &&
                  h->lanes[i].blob_len <= FAB_BLOB_MAX,
              "lane %u", i);
}

static void test_hello(void)
{
    for (int round = 0; round < 50; round++) {
        struct fab_hello h, got;
        struct fab_writer w;
        random_hello(&h);
        write_hello(&w, &h);
        uint8_t *bytes = exact(w.bytes, w.used);
        CHECK(!read_hello(bytes, w.used, &got), "a hello was refused");
        CHECK(!memcmp(&h, &got, sizeof h), "a hello changed on the way");
        free(bytes);
        for (uint32_t cut = 0; cut < w.used; cut += 1 + cut / 50) {
            bytes = exact(w.bytes, cut);
            CHECK(read_hello(bytes, cut, &got), "%u of %u bytes were taken", cut, w.used);
            if (cut >= 8)
                memcpy(bytes + 4, &cut, sizeof cut);
            CHECK(read_hello(bytes, cut, &got), "%u of %u bytes were taken", cut, w.used);
            free(bytes);
        }
    }
}

/* A stranger's label and reasons are logged, and shown on terminals. */
static void test_texts_print(void)
{
    static const char said[] = "a\nb\x1b[2J\x7f\xc3\xa9\xc2\x9b\xc2\xa9 z\xc2";
    static const char heard[] = "a?b?[2J?\xc3\xa9?"
                                "?\xc2\xa9 z\xc2";
    char text[FAB_TEXT_MAX];
    struct fab_hello h, got;
    struct fab_writer w;
    random_hello(&h);
    memset(h.label, 0, sizeof h.label);
    memcpy(h.label, said, sizeof said);
    write_hello(&w, &h);
    CHECK(!read_hello(w.bytes, w.used, &got), "a hello was refused");
    CHECK(!strcmp(got.label, heard), "%s", got.label);
    w.used = 0;
    fab_put_text(&w, said);
    struct fab_reader r = {.bytes = w.bytes, .length = w.used};
    fab_get_text(&r, text, sizeof text);
    CHECK(fab_read_end(&r) && !strcmp(text, heard), "%s", text);
}

static void test_hello_fuzz(void)
{
    uint32_t taken = 0;
    for (int round = 0; round < 30000; round++) {
        struct fab_hello h, got;
        struct fab_writer w;
        random_hello(&h);
        write_hello(&w, &h);
        uint32_t length = w.used;
        if (check_random(4) == 0) { /* longer or shorter, and it says so */
            length = (uint32_t)check_random(FAB_FRAME_MAX + 1);
            memcpy(w.bytes + 4, &length, sizeof length);
        }
        for (uint64_t flips = check_random(6); flips; flips--) {
            /* rather in the counts than in the blobs */
            uint64_t at = check_random(check_random(2) ? 128 : length + 1);
            w.bytes[at % FAB_FRAME_MAX] ^= (uint8_t)(1 << check_random(8));
        }
        uint8_t *bytes = exact(w.bytes, length);
        if (!read_hello(bytes, length, &got)) {
            check_hello(&got);
            taken++;
        }
        free(bytes);
    }
    CHECK(taken > 100, "the fuzz never got past the first check: %u", taken);
}

/* Random bytes under random types; every byte offered, none beyond. */
static void test_reader_fuzz(void)
{
    static const char fields[] = "Iqitbv";
    for (int round = 0; round < 30000; round++) {
        uint8_t bytes[512];
        uint32_t length = (uint32_t)check_random(sizeof bytes + 1);
        check_paint(bytes, sizeof bytes, check_next(&check_state));
        if (check_random(2))
            memset(bytes, 0, sizeof bytes / 2);
        uint8_t *copy = exact(bytes, length);
        struct fab_reader r = {.bytes = copy, .length = length};
        for (int i = 0; i < 40; i++)
            get_field(&r, fields[check_random(sizeof fields - 1)], NULL);
        if (r.bad) { /* and from here on everything is zero */
            CHECK(!fab_get_u64(&r) && !fab_get_u32(&r) && !fab_read_end(&r), "read after the end");
        }
        free(copy);
    }
}

static void test_writer_bound(void)
{
    struct fab_writer w;
    uint8_t block[1000] = {0};
    fab_frame_begin(&w, FAB_F_MESSAGE, 1);
    for (int i = 0; i < 10; i++)
        fab_put(&w, block, sizeof block);
    SAME(w.used, FAB_FRAME_MAX);
}

/* ---- handle tables ---- */

struct item {
    struct fab_slot slot;
    _Atomic int64_t handle; /* its own, while it lives */
};

static void test_slots(void)
{
    struct fab_slots table;
    struct item *items[8];
    int64_t handles[8];
    CHECK(!fab_slots_init(&table, sizeof(struct item), 8), "out of memory");
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 8; i++) {
            items[i] = fab_slot_alloc(&table);
            CHECK(items[i], "full at %d", i);
            handles[i] = fab_slot_handle(items[i]);
            CHECK(handles[i] > 0 && fab_slot_get(&table, handles[i]) == items[i], "item %d", i);
            CHECK(!fab_slot_put(items[i]), "the owner's reference went with another's");
            for (int k = 0; k < i; k++)
                CHECK(items[k] != items[i] && handles[k] != handles[i], "given twice");
        }
        SAME(table.live, 8);
        CHECK(!fab_slot_alloc(&table), "one more than its capacity");
        for (int i = 0; i < 8; i++) {
            CHECK(!fab_slot_get(&table, handles[i] + (INT64_C(1) << 32)), "a handle to come");
            fab_slot_ref(items[i]);
            CHECK(fab_slot_live(items[i]) && fab_slot_kill(items[i]), "killed before");
            CHECK(!fab_slot_kill(items[i]) && !fab_slot_live(items[i]), "killed twice");
            CHECK(!fab_slot_get(&table, handles[i]), "a dead item was given out");
            CHECK(!fab_slot_put(items[i]), "somebody still refers to it");
            CHECK(fab_slot_put(items[i]), "nobody refers to it");
            fab_slot_free(&table, items[i]);
            CHECK(!fab_slot_get(&table, handles[i]), "a stale handle was taken");
        }
        SAME(table.live, 0);
    }
    static const int64_t strange[] = {
        0, -1, 1, 9, INT64_MAX, INT64_MIN, INT64_C(1) << 32, (INT64_C(1) << 32) + 9};
    for (size_t i = 0; i < sizeof strange / sizeof *strange; i++)
        CHECK(!fab_slot_get(&table, strange[i]), "handle %lld", (long long)strange[i]);
    fab_slots_fini(&table);
}

enum { HAMMERS = 4, ITEMS = 16, KEPT = 64, BLOWS = 400000 };

static struct {
    struct fab_slots table;
    _Atomic int64_t published[KEPT];
    _Atomic uint64_t hits, misses;
} hammered;

static void put_item(struct item *item)
{
    if (!fab_slot_put(item))
        return;
    atomic_store(&item->handle, 0);
    fab_slot_free(&hammered.table, item);
}

static void look(uint64_t *state)
{
    int64_t handle = atomic_load(&hammered.published[check_next(state) % KEPT]);
    struct item *item = fab_slot_get(&hammered.table, handle);
    atomic_fetch_add(item ? &hammered.hits : &hammered.misses, 1);
    if (!item)
        return;
    CHECK(atomic_load(&item->handle) == handle, "handle %llx gives another's item",
          (unsigned long long)handle);
    if (check_next(state) % 8 == 0 && fab_slot_kill(item))
        put_item(item); /* the owner's reference, in its place */
    put_item(item);
}

static void *hammer(void *arg)
{
    uint64_t state = check_seed + *(uint64_t *)arg;
    for (int i = 0; i < BLOWS; i++) {
        struct item *item = check_next(&state) % 3 ? NULL : fab_slot_alloc(&hammered.table);
        if (item) {
            atomic_store(&item->handle, fab_slot_handle(item));
            atomic_store(&hammered.published[check_next(&state) % KEPT], item->handle);
        }
        look(&state);
    }
    return NULL;
}

static void test_slots_threads(void)
{
    pthread_t threads[HAMMERS];
    uint64_t numbers[HAMMERS];
    CHECK(!fab_slots_init(&hammered.table, sizeof(struct item), ITEMS), "out of memory");
    for (int i = 0; i < HAMMERS; i++) {
        numbers[i] = (uint64_t)i;
        CHECK(!pthread_create(&threads[i], NULL, hammer, &numbers[i]), "no thread");
    }
    for (int i = 0; i < HAMMERS; i++)
        pthread_join(threads[i], NULL);
    CHECK(hammered.hits > 1000 && hammered.misses > 1000, "too few hits or misses");
    uint32_t live = 0;
    for (uint32_t i = 0; i < hammered.table.touched; i++) {
        struct item *item = fab_slot_at(&hammered.table, i);
        live += fab_slot_live(item);
        SAME((uint32_t)item->slot.word & INT32_MAX, fab_slot_live(item));
        if (fab_slot_kill(item))
            put_item(item);
    }
    CHECK(live <= ITEMS, "%u items", live);
    SAME(hammered.table.live, 0);
    uint32_t again = 0;
    while (fab_slot_alloc(&hammered.table))
        again++;
    SAME(again, ITEMS); /* none was lost, none is on the free list twice */
    fab_slots_fini(&hammered.table);
}

/* ---- counters ---- */

static fab_engine *engine;
static struct fab_peer *sender, *stranger;

static struct fab_peer *make_peer(const char *label)
{
    uint8_t id[FAB_ENGINE_ID_BYTES];
    check_paint(id, sizeof id, check_next(&check_state));
    fab_lock(engine);
    struct fab_peer *p = fab_peer_new(engine, id, label);
    fab_unlock(engine);
    CHECK(p, "no peer");
    return p;
}

static void arrive(struct fab_peer *from, uint32_t imm, uint32_t times)
{
    fab_lock(engine);
    fab_count(engine, from, imm, times);
    fab_unlock(engine);
}

static void make_void(struct fab_peer *from, uint32_t id)
{
    fab_lock(engine);
    fab_void_id(engine, from, id);
    fab_unlock(engine);
}

static uint32_t imm_of(uint32_t pieces, int64_t id)
{
    return (pieces - 1) << 28 | (uint32_t)id;
}

static uint64_t value_of(int64_t counter)
{
    return (uint64_t)OK(fab_counter_value(engine, counter, 0));
}

/* Every number of pieces alone: one range, and not before the last piece. */
static void test_pieces(void)
{
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    const _Atomic uint64_t *cell =
        (const _Atomic uint64_t *)(uintptr_t)fab_counter_cell(engine, c, 0);
    CHECK(cell, "no cell");
    for (uint32_t pieces = 1; pieces <= FAB_MAX_LANES; pieces++)
        for (uint32_t i = 1; i <= pieces; i++) {
            arrive(sender, imm_of(pieces, id), 1);
            SAME(value_of(c), pieces - 1 + (i == pieces));
        }
    SAME(atomic_load(cell), UINT64_C(16) * FAB_PIECE_UNIT);
    arrive(sender, imm_of(1, id), 1000);
    SAME(value_of(c), 1016);
    OK(fab_counter_close(engine, c));
}

static void test_shuffled_pieces(void)
{
    uint32_t all[3 * 136], n = 0;
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    for (uint32_t pieces = 1; pieces <= FAB_MAX_LANES; pieces++)
        for (uint32_t i = 0; i < 3 * pieces; i++)
            all[n++] = imm_of(pieces, id);
    SAME(n, sizeof all / sizeof *all);
    for (uint32_t i = n - 1; i; i--) {
        uint64_t k = check_random(i + 1);
        uint32_t swap = all[i];
        all[i] = all[k];
        all[k] = swap;
    }
    for (uint32_t i = 0; i < n; i++) {
        CHECK(value_of(c) < 48, "48 ranges after %u of %u pieces", i, n);
        arrive(i % 2 ? sender : stranger, all[i], 1);
    }
    SAME(value_of(c), 48);
    SAME(*fab_counter_cell(engine, c, 0), UINT64_C(48) * FAB_PIECE_UNIT);
    OK(fab_counter_close(engine, c));
}

/* Half of two ranges adds up to one: progress, and not two. */
static void test_halves(void)
{
    uint64_t two = 2;
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    arrive(sender, imm_of(2, id), 1);
    SAME(value_of(c), 0);
    arrive(stranger, imm_of(2, id), 1);
    SAME(value_of(c), 1);
    FAILS(FAB_E_TIMEOUT, fab_counter_wait(engine, c, 0, &two, 1, 0, NULL, 0, NULL));
    arrive(sender, imm_of(2, id), 1);
    FAILS(FAB_E_TIMEOUT, fab_counter_wait(engine, c, 0, &two, 1, 0, NULL, 0, NULL));
    arrive(stranger, imm_of(2, id), 1);
    OK(fab_counter_wait(engine, c, 0, &two, 1, 0, NULL, 0, NULL));
    OK(fab_counter_close(engine, c));
}

static void test_stale(void)
{
    uint64_t before = check_stats(engine).imm_stale;
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    CHECK(id >= 1 << 27 && id < 1 << 28, "id %#llx", (unsigned long long)id);
    arrive(sender, imm_of(1, id) ^ 1u << 16, 1); /* another generation */
    SAME(check_stats(engine).imm_stale, before + 1);
    SAME(value_of(c), 0);
    OK(fab_counter_close(engine, c));
    FAILS(FAB_E_INVALID, fab_counter_value(engine, c, 0));
    FAILS(FAB_E_INVALID, fab_counter_close(engine, c));
    CHECK(!fab_counter_cell(engine, c, 0), "the cell of a closed counter");
    arrive(sender, imm_of(3, id), 5);
    SAME(check_stats(engine).imm_stale, before + 6);
    make_void(sender, (uint32_t)id); /* of nobody: no effect */
}

/* With one slot left, its generations go round and never repeat at once. */
static void test_generations(void)
{
    static int64_t ids[2048];
    int64_t all = OK(fab_counter_open(engine, -1, FAB_MAX_COUNTERS - 1));
    for (int i = 0; i < 2048 + 100; i++) {
        int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
        FAILS(FAB_E_FULL, fab_counter_open(engine, -1, 1));
        if (i >= 2048)
            SAME(id, ids[i % 2048]);
        if (i % 2048)
            CHECK(id != ids[(i - 1) % 2048], "the same id twice");
        if (i && i < 2048)
            arrive(sender, (uint32_t)ids[check_random((uint64_t)i)], 1);
        SAME(value_of(c), 0);
        ids[i % 2048] = id;
        OK(fab_counter_close(engine, c));
    }
    OK(fab_counter_close(engine, all));
}

static void test_blocks(void)
{
    enum { N = 100 };
    uint64_t targets[N];
    uint8_t missing[N];
    int64_t c = OK(fab_counter_open(engine, -1, N)), id = OK(fab_counter_id(engine, c));
    for (uint32_t i = 0; i < N; i++) {
        targets[i] = 1 + i % 3;
        if (i != 3 && i != 97)
            arrive(sender, imm_of(1, id + i), (uint32_t)targets[i]);
    }
    arrive(sender, imm_of(4, id + 97), 3);
    FAILS(FAB_E_TIMEOUT, fab_counter_wait(engine, c, 0, targets, N, MSEC, NULL, 0, missing));
    for (uint32_t i = 0; i < N; i++)
        SAME(missing[i], i == 3 || i == 97);
    OK(fab_counter_wait(engine, c, 50, targets + 50, 47, 0, NULL, 0, missing));
    arrive(sender, imm_of(4, id + 97), 5);
    arrive(sender, imm_of(1, id + 3), 1);
    OK(fab_counter_wait(engine, c, 0, targets, N, 0, NULL, 0, missing));
    for (uint32_t i = 0; i < N; i++)
        SAME(missing[i], 0);
    FAILS(FAB_E_INVALID, fab_counter_wait(engine, c, 1, targets, N, 0, NULL, 0, NULL));
    FAILS(FAB_E_INVALID, fab_counter_wait(engine, c, N + 1, targets, 1, 0, NULL, 0, NULL));
    FAILS(FAB_E_INVALID, fab_counter_wait(engine, c, 0, targets, 0, 0, NULL, 0, NULL));
    FAILS(FAB_E_INVALID, fab_counter_value(engine, c, N));
    targets[0] = UINT64_MAX / FAB_PIECE_UNIT + 1;
    FAILS(FAB_E_INVALID, fab_counter_wait(engine, c, 0, targets, 1, 0, NULL, 0, NULL));
    OK(fab_counter_close(engine, c));
    FAILS(FAB_E_INVALID, fab_counter_open(engine, -1, 0));
    FAILS(FAB_E_INVALID, fab_counter_open(engine, -1, FAB_MAX_COUNTERS + 1));
    FAILS(FAB_E_INVALID, fab_counter_open(engine, 5, 2));
    FAILS(FAB_E_INVALID, fab_counter_open(engine, -2, 1));
    FAILS(FAB_E_INVALID, fab_counter_open(engine, (int64_t)FAB_USER_ID_MAX + 1, 1));
}

static void test_early(void)
{
    arrive(sender, imm_of(1, 77), 3);
    arrive(sender, imm_of(2, 77), 2);
    int64_t c = OK(fab_counter_open(engine, 77, 1)), again = OK(fab_counter_open(engine, 77, 1));
    SAME(OK(fab_counter_id(engine, c)), 77);
    SAME(value_of(c), 4);
    SAME(value_of(again), 4);
    OK(fab_counter_close(engine, c));
    arrive(sender, imm_of(1, 77), 1);
    SAME(value_of(again), 5);
    OK(fab_counter_close(engine, again));
    c = OK(fab_counter_open(engine, 77, 1)); /* released: a new one */
    SAME(value_of(c), 0);
    OK(fab_counter_close(engine, c));
    SAME(sender->early_ids, 0);
    make_void(sender, 78); /* void before anybody asked */
    uint64_t one = 1;
    c = OK(fab_counter_open(engine, 78, 1));
    FAILS(FAB_E_VOID, fab_counter_wait(engine, c, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL));
    OK(fab_counter_close(engine, c));
}

static void check_void(int64_t id, bool is_void)
{
    uint64_t one = 1;
    int64_t c = OK(fab_counter_open(engine, id, 1));
    if (is_void)
        FAILS(FAB_E_VOID, fab_counter_wait(engine, c, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL));
    else
        OK(fab_counter_wait(engine, c, 0, &one, 1, 0, NULL, 0, NULL));
    OK(fab_counter_close(engine, c));
}

static void check_uncounted(int64_t id)
{
    uint64_t one = 1;
    int64_t c = OK(fab_counter_open(engine, id, 1));
    FAILS(FAB_E_TIMEOUT, fab_counter_wait(engine, c, 0, &one, 1, 0, NULL, 0, NULL));
    OK(fab_counter_close(engine, c));
}

static void test_generations_of_blocks(void)
{
    uint32_t count = 3000, first = 30000;
    for (uint32_t g = 2047; g <= 2048; g++) {
        fab_lock(engine);
        engine->cell_cursor = first;
        for (uint32_t i = 0; i < count; i++)
            engine->cells[first + i].id = i % g;
        fab_unlock(engine);
        if (g == 2048) {
            FAILS(FAB_E_FULL, fab_counter_open(engine, -1, count));
            continue;
        }
        int64_t c = OK(fab_counter_open(engine, -1, count));
        SAME(OK(fab_counter_id(engine, c)), FAB_ID_ENGINE_BIT | 2047 << 16 | first);
        OK(fab_counter_close(engine, c));
    }
}

/* One id, opened after two peers counted under it; the one that is charged for it goes. */
static void test_shared_early(void)
{
    struct fab_peer *gone = make_peer("gone");
    arrive(gone, imm_of(1, 4711), 1);
    arrive(gone, imm_of(1, 4712), 1);
    arrive(stranger, imm_of(1, 4711), 2);
    fab_lock(engine);
    fab_counters_forget_peer(engine, gone);
    fab_unlock(engine);
    int64_t c = OK(fab_counter_open(engine, 4711, 1)), d = OK(fab_counter_open(engine, 4712, 1));
    SAME(value_of(c), 3);
    SAME(value_of(d), 0);
    SAME(gone->early_ids, 0);
    OK(fab_counter_close(engine, c));
    OK(fab_counter_close(engine, d));
}

/* The table of user ids is full of what this side opened: no fault of the peer's. */
static void test_full_table(void)
{
    static int64_t open[FAB_MAX_USER_IDS];
    struct fab_peer *innocent = make_peer("innocent");
    uint64_t before = check_stats(engine).imm_overflow;
    uint32_t n = 0;
    arrive(innocent, imm_of(1, 2000000), 1);
    for (int64_t c; (c = fab_counter_open(engine, 1000000 + n, 1)) > 0;)
        open[n++] = c;
    SAME(fab_error_code(), FAB_E_FULL);
    arrive(innocent, imm_of(1, 3000000), 1);
    SAME(check_stats(engine).imm_overflow, before + 1);
    while (n)
        OK(fab_counter_close(engine, open[--n]));
    check_void(3000000, true); /* its count is lost */
    check_uncounted(3000001); /* all else is as it was */
    check_void(2000000, false);
    arrive(innocent, imm_of(1, 3000002), 1);
    check_void(3000002, false);
    fab_lock(engine);
    fab_counters_end_session(engine, innocent);
    fab_unlock(engine);
    check_uncounted(3000000);
}

/* A peer that comes and goes does not push others out of the table of those that are barred. */
static void test_bars(void)
{
    struct fab_peer *stays = make_peer("stays"), *moves = make_peer("moves");
    fab_lock(engine);
    fab_bar(engine, stays);
    for (uint32_t i = 0; i < FAB_BARRED + 10; i++) {
        fab_bar(engine, moves);
        SAME(engine->barred_count, 2);
        fab_unbar(engine, moves);
    }
    CHECK(fab_barred(engine, stays->id) && !fab_barred(engine, moves->id), "a bar was forgotten");
    fab_unbar(engine, stays);
    SAME(engine->barred_count, 0);
    fab_unlock(engine);
}

static void test_overflow(void)
{
    struct fab_peer *flooder = make_peer("flooder");
    int64_t held = OK(fab_counter_open(engine, 5, 1)), own = OK(fab_counter_open(engine, -1, 1));
    arrive(stranger, imm_of(1, 900000), 1);
    arrive(flooder, imm_of(1, 900001), 1);
    check_void(900001, false); /* opened in time */
    for (uint32_t i = 0; i < FAB_MAX_EARLY_IDS; i++)
        arrive(flooder, imm_of(1, 1000 + i), 1);
    SAME(check_stats(engine).imm_overflow, 0);
    SAME(flooder->early_ids, FAB_MAX_EARLY_IDS);
    arrive(flooder, imm_of(1, 500000), 2);
    SAME(check_stats(engine).imm_overflow, 2);
    check_void(1000, true);
    check_void(1000 + FAB_MAX_EARLY_IDS - 1, true);
    check_void(500000, true); /* one whose count was dropped */
    check_void(600000, true); /* and one that may have been */
    check_void(900000, false); /* another peer's, from before */
    arrive(flooder, imm_of(1, 5), 1); /* those that were open go on */
    arrive(flooder, imm_of(1, OK(fab_counter_id(engine, own))), 1);
    check_count(engine, held, 1);
    check_count(engine, own, 1);
    OK(fab_counter_close(engine, held));
    OK(fab_counter_close(engine, own));
    arrive(stranger, imm_of(1, 500000), 1);
    check_void(500000, true); /* counted by another as well, after the first count was dropped */
    fab_lock(engine);
    fab_counters_end_session(engine, flooder);
    fab_unlock(engine);
    SAME(flooder->early_ids, 0);
    arrive(flooder, imm_of(1, 700000), 1);
    check_void(700000, false);
}

static void test_void(void)
{
    fab_event event;
    uint64_t zero = 0, one = 1;
    int64_t c = OK(fab_counter_open(engine, -1, 2)), id = OK(fab_counter_id(engine, c));
    int64_t queue = OK(fab_queue_open(engine));
    CHECK(OK(fab_watch_counter(engine, queue, c, 0, 3, NULL, 0, 42)) > 0, "it holds already");
    arrive(sender, imm_of(1, id), 1);
    make_void(sender, (uint32_t)id);
    FAILS(FAB_E_VOID, fab_counter_wait(engine, c, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL));
    FAILS(FAB_E_VOID, fab_counter_wait(engine, c, 0, &zero, 1, LONG_ENOUGH, NULL, 0, NULL));
    OK(fab_counter_wait(engine, c, 1, &zero, 1, 0, NULL, 0, NULL)); /* its neighbour is not */
    SAME(OK(fab_queue_drain(engine, queue, &event, 1)), 1);
    CHECK(event.tag == 42 && event.code == FAB_E_VOID, "event %d", event.code);
    FAILS(FAB_E_VOID, fab_watch_counter(engine, queue, c, 0, 3, NULL, 0, 43));
    SAME(value_of(c), 1);
    OK(fab_counter_close(engine, c));
    OK(fab_queue_close(engine, queue));
}

static void test_watches(void)
{
    fab_event events[4];
    int64_t queue = OK(fab_queue_open(engine));
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    SAME(OK(fab_watch_counter(engine, queue, c, 0, 0, NULL, 0, 1)), 0);
    int64_t taken = OK(fab_watch_counter(engine, queue, c, 0, 1, NULL, 0, 2));
    OK(fab_watch_counter(engine, queue, c, 0, 2, NULL, 0, 3));
    OK(fab_watch_counter(engine, queue, c, 0, 3, NULL, 0, 4));
    OK(fab_unwatch(engine, taken));
    OK(fab_unwatch(engine, taken));
    arrive(sender, imm_of(1, id), 1);
    FAILS(FAB_E_TIMEOUT, fab_queue_wait(engine, queue, 0));
    arrive(sender, imm_of(1, id), 1);
    OK(fab_queue_wait(engine, queue, 0));
    SAME(OK(fab_queue_drain(engine, queue, events, 4)), 1);
    CHECK(events[0].tag == 3 && !events[0].code, "tag %llu", (unsigned long long)events[0].tag);
    FAILS(FAB_E_TIMEOUT, fab_queue_wait(engine, queue, 0));
    OK(fab_counter_close(engine, c));
    SAME(OK(fab_queue_drain(engine, queue, events, 4)), 1);
    CHECK(events[0].tag == 4 && events[0].code == FAB_E_CLOSED, "code %d", events[0].code);
    SAME(check_stats(engine).watches, 0);
    OK(fab_queue_close(engine, queue));
    FAILS(FAB_E_INVALID, fab_queue_drain(engine, queue, events, 4));
}

static void *wait_for_one(void *arg)
{
    uint64_t one = 1;
    int64_t *result = arg;
    *result = fab_counter_wait(engine, *result, 0, &one, 1, LONG_ENOUGH, NULL, 0, NULL);
    return NULL;
}

/* Starts a thread that waits for counter `*result`; returns when it is about to fall asleep. */
static pthread_t begin_wait(int64_t *result)
{
    pthread_t thread;
    int64_t end = check_now() + LONG_ENOUGH;
    CHECK(!pthread_create(&thread, NULL, wait_for_one, result), "no thread");
    while (!atomic_load(&engine->sleepers))
        CHECK(check_now() < end, "it does not fall asleep");
    check_sleep(20 * MSEC);
    return thread;
}

static void test_wakeups(void)
{
    int64_t c = OK(fab_counter_open(engine, -1, 1)), id = OK(fab_counter_id(engine, c));
    int64_t result = c;
    pthread_t thread = begin_wait(&result);
    arrive(sender, imm_of(1, id), 1);
    pthread_join(thread, NULL);
    SAME(result, 0);
    OK(fab_counter_close(engine, c));
    c = result = OK(fab_counter_open(engine, -1, 1));
    thread = begin_wait(&result);
    make_void(sender, (uint32_t)OK(fab_counter_id(engine, c)));
    pthread_join(thread, NULL);
    SAME(result, FAB_E_VOID);
    OK(fab_counter_close(engine, c));
    c = result = OK(fab_counter_open(engine, -1, 1));
    thread = begin_wait(&result);
    OK(fab_counter_close(engine, c));
    pthread_join(thread, NULL);
    SAME(result, FAB_E_CLOSED);
    c = result = OK(fab_counter_open(engine, 9, 1));
    thread = begin_wait(&result);
    OK(fab_engine_close(engine, SECOND));
    pthread_join(thread, NULL);
    SAME(result, FAB_E_CLOSED);
    FAILS(FAB_E_CLOSED, fab_counter_open(engine, -1, 1));
    FAILS(FAB_E_CLOSED, fab_counter_value(engine, c, 0));
}

static void test_counters(void)
{
    fab_engine_config config = check_config("local", NULL, 0);
    engine = check_open(&config);
    sender = make_peer("sender");
    stranger = make_peer("stranger");
    test_pieces();
    test_shuffled_pieces();
    test_halves();
    test_stale();
    test_generations();
    test_blocks();
    test_early();
    test_generations_of_blocks();
    test_shared_early();
    test_bars();
    test_overflow();
    test_full_table();
    test_void();
    test_watches();
    SAME(check_stats(engine).counters, 0);
    test_wakeups();
    fab_engine_free(engine);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"shard bytes", test_shard_bytes},
                 {"shard items", test_shard_items},
                 {"shard weights", test_shard_weights},
                 {"buckets", test_buckets},
                 {"sha256", test_sha256},
                 {"hmac", test_hmac},
                 {"frames", test_frames},
                 {"bad headers", test_bad_headers},
                 {"hello", test_hello},
                 {"texts print", test_texts_print},
                 {"hello fuzz", test_hello_fuzz},
                 {"reader fuzz", test_reader_fuzz},
                 {"writer bound", test_writer_bound},
                 {"slots", test_slots},
                 {"slots, threads", test_slots_threads},
                 {"counters", test_counters}};
    check_begin(argc, argv);
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int64_t start = check_now();
        tests[i].run();
        printf("%-16s %lld ms\n", tests[i].name, (long long)((check_now() - start) / MSEC));
    }
    return 0;
}
