/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services for the host's own sockets, at the system call: the socket talks to
 * the backend from its first packet, and no packet is ever translated. What a
 * socket was told ends with the socket, as it is kept in it.
 */
#ifndef MOORING_HOST_H
#define MOORING_HOST_H

#include <linux/errno.h>
#include "backend.h"

/* The node's network namespace: sockets of others are the pods', which the hooks on their interfaces serve. */
volatile const __u64 netns_cookie = 0;

/* nodePort.range, host order. */
volatile const __u16 node_port_first = 30000, node_port_last = 32767;

/* The node's IPv4 address: node ports on loopback addresses are this one's. The daemon changes it. */
struct addr node_address;

/* How many sockets end_udp has ended since it was loaded. */
__u64 ended;

/* What a connected socket was told. */
struct host_socket {
	struct addr frontend, backend;
	__be16 frontend_port, backend_port;
	__u32 index;		/* in mooring_backends */
	__u32 generation;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, int);
	__type(value, struct host_socket);
} mooring_host_sockets SEC(".maps");

/* Where an unconnected UDP socket's datagrams to an address go, and who has sent those from one. */
struct host_flow_key {
	__u64 socket;		/* its cookie, which no other socket ever has */
	struct addr addr;
	__be16 port;
	__u8 reply;
	__u8 pad[5];
};

struct host_flow {
	struct addr addr;
	__be16 port;
	__u16 pad;
	__u32 index;		/* in mooring_backends */
	__u32 generation;
	__u32 pad2;
};

_Static_assert(sizeof(struct host_flow_key) == 32, "host_flow_key is a hash key: no padding");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct host_flow_key);
	__type(value, struct host_flow);
} mooring_host_flows SEC(".maps");

ALWAYS void host_count(int reason)
{
	__u32 index = reason * DIRECTIONS + FROM_HOST;
	struct counter *c = bpf_map_lookup_elem(&mooring_counters, &index);

	if (c)
		c->packets++;
}

/* The address of the call: mapped IPv4 in an IPv6 socket is like any other IPv4 address. */
ALWAYS void host_addr(struct bpf_sock_addr *ctx, int v6, struct addr *a)
{
	if (v6) {
		__u32 *w = (__u32 *)a->b;

		w[0] = ctx->user_ip6[0];
		w[1] = ctx->user_ip6[1];
		w[2] = ctx->user_ip6[2];
		w[3] = ctx->user_ip6[3];
	} else {
		addr_from_v4(a, ctx->user_ip4);
	}
}

ALWAYS void host_set(struct bpf_sock_addr *ctx, int v6, const struct addr *a, __be16 port)
{
	const __u32 *w = (const __u32 *)a->b;

	if (v6) {
		ctx->user_ip6[0] = w[0];
		ctx->user_ip6[1] = w[1];
		ctx->user_ip6[2] = w[2];
		ctx->user_ip6[3] = w[3];
	} else {
		ctx->user_ip4 = w[3];
	}
	ctx->user_port = port;
}

/* 127.0.0.0/8 at a node port is the node, as with kube-proxy. */
ALWAYS void host_loopback(struct addr *a, __be16 port)
{
	__u16 number = bpf_ntohs(port);
	const __u32 *w = (const __u32 *)a->b;

	if (words(a)[0] || w[2] != bpf_htonl(0xffff) || a->b[12] != 127)
		return;
	if (number < node_port_first || number > node_port_last || addr_zero(&node_address))
		return;
	*a = node_address;
}

/*
 * A backend for a new conversation with an address: 1 with its index, 0 where
 * the address is no service's, or why there is none. All of the host's sockets
 * are one client to session affinity.
 */
ALWAYS int host_choose(const struct addr *to, __be16 port, __u8 proto, __u32 *index)
{
	struct affinity_key client = {};
	struct affinity *a = NULL;
	struct backend *b;
	struct svc *s;

	s = svc_find(to, port, proto);
	if (!s)
		return svc_find(to, 0, 0) ? -DROP_NO_PORT : 0;
	if (!s->internal.count)
		return s->flags & SVC_F_INTERNAL_LOCAL ? -DROP_NO_LOCAL_BACKEND : -DROP_NO_BACKEND;
	client.service = s->id;
	if (s->affinity_seconds) {
		a = bpf_map_lookup_elem(&mooring_affinity, &client);
		if (a && bpf_jiffies64() - a->seen <= s->affinity_seconds * jiffies_per_second) {
			*index = a->backend;
			b = backend_of(a->backend, a->backend_generation);
			if (b && b->state == BACKEND_ACTIVE) {
				a->seen = bpf_jiffies64();
				return 1;
			}
		}
	}
	*index = svc_pick(&s->internal);
	b = backend_at(*index);
	if (!b || b->state == BACKEND_FREE)
		return -DROP_NO_BACKEND;
	if (s->affinity_seconds) {
		struct affinity now = { .seen = bpf_jiffies64(), .backend = *index, .backend_generation = b->generation };

		bpf_map_update_elem(&mooring_affinity, &client, &now, BPF_ANY);
	}
	return 1;
}

/* The caller's call fails at once, as by a refusing answer. */
ALWAYS int host_refuse(int reason)
{
	host_count(reason);
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

/* Sockets of the node's namespace that speak TCP or UDP. */
ALWAYS int host_serves(struct bpf_sock_addr *ctx)
{
	return (ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP) && bpf_get_netns_cookie(ctx) == netns_cookie;
}

ALWAYS int host_connect(struct bpf_sock_addr *ctx, int v6)
{
	struct addr asked, to;
	struct host_socket *told;
	struct bpf_sock *sk = ctx->sk;
	__be16 port = ctx->user_port;
	struct backend *b;
	__u32 index = 0;
	int ret;

	/* Port 0 only asks for a route, as getaddrinfo() does. */
	if (!sk || !port || !host_serves(ctx))
		return 1;
	host_addr(ctx, v6, &asked);
	to = asked;
	host_loopback(&to, port);
	ret = host_choose(&to, port, ctx->protocol, &index);
	if (ret < 0)
		return host_refuse(-ret);
	b = ret ? backend_at(index) : NULL;
	if (!b) {
		/* It may have been connected to a service before. */
		bpf_sk_storage_delete(&mooring_host_sockets, sk);
		return 1;
	}
	told = bpf_sk_storage_get(&mooring_host_sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!told)
		return host_refuse(DROP_CONNTRACK_FULL);
	told->frontend = asked;
	told->frontend_port = port;
	told->backend = b->addr;
	told->backend_port = b->port;
	told->index = index;
	told->generation = b->generation;
	host_set(ctx, v6, &told->backend, told->backend_port);
	host_count(DROP_NONE);
	return 1;
}

/* A datagram with an address of its own: all from one socket to one frontend go to one backend. */
ALWAYS int host_sendmsg(struct bpf_sock_addr *ctx, int v6)
{
	struct host_flow_key key = {}, back = {};
	struct host_flow *known, flow = {}, reply = {};
	struct addr to;
	struct backend *b;
	__u32 index = 0;
	int ret;

	key.port = ctx->user_port;
	if (!key.port || !host_serves(ctx))
		return 1;
	key.socket = bpf_get_socket_cookie(ctx);
	host_addr(ctx, v6, &key.addr);
	known = bpf_map_lookup_elem(&mooring_host_flows, &key);
	b = known ? backend_of(known->index, known->generation) : NULL;
	if (b) {
		index = known->index;
	} else {
		to = key.addr;
		host_loopback(&to, key.port);
		ret = host_choose(&to, key.port, IPPROTO_UDP, &index);
		if (ret < 0)
			return host_refuse(-ret);
		b = ret ? backend_at(index) : NULL;
		if (!b)
			return 1;
	}
	flow.addr = b->addr;
	flow.port = b->port;
	flow.index = index;
	flow.generation = b->generation;
	if (!known || known->index != flow.index || known->generation != flow.generation)
		bpf_map_update_elem(&mooring_host_flows, &key, &flow, BPF_ANY);
	back.socket = key.socket;
	back.addr = flow.addr;
	back.port = flow.port;
	back.reply = 1;
	/* Of two frontends with one backend, answers are from the one asked last. */
	known = bpf_map_lookup_elem(&mooring_host_flows, &back);
	if (!known || known->port != key.port || !addr_eq(&known->addr, &key.addr)) {
		reply.addr = key.addr;
		reply.port = key.port;
		reply.index = index;
		reply.generation = flow.generation;
		bpf_map_update_elem(&mooring_host_flows, &back, &reply, BPF_ANY);
	}
	host_set(ctx, v6, &flow.addr, flow.port);
	host_count(DROP_NONE);
	return 1;
}

/* The address that a call gives back: who asked a frontend is answered by it. */
ALWAYS int host_peer(struct bpf_sock_addr *ctx, int v6, int datagram)
{
	struct bpf_sock *sk = ctx->sk;
	struct host_flow_key key = {};
	struct host_socket *told;
	struct host_flow *reply;

	if (!sk || !host_serves(ctx))
		return 1;
	host_addr(ctx, v6, &key.addr);
	key.port = ctx->user_port;
	told = bpf_sk_storage_get(&mooring_host_sockets, sk, 0, 0);
	if (told && told->backend_port == key.port && addr_eq(&told->backend, &key.addr)) {
		host_set(ctx, v6, &told->frontend, told->frontend_port);
		return 1;
	}
	if (!datagram)
		return 1;
	key.socket = bpf_get_socket_cookie(ctx);
	key.reply = 1;
	reply = bpf_map_lookup_elem(&mooring_host_flows, &key);
	if (reply)
		host_set(ctx, v6, &reply->addr, reply->port);
	return 1;
}

#endif
