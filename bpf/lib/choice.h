/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the choice of a backend goes by, whoever the client is. */
#ifndef MOORING_CHOICE_H
#define MOORING_CHOICE_H

#include "config.h"
#include "backend.h"
#include "conntrack.h"

#define BACKEND_TRIES 4

/* sessionAffinity: ClientIP: the client's last backend, while it takes new flows. */
ALWAYS struct backend *svc_affine(const struct svc *s, const struct pkt *p, __u32 *index)
{
	struct affinity_key key = { .client = p->src, .service = s->id };
	struct affinity *a;
	struct backend *b;

	if (!s->affinity_seconds)
		return NULL;
	a = bpf_map_lookup_elem(&mooring_affinity, &key);
	if (!a || bpf_jiffies64() - a->seen > s->affinity_seconds * jiffies_per_second)
		return NULL;
	b = backend_of(a->backend, a->backend_generation);
	if (!b || b->state != BACKEND_ACTIVE)
		return NULL;
	*index = a->backend;
	return b;
}

ALWAYS void svc_remember_affinity(const struct svc *s, const struct pkt *p, const struct addr *client)
{
	struct affinity_key key = { .client = *client, .service = s->id };
	struct affinity a = {
		.seen = bpf_jiffies64(),
		.backend = p->backend,
		.backend_generation = p->backend_generation,
	};

	if (s->affinity_seconds)
		bpf_map_update_elem(&mooring_affinity, &key, &a, BPF_ANY);
}

/* Whether this SYN is to ask the backend of the client's living connection: every other one that comes by a contested flow. */
ALWAYS int ct_asks_other(struct ct_entry *e)
{
	return (e->flags & CT_F_CONTESTED) && (__sync_fetch_and_and(&e->flags, ~CT_F_CONTESTED) & CT_F_CONTESTED);
}

/* Find the flow as it will be on the wire to this backend. */
ALWAYS struct ct_entry *svc_flow(const struct pkt *p, const struct addr *addr, __be16 port)
{
	struct ct_key key;
	struct addr src = p->src;

	if (addr_eq(addr, &p->src))
		src = p->v6 ? *(struct addr *)&hairpin_v6 : *(struct addr *)&hairpin_v4;
	ct_flow_key(&key, &src, p->sport, addr, port, p->proto);
	return ct_at(&key);
}

#endif
