/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Changing addresses, ports and checksums (RFC 1624). */
#ifndef MOORING_REWRITE_H
#define MOORING_REWRITE_H

#include "parse.h"

enum rewrite_end {
	SOURCE,
	DESTINATION,
};

/* Sum of 16-bit words, len a multiple of 4 that the compiler knows. */
ALWAYS __u64 csum_words(const void *data, __u32 len)
{
	const __u32 *w = data;
	__u64 sum = 0;

#pragma unroll
	for (__u32 i = 0; i < len / 4; i++)
		sum += w[i];
	return sum;
}

/* What replacing old by new adds to a one's complement sum. */
ALWAYS __wsum addr_diff(const struct addr *old, const struct addr *new, int v6)
{
	const __u32 *o = (const __u32 *)old->b, *n = (const __u32 *)new->b;
	__u64 sum = (__u64)(__u32)~o[3] + n[3];

	if (v6)
		sum += (__u64)(__u32)~o[0] + n[0] + (__u32)~o[1] + n[1] + (__u32)~o[2] + n[2];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

ALWAYS __wsum port_diff(__be16 old, __be16 new)
{
	return (__u32)(__u16)~old + new;
}

ALWAYS __u16 sum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

ALWAYS __sum16 csum_add_diff(__sum16 check, __wsum diff)
{
	return ~sum_fold((__u64)(__u16)~check + diff);
}

/* Offset of the layer 4 checksum, or 0 where the packet carries none that covers its addresses. */
ALWAYS __u32 l4_checksum(const struct pkt *p)
{
	if (p->flags & PKT_LATER_FRAGMENT)
		return 0;
	switch (p->proto) {
	case IPPROTO_TCP:
		return p->l4 + offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return p->l4 + offsetof(struct udphdr, check);
	case IPPROTO_ICMPV6:
		return p->l4 + 2;
	}
	return 0;
}

/*
 * Keep the layer 4 checksum at off right after a change: pseudo is what changed
 * in the addresses that it covers, inside what changed in what follows it. A UDP
 * sum of 0 means that there is none (RFC 768).
 */
ALWAYS int sum_update(ctx_t *ctx, __u32 off, __wsum pseudo, __wsum inside, int udp)
{
	enum ctx_sum kind = ctx_sum(ctx);
	__sum16 *check;

	if (kind == SUM_HELPER) {
		__u64 flags = udp ? BPF_F_MARK_MANGLED_0 : 0;

		if (pseudo && ctx_sum_replace(ctx, off, 0, pseudo, BPF_F_PSEUDO_HDR | flags))
			return -DROP_REWRITE;
		if (inside && ctx_sum_replace(ctx, off, 0, inside, flags))
			return -DROP_REWRITE;
		return NEXT;
	}
	check = pkt_at(ctx, off, sizeof(*check));
	if (!check)
		return -DROP_REWRITE;
	if (udp && !*check)
		return NEXT;
	if (kind == SUM_PARTIAL)
		*check = sum_fold((__u64)*check + pseudo);
	else
		*check = csum_add_diff(*check, sum_fold((__u64)pseudo + inside));
	if (udp && !*check)
		*check = 0xffff;
	return NEXT;
}

/* Give the packet another source or destination. */
ALWAYS int rewrite(ctx_t *ctx, struct pkt *p, enum rewrite_end end,
		   const struct addr *addr, __be16 port)
{
	struct addr *cur = end == SOURCE ? &p->src : &p->dst;
	__be16 *cur_port = end == SOURCE ? &p->sport : &p->dport;
	int has_ports = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP;
	int ports = !(p->flags & PKT_LATER_FRAGMENT) && has_ports && *cur_port != port;
	__u32 sum = l4_checksum(p);
	__wsum diff = addr_diff(cur, addr, p->v6);

	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		__builtin_memcpy(end == SOURCE ? &ip->saddr : &ip->daddr, addr->b, 16);
	} else {
		struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		if (end == SOURCE)
			ip->saddr = addr_v4(addr);
		else
			ip->daddr = addr_v4(addr);
		ip->check = csum_add_diff(ip->check, diff);
	}
	if (ports) {
		__be16 *h = pkt_at(ctx, p->l4, 4);

		if (!h)
			return -DROP_REWRITE;
		h[end == SOURCE ? 0 : 1] = port;
	}
	if (sum && sum_update(ctx, sum, diff, ports ? port_diff(*cur_port, port) : 0, p->proto == IPPROTO_UDP))
		return -DROP_REWRITE;
	*cur = *addr;
	if (has_ports)	/* a later fragment belongs to its flow, too */
		*cur_port = port;
	return NEXT;
}

/* The same, where it is rare. */
RARELY int rewrite_source(ctx_t *ctx, struct pkt *p, struct addr *addr, __be16 port)
{
	if (!p || !addr)
		return -DROP_REWRITE;
	return rewrite(ctx, p, SOURCE, addr, port);
}

RARELY int rewrite_destination(ctx_t *ctx, struct pkt *p, struct addr *addr, __be16 port)
{
	if (!p || !addr)
		return -DROP_REWRITE;
	return rewrite(ctx, p, DESTINATION, addr, port);
}

#endif
