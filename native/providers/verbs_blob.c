/* Addresses of verbs NICs and lanes on the wire; ARCHITECTURE.md has the fields. Little-endian, but
 * for the GID, which is network order by nature. */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "providers/verbs.h"

enum { BLOB_VERSION = 1 };

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    value = htole32(value);
    memcpy(at, &value, sizeof(value));
    return at + sizeof(value);
}

static const uint8_t *get32(const uint8_t *at, uint32_t *value)
{
    memcpy(value, at, sizeof(*value));
    *value = le32toh(*value);
    return at + sizeof(*value);
}

void verbs_blob_write(const struct verbs_blob *blob, uint8_t out[VERBS_BLOB])
{
    uint16_t lid = htole16(blob->lid);
    uint64_t token = htole64(blob->token);
    uint8_t *at = out + 24;

    memset(out, 0, VERBS_BLOB);
    out[0] = BLOB_VERSION;
    out[1] = blob->link;
    out[2] = blob->mtu;
    memcpy(out + 4, &lid, sizeof(lid));
    memcpy(out + 8, blob->gid.raw, sizeof(blob->gid.raw));
    at = put32(at, blob->ud_qpn);
    at = put32(at, blob->ud_qkey);
    memcpy(at, &token, sizeof(token));
    at = put32(at + sizeof(token), blob->write_qpn);
    at = put32(at, blob->write_psn);
    at = put32(at, blob->frame_qpn);
    (void)put32(at, blob->frame_psn);
}

int verbs_blob_read(const struct verbs_nic *nic, const uint8_t *bytes, uint32_t length,
                    struct verbs_blob *out)
{
    const uint8_t *at = bytes + 24;

    if (length != VERBS_BLOB || bytes[0] != BLOB_VERSION) {
        fab_fail_text("verbs %s: the peer's address has %u bytes, version %u; %d, version %d were "
                      "expected",
                      nic->base.info.name, length, length ? bytes[0] : 0, VERBS_BLOB, BLOB_VERSION);
        return -EINVAL;
    }
    out->link = bytes[1];
    out->mtu = bytes[2];
    memcpy(&out->lid, bytes + 4, sizeof(out->lid));
    out->lid = le16toh(out->lid);
    memcpy(out->gid.raw, bytes + 8, sizeof(out->gid.raw));
    at = get32(at, &out->ud_qpn);
    at = get32(at, &out->ud_qkey);
    memcpy(&out->token, at, sizeof(out->token));
    out->token = le64toh(out->token);
    at = get32(at + sizeof(out->token), &out->write_qpn);
    at = get32(at, &out->write_psn);
    at = get32(at, &out->frame_qpn);
    (void)get32(at, &out->frame_psn);
    if (out->link != nic->link_layer) {
        fab_fail_text("verbs %s: the peer's port is %s, ours %s: they cannot reach each other",
                      nic->base.info.name,
                      out->link == IBV_LINK_LAYER_ETHERNET ? "RoCE" : "no RoCE",
                      nic->base.info.provider);
        return -EHOSTUNREACH;
    }
    if (out->mtu < IBV_MTU_256 || out->mtu > IBV_MTU_4096) {
        fab_fail_text("verbs %s: the peer's MTU code is %u", nic->base.info.name, out->mtu);
        return -EINVAL;
    }
    return 0;
}

struct verbs_blob verbs_blob_of_nic(const struct verbs_nic *nic)
{
    return (struct verbs_blob){
        .link = nic->link_layer,
        .mtu = (uint8_t)nic->port_attr.active_mtu,
        .lid = nic->port_attr.lid,
        .gid = nic->gid,
        .ud_qpn = nic->ud->qp_num,
        .ud_qkey = nic->qkey,
    };
}
