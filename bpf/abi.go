// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the datapath's programs and is the only one that talks to
// the kernel's BPF interface: it loads, pins and attaches, and turns the wire's
// addresses and byte orders into Go's. README.md walks a packet through the C.
package bpf

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"strings"
)

// The shared types, generated from lib/abi.h.
type (
	CTKey       = abiCtKey
	CTEntry     = abiCtEntry
	Endpoint    = abiEndpoint
	ServiceKey  = abiSvcKey
	Service     = abiSvc
	Slots       = abiSvcSlots
	Backend     = abiBackend
	AffinityKey = abiAffinityKey
	Affinity    = abiAffinity
	Counter     = abiCounter
	Event       = abiEvent
	Shared      = abiShared
	Sweep       = abiSweep
	DropReason  = abiDropReason
	Direction   = abiDirection
	Addr        = abiAddr
	SocketState = abiSocketState
	CTStat      = abiCtStat
	Tunnel      = abiTunnel
	Uplink      = abiUplink

	SourceRangeKey = abiSourceRangeKey
)

// Kinds of conntrack entry (enum ct_type).
const (
	CTService = uint8(abiCtTypeCT_SVC)
	CTFlow    = uint8(abiCtTypeCT_FLOW)
)

// Flags of a conntrack entry (enum ct_flags).
const (
	CTInitiatorHigh = uint32(abiCtFlagsCT_F_INITIATOR_HIGH)
	CTEgress        = uint32(abiCtFlagsCT_F_EGRESS)
	CTIngress       = uint32(abiCtFlagsCT_F_INGRESS)
	CTHairpin       = uint32(abiCtFlagsCT_F_HAIRPIN)
	CTReset         = uint32(abiCtFlagsCT_F_RST)
	CTEmbryonic     = uint32(abiCtFlagsCT_F_EMBRYONIC)
	CTEnded         = uint32(abiCtFlagsCT_F_ENDED)
	CTAlone         = uint32(abiCtFlagsCT_F_ALONE)
)

// How firmly an entry is tied to a side's socket (enum ct_tether).
const (
	TetherNone  = uint8(abiCtTetherTETHER_NONE)
	TetherLoose = uint8(abiCtTetherTETHER_LOOSE)
	TetherHeld  = uint8(abiCtTetherTETHER_HELD)
	TetherCrowd = uint8(abiCtTetherTETHER_CROWD)
)

// CTClaimed in an entry's life says that it is being deleted.
const CTClaimed = 1

// States of a conntrack entry (enum ct_state).
const (
	CTNew         = uint8(abiCtStateCT_NEW)
	CTEstablished = uint8(abiCtStateCT_ESTABLISHED)
	CTClosing     = uint8(abiCtStateCT_CLOSING)
	CTTimeWait    = uint8(abiCtStateCT_TIMEWAIT)
)

// Flags of a service (enum svc_flags) and states of a backend (enum backend_state).
const (
	ServiceAddress       = uint32(abiSvcFlagsSVC_F_ADDRESS)
	ServiceInternalLocal = uint32(abiSvcFlagsSVC_F_INTERNAL_LOCAL)
	ServiceExternalLocal = uint32(abiSvcFlagsSVC_F_EXTERNAL_LOCAL)
	ServiceExternal      = uint32(abiSvcFlagsSVC_F_EXTERNAL)
	ServiceSourceRanges  = uint32(abiSvcFlagsSVC_F_SOURCE_RANGES)
	ServiceMaglev        = uint32(abiSvcFlagsSVC_F_MAGLEV)

	BackendFree        = uint8(abiBackendStateBACKEND_FREE)
	BackendActive      = uint8(abiBackendStateBACKEND_ACTIVE)
	BackendTerminating = uint8(abiBackendStateBACKEND_TERMINATING)
)

// What the conntrack programs count (enum ct_stat).
const (
	StatCreated         = abiCtStatCT_STAT_CREATED
	StatDeletedSocket   = abiCtStatCT_STAT_DELETED_SOCKET
	StatDeletedTimewait = abiCtStatCT_STAT_DELETED_TIMEWAIT
	StatDeletedExpired  = abiCtStatCT_STAT_DELETED_EXPIRED
	StatDeletedEndpoint = abiCtStatCT_STAT_DELETED_ENDPOINT
	StatDeletedBackend  = abiCtStatCT_STAT_DELETED_BACKEND
	StatDeletedFlush    = abiCtStatCT_STAT_DELETED_FLUSH
	StatTakenOver       = abiCtStatCT_STAT_TAKEN_OVER
	StatInsertFailed    = abiCtStatCT_STAT_INSERT_FAILED
	StatDeleteFailed    = abiCtStatCT_STAT_DELETE_FAILED
	StatBusy            = abiCtStatCT_STAT_EBUSY
	StatDeadlock        = abiCtStatCT_STAT_EDEADLK
	StatTimedOut        = abiCtStatCT_STAT_ETIMEDOUT
	StatPromoted        = abiCtStatCT_STAT_PROMOTED
	StatNoStorage       = abiCtStatCT_STAT_NO_STORAGE
	StatCrowds          = abiCtStatCT_STAT_CROWDS
	StatGraceFull       = abiCtStatCT_STAT_GRACE_FULL
	StatDemoted         = abiCtStatCT_STAT_DEMOTED
	CTStats             = int(abiCtStatCT_STATS)
)

// Numbers of drop reasons, directions and statistics.
const (
	DropReasons = int(abiDropReasonDROP_REASONS)
	Directions  = int(abiDirectionDIRECTIONS)
)

// Kinds of event (enum event_kind).
const (
	EventDrop = uint8(abiEventKindEVENT_DROP)
	EventNew  = uint8(abiEventKindEVENT_NEW)
	EventEnd  = uint8(abiEventKindEVENT_END)
)

// FromDriver is the direction of what XDP did all of.
const FromDriver = abiDirectionFROM_DRIVER

// Label is the reason as metrics, events and the client name it: "source_address".
func Label(r DropReason) string {
	return strings.ToLower(strings.TrimPrefix(r.String(), "DROP_"))
}

// DirectionLabel names the hook: "from_endpoint", "to_endpoint", "from_wire" and so on.
func DirectionLabel(d Direction) string {
	return strings.ToLower(d.String())
}

// ToAddr turns an address into its 16 bytes, IPv4 mapped (RFC 4291, 2.5.5.2).
func ToAddr(a netip.Addr) Addr {
	return Addr{B: a.As16()}
}

// FlowKey is the key of the flow between two ends: the lower end comes first.
// The programs compare the ends word by word, as their machine reads words.
func FlowKey(protocol uint8, a, b netip.AddrPort) CTKey {
	if compareEnds(a, b) > 0 {
		a, b = b, a
	}
	return CTKey{
		Addr: [2]Addr{ToAddr(a.Addr()), ToAddr(b.Addr())}, Port: [2]uint16{Port(a.Port()), Port(b.Port())},
		Proto: protocol, Type: CTFlow,
	}
}

func compareEnds(a, b netip.AddrPort) int {
	x, y := a.Addr().As16(), b.Addr().As16()
	return cmp.Or(
		cmp.Compare(binary.NativeEndian.Uint64(x[:8]), binary.NativeEndian.Uint64(y[:8])),
		cmp.Compare(binary.NativeEndian.Uint64(x[8:]), binary.NativeEndian.Uint64(y[8:])),
		cmp.Compare(Port(a.Port()), Port(b.Port())),
	)
}

// IP is the address as Go has it: IPv4 unmapped. The zero address is invalid.
func (a abiAddr) IP() netip.Addr {
	if a.B == [16]byte{} {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a.B).Unmap()
}

// Port swaps a port between network and host order: it is its own inverse.
func Port(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}
