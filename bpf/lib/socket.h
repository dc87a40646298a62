/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A pod's socket holds its flows: tc programs see the socket of what a pod sends.
 * It knows the keys of their entries, so that they end with it (sock.c), and what
 * to do with the next packet of its first flow, so that it needs no table.
 */
#ifndef MOORING_SOCKET_H
#define MOORING_SOCKET_H

#include "conntrack.h"
#include "endpoint.h"
#include "forward.h"

#ifdef MOORING_XDP

/* The driver's frames have no socket. */
ALWAYS int socket_last_words(ctx_t *ctx, struct pkt *p)
{
	return 0;
}

ALWAYS __u64 socket_decided(ctx_t *ctx, struct pkt *p)
{
	return 0;
}

ALWAYS int socket_decision(ctx_t *ctx, struct pkt *p)
{
	return 0;
}

ALWAYS int socket_restore(ctx_t *ctx, struct pkt *p, __u32 to_frontend)
{
	return 0;
}

#else

/* net/tcp_states.h; UDP sockets are in CLOSE unless they are connected. */
#define SK_ESTABLISHED 1
#define SK_SYN_SENT 2
#define SK_TIME_WAIT 6
#define SK_CLOSE 7
#define SK_LISTEN 10

/*
 * Whether the table is to have news of a flow that its socket has by heart: every second,
 * but where nothing expires without, only of one that sends much. For one that sends now
 * and then the look-ups, in memory that is cold by then, would cost more than all the rest.
 */
ALWAYS int socket_news(const struct socket_cache *c)
{
	__u64 age = bpf_jiffies64() - c->synced;

	if (age <= jiffies_per_second)
		return 0;
	return !c->held || !(c->packets & 15) || age > 30 * jiffies_per_second;
}

ALWAYS int same_mac(const __u8 *a, const __u8 *b)
{
	return *(__u32 *)a == *(__u32 *)b && *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

ALWAYS int socket_sent(const struct socket_cache *c, const struct pkt *p)
{
	return addr_eq(&c->src, &p->src) && addr_eq(&c->dst, &p->dst) &&
	       c->sport == p->sport && c->dport == p->dport && c->proto == p->proto;
}

/* Bring what the table says of the socket's first flow up to date. Returns 1 when the table has lost it. */
RARELY int socket_sync(struct socket_state *s)
{
	struct ct_entry *e, *svc;
	struct ct_key key;
	__u64 now = bpf_jiffies64();
	__u8 side;

	if (!s)
		return 1;
	s->cache.synced = now;
	side = s->flow[0].side & 1;
	key = s->flow[0].key;
	e = bpf_map_lookup_elem(&mooring_ct, &key);
	if (!e || (hook_mode != HOOK_OFF && e->cookie[side] != s->cookie))
		return 1;
	e->packets[side] = s->cache.packets;
	e->bytes[side] = s->cache.bytes;
	e->seen = now;
	if (side || !ct_has_decision(e))
		return 0;
	ct_svc_key_of_flow(&key, &s->flow[0].key, e);
	svc = ct_at(&key);
	if (svc && svc->backend == e->backend) {
		svc->packets[0] = s->cache.packets;
		svc->bytes[0] = s->cache.bytes;
		svc->seen = now;
	}
	return 0;
}

/* Change the packet as its socket knows. */
ALWAYS int socket_rewrite(ctx_t *ctx, struct pkt *p, const struct socket_cache *c)
{
	__u32 sum = l4_checksum(p);
	__be16 *ports;

	if (p->v6) {
		struct ipv6hdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		__builtin_memcpy(&ip->saddr, c->to_src.b, 16);
		__builtin_memcpy(&ip->daddr, c->to_dst.b, 16);
	} else {
		struct iphdr *ip = pkt_at(ctx, p->l3, sizeof(*ip));

		if (!ip)
			return -DROP_REWRITE;
		ip->saddr = addr_v4(&c->to_src);
		ip->daddr = addr_v4(&c->to_dst);
		ip->check = csum_add_diff(ip->check, c->addresses);
	}
	ports = pkt_at(ctx, p->l4, 4);
	if (!ports)
		return -DROP_REWRITE;
	ports[0] = c->to_sport;
	ports[1] = c->to_dport;
	return sum_update(ctx, sum, c->addresses, c->ports, p->proto == IPPROTO_UDP);
}

/* The next packet of a flow that its socket has by heart. */
ALWAYS int socket_forward(ctx_t *ctx, struct pkt *p)
{
	struct socket_state *s;
	struct socket_cache *c;
	struct bpf_sock *sk;
	struct ethhdr *eth;
	int ret;

	if (!cache_decisions)
		return NEXT;
	if (p->proto == IPPROTO_TCP) {
		if (p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))
			return NEXT;
	} else if (p->proto != IPPROTO_UDP) {
		return NEXT;
	}
	if (p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT))
		return NEXT;
	sk = ctx->sk;
	if (!sk)
		return NEXT;
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, 0);
	if (!s)
		return NEXT;
	c = &s->cache;
	if (!c->generation || c->generation != generation() || c->ifindex != ctx->ifindex || !socket_sent(c, p))
		return NEXT;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth || !same_mac(eth->h_source, c->mac))
		return NEXT;
	if (socket_news(c) && socket_sync(s)) {
		c->generation = 0;
		return NEXT;
	}
	c->packets++;
	c->bytes += p->len;
	p->from_id = c->from_id;
	p->to_id = c->to_id;
	p->limits = c->limits;
	ret = socket_rewrite(ctx, p, c);
	if (ret)
		return ret;
	if (!c->to_ifindex)
		return c->renamed ? wire_leave(ctx, p) : TO_STACK;
	ret = hop(ctx, p);
	if (ret)
		return ret;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return -DROP_REWRITE;
	__builtin_memcpy(eth->h_dest, c->to_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, c->to_host_mac, ETH_ALEN);
	p->to_ifindex = c->to_ifindex;
	return TO_POD;
}

/*
 * What a kernel before 6.13 says for a mini-socket over IPv6 comes without a socket. By
 * then the entry may be gone with the socket before it, and nobody would own the next.
 * Of what pods forward, the ACK that finds no entry is left to the next data to make it.
 */
ALWAYS int socket_unnamed(ctx_t *ctx, const struct pkt *p)
{
	struct tcphdr *tcp;

	if (!unnamed_acks || !p->v6 || p->proto != IPPROTO_TCP || (p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT)) ||
	    (p->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
		return 0;
	tcp = pkt_at(ctx, p->l4, sizeof(*tcp));
	return tcp && p->l4 + tcp->doff * 4u == p->len;
}

/*
 * Whose packet it is. Only the packet's own socket counts: the kernel's control
 * sockets, request sockets, and sockets that have lost their port send for others.
 */
RARELY int socket_claim(ctx_t *ctx, struct pkt *p)
{
	struct socket_state *s;
	struct bpf_sock *sk = ctx->sk;

	if (!p)
		return NEXT;
	if (!sk) {
		if (socket_unnamed(ctx, p))
			p->flags |= PKT_AFTER_OWNER;
		return NEXT;
	}
	if (p->proto == IPPROTO_TCP && sk->state == SK_TIME_WAIT)
		p->flags |= PKT_AFTER_OWNER;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != p->proto || sk->state == SK_LISTEN)
		return NEXT;
	if (p->proto == IPPROTO_TCP && sk->state == SK_CLOSE) {
		p->flags |= PKT_OWNER_DYING;
		return NEXT;
	}
	if (sk->src_port != bpf_ntohs(p->sport)) {
		/* A closed UDP socket gives its port up before its last datagrams have left the queue. */
		if (p->proto == IPPROTO_TCP)
			p->flags |= PKT_AFTER_OWNER;
		else if (!sk->src_port)
			p->flags |= PKT_OWNER_DYING;
		return NEXT;
	}
	/* Of a socket without references there is no storage to be had: it is being destroyed. */
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s) {
		if (p->proto == IPPROTO_TCP)
			ct_count(CT_STAT_NO_STORAGE);
		else
			p->flags |= PKT_OWNER_DYING;
		return NEXT;
	}
	if (s->flags & SOCKET_DEAD) {
		p->flags |= PKT_OWNER_DYING;
		return NEXT;
	}
	if (!s->cookie) {
		s->cookie = bpf_get_socket_cookie(ctx);
		p->first = 1;
	}
	if (hook_mode != HOOK_OFF)
		p->cookie = s->cookie;
	if (p->proto == IPPROTO_TCP || sk->dst_port)
		p->flags |= PKT_OWNER_CONNECTED;
	p->flags |= PKT_OWNED;
	return NEXT;
}

/* The place of a flow among those that the socket knows, a free one for a new flow, or none. */
ALWAYS int socket_place(struct socket_state *s, const struct ct_key *key)
{
	int place = -1;

	for (int i = SOCKET_FLOWS - 1; i >= 0; i--) {
		if (!s->flow[i].used)
			place = i;
		else if (!__builtin_memcmp(&s->flow[i].key, key, sizeof(*key)))
			return i;
	}
	return place;
}

/* The socket learns its flow, and what to do with the flow's next packet. */
RARELY int socket_remember(ctx_t *ctx, struct pkt *p)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *s;
	struct socket_cache *c;
	struct endpoint *from, *to;
	struct ct_entry *e;
	struct ct_key key;
	struct addr addr;
	int place, known;
	__u8 side;

	if (!p || !sk)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, 0);
	if (!s)
		return 0;
	ct_wire_key(&key, p);
	side = !!(p->flags & PKT_REPLY);
	e = ct_at(&key);
	if (!e || (e->life & CT_LIFE_CLAIMED) || (e->flags & CT_F_ENDED))
		return 0;
	if (p->cookie) {
		__u64 *owner = side ? &e->cookie[1] : &e->cookie[0];

		/* Not one that another socket owns: two may share a port. */
		if (*owner != p->cookie && __sync_val_compare_and_swap(owner, 0, p->cookie))
			return 0;
	}
	place = socket_place(s, &key);
	if (p->proto == IPPROTO_TCP && place) {
		/* Connected anew: the last connection's flow is over. */
		if (s->flow[0].used && p->cookie)
			ct_release(&s->flow[0].key, p->cookie, s->flow[0].side & 1, RELEASE_GRACE);
		s->flow[0].used = 0;
		place = 0;
	}
	if (place < 0) {
		s->flags |= SOCKET_CROWD;
		if (side)
			e->tether[1] = TETHER_CROWD;
		else
			e->tether[0] = TETHER_CROWD;
		return 0;
	}
	place &= SOCKET_FLOWS - 1;
	known = s->flow[place].used;
	/* What the other side has restored is not tethered to this one. */
	if (!known || (p->cookie && !(side ? e->tether[1] : e->tether[0]))) {
		s->flow[place].key = key;
		s->flow[place].side = side;
		if (side)
			e->tether[1] = ct_tether_of(p);
		else
			e->tether[0] = ct_tether_of(p);
		s->flow[place].used = 1;
	}
	/*
	 * A barrier, as in socket_end(): either the end of the socket, on another processor,
	 * sees that the flow is the socket's, or this sees that the end has been.
	 */
	if (p->cookie && (__sync_fetch_and_or(&s->flags, 0) & SOCKET_DEAD)) {
		ct_release(&s->flow[place].key, p->cookie, side,
			   s->flags & SOCKET_TIMEWAIT ? RELEASE_TIMEWAIT : RELEASE_GRACE);
		return 0;
	}
	if (place)
		return 0;

	s->decided = p->generation;
	c = &s->cache;
	if (known && c->packets) {
		/* The entry has heard only what came this way. */
		c->packets++;
		c->bytes += p->len;
		if (side) {
			e->packets[1] = c->packets;
			e->bytes[1] = c->bytes;
		} else {
			e->packets[0] = c->packets;
			e->bytes[0] = c->bytes;
		}
	} else {
		c->packets = side ? e->packets[1] : e->packets[0];
		c->bytes = side ? e->bytes[1] : e->bytes[0];
	}
	c->generation = 0;
	c->src = p->sent_src;
	c->dst = p->sent_dst;
	c->sport = p->sent_sport;
	c->dport = p->sent_dport;
	c->to_src = p->src;
	c->to_dst = p->dst;
	c->to_sport = p->sport;
	c->to_dport = p->dport;
	c->proto = p->proto;
	c->renamed = !p->to_id && (p->flags & PKT_RENAMED);
	c->held = ct_tether_of(p) == TETHER_HELD;
	c->limits = p->limits;
	c->ifindex = ctx->ifindex;
	c->addresses = sum_fold((__u64)addr_diff(&c->src, &c->to_src, p->v6) + addr_diff(&c->dst, &c->to_dst, p->v6));
	c->ports = sum_fold((__u64)port_diff(c->sport, c->to_sport) + port_diff(c->dport, c->to_dport));
	c->backend = e->backend;
	c->backend_generation = e->backend_generation;
	c->service = e->service;
	c->from_id = p->from_id;
	c->to_id = p->to_id;
	c->synced = bpf_jiffies64();
	/* As long as the table waits for the answer, or for the end, it is to see every packet. */
	if ((e->flags & CT_F_EMBRYONIC) || (p->proto == IPPROTO_TCP && e->state != CT_ESTABLISHED))
		return 0;
	if (p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT))
		return 0;
	/* A client outside may leave the frontend out from one datagram to the next (north.h), of which the socket hears nothing. */
	if (p->proto == IPPROTO_UDP && c->renamed)
		return 0;
	addr = p->sent_src;
	from = bpf_map_lookup_elem(&mooring_endpoints, &addr);
	if (!from)
		return 0;
	__builtin_memcpy(c->mac, from->mac, ETH_ALEN);
	c->to_ifindex = p->to_id ? p->to_ifindex : 0;
	if (c->to_ifindex) {
		addr = p->dst;
		to = bpf_map_lookup_elem(&mooring_endpoints, &addr);
		if (!to)
			return 0;
		__builtin_memcpy(c->to_mac, to->mac, ETH_ALEN);
		__builtin_memcpy(c->to_host_mac, to->host_mac, ETH_ALEN);
	}
	c->generation = p->generation;
	return 0;
}

/*
 * What TIME_WAIT sends has the cookie of the socket before it (6.13 and newer), whose end
 * was heard if the tracepoint was called: a busy machine has been seen not to call it.
 */
RARELY int socket_succeeded(ctx_t *ctx, struct pkt *p)
{
	struct bpf_sock *sk = ctx->sk;
	struct ct_key key;

	if (!p || !sk || sk->state != SK_TIME_WAIT)
		return 0;
	ct_wire_key(&key, p);
	ct_release(&key, bpf_get_socket_cookie(ctx), !!(p->flags & PKT_REPLY), RELEASE_TIMEWAIT);
	return 0;
}

/*
 * Of a socket that has ended the table may know nothing any more, but the storage
 * lives until its last packet has left.
 */
RARELY int socket_last_words(ctx_t *ctx, struct pkt *p)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *s;

	if (!p || !sk)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, 0);
	if (!s || !socket_sent(&s->cache, p) || (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP))
		return 0;
	if (socket_rewrite(ctx, p, &s->cache))
		return -DROP_REWRITE;
	p->dst = s->cache.to_dst;
	p->src = s->cache.to_src;
	p->dport = s->cache.to_dport;
	p->sport = s->cache.to_sport;
	return 1;
}

/* The backend that the socket knows for its first flow, the one that the packet belongs to. */
ALWAYS struct socket_state *socket_backend(ctx_t *ctx, struct pkt *p)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *s;

	if (!sk)
		return NULL;
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, 0);
	if (!s || !s->flow[0].used || s->flow[0].side || !s->cache.service || !socket_sent(&s->cache, p))
		return NULL;
	p->backend = s->cache.backend;
	p->backend_generation = s->cache.backend_generation;
	return s;
}

/*
 * The entry of the socket's first flow, which the table has lost: the socket lives, and makes it
 * again from what it knows, unless that is void or somebody of it is gone. The packet is to a
 * frontend, or nobody has looked whether it is: only the entry says so of what goes back. Returns 1 when it was made.
 */
RARELY int socket_restore(ctx_t *ctx, struct pkt *p, __u32 to_frontend)
{
	struct ct_draft *d = ct_draft();
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *s;
	struct socket_cache *c;
	struct ct_entry *e;
	struct ct_key key;
	int renamed, high;
	__u8 side;

	if (!p || !sk || !d)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, NULL, 0);
	if (!s || !s->flow[0].used || (s->decided ^ p->generation) >> GENERATION_BITS || !socket_sent(&s->cache, p))
		return 0;
	c = &s->cache;
	side = s->flow[0].side & 1;
	d->key = s->flow[0].key;
	if (to_frontend != (c->service && !side) || ct_at(&d->key))
		return 0;
	/* A pod that is its own backend goes by another name: its connection ends. */
	if (c->to_id == c->from_id || c->to_id != endpoint_id(c->to_dst))
		return 0;
	if (c->service && !backend_of(c->backend, c->backend_generation))
		return 0;
	e = &d->entry;
	/* The end of the key that is the socket's own. */
	high = d->key.port[1] == (side ? c->sport : c->to_sport) &&
	       addr_eq(&d->key.addr[1], side ? &c->src : &c->to_src);
	if (high != side)
		e->flags |= CT_F_INITIATOR_HIGH;
	if (side) {
		e->flags |= CT_F_INGRESS | (c->to_id ? CT_F_EGRESS : 0);
		e->endpoint[0] = c->to_id;
		e->endpoint[1] = c->from_id;
		e->cookie[1] = p->cookie;
		e->tether[1] = ct_tether_of(p);
		renamed = c->to_sport != c->sport || !addr_eq(&c->to_src, &c->src);
		if (renamed) {
			e->nat = c->to_src;
			e->nat_port = c->to_sport;
			if (!c->service)
				e->flags |= CT_F_DSR;
		}
		if (c->to_dport != c->dport || !addr_eq(&c->to_dst, &c->dst)) {
			e->origin = c->to_dst;
			e->origin_port = c->to_dport;
		}
		if (c->service)
			e->flags |= CT_F_ALONE;
	} else {
		e->flags |= CT_F_EGRESS | (c->to_id ? CT_F_INGRESS : 0);
		e->endpoint[0] = c->from_id;
		e->endpoint[1] = c->to_id;
		e->cookie[0] = p->cookie;
		e->tether[0] = ct_tether_of(p);
		if (c->service) {
			e->nat = c->dst;
			e->nat_port = c->dport;
			ct_svc_key(&key, p);
			if (!ct_at(&key))
				e->flags |= CT_F_ALONE;
		}
	}
	e->backend = c->backend;
	e->backend_generation = c->backend_generation;
	e->service = c->service;
	e->seen = bpf_jiffies64();
	/* Nobody has asked the policies of today. */
	e->policy = p->generation - 1;
	if (p->proto != IPPROTO_TCP || sk->state == SK_ESTABLISHED) {
		e->state = CT_ESTABLISHED;
		e->flags |= CT_F_REPLIED;
	} else if (sk->state != SK_SYN_SENT) {
		e->state = CT_CLOSING;
		e->flags |= CT_F_REPLIED;
	}
	return !ct_put(d, 1);
}

/* Where the table has lost it: as long as nothing has changed since. */
RARELY int socket_decision(ctx_t *ctx, struct pkt *p)
{
	struct socket_state *s;

	if (!p)
		return 0;
	s = socket_backend(ctx, p);
	if (!s || s->cache.generation != p->generation)
		return 0;
	p->service = s->cache.service;
	return 1;
}

/*
 * Where there is no SVC entry: whatever has changed, its flow's entry says whether it still
 * holds. Returns the socket's cookie, which the hook's mode of today does not matter for.
 */
ALWAYS __u64 socket_decided(ctx_t *ctx, struct pkt *p)
{
	struct socket_state *s = socket_backend(ctx, p);

	if (!s)
		return 0;
	p->service = s->cache.service;
	return s->cookie;
}

#endif

#endif
