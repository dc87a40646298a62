/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the program at the driver says to the one at tc about a packet that it has finished with. */
#ifndef MOORING_META_H
#define MOORING_META_H

#include "parse.h"

/* In front of the frame, where nothing but an XDP program of this device writes. */
struct wire_meta {
	__u32 magic;
	__u32 ifindex;		/* the pod's interface */
	__u8 mac[6], host_mac[6];
	__u32 limits;		/* enum endpoint_limits */
};

#define WIRE_META 0x6d6f6f72

/*
 * In place of the sender's MAC, for when that is lost: where a capture on the device holds
 * the frame as well, the kernel copies it before a program that changes packets begins, and
 * the copy has nothing in front. Drawn by the daemon, and never on a wire: nobody can forge it.
 */
volatile const __u8 wire_seal[6] = {};

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

ALWAYS void meta_seal(struct ethhdr *eth)
{
	for (int i = 0; i < ETH_ALEN; i++)
		eth->h_source[i] = wire_seal[i];
}

#else

ALWAYS struct wire_meta *meta_at(ctx_t *ctx)
{
	struct wire_meta *m = ctx_ptr(ctx, data_meta);
	void *data = ctx_ptr(ctx, data);

	return (void *)(m + 1) <= data && m->magic == WIRE_META ? m : NULL;
}

ALWAYS int meta_sealed(ctx_t *ctx)
{
	struct ethhdr *eth = pkt_at(ctx, 0, sizeof(*eth));

	if (!eth)
		return 0;
	for (int i = 0; i < ETH_ALEN; i++) {
		if (eth->h_source[i] != wire_seal[i])
			return 0;
	}
	return 1;
}

#endif

#endif
