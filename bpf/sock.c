//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The end of a socket: its entries go with it. Which of these programs are
 * attached is the hook's mode, see docs/kernels.md; each works on every socket of
 * the machine and lets go at once of those that have no storage of ours.
 */
#include "lib/tracing.h"

/*
 * Trampolines: inet_sock_destruct() runs after the last packet that holds the
 * socket has left, and its storage is still there: bpf_sk_storage_free(), one call
 * later, is where no helper may read it.
 */
SEC("fentry/inet_sock_destruct")
int BPF_PROG(on_sock_destruct, struct sock *sk)
{
	struct socket_state *s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);

	if (s)
		socket_end(s, RELEASE_GRACE);
	return 0;
}

/*
 * TIME_WAIT takes the flow over: it ends with the mini-socket, not with the socket. There is
 * none beyond net.ipv4.tcp_max_tw_buckets, and then tcp_time_wait(), which asks for it, just closes.
 */
SEC("fexit/inet_twsk_alloc")
int BPF_PROG(on_twsk_alloc, const struct sock *sk, void *row, int state, void *mini)
{
	struct socket_state *s;

	if (!mini)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, (void *)sk, 0, 0);
	if (s)
		socket_enters_timewait(s);
	return 0;
}

/*
 * The end of a mini-socket, called by inet_twsk_free(). That one itself is in the file of
 * its only caller, where the compiler of Debian's 7.3 puts it in its place: nobody calls it.
 */
SEC("fentry/tcp_twsk_destructor")
int BPF_PROG(on_twsk_free, struct sock *sk)
{
	timewait_end(&sk->__sk_common);
	return 0;
}

/*
 * Tracepoints, where no trampoline loads: the destruction of a TCP socket is heard
 * before its last packets have passed, so entries have a grace. That a mini-socket
 * follows, or that nothing does, is seen by the state that the socket comes from.
 */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_set_state, struct sock *sk, int from, int to)
{
	struct socket_state *s;

	if (to != TCP_CLOSE || (from != TCP_FIN_WAIT2 && from != TCP_CLOSING && from != TCP_LAST_ACK))
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);
	if (s)
		__sync_fetch_and_or(&s->flags, from == TCP_LAST_ACK ? SOCKET_LAST_ACK : SOCKET_TIMEWAIT);
	return 0;
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(on_tcp_destroy, struct sock *sk)
{
	struct socket_state *s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);

	if (!s)
		return 0;
	if (s->flags & SOCKET_TIMEWAIT)
		socket_end(s, RELEASE_TIMEWAIT);
	else
		socket_end(s, s->flags & SOCKET_LAST_ACK ? RELEASE_NOW : RELEASE_GRACE);
	return 0;
}

/* What is not TCP has no tracepoint at its end; close() is the last that is heard. */
SEC("cgroup/sock_release")
int on_sock_release(struct bpf_sock *sk)
{
	struct socket_state *s;

	if (sk->protocol == IPPROTO_TCP)
		return 1;
	s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);
	if (s)
		socket_end(s, RELEASE_GRACE);
	return 1;
}

/*
 * The roll call, in the network namespace of each pod: every socket that lives
 * confirms its entries, and brings them up to date. (An iterator over the storages
 * themselves is refused by kernels that refuse trampolines.)
 */
SEC("iter/tcp")
int call_roll_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct socket_state *s;

	if (!sk)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);
	if (s)
		socket_confirm(s);
	return 0;
}

SEC("iter/udp")
int call_roll_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *sk = ctx->udp_sk;
	struct socket_state *s;

	if (!sk)
		return 0;
	s = bpf_sk_storage_get(&mooring_sockets, sk, 0, 0);
	if (s)
		socket_confirm(s);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
