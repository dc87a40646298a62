/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The end of every walk: the only place that knows TC_ACT_*, counts and reports. */
#ifndef MOORING_FINISH_H
#define MOORING_FINISH_H

#include <linux/pkt_cls.h>
#include "limit.h"

ALWAYS int monitored(void)
{
	__u32 zero = 0;
	struct shared *s = bpf_map_lookup_elem(&mooring_shared, &zero);

	return s && s->monitors;
}

RARELY int report(struct pkt *p, __u8 kind, __u8 reason)
{
	struct event *e;

	if (!p)
		return 0;
	e = bpf_ringbuf_reserve(&mooring_events, sizeof(*e), 0);
	if (!e)
		return 0;
	e->time = bpf_ktime_get_ns();
	e->src = p->src;
	e->dst = p->dst;
	if (p->service) {
		e->nat = p->sent_dst;
		e->nat_port = p->sent_dport;
	} else {
		__builtin_memset(&e->nat, 0, sizeof(e->nat));
		e->nat_port = 0;
	}
	e->sport = p->sport;
	e->dport = p->dport;
	e->endpoint = p->from_id ?: p->to_id;
	e->len = p->len;
	e->kind = kind;
	e->reason = reason;
	e->direction = p->direction;
	e->proto = p->proto;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

ALWAYS void count(struct pkt *p, __u32 reason)
{
	__u32 index = reason * DIRECTIONS + p->direction;
	struct counter *c = bpf_map_lookup_elem(&mooring_counters, &index);

	if (c) {
		c->packets++;
		c->bytes += p->len;
	}
}

ALWAYS void count_drop(struct pkt *p, __u32 reason)
{
	count(p, reason);
	if (monitored())
		report(p, EVENT_DROP, reason);
}

#ifndef MOORING_XDP

ALWAYS int finish(ctx_t *ctx, struct pkt *p, int verdict)
{
	if (verdict < 0) {
		count_drop(p, -verdict);
		return TC_ACT_SHOT;
	}
	switch (verdict) {
	case SWALLOWED:
		return TC_ACT_SHOT;
	case TO_SENDER:
		if (p->direction == FROM_WIRE)
			return bpf_redirect(ctx->ifindex, 0);
		return bpf_redirect_peer(ctx->ifindex, 0);
	case TO_POD:
	case TO_NEIGHBOUR:
		count(p, DROP_NONE);
		if (p->limits & LIMIT_OUT)
			return limit_detour(ctx, p, verdict);
		if (verdict == TO_POD)
			return limit_deliver(ctx, p->to_ifindex, p->limits);
		return bpf_redirect_neigh(p->to_ifindex, NULL, 0, 0);
	}
	count(p, DROP_NONE);
	/* Not TC_ACT_OK, which would end the hook: what others attached after us, such as the ingress qdisc of
	 * the CNI plugin bandwidth, gets its turn. */
	return TC_ACT_UNSPEC;
}

#endif

#endif
