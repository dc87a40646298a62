/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One pass over the table, in the kernel: nothing is copied out to decide. */
#ifndef MOORING_SWEEP_H
#define MOORING_SWEEP_H

#include "conntrack.h"

ALWAYS __u64 *sweep_deletes(struct sweep *s, const struct ct_key *k, const struct ct_entry *e)
{
	__u32 proto = k->proto == IPPROTO_TCP ? SWEEP_TCP : k->proto == IPPROTO_UDP ? SWEEP_UDP : SWEEP_OTHER;
	__u32 state = e->state & 3;
	__u64 timeout;

	if (s->flush)
		return &s->flushed;
	if (!addr_zero(&s->endpoint) &&
	    (addr_eq(&k->addr[0], &s->endpoint) || addr_eq(&k->addr[1], &s->endpoint) ||
	     addr_eq(&e->nat, &s->endpoint)))
		return &s->endpoints;
	if (s->backends && e->backend) {
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
	if (s->now - e->seen > timeout)
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
