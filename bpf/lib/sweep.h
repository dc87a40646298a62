/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One pass over the table, in the kernel: nothing is copied out to decide. */
#ifndef MOORING_SWEEP_H
#define MOORING_SWEEP_H

#include "conntrack.h"

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
	if (e->cookie[0] || e->cookie[1])
		return NULL;
	/* Half closed may last as long as established: only a reset or both FINs end it. */
	if (state == CT_CLOSING && !(e->flags & CT_F_RST))
		state = CT_ESTABLISHED;
	timeout = s->timeout[state][proto];
	/* A SVC entry hears only one direction: it must not end before its flow. */
	if (k->type == CT_SVC)
		timeout += s->svc_timeout;
	if ((__s64)(s->now - e->seen) > (__s64)timeout)
		return &s->expired;
	return NULL;
}

static long sweep_entry(void *map, struct ct_key *k, struct ct_entry *e, struct sweep *s)
{
	__u64 *deleted;

	s->scanned++;
	deleted = sweep_deletes(s, k, e);
	if (!deleted) {
		s->entries++;
		if (e->cookie[0] || e->cookie[1])
			s->tethered++;
		return 0;
	}
	if (bpf_map_delete_elem(&mooring_ct, k)) {
		s->failed++;
		return 0;
	}
	*deleted += 1;
	return 0;
}

#endif
