/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The pods of this node. */
#ifndef MOORING_ENDPOINT_H
#define MOORING_ENDPOINT_H

#include "parse.h"

/* A pod sends only from its own addresses and its own MAC. */
ALWAYS int source_check(ctx_t *ctx, struct pkt *p)
{
	struct endpoint *ep = bpf_map_lookup_elem(&mooring_endpoints, &p->src);
	struct ethhdr *eth;

	if (!ep || ep->ifindex != ctx_ifindex(ctx))
		return -DROP_SOURCE_ADDRESS;
	p->from_id = ep->id;
	p->limits = ep->limits & LIMIT_OUT;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	if (__builtin_memcmp(eth->h_source, ep->mac, ETH_ALEN))
		return -DROP_SOURCE_MAC;
	return NEXT;
}

/* By value: before 6.4 a global function's argument is no key for a map. */
ALWAYS __u16 endpoint_id(struct addr addr)
{
	struct endpoint *ep = bpf_map_lookup_elem(&mooring_endpoints, &addr);

	return ep ? ep->id : 0;
}

/* Which pod of this node the packet is for, if any. */
ALWAYS struct endpoint *destination(struct pkt *p)
{
	struct endpoint *ep = bpf_map_lookup_elem(&mooring_endpoints, &p->dst);

	p->to_id = ep ? ep->id : 0;
	return ep;
}

#endif
