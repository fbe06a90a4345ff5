/* Which verbs NICs there are, and what is to be known of one before it is used. */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/verbs.h"

enum { PKEY_FULL = 0x8000, PKEY_MASK = 0x7fff, GIDS_MAX = 256 }; /* an index has 8 bits */

int verbs_fail(const struct verbs_nic *nic, const char *what, int error)
{
    const char *name = *nic->base.info.name ? nic->base.info.name : nic->device_name;

    fab_fail_text("verbs %s: %s failed: %s", name, what, strerror(error));
    return error > 0 ? -error : -EIO;
}

/* ---- the environment ---- */

static int read_number(const char *name, long most, int *out)
{
    const char *text = getenv(name);
    char *end;

    if (!text || !*text)
        return 0;
    long value = strtol(text, &end, 0);
    if (*end || value < 0 || value > most) {
        fab_fail_text("%s is '%.40s': a number from 0 to %ld is needed", name, text, most);
        return -EINVAL;
    }
    *out = (int)value;
    return 0;
}

int verbs_options_read(struct verbs_options *out)
{
    const char *family = getenv("FABRIC_VERBS_GID_FAMILY");
    int traffic_class = 0, service_level = 0;

    *out = (struct verbs_options){.gid_index = -1, .pkey = -1, .ack_timeout = -1};
    out->ipv6 = family && strcmp(family, "ipv6") == 0;
    if (family && *family && !out->ipv6 && strcmp(family, "ipv4") != 0) {
        fab_fail_text("FABRIC_VERBS_GID_FAMILY is '%.40s': ipv4 or ipv6 is needed", family);
        return -EINVAL;
    }
    int rc = read_number("FABRIC_VERBS_GID_INDEX", 255, &out->gid_index);
    if (rc == 0)
        rc = read_number("FABRIC_VERBS_PKEY", 0xffff, &out->pkey);
    if (rc == 0)
        rc = read_number("FABRIC_VERBS_TIMEOUT", 31, &out->ack_timeout);
    if (rc == 0 && out->ack_timeout == 0) {
        fab_fail_text("FABRIC_VERBS_TIMEOUT is 0, which waits for ever: 1 to 31 are possible");
        rc = -EINVAL;
    }
    if (rc == 0)
        rc = read_number("FABRIC_VERBS_TRAFFIC_CLASS", 255, &traffic_class);
    if (rc == 0)
        rc = read_number("FABRIC_VERBS_SERVICE_LEVEL", 15, &service_level);
    out->traffic_class = (uint8_t)traffic_class;
    out->service_level = (uint8_t)service_level;
    return rc;
}

uint8_t verbs_ack_timeout(int64_t peer_timeout_ns)
{
    uint64_t most = (uint64_t)peer_timeout_ns / 4 / (VERBS_RETRIES + 1);
    uint8_t t = 8; /* a millisecond: less is noise, on any network */

    while (t < 31 && (uint64_t)VERBS_ACK_UNIT_NS << (t + 1) <= most)
        t++;
    return t;
}

uint32_t verbs_mtu_bytes(enum ibv_mtu mtu)
{
    return mtu >= IBV_MTU_256 && mtu <= IBV_MTU_4096 ? 128u << mtu : 256;
}

/* ---- GID ---- */

static bool gid_usable(const union ibv_gid *gid)
{
    static const uint8_t link_local[8] = {0xfe, 0x80};
    static const union ibv_gid unset;

    return memcmp(gid, &unset, sizeof(unset)) != 0 && memcmp(gid->raw, link_local, 8) != 0;
}

static bool gid_is_ipv4(const union ibv_gid *gid)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

    return memcmp(gid->raw, mapped, sizeof(mapped)) == 0;
}

/* As NCCL chooses on RoCE (its connect.cc): unset and link-local ones are skipped; the family asked
 * for is preferred, then RoCE v2, then the smaller index. */
int verbs_gid_choose(const struct ibv_gid_entry *table, int count, bool ipv6)
{
    int best = -1, best_rank = -1;

    for (int i = 0; i < count; i++) {
        if (!gid_usable(&table[i].gid))
            continue;
        int rank = (gid_is_ipv4(&table[i].gid) != ipv6 ? 2 : 0) +
                   (table[i].gid_type == IBV_GID_TYPE_ROCE_V2 ? 1 : 0);
        if (rank > best_rank) {
            best = (int)table[i].gid_index;
            best_rank = rank;
        }
    }
    return best;
}

/* Entries that cannot be read (in a container: another's) are left out. */
static int read_gids(const struct verbs_nic *nic, struct ibv_gid_entry *table)
{
    int count = 0;

    for (int i = 0; i < nic->port_attr.gid_tbl_len && i < GIDS_MAX; i++)
        if (nic->lib->query_gid_ex(nic->context, nic->port, (uint32_t)i, &table[count], 0,
                                   sizeof(*table)) == 0)
            count++;
    return count;
}

static int choose_index(const struct verbs_nic *nic, const struct ibv_gid_entry *table, int count)
{
    if (nic->options.gid_index >= 0)
        return nic->options.gid_index;
    if (nic->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET)
        return verbs_gid_choose(table, count, nic->options.ipv6);
    return 0; /* InfiniBand: the port's own */
}

static int read_gid(struct verbs_nic *nic)
{
    struct ibv_gid_entry *table = calloc(GIDS_MAX, sizeof(*table));

    if (!table)
        return -ENOMEM;
    int count = read_gids(nic, table);
    int index = choose_index(nic, table, count);
    for (int i = 0; i < count; i++)
        if ((int)table[i].gid_index == index) {
            nic->gid = table[i].gid;
            nic->gid_index = index;
            free(table);
            return 0;
        }
    free(table);
    if (index >= 0)
        fab_fail_text("verbs %s: the port has no GID %d (%d are set; FABRIC_VERBS_GID_INDEX "
                      "chooses one)",
                      nic->device_name, index, count);
    else
        fab_fail_text("verbs %s: no usable GID among %d: give its network interface an address",
                      nic->device_name, count);
    return -EADDRNOTAVAIL;
}

/* ---- P_Key ---- */

static int read_pkey(struct verbs_nic *nic)
{
    int wanted = nic->options.pkey, found = -1;

    for (int i = 0; i < nic->port_attr.pkey_tbl_len; i++) {
        __be16 raw;
        if (nic->lib->query_pkey(nic->context, nic->port, i, &raw))
            continue;
        int key = be16toh(raw);
        bool fits = wanted < 0 || (key & PKEY_MASK) == (wanted & PKEY_MASK);
        if (!(key & PKEY_MASK) || !fits)
            continue;
        if (found < 0 || key & PKEY_FULL)
            found = i;
        if (key & PKEY_FULL)
            break; /* a full member can talk to everybody in the partition */
    }
    if (found < 0) {
        fab_fail_text("verbs %s: the port is in no partition with P_Key %#x (FABRIC_VERBS_PKEY)",
                      nic->device_name, wanted < 0 ? 0xffffu : (unsigned)wanted);
        return -ENOENT;
    }
    nic->pkey_index = (uint16_t)found;
    return 0;
}

/* ---- port ---- */

/* The kernel multiplies lanes and their speed for us: "400 Gb/sec (4X NDR)". */
static uint64_t read_speed(const char *device, uint8_t port)
{
    char path[128], text[64] = "";
    double gigabits = 0;

    (void)snprintf(path, sizeof(path), "/sys/class/infiniband/%.64s/ports/%u/rate", device, port);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    if (fgets(text, sizeof(text), file))
        gigabits = strtod(text, NULL);
    (void)fclose(file);
    return gigabits > 0 ? (uint64_t)(gigabits * 1e9) : 0;
}

static bool is_called(const char *name, uint8_t port, const char *wanted)
{
    char label[FAB_NAME_MAX];

    (void)snprintf(label, sizeof(label), "%.50s:%u", name, port);
    return strcmp(label, wanted) == 0 || (port == 1 && strcmp(name, wanted) == 0);
}

static void describe(const struct verbs_nic *nic, fab_nic_info *out)
{
    memset(out, 0, sizeof(*out));
    out->kind = FAB_KIND_VERBS;
    (void)snprintf(out->provider, sizeof(out->provider), "verbs (%s)",
                   nic->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET ? "RoCE" : "InfiniBand");
    if (nic->device.phys_port_cnt > 1)
        (void)snprintf(out->name, sizeof(out->name), "%.50s:%u", nic->device_name, nic->port);
    else
        (void)snprintf(out->name, sizeof(out->name), "%s", nic->device_name);
    uint64_t most = nic->port_attr.max_msg_sz;
    out->max_write = most && most < VERBS_MAX_WRITE ? most : VERBS_MAX_WRITE;
    out->speed_bps = read_speed(nic->device_name, nic->port);
    out->ordered = 1;
    out->up = nic->port_attr.state == IBV_PORT_ACTIVE;
}

int verbs_port_read(struct verbs_nic *nic)
{
    memset(&nic->port_attr, 0, sizeof(nic->port_attr)); /* the call fills a prefix of it */
    int rc = nic->lib->query_port(nic->context, nic->port, &nic->port_attr);

    if (rc)
        return verbs_fail(nic, "asking for the port's state", rc);
    fab_nic_info now, *info = &nic->base.info;
    describe(nic, &now);
    now.blob_len = info->blob_len; /* where it is reached does not change */
    memcpy(now.blob, info->blob, sizeof(now.blob));
    now.doorbell = info->doorbell;
    *info = now;
    return 0;
}

/* ---- devices ---- */

static bool usable(const struct verbs_nic *nic)
{
    return nic->device.max_srq > 0 && nic->device.max_qp > 0;
}

/* One port of one device; the context stays open when this returns 0. */
static int open_port(struct verbs_nic *nic, struct ibv_device *device, uint8_t port)
{
    (void)snprintf(nic->device_name, sizeof(nic->device_name), "%.50s",
                   nic->lib->get_device_name(device));
    nic->port = port;
    errno = 0;
    nic->context = nic->lib->open_device(device);
    if (!nic->context)
        return verbs_fail(nic, "opening the device", errno ? errno : ENODEV);
    int rc = nic->lib->query_device(nic->context, &nic->device);
    if (rc)
        rc = verbs_fail(nic, "asking for the device's limits", rc);
    if (rc == 0 && port > nic->device.phys_port_cnt)
        rc = -ENODEV;
    if (rc == 0)
        rc = verbs_port_read(nic);
    nic->link_layer = nic->port_attr.link_layer;
    if (rc == 0 && !usable(nic)) {
        fab_fail_text("verbs %s: the device has no shared receive queues", nic->device_name);
        rc = -EOPNOTSUPP;
    }
    if (rc) {
        (void)nic->lib->close_device(nic->context);
        nic->context = NULL;
    }
    return rc;
}

static void close_port(struct verbs_nic *nic)
{
    (void)nic->lib->close_device(nic->context);
    nic->context = NULL;
}

/* Calls visit() with every port opened; stops, leaving it open, when that returns true. 1: stopped;
 * 0: not; a negative errno: there is nothing to look at. */
static int for_each_port(struct verbs_nic *nic, bool (*visit)(struct verbs_nic *, void *),
                         void *arg)
{
    int count = 0;
    struct ibv_device **devices = nic->lib->get_device_list(&count);
    bool stopped = false;
    int last = 0;

    if (!devices || count == 0) {
        fab_fail_text("this machine has no RDMA device (libibverbs lists none)");
        last = -ENODEV;
    }
    for (int i = 0; devices && i < count && !stopped; i++)
        for (uint8_t port = 1; !stopped; port++) {
            int rc = open_port(nic, devices[i], port);
            if (rc) {
                last = port == 1 ? rc : last;
                break;
            }
            stopped = visit(nic, arg);
            if (!stopped)
                close_port(nic);
        }
    if (devices)
        nic->lib->free_device_list(devices);
    return stopped ? 1 : last;
}

struct listing {
    fab_nic_info *out;
    uint32_t count, max;
};

static bool list_one(struct verbs_nic *nic, void *arg)
{
    struct listing *list = arg;

    if (list->count < list->max)
        list->out[list->count++] = nic->base.info;
    return false;
}

int verbs_list(fab_nic_info *out, uint32_t max)
{
    struct verbs_nic nic = {.lib = fab_libibverbs()};
    struct listing list = {.out = out, .max = max};

    if (!nic.lib)
        return -ENOENT;
    int rc = for_each_port(&nic, list_one, &list);
    return list.count ? (int)list.count : rc < 0 ? rc : -ENODEV;
}

static bool answers(struct verbs_nic *nic, void *arg)
{
    const char *wanted = arg;

    if (wanted)
        return is_called(nic->device_name, nic->port, wanted);
    return nic->base.info.up;
}

static bool is_any(struct verbs_nic *nic, void *arg)
{
    (void)nic;
    (void)arg;
    return true;
}

int verbs_device_open(struct verbs_nic *nic, const char *name)
{
    if (!name || !*name)
        name = getenv("FABRIC_VERBS_NIC");
    if (name && !*name)
        name = NULL;
    int rc = for_each_port(nic, answers, (void *)(uintptr_t)name);
    if (rc <= 0 && !name) /* all are down: better a NIC that may come up than none */
        rc = for_each_port(nic, is_any, NULL);
    if (rc == 0)
        fab_fail_text("there is no verbs NIC called '%.60s' on this machine", name ? name : "");
    if (rc != 1)
        return rc ? rc : -ENODEV;
    rc = read_gid(nic);
    return rc ? rc : read_pkey(nic);
}
