/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where the packet goes now that it has its last addresses. */
#ifndef MOORING_FORWARD_H
#define MOORING_FORWARD_H

#include "endpoint.h"
#include "rewrite.h"

/* One hop less to live, as a router's (RFC 791, 3.2; RFC 8200, 3). The caller knows that it lives. */
ALWAYS int hop(ctx_t *ctx, struct pkt *p)
{
	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		if (ip->hop_limit <= 1)
			return TO_STACK;
		ip->hop_limit--;
	} else {
		struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));
		__u32 check;

		if (!ip)
			return -DROP_REWRITE;
		if (ip->ttl <= 1)
			return TO_STACK;
		ip->ttl--;
		/* RFC 1141: the sum of the rest grows by what the TTL's byte lost. */
		check = ip->check + bpf_htons(0x0100);
		ip->check = check + (check >= 0xffff);
	}
	return NEXT;
}

/* A pod of this node gets it without the host's stack; the stack routes the rest, and answers hop limits. */
ALWAYS int forward(ctx_t *ctx, struct pkt *p)
{
	struct endpoint *to = destination(p);
	struct ethhdr *eth;
	int ret;

	if (!to)
		return TO_STACK;
	ret = hop(ctx, p);
	if (ret)
		return ret;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_REWRITE;
	__builtin_memcpy(eth->h_dest, to->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, to->host_mac, ETH_ALEN);
	p->to_ifindex = to->ifindex;
	return TO_POD;
}

#endif
