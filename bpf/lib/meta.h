/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the program at the driver says to the one at tc about a packet that it has finished with. */
#ifndef MOORING_META_H
#define MOORING_META_H

#include "ctx.h"

/* In front of the frame, where nothing but an XDP program of this device writes. */
struct wire_meta {
	__u32 magic;
	__u32 ifindex;		/* the pod's interface */
	__u8 mac[6], host_mac[6];
	__u32 limits;		/* enum endpoint_limits */
};

#define WIRE_META 0x6d6f6f72

#ifdef MOORING_XDP

/* Room for it; where the driver has none the packet is left alone. */
ALWAYS int meta_reserve(ctx_t *ctx)
{
	return !bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct wire_meta));
}

ALWAYS struct wire_meta *meta_at(ctx_t *ctx)
{
	struct wire_meta *m = ctx_ptr(ctx, data_meta);
	void *data = ctx_ptr(ctx, data);

	return (void *)(m + 1) <= data ? m : NULL;
}

#else

ALWAYS struct wire_meta *meta_at(ctx_t *ctx)
{
	struct wire_meta *m = ctx_ptr(ctx, data_meta);
	void *data = ctx_ptr(ctx, data);

	return (void *)(m + 1) <= data && m->magic == WIRE_META ? m : NULL;
}

#endif

#endif
