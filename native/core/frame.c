/* Control frames to and from bytes; the contract is in frame.h. */
#include "frame.h"

#include <errno.h>
#include <string.h>

#include "sha256.h"

_Static_assert(FAB_MAC_BYTES == FAB_MAC_BYTES_MAX, "frame.h repeats the size of a mac");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian");

void fab_put(struct fab_writer *w, const void *bytes, size_t length)
{
    if (length > sizeof w->bytes - w->used)
        length = sizeof w->bytes - w->used; /* callers' own limits make this impossible */
    memcpy(w->bytes + w->used, bytes, length);
    w->used += (uint32_t)length;
}

void fab_put_u16(struct fab_writer *w, uint16_t v)
{
    fab_put(w, &v, sizeof v);
}

void fab_put_u32(struct fab_writer *w, uint32_t v)
{
    fab_put(w, &v, sizeof v);
}

void fab_put_u64(struct fab_writer *w, uint64_t v)
{
    fab_put(w, &v, sizeof v);
}

void fab_put_text(struct fab_writer *w, const char *text)
{
    uint16_t length = (uint16_t)strnlen(text, FAB_TEXT_MAX - 1);
    fab_put_u16(w, length);
    fab_put(w, text, length);
}

void fab_frame_begin(struct fab_writer *w, enum fab_frame_type type, uint64_t session)
{
    w->used = 0;
    uint8_t version_type[2] = {FAB_FRAME_VERSION, (uint8_t)type};
    fab_put_u16(w, FAB_FRAME_MAGIC);
    fab_put(w, version_type, sizeof version_type);
    fab_put_u32(w, 0);
    fab_put_u64(w, session);
}

void fab_frame_end(struct fab_writer *w)
{
    memcpy(w->bytes + 4, &w->used, sizeof w->used);
}

void fab_put_hello(struct fab_writer *w, struct fab_hello *h)
{
    uint32_t start = w->used;
    fab_put(w, h->from, sizeof h->from);
    fab_put(w, h->to, sizeof h->to);
    fab_put_u64(w, h->session);
    fab_put_u64(w, h->answers);
    fab_put_u64(w, h->attempt);
    fab_put_u32(w, h->kind);
    fab_put_u32(w, h->nic_count);
    fab_put_u32(w, h->lane_count);
    fab_put_u32(w, h->fragments);
    fab_put_u32(w, h->contact);
    fab_put_u64(w, h->peer_timeout);
    fab_put_u64(w, h->fence);
    fab_put(w, h->nonce, sizeof h->nonce);
    fab_put(w, h->cookie, sizeof h->cookie);
    fab_put(w, h->label, sizeof h->label);
    for (uint32_t i = 0; i < h->lane_count; i++) {
        fab_put_u32(w, h->lanes[i].from_nic);
        fab_put_u32(w, h->lanes[i].to_nic);
        fab_put_u32(w, h->lanes[i].blob_len);
        fab_put_u32(w, h->lanes[i].speed);
        fab_put_u64(w, h->lanes[i].doorbell.addr);
        fab_put_u64(w, h->lanes[i].doorbell.rkey);
        fab_put(w, h->lanes[i].blob, FAB_BLOB_MAX);
    }
    h->signed_bytes = w->used - start;
}

int fab_read_header(struct fab_reader *r, const uint8_t *bytes, uint32_t length,
                    struct fab_header *out)
{
    *r = (struct fab_reader){.bytes = bytes, .length = length};
    uint16_t magic = 0;
    uint8_t version = 0;
    fab_get(r, &magic, sizeof magic);
    fab_get(r, &version, sizeof version);
    fab_get(r, &out->type, sizeof out->type);
    out->length = fab_get_u32(r);
    out->session = fab_get_u64(r);
    if (r->bad || magic != FAB_FRAME_MAGIC || version != FAB_FRAME_VERSION || !out->type ||
        out->type > FAB_F_LAST || out->length != length || length > FAB_FRAME_MAX)
        return -EPROTO;
    return 0;
}

void fab_get(struct fab_reader *r, void *out, size_t length)
{
    if (r->bad || length > r->length - r->at) {
        r->bad = true;
        memset(out, 0, length);
        return;
    }
    memcpy(out, r->bytes + r->at, length);
    r->at += (uint32_t)length;
}

uint32_t fab_get_u32(struct fab_reader *r)
{
    uint32_t v;
    fab_get(r, &v, sizeof v);
    return v;
}

uint64_t fab_get_u64(struct fab_reader *r)
{
    uint64_t v;
    fab_get(r, &v, sizeof v);
    return v;
}

/* What strangers say ends up in logs and on terminals: it shall not move the cursor there, nor look like
 * a line of ours. C1 controls are two bytes in UTF-8. */
static void make_printable(char *text)
{
    for (unsigned char *at = (unsigned char *)text; *at; at++) {
        bool c1 = at[0] == 0xC2 && at[1] >= 0x80 && at[1] < 0xA0;
        if (*at < ' ' || *at == 0x7F || c1)
            *at = '?';
        if (c1)
            *++at = '?';
    }
}

void fab_get_text(struct fab_reader *r, char *out, size_t size)
{
    uint16_t length;
    fab_get(r, &length, sizeof length);
    if (length >= size)
        r->bad = true;
    if (r->bad)
        length = 0;
    fab_get(r, out, length);
    out[length] = 0;
    make_printable(out);
}

bool fab_read_end(const struct fab_reader *r)
{
    return !r->bad && r->at == r->length;
}

static void read_lanes(struct fab_reader *r, struct fab_hello *h)
{
    for (uint32_t i = 0; i < h->lane_count; i++) {
        h->lanes[i].from_nic = fab_get_u32(r);
        h->lanes[i].to_nic = fab_get_u32(r);
        h->lanes[i].blob_len = fab_get_u32(r);
        h->lanes[i].speed = fab_get_u32(r);
        h->lanes[i].doorbell.addr = fab_get_u64(r);
        h->lanes[i].doorbell.rkey = fab_get_u64(r);
        fab_get(r, h->lanes[i].blob, FAB_BLOB_MAX);
        if (h->lanes[i].from_nic >= FAB_MAX_NICS || h->lanes[i].to_nic >= FAB_MAX_NICS ||
            h->lanes[i].blob_len > FAB_BLOB_MAX)
            r->bad = true;
    }
}

int fab_read_hello(struct fab_reader *r, struct fab_hello *h)
{
    uint32_t start = r->at;
    fab_get(r, h->from, sizeof h->from);
    fab_get(r, h->to, sizeof h->to);
    h->session = fab_get_u64(r);
    h->answers = fab_get_u64(r);
    h->attempt = fab_get_u64(r);
    h->kind = fab_get_u32(r);
    h->nic_count = fab_get_u32(r);
    h->lane_count = fab_get_u32(r);
    h->fragments = fab_get_u32(r);
    h->contact = fab_get_u32(r);
    h->peer_timeout = fab_get_u64(r);
    h->fence = fab_get_u64(r);
    fab_get(r, h->nonce, sizeof h->nonce);
    fab_get(r, h->cookie, sizeof h->cookie);
    fab_get(r, h->label, sizeof h->label);
    if (h->lane_count < 1 || h->lane_count > FAB_MAX_LANES || h->nic_count < 1 ||
        h->nic_count > FAB_MAX_NICS || h->contact >= h->lane_count ||
        h->fragments < FAB_MESSAGE_FRAMES || !h->session || h->label[sizeof h->label - 1])
        return -EPROTO;
    make_printable(h->label);
    read_lanes(r, h);
    h->signed_bytes = r->at - start;
    fab_get(r, h->mac, sizeof h->mac);
    return fab_read_end(r) ? 0 : -EPROTO;
}
