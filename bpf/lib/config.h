/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Set before load, constant after: the verifier removes what is not used. */
#ifndef MOORING_CONFIG_H
#define MOORING_CONFIG_H

#include "abi.h"

/* What a pod that is its own backend sees as the client's address: routed by the
 * pod's default route, used by nothing else (IPv4 link-local, a ULA of our own). */
volatile const struct addr hairpin_v4 = {
	.b = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 169, 254, 1, 2 },
};
volatile const struct addr hairpin_v6 = {
	.b = { 0xfd, 0x6d, 0x6f, 0x6f, 0x72, 0x69, 0x6e, 0x67, 0, 0, 0, 0, 0, 0, 0, 2 },
};

/* Jiffies in a second (CONFIG_HZ): what every time here is counted in. */
volatile const __u64 jiffies_per_second = 250;

/* enum hook_mode: whether somebody will notice the end of the sockets that own entries. */
volatile const __u8 hook_mode = HOOK_OFF;

/* The ACK of a mini-socket over IPv6 has no socket, and its entry may have ended before. */
volatile const __u8 unnamed_acks = 0;

/* The reset that a socket's kernel sends in place of the socket, which has no connection yet, has another's name. */
volatile const __u8 unnamed_resets = 0;

/* A pod's own socket gets its entry in mooring_ct at once while that has no more than this. */
volatile const __u64 ct_direct_limit = 0;

/* Whether a socket keeps the decision for its flow, so that the next packet needs no table. */
volatile const __u8 cache_decisions = 1;

/* The node's ports that flows to backends on other nodes are from, host order: the first, and how many. */
volatile const __u16 snat_port_first = 1024;
volatile const __u16 snat_ports = 28976;

/* Whether policies are looked up at all. */
volatile const __u8 policy_enforced = 0;

#endif
