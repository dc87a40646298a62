//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The hooks on each uplink. */
#include "lib/config.h"
#include "lib/parse.h"
#include "lib/conntrack.h"
#include "lib/policy.h"
#include "lib/icmp.h"
#include "lib/north.h"
#include "lib/meta.h"
#include "lib/service.h"
#include "lib/finish.h"

/* Whether the packet's destination is any of our business, where it is not known to be right. */
ALWAYS int wire_concerns(const struct pkt *p)
{
	struct addr dst = p->dst;

	return svc_find(&dst, 0, 0) || bpf_map_lookup_elem(&mooring_endpoints, &dst);
}

/* What is to no pod and no service of ours is left to the stack, right or not. */
static __noinline int wire_parse(ctx_t *ctx, struct pkt *p)
{
	int ret;

	if (!p)
		return TO_STACK;
	ret = pkt_parse(ctx, p);
	if (ret == -DROP_VLAN_TAG || ret == -DROP_ETHERTYPE)
		return TO_STACK;
	/* The node's own servers get it when its first has come: the stack waits for that. */
	if (ret == -DROP_FRAGMENT_UNKNOWN && north_own_address(&p->dst))
		return TO_STACK;
	return ret >= 0 || addr_zero(&p->dst) || wire_concerns(p) ? ret : TO_STACK;
}

ALWAYS int wire_flow(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	int ret;

	if (!w)
		return TO_STACK;
	ct_keep(p);				/* conntrack.h  as it was sent                   */
	ret = north_decide(ctx, p);		/* north.h      to a frontend, to which backend  */
	if (ret)
		return ret;
	if (p->service)
		return north_forward(ctx, p, w);	/* north.h  client -> backend            */
	return north_backward(ctx, p, w);	/* north.h      backend -> pod, or client        */
}

/* An error about a translated flow goes where its packets go. */
ALWAYS int wire_error(ctx_t *ctx, struct pkt *p)
{
	struct addr dst = p->dst;
	int ret = icmp_translate(ctx, p);

	if (ret)
		return ret;
	if ((p->flags & PKT_STRAY) || (addr_eq(&dst, &p->dst) && !(p->flags & PKT_RENAMED)))
		return TO_STACK;
	p->flags |= PKT_RENAMED;
	return forward(ctx, p);
}

/* What another node tells about a client's packet is learnt, and the packet goes on. */
ALWAYS int wire_told(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	int ret = dsr_unwrap(ctx, p);

	if (ret || !w || !(w->flags & WAY_TELL))
		return ret;
	ret = wire_parse(ctx, p);
	if (ret)
		return ret < 0 ? ret : -DROP_DSR_OPTION;
	if ((p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP) || !addr_eq(&p->dst, &w->to))
		return -DROP_DSR_OPTION;
	if (north_martian(p))
		return -DROP_MARTIAN;
	ret = dsr_learn(p, w);
	if (ret)
		return ret;
	if (w->flags & WAY_CUT) {
		ret = policy_check(p) ?: ct_commit(p);
		if (ret)
			return ret;
		count(p, DROP_NONE);
		return SWALLOWED;
	}
	return north_told(ctx, p);
}

ALWAYS int wire_in(ctx_t *ctx, struct pkt *p)
{
	return wire_parse(ctx, p)		/* headers -> p                                  */
	    ?: (dsr_datagram(p)
		? wire_told(ctx, p)		/* dsr.h        from the node that a client asked */
		: NEXT)
	    ?: (is_icmp_error(p)
		? wire_error(ctx, p)		/* icmp.h       outside and what is quoted       */
		: wire_flow(ctx, p));
}

/* What the driver's program said about the packet is lost, but that it had finished with it. */
RARELY int wire_deliver(ctx_t *ctx)
{
	struct endpoint *to;
	struct ethhdr *eth;
	struct addr dst;

	if (!pkt_destination(ctx, &dst))
		return TC_ACT_SHOT;
	to = bpf_map_lookup_elem(&mooring_endpoints, &dst);
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!to || !eth)
		return TC_ACT_SHOT;
	__builtin_memcpy(eth->h_dest, to->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, to->host_mac, ETH_ALEN);
	return limit_deliver(ctx, to->ifindex, to->limits);
}

SEC("tc")
int from_wire(ctx_t *ctx)
{
	struct pkt p = { .direction = FROM_WIRE };
	struct wire_meta *done = meta_at(ctx);
	struct ethhdr *eth;
	int verdict;

	/* The driver's program has done all but what only tc can. A tag that the device took off is not for the pod. */
	if (done) {
		if (ctx->vlan_present && bpf_skb_vlan_pop(ctx))
			return TC_ACT_SHOT;
		eth = pkt_at(ctx, 0, sizeof(*eth));
		done = meta_at(ctx);
		if (!eth || !done)
			return TC_ACT_SHOT;
		__builtin_memcpy(eth->h_dest, done->mac, ETH_ALEN);
		__builtin_memcpy(eth->h_source, done->host_mac, ETH_ALEN);
		return limit_deliver(ctx, done->ifindex, done->limits);
	}
	if (meta_sealed(ctx)) {
		if (ctx->vlan_present && bpf_skb_vlan_pop(ctx))
			return TC_ACT_SHOT;
		return wire_deliver(ctx);
	}
	/* What a device in promiscuous mode sees of others' is not for us. */
	if (ctx->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	verdict = wire_in(ctx, &p);
	return finish(ctx, &p, refuse(ctx, &p, verdict));
}

/* What this node's own processes answer goes back under the name that the client knows. */
ALWAYS int wire_flow_out(ctx_t *ctx, struct pkt *p)
{
	struct ct_entry *e;

	ct_keep(p);
	ct_lookup(p);
	e = p->flow;
	if (!e || !(p->flags & PKT_REPLY) || addr_zero(&e->nat))
		return TO_STACK;
	socket_claim(ctx, p);
	p->flow = e;	/* which the verifier forgot over the call */
	return svc_untranslate(ctx, p) ?: ct_commit(p);
}

/* So does what the node's stack says about a client's packets. */
ALWAYS int wire_error_out(ctx_t *ctx, struct pkt *p)
{
	int ret = icmp_translate(ctx, p);

	return ret == -DROP_REWRITE ? ret : TO_STACK;
}

/* What the node sends is the stack's to judge, not ours. */
ALWAYS int wire_out(ctx_t *ctx, struct pkt *p)
{
	int ret = wire_parse(ctx, p);

	if (ret)
		return TO_STACK;
	return is_icmp_error(p)
		? wire_error_out(ctx, p)
		: wire_flow_out(ctx, p);
}

SEC("tc")
int to_wire(ctx_t *ctx)
{
	struct pkt p = { .direction = TO_WIRE };
	int verdict;

	/* What came in by a device has been seen there. */
	if (ctx->ingress_ifindex)
		return TC_ACT_UNSPEC;
	verdict = wire_out(ctx, &p);
	if (!verdict && (p.flags & PKT_OWNED))
		socket_remember(ctx, &p);	/* socket.h  the flow ends with it */
	else if (!verdict && (p.flags & PKT_AFTER_OWNER) && hook_mode == HOOK_TRACEPOINT)
		socket_succeeded(ctx, &p);
	return finish(ctx, &p, verdict);
}

char _license[] SEC("license") = "Dual BSD/GPL";
