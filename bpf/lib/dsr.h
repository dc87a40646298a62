/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Direct server return: the backend's node answers the client itself, under the
 * frontend's name. It is told that name by the flow's first packet, which travels
 * inside a datagram from this node, and by some of the later ones; all others are
 * only given another destination. What is told is believed of nodes of the cluster.
 */
#ifndef MOORING_DSR_H
#define MOORING_DSR_H

#include "conntrack.h"
#include "forward.h"
#include "policy.h"
#include "snat.h"
#include "tell.h"
#include "way.h"

/* Whether backends on other nodes answer clients beyond the uplinks themselves. */
volatile const __u8 dsr_mode = 0;

struct dsr_v4 {
	struct iphdr ip;
	struct udphdr udp;
	struct dsr_tell tell;
};

struct dsr_v6 {
	struct ipv6hdr ip;
	struct udphdr udp;
	struct dsr_tell tell;
};

_Static_assert(sizeof(struct dsr_v4) == 52 && sizeof(struct dsr_v6) == 72, "no padding");

/* The stack of a program is 512 bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dsr_v6);
} dsr_headers SEC(".maps");

ALWAYS void *dsr_header(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&dsr_headers, &zero);
}

ALWAYS __u32 dsr_overhead(const struct pkt *p)
{
	return p->v6 ? sizeof(struct dsr_v6) : sizeof(struct dsr_v4);
}

/* What is known of an address: enum node_flags. */
ALWAYS __u32 dsr_node(const struct addr *a)
{
	struct identity_key key = { .prefixlen = 8 * sizeof(key.addr) };
	__u32 *flags;

	__builtin_memcpy(key.addr, a->b, sizeof(key.addr));
	flags = bpf_map_lookup_elem(&mooring_nodes, &key);
	return flags ? *flags : 0;
}

/*
 * The client's side of a flow is all that passes here. Its state is as good as that
 * can tell: what the server says to its end is not heard.
 */
ALWAYS void dsr_follow(struct pkt *p, struct ct_entry *e, struct north_way *w)
{
	__u32 now = bpf_jiffies64();
	__u8 state = e->state;

	if (p->proto != IPPROTO_TCP || (p->flags & PKT_LATER_FRAGMENT)) {
		state = CT_ESTABLISHED;
	} else if (p->tcp_flags & TCP_RST) {
		__sync_fetch_and_or(&e->flags, CT_F_RST);
		state = CT_CLOSING;
	} else if (p->tcp_flags & TCP_FIN) {
		state = CT_TIMEWAIT;
	} else if (state == CT_NEW && !(p->tcp_flags & TCP_SYN)) {
		state = CT_ESTABLISHED;
	}
	if (state != e->state)
		e->state = state;
	w->flags = WAY_KNOWN;
	if (tcp_opens(p))
		w->flags |= WAY_TELL | WAY_MUST_TELL;
	else if (now - e->confirmed > jiffies_per_second)
		w->flags |= WAY_TELL;
	if (w->flags & WAY_TELL)
		e->confirmed = now;
	p->flags |= PKT_DSR;
}

/*
 * How full the table may be for one more flow of which only the client is heard. A
 * datagram costs a flood as little as its first one did; for who says that there was a handshake
 * there is room left, and behind that for those of which it is known.
 */
ALWAYS __u64 dsr_room(const struct pkt *p)
{
	return p->proto == IPPROTO_TCP ? ct_direct_limit + ct_direct_limit / 2 : ct_direct_limit;
}

#ifndef MOORING_XDP

/*
 * Cut the packet to what names its flow, with lengths that say so: what is told is
 * not delivered.
 */
ALWAYS int dsr_cut(ctx_t *ctx, struct pkt *p)
{
	__u32 l4_len = p->proto == IPPROTO_TCP ? sizeof(struct tcphdr) : sizeof(struct udphdr);
	__u32 len = p->l4 - p->l3 + l4_len;

	if (bpf_skb_change_tail(ctx, p->l3 + len, 0))
		return -DROP_REWRITE;
	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		ip->payload_len = bpf_htons(len - sizeof(*ip));
	} else {
		struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		ip->check = csum_add_diff(ip->check, port_diff(ip->tot_len, bpf_htons(len)));
		ip->tot_len = bpf_htons(len);
	}
	if (p->proto == IPPROTO_TCP) {
		struct tcphdr *tcp = pkt_at(ctx, p->l4, sizeof(*tcp));

		if (!tcp)
			return -DROP_REWRITE;
		tcp->doff = sizeof(*tcp) / 4;
	} else {
		struct udphdr *udp = pkt_at(ctx, p->l4, sizeof(*udp));

		if (!udp)
			return -DROP_REWRITE;
		udp->len = bpf_htons(sizeof(*udp));
	}
	p->len = p->l3 + len;
	return NEXT;
}

ALWAYS void dsr_write(struct dsr_tell *t, const struct pkt *p, int cut)
{
	t->magic = bpf_htonl(DSR_MAGIC);
	t->port = p->sent_dport;
	t->flags = cut ? DSR_CUT : 0;
	t->pad = 0;
	__builtin_memcpy(t->frontend, p->sent_dst.b, sizeof(t->frontend));
}

/*
 * The UDP checksum, without a look at what is carried: the sum of that is known from
 * its own checksum, be it there yet or left to a device. 0 where there is none that covers all: in IPv4
 * always, in IPv6 for fragments and what was cut (RFC 6935).
 */
ALWAYS __u16 dsr_sum(ctx_t *ctx, const struct pkt *p, const struct dsr_v6 *o, __u32 cut)
{
	struct ipv6hdr *in = pkt_at(ctx, p->l3, sizeof(*in));
	__u64 sum;
	__u16 check;

	if (!in || cut || p->l4 != p->l3 + sizeof(*in))
		return 0;
	sum = csum_words(&o->ip.saddr, 32) + o->udp.len + bpf_htons(IPPROTO_UDP);
	sum += csum_words(&o->udp, sizeof(o->udp)) + csum_words(&o->tell, sizeof(o->tell)) + csum_words(in, sizeof(*in));
	sum += (__u16)~sum_fold(csum_words(&in->saddr, 32) + in->payload_len + bpf_htons(p->proto));
	check = ~sum_fold(sum);
	return check ?: 0xffff;
}

/* Put the datagram's headers in front of the packet, from this node to the backend. */
RARELY int dsr_wrap(ctx_t *ctx, struct pkt *p, struct addr *from, __u32 cut)
{
	void *h = dsr_header();
	__u32 inner;
	int ret;

	if (!p || !from || !h)
		return -DROP_REWRITE;
	if (cut) {
		ret = dsr_cut(ctx, p);
		if (ret)
			return ret;
	}
	inner = p->len - p->l3;
	if (p->v6) {
		struct dsr_v6 *o = h;

		__builtin_memset(o, 0, sizeof(*o));
		o->ip.version = 6;
		o->ip.payload_len = bpf_htons(sizeof(*o) - sizeof(o->ip) + inner);
		o->ip.nexthdr = IPPROTO_UDP;
		o->ip.hop_limit = DSR_TTL;
		__builtin_memcpy(&o->ip.saddr, from->b, 16);
		__builtin_memcpy(&o->ip.daddr, p->dst.b, 16);
		o->udp.source = o->udp.dest = bpf_htons(DSR_PORT);
		o->udp.len = o->ip.payload_len;
		dsr_write(&o->tell, p, cut);
		o->udp.check = dsr_sum(ctx, p, o, cut);
	} else {
		struct dsr_v4 *o = h;

		__builtin_memset(o, 0, sizeof(*o));
		o->ip.version = 4;
		o->ip.ihl = sizeof(o->ip) / 4;
		o->ip.tot_len = bpf_htons(sizeof(*o) + inner);
		o->ip.ttl = DSR_TTL;
		o->ip.protocol = IPPROTO_UDP;
		o->ip.saddr = addr_v4(from);
		o->ip.daddr = addr_v4(&p->dst);
		o->ip.check = ~sum_fold(csum_words(&o->ip, sizeof(o->ip)));
		o->udp.source = o->udp.dest = bpf_htons(DSR_PORT);
		o->udp.len = bpf_htons(sizeof(*o) - sizeof(o->ip) + inner);
		dsr_write(&o->tell, p, cut);
	}
	if (bpf_skb_adjust_room(ctx, dsr_overhead(p), BPF_ADJ_ROOM_MAC, 0))
		return -DROP_REWRITE;
	ret = p->v6 ? bpf_skb_store_bytes(ctx, ETH_HLEN, h, sizeof(struct dsr_v6), 0)
		    : bpf_skb_store_bytes(ctx, ETH_HLEN, h, sizeof(struct dsr_v4), 0);
	return ret ? -DROP_REWRITE : NEXT;
}

/* A client's packet to a backend whose node answers by itself. */
RARELY int dsr_forward(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	struct addr *from;
	__u32 ifindex, tell, cut = 0, mark;
	int ret;

	if (!p || !w)
		return -DROP_NO_BACKEND;
	ret = wire_refused(wire_route(ctx, p, &w->to));
	if (ret)
		return ret;
	ifindex = wire_ifindex();
	tell = w->flags & WAY_TELL;
	if (tell && wire_route_len(ctx, p, &w->to, p->len - p->l3 + dsr_overhead(p)) == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		/* What need not be told again is told with a shorter one; a later fragment names no flow. */
		if (!(w->flags & WAY_MUST_TELL) || ctx->mark == DSR_MARK || (p->flags & PKT_LATER_FRAGMENT)) {
			tell = 0;
		} else {
			/* Told first, and without its contents; the packet comes by once more, known now. */
			mark = ctx->mark;
			ctx->mark = DSR_MARK;
			if (bpf_clone_redirect(ctx, ctx->ifindex, BPF_F_INGRESS))
				return -DROP_TOO_BIG;
			ctx->mark = mark;
			cut = 1;
		}
	}
	if (ctx->mark == DSR_MARK)
		ctx->mark = 0;
	from = tell ? snat_address(ifindex, p->v6) : NULL;
	if (tell && !from)
		return -DROP_NO_ROUTE;
	ret = way_take(ctx, p, w) ?: hop(ctx, p);
	if (ret)
		return ret;
	if (tell) {
		ret = dsr_wrap(ctx, p, from, cut);
		if (ret)
			return ret;
	}
	p->to_ifindex = ifindex;
	return TO_NEIGHBOUR;
}

/*
 * Take the headers off again, and remember what they say in the way of the packet.
 * Returns NEXT with w->flags 0 for what is somebody else's datagram.
 */
RARELY int dsr_unwrap(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	struct dsr_tell *t;
	struct addr key;

	if (!p || !w)
		return -DROP_DSR_OPTION;
	w->flags = 0;
	key = p->dst;
	if (!bpf_map_lookup_elem(&mooring_endpoints, &key) && !bpf_map_lookup_elem(&mooring_node_addresses, &key))
		return NEXT;
	t = pkt_at(ctx, p->l4 + sizeof(struct udphdr), sizeof(*t));
	if (!t || t->magic != bpf_htonl(DSR_MAGIC))
		return NEXT;
	__builtin_memcpy(w->from.b, t->frontend, sizeof(t->frontend));
	w->from_port = t->port;
	w->to = p->dst;
	w->flags = WAY_TELL | (t->flags & DSR_CUT ? WAY_CUT : 0);
	key = p->src;
	if (!(dsr_node(&key) & NODE_ITSELF) || bpf_map_lookup_elem(&mooring_node_addresses, &key))
		return -DROP_DSR_OPTION;
	if (!w->from_port || addr_zero(&w->from) || addr_mapped(&w->from) == p->v6 ||
	    p->l4 - p->l3 + sizeof(struct udphdr) + sizeof(*t) != dsr_overhead(p))
		return -DROP_DSR_OPTION;
	if (bpf_skb_adjust_room(ctx, -(__s32)dsr_overhead(p), BPF_ADJ_ROOM_MAC, 0))
		return -DROP_DSR_OPTION;
	__builtin_memset(p, 0, sizeof(*p));
	p->direction = FROM_WIRE;
	return NEXT;
}

/* A packet that was told with: its flow's answers get the frontend's name, whatever the table had of it. */
ALWAYS int dsr_learn(struct pkt *p, const struct north_way *w)
{
	struct ct_entry *e;

	ct_keep(p);
	p->sent_dst = w->from;
	p->sent_dport = w->from_port;
	p->flags |= PKT_DSR;
	ct_lookup(p);
	e = p->flow;
	if (!e || (e->nat_port == w->from_port && addr_eq(&e->nat, &w->from)))
		return NEXT;
	/* By another frontend, or of the pod's making: its answers cannot have two names. */
	if ((p->flags & PKT_REPLY) || !addr_zero(&e->nat) || !addr_zero(&e->origin))
		return -DROP_TUPLE_COLLISION;
	/* Begun without, when what was told had been lost. */
	e->nat_port = w->from_port;
	e->nat = w->from;
	__sync_fetch_and_or(&e->flags, CT_F_DSR);
	return NEXT;
}

#endif

#endif
