/* Credit for immediates.
 *
 * On EFA every immediate takes a place in the receiver's completion queue, and nothing but the
 * senders' restraint keeps that from overrunning, which is fatal. So a sender has at most OFI_IMMS
 * immediates on a lane that the receiver has not read, and a NIC takes only so many lanes as its
 * queue has places for (ofi_kind.credits), beside one for each receive and each send that libfabric
 * may have posted.
 *
 * After each half of that the receiver tells how many it has read in all: a frame of 8 bytes, which
 * no frame of the core has, {u32 CREDIT, u32 count}, little-endian. Counts wrap around, and may come
 * in any order. A write that failed may have raised its immediate or not; its lane ends with it, so
 * no count is ever off.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "providers/ofi.h"

#define CREDIT 0x0c4ed17cu

uint32_t ofi_credit_left(const struct ofi_lane *lane)
{
    const struct ofi_nic *nic = (const struct ofi_nic *)lane->base.nic;
    uint32_t unread = lane->imms_sent - lane->imms_known;

    if (!nic->kind->credits)
        return UINT32_MAX;
    return unread < OFI_IMMS ? OFI_IMMS - unread : 0;
}

void ofi_credit_tell(struct ofi_lane *lane)
{
    struct ofi_nic *nic = (struct ofi_nic *)lane->base.nic;
    uint32_t body[2] = {htole32(CREDIT), htole32(lane->imms_read)};

    if (!nic->kind->credits || lane->closing || lane->imms_read - lane->imms_told < OFI_IMMS / 2)
        return;
    if (ofi_lane_send(&lane->base, (const uint8_t *)body, sizeof(body), NULL) == 0)
        lane->imms_told = lane->imms_read;
    else
        nic->credit_owed = true; /* no slot is free: ofi_poll() tries again */
}

bool ofi_credit_take(struct ofi_lane *lane, const uint8_t *bytes, uint32_t length)
{
    const struct ofi_nic *nic = (const struct ofi_nic *)lane->base.nic;
    uint32_t body[2];

    if (!nic->kind->credits || length != sizeof(body))
        return false;
    memcpy(body, bytes, sizeof(body));
    uint32_t known = le32toh(body[1]);
    bool newer = known - lane->imms_known <= lane->imms_sent - lane->imms_known;
    if (le32toh(body[0]) == CREDIT && newer)
        lane->imms_known = known;
    return true;
}

void ofi_credit_pay(struct ofi_nic *nic)
{
    nic->credit_owed = false;
    for (uint32_t i = 0; i < nic->lane_slots; i++)
        if (nic->lanes[i])
            ofi_credit_tell(nic->lanes[i]);
}

int ofi_credit_admit(const struct ofi_nic *nic)
{
    uint32_t reserved = (uint32_t)(nic->info->rx_attr->size + nic->info->tx_attr->size);
    uint32_t places = nic->data->places > reserved ? nic->data->places - reserved : 0;

    if (!nic->kind->credits || nic->lane_count < places / OFI_IMMS)
        return 0;
    fab_fail_text("%s %s: its completion queue of %u places serves %u peers, and no more",
                  nic->kind->name, nic->base.info.name, nic->data->places, places / OFI_IMMS);
    return -ENOSPC;
}
