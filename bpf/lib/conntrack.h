/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The connection table: one CT_FLOW entry per flow on the wire, found from both
 * directions, and one CT_SVC entry per flow through a frontend. Values change in
 * place: an update of an LRU key takes a fresh node and may evict another's.
 */
#ifndef MOORING_CONNTRACK_H
#define MOORING_CONNTRACK_H

#include "parse.h"
#include "finish.h"
#include "rewrite.h"

/* An entry in the making: the stack of a program is 512 bytes. */
struct ct_draft {
	struct ct_key key;
	struct ct_entry entry;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ct_draft);
} ct_drafts SEC(".maps");

ALWAYS struct ct_draft *ct_draft(void)
{
	__u32 zero = 0;
	struct ct_draft *d = bpf_map_lookup_elem(&ct_drafts, &zero);

	if (d)
		__builtin_memset(&d->entry, 0, sizeof(d->entry));
	return d;
}

ALWAYS void ct_count(__u32 stat)
{
	__u64 *n = bpf_map_lookup_elem(&mooring_ct_stats, &stat);

	if (n)
		*n += 1;
}

/* The key of the flow between two ends; returns 1 when the first is the higher end. */
ALWAYS int ct_flow_key(struct ct_key *k, const struct addr *a, __be16 aport,
		       const struct addr *b, __be16 bport, __u8 proto)
{
	int high;

	if (words(a)[0] != words(b)[0])
		high = words(a)[0] > words(b)[0];
	else if (words(a)[1] != words(b)[1])
		high = words(a)[1] > words(b)[1];
	else
		high = aport > bport;
	k->addr[0] = high ? *b : *a;
	k->addr[1] = high ? *a : *b;
	k->port[0] = high ? bport : aport;
	k->port[1] = high ? aport : bport;
	k->proto = proto;
	k->type = CT_FLOW;
	k->pad = 0;
	return high;
}

ALWAYS void ct_svc_key(struct ct_key *k, const struct pkt *p)
{
	k->addr[0] = p->src;
	k->addr[1] = p->dst;
	k->port[0] = p->sport;
	k->port[1] = p->dport;
	k->proto = p->proto;
	k->type = CT_SVC;
	k->pad = 0;
}

/* A SYN on any but a new entry is another connection on the same ports. */
ALWAYS int tcp_opens(const struct pkt *p)
{
	return p->proto == IPPROTO_TCP && !(p->flags & PKT_LATER_FRAGMENT) &&
	       (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Find the entry of the flow as it is on the wire now. */
ALWAYS struct ct_entry *ct_find(struct pkt *p)
{
	struct ct_key key;
	int high = ct_flow_key(&key, &p->src, p->sport, &p->dst, p->dport, p->proto);
	struct ct_entry *e = bpf_map_lookup_elem(&mooring_ct, &key);

	if (e && high != !!(e->flags & CT_F_INITIATOR_HIGH))
		p->flags |= PKT_REPLY;
	else
		p->flags &= ~PKT_REPLY;
	return e;
}

ALWAYS int flow_over(const struct ct_entry *e)
{
	return e->state >= CT_CLOSING;
}

ALWAYS int ct_lookup(struct pkt *p)
{
	p->flow = ct_find(p);
	/* The same ports again, from either side: another connection, another entry. */
	if (p->flow && tcp_opens(p) && flow_over(p->flow)) {
		p->flow = NULL;
		p->flags &= ~PKT_REPLY;
	}
	return NEXT;
}

/* The SVC entry lives as long as its flow: it follows every change of state, whoever caused it. */
ALWAYS void ct_mirror(const struct ct_entry *e, const struct pkt *p)
{
	int reply = p->flags & PKT_REPLY;
	struct ct_entry *svc;
	struct ct_key key;

	if (!e->service)
		return;
	key.addr[0] = e->flags & CT_F_HAIRPIN ? e->origin : reply ? p->dst : p->src;
	key.addr[1] = e->nat;
	key.port[0] = reply ? p->dport : p->sport;
	key.port[1] = e->nat_port;
	key.proto = p->proto;
	key.type = CT_SVC;
	key.pad = 0;
	svc = bpf_map_lookup_elem(&mooring_ct, &key);
	if (svc && svc->backend == e->backend)
		svc->state = e->state;
}

/* State from this packet, RFC 9293 flags for TCP, who was heard for the rest. */
ALWAYS void ct_update(struct ct_entry *e, const struct pkt *p)
{
	__u32 reply = !!(p->flags & PKT_REPLY);
	__u32 flags = e->flags;
	__u8 state = e->state;

	__sync_fetch_and_add(&e->packets[reply], 1);
	__sync_fetch_and_add(&e->bytes[reply], p->len);
	e->seen = bpf_jiffies64();

	if (p->proto == IPPROTO_TCP && !(p->flags & PKT_LATER_FRAGMENT)) {
		if (tcp_opens(p) && !reply && state != CT_NEW) {
			flags &= ~(CT_F_FIN_INITIATOR | CT_F_FIN_RESPONDER | CT_F_REPLIED | CT_F_RST);
			state = CT_NEW;
		}
		if (reply && !(p->tcp_flags & TCP_RST))
			flags |= CT_F_REPLIED;
		else if (!reply && state == CT_NEW && (flags & CT_F_REPLIED) && (p->tcp_flags & TCP_ACK))
			state = CT_ESTABLISHED;
		if (p->tcp_flags & TCP_FIN) {
			flags |= reply ? CT_F_FIN_RESPONDER : CT_F_FIN_INITIATOR;
			state = CT_CLOSING;
		}
		if ((flags & CT_F_FIN_INITIATOR) && (flags & CT_F_FIN_RESPONDER))
			state = CT_TIMEWAIT;
		if (p->tcp_flags & TCP_RST) {
			flags |= CT_F_RST;
			state = CT_CLOSING;
		}
	} else if (reply) {
		flags |= CT_F_REPLIED;
		state = CT_ESTABLISHED;
	}
	if (flags != e->flags)
		e->flags = flags;
	if (state != e->state) {
		e->state = state;
		ct_mirror(e, p);
	}
}

ALWAYS int ct_insert(const struct ct_draft *d)
{
	if (bpf_map_update_elem(&mooring_ct, &d->key, &d->entry, BPF_ANY)) {
		ct_count(CT_STAT_INSERT_FAILED);
		return -DROP_CONNTRACK_FULL;
	}
	ct_count(CT_STAT_CREATED);
	return NEXT;
}

/* An entry for the flow as it is on the wire now, begun by this packet. */
RARELY int ct_create(struct pkt *p)
{
	struct ct_draft *d = ct_draft();
	struct endpoint *to;
	struct ct_entry *e;
	int ret;

	if (!p || !d)
		return -DROP_CONNTRACK_FULL;
	e = &d->entry;
	to = bpf_map_lookup_elem(&mooring_endpoints, &p->dst);
	p->to_id = to ? to->id : 0;
	if (ct_flow_key(&d->key, &p->src, p->sport, &p->dst, p->dport, p->proto))
		e->flags = CT_F_INITIATOR_HIGH;
	if (p->from_id)
		e->flags |= CT_F_EGRESS;
	if (p->to_id)
		e->flags |= CT_F_INGRESS;
	if (p->flags & PKT_HAIRPIN) {
		/* Behind the alias is the pod itself. */
		e->flags |= CT_F_HAIRPIN;
		e->origin = p->dst;
		e->origin_port = p->sport;
	}
	e->seen = bpf_jiffies64();
	e->packets[0] = 1;
	e->bytes[0] = p->len;
	e->nat = p->nat;
	e->nat_port = p->nat_port;
	e->backend = p->backend;
	e->backend_generation = p->backend_generation;
	e->service = p->service;
	e->endpoint[0] = p->from_id;
	e->endpoint[1] = p->to_id;
	/* Picked up in the middle: after a flush, an eviction, or a start on a running node. */
	if (p->proto == IPPROTO_TCP && !tcp_opens(p))
		e->state = CT_ESTABLISHED;
	ret = ct_insert(d);
	if (!ret && monitored())
		report(p, EVENT_NEW, 0);
	return ret;
}

/*
 * Remember the flow. Where no entry can be made a plain flow goes on without, but a
 * translated one must not begin: its replies would not be known.
 */
ALWAYS int ct_commit(struct pkt *p)
{
	__u32 service = p->service;
	int ret;

	if (p->flow) {
		ct_update(p->flow, p);
		return NEXT;
	}
	if (p->proto == IPPROTO_TCP && (p->tcp_flags & TCP_RST))
		return NEXT;
	ret = ct_create(p);
	return service ? ret : NEXT;
}

/* What the responder sent goes back under the name that the initiator knows. */
ALWAYS int ct_untranslate(ctx_t *ctx, struct pkt *p)
{
	struct ct_entry *e = p->flow;
	struct addr nat, origin;
	__be16 nat_port, origin_port;
	int ret = NEXT;

	if (!e || !(p->flags & PKT_REPLY))
		return NEXT;
	nat = e->nat;
	nat_port = e->nat_port;
	origin = e->origin;
	origin_port = e->origin_port;
	if (!addr_zero(&nat))
		ret = rewrite(ctx, p, SOURCE, &nat, nat_port);
	if (!ret && !addr_zero(&origin))
		ret = rewrite_destination(ctx, p, &origin, origin_port);
	p->flow = e;	/* which the verifier forgot over the call */
	return ret;
}

#endif
