/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One pass over the table, in the kernel: nothing is copied out to decide. */
#ifndef MOORING_SWEEP_H
#define MOORING_SWEEP_H

#include "conntrack.h"
#include "entry.h"

/* An end that was a pod of this node, by address and id: an address can have a new owner. */
ALWAYS int endpoint_gone(const struct addr *a, __u16 id)
{
	struct endpoint *ep;

	if (!id)
		return 0;
	ep = bpf_map_lookup_elem(&mooring_endpoints, a);
	return !ep || ep->id != id;
}

ALWAYS int endpoints_gone(const struct ct_key *k, const struct ct_entry *e)
{
	struct addr initiator, responder;

	if (k->type == CT_SVC || !(e->flags & CT_F_INITIATOR_HIGH)) {
		initiator = k->addr[0];
		responder = k->addr[1];
	} else {
		initiator = k->addr[1];
		responder = k->addr[0];
	}
	if (e->flags & CT_F_HAIRPIN)
		initiator = e->origin;
	return endpoint_gone(&initiator, e->endpoint[0]) || endpoint_gone(&responder, e->endpoint[1]);
}

/* A socket that had too many flows to know them all has ended. */
ALWAYS int crowd_gone(const struct ct_entry *e, int side)
{
	__u64 cookie = e->cookie[side];

	return cookie && e->tether[side] == TETHER_CROWD && bpf_map_lookup_elem(&mooring_crowds, &cookie);
}

ALWAYS int expired(const struct sweep *s, const struct ct_entry *e, __u64 timeout)
{
	/* A packet may have stamped it since the pass began. */
	return (__s64)(s->now - e->seen) > (__s64)timeout;
}

/* Where the pass counts this entry's deletion, or NULL when it stays. */
ALWAYS __u64 *sweep_deletes(struct sweep *s, const struct ct_key *k, const struct ct_entry *e)
{
	__u32 proto = k->proto == IPPROTO_TCP ? SWEEP_TCP : k->proto == IPPROTO_UDP ? SWEEP_UDP : SWEEP_OTHER;
	__u32 state = e->state & 3;
	__u64 timeout;

	if (s->flush)
		return &s->flushed;
	if (s->gone_endpoints && endpoints_gone(k, e))
		return &s->endpoint;
	if (s->gone_backends && e->backend) {
		__u32 index = e->backend;
		struct backend *b = bpf_map_lookup_elem(&mooring_backends, &index);

		if (b && (b->state == BACKEND_FREE || b->generation != e->backend_generation))
			return &s->backend;
	}
	if (s->gone_crowds && (crowd_gone(e, 0) || crowd_gone(e, 1)))
		return &s->socket;
	if (ct_held(e)) {
		/* Its socket is not among those that live: its end was missed. */
		if (s->missing_timeout && e->confirmed != s->roll_call && expired(s, e, s->missing_timeout))
			return &s->socket;
		return NULL;
	}
	/* Half closed may last as long as established: only a reset, both FINs or the socket's end finish it. */
	if (state == CT_CLOSING && !(e->flags & (CT_F_RST | CT_F_ENDED)))
		state = CT_ESTABLISHED;
	timeout = s->timeout[state][proto];
	/* A SVC entry hears only one direction: it must not end before its flow. */
	if (k->type == CT_SVC)
		timeout += s->svc_timeout;
	if (expired(s, e, timeout))
		return &s->expired;
	return NULL;
}

ALWAYS void sweep_delete(struct sweep *s, __u64 *deleted, const struct ct_key *k, struct ct_entry *e)
{
	if (ct_delete_claimed(k, e))
		*deleted += 1;
	else
		s->failed++;
}

/*
 * A claim that was left behind would keep the tuple busy for ever. One that is met may be
 * of this moment, whenever the entry was last heard of: deleting beside its owner, who may
 * be interrupted for long, would leave the owner to delete the next flow on the tuple. So
 * it has 10 s from the first pass that meets it.
 */
ALWAYS void sweep_claimed(struct sweep *s, const struct ct_key *k, struct ct_entry *e)
{
	if (!expired(s, e, 10 * jiffies_per_second))
		return;
	if (e->confirmed != CT_CLAIM_MET) {
		e->confirmed = CT_CLAIM_MET;
		e->seen = s->now;
		return;
	}
	sweep_delete(s, &s->socket, k, e);
}

ALWAYS long sweep_entry(struct ct_key *k, struct ct_entry *e, struct sweep *s)
{
	__u32 life = e->life;
	__u64 seen = e->seen;
	__u64 *deleted;

	s->scanned++;
	if (life & CT_LIFE_CLAIMED) {
		sweep_claimed(s, k, e);
		return 0;
	}
	deleted = sweep_deletes(s, k, e);
	/* Claimed first and looked at again: what a packet has touched in between stays. */
	if (deleted && ct_claim(e, life)) {
		if (deleted == &s->expired && e->seen != seen) {
			__sync_fetch_and_and(&e->life, ~CT_LIFE_CLAIMED);
		} else {
			*deleted += ct_end_decision(k, e);
			sweep_delete(s, deleted, k, e);
			return 0;
		}
	}
	s->entries++;
	if (e->flags & CT_F_EMBRYONIC)
		s->embryonic++;
	if (e->cookie[0] || e->cookie[1])
		s->tethered++;
	return 0;
}

static long sweep_one(void *map, struct ct_key *k, struct ct_entry *e, struct sweep *s)
{
	return sweep_entry(k, e, s);
}

#endif
