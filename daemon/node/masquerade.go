// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"github.com/mooring-cni/mooring/daemon/model"
)

// lockSeconds is how long to wait for others who use iptables.
const lockSeconds = 10

// chain is one of our chains as it should be. Everything in it is ours; of its
// parent only the one jump to it is.
type chain struct {
	table, name, parent, comment string
	rules                        []string
}

var (
	nat = chain{table: "nat", name: "MOORING-MASQUERADE", parent: "POSTROUTING", comment: "mooring: source NAT for pods"}
	raw = chain{table: "raw", name: "MOORING-NOTRACK", parent: "PREROUTING", comment: "mooring: pods need no nf_conntrack among themselves"}
)

// specification is the jump to the chain, in its parent.
func (c chain) specification() []string {
	return []string{"-m", "comment", "--comment", c.comment, "-j", c.name}
}

// chains says what iptables should hold in one family: own are this node's pod
// ranges, nodes the cluster's nodes with theirs.
//
// Source NAT needs nf_conntrack, so what needs no NAT stays out of it: packets
// between pods. Traffic between pods and nodes stays in, because a hostPort
// (portmap) is a DNAT on the way, and its replies are nothing but packets from a
// pod to a node. A pod that uses a hostPort gets the node's address: its
// reply would otherwise go from pod to pod and never be translated back.
//
// By tunnels (overlay) only pods are reached: a node would answer a pod's address
// through the tunnel from its own, where it is not let through.
func chains(own []netip.Prefix, nodes []model.Node, overlay, randomFully bool) []chain {
	v4 := own[0].Addr().Is4()
	pods, peers := slices.Clone(own), []netip.Prefix{}
	for _, n := range nodes {
		for _, prefix := range n.PodCIDRs {
			if prefix.Addr().Is4() == v4 {
				pods = append(pods, prefix)
			}
		}
		for _, a := range n.Addresses {
			if a.Is4() == v4 && !overlay {
				peers = append(peers, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	own, pods = aggregate(own), aggregate(pods)
	multicast := "ff00::/8"
	if v4 {
		multicast = "224.0.0.0/4"
	}
	masquerade := "-j MASQUERADE"
	if randomFully {
		masquerade += " --random-fully"
	}
	nat, raw := nat, raw
	for _, to := range own {
		for _, from := range pods {
			nat.rules = append(nat.rules, fmt.Sprintf("-s %s -d %s -m conntrack --ctstate DNAT %s", from, to, masquerade))
			raw.rules = append(raw.rules, fmt.Sprintf("-s %s -d %s -j CT --notrack", from, to))
			if from != to {
				raw.rules = append(raw.rules, fmt.Sprintf("-s %s -d %s -j CT --notrack", to, from))
			}
		}
	}
	for _, from := range own {
		for _, to := range append(pods, aggregate(peers)...) {
			nat.rules = append(nat.rules, fmt.Sprintf("-s %s -d %s -j RETURN", from, to))
		}
		nat.rules = append(nat.rules, fmt.Sprintf("-s %s -d %s -j RETURN", from, multicast))
		nat.rules = append(nat.rules, fmt.Sprintf("-s %s %s", from, masquerade))
	}
	return []chain{nat, raw}
}

// aggregate returns the fewest prefixes that hold the same addresses. The
// controller hands out nodes' ranges in order: thousands become a few.
func aggregate(prefixes []netip.Prefix) []netip.Prefix {
	list := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		list = append(list, p.Masked())
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	out := list[:0]
	for _, p := range list {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue
		}
		out = append(out, p)
		for n := len(out); n > 1; n = len(out) {
			a, b := out[n-2], out[n-1]
			parent, err := a.Addr().Prefix(a.Bits() - 1)
			if err != nil || a.Bits() != b.Bits() || a == b || !parent.Contains(b.Addr()) || parent.Addr() != a.Addr() {
				break
			}
			out = append(out[:n-2], parent)
		}
	}
	return out
}

// tables writes our chains in one family, and remembers how the kernel shows
// them, so that a change by somebody else is noticed.
type tables struct {
	family  iptables.Protocol
	ipt     *iptables.IPTables
	restore string            // the program
	shown   map[string]string // chain -> content right after it was written
	written map[string]string // chain -> what was written
}

func openTables(family iptables.Protocol) (*tables, error) {
	name := "iptables"
	if family == iptables.ProtocolIPv6 {
		name = "ip6tables"
	}
	restore, err := exec.LookPath(name + "-restore")
	if err != nil {
		return nil, fmt.Errorf("%s-restore is not installed (apt-get install iptables)", name)
	}
	ipt, err := iptables.New(iptables.IPFamily(family), iptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%s does not work: %w", name, err)
	}
	return &tables{family: family, ipt: ipt, restore: restore, shown: map[string]string{}, written: map[string]string{}}, nil
}

// ensure makes a chain what it should be, with one jump to it. repaired tells
// that somebody had changed what was right before.
func (t *tables) ensure(c chain) (repaired bool, err error) {
	content := strings.Join(c.rules, "\n")
	known := t.written[c.name] == content
	shown, err := t.show(c)
	if err != nil {
		return false, err
	}
	changed := !known || t.shown[c.name] != shown
	if changed {
		if err := t.write(c); err != nil {
			return false, err
		}
		if t.shown[c.name], err = t.show(c); err != nil {
			return false, err
		}
		t.written[c.name] = content
	}
	mended, err := t.jump(c)
	return known && (changed || mended), err
}

// show returns a chain's content, "" when there is no such chain.
func (t *tables) show(c chain) (string, error) {
	rules, err := t.ipt.List(c.table, c.name)
	if err == nil {
		return strings.Join(rules, "\n"), nil
	}
	// How iptables says that there is no such chain differs by version and
	// backend ("incompatible, use 'nft' tool" in 1.8.9): the list of chains tells.
	names, listErr := t.ipt.ListChains(c.table)
	if listErr == nil && !slices.Contains(names, c.name) || missing(listErr) {
		return "", nil
	}
	return "", fmt.Errorf("list chain %s: %w", c.name, err)
}

// write replaces the chain's content in one transaction: no packet meets a
// chain that is half there.
func (t *tables) write(c chain) error {
	var script bytes.Buffer
	fmt.Fprintf(&script, "*%s\n:%s - [0:0]\n", c.table, c.name)
	for _, rule := range c.rules {
		fmt.Fprintf(&script, "-A %s %s\n", c.name, rule)
	}
	script.WriteString("COMMIT\n")
	command := exec.Command(t.restore, "--noflush", "-w", fmt.Sprint(lockSeconds))
	command.Stdin = &script
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("write chain %s with %s: %w: %s", c.name, t.restore, err, firstLine(out))
	}
	return nil
}

// jump keeps exactly one jump to the chain in its parent.
func (t *tables) jump(c chain) (mended bool, err error) {
	count, err := t.jumps(c)
	if err != nil {
		return false, err
	}
	if count == 0 {
		if err := t.ipt.Insert(c.table, c.parent, 1, c.specification()...); err != nil {
			return false, fmt.Errorf("insert a jump from %s to %s: %w", c.parent, c.name, err)
		}
		return true, nil
	}
	return count > 1, t.deleteJumps(c, count-1)
}

func (t *tables) jumps(c chain) (count int, err error) {
	rules, err := t.ipt.List(c.table, c.parent)
	if err != nil {
		return 0, fmt.Errorf("list chain %s: %w", c.parent, err)
	}
	for _, rule := range rules {
		if jumpsTo(rule, c.name) {
			count++
		}
	}
	return count, nil
}

// deleteJumps deletes by specification: a position may be another rule's when
// somebody else works on the same chain.
func (t *tables) deleteJumps(c chain, count int) error {
	for range count {
		if err := t.ipt.Delete(c.table, c.parent, c.specification()...); err != nil {
			return fmt.Errorf("delete a jump from %s to %s: %w", c.parent, c.name, err)
		}
	}
	return nil
}

// remove takes the chains and the jumps to them away, as far as there are any.
func (t *tables) remove() error {
	for _, c := range []chain{nat, raw} {
		shown, err := t.show(c)
		if err != nil {
			return err
		}
		if shown == "" {
			continue
		}
		count, err := t.jumps(c)
		if err != nil {
			return err
		}
		if err := t.deleteJumps(c, count); err != nil {
			return err
		}
		if err := t.ipt.ClearAndDeleteChain(c.table, c.name); err != nil {
			return fmt.Errorf("delete chain %s: %w", c.name, err)
		}
	}
	clear(t.shown)
	clear(t.written)
	return nil
}

func jumpsTo(rule, chain string) bool {
	fields := strings.Fields(rule)
	i := slices.Index(fields, "-j")
	return i >= 0 && i+1 < len(fields) && fields[i+1] == chain
}

func missing(err error) bool {
	var e *iptables.Error
	return errors.As(err, &e) && e.IsNotExist()
}

func firstLine(out []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}
