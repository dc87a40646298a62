/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every struct, enum and constant that Go also reads, and nothing else.
 *
 * Fixed widths, explicit zeroed padding: hash keys compare every byte. Ports
 * and addresses are in network byte order, all else in host order. An address
 * is 16 bytes in both families, IPv4 mapped (RFC 4291, 2.5.5.2), so one key and
 * one code path serve both. A change here shows in testdata/abi.golden and
 * bumps ABI_VERSION, which is part of the pin path: two layouts never share a map.
 */
#ifndef MOORING_ABI_H
#define MOORING_ABI_H

#include <linux/types.h>

#define ABI_VERSION 1

struct addr {
	__u8 b[16];
} __attribute__((aligned(8)));

/* What a conntrack entry is about; part of the key. */
enum ct_type {
	CT_SVC = 1,	/* client -> frontend, tells the backend */
	CT_FLOW = 2,	/* both directions of a flow as it is on the wire */
};

enum ct_state {
	CT_NEW = 0,		/* only the initiator was heard */
	CT_ESTABLISHED = 1,	/* both were heard; TCP: the handshake is done */
	CT_CLOSING = 2,		/* TCP: FIN or RST seen */
	CT_TIMEWAIT = 3,	/* TCP: both FINs seen, or the owner is in TIME_WAIT */
};

/*
 * The key of an entry. CT_SVC: end 0 is the client, end 1 the frontend. CT_FLOW:
 * the lower end comes first, so both directions have one key; the entry says
 * which end began. ICMP echo: both ports are the identifier.
 */
struct ct_key {
	struct addr addr[2];
	__be16 port[2];
	__u8 proto;
	__u8 type;		/* enum ct_type */
	__u16 pad;
};

enum ct_flags {
	CT_F_INITIATOR_HIGH = 1 << 0,	/* end 1 of the key began the flow */
	CT_F_EGRESS = 1 << 1,		/* the initiator is an endpoint of this node */
	CT_F_INGRESS = 1 << 2,		/* the responder is an endpoint of this node */
	CT_F_HAIRPIN = 1 << 3,		/* initiator and responder are one pod */
	CT_F_FIN_INITIATOR = 1 << 4,
	CT_F_FIN_RESPONDER = 1 << 5,
	CT_F_REPLIED = 1 << 6,		/* the responder was heard */
	CT_F_RST = 1 << 7,
};

/* The value of an entry. Index 0 is the initiator's side, 1 the responder's. */
struct ct_entry {
	__u64 cookie[2];	/* owning sockets; 0: not tethered */
	__u64 seen;		/* jiffies64 of the last packet */
	__u64 packets[2];
	__u64 bytes[2];
	struct addr nat;	/* SVC: the backend. FLOW: the frontend the initiator sees, or 0 */
	struct addr origin;	/* FLOW: the initiator's own address where the responder sees another, or 0 */
	__be16 nat_port;
	__be16 origin_port;
	__u32 backend;		/* index in mooring_backends; 0: none */
	__u32 backend_generation;
	__u32 service;		/* id of the frontend that made it; 0: none */
	__u16 endpoint[2];	/* endpoint ids of both sides; 0: not here */
	__u8 state;		/* enum ct_state */
	__u8 pad[3];
	__u32 flags;		/* enum ct_flags */
	__u32 pad2;
};

/* A pod's interface, by each of its addresses. */
struct endpoint {
	__u32 ifindex;		/* of the host end, in the node's namespace */
	__u16 id;
	__u16 pad;
	__u8 mac[6];		/* the pod's end */
	__u8 host_mac[6];	/* the host's end: the pod's gateway */
	__u32 pad2;
};

/* Port and protocol 0 say that the address is a service's at all. */
struct svc_key {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
	__u32 pad2;
};

enum svc_flags {
	SVC_F_ADDRESS = 1 << 0,		/* the address is known, see svc_key */
	SVC_F_INTERNAL_LOCAL = 1 << 1,	/* internalTrafficPolicy: Local: drop, do not refuse */
	SVC_F_EXTERNAL_LOCAL = 1 << 2,	/* externalTrafficPolicy: Local */
};

/* A run of mooring_slots: the backends that may be chosen. */
struct svc_slots {
	__u32 first;
	__u32 count;
};

struct svc {
	__u32 id;			/* of the frontend, never 0 */
	__u32 flags;			/* enum svc_flags */
	__u32 affinity_seconds;		/* sessionAffinity: ClientIP; 0: none */
	__u32 pad;
	struct svc_slots internal;	/* for clients on this node */
	struct svc_slots external;	/* for clients beyond the uplinks */
};

enum backend_state {
	BACKEND_FREE = 0,
	BACKEND_ACTIVE = 1,
	BACKEND_TERMINATING = 2,	/* established flows go on */
};

struct backend {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 state;		/* enum backend_state */
	__u32 generation;	/* counts the index's tenants: an entry made for an earlier one is void */
};

struct affinity_key {
	struct addr client;
	__u32 service;
	__u32 pad;
};

struct affinity {
	__u64 seen;		/* jiffies64 of the client's last new flow */
	__u32 backend;
	__u32 backend_generation;
};

/* RFC 791, 3.2 and RFC 8200, 4.5: what names the packet that fragments belong to. */
struct frag_key {
	struct addr src, dst;
	__be32 id;
	__u8 proto;
	__u8 pad[3];
};

struct frag {
	__be16 sport, dport;
};

/* Why a packet was dropped: metric label, CLI column, event text. */
enum drop_reason {
	DROP_NONE = 0,
	DROP_TRUNCATED,			/* shorter than its headers say */
	DROP_MALFORMED,			/* headers that contradict themselves */
	DROP_VLAN_TAG,			/* a pod has no VLANs */
	DROP_ETHERTYPE,			/* neither IPv4, IPv6 nor ARP */
	DROP_SOURCE_ADDRESS,		/* not one of the pod's own addresses */
	DROP_SOURCE_MAC,		/* not the pod's own MAC */
	DROP_UNKNOWN_ENDPOINT,		/* the interface belongs to no endpoint */
	DROP_EXTENSION_HEADERS,		/* more IPv6 extension headers than are read */
	DROP_FRAGMENT_UNKNOWN,		/* a later fragment whose first was not seen */
	DROP_NO_BACKEND,		/* refused: the service has no backend */
	DROP_NO_PORT,			/* refused: no service has this port of the address */
	DROP_NO_LOCAL_BACKEND,		/* traffic policy Local and no backend on this node */
	DROP_PROTOCOL,			/* neither TCP, UDP nor ICMP to a service's address */
	DROP_TUPLE_COLLISION,		/* the flow to each backend tried is taken */
	DROP_CONNTRACK_FULL,		/* the entry for a translation could not be made */
	DROP_REWRITE,			/* the kernel refused to change the packet */
	DROP_ICMP_UNRELATED,		/* an ICMP error to a service address about no flow of ours */
	DROP_NO_FLOW,			/* a TCP reset to a service that belongs to no flow */
	DROP_REASONS,
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* Which hook counted or reported. */
enum direction {
	FROM_ENDPOINT = 0,
	TO_ENDPOINT = 1,
	FROM_WIRE = 2,
	DIRECTIONS,
};

enum ct_stat {
	CT_STAT_CREATED = 0,
	CT_STAT_DELETED_SOCKET,
	CT_STAT_DELETED_TIMEWAIT,
	CT_STAT_DELETED_EXPIRED,
	CT_STAT_DELETED_ENDPOINT,
	CT_STAT_DELETED_BACKEND,
	CT_STAT_DELETED_FLUSH,
	CT_STAT_INSERT_FAILED,
	CT_STAT_DELETE_FAILED,
	CT_STATS,
};

enum event_kind {
	EVENT_DROP = 1,
	EVENT_NEW = 2,
	EVENT_END = 3,
};

struct event {
	__u64 time;		/* CLOCK_MONOTONIC, ns */
	struct addr src, dst;
	struct addr nat;
	__be16 sport, dport, nat_port;
	__u16 endpoint;
	__u32 len;
	__u8 kind;		/* enum event_kind */
	__u8 reason;		/* enum drop_reason */
	__u8 direction;		/* enum direction */
	__u8 proto;
};

/* What the daemon changes while programs run; one element. */
struct shared {
	__u32 monitors;		/* how many watch events: none are written for nobody */
	__u32 pad;
};

/* One pass over the table: in, what to delete; out, what was found. */
struct sweep {
	__u64 timeout[4][3];	/* in, jiffies: [enum ct_state][enum sweep_proto] */
	__u64 svc_timeout;	/* in, jiffies: what a SVC entry gets on top */
	__u8 flush;		/* in: delete everything */
	__u8 gone_backends;	/* in: delete entries whose backend is gone */
	__u8 gone_endpoints;	/* in: delete entries whose endpoint is gone */
	__u8 pad[5];
	__u64 now;		/* out, jiffies64 */
	__u64 scanned;
	__u64 entries;		/* left after the pass */
	__u64 tethered;
	__u64 expired, endpoint, backend, flushed;	/* deleted, by reason */
	__u64 failed;
};

/* Both clocks at one moment. */
struct clock {
	__u64 jiffies;
	__u64 monotonic;	/* CLOCK_MONOTONIC, ns */
};

enum sweep_proto {
	SWEEP_TCP = 0,
	SWEEP_UDP = 1,
	SWEEP_OTHER = 2,
};

_Static_assert(sizeof(struct ct_key) == 40, "ct_key is a hash key: no padding");
_Static_assert(sizeof(struct svc_key) == 24, "svc_key is a hash key: no padding");
_Static_assert(sizeof(struct affinity_key) == 24, "affinity_key is a hash key: no padding");
_Static_assert(sizeof(struct frag_key) == 40, "frag_key is a hash key: no padding");
_Static_assert(sizeof(struct ct_entry) == 120, "with its key two and a half cache lines");

#endif
