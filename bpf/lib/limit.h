/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Pods with a limit, such as the CNI plugin bandwidth sets by qdiscs on the host's
 * end of their pair. A redirect to the pod's own end passes neither:
 *
 * - What such a pod gets is sent to the host's end, whose root qdisc it passes.
 * - What it sends is decided here as ever, and then goes on to the ingress qdisc,
 *   which runs after us. That takes the packet to an ifb, from where it comes back to
 *   the host's end, but to no program there. So it bears the MAC of a macvlan device
 *   that the daemon puts on the host's end, and there a program delivers it.
 *
 * Where the device is missing, the host's stack takes such a packet and routes it.
 */
#ifndef MOORING_LIMIT_H
#define MOORING_LIMIT_H

#include <linux/pkt_cls.h>
#include "parse.h"

/* The device's MAC, the same on every pod's host end: nobody else can be reached there. */
volatile const __u8 limit_mac[ETH_ALEN] = { 0x0e, 'm', 'o', 'o', 'r', 0x01 };

#ifndef MOORING_XDP

/*
 * In place of the sender's MAC, while the packet is on its detour. A qdisc may use
 * what else goes with a packet for itself. A pod cannot write it: the first byte is
 * that of a group, which is nobody's own address.
 */
struct limit_note {
	__u8 group;
	__u8 verdict;		/* enum verdict: TO_POD or TO_NEIGHBOUR */
	__u16 ifindex[2];
} __attribute__((packed));

#define LIMIT_GROUP 0x03

/*
 * In a packet's control block between here and the egress hook of the host's end. The
 * stack has its own there, and cleared it on the way in: as its IPv4 options this
 * would have a length that no options have, as its IPv6 headers flags that are not there.
 */
#define LIMIT_DELIVERED 0x6d6f6f72

ALWAYS int limit_deliver(ctx_t *ctx, __u32 ifindex, __u32 limits)
{
	if (!(limits & LIMIT_IN))
		return bpf_redirect_peer(ifindex, 0);
	ctx->cb[0] = LIMIT_DELIVERED;
	ctx->cb[1] = LIMIT_DELIVERED;
	return bpf_redirect(ifindex, 0);
}

ALWAYS int limit_delivered(ctx_t *ctx)
{
	if (ctx->cb[0] != LIMIT_DELIVERED || ctx->cb[1] != LIMIT_DELIVERED)
		return 0;
	ctx->cb[0] = 0;
	ctx->cb[1] = 0;
	return 1;
}

/* By way of the sender's ingress qdisc. */
RARELY int limit_detour(ctx_t *ctx, struct pkt *p, __u32 verdict)
{
	struct limit_note *note;
	struct ethhdr *eth;

	if (!p)
		return TC_ACT_SHOT;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return TC_ACT_SHOT;
	for (int i = 0; i < ETH_ALEN; i++)
		eth->h_dest[i] = limit_mac[i];
	note = (struct limit_note *)eth->h_source;
	note->group = LIMIT_GROUP;
	note->verdict = verdict;
	note->ifindex[0] = p->to_ifindex;
	note->ifindex[1] = p->to_ifindex >> 16;
	return TC_ACT_UNSPEC;
}

/* Behind it: to the pod, if that is still there, or to the neighbour. */
ALWAYS int limit_resume(ctx_t *ctx)
{
	struct limit_note note;
	struct endpoint *to;
	struct ethhdr *eth;
	struct addr dst;
	__u32 ifindex;

	if (!pkt_destination(ctx, &dst))
		return TC_ACT_SHOT;
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return TC_ACT_SHOT;
	__builtin_memcpy(&note, eth->h_source, sizeof(note));
	if (note.group != LIMIT_GROUP)
		return TC_ACT_SHOT;
	ifindex = note.ifindex[0] | (__u32)note.ifindex[1] << 16;
	if (note.verdict == TO_NEIGHBOUR)
		return bpf_redirect_neigh(ifindex, NULL, 0, 0);
	to = bpf_map_lookup_elem(&mooring_endpoints, &dst);
	if (!to || to->ifindex != ifindex)
		return TC_ACT_SHOT;
	__builtin_memcpy(eth->h_dest, to->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, to->host_mac, ETH_ALEN);
	return limit_deliver(ctx, ifindex, to->limits);
}

#endif

#endif
