//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The hooks on the VXLAN device, where pods of other nodes are reached by tunnels. */
#include "lib/overlay.h"
#include "lib/finish.h"

ALWAYS int into_tunnel(ctx_t *ctx, struct pkt *p)
{
	return overlay_parse(ctx, p)	/* overlay.h  the addresses, no more                       */
	    ?: overlay_send(ctx, p);	/* overlay.h  which node, by whom, from whom               */
}

ALWAYS int out_of_tunnel(ctx_t *ctx, struct pkt *p)
{
	return overlay_parse(ctx, p)
	    ?: overlay_check(ctx, p);	/* overlay.h  a node sends for its own pods only           */
}

SEC("tc")
int to_overlay(ctx_t *ctx)
{
	struct pkt p = { .direction = TO_OVERLAY };

	return finish(ctx, &p, into_tunnel(ctx, &p));
}

SEC("tc")
int from_overlay(ctx_t *ctx)
{
	struct pkt p = { .direction = FROM_OVERLAY };

	return finish(ctx, &p, out_of_tunnel(ctx, &p));
}

char _license[] SEC("license") = "Dual BSD/GPL";
