/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * To a backend on another node as from this one, so that its answers come back here; to one
 * of this node from another port of the client's, where its own has a flow already.
 */
#ifndef MOORING_SNAT_H
#define MOORING_SNAT_H

#include "choice.h"
#include "endpoint.h"
#include "way.h"
#include "wire.h"

/* With nine ports of ten taken, one packet in thirty of those that begin a flow finds none. */
#define SNAT_TRIES 32

/*
 * After as many in a row that are taken, one of a handshake that does not go on will do, and
 * after more one of a SYN that is new, but that nobody has answered: a flood need not keep them all.
 */
#define SNAT_SHORT 2
#define SNAT_SHORTER 4

/* Ports of the node that nothing else takes: a flow to one is an answer to what was sent from it, or nobody's. */
ALWAYS int snat_port(__be16 port)
{
	return (__u16)(bpf_ntohs(port) - snat_port_first) < snat_ports;
}

/* The node's address by which the backends beyond a device know it. */
ALWAYS struct addr *snat_address(__u32 ifindex, int v6)
{
	__u32 any = 0;
	struct uplink *u = bpf_map_lookup_elem(&mooring_uplinks, &ifindex);
	struct addr *a;

	if (!u)
		u = bpf_map_lookup_elem(&mooring_uplinks, &any);
	if (!u)
		return NULL;
	a = v6 ? &u->v6 : &u->v4;
	return addr_zero(a) ? NULL : a;
}

/*
 * Where the search for a free port begins. A SYN that is repeated finds the port again that
 * it had before, as nothing else remembers it; who does not see the SYN cannot guess it.
 */
ALWAYS __u32 snat_first(const struct pkt *p, const struct north_way *w)
{
	/* Not the bits by which a backend is picked, of which each would have a share of the ports only. */
	return p->flags & PKT_OPENS ? ((north_hash(p) ^ w->connection) * 0x85ebca6bu) >> 8 : bpf_get_prandom_u32();
}

/* Whether an entry that has the port is of this very SYN, sent before: however late, it begins nothing new. */
ALWAYS int snat_repeated(const struct ct_entry *e, const struct pkt *p)
{
	return (p->flags & PKT_OPENS) && !flow_over(e) && e->backend == p->backend &&
	       e->origin_port == p->sport && e->nat_port == p->dport &&
	       addr_eq(&e->origin, &p->src) && addr_eq(&e->nat, &p->dst);
}

/*
 * Whether the port may be another's now: its handshake stands still. A client who asks again
 * finds another port; one who has been answered had three times as long as that takes.
 */
ALWAYS int snat_idle(const struct ct_entry *e, const struct pkt *p, __u64 now, int try)
{
	__u64 patience = e->flags & CT_F_REPLIED ? 3 * jiffies_per_second : try < SNAT_SHORTER ? jiffies_per_second : 0;

	return p->proto == IPPROTO_TCP && e->state == CT_NEW && (__s64)(now - e->seen) >= (__s64)patience;
}

/* Overwrite a flow with the draft on its port. The decision that led there ends: claimed before that is looked for, as in ct_end(). */
static __noinline int snat_take_over(struct ct_draft *d, struct ct_entry *e)
{
	int n = 1;

	if (!ct_claim_for(&d->key, e, &d->entry))
		return 0;
	n += ct_end_decision(&d->key, e);
	ct_overwrite(e, &d->entry);
	ct_count(CT_STAT_CREATED);
	ct_count_by(CT_STAT_TAKEN_OVER, n);
	return 1;
}

/* The way to the backend in w, and by which of the node's addresses it is asked. */
RARELY int snat_route(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	struct addr *from;
	int found, ret;

	if (!p || !w)
		return -DROP_NO_ROUTE;
	found = wire_route(ctx, p, &w->to);
	ret = wire_refused(found);
	if (ret)
		return ret;
	from = snat_address(wire_ifindex(), p->v6);
	if (!from)
		return -DROP_NO_ROUTE;
	w->from = *from;
	w->flags |= WAY_MADE | (found == BPF_FIB_LKUP_RET_SUCCESS ? WAY_ROUTED : 0);
	return NEXT;
}

/*
 * Take a port for the packet's flow to the backend in w, and make the flow's entry
 * in the same step: two flows that begin at once never get one port. A port with an
 * entry is not taken, even if that flow is over: the backend may still wait for its last packets.
 * Only where ports are short one is, of a handshake that does not go on.
 */
RARELY int snat_take(struct pkt *p, struct north_way *w)
{
	struct ct_draft *d = ct_draft();
	struct north_way *own;
	struct endpoint *ep;
	struct ct_entry *e;
	__u16 alone;
	__u32 port;

	if (!p || !w || !d)
		return -DROP_CONNTRACK_FULL;
	if (w->flags & WAY_MADE) {
		d->entry.packets[0] = 1;
		d->entry.bytes[0] = p->len;
	}
	/* The backend's answer makes the service's. */
	alone = p->flags & PKT_OPENS ? CT_F_ALONE : 0;
	d->entry.seen = bpf_jiffies64();
	d->entry.nat = p->dst;
	d->entry.nat_port = p->dport;
	d->entry.origin = p->src;
	d->entry.origin_port = p->sport;
	d->entry.backend = p->backend;
	d->entry.backend_generation = p->backend_generation;
	d->entry.service = p->service;
	d->entry.policy = p->generation;
	if (w->flags & WAY_SPARE_PORT) {
		/* Nobody has asked the pod's policies yet. */
		d->entry.policy--;
		own = north_way();
		ep = own ? bpf_map_lookup_elem(&mooring_endpoints, &own->to) : NULL;
		if (ep)
			d->entry.endpoint[1] = ep->id;
	}
	d->entry.life = bpf_get_prandom_u32() & ~CT_LIFE_CLAIMED;
	if (p->proto == IPPROTO_TCP && !tcp_opens(p))
		d->entry.state = CT_ESTABLISHED;
	port = snat_first(p, w);
	for (int i = 0; i < SNAT_TRIES; i++, port++) {
		long err;

		w->from_port = bpf_htons(snat_port_first + port % snat_ports);
		d->entry.flags = CT_F_EMBRYONIC | alone | (d->entry.endpoint[1] ? CT_F_INGRESS : 0);
		if (ct_flow_key(&d->key, &w->from, w->from_port, &w->to, w->to_port, p->proto))
			d->entry.flags |= CT_F_INITIATOR_HIGH;
		e = bpf_map_lookup_elem(&mooring_ct, &d->key);
		/* An insertion that finds the key may have pushed another out for it. */
		if (!e && i)
			e = bpf_map_lookup_elem(&mooring_ct_embryonic, &d->key);
		if (!e) {
			err = bpf_map_update_elem(&mooring_ct_embryonic, &d->key, &d->entry, BPF_NOEXIST);
			if (!err) {
				ct_count(CT_STAT_CREATED);
				return NEXT;
			}
			if (err != -EEXIST) {
				ct_count_failure(CT_STAT_INSERT_FAILED, err);
				return -DROP_CONNTRACK_FULL;
			}
			e = bpf_map_lookup_elem(&mooring_ct_embryonic, &d->key);
		}
		if (e && snat_repeated(e, p)) {
			if (ct_asks_other(e))
				w->flags |= WAY_OTHER;
			e->seen = d->entry.seen;
			__sync_fetch_and_add(&e->packets[0], 1);
			__sync_fetch_and_add(&e->bytes[0], p->len);
			return NEXT;
		}
		if (e && i >= SNAT_SHORT && snat_idle(e, p, d->entry.seen, i) && snat_take_over(d, e))
			return NEXT;
	}
	return -DROP_SNAT_PORTS;
}

/* A client's packet goes on under a name of this node's, and is the first that does. */
ALWAYS int snat_open(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	int ret = w->flags & WAY_SPARE_PORT ? NEXT : snat_route(ctx, p, w);

	return ret ?: snat_take(p, w);
}

#endif
