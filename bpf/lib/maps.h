/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map: who writes it, who reads it. Sizes that are 1 here are set before
 * load from the configuration. A map's name is its pin.
 */
#ifndef MOORING_MAPS_H
#define MOORING_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"

/* Connections. Written by the programs; the daemon only deletes, through the sweep program. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} mooring_ct SEC(".maps");

/*
 * Flows that nobody answered yet, and under pressure those that are over: what a
 * flood makes evicts only its like. Written by the programs, as mooring_ct.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} mooring_ct_embryonic SEC(".maps");

/* Written by the programs; the sweep sets it right. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct ct_live);
} mooring_ct_live SEC(".maps");

/* The pods' sockets. Written by the programs; the kernel frees a value with its socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, int);
	__type(value, struct socket_state);
} mooring_sockets SEC(".maps");

/*
 * Entries of ended sockets in the order in which they are due: for each of the two
 * graces, so that the first is always the next. Written by the programs of
 * sock.c, taken out by sweep.c.
 */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(value, struct ending);
} mooring_ended SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 131072);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(value, struct ending);
} mooring_timewait SEC(".maps");

/* Of mooring_timewait, those that were still talked to when they were due: the wait of one is not that of all behind it. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(value, struct ending);
} mooring_late SEC(".maps");

/* Ended sockets by cookie that had more flows than they knew. Written by sock.c. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u64);
	__type(value, __u64);
} mooring_crowds SEC(".maps");

/* Counted by the programs per CPU, read by the daemon: enum ct_stat. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CT_STATS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} mooring_ct_stats SEC(".maps");

/* Pods of this node by address. Writer: daemon/datapath endpoints.go. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct addr);
	__type(value, struct endpoint);
} mooring_endpoints SEC(".maps");

/* Frontends. Writer: daemon/datapath services.go. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct svc_key);
	__type(value, struct svc);
} mooring_services SEC(".maps");

/* Runs of backend indices, see struct svc_slots. Writer: daemon/datapath services.go. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4194304);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u32);
} mooring_slots SEC(".maps");

/* Backends; index 0 is never used. Writer: daemon/datapath services.go. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 262144);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct backend);
} mooring_backends SEC(".maps");

/* sessionAffinity: ClientIP. Written by the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} mooring_affinity SEC(".maps");

/* Ports of fragmented packets, from their first fragment. Written by the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct frag_key);
	__type(value, struct frag);
} mooring_frags SEC(".maps");

/* Clients that a frontend with SVC_F_SOURCE_RANGES takes: the value is 1. Writer: daemon/datapath services.go. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct source_range_key);
	__type(value, __u32);
} mooring_source_ranges SEC(".maps");

/* Devices that from_wire is on. Writer: daemon/datapath north.go, as of the map below. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct uplink);
} mooring_uplinks SEC(".maps");

/*
 * A bit for each address that somebody who services concern may have, by its
 * hash, this node and its pods among them: what is to none is passed at the driver, and no
 * table is asked. A bit is set before its address is written. Writer: daemon/datapath doors.go.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} mooring_doors SEC(".maps");

/* This node's own addresses, on all its devices: the value is 1. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct addr);
	__type(value, __u32);
} mooring_node_addresses SEC(".maps");

/* The cluster's nodes and their pods: enum node_flags. Writer: daemon/datapath north.go. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct identity_key);
	__type(value, __u32);
} mooring_nodes SEC(".maps");

/* The nodes by their pods' addresses, where they are reached by tunnels. Writer: daemon/datapath overlay.go. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct identity_key);
	__type(value, struct tunnel);
} mooring_tunnels SEC(".maps");

/* What holds for each endpoint, by its id. Writer: daemon/datapath policies.go, as of the maps below. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct endpoint_policy);
} mooring_policies SEC(".maps");

/* Who an address is, as far as policies can tell. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct identity_key);
	__type(value, __u64);
} mooring_identities SEC(".maps");

/* The profile that a ruleset has for an identity, or for the rest of its group. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct verdict_key);
	__type(value, __u64);
} mooring_verdicts SEC(".maps");

/* Which protocols and ports a profile allows: 1, or 0 for those that a shorter prefix allows wrongly. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct profile_key);
	__type(value, __u32);
} mooring_profiles SEC(".maps");

/* What rulesets denied. Counted by the programs, read and tidied by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u64);
	__type(value, struct counter);
} mooring_policy_drops SEC(".maps");

/* Packets and bytes by drop_reason * DIRECTIONS + direction; reason 0 counts what passed. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_REASONS * DIRECTIONS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct counter);
} mooring_counters SEC(".maps");

/* Drops and flows for `mooring monitor`: struct event. Read by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} mooring_events SEC(".maps");

/* Writer: daemon/datapath events.go. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct shared);
} mooring_shared SEC(".maps");

#endif
