/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What one node tells another about a client's packet, as it is on the wire; dsr.h says how. */
#ifndef MOORING_TELL_H
#define MOORING_TELL_H

#include "parse.h"

/* Of both ends of the datagram: below what nodes give to flows that they stand in for. */
#define DSR_PORT 717
#define DSR_MAGIC 0x4d6f4472	/* "MoDr" */
#define DSR_TTL 64

/* On a copy of a packet that was too long to be told with. */
#define DSR_MARK 0x4d6f4472

enum dsr_flags {
	DSR_CUT = 1 << 0,	/* the packet follows by itself, whole */
};

/* Behind the UDP header, and in front of the packet as its backend is to get it. */
struct dsr_tell {
	__be32 magic;
	__be16 port;		/* the frontend's */
	__u8 flags;		/* enum dsr_flags */
	__u8 pad;
	__u8 frontend[16];	/* as in struct addr */
};

_Static_assert(sizeof(struct dsr_tell) == 24, "as on the wire");

ALWAYS int dsr_datagram(const struct pkt *p)
{
	return p->proto == IPPROTO_UDP && p->dport == bpf_htons(DSR_PORT) && p->sport == p->dport &&
	       !(p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT));
}

/* A pod is no node, even where it leaves by a node's name. */
RARELY int dsr_forged(ctx_t *ctx, struct pkt *p)
{
	struct dsr_tell *t;

	if (!p)
		return NEXT;
	t = pkt_at(ctx, p->l4 + sizeof(struct udphdr), sizeof(*t));
	return t && t->magic == bpf_htonl(DSR_MAGIC) ? -DROP_DSR_OPTION : NEXT;
}

#endif
