/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What becomes of a packet's two ends at an uplink: decided first, then done in one step. */
#ifndef MOORING_WAY_H
#define MOORING_WAY_H

#include "rewrite.h"

enum way_flags {
	WAY_KNOWN = 1 << 0,	/* the service's entry says it all: the flow's own is not asked */
	WAY_FRESH = 1 << 1,	/* the flow has no entry yet */
	WAY_HOST = 1 << 2,	/* a process of this node itself is the backend */
	WAY_TELL = 1 << 3,	/* dsr.h: what the flow's answers are called is told to the backend's node, or was to us */
	WAY_MUST_TELL = 1 << 4,	/* it does not know yet */
	WAY_CUT = 1 << 5,	/* what was told with is not the packet itself */
	WAY_SPARE_PORT = 1 << 6,	/* the client's own is taken at the backend: it is seen with another */
	WAY_NEW = 1 << 7,	/* just chosen */
	WAY_MADE = 1 << 8,	/* the flow's entry was just made, and has heard this packet */
	WAY_ROUTED = 1 << 9,	/* the last look-up of a route, to this backend, found its neighbour */
	WAY_OTHER = 1 << 10,	/* the client's living connection is to be asked first (CT_F_CONTESTED) */
};

struct north_way {
	struct addr from, to;
	__be16 from_port, to_port;
	__u32 flags;		/* enum way_flags */
	__u32 connection;	/* of a new one, see north_connection() */
	__u32 ifindex;		/* by which a client's packet came that was given these ends */
	__u64 packets, bytes;	/* of the client, as the service's entry counted them */
};

/* The stack of a program is 512 bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct north_way);
} north_ways SEC(".maps");

ALWAYS struct north_way *north_way(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&north_ways, &zero);
}

/* The same for the same ends on every node (an avalanche after MurmurHash3's finalizer). */
ALWAYS __u32 north_hash(const struct pkt *p)
{
	__u64 h = words(&p->src)[0];

	h = h * 0x9e3779b97f4a7c15ull + words(&p->src)[1];
	h = h * 0x9e3779b97f4a7c15ull + words(&p->dst)[0];
	h = h * 0x9e3779b97f4a7c15ull + words(&p->dst)[1];
	h = h * 0x9e3779b97f4a7c15ull + ((__u64)p->sport << 32 | (__u64)p->dport << 16 | p->proto);
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdull;
	h ^= h >> 33;
	h *= 0xc4ceb9fe1a85ec53ull;
	return h >> 32;
}

/* Give the packet the ends that w has. */
ALWAYS int way_take(ctx_t *ctx, struct pkt *p, const struct north_way *w)
{
	int has_ports = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP;
	__u32 sum = l4_checksum(p);
	__wsum addresses, ports = 0;

	addresses = sum_fold((__u64)addr_diff(&p->src, &w->from, p->v6) + addr_diff(&p->dst, &w->to, p->v6));
	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		__builtin_memcpy(&ip->saddr, w->from.b, 16);
		__builtin_memcpy(&ip->daddr, w->to.b, 16);
	} else {
		struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		ip->saddr = addr_v4(&w->from);
		ip->daddr = addr_v4(&w->to);
		ip->check = csum_add_diff(ip->check, addresses);
	}
	if (has_ports && !(p->flags & PKT_LATER_FRAGMENT)) {
		__be16 *h = pkt_at(ctx, p->l4, 4);

		if (!h)
			return -DROP_REWRITE;
		h[0] = w->from_port;
		h[1] = w->to_port;
		ports = port_diff(p->sport, w->from_port) + port_diff(p->dport, w->to_port);
	}
	if (sum && sum_update(ctx, sum, addresses, ports, p->proto == IPPROTO_UDP))
		return -DROP_REWRITE;
	p->src = w->from;
	p->dst = w->to;
	if (has_ports) {
		p->sport = w->from_port;
		p->dport = w->to_port;
	}
	return NEXT;
}

#endif
