//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The hooks on the host's own system calls: one line per call, all in host.h. */
#include "lib/host.h"

SEC("cgroup/connect4")
int host_connect4(struct bpf_sock_addr *ctx) { return host_connect(ctx, 0); }

SEC("cgroup/connect6")
int host_connect6(struct bpf_sock_addr *ctx) { return host_connect(ctx, 1); }

SEC("cgroup/sendmsg4")
int host_sendmsg4(struct bpf_sock_addr *ctx) { return host_sendmsg(ctx, 0); }

SEC("cgroup/sendmsg6")
int host_sendmsg6(struct bpf_sock_addr *ctx) { return host_sendmsg(ctx, 1); }

SEC("cgroup/recvmsg4")
int host_recvmsg4(struct bpf_sock_addr *ctx) { return host_peer(ctx, 0, 1); }

SEC("cgroup/recvmsg6")
int host_recvmsg6(struct bpf_sock_addr *ctx) { return host_peer(ctx, 1, 1); }

SEC("cgroup/getpeername4")
int host_getpeername4(struct bpf_sock_addr *ctx) { return host_peer(ctx, 0, 0); }

SEC("cgroup/getpeername6")
int host_getpeername6(struct bpf_sock_addr *ctx) { return host_peer(ctx, 1, 0); }

/* A kernel function's argument needs a whole type, however little of it. */
struct sock_common {
	unsigned short skc_family;
};
struct udp_sock;

struct bpf_iter__udp {
	void *meta;
	struct udp_sock *udp_sk;
};

/* 6.5 and newer. Before, a connected socket hears of its backend's end from its own timeouts. */
extern int bpf_sock_destroy(struct sock_common *) __ksym __weak;

/* Run by the daemon when backends are gone: a read of a socket connected to one fails with ECONNABORTED. */
SEC("iter/udp")
int end_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *sk = ctx->udp_sk;
	struct host_socket *told;

	if (!sk)
		return 0;
	told = bpf_sk_storage_get(&mooring_host_sockets, sk, 0, 0);
	if (!told || backend_of(told->index, told->generation))
		return 0;
	if (bpf_sock_destroy && !bpf_sock_destroy((struct sock_common *)sk)) {
		bpf_sk_storage_delete(&mooring_host_sockets, sk);
		ended++;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
