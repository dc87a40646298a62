//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* In front of from_wire, at the driver: the same stages for ordinary packets. */
#define MOORING_XDP
#include "lib/fast.h"

ALWAYS int wire_fast(ctx_t *ctx, struct pkt *p)
{
	struct north_way *w = north_way();
	int ret;

	if (!w || !fast_parse(ctx, p))		/* fast.h   headers -> p                          */
		return TO_STACK;
	ct_keep(p);				/* conntrack.h  as it was sent                    */
	ret = north_opens(p) ? NEXT : north_continue(p, w);	/* north.h  a flow through a frontend */
	if (!ret && !p->service)
		ret = fast_open(ctx, p);	/* fast.h   a new one, or to no frontend at all   */
	if (ret)
		return ret;
	return p->service ? fast_forward(ctx, p, w) : fast_backward(ctx, p, w);
}

SEC("xdp")
int from_wire_xdp(ctx_t *ctx)
{
	struct pkt p = { .direction = FROM_DRIVER };
	int verdict = wire_fast(ctx, &p);

	/* Left to tc as it came, and counted there. */
	if (verdict == TO_STACK)
		return XDP_PASS;
	if (verdict < 0) {
		count_drop(&p, -verdict);
		return XDP_DROP;
	}
	count(&p, DROP_NONE);
	return verdict == TO_NEIGHBOUR ? XDP_TX : XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
