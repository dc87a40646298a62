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
	CT_F_EMBRYONIC = 1 << 8,	/* it is in mooring_ct_embryonic: nobody answered yet */
	CT_F_ENDED = 1 << 9,		/* the sockets that owned it are gone */
	CT_F_DSR = 1 << 10,		/* SVC: the backend's node answers the client itself. FLOW: this is that node */
	CT_F_ALONE = 1 << 11,		/* FLOW of a frontend without a SVC entry: the initiator's socket knows, or nobody answered yet */
	CT_F_CONTESTED = 1 << 12,	/* ALONE, and answered while the client's connection to another backend lives */
};

/* How firmly an entry is tied to the socket of one of its sides. */
enum ct_tether {
	TETHER_NONE = 0,
	TETHER_LOOSE = 1,	/* ends with the socket, or by timers: an unconnected socket has other flows */
	TETHER_HELD = 2,	/* lives as long as the socket: TCP, or connected */
	TETHER_CROWD = 3,	/* as LOOSE, and the socket has no room to know it: its end is found by cookie */
};

/*
 * The value of an entry. Index 0 is the initiator's side, 1 the responder's.
 *
 * life settles who deletes and who takes over. Bit 0 says that a deleter has
 * claimed the entry, by compare-and-swap, and that its key is about to vanish;
 * the rest changes whenever another flow takes the entry over in place, and is
 * random at first, so that a deleter with an old look at it loses the swap. No
 * key is ever deleted without the claim: a new flow on the same tuple either
 * takes the entry over before the claim, or waits the moment until it is gone.
 */
struct ct_entry {
	__u64 cookie[2];	/* owning sockets; 0: not tethered */
	__u64 seen;		/* jiffies64 of the last packet; of a cached flow, within a second */
	__u64 packets[2];
	__u64 bytes[2];
	struct addr nat;	/* SVC: the backend. FLOW: the frontend the initiator sees, or 0 */
	struct addr origin;	/* FLOW: the initiator's own address where the responder sees another; SVC: that other one; or 0 */
	__be16 nat_port;
	__be16 origin_port;
	__u32 backend;		/* index in mooring_backends; 0: none */
	__u32 backend_generation;
	__u32 service;		/* id of the frontend that made it; 0: none */
	__u16 endpoint[2];	/* endpoint ids of both sides; 0: not here */
	__u8 state;		/* enum ct_state */
	__u8 tether[2];		/* enum ct_tether */
	__u8 pad;
	__u32 flags;		/* enum ct_flags */
	__u32 life;
	__u32 policy;		/* generation of the policies that allowed it */
	__u32 confirmed;	/* the last roll call that its owner answered, or CT_CLAIM_MET */
};

#define CT_LIFE_CLAIMED 1u
/* No roll call: a pass of the sweep has met the entry claimed, and waits for who claimed it. */
#define CT_CLAIM_MET 0xffffffffu

/* The flows of a socket that its storage has room for. */
#define SOCKET_FLOWS 4

/* A flow by the key of its FLOW entry, and which side of it the socket is. */
struct socket_flow {
	struct ct_key key;
	__u8 used;
	__u8 side;
	__u8 pad[6];
};

/*
 * What becomes of the next packet of the socket's first flow, so that it needs no
 * table: from the tuple that the socket sends to the one that goes on.
 */
struct socket_cache {
	struct addr src, dst;		/* as sent */
	struct addr to_src, to_dst;	/* as it goes on */
	__be16 sport, dport;
	__be16 to_sport, to_dport;
	__u32 generation;	/* of mooring_shared when it was decided; 0: nothing is cached */
	__u32 ifindex;		/* the host end of the interface it is sent from */
	__u32 to_ifindex;	/* the pod's of this node that it is for; 0: the stack routes it */
	__u32 addresses;	/* what the change of addresses adds to a checksum */
	__u32 ports;		/* and of the ports */
	__u32 backend, backend_generation, service;
	__u16 from_id, to_id;	/* endpoints */
	__u8 mac[6];		/* source and destination of the frame as sent */
	__u8 gateway[6];
	__u8 to_mac[6];		/* and as it goes on */
	__u8 to_host_mac[6];
	__u8 proto;
	__u8 renamed;		/* to_src is a service's: where to_ifindex is 0 the routes say which device, and the stack is passed by */
	__u8 held;		/* the entry is, by the socket: no timer ends it */
	__u8 limits;		/* enum endpoint_limits, on the way */
	__u64 packets, bytes;	/* as the entry is to have them */
	__u64 synced;		/* jiffies64 when it got them */
};

enum socket_flags {
	SOCKET_DEAD = 1 << 0,		/* its end was noticed: nothing is made for its last packets */
	SOCKET_TIMEWAIT = 1 << 1,	/* its flow has passed to a TIME_WAIT mini-socket */
	SOCKET_CROWD = 1 << 2,		/* it has flows that found no room here */
	SOCKET_LAST_ACK = 1 << 3,	/* it closed second and its FIN was acknowledged: nothing follows */
};

/* What a pod's socket knows of its flows: the value of mooring_sockets. */
struct socket_state {
	__u64 cookie;
	__u32 flags;		/* enum socket_flags */
	__u32 decided;		/* the generation when the first flow was last in the table */
	struct socket_cache cache;
	struct socket_flow flow[SOCKET_FLOWS];
};

/* An entry whose socket has ended, until its grace is over. */
struct ending {
	struct ct_key key;
	__u64 due;		/* jiffies64 */
	__u32 life;		/* the entry's: another means that it was taken over */
	__u32 grace;		/* jiffies without a packet */
};

/* How ends of sockets are noticed. */
enum hook_mode {
	HOOK_OFF = 0,		/* not at all: timers only */
	HOOK_TRACEPOINT = 1,	/* tp_btf for TCP, cgroup/sock_release for the rest */
	HOOK_TRAMPOLINE = 2,	/* fentry, after the last packet */
};

enum endpoint_limits {
	LIMIT_IN = 1 << 0,	/* what the pod gets is to pass the host end's root qdisc */
	LIMIT_OUT = 1 << 1,	/* and what it sends, its ingress qdisc */
};

/* A pod's interface, by each of its addresses. */
struct endpoint {
	__u32 ifindex;		/* of the host end, in the node's namespace */
	__u16 id;
	__u16 limits;		/* enum endpoint_limits */
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
	SVC_F_EXTERNAL = 1 << 3,	/* may be reached from beyond the uplinks */
	SVC_F_SOURCE_RANGES = 1 << 4,	/* only by clients that mooring_source_ranges has */
	SVC_F_MAGLEV = 1 << 5,		/* external is a maglev table, which a hash of the flow's ends is looked up in */
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
	DROP_NO_FLOW,			/* to a service, a TCP reset or what the kernel says for a socket that is gone: it belongs to no flow */
	DROP_TUPLE_BUSY,		/* the last flow's entry is being deleted this very moment: sent again, it passes */
	DROP_POLICY_EGRESS,		/* the egress policy of the flow's initiator does not allow it */
	DROP_POLICY_INGRESS,		/* the ingress policy of the flow's responder does not allow it */
	DROP_POLICY_UNKNOWN,		/* the pod's policies are not known yet */
	DROP_NO_TUNNEL,			/* no node has the pod's address */
	DROP_TUNNEL_SOURCE,		/* tunnelled by who is not the node of the sender's address */
	DROP_SOURCE_RANGE,		/* loadBalancerSourceRanges do not have the client */
	DROP_MARTIAN,			/* from beyond an uplink, with a source that nobody there has */
	DROP_SNAT_PORTS,		/* each of the node's ports that was tried has a flow to the backend */
	DROP_TOO_BIG,			/* refused: longer than the way to the backend carries */
	DROP_NO_ROUTE,			/* no way to the backend, or no address of this node that it could answer to */
	DROP_HOP_LIMIT,			/* refused: to a service at the node's own address, with no hop left to go on */
	DROP_DSR_OPTION,		/* what says for which service a packet is makes no sense, or is from no node */
	DROP_REASONS,
};

/* Directions of policy, as the pod sees them. */
enum policy_direction {
	POLICY_INGRESS = 0,
	POLICY_EGRESS = 1,
};

/* Numbers that daemon/policy gives a meaning of their own. A zero was not written yet, and denies. */
enum policy_number {
	RULESET_OPEN = 1,	/* nothing is enforced */
	IDENTITY_HOST = 1,	/* this node, always allowed */
	IDENTITY_GROUPS = 4,	/* above it, by the group in the lowest bits: what a group has in common */
	PROFILE_ALL = 1,	/* every port of every protocol */
};

/* What holds for an endpoint: its rulesets by enum policy_direction. */
struct endpoint_policy {
	__u64 ruleset[2];
};

/* A prefix of addresses; byte for byte, so that the trie compares from the first bit on. */
struct identity_key {
	__u32 prefixlen;
	__u8 addr[16];
};

struct verdict_key {
	__u64 ruleset;
	__u64 identity;
};

/* How to a node's pods: the value of an LPM trie with struct identity_key. */
struct tunnel {
	struct addr remote;	/* the node */
	struct addr local;	/* this node towards it; 0: as the route has it */
};

/* A profile's answer for the protocols and ports that begin so: 64 bits are the whole profile, 72 a protocol. */
struct profile_key {
	__u32 prefixlen;
	__u32 profile[2];
	__u8 proto;
	__u8 port[2];
	__u8 pad;
};

/* Who may reach a frontend: from a prefix of addresses. prefixlen counts the service's bits, too. */
struct source_range_key {
	__u32 prefixlen;
	__u32 service;		/* id of the frontend, the whole of it */
	__u8 addr[16];
};

/* What is at an address of the cluster. */
enum node_flags {
	NODE_PODS = 1 << 0,	/* pods of a node */
	NODE_ITSELF = 1 << 1,	/* a node */
};

/* A device that leads out of the cluster, by its index. */
struct uplink {
	struct addr v4, v6;	/* this node's towards the backends beyond it; 0: it has none */
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
	FROM_HOST = 3,		/* calls of the host's own sockets, not packets */
	FROM_OVERLAY = 4,	/* out of a tunnel */
	TO_OVERLAY = 5,		/* into one */
	TO_WIRE = 6,		/* what this node itself sends by an uplink */
	FROM_DRIVER = 7,	/* FROM_WIRE, at XDP: what that leaves to tc is not counted */
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
	CT_STAT_EBUSY,			/* of the failures above, by errno: before 6.15 */
	CT_STAT_EDEADLK,		/* and since */
	CT_STAT_ETIMEDOUT,
	CT_STAT_TAKEN_OVER,		/* another flow has the tuple: in the place of one that was over, or without an entry */
	CT_STAT_PROMOTED,		/* from mooring_ct_embryonic to mooring_ct */
	CT_STAT_NO_STORAGE,		/* a live socket whose storage the kernel refused: timers end its flow */
	CT_STAT_CROWDS,			/* sockets with crowds that have ended */
	CT_STAT_GRACE_FULL,		/* no room among the endings: deleted without grace */
	CT_STAT_DEMOTED,		/* to mooring_ct_embryonic: over, and the table fills up */
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
	__u32 generation;	/* never 0; another one voids every decision that a socket has cached */
};

/* Of a generation, behind these bits, is how often all flows were forgotten: what a socket knows from before is void altogether. */
#define GENERATION_BITS 24

/* Entries in mooring_ct, counted by who makes and deletes them; one element. */
struct ct_live {
	__u64 entries;
};

/* One pass over the tables: in, what to delete; out, what was found. */
struct sweep {
	__u64 timeout[4][3];	/* in, jiffies: [enum ct_state][enum sweep_proto] */
	__u64 svc_timeout;	/* in, jiffies: what a SVC entry gets on top */
	__u64 missing_timeout;	/* in, jiffies: after which an owner that answers no roll call is gone; 0: no roll was called */
	__u32 roll_call;	/* in: number of the roll call */
	__u8 flush;		/* in: delete everything */
	__u8 gone_backends;	/* in: delete entries whose backend is gone */
	__u8 gone_endpoints;	/* in: delete entries whose endpoint is gone */
	__u8 gone_crowds;	/* in: delete entries of the sockets in mooring_crowds */
	__u64 now;		/* out, jiffies64 */
	__u64 scanned;
	__u64 entries;		/* left after the pass, in both tables */
	__u64 embryonic;	/* of them in mooring_ct_embryonic */
	__u64 tethered;
	__u64 expired, endpoint, backend, flushed;	/* deleted, by reason */
	__u64 socket;		/* deleted: crowds, and ends that a hook missed */
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
_Static_assert(sizeof(struct verdict_key) == 16, "verdict_key is a hash key: no padding");
_Static_assert(sizeof(struct identity_key) == 20, "no padding");
_Static_assert(sizeof(struct source_range_key) == 24, "no padding");
_Static_assert(sizeof(struct profile_key) == 16, "no padding");
_Static_assert(sizeof(struct frag_key) == 40, "frag_key is a hash key: no padding");
_Static_assert(sizeof(struct ct_entry) == 128, "two cache lines");
_Static_assert(sizeof(struct socket_flow) == 48, "no padding");
_Static_assert(sizeof(struct ending) == 56, "no padding");

#endif
