/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the stages know of the packet. */
#ifndef MOORING_PKT_H
#define MOORING_PKT_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "abi.h"
#include "maps.h"

/* A stage's result: 0 goes on, one of these ends the walk, -DROP_ drops. */
enum verdict {
	NEXT = 0,
	TO_STACK,	/* the host's stack takes it */
	TO_POD,		/* into p->to's interface */
	SWALLOWED,	/* dropped, and counted already */
	TO_SENDER,	/* our own answer, back into the interface it came from */
	TO_NEIGHBOUR,	/* out of p->to's interface, to whatever neighbour leads on */
};

enum pkt_flags {
	PKT_FIRST_FRAGMENT = 1 << 0,
	PKT_LATER_FRAGMENT = 1 << 1,	/* no layer 4 header in it */
	PKT_ICMP_ERROR = 1 << 2,	/* about another packet, which it quotes */
	PKT_REPLY = 1 << 3,		/* from the flow's responder */
	PKT_HAIRPIN = 1 << 4,		/* the pod is its own backend */
	PKT_OWNER_DYING = 1 << 5,	/* its socket is at its end: nothing is to be made for it */
	PKT_OWNER_CONNECTED = 1 << 6,	/* its socket has this flow only */
	PKT_OWNED = 1 << 7,		/* by a live socket with storage */
	PKT_AFTER_OWNER = 1 << 8,	/* TCP: the kernel sends it for a socket that is no more */
	PKT_STRAY = 1 << 9,		/* of no flow that is known, and so of none that was allowed */
	PKT_RENAMED = 1 << 10,		/* its source is a service's address, which the stack takes from no device */
	PKT_SNAT = 1 << 11,		/* the backend sees the node instead of the client */
	PKT_DSR = 1 << 12,		/* the backend's node answers the client itself; there: this is it */
	PKT_NO_SVC = 1 << 13,		/* it has no SVC entry, or it is not known that it has */
	PKT_OPENS = 1 << 14,		/* to a frontend, and the first of its flow: no table is asked for that */
	PKT_NO_FLOW = 1 << 15,		/* the entry of the flow on the wire was looked for in vain */
};

struct pkt {
	struct addr src, dst;		/* as they are now */
	struct addr sent_src, sent_dst;	/* as it came in, before translation */
	__be16 sport, dport;
	__be16 sent_sport, sent_dport;
	__u8 proto;
	__u8 tcp_flags;		/* the 13th byte of the TCP header */
	__u8 v6 : 1;
	__u8 first : 1;		/* that its socket sends: nobody has decided for it before */
	__u8 direction : 6;	/* enum direction: which hook this is */
	__u8 limits;		/* enum endpoint_limits: of its sender and of the pod that it is for */
	__u16 flags;		/* enum pkt_flags */
	__u16 l3, l4;		/* offsets */
	__u16 from_id, to_id;	/* endpoint ids, 0: not here */
	__u32 len;		/* of the frame, bytes */
	__u32 to_ifindex;	/* set with TO_POD and TO_NEIGHBOUR */
	__u32 backend, backend_generation;
	__u32 service;		/* set when sent_dst is a frontend that was translated */
	__u32 generation;	/* of mooring_shared when the walk began */
	__u64 cookie;		/* of the packet's own, live socket; 0: it has none, or nobody notices its end */
	struct ct_entry *flow;	/* the entry of the flow on the wire, after ct_lookup() */
};

#define ALWAYS static __always_inline

/*
 * A function of its own, verified once: for what not every packet needs. The
 * verifier takes its pointers for possibly null and what it writes for scalars.
 */
#define RARELY __attribute__((noinline))

ALWAYS __u64 *words(const struct addr *a)
{
	return (__u64 *)a->b;
}

ALWAYS int addr_eq(const struct addr *a, const struct addr *b)
{
	return words(a)[0] == words(b)[0] && words(a)[1] == words(b)[1];
}

ALWAYS int addr_zero(const struct addr *a)
{
	return !(words(a)[0] | words(a)[1]);
}

/* RFC 4291, 2.5.5.2: ::ffff:a.b.c.d */
ALWAYS void addr_from_v4(struct addr *a, __be32 v4)
{
	__be32 *w = (__be32 *)a->b;

	words(a)[0] = 0;
	w[2] = bpf_htonl(0xffff);
	w[3] = v4;
}

ALWAYS int addr_mapped(const struct addr *a)
{
	return !words(a)[0] && ((const __be32 *)a->b)[2] == bpf_htonl(0xffff);
}

ALWAYS __be32 addr_v4(const struct addr *a)
{
	return ((__be32 *)a->b)[3];
}

ALWAYS int addr_is_v4(const struct addr *a)
{
	return !words(a)[0] && ((__be32 *)a->b)[2] == bpf_htonl(0xffff);
}

ALWAYS void addr_from_v6(struct addr *a, const struct in6_addr *v6)
{
	const __be32 *s = (const __be32 *)v6;
	__be32 *d = (__be32 *)a->b;

	d[0] = s[0];
	d[1] = s[1];
	d[2] = s[2];
	d[3] = s[3];
}

#endif
