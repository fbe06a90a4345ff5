/* Imported descriptors, and what their owners granted us.
 *
 * A grant belongs to one session: it is asked for on first use, forgotten when the session ends,
 * and taken back by the owner with QUIESCE. Functions need the progress lock unless they say
 * otherwise.
 */
#ifndef FAB_REMOTE_H
#define FAB_REMOTE_H

#include "engine.h"

/* Without the lock: a referenced import, or NULL with the error set. */
struct fab_import *fab_import_get(struct fab_engine *e, int64_t handle);
void fab_import_put(struct fab_engine *e, struct fab_import *import); /* takes the lock if last */
void fab_import_put_locked(struct fab_engine *e, struct fab_import *import);

/* The key for one of the owner's NICs: the grant's are for this engine alone, and go before what the
 * descriptor says. NULL: neither has one. */
static inline const fab_key *fab_import_key(const struct fab_import *import, uint32_t nic)
{
    const struct fab_grant *grant = import->grant;
    if (nic < grant->key_count)
        return &grant->keys[nic];
    return nic < import->key_count ? &import->keys[nic] : NULL;
}

/* 1: held, go on; 0: asked for, come back; negative FAB_E_*: will never be. */
int fab_grant_ready(struct fab_grant *grant, const char **why);
/* A transfer that may have work requests towards the grant begins, ends. */
void fab_grant_begin(struct fab_grant *grant);
void fab_grant_end(struct fab_grant *grant);

void fab_remote_on_grant(struct fab_peer *peer, struct fab_reader *r, int *fd);
void fab_remote_on_quiesce(struct fab_peer *peer, struct fab_reader *r);
int fab_remote_answer_quiesce(struct fab_peer *peer);
void fab_remotes_end_session(struct fab_peer *peer);
void fab_remotes_fini(struct fab_engine *e);

#endif
