/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP errors: translating those about a translated flow (RFC 5508, 4.2; RFC
 * 4443), and refusing what no service answers.
 */
#ifndef MOORING_ICMP_H
#define MOORING_ICMP_H

#include "config.h"
#include "conntrack.h"
#include "policy.h"
#include "rewrite.h"
#include "wire.h"

/* The packet that an ICMP error quotes, as far as it is quoted: RFC 792 promises 8 bytes of layer 4. */
ALWAYS int icmp_parse_quoted(ctx_t *ctx, const struct pkt *p, struct pkt *in)
{
	__be16 *ports;

	in->l3 = p->l4 + 8;
	in->v6 = p->v6;
	in->len = p->len;
	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, in->l3, sizeof(*ip));

		if (!ip || ip->version != 6)
			return -DROP_MALFORMED;
		addr_from_v6(&in->src, &ip->saddr);
		addr_from_v6(&in->dst, &ip->daddr);
		in->proto = ip->nexthdr;
		in->l4 = in->l3 + sizeof(*ip);
	} else {
		struct iphdr *ip = pkt_at(ctx, in->l3, sizeof(*ip));
		__u32 ihl;

		if (!ip)
			return -DROP_MALFORMED;
		ihl = ip->ihl * 4u;
		if (ip->version != 4 || ihl < sizeof(*ip))
			return -DROP_MALFORMED;
		addr_from_v4(&in->src, ip->saddr);
		addr_from_v4(&in->dst, ip->daddr);
		in->proto = ip->protocol;
		in->l4 = in->l3 + ihl;
	}
	ports = pkt_at(ctx, in->l4, 8);
	if (!ports)
		return -DROP_TRUNCATED;
	if (in->proto == IPPROTO_TCP || in->proto == IPPROTO_UDP || in->proto == IPPROTO_SCTP) {
		in->sport = ports[0];
		in->dport = ports[1];
	} else if (in->proto == IPPROTO_ICMP || in->proto == IPPROTO_ICMPV6) {
		in->sport = in->dport = ports[2];
	}
	return NEXT;
}

/*
 * Give the quoted packet another source or destination. Its own layer 4
 * checksum is left as it was sent: receivers match on addresses and ports
 * (RFC 5927, 4.1), and for TCP it is mostly beyond the quote.
 */
ALWAYS int icmp_rewrite_quoted(ctx_t *ctx, const struct pkt *p, struct pkt *in,
			       enum rewrite_end end, const struct addr *addr, __be16 port)
{
	struct addr *cur = end == SOURCE ? &in->src : &in->dst;
	__be16 cur_port = end == SOURCE ? in->sport : in->dport;
	__wsum diff = addr_diff(cur, addr, p->v6);
	__u32 sum = p->l4 + 2;
	int ports = (in->proto == IPPROTO_TCP || in->proto == IPPROTO_UDP) && cur_port != port;

	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, in->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		__builtin_memcpy(end == SOURCE ? &ip->saddr : &ip->daddr, addr->b, 16);
	} else {
		struct iphdr *ip = pkt_at(ctx, in->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		if (end == SOURCE)
			ip->saddr = addr_v4(addr);
		else
			ip->daddr = addr_v4(addr);
		/* The header's own checksum takes up the change: the ICMP sum stays. */
		ip->check = csum_add_diff(ip->check, diff);
	}
	if (ports) {
		__be16 *h = pkt_at(ctx, in->l4, 4);

		if (!h)
			return -DROP_REWRITE;
		h[end == SOURCE ? 0 : 1] = port;
	}
	return sum_update(ctx, sum, 0, sum_fold((__u64)(p->v6 ? diff : 0) + (ports ? port_diff(cur_port, port) : 0)), 0);
}

/* The quoted packet: the stack has no room for two. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pkt);
} icmp_quoted SEC(".maps");

/*
 * About a reply as the client received it, from the frontend. A pod that is its
 * own backend knows the client by its alias, one of another node by this one's address.
 */
ALWAYS int icmp_translate_svc(ctx_t *ctx, struct pkt *p, struct pkt *in, const struct ct_entry *e)
{
	struct addr nat = e->nat, frontend = in->src, client = in->dst, alias;
	__be16 nat_port = e->nat_port;
	int ret = icmp_rewrite_quoted(ctx, p, in, SOURCE, &nat, nat_port);

	if (ret || !addr_eq(&p->dst, &frontend))
		return ret;
	ret = rewrite_destination(ctx, p, &nat, 0);
	if (ret)
		return ret;
	if (!addr_zero(&e->origin)) {
		/* The backend knows the client by this node's name. */
		alias = e->origin;
		ret = icmp_rewrite_quoted(ctx, p, in, DESTINATION, &alias, e->origin_port);
		return ret || !addr_eq(&p->src, &client) ? ret : rewrite_source(ctx, p, &alias, 0);
	}
	if (!addr_eq(&nat, &client))
		return NEXT;
	alias = p->v6 ? *(struct addr *)&hairpin_v6 : *(struct addr *)&hairpin_v4;
	ret = icmp_rewrite_quoted(ctx, p, in, DESTINATION, &alias, in->dport);
	return ret ?: rewrite_source(ctx, p, &alias, 0);
}

/* No packet leaves for a service's address: nobody has it. */
ALWAYS int icmp_related(const struct pkt *p)
{
	struct svc_key key = { .addr = p->dst };

	return bpf_map_lookup_elem(&mooring_services, &key) ? -DROP_ICMP_UNRELATED : NEXT;
}

/* An ICMP error travels against the packet it quotes: both get the names its receiver knows. */
RARELY int icmp_translate(ctx_t *ctx, struct pkt *p)
{
	__u32 zero = 0;
	struct pkt *in = bpf_map_lookup_elem(&icmp_quoted, &zero);
	struct addr nat, origin, quoted_dst;
	struct ct_entry *e;
	struct ct_key key;
	__be16 nat_port, origin_port;
	int ret;

	if (!p || !in)
		return -DROP_MALFORMED;
	__builtin_memset(in, 0, sizeof(*in));
	if (p->flags & PKT_LATER_FRAGMENT) {
		p->flags |= PKT_STRAY;
		return NEXT;
	}
	ret = icmp_parse_quoted(ctx, p, in);
	if (ret)
		return ret;

	e = ct_find(in);
	if (e) {
		nat = e->nat;
		nat_port = e->nat_port;
		origin = e->origin;
		origin_port = e->origin_port;
		if (in->flags & PKT_REPLY)	/* about a reply: the receiver is the responder, who knows its own name */
			return icmp_related(p);
		quoted_dst = in->dst;
		if (!addr_zero(&nat)) {
			ret = icmp_rewrite_quoted(ctx, p, in, DESTINATION, &nat, nat_port);
			if (!ret && addr_eq(&p->src, &quoted_dst)) {
				ret = rewrite_source(ctx, p, &nat, 0);
				p->flags |= PKT_RENAMED;
			}
			if (ret)
				return ret;
		}
		if (!addr_zero(&origin)) {
			ret = icmp_rewrite_quoted(ctx, p, in, SOURCE, &origin, origin_port);
			if (!ret)
				ret = rewrite_destination(ctx, p, &origin, 0);
		}
		return ret ?: icmp_related(p);
	}

	key.addr[0] = in->dst;
	key.addr[1] = in->src;
	key.port[0] = in->dport;
	key.port[1] = in->sport;
	key.proto = in->proto;
	key.type = CT_SVC;
	key.pad = 0;
	e = ct_at(&key);
	if (!e) {
		p->flags |= PKT_STRAY;
		return icmp_related(p);
	}
	return icmp_translate_svc(ctx, p, in, e) ?: icmp_related(p);
}

ALWAYS void swap_macs(struct ethhdr *eth)
{
	__u8 mac[ETH_ALEN];

	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
}

ALWAYS __u16 csum_fold(__u64 sum)
{
	return ~sum_fold(sum);
}

/* Bytes behind the IP header, extension headers counted. */
ALWAYS __u32 l3_payload(ctx_t *ctx, const struct pkt *p)
{
	void *l3 = pkt_at(ctx, p->l3, sizeof(struct iphdr));

	if (!l3)
		return 0;
	if (p->v6)
		return bpf_ntohs(((struct ipv6hdr *)l3)->payload_len) ?: p->len - p->l3 - sizeof(struct ipv6hdr);
	return (bpf_ntohs(((struct iphdr *)l3)->tot_len) ?: p->len - p->l3) - ((struct iphdr *)l3)->ihl * 4u;
}

/* Turn a SYN (or what else came) into its reset: RFC 9293, 3.5.2. */
RARELY int refuse_tcp(ctx_t *ctx, struct pkt *p)
{
	__u32 l3_len, len;
	__be32 seq, ack;
	__u32 payload;
	struct {
		__be16 source, dest;
		__be32 seq, ack;
		__u8 doff, flags;
		__be16 window;
		__u16 check, urgent;
	} rst = {};
	struct ethhdr *eth;
	struct tcphdr *tcp;
	void *l3;
	__u64 sum;

	if (!p)
		return SWALLOWED;
	l3_len = p->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	len = p->l3 + l3_len + sizeof(rst);
	if ((p->tcp_flags & TCP_RST) || p->l4 != p->l3 + l3_len || (p->flags & PKT_LATER_FRAGMENT))
		return SWALLOWED;
	/* What the header says: a short frame is padded. */
	payload = l3_payload(ctx, p);
	tcp = pkt_at(ctx, p->l3 + l3_len, sizeof(*tcp));
	if (!tcp)
		return SWALLOWED;
	seq = tcp->seq;
	ack = tcp->ack_seq;
	payload -= tcp->doff * 4u;
	rst.source = p->dport;
	rst.dest = p->sport;
	rst.doff = sizeof(rst) / 4 << 4;
	rst.flags = TCP_RST;
	if (p->tcp_flags & TCP_ACK) {
		rst.seq = ack;
	} else {
		rst.flags |= TCP_ACK;
		rst.ack = bpf_htonl(bpf_ntohl(seq) + payload +
				    !!(p->tcp_flags & TCP_SYN) + !!(p->tcp_flags & TCP_FIN));
	}
	sum = csum_words(p->src.b, 16) + csum_words(p->dst.b, 16) + csum_words(&rst, sizeof(rst)) +
	      bpf_htonl(sizeof(rst)) + bpf_htonl(IPPROTO_TCP);
	/* A mapped IPv4 address adds ffff twice over, which is zero in one's complement. */
	rst.check = csum_fold(sum);

	if (bpf_skb_change_tail(ctx, len, 0))
		return -DROP_REWRITE;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_REWRITE;
	swap_macs(eth);
	l3 = pkt_at(ctx, p->l3, sizeof(struct iphdr));
	if (!l3)
		return -DROP_REWRITE;
	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		ip->payload_len = bpf_htons(sizeof(rst));
		ip->hop_limit = 64;
		__builtin_memcpy(&ip->saddr, p->dst.b, 16);
		__builtin_memcpy(&ip->daddr, p->src.b, 16);
	} else {
		struct iphdr *ip = l3;

		ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(rst));
		ip->ttl = 64;
		ip->frag_off = bpf_htons(0x4000);
		ip->saddr = addr_v4(&p->dst);
		ip->daddr = addr_v4(&p->src);
		ip->check = 0;
		ip->check = csum_fold(csum_words(ip, sizeof(*ip)));
	}
	if (bpf_skb_store_bytes(ctx, p->l3 + l3_len, &rst, sizeof(rst), 0))
		return -DROP_REWRITE;
	return TO_SENDER;
}

/* Instead of an MTU: the packet has no hop left. */
#define REFUSE_HOPS (~0u)

/*
 * RFC 792 type 3 code 3 / RFC 4443 type 1 code 4, quoting the header and 8 bytes, of TCP 20;
 * with an MTU what says that the packet is longer (type 3 code 4, type 2), or that its time is exceeded (type 11, type 3).
 */
RARELY int refuse_unreachable(ctx_t *ctx, struct pkt *p, __u32 mtu)
{
	__u32 l3_len, l4_len, quoted;
	__u8 icmp[8] = {};
	struct ethhdr *eth;
	__u8 *q;
	__u64 sum;

	if (!p)
		return SWALLOWED;
	l3_len = p->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	/* No shorter than what the sum is still to be filled in of, which the kernel does not cut. */
	l4_len = p->proto == IPPROTO_TCP ? sizeof(struct tcphdr) : 8;
	quoted = l3_len + l4_len;
	if (p->l4 != p->l3 + l3_len || (p->flags & PKT_LATER_FRAGMENT))
		return SWALLOWED;
	if (bpf_skb_change_tail(ctx, p->l3 + quoted, 0))
		return -DROP_REWRITE;
	if (bpf_skb_adjust_room(ctx, l3_len + 8, BPF_ADJ_ROOM_MAC, 0))
		return -DROP_REWRITE;
	icmp[0] = p->v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
	icmp[1] = p->v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
	if (mtu == REFUSE_HOPS) {
		icmp[0] = p->v6 ? ICMPV6_TIME_EXCEEDED : ICMP_TIME_EXCEEDED;
		icmp[1] = 0;
	} else if (mtu) {
		icmp[0] = p->v6 ? ICMPV6_PACKET_TOO_BIG : ICMP_DEST_UNREACH;
		icmp[1] = p->v6 ? 0 : ICMP_FRAG_NEEDED;
		/* 32 bits of RFC 4443, 3.2, and of RFC 1191, 4, where the first half is zero. */
		*(__be32 *)(icmp + 4) = bpf_htonl(mtu);
	}
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_REWRITE;
	swap_macs(eth);
	if (p->v6) {
		struct ipv6hdr ip = {
			.version = 6,
			.payload_len = bpf_htons(8 + sizeof(ip) + l4_len),
			.nexthdr = IPPROTO_ICMPV6,
			.hop_limit = 64,
		};

		__builtin_memcpy(&ip.saddr, p->dst.b, 16);
		__builtin_memcpy(&ip.daddr, p->src.b, 16);
		q = pkt_at(ctx, p->l3 + sizeof(ip) + 8, sizeof(ip) + 8);
		if (!q)
			return -DROP_REWRITE;
		sum = csum_words(q, sizeof(ip) + 8) + csum_words(icmp, 8) +
		      csum_words(p->src.b, 16) + csum_words(p->dst.b, 16) +
		      bpf_htonl(8 + sizeof(ip) + l4_len) + bpf_htonl(IPPROTO_ICMPV6);
		if (l4_len > 8) {
			q = pkt_at(ctx, p->l3 + sizeof(ip) + 8 + sizeof(ip) + 8, sizeof(struct tcphdr) - 8);
			if (!q)
				return -DROP_REWRITE;
			sum += csum_words(q, sizeof(struct tcphdr) - 8);
		}
		*(__u16 *)(icmp + 2) = csum_fold(sum);
		if (bpf_skb_store_bytes(ctx, p->l3, &ip, sizeof(ip), 0) ||
		    bpf_skb_store_bytes(ctx, p->l3 + sizeof(ip), icmp, sizeof(icmp), 0))
			return -DROP_REWRITE;
	} else {
		struct iphdr ip = {
			.version = 4,
			.ihl = 5,
			.tot_len = bpf_htons(2 * sizeof(ip) + 8 + l4_len),
			.ttl = 64,
			.protocol = IPPROTO_ICMP,
			.saddr = addr_v4(&p->dst),
			.daddr = addr_v4(&p->src),
		};

		ip.check = csum_fold(csum_words(&ip, sizeof(ip)));
		q = pkt_at(ctx, p->l3 + sizeof(ip) + 8, sizeof(ip) + 8);
		if (!q)
			return -DROP_REWRITE;
		sum = csum_words(q, sizeof(ip) + 8) + csum_words(icmp, 8);
		if (l4_len > 8) {
			q = pkt_at(ctx, p->l3 + sizeof(ip) + 8 + sizeof(ip) + 8, sizeof(struct tcphdr) - 8);
			if (!q)
				return -DROP_REWRITE;
			sum += csum_words(q, sizeof(struct tcphdr) - 8);
		}
		*(__u16 *)(icmp + 2) = csum_fold(sum);
		if (bpf_skb_store_bytes(ctx, p->l3, &ip, sizeof(ip), 0) ||
		    bpf_skb_store_bytes(ctx, p->l3 + sizeof(ip), icmp, sizeof(icmp), 0))
			return -DROP_REWRITE;
	}
	return TO_SENDER;
}

/* Errors have no flow of their own. */
ALWAYS int is_icmp_error(const struct pkt *p)
{
	return p->flags & PKT_ICMP_ERROR;
}

/* Nobody answers here, or by here: say so at once instead of letting the client time out. */
ALWAYS int refuse(ctx_t *ctx, struct pkt *p, int verdict)
{
	__u32 mtu = 0;

	if (verdict == -DROP_TOO_BIG)
		mtu = wire_mtu();
	else if (verdict == -DROP_HOP_LIMIT)
		mtu = REFUSE_HOPS;
	else if (verdict != -DROP_NO_BACKEND && verdict != -DROP_NO_PORT)
		return verdict;
	count_drop(p, -verdict);
	if (!mtu && p->proto == IPPROTO_TCP)
		return refuse_tcp(ctx, p);
	return refuse_unreachable(ctx, p, mtu);
}

#endif
