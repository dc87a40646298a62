/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Headers to struct pkt. Nothing behind this reads a header to learn what a packet is. */
#ifndef MOORING_PARSE_H
#define MOORING_PARSE_H

#include "ctx.h"

#define MAX_EXTENSION_HEADERS 6
/* linux/icmp.h pulls in the C library's socket headers, which have no BPF flavour. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PORT_UNREACH 4
#define ICMPV6_PACKET_TOO_BIG 2
#define ICMPV6_TIME_EXCEEDED 3
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129

#define SCTP_HEADER 12 /* RFC 9260, 3.1 */
#define MAX_HEADER_OFFSET 1023
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/*
 * A pointer to len bytes at off, or NULL when the packet is shorter. Only headers
 * that sit outside the linear part pay for a helper.
 */
ALWAYS void *pkt_linear(ctx_t *ctx, __u32 off, __u32 len)
{
	void *end = ctx_ptr(ctx, data_end);
	void *at = ctx_ptr(ctx, data) + off;

	/* One register for the check and the use, or the verifier loses the range (clang 19). */
	asm volatile("" : "+r"(at));
	return at + len <= end ? at : NULL;
}

ALWAYS void *pkt_at(ctx_t *ctx, __u32 off, __u32 len)
{
	void *at;

	/* The verifier wants a bound well below 64 KiB; no header starts beyond. */
	if (off > MAX_HEADER_OFFSET)
		return NULL;
	asm volatile("%0 &= %1" : "+r"(off) : "i"(MAX_HEADER_OFFSET));
	at = pkt_linear(ctx, off, len);
	if (at)
		return at;
	if (ctx_pull(ctx, off + len))
		return NULL;
	return pkt_linear(ctx, off, len);
}

/* A pod tells only what belongs to its own packets. */
ALWAYS int fragment_forged(ctx_t *ctx, const struct pkt *p)
{
	struct endpoint *ep;

	if (p->direction != FROM_ENDPOINT)
		return 0;
	ep = bpf_map_lookup_elem(&mooring_endpoints, &p->src);
	return !ep || ep->ifindex != ctx_ifindex(ctx);
}

/* Later fragments carry no ports: the first one left them in mooring_frags. */
ALWAYS int parse_fragment(ctx_t *ctx, struct pkt *p, __be32 id)
{
	struct frag_key key = { .id = id, .proto = p->proto };
	struct frag *f, ports;

	if (!(p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT)))
		return NEXT;
	key.src = p->src;
	key.dst = p->dst;
	if (p->flags & PKT_FIRST_FRAGMENT) {
		if (fragment_forged(ctx, p))
			return -DROP_SOURCE_ADDRESS;
		ports.sport = p->sport;
		ports.dport = p->dport;
		bpf_map_update_elem(&mooring_frags, &key, &ports, BPF_ANY);
		return NEXT;
	}
	f = bpf_map_lookup_elem(&mooring_frags, &key);
	if (!f)
		return -DROP_FRAGMENT_UNKNOWN;
	p->sport = f->sport;
	p->dport = f->dport;
	return NEXT;
}

ALWAYS int icmp_is_error(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMPV6)
		return type < 128;
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
	       type == ICMP_PARAMETERPROB || type == ICMP_SOURCE_QUENCH;
}

ALWAYS int icmp_is_echo(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMPV6)
		return type == ICMPV6_ECHO_REQUEST || type == ICMPV6_ECHO_REPLY;
	return type == ICMP_ECHO || type == ICMP_ECHOREPLY;
}

ALWAYS int parse_l4(ctx_t *ctx, struct pkt *p, __u32 l4_len)
{
	__u8 *h;

	if (p->flags & PKT_LATER_FRAGMENT)
		return NEXT;
	switch (p->proto) {
	case IPPROTO_TCP: {
		struct tcphdr *tcp;

		if (l4_len < sizeof(*tcp))
			return -DROP_TRUNCATED;
		tcp = pkt_at(ctx, p->l4, sizeof(*tcp));
		if (!tcp)
			return -DROP_TRUNCATED;
		if (tcp->doff < 5 || tcp->doff * 4u > l4_len)
			return -DROP_MALFORMED;
		p->sport = tcp->source;
		p->dport = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
		return NEXT;
	}
	case IPPROTO_UDP: {
		struct udphdr *udp;
		__u32 len;

		if (l4_len < sizeof(*udp))
			return -DROP_TRUNCATED;
		udp = pkt_at(ctx, p->l4, sizeof(*udp));
		if (!udp)
			return -DROP_TRUNCATED;
		len = bpf_ntohs(udp->len);
		if (len && len < sizeof(*udp))
			return -DROP_MALFORMED;
		if (len > l4_len && !(p->flags & PKT_FIRST_FRAGMENT))
			return -DROP_TRUNCATED;
		p->sport = udp->source;
		p->dport = udp->dest;
		return NEXT;
	}
	case IPPROTO_SCTP: {
		__be16 *ports;

		if (l4_len < SCTP_HEADER)
			return -DROP_TRUNCATED;
		ports = pkt_at(ctx, p->l4, SCTP_HEADER);
		if (!ports)
			return -DROP_TRUNCATED;
		p->sport = ports[0];
		p->dport = ports[1];
		return NEXT;
	}
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if ((p->proto == IPPROTO_ICMPV6) != p->v6)
			return -DROP_MALFORMED;
		if (l4_len < 8)
			return -DROP_TRUNCATED;
		h = pkt_at(ctx, p->l4, 8);
		if (!h)
			return -DROP_TRUNCATED;
		p->tcp_flags = h[0];
		if (icmp_is_error(p->proto, h[0]))
			p->flags |= PKT_ICMP_ERROR;
		else if (icmp_is_echo(p->proto, h[0]))
			p->sport = p->dport = *(__be16 *)(h + 4);
		return NEXT;
	}
	return NEXT;
}

ALWAYS int parse_ipv4(ctx_t *ctx, struct pkt *p)
{
	struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));
	__u32 ihl, total;
	__u16 frag;
	__be32 id;
	int ret;

	if (!ip)
		return -DROP_TRUNCATED;
	ihl = ip->ihl * 4u;
	total = bpf_ntohs(ip->tot_len);
	/* 0 where a large GSO packet's length does not fit (BIG TCP): the frame says. */
	if (!total && p->len - p->l3 > 0xffff)
		total = p->len - p->l3;
	if (ip->version != 4 || ihl < sizeof(*ip) || total < ihl)
		return -DROP_MALFORMED;
	if (total + p->l3 > p->len)
		return -DROP_TRUNCATED;
	frag = bpf_ntohs(ip->frag_off);
	if (frag & IP_OFFSET)
		p->flags |= PKT_LATER_FRAGMENT;
	else if (frag & IP_MF)
		p->flags |= PKT_FIRST_FRAGMENT;
	id = ip->id;
	p->proto = ip->protocol;
	p->l4 = p->l3 + ihl;
	addr_from_v4(&p->src, ip->saddr);
	addr_from_v4(&p->dst, ip->daddr);
	ret = parse_l4(ctx, p, total - ihl);
	return ret ?: parse_fragment(ctx, p, id);
}

ALWAYS int parse_ipv6(ctx_t *ctx, struct pkt *p)
{
	struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));
	__u32 off = p->l3 + sizeof(*ip), payload;
	__be32 id = 0;
	__u8 next;
	int ret;

	if (!ip)
		return -DROP_TRUNCATED;
	if (ip->version != 6)
		return -DROP_MALFORMED;
	payload = bpf_ntohs(ip->payload_len);
	/* 0 with a jumbo payload or a large GSO packet (BIG TCP): the frame says. */
	if (!payload)
		payload = p->len - off;
	if (payload + off > p->len)
		return -DROP_TRUNCATED;
	next = ip->nexthdr;
	p->v6 = 1;
	addr_from_v6(&p->src, &ip->saddr);
	addr_from_v6(&p->dst, &ip->daddr);
	/* Never on the wire (RFC 4038, 4.2), and here they mean IPv4. */
	if (addr_mapped(&p->src) || addr_mapped(&p->dst))
		return -DROP_MALFORMED;

	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		__u8 *h;
		__u32 len;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT)
			break;
		if (i == MAX_EXTENSION_HEADERS - 1)
			return -DROP_EXTENSION_HEADERS;
		h = pkt_at(ctx, off, 8);
		if (!h)
			return -DROP_TRUNCATED;
		if (next == IPPROTO_FRAGMENT) {
			__u16 frag = bpf_ntohs(*(__be16 *)(h + 2));

			len = 8;
			if (frag & 0xfff8)
				p->flags |= PKT_LATER_FRAGMENT;
			else if (frag & 1)
				p->flags |= PKT_FIRST_FRAGMENT;
			id = *(__be32 *)(h + 4);
		} else {
			len = (h[1] + 1) * 8u;
		}
		if (len > payload)
			return -DROP_MALFORMED;
		next = h[0];
		payload -= len;
		off += len;
		/* Behind a later fragment's header there are only its bytes. */
		if (p->flags & PKT_LATER_FRAGMENT)
			break;
	}
	p->proto = next;
	p->l4 = off;
	ret = parse_l4(ctx, p, payload);
	return ret ?: parse_fragment(ctx, p, id);
}

/*
 * ARP and IPv6's neighbour and multicast listener discovery are the stack's. A
 * pod speaks them on its own link only: elsewhere its packets are as any others.
 */
ALWAYS int parse_link_local(struct pkt *p)
{
	__u16 scope = bpf_ntohs(*(__be16 *)p->dst.b);

	if (p->direction == FROM_ENDPOINT && scope >> 8 != 0xff && (scope & 0xffc0) != 0xfe80)
		return NEXT;
	if (p->proto == IPPROTO_ICMPV6 &&
	    ((p->tcp_flags >= 130 && p->tcp_flags <= 137) || p->tcp_flags == 143))
		return TO_STACK;
	return NEXT;
}

ALWAYS int pkt_parse(ctx_t *ctx, struct pkt *p)
{
	struct ethhdr *eth;
	int ret;

	p->len = ctx_len(ctx);
	p->l3 = ETH_HLEN;
	if (ctx_tagged(ctx))
		return -DROP_VLAN_TAG;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		return parse_ipv4(ctx, p);
	case bpf_htons(ETH_P_IPV6):
		ret = parse_ipv6(ctx, p);
		return ret ?: parse_link_local(p);
	case bpf_htons(ETH_P_ARP):
		return TO_STACK;
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return -DROP_VLAN_TAG;
	}
	return -DROP_ETHERTYPE;
}

#ifndef MOORING_XDP

/* Where the packet is to, of one that was parsed by another program before. */
ALWAYS int pkt_destination(ctx_t *ctx, struct addr *dst)
{
	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = pkt_at(ctx, ETH_HLEN, sizeof(*ip));

		if (ip)
			addr_from_v4(dst, ip->daddr);
		return !!ip;
	}
	if (ctx->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = pkt_at(ctx, ETH_HLEN, sizeof(*ip));

		if (ip)
			addr_from_v6(dst, &ip->daddr);
		return !!ip;
	}
	return 0;
}

#endif

#endif
