/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Out of a device of this node, past the stack: where to is the kernel's own routing and neighbour tables'. */
#ifndef MOORING_WIRE_H
#define MOORING_WIRE_H

#include "config.h"
#include "parse.h"
#include "rewrite.h"

#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif

/* A look-up of a route: the stack of a program is 512 bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bpf_fib_lookup);
} wire_routes SEC(".maps");

ALWAYS struct bpf_fib_lookup *wire_fib(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&wire_routes, &zero);
}

/*
 * Which device leads to an address, and which neighbour: BPF_FIB_LKUP_RET_. What
 * is longer than the way carries is told; offloads that cut it are known to the kernel.
 */
RARELY int wire_route_len(ctx_t *ctx, struct pkt *p, struct addr *to, __u32 len)
{
	struct bpf_fib_lookup *fib = wire_fib();

	if (!p || !to || !fib)
		return BPF_FIB_LKUP_RET_NOT_FWDED;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = ctx_ifindex(ctx);
	fib->l4_protocol = p->proto;
	fib->tot_len = len;
	if (p->v6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_dst, to->b, 16);
	} else {
		fib->family = AF_INET;
		fib->ipv4_dst = addr_v4(to);
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
}

ALWAYS int wire_route(ctx_t *ctx, struct pkt *p, struct addr *to)
{
	return wire_route_len(ctx, p, to, ctx_route_len(p->len - p->l3));
}

/* The device of the last look-up. */
ALWAYS __u32 wire_ifindex(void)
{
	struct bpf_fib_lookup *fib = wire_fib();

	return fib ? fib->ifindex : 0;
}

/* What the way of the last look-up carries, which found the packet too long. */
ALWAYS __u32 wire_mtu(void)
{
	struct bpf_fib_lookup *fib = wire_fib();

	return fib ? fib->mtu_result : 0;
}

ALWAYS int wire_routed(int ret)
{
	return ret == BPF_FIB_LKUP_RET_SUCCESS || ret == BPF_FIB_LKUP_RET_NO_NEIGH;
}

/* Why what a look-up found is no way for a packet that is sent on in this node's name. */
ALWAYS int wire_refused(int ret)
{
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return -DROP_TOO_BIG;
	return wire_routed(ret) ? NEXT : -DROP_NO_ROUTE;
}

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

/* Whether a router may pass it on; the stack answers for what may not. */
ALWAYS int hop_left(ctx_t *ctx, const struct pkt *p)
{
	__u8 *h = pkt_at(ctx, p->l3, sizeof(struct iphdr));

	return h && (p->v6 ? h[offsetof(struct ipv6hdr, hop_limit)] : h[offsetof(struct iphdr, ttl)]) > 1;
}

/* To where the route leads, whatever its source address is: the stack would take this node's own from no device. */
RARELY int wire_leave(ctx_t *ctx, struct pkt *p)
{
	struct bpf_fib_lookup *fib = wire_fib();
	struct addr to;
	int ret;

	if (!p || !fib)
		return TO_STACK;
	to = p->dst;
	if (!wire_routed(wire_route(ctx, p, &to)))
		return TO_STACK;
	ret = hop(ctx, p);
	if (ret)
		return ret;
	p->to_ifindex = fib->ifindex;
	return TO_NEIGHBOUR;
}

#endif
