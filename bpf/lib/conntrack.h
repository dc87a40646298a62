/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The connection table: one CT_FLOW entry per flow on the wire, found from both
 * directions, and one CT_SVC entry per flow through a frontend. It is two maps:
 * flows that nobody answered yet, which cost a flood nothing to make, never push
 * one out that was answered. Values change in place: an update of an LRU key
 * takes a fresh node and may evict another's. struct ct_entry says who may delete.
 */
#ifndef MOORING_CONNTRACK_H
#define MOORING_CONNTRACK_H

#include "config.h"
#include "parse.h"
#include "finish.h"
#include "rewrite.h"
#include "entry.h"

ALWAYS void ct_svc_key(struct ct_key *k, const struct pkt *p)
{
	k->addr[0] = p->src;
	k->addr[1] = p->dst;
	k->port[0] = p->sport;
	k->port[1] = p->dport;
	k->proto = p->proto;
	k->type = CT_SVC;
	k->pad = 0;
}

/* The same of a packet that may have been translated since. */
ALWAYS void ct_sent_svc_key(struct ct_key *k, const struct pkt *p)
{
	k->addr[0] = p->sent_src;
	k->addr[1] = p->sent_dst;
	k->port[0] = p->sent_sport;
	k->port[1] = p->sent_dport;
	k->proto = p->proto;
	k->type = CT_SVC;
	k->pad = 0;
}

/* A SYN on any but a new entry is another connection on the same ports. */
ALWAYS int tcp_opens(const struct pkt *p)
{
	return p->proto == IPPROTO_TCP && !(p->flags & PKT_LATER_FRAGMENT) &&
	       (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Find the entry of the flow as it is on the wire now. */
ALWAYS struct ct_entry *ct_find(struct pkt *p)
{
	struct ct_key key;
	int high = ct_flow_key(&key, &p->src, p->sport, &p->dst, p->dport, p->proto);
	struct ct_entry *e = ct_at(&key);

	/* An answer heard elsewhere may have moved it between the two looks. */
	if (!e && !tcp_opens(p))
		e = bpf_map_lookup_elem(&mooring_ct, &key);
	p->flags &= ~(PKT_REPLY | PKT_NO_FLOW);
	if (!e)
		p->flags |= PKT_NO_FLOW;
	else if (high != !!(e->flags & CT_F_INITIATOR_HIGH))
		p->flags |= PKT_REPLY;
	return e;
}

ALWAYS __u32 generation(void)
{
	__u32 zero = 0;
	struct shared *s = bpf_map_lookup_elem(&mooring_shared, &zero);

	return s ? s->generation : 0;
}

/* How the packet was when it came in: translation changes src and dst. */
ALWAYS int ct_keep(struct pkt *p)
{
	p->generation = generation();
	p->sent_src = p->src;
	p->sent_dst = p->dst;
	p->sent_sport = p->sport;
	p->sent_dport = p->dport;
	return NEXT;
}

/* The key of a packet's flow after translation: the backend's side is the wire's. */
ALWAYS void ct_wire_key(struct ct_key *k, const struct pkt *p)
{
	if (p->flags & PKT_REPLY) {
		ct_flow_key(k, &p->sent_src, p->sent_sport, &p->sent_dst, p->sent_dport, p->proto);
		/* Keeps the branches apart: clang 19 else chooses between the addresses by arithmetic on pointers. */
		asm volatile("" ::: "memory");
	} else {
		ct_flow_key(k, &p->src, p->sport, &p->dst, p->dport, p->proto);
	}
}

ALWAYS int flow_over(const struct ct_entry *e)
{
	return e->state >= CT_CLOSING;
}

/* The SYN of a live socket that is connected already: late, but of this connection. */
ALWAYS int ct_repeated(const struct ct_entry *e, const struct pkt *p)
{
	return p->cookie && e->cookie[0] == p->cookie && e->state == CT_ESTABLISHED;
}

/*
 * Whether a SYN is a pod's next connection, or is on what is over. From outside it may be
 * anybody's, and on a connection that lives it is the responder's to judge.
 */
ALWAYS int ct_begins_again(const struct ct_entry *e, const struct pkt *p)
{
	return flow_over(e) || (p->from_id && e->state == CT_ESTABLISHED && !ct_repeated(e, p));
}

/*
 * Another connection on the tuple of one that is over, which takes its entry over:
 * a SYN from either side, or what a live socket begins where the last one has ended.
 */
ALWAYS int ct_anew(const struct ct_entry *e, const struct pkt *p)
{
	if (!flow_over(e))
		return 0;
	return tcp_opens(p) || ((e->flags & CT_F_ENDED) && (p->flags & PKT_OWNED) && !(p->flags & PKT_REPLY));
}

ALWAYS int ct_lookup(struct pkt *p)
{
	p->flow = ct_find(p);
	if (p->flow && ct_anew(p->flow, p)) {
		p->flow = NULL;
		p->flags &= ~PKT_REPLY;
	}
	return NEXT;
}

/* Move a flow that was answered, or the SVC entry of one, to where no flood reaches it. */
static __noinline int ct_promote(const struct ct_key *key)
{
	struct ct_draft *d = ct_draft();
	struct ct_entry *e;
	__u32 life;
	long err;

	if (!d)
		return 0;
	e = bpf_map_lookup_elem(&mooring_ct_embryonic, key);
	if (!e)
		return 0;
	d->entry = *e;
	life = d->entry.life;
	/* A flood may have taken its place while it was read. */
	if (bpf_map_lookup_elem(&mooring_ct_embryonic, key) != e)
		return 0;
	d->entry.flags &= ~CT_F_EMBRYONIC;
	d->entry.life &= ~CT_LIFE_CLAIMED;
	err = bpf_map_update_elem(&mooring_ct, key, &d->entry, BPF_NOEXIST);
	if (err && err != -EEXIST) {
		ct_count_failure(CT_STAT_INSERT_FAILED, err);
		return 0;
	}
	if (!err) {
		ct_live_add(1);
		ct_count(CT_STAT_PROMOTED);
	}
	if (ct_claim(e, life)) {
		bpf_map_delete_elem(&mooring_ct_embryonic, key);
		return 1;
	}
	/* It has ended since it was read, or is the next flow's: what was made of it is nobody's. */
	if (!err) {
		e = bpf_map_lookup_elem(&mooring_ct, key);
		if (e && ct_claim(e, d->entry.life))
			ct_delete_claimed(key, e);
	}
	return 0;
}

RARELY int ct_promote_flow(struct pkt *p)
{
	struct ct_key key;

	if (!p)
		return 0;
	ct_wire_key(&key, p);
	return ct_promote(&key);
}

/* The SVC entry lives as long as its flow: it follows every change of state, whoever caused it. */
static __noinline void ct_mirror(const struct ct_entry *e, const struct pkt *p, int promote)
{
	int reply = p->flags & PKT_REPLY;
	struct ct_entry *svc;
	struct ct_key key;

	if (!ct_has_decision(e))
		return;
	ct_svc_key_of(&key, e, reply ? &p->dst : &p->src, reply ? p->dport : p->sport, p->proto);
	svc = ct_at(&key);
	if (!svc || !(reply ? ct_decided(svc, e, &p->sent_dst, p->sent_dport) : ct_decided(svc, e, &p->src, p->sport)))
		return;
	svc->state = e->state;
	/* What a reset ended does not wait as long as what is half closed. */
	if (e->flags & CT_F_RST)
		__sync_fetch_and_or(&svc->flags, CT_F_RST);
	if (promote && (svc->flags & CT_F_EMBRYONIC))
		ct_promote(&key);
}

/*
 * Whether a flow that was answered takes room from others: a listener answers every
 * SYN, but only who hears it completes the handshake; and an answered datagram is
 * as cheap to forge, so that when the table fills up only sockets vouch for theirs.
 */
ALWAYS int ct_earned(const struct ct_entry *e, const struct pkt *p, __u8 state)
{
	if (p->proto == IPPROTO_TCP)
		return state == CT_ESTABLISHED;
	return ct_held(e) || ct_live_entries() < ct_direct_limit;
}

/*
 * State from this packet, RFC 9293 flags for TCP, who was heard for the rest.
 * Returns 1 when the entry belongs to those that were answered and is not there.
 */
ALWAYS int ct_update(struct ct_entry *e, const struct pkt *p)
{
	__u32 reply = !!(p->flags & PKT_REPLY);
	__u32 had = *(volatile __u32 *)&e->flags, flags = had;
	__u8 was = *(volatile __u8 *)&e->state, state = was;
	int promote = 0;

	__sync_fetch_and_add(&e->packets[reply], 1);
	__sync_fetch_and_add(&e->bytes[reply], p->len);
	e->seen = bpf_jiffies64();

	if (p->proto == IPPROTO_TCP && !(p->flags & PKT_LATER_FRAGMENT)) {
		if (tcp_opens(p) && !reply && ct_begins_again(e, p)) {
			flags &= ~(CT_F_FIN_INITIATOR | CT_F_FIN_RESPONDER | CT_F_REPLIED | CT_F_RST | CT_F_ENDED);
			state = CT_NEW;
		}
		if (reply && !(p->tcp_flags & TCP_RST))
			flags |= CT_F_REPLIED;
		else if (!reply && state == CT_NEW && (flags & CT_F_REPLIED) && (p->tcp_flags & TCP_ACK))
			state = CT_ESTABLISHED;
		if (p->tcp_flags & TCP_FIN) {
			flags |= reply ? CT_F_FIN_RESPONDER : CT_F_FIN_INITIATOR;
			state = CT_CLOSING;
		}
		if ((flags & CT_F_FIN_INITIATOR) && (flags & CT_F_FIN_RESPONDER))
			state = CT_TIMEWAIT;
		if (p->tcp_flags & TCP_RST) {
			flags |= CT_F_RST;
			state = CT_CLOSING;
		}
	} else if (reply && !(flags & CT_F_ENDED)) {
		flags |= CT_F_REPLIED;
		state = CT_ESTABLISHED;
	}
	promote = (flags & (CT_F_EMBRYONIC | CT_F_REPLIED)) == (CT_F_EMBRYONIC | CT_F_REPLIED) && ct_earned(e, p, state);
	/* Only what this packet changes: another one, or the socket's end, may have changed the rest. */
	if (had & ~flags)
		__sync_fetch_and_and(&e->flags, flags | ~had);
	if (flags & ~had)
		__sync_fetch_and_or(&e->flags, flags & ~had);
	if (state != was || promote) {
		if (state != was)
			e->state = state;
		ct_mirror(e, p, promote);
	}
	return promote;
}

/* How firmly the packet's socket holds the entry that it makes. */
ALWAYS __u8 ct_tether_of(const struct pkt *p)
{
	if (!p->cookie)
		return TETHER_NONE;
	return p->flags & PKT_OWNER_CONNECTED ? TETHER_HELD : TETHER_LOOSE;
}

/* An entry whose socket has ended before it was made is buried at once. */
ALWAYS void ct_stillborn(const struct ct_draft *d)
{
	struct ct_entry *e = ct_at(&d->key);

	if (!e)
		return;
	e->state = CT_CLOSING;
	__sync_fetch_and_or(&e->flags, CT_F_ENDED);
	ct_bury(&d->key, e, 0);
}

/* A SYN is answered for the last connection on these ports, and the initiator's kernel resets that. */
ALWAYS int ct_asks_back(const struct ct_entry *e, const struct pkt *p)
{
	return unnamed_resets && e->state == CT_NEW && p->proto == IPPROTO_TCP && !(p->tcp_flags & (TCP_SYN | TCP_RST));
}

/*
 * Whether nobody knows by the initiator's own tuple whom it asked: it has no socket, that
 * has ended, or is not with what is said for it. The end may not have been heard; a FIN that is repeated tells of it.
 */
ALWAYS int ct_unremembered(const struct ct_entry *e, const struct pkt *p)
{
	return (e->flags & CT_F_ALONE) &&
	       (!e->cookie[0] || (e->state == CT_TIMEWAIT && (p->tcp_flags & TCP_FIN)) || ct_asks_back(e, p));
}

/*
 * An answer to such an initiator: a client outside, whose SYN cost one entry and not two
 * as long as nobody answered, or a pod whose socket has ended, for which the kernel may
 * have a last word to say. From now on a SVC entry knows. Where the client's is of a connection
 * that lives, a handshake goes no further: its next SYN asks that connection's backend, as TCP
 * would have it (RFC 5961, 4), and who has in truth forgotten the connection resets it then.
 */
RARELY int ct_answered(struct pkt *p)
{
	struct ct_entry *e;
	struct ct_key key;
	int ret;

	if (!p)
		return -DROP_CONNTRACK_FULL;
	ct_wire_key(&key, p);
	e = ct_at(&key);
	if (!e)
		return NEXT;
	/* The end of an initiator in TIME_WAIT was not heard, if it has an owner still. */
	ret = ct_remember(&key, e, e->state == CT_NEW ? e->cookie[0] : 0);
	if (!ret && e->state == CT_NEW && (*(volatile __u32 *)&e->flags & CT_F_CONTESTED))
		return -DROP_TUPLE_COLLISION;
	return ret;
}

/* An entry for the flow as it is on the wire now, begun by this packet, whose ends policy_begin() knows. */
RARELY int ct_create(struct pkt *p)
{
	struct ct_draft *d = ct_draft();
	struct ct_entry *e;
	int ret;

	if (!p || !d)
		return -DROP_CONNTRACK_FULL;
	e = &d->entry;
	if (ct_flow_key(&d->key, &p->src, p->sport, &p->dst, p->dport, p->proto))
		e->flags = CT_F_INITIATOR_HIGH;
	if (p->from_id)
		e->flags |= CT_F_EGRESS;
	if (p->to_id)
		e->flags |= CT_F_INGRESS;
	if (p->flags & PKT_HAIRPIN) {
		/* Behind the alias is the pod itself. */
		e->flags |= CT_F_HAIRPIN;
		e->origin = p->dst;
		e->origin_port = p->sport;
	}
	e->cookie[0] = p->cookie;
	e->tether[0] = ct_tether_of(p);
	e->seen = bpf_jiffies64();
	e->packets[0] = 1;
	e->bytes[0] = p->len;
	if (p->service || (p->flags & PKT_DSR)) {
		e->nat = p->sent_dst;
		e->nat_port = p->sent_dport;
	}
	if (p->flags & PKT_DSR)
		e->flags |= CT_F_DSR;
	if (p->service && (p->flags & PKT_NO_SVC))
		e->flags |= CT_F_ALONE;
	e->backend = p->backend;
	e->backend_generation = p->backend_generation;
	e->service = p->service;
	e->endpoint[0] = p->from_id;
	e->endpoint[1] = p->to_id;
	e->policy = p->generation;
	/* Picked up in the middle: after a flush, an eviction, or a start on a running node. */
	if (p->proto == IPPROTO_TCP && !tcp_opens(p))
		e->state = CT_ESTABLISHED;
	ret = ct_put(d, p->flags & PKT_NO_FLOW);
	if (!ret && (p->flags & PKT_OWNER_DYING))
		ct_stillborn(d);
	if (!ret && monitored())
		report(p, EVENT_NEW, 0);
	return ret;
}

/*
 * Remember the flow. Where no entry can be made a plain flow goes on without, but a
 * translated one must not begin: its replies would not be known.
 */
ALWAYS int ct_commit(struct pkt *p)
{
	__u32 service = p->service || (p->flags & PKT_DSR);
	struct ct_entry *e = p->flow;
	int ret;

	if (e && ct_unremembered(e, p) && (p->flags & PKT_REPLY) && !(p->tcp_flags & TCP_RST)) {
		ret = ct_answered(p);
		if (ret)
			return ret;
		p->flow = e;	/* which the verifier forgot over the call */
	}
	if (p->flow) {
		/* A SYN goes where an earlier flow went; what the client's tuple says may be of another yet. */
		if (p->service && (p->flags & PKT_NO_SVC))
			__sync_fetch_and_or(&p->flow->flags, CT_F_ALONE);
		if (ct_update(p->flow, p))
			ct_promote_flow(p);
		return NEXT;
	}
	if (p->proto == IPPROTO_TCP && (p->tcp_flags & TCP_RST))
		return NEXT;
	/* A SYN-ACK too is the kernel's own; but its flow is known. */
	if (p->flags & PKT_AFTER_OWNER)
		return NEXT;
	/* Of a socket that is at its end only a datagram to a service may still be answered. */
	if ((p->flags & PKT_OWNER_DYING) && (p->proto == IPPROTO_TCP || !service))
		return NEXT;
	ret = ct_create(p);
	return service ? ret : NEXT;
}

#endif
