// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// kind says what sort of peer an address is.
type kind uint8

const (
	world kind = iota // neither a pod nor a node: known by its address alone
	pod
	node
	self // this node
)

// class is all that selectors and port names can tell of a peer.
type class struct {
	kind            kind
	namespace       string
	namespaceLabels map[string]string
	labels          map[string]string // the pod's or the node's
	named           []model.ContainerPort
	content         string
}

var (
	worldClass = &class{kind: world, content: "world"}
	selfClass  = &class{kind: self, content: "self"}
)

func nodeClass(n *model.Node) *class {
	return &class{kind: node, labels: n.Labels, content: "node" + labelContent(n.Labels)}
}

func podClass(namespace string, namespaceLabels, labels map[string]string, declared []model.ContainerPort) *class {
	c := &class{kind: pod, namespace: namespace, namespaceLabels: namespaceLabels, labels: labels, named: namedPorts(declared)}
	c.content = "pod" + strconv.Quote(namespace) + labelContent(namespaceLabels) + labelContent(labels) + portContent(c.named)
	return c
}

func labelContent(labels map[string]string) string {
	keys := make([]string, 0, len(labels))
	for key := range labels {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var b strings.Builder
	b.WriteByte('{')
	for _, key := range keys {
		b.WriteString(strconv.Quote(key))
		b.WriteString(strconv.Quote(labels[key]))
	}
	b.WriteByte('}')
	return b.String()
}

func namedPorts(declared []model.ContainerPort) []model.ContainerPort {
	var named []model.ContainerPort
	for _, d := range declared {
		if d.Name != "" {
			named = append(named, model.ContainerPort{Name: d.Name, Protocol: d.Protocol, Port: d.Port})
		}
	}
	slices.SortFunc(named, func(a, b model.ContainerPort) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	return slices.Compact(named)
}

func portContent(named []model.ContainerPort) string {
	var b strings.Builder
	b.WriteByte('[')
	for _, p := range named {
		b.WriteString(p.Name + "=" + strconv.Itoa(int(p.Port)) + "/" + strconv.Itoa(int(p.Protocol)) + " ")
	}
	b.WriteByte(']')
	return b.String()
}

// identity is what addresses have in common: a class, and the blocks that
// rules name which hold them.
type identity struct {
	id     ID
	index  int // in the members of terms
	class  *class
	region *region
	users  int
}

func groupOf(c *class, r *region) ID {
	group := ID(family(r.name.Addr()))
	if c.kind != pod {
		group += 2
	}
	return group
}

// term is a peer by selectors, shared by all rules that say the same.
type term struct {
	peer    model.PolicyPeer
	own     string // namespace, where the peer has no namespace selector
	content string
	members set // indices of identities
	users   int
}

func termContent(own string, peer *model.PolicyPeer) string {
	write := func(s *model.Selector) string {
		if s == nil {
			return "-"
		}
		return strconv.Quote(s.String())
	}
	if peer.Nodes != nil {
		return "nodes" + write(peer.Nodes)
	}
	if peer.NamespaceSelector != nil {
		own = ""
	}
	return "pods" + strconv.Quote(own) + write(peer.NamespaceSelector) + write(peer.PodSelector)
}

func (t *term) matches(c *class) bool {
	switch c.kind {
	case pod:
		return t.peer.MatchesPod(t.own, c.namespace, c.namespaceLabels, c.labels)
	case node:
		return t.peer.Nodes != nil && t.peer.Nodes.Matches(c.labels)
	}
	return false
}

// region is a part of the address space that no rule's blocks divide. Its name
// is its lowest prefix, so rules that come and go without dividing anything
// leave every identity its number.
type region struct {
	name   netip.Prefix
	blocks set // indices of the blockLists that hold it
}

// blockList is the address blocks of one rule, shared by rules that say the same.
type blockList struct {
	content string
	blocks  []*model.IPBlock
	index   int
	users   int
}

func blockContent(blocks []*model.IPBlock) string {
	texts := make([]string, len(blocks))
	for i, b := range blocks {
		except := make([]string, len(b.Except))
		for j, e := range b.Except {
			except[j] = e.String()
		}
		slices.Sort(except)
		texts[i] = b.CIDR.String() + " " + strings.Join(slices.Compact(except), " ")
	}
	slices.Sort(texts)
	return strings.Join(slices.Compact(texts), ",")
}

// atlas divides both families' addresses into regions.
type atlas struct {
	regions map[netip.Prefix]*region // by each prefix that any rule mentions
	lengths [2][]int                 // of those prefixes, longest first: IPv4, IPv6
}

var (
	everyV4 = netip.MustParsePrefix("0.0.0.0/0")
	everyV6 = netip.MustParsePrefix("::/0")
)

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// newAtlas draws the regions. A prefix stands for those of its addresses that no
// longer prefix in the atlas holds.
func newAtlas(lists map[string]*blockList) *atlas {
	type mention struct {
		block, list int
		except      bool
	}
	mentions := map[netip.Prefix][]mention{everyV4: nil, everyV6: nil}
	blocks, highest := 0, -1
	for _, list := range lists {
		highest = max(highest, list.index)
		for _, b := range list.blocks {
			mentions[b.CIDR] = append(mentions[b.CIDR], mention{blocks, list.index, false})
			for _, e := range b.Except {
				mentions[e] = append(mentions[e], mention{blocks, list.index, true})
			}
			blocks++
		}
	}
	prefixes := make([]netip.Prefix, 0, len(mentions))
	for prefix := range mentions {
		prefixes = append(prefixes, prefix)
	}
	slices.SortFunc(prefixes, comparePrefixes)

	a := &atlas{regions: make(map[netip.Prefix]*region, len(prefixes))}
	// One walk through the prefixes as nested: what holds an address is open.
	type opened struct {
		prefix netip.Prefix
		undo   []mention // blocks that this prefix opened or closed
	}
	var stack []opened
	open := make([]bool, blocks)
	count := make([]int, highest+1)
	var holding set
	turn := func(m mention, on bool) {
		open[m.block] = on
		if on {
			count[m.list]++
		} else {
			count[m.list]--
		}
		if count[m.list] > 0 {
			holding.add(m.list)
		} else {
			holding.remove(m.list)
		}
	}
	named := make(map[string]*region)
	lengths := [2]map[int]bool{{}, {}}
	var key []byte
	for _, prefix := range prefixes {
		for len(stack) > 0 && !stack[len(stack)-1].prefix.Overlaps(prefix) {
			undo := stack[len(stack)-1].undo
			for i := len(undo) - 1; i >= 0; i-- {
				turn(undo[i], undo[i].except)
			}
			stack = stack[:len(stack)-1]
		}
		o := opened{prefix: prefix}
		for _, except := range []bool{false, true} {
			for _, m := range mentions[prefix] {
				if m.except == except && open[m.block] == except {
					turn(m, !except)
					o.undo = append(o.undo, m)
				}
			}
		}
		stack = append(stack, o)

		key = append(key[:0], byte(family(prefix.Addr())))
		last := len(holding)
		for last > 0 && holding[last-1] == 0 {
			last--
		}
		for _, word := range holding[:last] {
			for shift := 0; shift < 64; shift += 8 {
				key = append(key, byte(word>>shift))
			}
		}
		r := named[string(key)]
		if r == nil {
			r = &region{name: prefix, blocks: slices.Clone(holding)}
			named[string(key)] = r
		}
		a.regions[prefix] = r
		lengths[family(prefix.Addr())][prefix.Bits()] = true
	}
	for f := range lengths {
		for length := range lengths[f] {
			a.lengths[f] = append(a.lengths[f], length)
		}
		slices.SortFunc(a.lengths[f], func(x, y int) int { return y - x })
	}
	return a
}

func (a *atlas) at(addr netip.Addr) *region {
	for _, length := range a.lengths[family(addr)] {
		prefix, _ := addr.Prefix(length)
		if r := a.regions[prefix]; r != nil {
			return r
		}
	}
	return nil
}
