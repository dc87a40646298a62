//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Run by the daemon: the reaper of entries that no socket owns. */
#include "lib/sweep.h"

SEC("syscall")
int sweep_conntrack(struct sweep *s)
{
	struct sweep pass = *s;

	pass.now = bpf_jiffies64();
	bpf_for_each_map_elem(&mooring_ct, sweep_entry, &pass, 0);
	*s = pass;
	return 0;
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
