//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Run by the daemon: what ends entries beside the ends of their sockets. */
#include "lib/sweep.h"
#include "lib/bury.h"

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

/* In what bury_due() returns: something waits for its grace. */
#define BURY_AGAIN (1u << 30)

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
 * Delete what sockets left behind, once its grace is over; returns how many, and
 * whether more is to come. One runs at a time, beside sock.c. At tc, because before
 * 6.4 a syscall program may not use queues.
 */
SEC("tc")
int bury_due(struct __sk_buff *ctx)
{
	struct burial round = { .now = bpf_jiffies64() };
	struct ending end;

	bpf_loop(BURIALS, bury_ended, &round, 0);
	bpf_loop(BURIALS, bury_timewait, &round, 0);
	bpf_loop(BURIALS, bury_late, &round, 0);
	if (!queue_peek(QUEUE_ENDED, &end))
		round.deleted |= BURY_AGAIN;
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
