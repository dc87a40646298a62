/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The life of a conntrack entry, apart from packets: where it is found, who owns
 * it, how it ends. For the hooks at the socket's end and the sweep as well.
 */
#ifndef MOORING_ENTRY_H
#define MOORING_ENTRY_H

#include "backend.h"
#include "config.h"
#include "pkt.h"

#define EBUSY 16
#define EEXIST 17
#define EDEADLK 35
#define ETIMEDOUT 110

/* What a flow's entries outlive its sockets by, for packets that are on their way. */
#define GRACE_TRAMPOLINE (jiffies_per_second / 2)
#define GRACE_TRACEPOINT (jiffies_per_second * 2)
/* TCP_TIMEWAIT_LEN of the kernel. */
#define GRACE_TIMEWAIT (jiffies_per_second * 60)

ALWAYS void ct_count_by(__u32 stat, __u64 by)
{
	__u64 *n = bpf_map_lookup_elem(&mooring_ct_stats, &stat);

	if (n)
		*n += by;
}

ALWAYS void ct_count(__u32 stat)
{
	ct_count_by(stat, 1);
}

ALWAYS void ct_count_failure(__u32 stat, long err)
{
	ct_count(stat);
	if (err == -EBUSY)
		ct_count(CT_STAT_EBUSY);
	else if (err == -EDEADLK)
		ct_count(CT_STAT_EDEADLK);
	else if (err == -ETIMEDOUT)
		ct_count(CT_STAT_ETIMEDOUT);
}

ALWAYS void ct_live_add(__u64 n)
{
	__u32 zero = 0;
	struct ct_live *live = bpf_map_lookup_elem(&mooring_ct_live, &zero);

	if (live)
		__sync_fetch_and_add(&live->entries, n);
}

ALWAYS __u64 ct_live_entries(void)
{
	__u32 zero = 0;
	struct ct_live *live = bpf_map_lookup_elem(&mooring_ct_live, &zero);

	return live ? live->entries : 0;
}

/* The key of the flow between two ends; returns 1 when the first is the higher end. */
ALWAYS int ct_flow_key(struct ct_key *k, const struct addr *a, __be16 aport,
		       const struct addr *b, __be16 bport, __u8 proto)
{
	int high;

	if (words(a)[0] != words(b)[0])
		high = words(a)[0] > words(b)[0];
	else if (words(a)[1] != words(b)[1])
		high = words(a)[1] > words(b)[1];
	else
		high = aport > bport;
	k->addr[0] = high ? *b : *a;
	k->addr[1] = high ? *a : *b;
	k->port[0] = high ? bport : aport;
	k->port[1] = high ? aport : bport;
	k->proto = proto;
	k->type = CT_FLOW;
	k->pad = 0;
	return high;
}

ALWAYS struct ct_entry *ct_at(const struct ct_key *key)
{
	struct ct_entry *e = bpf_map_lookup_elem(&mooring_ct, key);

	return e ?: bpf_map_lookup_elem(&mooring_ct_embryonic, key);
}

/* Whoever gets a true answer, and nobody else, deletes the entry. */
ALWAYS int ct_claim(struct ct_entry *e, __u32 life)
{
	return !(life & CT_LIFE_CLAIMED) &&
	       __sync_val_compare_and_swap(&e->life, life, life | CT_LIFE_CLAIMED) == life;
}

/*
 * The same of what was looked up without anything that only this flow has, such as a
 * socket's cookie: between the look and the claim its place may have become another
 * key's. Looked up again: what is claimed stays where it is.
 */
ALWAYS int ct_claim_of(const struct ct_key *key, struct ct_entry *e, __u32 life)
{
	if (!ct_claim(e, life))
		return 0;
	if (ct_at(key) == e)
		return 1;
	__sync_fetch_and_and(&e->life, ~CT_LIFE_CLAIMED);
	return 0;
}

/* Delete a key whose entry was claimed. One that cannot be is given back, for the sweep to try again. */
ALWAYS int ct_delete_claimed(const struct ct_key *key, struct ct_entry *e)
{
	int embryonic = e->flags & CT_F_EMBRYONIC;
	long err;

	if (embryonic)
		err = bpf_map_delete_elem(&mooring_ct_embryonic, key);
	else
		err = bpf_map_delete_elem(&mooring_ct, key);
	if (err == -EBUSY || err == -EDEADLK || err == -ETIMEDOUT) {
		ct_count_failure(CT_STAT_DELETE_FAILED, err);
		__sync_fetch_and_and(&e->life, ~CT_LIFE_CLAIMED);
		return 0;
	}
	/* Evicted in between: the counts are of entries that were there. */
	if (err)
		return 0;
	if (!embryonic)
		ct_live_add(-1);
	return 1;
}

/* Whether a flow's decision has an entry of its own. */
ALWAYS int ct_has_decision(const struct ct_entry *e)
{
	return e->service && !(e->flags & CT_F_ALONE);
}

/* The key of the SVC entry that belongs to a flow from this initiator. */
ALWAYS void ct_svc_key_of(struct ct_key *k, const struct ct_entry *e,
			  const struct addr *initiator, __be16 port, __u8 proto)
{
	int other = !addr_zero(&e->origin);

	k->addr[0] = other ? e->origin : *initiator;
	k->addr[1] = e->nat;
	k->port[0] = other ? e->origin_port : port;
	k->port[1] = e->nat_port;
	k->proto = proto;
	k->type = CT_SVC;
	k->pad = 0;
}

ALWAYS void ct_svc_key_of_flow(struct ct_key *k, const struct ct_key *flow, const struct ct_entry *e)
{
	if (e->flags & CT_F_INITIATOR_HIGH) {
		ct_svc_key_of(k, e, &flow->addr[1], flow->port[1], flow->proto);
		/* Keeps the branches apart: clang 19 else chooses between the ends by arithmetic on pointers. */
		asm volatile("" ::: "memory");
	} else {
		ct_svc_key_of(k, e, &flow->addr[0], flow->port[0], flow->proto);
	}
}

/*
 * Whether a SVC entry is that of a flow from this end, as the wire has it: the client may
 * have begun anew, and to the same backend from another port of this node's.
 */
ALWAYS int ct_decided(const struct ct_entry *svc, const struct ct_entry *e, const struct addr *initiator, __be16 port)
{
	if (svc->backend != e->backend || svc->backend_generation != e->backend_generation)
		return 0;
	if (addr_zero(&svc->origin))
		return addr_zero(&e->origin) || (e->flags & CT_F_HAIRPIN);
	return svc->origin_port == port && addr_eq(&svc->origin, initiator);
}

ALWAYS int ct_decided_for(const struct ct_entry *svc, const struct ct_entry *e, const struct ct_key *flow)
{
	int ret;

	if (e->flags & CT_F_INITIATOR_HIGH) {
		ret = ct_decided(svc, e, &flow->addr[1], flow->port[1]);
		/* As above. */
		asm volatile("" ::: "memory");
	} else {
		ret = ct_decided(svc, e, &flow->addr[0], flow->port[0]);
	}
	return ret;
}

/*
 * Delete the SVC entry of a flow that goes, unless another flow has taken the decision
 * over. Returns how many went.
 */
ALWAYS int ct_end_decision(const struct ct_key *flow, const struct ct_entry *e)
{
	struct ct_entry *svc;
	struct ct_key key;
	__u32 life;

	if (flow->type != CT_FLOW || !e->service)
		return 0;
	ct_svc_key_of_flow(&key, flow, e);
	svc = ct_at(&key);
	if (!svc)
		return 0;
	/* Read before the rest: who takes it over changes it first. */
	life = *(volatile __u32 *)&svc->life;
	return !svc->cookie[0] && ct_decided_for(svc, e, flow) && ct_claim_of(&key, svc, life) &&
	       ct_delete_claimed(&key, svc);
}

/*
 * Delete a flow's entry, and the SVC entry of the same decision. Returns how many went.
 * Claimed before the decision is looked for: who makes that meanwhile sees the claim.
 */
static __noinline int ct_end(const struct ct_key *flow, struct ct_entry *e, __u32 life, __u32 stat)
{
	int n;

	if (!ct_claim(e, life))
		return 0;
	n = ct_end_decision(flow, e);
	n += ct_delete_claimed(flow, e);
	ct_count_by(stat, n);
	return n;
}

/*
 * Where an ending is made, and an entry is put on its way from one table to the other:
 * the stack of a program and all that it calls is 512 bytes. A hook that runs in a
 * process may be interrupted by one that runs for a packet, so there are several.
 */
#define CT_BENCHES 3

struct ct_bench {
	struct ct_entry copy;
	struct ending end;
	__u32 taken;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CT_BENCHES);
	__type(key, __u32);
	__type(value, struct ct_bench);
} ct_benches SEC(".maps");

ALWAYS struct ct_bench *ct_bench_take(void)
{
	for (__u32 i = 0; i < CT_BENCHES; i++) {
		__u32 place = i;
		struct ct_bench *b = bpf_map_lookup_elem(&ct_benches, &place);

		if (b && !__sync_val_compare_and_swap(&b->taken, 0, 1))
			return b;
	}
	return NULL;
}

/* How often a look is taken at an entry that is on its way out before the packet is given up. */
#define CT_PATIENCE 16

/* An entry in the making: the stack of a program is 512 bytes. */
struct ct_draft {
	struct ct_key key;
	struct ct_entry entry;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ct_draft);
} ct_drafts SEC(".maps");

ALWAYS struct ct_draft *ct_draft(void)
{
	__u32 zero = 0;
	struct ct_draft *d = bpf_map_lookup_elem(&ct_drafts, &zero);

	if (d)
		__builtin_memset(&d->entry, 0, sizeof(d->entry));
	return d;
}

/* Claim an entry for the next flow on its tuple, unless somebody is deleting it. */
ALWAYS int ct_claim_for(const struct ct_key *key, struct ct_entry *e, const struct ct_entry *next)
{
	__u32 life = e->life;

	/* A claim on an entry that was not heard of for long is taken for one left behind. */
	e->seen = next->seen;
	return ct_claim_of(key, e, life);
}

/* Overwrite what was claimed so: nobody may judge it by what is half the last flow's. */
ALWAYS void ct_overwrite(struct ct_entry *e, const struct ct_entry *next)
{
	__u32 place = e->flags & CT_F_EMBRYONIC;
	__u32 life;

	e->cookie[0] = next->cookie[0];
	e->cookie[1] = next->cookie[1];
	e->packets[0] = next->packets[0];
	e->packets[1] = 0;
	e->bytes[0] = next->bytes[0];
	e->bytes[1] = 0;
	e->nat = next->nat;
	e->origin = next->origin;
	e->nat_port = next->nat_port;
	e->origin_port = next->origin_port;
	e->backend = next->backend;
	e->backend_generation = next->backend_generation;
	e->service = next->service;
	e->endpoint[0] = next->endpoint[0];
	e->endpoint[1] = next->endpoint[1];
	e->state = next->state;
	e->tether[0] = next->tether[0];
	e->tether[1] = 0;
	/* It stays where it is, wherever the next one would have gone. */
	e->flags = (next->flags & ~CT_F_EMBRYONIC) | place;
	e->policy = next->policy;
	e->confirmed = 0;
	/* Read again, as it was claimed: there is no room to keep it. */
	life = *(volatile __u32 *)&e->life;
	__sync_val_compare_and_swap(&e->life, life, (life & ~CT_LIFE_CLAIMED) + 2);
}

ALWAYS int ct_take_over(const struct ct_key *key, struct ct_entry *e, const struct ct_entry *next)
{
	if (!ct_claim_for(key, e, next))
		return 0;
	ct_overwrite(e, next);
	return 1;
}

/*
 * Put the draft into the table. What an earlier flow left under the key is taken
 * over: callers have made sure that no live flow is there, except that for a
 * moment the last one may still be on its way out. Absent: they have just looked,
 * and found nothing at all.
 */
ALWAYS int ct_put(struct ct_draft *d, int absent)
{
	/* A pod's own live socket vouches for its flow; of others it is not known who made them up. */
	int direct = d->entry.cookie[0] && ct_live_entries() < ct_direct_limit;
	struct ct_entry *e;
	long err;

	d->entry.life = bpf_get_prandom_u32() & ~CT_LIFE_CLAIMED;
	if (!direct)
		d->entry.flags |= CT_F_EMBRYONIC;
	for (int i = 0; i < CT_PATIENCE; i++) {
		if ((!direct && !absent) || i) {
			e = ct_at(&d->key);
			if (e) {
				if (ct_take_over(&d->key, e, &d->entry)) {
					ct_count(CT_STAT_CREATED);
					ct_count(CT_STAT_TAKEN_OVER);
					return NEXT;
				}
				continue;
			}
		}
		if (direct)
			err = bpf_map_update_elem(&mooring_ct, &d->key, &d->entry, BPF_NOEXIST);
		else
			err = bpf_map_update_elem(&mooring_ct_embryonic, &d->key, &d->entry, BPF_NOEXIST);
		if (!err) {
			if (direct)
				ct_live_add(1);
			ct_count(CT_STAT_CREATED);
			return NEXT;
		}
		if (err != -EEXIST) {
			ct_count_failure(CT_STAT_INSERT_FAILED, err);
			return -DROP_CONNTRACK_FULL;
		}
	}
	return -DROP_TUPLE_BUSY;
}

/* Delete the decision of a draft, whose flow has gone before it was there. */
ALWAYS void ct_forget(const struct ct_draft *d)
{
	struct ct_entry *e = ct_at(&d->key);
	__u32 life;

	if (!e)
		return;
	/* Read before the rest: who takes it over changes it first. */
	life = *(volatile __u32 *)&e->life;
	if (!e->cookie[0] && e->backend == d->entry.backend && e->origin_port == d->entry.origin_port &&
	    ct_claim_of(&d->key, e, life))
		ct_count_by(CT_STAT_DELETED_SOCKET, ct_delete_claimed(&d->key, e));
}

/* The same of one whose owner has let go of its flow before it was there, or goes by another: it goes with that. */
ALWAYS void ct_disown(const struct ct_draft *d)
{
	struct ct_entry *e = ct_at(&d->key);

	if (!e || __sync_val_compare_and_swap(&e->cookie[0], d->entry.cookie[0], 0) != d->entry.cookie[0])
		return;
	if (e->state < CT_CLOSING)
		e->state = CT_CLOSING;
	__sync_fetch_and_or(&e->flags, CT_F_ENDED);
}

/*
 * Whether the initiator has a connection by its decision that lives, to another backend: it
 * has not begun this flow, or it has forgotten that connection.
 */
ALWAYS int ct_contested(const struct ct_entry *svc, const struct ct_entry *e, const struct ct_key *flow)
{
	return flow->proto == IPPROTO_TCP && svc->state == CT_ESTABLISHED && !ct_decided_for(svc, e, flow) &&
	       backend_of(svc->backend, svc->backend_generation);
}

/*
 * The SVC entry of a flow that was made without one (CT_F_ALONE); owner: the cookie of whoever
 * ends it. A flow that nobody owns leaves that of a connection that lives, and is marked.
 */
ALWAYS int ct_remember(const struct ct_key *flow, struct ct_entry *e, __u64 owner)
{
	/* The client is known to the backend by an address of this node's. */
	int other = !addr_zero(&e->origin) && !(e->flags & CT_F_HAIRPIN), gone;
	__u32 life = *(volatile __u32 *)&e->life;
	struct ct_draft *d = ct_draft();
	struct ct_entry *svc;
	int ret;

	if (!d)
		return -DROP_CONNTRACK_FULL;
	ct_svc_key_of_flow(&d->key, flow, e);
	svc = owner ? NULL : ct_at(&d->key);
	if (svc && ct_contested(svc, e, flow)) {
		__sync_fetch_and_or(&e->flags, CT_F_CONTESTED);
		return NEXT;
	}
	d->entry.cookie[0] = owner;
	d->entry.tether[0] = owner ? TETHER_HELD : TETHER_NONE;
	d->entry.seen = bpf_jiffies64();
	d->entry.packets[0] = e->packets[0];
	d->entry.bytes[0] = e->bytes[0];
	if (e->flags & CT_F_INITIATOR_HIGH) {
		d->entry.nat = flow->addr[0];
		d->entry.nat_port = flow->port[0];
		if (other) {
			d->entry.origin = flow->addr[1];
			d->entry.origin_port = flow->port[1];
		}
		/* As in ct_svc_key_of_flow(). */
		asm volatile("" ::: "memory");
	} else {
		d->entry.nat = flow->addr[1];
		d->entry.nat_port = flow->port[1];
		if (other) {
			d->entry.origin = flow->addr[0];
			d->entry.origin_port = flow->port[0];
		}
	}
	d->entry.backend = e->backend;
	d->entry.backend_generation = e->backend_generation;
	d->entry.service = e->service;
	d->entry.endpoint[0] = e->endpoint[0];
	d->entry.state = e->state;
	d->entry.flags = e->flags & (CT_F_EGRESS | CT_F_ENDED);
	ret = ct_put(d, !owner && !svc);
	if (ret)
		return ret;
	/* A barrier, as a claim is: either who ends the flow finds the SVC entry, or this sees that it has ended. */
	__sync_fetch_and_and(&e->flags, ~CT_F_ALONE);
	gone = *(volatile __u32 *)&e->life != life || (life & CT_LIFE_CLAIMED) || ct_at(flow) != e;
	if (owner && (gone || *(volatile __u64 *)&e->cookie[0] != owner))
		ct_disown(d);
	if (gone)
		ct_forget(d);
	return NEXT;
}

/* Move an entry that is over to where it pushes out only its like. It keeps its life. */
static __noinline void ct_demote(const struct ct_key *key, struct ct_entry *e, struct ct_entry *copy)
{
	__u32 life = e->life;

	if (!copy || (e->flags & CT_F_EMBRYONIC) || !ct_claim_of(key, e, life))
		return;
	*copy = *e;
	copy->life = life;
	copy->flags |= CT_F_EMBRYONIC;
	if (!bpf_map_update_elem(&mooring_ct_embryonic, key, copy, BPF_NOEXIST))
		ct_count(CT_STAT_DEMOTED);
	ct_delete_claimed(key, e);
}

ALWAYS void ct_bury_at(struct ct_bench *b, const struct ct_key *flow, struct ct_entry *e, int timewait)
{
	struct ending *end = &b->end;
	struct ct_entry *svc;
	long err;

	end->life = e->life;
	if (ct_live_entries() > ct_direct_limit && !(e->flags & CT_F_EMBRYONIC)) {
		if (ct_has_decision(e)) {
			ct_svc_key_of_flow(&end->key, flow, e);
			svc = bpf_map_lookup_elem(&mooring_ct, &end->key);
			if (svc && !svc->cookie[0] && ct_decided_for(svc, e, flow))
				ct_demote(&end->key, svc, &b->copy);
		}
		ct_demote(flow, e, &b->copy);
		e = ct_at(flow);
		if (!e)
			return;
	}
	end->key = *flow;
	if (timewait) {
		end->grace = GRACE_TIMEWAIT;
		end->due = bpf_jiffies64() + end->grace;
		err = bpf_map_push_elem(&mooring_timewait, end, 0);
		/* The sweep knows its timeout too. */
		if (err)
			ct_count(CT_STAT_GRACE_FULL);
		return;
	}
	end->grace = hook_mode == HOOK_TRAMPOLINE ? GRACE_TRAMPOLINE : GRACE_TRACEPOINT;
	end->due = bpf_jiffies64() + end->grace;
	err = bpf_map_push_elem(&mooring_ended, end, 0);
	if (err) {
		ct_count(CT_STAT_GRACE_FULL);
		ct_end(flow, e, e->life, CT_STAT_DELETED_SOCKET);
	}
}

/*
 * Its sockets are gone: it ends when nothing was heard for the grace. When the table
 * fills up, that is not waited for at the expense of those that live.
 */
ALWAYS void ct_bury(const struct ct_key *flow, struct ct_entry *e, int timewait)
{
	struct ct_bench *b = ct_bench_take();

	/* Its timeout is known to the sweep. */
	if (!b) {
		ct_count(CT_STAT_GRACE_FULL);
		return;
	}
	ct_bury_at(b, flow, e, timewait);
	b->taken = 0;
}

/* A side whose socket lives, and has this flow only: nothing else ends the entry. */
ALWAYS int ct_held(const struct ct_entry *e)
{
	return (e->cookie[0] && e->tether[0] == TETHER_HELD) || (e->cookie[1] && e->tether[1] == TETHER_HELD);
}

enum release {
	RELEASE_GRACE,		/* packets may be on their way */
	RELEASE_TIMEWAIT,	/* the flow is in TIME_WAIT from now on */
	RELEASE_NOW,		/* nothing follows */
	RELEASE_TIMEWAIT_OVER,	/* nothing follows, and TIME_WAIT has been waited for */
};

/*
 * Nobody owns it any more. Claimed for the moment, so that it is not marked for the
 * next flow on its tuple, which may have taken it over since its life was read.
 */
ALWAYS int ct_mark_ended(struct ct_entry *e, __u32 life, __u8 state)
{
	if (!ct_claim(e, life))
		return 0;
	if (e->state < state)
		e->state = state;
	__sync_fetch_and_or(&e->flags, CT_F_ENDED);
	__sync_fetch_and_and(&e->life, ~CT_LIFE_CLAIMED);
	return 1;
}

/* The same of the flow's decision: a socket whose SYN was sent again to another backend goes by that one's now. */
static __noinline void ct_release_decision(const struct ct_key *flow, const struct ct_entry *e, __u64 cookie, enum release how)
{
	struct ct_entry *svc;
	struct ct_key key;
	__u32 life;

	ct_svc_key_of_flow(&key, flow, e);
	svc = ct_at(&key);
	if (!svc)
		return;
	life = *(volatile __u32 *)&svc->life;
	if (ct_decided_for(svc, e, flow) && __sync_val_compare_and_swap(&svc->cookie[0], cookie, 0) == cookie)
		ct_mark_ended(svc, life, how == RELEASE_TIMEWAIT || e->state == CT_TIMEWAIT ? CT_TIMEWAIT : CT_CLOSING);
}

/*
 * A socket lets go of its flow. The entry ends with the last of its owners. The
 * swap is what makes the cookie's comparison and the last owner's notice one step.
 */
static __noinline void ct_release(const struct ct_key *flow, __u64 cookie, __u8 side, enum release how)
{
	struct ct_entry *e = ct_at(flow);
	__u64 *mine, *other;
	__u8 other_tether;
	__u32 life;

	if (!e || !cookie)
		return;
	mine = side ? &e->cookie[1] : &e->cookie[0];
	other = side ? &e->cookie[0] : &e->cookie[1];
	other_tether = side ? e->tether[0] : e->tether[1];
	life = e->life;
	if (__sync_val_compare_and_swap(mine, cookie, 0) != cookie)
		return;
	if (!side && ct_has_decision(e))
		ct_release_decision(flow, e, cookie, how);
	/* The other owner keeps it; but of a server's socket with many peers nothing follows for one of them. */
	if (*other && (side || other_tether == TETHER_HELD))
		return;
	/*
	 * Both sides have said their last and were heard, so that after the last packet
	 * nothing follows; or the SYN was refused.
	 */
	if (how == RELEASE_GRACE && ((e->state == CT_TIMEWAIT && hook_mode == HOOK_TRAMPOLINE) ||
				     (flow->proto == IPPROTO_TCP && (e->flags & CT_F_RST) && !(e->flags & CT_F_REPLIED))))
		how = RELEASE_NOW;
	if (!ct_mark_ended(e, life, how == RELEASE_TIMEWAIT ? CT_TIMEWAIT : CT_CLOSING))
		return;
	if (how == RELEASE_NOW)
		ct_end(flow, e, life, CT_STAT_DELETED_SOCKET);
	else if (how == RELEASE_TIMEWAIT_OVER)
		ct_end(flow, e, life, CT_STAT_DELETED_TIMEWAIT);
	else
		ct_bury(flow, e, how == RELEASE_TIMEWAIT);
}

#endif
