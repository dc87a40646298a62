// SPDX-License-Identifier: Apache-2.0

package bpf

import "net/netip"

// The shared types of network policy.
type (
	EndpointPolicy = abiEndpointPolicy
	IdentityKey    = abiIdentityKey
	VerdictKey     = abiVerdictKey
	ProfileKey     = abiProfileKey
)

// The numbers of policy that the programs know (enum policy_number); rulesets
// by direction (enum policy_direction).
const (
	RulesetOpen    = uint64(abiPolicyNumberRULESET_OPEN)
	IdentityHost   = uint64(abiPolicyNumberIDENTITY_HOST)
	IdentityGroups = uint64(abiPolicyNumberIDENTITY_GROUPS)
	ProfileAll     = uint64(abiPolicyNumberPROFILE_ALL)

	PolicyIngress = int(abiPolicyDirectionPOLICY_INGRESS)
	PolicyEgress  = int(abiPolicyDirectionPOLICY_EGRESS)
)

// Drop reasons of network policy.
const (
	DropPolicyEgress  = abiDropReasonDROP_POLICY_EGRESS
	DropPolicyIngress = abiDropReasonDROP_POLICY_INGRESS
	DropPolicyUnknown = abiDropReasonDROP_POLICY_UNKNOWN
)

// ToIdentityKey turns a prefix into the key that holds it: IPv4 is mapped, as
// addresses are.
func ToIdentityKey(p netip.Prefix) IdentityKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return IdentityKey{Prefixlen: uint32(bits), Addr: p.Addr().As16()}
}

// Prefix is the prefix that a key holds.
func (k abiIdentityKey) Prefix() netip.Prefix {
	addr := netip.AddrFrom16(k.Addr)
	if addr.Is4In6() && k.Prefixlen >= 96 {
		return netip.PrefixFrom(addr.Unmap(), int(k.Prefixlen)-96)
	}
	return netip.PrefixFrom(addr, int(k.Prefixlen))
}

// ToProfileKey names the first bits of what a profile answers for: none is
// everything, 8 a protocol, 24 a port.
func ToProfileKey(profile uint64, bits int, protocol uint8, port uint16) ProfileKey {
	return ProfileKey{
		Prefixlen: uint32(64 + bits), Profile: [2]uint32{uint32(profile), uint32(profile >> 32)},
		Proto: protocol, Port: [2]uint8{uint8(port >> 8), uint8(port)},
	}
}

// ID is the profile that a key belongs to.
func (k abiProfileKey) ID() uint64 { return uint64(k.Profile[0]) | uint64(k.Profile[1])<<32 }
