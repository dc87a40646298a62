/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What differs between the hooks: tc programs see a socket buffer, XDP programs
 * (MOORING_XDP defined before the first include) the driver's frame. Every stage
 * takes a ctx_t and asks here.
 */
#ifndef MOORING_CTX_H
#define MOORING_CTX_H

#include "pkt.h"
#include <bpf/bpf_core_read.h>

#ifdef MOORING_XDP
typedef struct xdp_md ctx_t;
#else
typedef struct __sk_buff ctx_t;
#endif

/* Written out, because clang 19 else keeps the field's address, which the verifier takes for a changed context. */
#define ctx_ptr(ctx, field) ({						\
	void *ptr;							\
	asm volatile("%0 = *(u32 *)(%1 + %2)"				\
		     : "=r"(ptr)					\
		     : "r"(ctx), "i"(offsetof(ctx_t, field)));		\
	ptr;								\
})

/* How a packet's layer 4 checksum stands, which decides how it is kept right. */
enum ctx_sum {
	SUM_FULL,	/* it is in the packet, whole */
	SUM_PARTIAL,	/* the packet holds the pseudo header's sum; the sender's offload adds the rest */
	SUM_HELPER,	/* only the kernel's helper knows */
};

#ifdef MOORING_XDP

ALWAYS __u32 ctx_len(ctx_t *ctx)
{
	return bpf_xdp_get_buff_len(ctx);
}

ALWAYS __u32 ctx_ifindex(ctx_t *ctx)
{
	return ctx->ingress_ifindex;
}

/* A tag is in the frame, where parsing finds it. */
ALWAYS int ctx_tagged(ctx_t *ctx)
{
	return 0;
}

/* Headers beyond the first fragment of a frame are out of reach. */
ALWAYS int ctx_pull(ctx_t *ctx, __u32 len)
{
	return -1;
}

ALWAYS enum ctx_sum ctx_sum(ctx_t *ctx)
{
	return SUM_FULL;
}

/* What the route's MTU is compared with. */
ALWAYS __u16 ctx_route_len(__u32 len)
{
	return len;
}

/* The helpers exist for socket buffers only; ctx_sum() never asks for them here. */
ALWAYS int ctx_sum_replace(ctx_t *ctx, __u32 off, __u64 from, __u64 to, __u64 flags)
{
	return -1;
}

#else

ALWAYS __u32 ctx_len(ctx_t *ctx)
{
	return ctx->len;
}

ALWAYS __u32 ctx_ifindex(ctx_t *ctx)
{
	return ctx->ifindex;
}

ALWAYS int ctx_tagged(ctx_t *ctx)
{
	return ctx->vlan_present;
}

ALWAYS int ctx_pull(ctx_t *ctx, __u32 len)
{
	return bpf_skb_pull_data(ctx, len);
}

/* The kernel knows itself, and what is cut into segments later. */
ALWAYS __u16 ctx_route_len(__u32 len)
{
	return 0;
}

ALWAYS int ctx_sum_replace(ctx_t *ctx, __u32 off, __u64 from, __u64 to, __u64 flags)
{
	return bpf_l4_csum_replace(ctx, off, from, to, flags);
}

/* The kernel's own view of the socket buffer, as far as it is read. */
struct sk_buff___mooring {
	__u8 ip_summed : 2;
} __attribute__((preserve_access_index));

/* 6.2 and newer; before, the helper looks for us. */
extern void *bpf_cast_to_kern_ctx(void *) __ksym __weak;

/* linux/if_packet.h: to us, not to another whom the device overhears. */
#define PACKET_HOST 0

/* linux/skbuff.h: CHECKSUM_NONE and CHECKSUM_UNNECESSARY are whole, 2 counts received bytes. */
#define CHECKSUM_COMPLETE 2
#define CHECKSUM_PARTIAL 3

ALWAYS enum ctx_sum ctx_sum(ctx_t *ctx)
{
	struct sk_buff___mooring *skb;
	__u8 summed;

	if (!bpf_cast_to_kern_ctx)
		return SUM_HELPER;
	skb = bpf_cast_to_kern_ctx(ctx);
	summed = BPF_CORE_READ_BITFIELD(skb, ip_summed);
	return summed == CHECKSUM_PARTIAL ? SUM_PARTIAL : summed == CHECKSUM_COMPLETE ? SUM_HELPER : SUM_FULL;
}

#endif

#endif
