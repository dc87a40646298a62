/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Network policy: whether a flow may begin, on what its packets are after
 * translation. The conntrack entry remembers the generation of the policies that
 * allowed it, so an established flow costs one comparison, and its replies pass
 * without a rule of their own. After a change of policy the next packet, in
 * either direction, is decided anew, always as the flow's initiator sent it.
 */
#ifndef MOORING_POLICY_H
#define MOORING_POLICY_H

#include "config.h"
#include "endpoint.h"
#include "conntrack.h"

/* A look-up in the making: the stack of nested functions is 512 bytes. */
struct policy_draft {
	struct addr from, to;
	struct identity_key where;
	struct profile_key what;
	struct verdict_key who;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct policy_draft);
} policy_drafts SEC(".maps");

ALWAYS struct policy_draft *policy_draft(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&policy_drafts, &zero);
}

/* The answer for a port, or for all that is not a port: the longest entry of the profile. */
ALWAYS int policy_profile(struct profile_key *key, __u64 profile, __u8 proto, __be16 port)
{
	__u32 *allow;

	if (profile == PROFILE_ALL)
		return 1;
	key->prefixlen = 8 * (sizeof(key->profile) + sizeof(key->proto) + sizeof(key->port));
	key->profile[0] = profile;
	key->profile[1] = profile >> 32;
	key->proto = proto;
	__builtin_memcpy(key->port, &port, sizeof(key->port));
	allow = bpf_map_lookup_elem(&mooring_profiles, key);
	return allow && *allow;
}

ALWAYS void policy_count(__u64 ruleset, __u32 len)
{
	struct counter zero = {};
	struct counter *c = bpf_map_lookup_elem(&mooring_policy_drops, &ruleset);

	if (!c) {
		bpf_map_update_elem(&mooring_policy_drops, &ruleset, &zero, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&mooring_policy_drops, &ruleset);
	}
	if (c) {
		c->packets++;
		c->bytes += len;
	}
}

/* What holds for an endpoint in one direction towards a peer. What was not written yet denies. */
RARELY int policy_side(const struct addr *peer, __u32 endpoint, __u32 direction, __u32 proto, __u32 port)
{
	struct policy_draft *d = policy_draft();
	struct endpoint_policy *p;
	__u64 *identity, *profile;

	if (!peer || !d)
		return -DROP_POLICY_UNKNOWN;
	p = bpf_map_lookup_elem(&mooring_policies, &endpoint);
	if (!p)
		return -DROP_POLICY_UNKNOWN;
	d->who.ruleset = direction == POLICY_EGRESS ? p->ruleset[POLICY_EGRESS] : p->ruleset[POLICY_INGRESS];
	if (d->who.ruleset == RULESET_OPEN)
		return NEXT;
	d->where.prefixlen = 8 * sizeof(d->where.addr);
	__builtin_memcpy(d->where.addr, peer->b, sizeof(d->where.addr));
	identity = bpf_map_lookup_elem(&mooring_identities, &d->where);
	if (identity && *identity == IDENTITY_HOST)
		return NEXT;
	if (!identity || !d->who.ruleset)
		return -DROP_POLICY_UNKNOWN;
	d->who.identity = *identity;
	profile = bpf_map_lookup_elem(&mooring_verdicts, &d->who);
	if (!profile) {
		d->who.identity = IDENTITY_GROUPS | (*identity & (IDENTITY_GROUPS - 1));
		profile = bpf_map_lookup_elem(&mooring_verdicts, &d->who);
	}
	if (profile && policy_profile(&d->what, *profile, proto, port))
		return NEXT;
	return direction == POLICY_EGRESS ? -DROP_POLICY_EGRESS : -DROP_POLICY_INGRESS;
}

ALWAYS void policy_blame(__u32 endpoint, __u32 direction, __u32 len)
{
	struct endpoint_policy *p = bpf_map_lookup_elem(&mooring_policies, &endpoint);

	if (p)
		policy_count(direction == POLICY_EGRESS ? p->ruleset[POLICY_EGRESS] : p->ruleset[POLICY_INGRESS], len);
}

/* Instead of an id: which endpoints a packet is between is looked up. */
#define POLICY_LOOK_UP (~0u)

/* Egress policy of the pod that begins, ingress policy of the one that is reached: ids, 0 where it is none of this node. */
RARELY int policy_judge(struct pkt *p, __u32 from_id, __u32 to_id)
{
	struct policy_draft *d = policy_draft();
	__be16 port;
	int ret = NEXT;

	if (!p || !d)
		return -DROP_POLICY_UNKNOWN;
	if (from_id == POLICY_LOOK_UP) {
		from_id = endpoint_id(p->flags & PKT_REPLY ? p->dst : p->src);
		to_id = endpoint_id(p->flags & PKT_REPLY ? p->src : p->dst);
	}
	/* A pod always reaches itself. */
	if (from_id == to_id)
		return NEXT;
	if (p->flags & PKT_REPLY) {
		d->from = p->dst;
		d->to = p->src;
		port = p->sport;
	} else {
		d->from = p->src;
		d->to = p->dst;
		port = p->dport;
	}
	if (from_id) {
		ret = policy_side(&d->to, from_id, POLICY_EGRESS, p->proto, port);
		if (ret == -DROP_POLICY_EGRESS)
			policy_blame(from_id, POLICY_EGRESS, p->len);
	}
	if (!ret && to_id) {
		ret = policy_side(&d->from, to_id, POLICY_INGRESS, p->proto, port);
		if (ret == -DROP_POLICY_INGRESS)
			policy_blame(to_id, POLICY_INGRESS, p->len);
	}
	/* Whose policy it was, for events. */
	if (ret)
		p->from_id = ret == -DROP_POLICY_INGRESS ? to_id : from_id ?: to_id;
	return ret;
}

/* Nothing is enforced for the endpoint, or it is none of this node. */
ALWAYS int policy_open(__u32 endpoint, __u32 direction)
{
	struct endpoint_policy *p;

	if (!endpoint)
		return 1;
	p = bpf_map_lookup_elem(&mooring_policies, &endpoint);
	return p && p->ruleset[direction] == RULESET_OPEN;
}

/*
 * The first packet of a flow. Where it is from was seen to by the hook: what a pod of
 * this node sends comes by from_container, and what comes by another hook has been there.
 */
ALWAYS int policy_begin(struct pkt *p)
{
	if (!p->to_id)
		destination(p);
	if (!policy_enforced || (p->flags & PKT_HAIRPIN))
		return NEXT;
	if (policy_open(p->from_id, POLICY_EGRESS) && policy_open(p->to_id, POLICY_INGRESS))
		return NEXT;
	return policy_judge(p, p->from_id, p->to_id);
}

/* The first packet of a flow, and the next one after policies have changed. */
ALWAYS int policy_check(struct pkt *p)
{
	struct ct_entry *e = p->flow;
	int ret;

	if (e && (!policy_enforced || e->policy == p->generation || (e->flags & CT_F_HAIRPIN)))
		return NEXT;
	ret = e ? policy_judge(p, POLICY_LOOK_UP, 0) : policy_begin(p);
	p->flow = e;	/* which the verifier forgot over the call */
	if (!ret && e)
		e->policy = p->generation;
	return ret;
}

/* Of what has no flow there is no entry that remembers the verdict. */
ALWAYS int policy_check_stray(struct pkt *p)
{
	return policy_enforced && (p->flags & PKT_STRAY) ? policy_judge(p, POLICY_LOOK_UP, 0) : NEXT;
}

#endif
