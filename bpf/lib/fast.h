/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ordinary packet at the driver: TCP or UDP right behind a plain IP header.
 * Everything else is left to tc as it came, which knows how to deal with it.
 */
#ifndef MOORING_FAST_H
#define MOORING_FAST_H

#include "north.h"
#include "meta.h"

/* The device's own address: what is to another is not for us. */
volatile const __u8 wire_mac[6] = {};

ALWAYS int fast_for_us(const struct ethhdr *eth)
{
	const __u16 *a = (const __u16 *)eth->h_dest;
	volatile const __u16 *b = (volatile const __u16 *)wire_mac;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

/*
 * The sender of a packet that never was on a wire, as on a veth, leaves the sum
 * to a device: the packet holds that of the pseudo header, and nothing here says so
 * but the sum itself. One packet in 65,536 has it by chance, and takes the long way too.
 */
ALWAYS int fast_partial(const struct pkt *p, __u16 check, __u32 len)
{
	__u64 sum = (__u64)bpf_htons(len) + bpf_htons(p->proto);
	const __u32 *s = (const __u32 *)p->src.b, *d = (const __u32 *)p->dst.b;

	sum += (__u64)s[3] + d[3];
	if (p->v6)
		sum += (__u64)s[0] + s[1] + s[2] + d[0] + d[1] + d[2];
	return sum_fold(sum) == check;
}

/* Headers to p, or 0 for what is not the ordinary packet to somebody who services concern. */
ALWAYS int fast_parse(ctx_t *ctx, struct pkt *p)
{
	void *data = ctx_ptr(ctx, data), *end = ctx_ptr(ctx, data_end);
	struct ethhdr *eth = data;
	__u32 payload;
	__u16 check;

	p->l3 = ETH_HLEN;
	p->len = end - data;
	if (data + ETH_HLEN + sizeof(struct iphdr) > end || !fast_for_us(eth))
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;

		if (ip->version != 4 || ip->ihl != 5 || (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET)) || ip->ttl <= 1)
			return 0;
		addr_from_v4(&p->src, ip->saddr);
		addr_from_v4(&p->dst, ip->daddr);
		p->proto = ip->protocol;
		p->l4 = ETH_HLEN + sizeof(*ip);
		payload = bpf_ntohs(ip->tot_len) - sizeof(*ip);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->version != 6 || ip->hop_limit <= 1)
			return 0;
		addr_from_v6(&p->src, &ip->saddr);
		addr_from_v6(&p->dst, &ip->daddr);
		if (addr_mapped(&p->src) || addr_mapped(&p->dst))
			return 0;
		p->v6 = 1;
		p->proto = ip->nexthdr;
		p->l4 = ETH_HLEN + sizeof(*ip);
		payload = bpf_ntohs(ip->payload_len);
	} else {
		return 0;
	}
	if (!north_door(&p->dst))
		return 0;
	/* More than the header says is padding; less is in other buffers, or nowhere. */
	if (payload > 0xffff || p->l4 + payload > p->len)
		return 0;
	if (p->proto == IPPROTO_TCP) {
		struct tcphdr *tcp = pkt_linear(ctx, p->l4, sizeof(*tcp));

		if (!tcp || tcp->doff < 5 || tcp->doff * 4u > payload)
			return 0;
		p->sport = tcp->source;
		p->dport = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
		check = tcp->check;
	} else if (p->proto == IPPROTO_UDP) {
		struct udphdr *udp = pkt_linear(ctx, p->l4, sizeof(*udp));

		if (!udp || bpf_ntohs(udp->len) < sizeof(*udp) || bpf_ntohs(udp->len) > payload)
			return 0;
		p->sport = udp->source;
		p->dport = udp->dest;
		check = udp->check;
	} else {
		return 0;
	}
	return !fast_partial(p, check, payload);
}

/* Room to tell tc which pod it is for, before anything is changed. */
ALWAYS int fast_to_pod(ctx_t *ctx, struct pkt *p, const struct addr *pod, struct wire_meta *to)
{
	struct addr key = *pod;
	struct endpoint *ep = bpf_map_lookup_elem(&mooring_endpoints, &key);

	if (!ep)
		return 0;
	p->to_id = ep->id;
	p->to_ifindex = ep->ifindex;
	to->magic = WIRE_META;
	to->ifindex = ep->ifindex;
	to->limits = ep->limits & LIMIT_IN;
	__builtin_memcpy(to->mac, ep->mac, ETH_ALEN);
	__builtin_memcpy(to->host_mac, ep->host_mac, ETH_ALEN);
	return meta_reserve(ctx);
}

/* The way out is by the same device, to a neighbour that is known. */
ALWAYS int fast_to_wire(ctx_t *ctx, struct pkt *p, struct north_way *w, __u32 routed)
{
	return (routed || wire_route(ctx, p, &w->to) == BPF_FIB_LKUP_RET_SUCCESS) && wire_ifindex() == ctx_ifindex(ctx);
}

ALWAYS int fast_leave(ctx_t *ctx, struct pkt *p)
{
	struct bpf_fib_lookup *fib = wire_fib();
	struct ethhdr *eth = pkt_linear(ctx, 0, sizeof(*eth));

	if (!fib || !eth)
		return -DROP_REWRITE;
	__builtin_memcpy(eth->h_dest, fib->dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib->smac, ETH_ALEN);
	return TO_NEIGHBOUR;
}

/* What tc is told goes in front of the packet when all else is done. */
ALWAYS int fast_tell(ctx_t *ctx, const struct wire_meta *to)
{
	struct ethhdr *eth = pkt_linear(ctx, 0, sizeof(*eth));
	struct wire_meta *m = meta_at(ctx);

	if (!m || !eth)
		return -DROP_REWRITE;
	*m = *to;
	meta_seal(eth);
	return TO_POD;
}

/* A client's packet: as north_forward(), with the way out known before the packet is changed. */
ALWAYS int fast_forward(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	__u32 known = w->flags & (WAY_KNOWN | WAY_MADE), snat = p->flags & PKT_SNAT;
	struct wire_meta to;
	int ret;

	if (!(snat ? fast_to_wire(ctx, p, w, w->flags & WAY_ROUTED) : fast_to_pod(ctx, p, &w->to, &to)))
		return TO_STACK;
	ret = way_take(ctx, p, w) ?: hop(ctx, p);
	if (ret)
		return -DROP_REWRITE;
	if (!known) {
		ret = north_account(p, w);
		if (ret)
			return ret;
	}
	return snat ? fast_leave(ctx, p) : fast_tell(ctx, &to);
}

/* An answer: as north_backward(). */
ALWAYS int fast_backward(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	struct wire_meta to;
	struct ct_entry *e;
	int ret, snat;

	if (!north_awaited(p))
		return TO_STACK;
	ct_lookup(p);
	e = p->flow;
	if (!e || !north_answer(p, w))
		return TO_STACK;
	snat = !addr_zero(&e->origin);
	if (!(snat ? fast_to_wire(ctx, p, w, 0) : fast_to_pod(ctx, p, &w->to, &to)))
		return TO_STACK;
	p->flow = e;	/* which the verifier forgot over the call */
	ret = policy_check(p) ?: way_take(ctx, p, w) ?: hop(ctx, p) ?: ct_commit(p);
	if (ret)
		return ret < 0 ? ret : -DROP_REWRITE;
	return snat ? fast_leave(ctx, p) : fast_tell(ctx, &to);
}

/* A new flow, where there is nothing to be said to its client but by tc. */
RARELY int fast_open(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	int ret;

	if (!p || !w)
		return TO_STACK;
	ret = north_begin(ctx, p, w);
	return ret == -DROP_NO_BACKEND || ret == -DROP_NO_PORT || ret == -DROP_TOO_BIG ? TO_STACK : ret;
}

#endif
