/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Frontend to backend. */
#ifndef MOORING_SERVICE_H
#define MOORING_SERVICE_H

#include "config.h"
#include "choice.h"
#include "conntrack.h"
#include "socket.h"
#include "icmp.h"

/* Make the destination the backend; a pod that is its own backend sees another client address. */
ALWAYS int svc_rewrite(ctx_t *ctx, struct pkt *p, const struct addr *addr, __be16 port)
{
	int hairpin = addr_eq(addr, &p->src);
	int ret;

	ret = rewrite(ctx, p, DESTINATION, addr, port);
	if (ret || !hairpin)
		return ret;
	p->flags |= PKT_HAIRPIN;
	if (p->v6) {
		struct addr alias = *(struct addr *)&hairpin_v6;

		return rewrite_source(ctx, p, &alias, p->sport);
	} else {
		struct addr alias = *(struct addr *)&hairpin_v4;

		return rewrite_source(ctx, p, &alias, p->sport);
	}
}

/* Remember the decision that p holds, for packets that have no socket to remember it. */
ALWAYS int svc_remember(struct pkt *p, const struct backend *b)
{
	struct ct_draft *d = ct_draft();
	__u16 absent = p->flags & PKT_NO_SVC;
	struct ct_entry *e;

	if (!d)
		return -DROP_CONNTRACK_FULL;
	p->flags &= ~PKT_NO_SVC;
	e = &d->entry;
	ct_svc_key(&d->key, p);
	e->cookie[0] = p->cookie;
	e->tether[0] = ct_tether_of(p);
	e->seen = bpf_jiffies64();
	e->packets[0] = 1;
	e->bytes[0] = p->len;
	e->nat = b->addr;
	e->nat_port = b->port;
	e->backend = p->backend;
	e->backend_generation = p->backend_generation;
	e->service = p->service;
	e->endpoint[0] = p->from_id;
	e->flags = p->from_id ? CT_F_EGRESS : 0;
	return ct_put(d, absent);
}

/*
 * Whether the server's socket of the last connection on these ports lives on, and answers
 * past the table: nobody would know what the kernel's reset of that answer belongs to.
 */
ALWAYS int svc_outlived(const struct ct_entry *last)
{
	return unnamed_resets && last && last->cookie[1] && last->state < CT_TIMEWAIT;
}

/* A new flow through a frontend: choose a backend and remember the choice. */
RARELY int svc_open(struct pkt *p)
{
	struct ct_entry *taken;
	struct backend *b;
	struct svc *s;

	if (!p)
		return -DROP_CONNTRACK_FULL;
	s = svc_find(&p->dst, p->dport, p->proto);
	if (!s)
		return -DROP_NO_PORT;
	if (!s->internal.count) {
		if (s->flags & SVC_F_INTERNAL_LOCAL)
			return -DROP_NO_LOCAL_BACKEND;
		return -DROP_NO_BACKEND;
	}

	b = svc_affine(s, p, &p->backend);
	for (int i = 0; i < BACKEND_TRIES; i++) {
		if (!b) {
			p->backend = svc_pick(&s->internal);
			b = backend_at(p->backend);
			if (!b)
				return -DROP_NO_BACKEND;
		}
		/* The client may have another live flow to this backend on the same ports. */
		taken = svc_flow(p, &b->addr, b->port);
		if (!taken || flow_over(taken) || (taken->service == s->id && taken->nat_port == p->dport))
			goto chosen;
		b = NULL;
	}
	return -DROP_TUPLE_COLLISION;
chosen:
	if (!taken)
		p->flags |= PKT_NO_FLOW;
	p->backend_generation = b->generation;
	p->service = s->id;
	svc_remember_affinity(s, p, &p->src);
	/* The first that a socket sends, and all that it will: the socket remembers, and the flow. */
	if (cache_decisions && p->first && p->cookie && (p->flags & PKT_OWNER_CONNECTED) && !svc_outlived(taken)) {
		p->flags |= PKT_NO_SVC;
		return NEXT;
	}
	return svc_remember(p, b);
}

/* A flow whose SVC entry is gone while its socket still knows the backend. */
RARELY int svc_reopen(struct pkt *p)
{
	struct backend *b;

	if (!p)
		return -DROP_CONNTRACK_FULL;
	b = backend_of(p->backend, p->backend_generation);
	if (!b)
		return svc_open(p);
	svc_remember(p, b);
	/* The socket knows: what cannot be remembered twice goes on all the same. */
	return NEXT;
}

/*
 * A packet that is dropped takes its decision back: the flow has not begun, so that its
 * socket does not know of it, and nobody would end what is held for the socket.
 */
RARELY int svc_withdraw(struct pkt *p)
{
	struct ct_entry *e;
	struct ct_key key;
	__u32 life;

	if (!p)
		return 0;
	ct_sent_svc_key(&key, p);
	e = ct_at(&key);
	if (!e)
		return 0;
	life = *(volatile __u32 *)&e->life;
	/* Of a flow that goes on it is the memory, whatever becomes of one packet. */
	if (e->packets[0] != 1 || e->cookie[0] != p->cookie || e->backend != p->backend)
		return 0;
	/* What never was is not counted as made, either. */
	if (ct_claim_of(&key, e, life) && ct_delete_claimed(&key, e))
		ct_count_by(CT_STAT_CREATED, -1);
	return 0;
}

/*
 * The backend that the flow's SVC entry names, unless the flow begins anew: with a
 * SYN that is not one repeated, or because another socket has the port now. A socket's
 * repeated SYN may come after the handshake, by another processor's queue.
 */
ALWAYS int svc_continue(struct pkt *p)
{
	struct ct_entry *e, *flow;
	struct ct_key key;

	if (p->first && (p->flags & PKT_OPENS))
		return 0;
	ct_svc_key(&key, p);
	e = ct_at(&key);
	if (!e)
		p->flags |= PKT_NO_SVC;
	if (!e || !backend_of(e->backend, e->backend_generation))
		return 0;
	if (p->cookie && e->cookie[0] != p->cookie)
		return 0;
	if (tcp_opens(p)) {
		flow = svc_flow(p, &e->nat, e->nat_port);
		if (!flow || (flow->state != CT_NEW && !ct_repeated(flow, p)))
			return 0;
	}
	__sync_fetch_and_add(&e->packets[0], 1);
	__sync_fetch_and_add(&e->bytes[0], p->len);
	e->seen = bpf_jiffies64();
	p->backend = e->backend;
	p->backend_generation = e->backend_generation;
	p->service = e->service;
	return 1;
}

/* Whether a flow that the socket knows is still its own: made again by the other side it has no owner yet. */
ALWAYS int svc_of_socket(const struct ct_entry *flow, __u64 cookie)
{
	return flow->cookie[0] == cookie || (!flow->cookie[0] && !flow_over(flow) && !(flow->flags & CT_F_ENDED));
}

/*
 * The backend that the packet's socket remembers, if the flow's entry is still the socket's:
 * not where that begins anew on the same ports, or where the table has lost the flow.
 */
RARELY int svc_by_socket(ctx_t *ctx, struct pkt *p)
{
	struct ct_entry *flow;
	struct backend *b;
	__u64 cookie;

	if (!p)
		return 0;
	cookie = socket_decided(ctx, p);
	if (!cookie)
		return 0;
	b = backend_of(p->backend, p->backend_generation);
	flow = b ? svc_flow(p, &b->addr, b->port) : NULL;
	if (b && !flow && socket_restore(ctx, p, 1))
		flow = svc_flow(p, &b->addr, b->port);
	if (flow && svc_of_socket(flow, cookie) && flow->service == p->service && flow->nat_port == p->dport &&
	    ((flow->flags & CT_F_ALONE) || p->proto == IPPROTO_TCP) &&
	    (!tcp_opens(p) || flow->state == CT_NEW || ct_repeated(flow, p))) {
		if (flow->flags & CT_F_ALONE)
			p->flags |= PKT_NO_SVC;
		return 1;
	}
	p->service = 0;
	return 0;
}

/* Name the backend of a packet to a frontend. Returns NEXT with p->service 0 where it is to none. */
RARELY int svc_decide(ctx_t *ctx, struct pkt *p)
{
	int l4;

	if (!p)
		return -DROP_NO_BACKEND;
	l4 = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP;
	/* IPv4's protocol 0 would find the key that marks the address. */
	if (!l4)
		return svc_find(&p->dst, 0, 0) ? -DROP_PROTOCOL : NEXT;
	if ((p->flags & PKT_OWNED) && !p->first && svc_by_socket(ctx, p))
		return NEXT;
	if (svc_continue(p))
		return NEXT;
	if (!(p->flags & PKT_OPENS) && !svc_find(&p->dst, p->dport, p->proto)) {
		if (!svc_find(&p->dst, 0, 0))
			return NEXT;
		return -DROP_NO_PORT;
	}
	if ((p->flags & PKT_OWNED) && !tcp_opens(p) && socket_decision(ctx, p))
		return svc_reopen(p);
	if (p->proto == IPPROTO_TCP && ((p->tcp_flags & TCP_RST) || (p->flags & (PKT_OWNER_DYING | PKT_AFTER_OWNER))))
		return -DROP_NO_FLOW;
	return svc_open(p);
}

/*
 * Find the flow of what a pod sends. The first packet of a connection, or of its
 * socket, needs no look where it goes to a frontend: a flow that has its name is
 * another's, from before the service was there.
 */
ALWAYS int svc_lookup(ctx_t *ctx, struct pkt *p)
{
	if ((tcp_opens(p) || (p->first && p->proto == IPPROTO_UDP)) && svc_find(&p->dst, p->dport, p->proto)) {
		p->flags |= PKT_OPENS;
		p->flow = NULL;
		return NEXT;
	}
	ct_lookup(p);
	if ((p->flags & (PKT_NO_FLOW | PKT_OWNED)) == (PKT_NO_FLOW | PKT_OWNED) && !p->first) {
		if (socket_restore(ctx, p, 0))
			return ct_lookup(p);
		p->flow = NULL;
	}
	return NEXT;
}

/* Whether the packet is for a service now. */
RARELY int svc_known(struct pkt *p)
{
	if (!p)
		return 0;
	return svc_find(&p->dst, p->dport, p->proto) || svc_find(&p->dst, 0, 0);
}

/*
 * A client may have begun before its service was there. A flow that somebody
 * answers goes on as it is; while nobody does, it is the service's once that appears.
 */
ALWAYS int svc_flow_stays(struct pkt *p)
{
	struct ct_entry *e = p->flow;
	int stays = e->service || (e->flags & CT_F_REPLIED) || (p->flags & PKT_REPLY) || !svc_known(p);

	p->flow = e;	/* which the verifier forgot over the call */
	return stays;
}

/* A packet to a frontend goes to the backend that its flow has, or gets one. */
ALWAYS int svc_translate(ctx_t *ctx, struct pkt *p)
{
	struct backend *b;
	struct addr addr;
	__u16 absent;
	__be16 port;
	int ret;

	/* The port has a flow to this backend through a frontend: its answers would come from there. */
	if (p->flow && p->flow->service && tcp_opens(p) && !(p->flags & PKT_REPLY))
		return -DROP_TUPLE_COLLISION;
	if (p->flow && svc_flow_stays(p))
		return NEXT;
	if (p->flags & PKT_OWNER_DYING) {
		ret = socket_last_words(ctx, p);
		p->flow = NULL;
		p->flags &= ~PKT_NO_FLOW;
		if (ret)
			return ret < 0 ? ret : NEXT;
	}
	absent = p->flags & PKT_NO_FLOW;
	p->flags &= ~PKT_NO_FLOW;
	ret = svc_decide(ctx, p);
	if (ret || !p->service) {
		p->flags |= absent;
		p->flow = NULL;
		return ret;
	}
	b = backend_at(p->backend);
	if (!b)
		return -DROP_NO_BACKEND;
	addr = b->addr;
	port = b->port;
	ret = svc_rewrite(ctx, p, &addr, port);
	if (ret)
		return ret;
	p->flow = NULL;
	/* Which svc_open() looks for, too. */
	if (!(p->flags & PKT_NO_FLOW))
		ct_lookup(p);
	/* Left by an earlier flow on these ports: made again with today's names, and for today's socket. */
	if (p->flow && (p->flow->service != p->service || p->flow->nat_port != p->sent_dport ||
			(p->cookie && p->flow->cookie[0] && p->flow->cookie[0] != p->cookie))) {
		p->flow = NULL;
		p->flags &= ~PKT_REPLY;
	}
	return NEXT;
}

/* What the responder sent goes back under the name that the initiator knows. */
ALWAYS int svc_untranslate(ctx_t *ctx, struct pkt *p)
{
	struct ct_entry *e = p->flow;
	struct addr nat, origin;
	__be16 nat_port, origin_port;
	int ret = NEXT;

	if (!e || !(p->flags & PKT_REPLY))
		return NEXT;
	nat = e->nat;
	nat_port = e->nat_port;
	origin = e->origin;
	origin_port = e->origin_port;
	if (!addr_zero(&nat)) {
		ret = rewrite(ctx, p, SOURCE, &nat, nat_port);
		p->flags |= PKT_RENAMED;
	}
	if (!ret && !addr_zero(&origin))
		ret = rewrite_destination(ctx, p, &origin, origin_port);
	p->flow = e;	/* which the verifier forgot over the call */
	return ret;
}

#endif
