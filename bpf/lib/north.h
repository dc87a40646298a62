/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services reached from beyond the uplinks. A packet to a frontend finds its
 * backend in the entry of the service; an established flow needs no other. What
 * comes back, to a pod that began or to the node that stood in for a client, finds the entry of its flow.
 */
#ifndef MOORING_NORTH_H
#define MOORING_NORTH_H

#include "choice.h"
#include "dsr.h"
#include "forward.h"
#include "policy.h"
#include "snat.h"
#include "way.h"

/* How long the flow's entry may wait for news of packets that only the service's has seen. */
#define NORTH_SYNC (4 * jiffies_per_second)

/* Whether anybody is at the address who services concern, this node and its pods among them: most have nobody, and no table is asked. */
ALWAYS int north_door(const struct addr *a)
{
	const __u32 *w = (const __u32 *)a->b;
	__u32 hash = (w[0] ^ w[1] ^ w[2] ^ w[3]) * 0x9e3779b1u;
	__u32 index = hash >> 22;
	__u64 *doors = bpf_map_lookup_elem(&mooring_doors, &index);

	return doors && (*doors >> (hash >> 16 & 63) & 1);
}

ALWAYS int north_own_address(const struct addr *a)
{
	struct addr key = *a;

	return !!bpf_map_lookup_elem(&mooring_node_addresses, &key);
}

/* RFC 6890: loopback, "this" network and multicast are nobody's source; and nobody outside is this node or one of its pods. */
ALWAYS int north_martian(const struct pkt *p)
{
	struct addr src = p->src;

	if (addr_mapped(&src)) {
		__u8 net = src.b[12];

		if (net == 0 || net == 127 || net >= 224)
			return 1;
	} else if (src.b[0] == 0xff || (!words(&src)[0] && words(&src)[1] <= bpf_cpu_to_be64(1))) {
		return 1;
	}
	return north_door(&src) && (bpf_map_lookup_elem(&mooring_endpoints, &src) || north_own_address(&src));
}

ALWAYS int north_admits(const struct svc *s, const struct pkt *p)
{
	struct source_range_key key = { .prefixlen = 8 * (sizeof(key.service) + sizeof(key.addr)), .service = s->id };

	__builtin_memcpy(key.addr, p->src.b, sizeof(key.addr));
	return !!bpf_map_lookup_elem(&mooring_source_ranges, &key);
}

/*
 * The try-th choice among the backends for clients outside. At random, a connection's
 * number (RFC 9293, 3.4.1: its initial sequence number) is what decides, which a SYN has
 * again when it is repeated: nothing remembers the choice before somebody answers.
 */
ALWAYS __u32 north_pick(const struct svc *s, const struct pkt *p, __u32 connection, __u32 try)
{
	__u32 index, *backend;

	if (s->flags & SVC_F_MAGLEV)
		connection = 0;
	else if (!connection)
		return svc_pick(&s->external);
	index = s->external.first + ((north_hash(p) ^ connection) + try) % s->external.count;
	backend = bpf_map_lookup_elem(&mooring_slots, &index);
	return backend ? *backend : 0;
}

/* Whether the backend is a pod of this node, or the node itself. */
ALWAYS int north_local(const struct backend *b, struct north_way *w)
{
	struct addr addr = b->addr;

	if (!north_door(&addr))
		return 0;
	if (bpf_map_lookup_elem(&mooring_endpoints, &addr))
		return 1;
	if (!north_own_address(&addr))
		return 0;
	w->flags |= WAY_HOST;
	return 1;
}

/* Whether the node of a backend elsewhere is told who asked, and answers the client itself. */
ALWAYS int north_tells(const struct backend *b)
{
	return dsr_mode && dsr_node(&b->addr);
}

/* What a connection from outside has of its own, in its SYN and in what follows that: 0 if nothing. */
ALWAYS __u32 north_connection(ctx_t *ctx, const struct pkt *p)
{
	struct tcphdr *tcp;

	if (p->proto != IPPROTO_TCP || (p->flags & PKT_LATER_FRAGMENT))
		return 0;
	tcp = pkt_at(ctx, p->l4, sizeof(*tcp));
	if (!tcp)
		return 0;
	/* The number of the SYN itself counts. Spread, as those of one client may be in a row. */
	return (bpf_ntohl(tcp->seq) + tcp_opens(p)) * 0x9e3779b1u;
}

/* Remember the decision that p and w hold. */
ALWAYS int north_remember(struct pkt *p, const struct north_way *w)
{
	struct ct_draft *d = ct_draft();
	__u16 absent = p->flags & PKT_NO_SVC;
	struct ct_entry *e;

	if (!d)
		return -DROP_CONNTRACK_FULL;
	p->flags &= ~PKT_NO_SVC;
	e = &d->entry;
	ct_svc_key(&d->key, p);
	e->seen = bpf_jiffies64();
	e->packets[0] = 1;
	e->bytes[0] = p->len;
	e->nat = w->to;
	e->nat_port = w->to_port;
	if (p->flags & PKT_SNAT) {
		e->origin = w->from;
		e->origin_port = w->from_port;
	}
	e->backend = p->backend;
	e->backend_generation = p->backend_generation;
	e->service = p->service;
	if (p->flags & PKT_DSR) {
		e->flags = CT_F_DSR;
		e->confirmed = e->seen;
	}
	if (p->proto == IPPROTO_TCP && !tcp_opens(p))
		e->state = CT_ESTABLISHED;
	return ct_put(d, absent);
}

/*
 * A SYN has its way from a pick that comes out the same when it is repeated: where a pod of this
 * node answers, or one of another by way of this, no table is asked before. Marks the packet so.
 */
ALWAYS int north_opens(struct pkt *p)
{
	if (!tcp_opens(p))
		return 0;
	p->flags |= PKT_OPENS | PKT_NO_SVC;
	return 1;
}

/* The way of a flow that has one, unless it begins anew: with a SYN, after the last connection is over. */
ALWAYS int north_continue(struct pkt *p, struct north_way *w)
{
	struct ct_entry *e;
	struct ct_key key;

	ct_svc_key(&key, p);
	e = ct_at(&key);
	if (!e)
		p->flags |= PKT_NO_SVC;
	if (!e || !backend_of(e->backend, e->backend_generation))
		return NEXT;
	/* A pod of this node does not come from outside. */
	if (e->flags & CT_F_EGRESS)
		return -DROP_MARTIAN;
	if (tcp_opens(p) && flow_over(e))
		return NEXT;
#ifdef MOORING_XDP
	if (e->flags & CT_F_DSR)
		return TO_STACK;
#endif
	__sync_fetch_and_add(&e->packets[0], 1);
	__sync_fetch_and_add(&e->bytes[0], p->len);
	e->seen = bpf_jiffies64();
	w->to = e->nat;
	w->to_port = e->nat_port;
	w->packets = e->packets[0];
	w->bytes = e->bytes[0];
	w->flags = 0;
	if (addr_zero(&e->origin)) {
		w->from = p->src;
		w->from_port = p->sport;
	} else {
		w->from = e->origin;
		w->from_port = e->origin_port;
		p->flags |= PKT_SNAT;
	}
	p->backend = e->backend;
	p->backend_generation = e->backend_generation;
	p->service = e->service;
	if (e->flags & CT_F_DSR) {
		dsr_follow(p, e, w);
		if ((e->flags & CT_F_EMBRYONIC) && e->state == CT_ESTABLISHED && ct_live_entries() < dsr_room(p))
			ct_promote(&key);
		return NEXT;
	}
	if (e->state == CT_ESTABLISHED && !(e->flags & (CT_F_EMBRYONIC | CT_F_ENDED)) &&
	    (!policy_enforced || e->policy == p->generation) && (__u32)bpf_jiffies64() - e->confirmed < NORTH_SYNC &&
	    (p->proto != IPPROTO_TCP || (p->flags & PKT_LATER_FRAGMENT) || !(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))))
		w->flags |= WAY_KNOWN;
	return NEXT;
}

/* The same for a SYN whose way was not asked for. */
RARELY int north_again(struct pkt *p)
{
	struct north_way *w = north_way();

	if (!p || !w)
		return -DROP_NO_BACKEND;
	p->flags &= ~(PKT_OPENS | PKT_NO_SVC);
	return north_continue(p, w);
}

/* A new flow from outside: choose a backend. What is to no frontend, or turns out to have a way, has no WAY_NEW. */
RARELY int north_choose(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	struct ct_entry *taken;
	struct backend *b;
	struct svc *s;
	int ret, local;

	if (!p || !w)
		return -DROP_CONNTRACK_FULL;
	w->flags = 0;
	s = svc_find(&p->dst, p->dport, p->proto);
	if (!s)
		return svc_find(&p->dst, 0, 0) ? -DROP_NO_PORT : NEXT;
	if (!(s->flags & SVC_F_EXTERNAL))
		return NEXT;
	if (p->proto == IPPROTO_TCP && (p->tcp_flags & TCP_RST))
		return -DROP_NO_FLOW;
	if (north_martian(p))
		return -DROP_MARTIAN;
	if ((s->flags & SVC_F_SOURCE_RANGES) && !north_admits(s, p))
		return -DROP_SOURCE_RANGE;
	if (!s->external.count)
		return s->flags & SVC_F_EXTERNAL_LOCAL ? -DROP_NO_LOCAL_BACKEND : -DROP_NO_BACKEND;

#ifdef MOORING_XDP
	/* Only tc can tell another node: a draw that is left to it when such a backend comes up favours the others. */
	if (dsr_mode && !(s->flags & (SVC_F_MAGLEV | SVC_F_EXTERNAL_LOCAL)))
		return TO_STACK;
#endif
	w->connection = north_connection(ctx, p);
	b = svc_affine(s, p, &p->backend);
	for (int i = 0; i < BACKEND_TRIES; i++) {
		if (!b) {
			p->backend = north_pick(s, p, w->connection, i);
			b = backend_at(p->backend);
			if (!b)
				return -DROP_NO_BACKEND;
		}
		w->flags = 0;
		local = north_local(b, w);
		if ((p->flags & PKT_OPENS) && (local ? w->flags & WAY_HOST : north_tells(b))) {
			ret = north_again(p);
			if (ret || p->service)
				return ret;
		}
		if (!local) {
			/* Where the client was sent before the policy was Local is no place for it any more. */
			if (!(s->flags & SVC_F_EXTERNAL_LOCAL)) {
				p->flags |= north_tells(b) ? PKT_DSR : PKT_SNAT;
				goto chosen;
			}
		} else {
			/* The client may have another live flow to this backend on the same ports. */
			taken = svc_flow(p, &b->addr, b->port);
			if (!taken)
				w->flags |= WAY_FRESH;
			if (taken && (p->flags & PKT_OPENS) && ct_asks_other(taken)) {
				ret = north_again(p);
				if (ret || p->service)
					return ret;
			}
			if (!taken || flow_over(taken) || (taken->service == s->id && taken->nat_port == p->dport))
				goto chosen;
		}
		b = NULL;
	}
	/* Each that was tried has one, through another frontend. */
	b = backend_at(p->backend);
	if (!b)
		return -DROP_NO_BACKEND;
	if (p->flags & PKT_OPENS) {
		ret = north_again(p);
		if (ret || p->service)
			return ret;
	}
	w->flags = WAY_SPARE_PORT;
	p->flags |= PKT_SNAT;
chosen:
	if (p->flags & PKT_DSR) {
		w->flags = WAY_KNOWN | WAY_TELL | WAY_MUST_TELL;
#ifdef MOORING_XDP
		/* Before anything is remembered: only tc can tell. */
		return TO_STACK;
#endif
	}
	p->backend_generation = b->generation;
	p->service = s->id;
	w->from = p->src;
	w->from_port = p->sport;
	w->to = b->addr;
	w->to_port = b->port;
	w->packets = 0;
	w->flags |= WAY_NEW;
	svc_remember_affinity(s, p, &p->src);
	return NEXT;
}

/* Take the port by which a backend elsewhere is asked, and remember the choice. */
RARELY int north_keep(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	__u32 service;
	__u16 flags;
	int ret;

	if (!p || !w)
		return -DROP_CONNTRACK_FULL;
	if (p->flags & PKT_SNAT) {
		ret = snat_open(ctx, p, w);
		if (ret)
			return ret;
	}
	if (w->flags & WAY_OTHER) {
		flags = p->flags;
		service = p->service;
		p->flags &= ~PKT_SNAT;
		p->service = 0;
		ret = north_again(p);
		if (ret || p->service)
			return ret;
		p->flags = flags;
		p->service = service;
	}
	/* The answer passes by here or by the pod's own hook, where it is remembered. */
	return p->flags & PKT_OPENS ? NEXT : north_remember(p, w);
}

/* A flow that has no way yet. Returns NEXT with p->service 0 where it is to no frontend. */
ALWAYS int north_begin(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	int ret = north_choose(ctx, p, w);

	return ret || !(w->flags & WAY_NEW) ? ret : north_keep(ctx, p, w);
}

/* Find out whether a packet is to a frontend, and its way. Returns NEXT with p->service 0 where it is to none. */
RARELY int north_decide(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	int ret;

	if (!p || !w)
		return -DROP_NO_BACKEND;
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP)
		return svc_find(&p->dst, 0, 0) ? -DROP_PROTOCOL : NEXT;
	ret = north_opens(p) ? NEXT : north_continue(p, w);
	return ret || p->service ? ret : north_begin(ctx, p, w);
}

/*
 * The flow's entry has been heard, and allowed: until it is asked again the service's entry
 * speaks for it. Where no flood reaches the one, none is to reach the other.
 */
RARELY int north_settle(struct pkt *p, __u32 kept)
{
	struct ct_entry *e;
	struct ct_key key;

	if (!p)
		return 0;
	ct_sent_svc_key(&key, p);
	e = ct_at(&key);
	if (e) {
		e->policy = p->generation;
		e->confirmed = bpf_jiffies64();
		if (kept && (e->flags & CT_F_EMBRYONIC))
			ct_promote(&key);
	}
	return 0;
}

/* What the table knows of the flow takes part, and is told. */
ALWAYS int north_account(struct pkt *p, const struct north_way *w)
{
	__u32 kept;
	int ret;

	p->flow = NULL;
	if (w->flags & WAY_FRESH)
		p->flags |= PKT_NO_FLOW;
	else
		ct_lookup(p);
	/* Left by an earlier flow on these ports: made again with today's names. */
	if (p->flow && (p->flow->service != p->service || p->flow->nat_port != p->sent_dport))
		p->flow = NULL;
	ret = policy_check(p);
	if (ret)
		return ret;
	kept = p->flow && p->flow->state == CT_ESTABLISHED && !(p->flow->flags & CT_F_EMBRYONIC);
	ret = ct_commit(p);
	if (!ret && !(w->flags & WAY_FRESH))
		north_settle(p, kept);
	return ret;
}

/* A client's packet goes to its backend. */
ALWAYS int north_forward(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	__u32 known = w->flags & (WAY_KNOWN | WAY_MADE), host = w->flags & WAY_HOST;
	int ret;

	/* A process of this node has it as it is: it goes no further. What is to an address of the node the stack would not pass on. */
	if (!hop_left(ctx, p) && !north_own_address(&w->to))
		return north_own_address(&p->dst) ? -DROP_HOP_LIMIT : TO_STACK;
#ifndef MOORING_XDP
	if (p->flags & PKT_DSR)
		return dsr_forward(ctx, p);
#endif
	ret = way_take(ctx, p, w);
	if (ret)
		return ret;
	w->ifindex = ctx_ifindex(ctx);
	if (!known) {
		ret = north_account(p, w);
		if (ret)
			return ret;
	}
	if (host)
		return TO_STACK;
	if (p->flags & PKT_SNAT)
		p->flags |= PKT_RENAMED;
	return forward(ctx, p);
}

/* Where an answer to this node, which stood in for a client, goes: found before the packet is changed. */
RARELY int north_back(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();

	if (!p || !w)
		return -DROP_NO_ROUTE;
	return wire_refused(wire_route(ctx, p, &w->to));
}

/* Whether the packet may be an answer that is to be changed: to a pod, or to a port that this node stands in by. */
ALWAYS int north_awaited(const struct pkt *p)
{
	struct addr dst = p->dst;

	return snat_port(p->dport) || bpf_map_lookup_elem(&mooring_endpoints, &dst);
}

/* The way of an answer to a flow through a frontend. Returns 0 for what is none. */
ALWAYS int north_answer(const struct pkt *p, struct north_way *w)
{
	const struct ct_entry *e = p->flow;

	if (!(p->flags & PKT_REPLY) || addr_zero(&e->nat))
		return 0;
	w->from = e->nat;
	w->from_port = e->nat_port;
	if (addr_zero(&e->origin)) {
		w->to = p->dst;
		w->to_port = p->dport;
	} else {
		w->to = e->origin;
		w->to_port = e->origin_port;
	}
	return 1;
}

/* A client's packet from the node that it asked: to its pod, without the host's stack. */
ALWAYS int north_told(ctx_t *ctx, struct pkt *p)
{
	struct ct_entry *e = p->flow;

	if (!hop_left(ctx, p))
		return TO_STACK;
	p->flow = e;
	return policy_check(p) ?: ct_commit(p) ?: forward(ctx, p);
}

/* Whether its sender begins something with it, as far as one packet can tell. */
ALWAYS int north_begins(const struct pkt *p)
{
	return p->proto == IPPROTO_UDP || tcp_opens(p);
}

/* A device may be part of another that is an uplink, too: what was translated at the one comes by the other. */
ALWAYS int north_came_before(ctx_t *ctx, const struct pkt *p, const struct north_way *w)
{
	return w->ifindex && w->ifindex != ctx_ifindex(ctx) && w->from_port == p->sport && w->to_port == p->dport &&
	       addr_eq(&w->from, &p->src) && addr_eq(&w->to, &p->dst);
}

/*
 * Whether a packet to a backend itself, on the ports of a flow that went through a frontend,
 * says that nobody goes through that any more. A connection that may live is TCP's to judge: its
 * server asks back under its name (RFC 9293, 3.10.7.4), and who knows of none resets it. Of
 * a datagram to a backend that was told of a frontend only the other node knows whether it is through that.
 */
ALWAYS int north_supersedes(const struct pkt *p, const struct ct_entry *e)
{
	__u32 flags = *(volatile __u32 *)&e->flags;

	/* Who is not outside does not say so from there. */
	if (addr_zero(&e->nat) || (flags & CT_F_EGRESS) || !north_begins(p))
		return 0;
	if (p->proto == IPPROTO_UDP)
		return !(flags & CT_F_DSR);
	return flow_over(e) || (e->state == CT_NEW && !(flags & CT_F_DSR));
}

/* What such a flow left would give the answers the frontend's name: it goes. */
RARELY int north_supersede(struct pkt *p)
{
	struct ct_entry *e;
	struct ct_key key;
	__u32 life;
	int n;

	if (!p)
		return 0;
	ct_flow_key(&key, &p->src, p->sport, &p->dst, p->dport, p->proto);
	e = ct_at(&key);
	if (!e)
		return 0;
	/* Read before the rest: who takes it over changes it first. */
	life = *(volatile __u32 *)&e->life;
	if (!north_supersedes(p, e) || (!(e->flags & CT_F_INGRESS) && !north_own_address(&p->dst)))
		return 0;
	if (!ct_claim_of(&key, e, life))
		return 0;
	n = ct_end_decision(&key, e);
	n += ct_delete_claimed(&key, e);
	ct_count_by(CT_STAT_TAKEN_OVER, n);
	return 0;
}

/* What is not to a frontend: an answer to a pod's flow through one, or to a client that this node stands in for. */
ALWAYS int north_backward(ctx_t *ctx, struct pkt *p, struct north_way *w)
{
	struct ct_entry *e;
	int ret;

	if (!north_awaited(p) && !(north_begins(p) && north_own_address(&p->dst)))
		return TO_STACK;
	e = ct_find(p);
	if (!e)
		return TO_STACK;
	if (!(p->flags & PKT_REPLY) && north_supersedes(p, e)) {
		if (!north_came_before(ctx, p, w))
			north_supersede(p);
		return TO_STACK;
	}
	if (ct_anew(e, p))
		return TO_STACK;
	p->flow = e;
	if ((e->flags & CT_F_DSR) && !(p->flags & PKT_REPLY))
		return north_told(ctx, p);
	if (!north_answer(p, w) || !hop_left(ctx, p))
		return TO_STACK;
	if (!addr_zero(&e->origin)) {
		ret = north_back(ctx, p);
		if (ret)
			return ret;
		p->flow = e;
		p->flags |= PKT_SNAT;
	}
	ret = policy_check(p) ?: way_take(ctx, p, w) ?: ct_commit(p);
	if (ret)
		return ret;
	p->flags |= PKT_RENAMED;
	return forward(ctx, p);
}

#endif
