//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The hooks on each pod's lxc, named as the host sees them, and on the device of its limit. */
#include "lib/config.h"
#include "lib/parse.h"
#include "lib/endpoint.h"
#include "lib/conntrack.h"
#include "lib/socket.h"
#include "lib/service.h"
#include "lib/policy.h"
#include "lib/icmp.h"
#include "lib/forward.h"
#include "lib/tell.h"
#include "lib/finish.h"

/* A packet of a flow: translated towards the backend, or back. */
ALWAYS int flow_out(ctx_t *ctx, struct pkt *p)
{
	return ct_keep(p)			/* conntrack.h  as it was sent                 */
	    ?: socket_claim(ctx, p)		/* socket.h     whose it is                    */
	    ?: svc_lookup(ctx, p)		/* service.h    ours, a reply, or not seen yet */
	    ?: svc_translate(ctx, p)		/* service.h    frontend -> backend            */
	    ?: policy_check(p)			/* policy.h     may the flow begin, or go on   */
	    ?: svc_untranslate(ctx, p)		/* service.h    reply -> from the frontend     */
	    ?: ct_commit(p);			/* conntrack.h  remember, count, state         */
}

ALWAYS int pod_out(ctx_t *ctx, struct pkt *p)
{
	return pkt_parse(ctx, p)		/* parse.h      headers -> p                   */
	    ?: (dsr_datagram(p) ? dsr_forged(ctx, p) : NEXT)	/* dsr.h  a pod is no node     */
	    ?: socket_forward(ctx, p)		/* socket.h     its socket knows the rest      */
	    ?: source_check(ctx, p)		/* endpoint.h   only the pod's own addresses   */
	    ?: (is_icmp_error(p)
		? icmp_translate(ctx, p)	/* icmp.h       outside and what is quoted     */
		    ?: policy_check_stray(p)	/* policy.h     about nothing that we know     */
		: flow_out(ctx, p))
	    ?: forward(ctx, p);			/* forward.h    pod or stack                   */
}

ALWAYS int pod_in(ctx_t *ctx, struct pkt *p)
{
	return pkt_parse(ctx, p)
	    ?: (is_icmp_error(p)
		? icmp_translate(ctx, p)
		    ?: policy_check_stray(p)
		: ct_keep(p)
		    ?: ct_lookup(p)
		    ?: policy_check(p)
		    ?: svc_untranslate(ctx, p)
		    ?: ct_commit(p))
	    ?: TO_STACK;
}

SEC("tc")
int from_container(ctx_t *ctx)
{
	struct pkt p = { .direction = FROM_ENDPOINT };
	int verdict = pod_out(ctx, &p);

	if (verdict > 0 && (p.flags & PKT_OWNED))
		socket_remember(ctx, &p);	/* socket.h  the next packet needs no table */
	else if (verdict < 0 && p.service)
		svc_withdraw(&p);		/* service.h as if it had not been */
	else if (verdict > 0 && (p.flags & PKT_AFTER_OWNER) && hook_mode == HOOK_TRACEPOINT)
		socket_succeeded(ctx, &p);	/* socket.h  its end, if nobody told */
	return finish(ctx, &p, refuse(ctx, &p, verdict));
}

SEC("tc")
int to_container(ctx_t *ctx)
{
	struct pkt p = { .direction = TO_ENDPOINT };

	/* On its way by the qdisc only: all was done where it came in. */
	if (limit_delivered(ctx))
		return TC_ACT_UNSPEC;
	return finish(ctx, &p, pod_in(ctx, &p));
}

/* On the device that is behind a sender's ingress qdisc. */
SEC("tc")
int from_limit(ctx_t *ctx) { return limit_resume(ctx); }

char _license[] SEC("license") = "Dual BSD/GPL";
