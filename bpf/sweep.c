//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Run by the daemon: what ends entries beside the ends of their sockets. */
#include "lib/sweep.h"

/* The reaper: one pass over both tables. */
SEC("syscall")
int sweep_conntrack(struct sweep *s)
{
	struct sweep pass = *s;
	struct ct_live *live;
	__u32 zero = 0;

	pass.now = bpf_jiffies64();
	bpf_for_each_map_elem(&mooring_ct, sweep_one, &pass, 0);
	/* Evictions tell nobody: what was counted is set right by what was seen. */
	live = bpf_map_lookup_elem(&mooring_ct_live, &zero);
	if (live)
		live->entries = pass.entries;
	bpf_for_each_map_elem(&mooring_ct_embryonic, sweep_one, &pass, 0);
	ct_count_by(CT_STAT_DELETED_EXPIRED, pass.expired);
	ct_count_by(CT_STAT_DELETED_ENDPOINT, pass.endpoint);
	ct_count_by(CT_STAT_DELETED_BACKEND, pass.backend);
	ct_count_by(CT_STAT_DELETED_FLUSH, pass.flushed);
	ct_count_by(CT_STAT_DELETED_SOCKET, pass.socket);
	*s = pass;
	return 0;
}

#define BURIALS 4096

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

ALWAYS void queue_pop(enum queue q, struct ending *end)
{
	if (q == QUEUE_ENDED)
		bpf_map_pop_elem(&mooring_ended, end);
	else if (q == QUEUE_TIMEWAIT)
		bpf_map_pop_elem(&mooring_timewait, end);
	else
		bpf_map_pop_elem(&mooring_late, end);
}

/* Look at the first of the endings: delete what is due, wait again for what is still talked to. */
ALWAYS long bury_next(struct burial *b, enum queue q)
{
	struct ending end = {};
	struct ct_entry *e;

	if (queue_peek(q, &end) || (__s64)(b->now - end.due) < 0)
		return 1;
	queue_pop(q, &end);
	e = ct_at(&end.key);
	if (!e || e->life != end.life || ct_held(e))
		return 0;
	if (b->now - e->seen < end.grace) {
		end.due = e->seen + end.grace;
		if (q == QUEUE_ENDED)
			bpf_map_push_elem(&mooring_ended, &end, 0);
		else
			bpf_map_push_elem(&mooring_late, &end, 0);
		return 0;
	}
	b->deleted += ct_end(&end.key, e, end.life, q == QUEUE_ENDED ? CT_STAT_DELETED_SOCKET : CT_STAT_DELETED_TIMEWAIT);
	return 0;
}

static long bury_ended(__u32 i, struct burial *b)
{
	return bury_next(b, QUEUE_ENDED);
}

static long bury_timewait(__u32 i, struct burial *b)
{
	return bury_next(b, QUEUE_TIMEWAIT);
}

static long bury_late(__u32 i, struct burial *b)
{
	return bury_next(b, QUEUE_LATE);
}

/*
 * Delete what sockets left behind, once its grace is over; returns how many. Only
 * one runs at a time. At tc, because before 6.4 a syscall program may not use queues.
 */
SEC("tc")
int bury_due(struct __sk_buff *ctx)
{
	struct burial round = { .now = bpf_jiffies64() };

	bpf_loop(BURIALS, bury_ended, &round, 0);
	bpf_loop(BURIALS, bury_timewait, &round, 0);
	bpf_loop(BURIALS, bury_late, &round, 0);
	return round.deleted;
}

/* What the daemon needs to read jiffies. */
SEC("syscall")
int read_clock(struct clock *c)
{
	c->jiffies = bpf_jiffies64();
	c->monotonic = bpf_ktime_get_ns();
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
