/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Tunnels between the nodes (RFC 7348). The device takes from each packet where it goes. */
#ifndef MOORING_OVERLAY_H
#define MOORING_OVERLAY_H

#include "parse.h"

/* The network identifier (VNI) of the pods' network. */
#define OVERLAY_NETWORK 1
#define OVERLAY_TTL 64

/*
 * All nodes' devices have the same address, so that whatever is sent to the own
 * one is taken by the other (no neighbour to ask for). VXLAN takes a frame from
 * the device's own address for a loop: it is sent from another.
 */
ALWAYS int overlay_sender(ctx_t *ctx)
{
	static const __u8 sender[ETH_ALEN] = { 0x02, 0x6d, 0x6f, 0x6f, 0x72, 0x02 };

	return bpf_skb_store_bytes(ctx, offsetof(struct ethhdr, h_source), sender, ETH_ALEN, 0) ? -DROP_REWRITE : NEXT;
}

ALWAYS int overlay_parse(ctx_t *ctx, struct pkt *p)
{
	struct ethhdr *eth = pkt_at(ctx, 0, sizeof(*eth));

	p->len = ctx->len;
	if (!eth)
		return -DROP_TRUNCATED;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = pkt_at(ctx, ETH_HLEN, sizeof(*ip));

		if (!ip)
			return -DROP_TRUNCATED;
		addr_from_v4(&p->src, ip->saddr);
		addr_from_v4(&p->dst, ip->daddr);
		p->proto = ip->protocol;
		return NEXT;
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = pkt_at(ctx, ETH_HLEN, sizeof(*ip));

		if (!ip)
			return -DROP_TRUNCATED;
		addr_from_v6(&p->src, &ip->saddr);
		addr_from_v6(&p->dst, &ip->daddr);
		p->proto = ip->nexthdr;
		p->v6 = 1;
		return NEXT;
	}
	return -DROP_NO_TUNNEL;
}

ALWAYS struct tunnel *overlay_tunnel(const struct addr *pod)
{
	struct identity_key key = { .prefixlen = 128 };

	__builtin_memcpy(key.addr, pod->b, sizeof(key.addr));
	return bpf_map_lookup_elem(&mooring_tunnels, &key);
}

ALWAYS void overlay_words(__u32 to[4], const struct addr *from)
{
	const __u32 *w = (const __u32 *)from->b;

	to[0] = w[0];
	to[1] = w[1];
	to[2] = w[2];
	to[3] = w[3];
}

/* What a device says by itself: who is there to be asked, which groups it is in. */
ALWAYS int overlay_multicast(const struct pkt *p)
{
	return p->v6 ? p->dst.b[0] == 0xff : (p->dst.b[12] & 0xf0) == 0xe0;
}

ALWAYS int overlay_send(ctx_t *ctx, struct pkt *p)
{
	struct bpf_tunnel_key key = { .tunnel_id = OVERLAY_NETWORK, .tunnel_ttl = OVERLAY_TTL };
	struct tunnel *t = overlay_tunnel(&p->dst);
	__u64 flags = 0;

	if (!t)
		return overlay_multicast(p) ? SWALLOWED : -DROP_NO_TUNNEL;
	if (addr_mapped(&t->remote)) {
		key.remote_ipv4 = bpf_ntohl(addr_v4(&t->remote));
		if (!addr_zero(&t->local))
			key.local_ipv4 = bpf_ntohl(addr_v4(&t->local));
		/* The inner checksums cover all but the VXLAN header (RFC 7348, 5). */
		flags = BPF_F_ZERO_CSUM_TX;
	} else {
		overlay_words(key.remote_ipv6, &t->remote);
		overlay_words(key.local_ipv6, &t->local);
		flags = BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(ctx, &key, sizeof(key), flags))
		return -DROP_NO_TUNNEL;
	return overlay_sender(ctx) ?: TO_STACK;
}

ALWAYS int overlay_check(ctx_t *ctx, struct pkt *p)
{
	struct tunnel *t = overlay_tunnel(&p->src);
	struct bpf_tunnel_key key = {};
	struct addr remote;
	__u32 *w = (__u32 *)remote.b;

	if (!t)
		return -DROP_TUNNEL_SOURCE;
	if (!bpf_skb_get_tunnel_key(ctx, &key, sizeof(key), 0)) {
		addr_from_v4(&remote, bpf_htonl(key.remote_ipv4));
	} else if (!bpf_skb_get_tunnel_key(ctx, &key, sizeof(key), BPF_F_TUNINFO_IPV6)) {
		w[0] = key.remote_ipv6[0];
		w[1] = key.remote_ipv6[1];
		w[2] = key.remote_ipv6[2];
		w[3] = key.remote_ipv6[3];
	} else {
		return -DROP_TUNNEL_SOURCE;
	}
	if (key.tunnel_id != OVERLAY_NETWORK || !addr_eq(&remote, &t->remote))
		return -DROP_TUNNEL_SOURCE;
	return TO_STACK;
}

#endif
