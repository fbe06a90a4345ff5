/* Control frames to and from bytes. ARCHITECTURE.md has the schemas field by field.
 *
 * Writers append to a struct fab_writer whose buffer is FAB_FRAME_MAX bytes; what is written never
 * exceeds it. Readers take a struct fab_reader; after an attempt to read past the end `bad` is set
 * and everything read is zero, so a parser checks once, at its end.
 */
#ifndef FAB_FRAME_H
#define FAB_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fabric.h"
#include "providers/provider.h"

#define FAB_FRAME_MAGIC 0xFAB1
#define FAB_FRAME_VERSION 1
#define FAB_FRAME_HEADER 16
#define FAB_FRAGMENT_MAX 4096
#define FAB_MAC_BYTES_MAX 32

enum fab_frame_type {
    FAB_F_HELLO = 1,
    FAB_F_CHALLENGE,
    FAB_F_WELCOME,
    FAB_F_READY,
    FAB_F_REFUSE,
    FAB_F_BYE,
    FAB_F_PING,
    FAB_F_PONG,
    FAB_F_MESSAGE,
    FAB_F_ACK,
    FAB_F_VOID,
    FAB_F_VOIDED,
    FAB_F_GRANT_REQ,
    FAB_F_GRANT,
    FAB_F_QUIESCE,
    FAB_F_QUIESCED,
    FAB_F_LANE_DOWN,
    FAB_F_LANE_OPEN,
    FAB_F_LANE_OPENED,
    FAB_F_LANE_READY,
    FAB_F_LANE_WANTED,
    FAB_F_LANE_PROBE,
    FAB_F_LAST = FAB_F_LANE_PROBE,
};

struct fab_header {
    uint8_t type;
    uint32_t length;
    uint64_t session;
};

struct fab_hello {
    uint8_t from[FAB_ENGINE_ID_BYTES], to[FAB_ENGINE_ID_BYTES];
    uint64_t session, answers;
    uint64_t attempt; /* HELLO: the sender's number of it; WELCOME: of its last one, to anybody */
    uint32_t kind, nic_count, lane_count, fragments;
    uint32_t contact; /* the lane that this frame is sent over */
    uint64_t peer_timeout;
    uint64_t
        fence; /* the sender's of the receiver: another number each time that it disconnects it */
    uint8_t nonce[16], cookie[16];
    char label[FAB_NAME_MAX];
    struct {
        uint32_t from_nic, to_nic, blob_len;
        uint32_t speed;   /* of the sender's NIC, Mbit/s; 0: unknown */
        fab_key doorbell; /* of the sender's NIC */
        uint8_t blob[FAB_BLOB_MAX];
    } lanes[FAB_MAX_LANES];
    uint8_t mac[FAB_MAC_BYTES_MAX];
    uint32_t signed_bytes; /* of the body, mac excluded: what the mac is over */
};

struct fab_writer {
    uint8_t bytes[FAB_FRAME_MAX];
    uint32_t used;
};

struct fab_reader {
    const uint8_t *bytes;
    uint32_t length, at;
    bool bad;
};

void fab_frame_begin(struct fab_writer *w, enum fab_frame_type type, uint64_t session);
void fab_put(struct fab_writer *w, const void *bytes, size_t length);
void fab_put_u16(struct fab_writer *w, uint16_t v);
void fab_put_u32(struct fab_writer *w, uint32_t v);
void fab_put_u64(struct fab_writer *w, uint64_t v);
void fab_put_text(struct fab_writer *w, const char *text); /* u16 length and bytes */
/* Sets the length in the header; the frame is bytes[0..used). */
void fab_frame_end(struct fab_writer *w);
void fab_put_hello(struct fab_writer *w, struct fab_hello *hello);

/* 0, or -EPROTO. On success the reader stands at the body. */
int fab_read_header(struct fab_reader *r, const uint8_t *bytes, uint32_t length,
                    struct fab_header *out);
void fab_get(struct fab_reader *r, void *out, size_t length);
uint32_t fab_get_u32(struct fab_reader *r);
uint64_t fab_get_u64(struct fab_reader *r);
/* Always zero-terminated; what does not print is a question mark. */
void fab_get_text(struct fab_reader *r, char *out, size_t size);
bool fab_read_end(const struct fab_reader *r);                   /* all read, nothing missing */
int fab_read_hello(struct fab_reader *r, struct fab_hello *out); /* 0, or -EPROTO */

#endif
