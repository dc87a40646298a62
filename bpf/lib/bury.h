/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What sockets left behind, once its grace is over. Who leaves something takes out
 * what others left before, so that the daemon finds the last of a churn only.
 */
#ifndef MOORING_BURY_H
#define MOORING_BURY_H

#include "entry.h"

struct burial {
	__u64 now;		/* jiffies64 */
	__u32 deleted;
};

enum queue {
	QUEUE_ENDED,
	QUEUE_TIMEWAIT,
	QUEUE_LATE,
};

ALWAYS long queue_peek(enum queue q, struct ending *end)
{
	return q == QUEUE_ENDED ? bpf_map_peek_elem(&mooring_ended, end) :
	       q == QUEUE_TIMEWAIT ? bpf_map_peek_elem(&mooring_timewait, end) :
				     bpf_map_peek_elem(&mooring_late, end);
}

ALWAYS long queue_pop(enum queue q, struct ending *end)
{
	return q == QUEUE_ENDED ? bpf_map_pop_elem(&mooring_ended, end) :
	       q == QUEUE_TIMEWAIT ? bpf_map_pop_elem(&mooring_timewait, end) :
				     bpf_map_pop_elem(&mooring_late, end);
}

ALWAYS void queue_again(enum queue q, const struct ending *end)
{
	if (q == QUEUE_ENDED)
		bpf_map_push_elem(&mooring_ended, end, 0);
	else
		bpf_map_push_elem(&mooring_late, end, 0);
}

/*
 * Look at the first of the endings: delete what is due, wait again for what is still
 * talked to. Returns 1 when there is nothing more to do.
 */
ALWAYS long bury_next(struct burial *b, enum queue q)
{
	struct ending end = {};
	struct ct_entry *e;

	if (queue_peek(q, &end) || (__s64)(b->now - end.due) < 0 || queue_pop(q, &end))
		return 1;
	/* Somebody else took the one that was looked at. */
	if ((__s64)(b->now - end.due) < 0) {
		queue_again(q, &end);
		return 1;
	}
	e = ct_at(&end.key);
	if (!e || e->life != end.life || ct_held(e))
		return 0;
	/* A packet may have stamped it since the round began. */
	if ((__s64)(b->now - e->seen) < (__s64)end.grace) {
		end.due = e->seen + end.grace;
		queue_again(q, &end);
		return 0;
	}
	b->deleted += ct_end(&end.key, e, end.life, q == QUEUE_ENDED ? CT_STAT_DELETED_SOCKET : CT_STAT_DELETED_TIMEWAIT);
	return 0;
}

/* Two, for each that is left: what has piled up gets less. */
static __noinline int bury_others(void)
{
	struct burial round = { .now = bpf_jiffies64() };

	if (!bury_next(&round, QUEUE_ENDED))
		bury_next(&round, QUEUE_ENDED);
	return round.deleted;
}

#endif
