/* HELLO and WELCOME that are right in every field, cookie and mac included, but for what an input
 * changes.
 */
#ifndef GREETING_H
#define GREETING_H

#include "core/sha256.h"
#include "fuzz.h"

#define FUZZ_SECRET "a shared secret"
#define FUZZ_TYPE_AT 3 /* of a frame's head (ARCHITECTURE.md, "Control frames") */

/* What `to` would have sent with CHALLENGE (handshake.c, make_cookie). */
static inline void fuzz_cookie(const fab_engine *to, const struct fab_hello *h, uint8_t out[16])
{
    uint8_t text[FAB_ENGINE_ID_BYTES + sizeof h->nonce + sizeof(int64_t)], mac[FAB_MAC_BYTES];
    int64_t epoch = fab_now() / (10 * FUZZ_SECOND);
    memcpy(text, h->from, sizeof h->from);
    memcpy(text + sizeof h->from, h->nonce, sizeof h->nonce);
    memcpy(text + sizeof h->from + sizeof h->nonce, &epoch, sizeof epoch);
    fab_hmac(to->cookie_key, sizeof to->cookie_key, "fabric cookie 1", text, sizeof text, mac);
    memcpy(out, mac, 16);
}

static inline void fuzz_fill_lanes(struct fuzz_input *in, const fab_engine *from,
                                   struct fab_hello *h)
{
    for (uint32_t i = 0; i < h->lane_count; i++) {
        uint8_t how = fuzz_u8(in);
        uint32_t nic = i % from->nic_count;
        h->lanes[i].from_nic = how & 1 ? fuzz_u8(in) % 36 : nic;
        h->lanes[i].to_nic = how & 2 ? fuzz_u8(in) % 3 : nic;
        h->lanes[i].blob_len = how & 4 ? fuzz_u8(in) : from->nics[nic]->info.blob_len;
        h->lanes[i].speed = how & 8 ? fuzz_u32(in) : 1000;
        memcpy(h->lanes[i].blob, from->nics[nic]->info.blob, FAB_BLOB_MAX);
        h->lanes[i].blob[4] = fuzz_u8(in); /* the simulated lane's number */
        if (how & 16)
            fuzz_eat(in, h->lanes[i].blob, 12);
    }
}

/* From one engine to the other; a WELCOME `answers` that session. True: what was sent is not what was
 * signed. */
static inline bool fuzz_greet(struct fuzz_input *in, fab_engine *from, const fab_engine *to,
                              enum fab_frame_type type, uint64_t answers, struct fab_writer *w)
{
    bool welcome = type == FAB_F_WELCOME;
    uint8_t how = fuzz_u8(in);
    struct fab_hello h = {.session = how & 1 ? fuzz_u8(in) : 7,
                          .answers = how & 2 ? fuzz_u64(in) : answers,
                          .attempt = welcome ? from->attempts : ++from->attempts,
                          .kind = how & 4 ? fuzz_u8(in) : FAB_KIND_SIM,
                          .nic_count = how & 8 ? fuzz_u8(in) : 2,
                          .lane_count = how & 16 ? fuzz_u8(in) % (FAB_MAX_LANES + 1) : 2,
                          .fragments = how & 32 ? fuzz_u8(in) : FAB_MESSAGE_FRAMES,
                          .contact = how & 64 ? fuzz_u8(in) : 0,
                          .peer_timeout = FUZZ_SECOND,
                          .fence = 1};
    memcpy(h.from, from->id, sizeof h.from);
    memcpy(h.to, to->id, sizeof h.to);
    if (how & 128) {
        h.from[0] ^= fuzz_u8(in) & 3;
        h.peer_timeout = fuzz_u64(in);
        h.fence = fuzz_u64(in);
        h.attempt -= fuzz_u8(in);
        fuzz_eat(in, h.label, sizeof h.label);
    }
    fuzz_fill_lanes(in, from, &h);
    if (!welcome)
        fuzz_cookie(to, &h, h.cookie);
    fab_frame_begin(w, type, welcome ? answers : 0);
    fab_put_hello(w, &h);
    if (to->config.secret_len)
        fab_hmac(to->secret, to->config.secret_len, welcome ? "fabric welcome 1" : "fabric hello 1",
                 w->bytes + FAB_FRAME_HEADER, h.signed_bytes, h.mac);
    fab_put(w, h.mac, sizeof h.mac);
    fab_frame_end(w);
    if (!(fuzz_u8(in) & 1))
        return false;
    uint32_t at = fuzz_u16(in) % w->used;
    w->bytes[at] ^= (uint8_t)(1 + fuzz_u8(in) % 255);
    /* Nobody looks at the session in the head of a HELLO; and another type is no forged WELCOME, but
     * another frame. */
    return at >= FAB_FRAME_HEADER || (welcome && at != FUZZ_TYPE_AT);
}

#endif
