/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the programs of sock.c share: the kernel's types as far as they are read, and what a socket's end means. */
#ifndef MOORING_TRACING_H
#define MOORING_TRACING_H

#include "entry.h"
#include "bury.h"
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

#define AF_INET 2
#define AF_INET6 10
#define TCP_FIN_WAIT2 5
#define TCP_CLOSE 7
#define TCP_LAST_ACK 9
#define TCP_CLOSING 11

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sock_common {
	union {
		struct {
			__be32 skc_daddr;
			__be32 skc_rcv_saddr;
		};
	};
	union {
		struct {
			__be16 skc_dport;
			__u16 skc_num;
		};
	};
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct {
		__s64 counter;
	} skc_cookie;
};

struct sock {
	struct sock_common __sk_common;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	union {
		struct bpf_iter_meta *meta;
	};
	union {
		struct sock_common *sk_common;
	};
};

struct udp_sock {
	struct sock_common unused;
};

struct bpf_iter__udp {
	union {
		struct bpf_iter_meta *meta;
	};
	union {
		struct udp_sock *udp_sk;
	};
};

#pragma clang attribute pop

/* Number of the roll call that is under way. */
volatile __u32 roll_call = 0;

/* The socket is at its end: whatever it holds is released, once. */
ALWAYS void socket_end(struct socket_state *s, enum release how)
{
	__u64 cookie = s->cookie;
	__u64 now;

	/* A barrier, as in socket_remember(): either that sees this, or this sees the flow. */
	if (__sync_fetch_and_or(&s->flags, SOCKET_DEAD) & SOCKET_DEAD)
		return;
	if (hook_mode == HOOK_TRAMPOLINE && (s->flags & SOCKET_TIMEWAIT))
		return;
	for (int i = 0; i < SOCKET_FLOWS; i++) {
		if (s->flow[i].used)
			ct_release(&s->flow[i].key, cookie, s->flow[i].side & 1, how);
	}
	if (s->flags & SOCKET_CROWD) {
		now = bpf_jiffies64();
		bpf_map_update_elem(&mooring_crowds, &cookie, &now, BPF_ANY);
		ct_count(CT_STAT_CROWDS);
	}
	if (how == RELEASE_GRACE)
		bury_others();
}

/* What only the socket knew of its first flow is remembered by the table, for TIME_WAIT. */
static __noinline void socket_bequeaths(struct socket_state *s)
{
	struct ct_key flow = s->flow[0].key;
	struct ct_entry *e = ct_at(&flow);

	if (e)
		ct_remember(&flow, e, s->cookie);
}

ALWAYS void socket_enters_timewait(struct socket_state *s)
{
	struct ct_entry *e, *svc;
	struct ct_key key;

	__sync_fetch_and_or(&s->flags, SOCKET_TIMEWAIT);
	if (!s->flow[0].used)
		return;
	key = s->flow[0].key;
	e = ct_at(&key);
	if (!e)
		return;
	e->seen = bpf_jiffies64();
	e->state = CT_TIMEWAIT;
	if (!e->service || (s->flow[0].side & 1))
		return;
	/* timewait_end() knows the client's tuple only, as what TIME_WAIT sends does. */
	if (e->flags & CT_F_ALONE) {
		socket_bequeaths(s);
		return;
	}
	ct_svc_key_of_flow(&key, &s->flow[0].key, e);
	svc = ct_at(&key);
	if (svc && svc->cookie[0] == s->cookie)
		svc->state = CT_TIMEWAIT;
}

ALWAYS void common_addr(struct addr *a, __u16 family, __be32 v4, const struct in6_addr *v6)
{
	if (family == AF_INET)
		addr_from_v4(a, v4);
	else
		addr_from_v6(a, v6);
}

/* A mini-socket ends: what it is to the pod's end of the flow leads to the entries. */
ALWAYS void timewait_end(const struct sock_common *tw)
{
	__u64 cookie = tw->skc_cookie.counter;
	__u16 family = tw->skc_family;
	struct addr pod, peer;
	struct ct_entry *e;
	struct ct_key key;
	__be16 port, peer_port;
	int high;

	if (!cookie || (family != AF_INET && family != AF_INET6))
		return;
	common_addr(&pod, family, tw->skc_rcv_saddr, &tw->skc_v6_rcv_saddr);
	common_addr(&peer, family, tw->skc_daddr, &tw->skc_v6_daddr);
	port = bpf_htons(tw->skc_num);
	peer_port = tw->skc_dport;

	key.addr[0] = pod;
	key.addr[1] = peer;
	key.port[0] = port;
	key.port[1] = peer_port;
	key.proto = IPPROTO_TCP;
	key.type = CT_SVC;
	key.pad = 0;
	e = ct_at(&key);
	if (e && e->cookie[0] == cookie) {
		/* The backend's side of the wire; a pod that is its own backend goes by its alias there. */
		if (addr_eq(&e->nat, &pod))
			pod = addr_is_v4(&pod) ? *(struct addr *)&hairpin_v4 : *(struct addr *)&hairpin_v6;
		peer = e->nat;
		peer_port = e->nat_port;
	}
	high = ct_flow_key(&key, &pod, port, &peer, peer_port, IPPROTO_TCP);
	e = ct_at(&key);
	if (!e)
		return;
	ct_release(&key, cookie, high != !!(e->flags & CT_F_INITIATOR_HIGH), RELEASE_TIMEWAIT_OVER);
}

/* What the table says of a live socket's flows. */
ALWAYS void socket_confirm(const struct socket_state *s)
{
	for (int i = 0; i < SOCKET_FLOWS; i++) {
		__u8 side = s->flow[i].side & 1;
		struct ct_entry *e, *svc;
		struct ct_key key;

		if (!s->flow[i].used)
			continue;
		key = s->flow[i].key;
		e = ct_at(&key);
		if (!e)
			continue;
		if (hook_mode != HOOK_OFF && e->cookie[side] != s->cookie)
			continue;
		e->confirmed = roll_call;
		if (!i && s->cache.generation) {
			if (s->cache.packets > e->packets[side]) {
				e->packets[side] = s->cache.packets;
				e->bytes[side] = s->cache.bytes;
			}
		}
		if (side || !ct_has_decision(e))
			continue;
		ct_svc_key_of_flow(&key, &s->flow[i].key, e);
		svc = ct_at(&key);
		if (!svc || svc->backend != e->backend)
			continue;
		svc->confirmed = roll_call;
		if (svc->packets[0] < e->packets[0]) {
			svc->packets[0] = e->packets[0];
			svc->bytes[0] = e->bytes[0];
		}
	}
}

#endif
