/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where the packet goes now that it has its last addresses. */
#ifndef MOORING_FORWARD_H
#define MOORING_FORWARD_H

#include "endpoint.h"
#include "rewrite.h"
#include "wire.h"

/* A pod of this node gets it without the host's stack; the stack routes the rest, and answers hop limits. */
ALWAYS int forward(ctx_t *ctx, struct pkt *p)
{
	struct endpoint *to = destination(p);
	struct ethhdr *eth;
	int ret;

	if (!to)
		return p->flags & PKT_RENAMED ? wire_leave(ctx, p) : TO_STACK;
	ret = hop(ctx, p);
	if (ret)
		return ret;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_REWRITE;
	__builtin_memcpy(eth->h_dest, to->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, to->host_mac, ETH_ALEN);
	p->limits |= to->limits & LIMIT_IN;
	p->to_ifindex = to->ifindex;
	return TO_POD;
}

#endif
