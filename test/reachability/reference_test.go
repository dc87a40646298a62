// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
)

var shapes = map[string]Shape{
	"policies":                      {Namespaces: 3, Pods: 12, Policies: 8},
	"many policies":                 {Namespaces: 2, Pods: 10, Policies: 30},
	"cluster policies":              {Namespaces: 3, Pods: 10, ClusterPolicies: 8},
	"policies and cluster policies": {Namespaces: 3, Pods: 10, Policies: 6, ClusterPolicies: 6},
}

// compare checks every packet of a world and tells how many there were.
func compare(t *testing.T, seed uint64, w *World, table *policy.Table) (checks, allowed int) {
	t.Helper()
	for _, k := range w.Packets("TCP", "UDP", "SCTP", "ICMP") {
		want := w.Allowed(k)
		got := table.Explain(k.Query())
		checks++
		if want {
			allowed++
		}
		if got.Allowed != want {
			t.Errorf("seed %d: %s: allowed %v, the reference says %v\n%s", seed, k, got.Allowed, want, describe(got))
			if checks > 100 {
				t.FailNow()
			}
		}
	}
	return checks, allowed
}

func describe(a policy.Answer) string {
	text := ""
	if a.Egress != nil {
		text += "egress: " + a.Egress.Reason + "\n"
	}
	if a.Ingress != nil {
		text += "ingress: " + a.Ingress.Reason + "\n"
	}
	return text
}

func TestComputationAgreesWithTheReference(t *testing.T) {
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			checks, allowed := 0, 0
			for seed := uint64(1); seed <= 12; seed++ {
				w := Generate(seed, shape)
				c, err := w.Changes(t.TempDir())
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				table := policy.NewTable(policy.Config{Node: w.Here, Mode: policy.Default, Standalone: true})
				table.ApplyEndpoints(w.Endpoints())
				table.Apply(c)
				n, a := compare(t, seed, w, table)
				checks, allowed = checks+n, allowed+a
			}
			t.Logf("seeds 1 to 12: %d checks, %d allowed", checks, allowed)
			if allowed == 0 || allowed == checks {
				t.Error("the worlds are of one answer: nothing was tested")
			}
		})
	}
}

// What a change costs is what it changes, and never the answer: a table that
// went through other worlds has what one has that began here.
func TestChangesLeadToTheSameStateAsABeginning(t *testing.T) {
	for seed := uint64(100); seed < 112; seed++ {
		shape := Shape{Namespaces: 3, Pods: 10, Policies: 8, ClusterPolicies: 3}
		w := Generate(seed, shape)
		kept := policy.NewTable(policy.Config{Node: w.Here, Mode: policy.Default, Standalone: true})
		maps := newKept()
		maps.apply(t, kept.ApplyEndpoints(w.Endpoints()))
		g := rand.New(rand.NewPCG(seed, 1))
		var before model.Changes
		for step := range 5 {
			next := Generate(seed+uint64(g.IntN(3))*1000, shape)
			if step%2 == 1 { // one thing only
				next = Generate(seed, shape)
				next.Pods[g.IntN(len(next.Pods))].Meta.Labels = Labels{"app": "red"}
				next.Namespaces[0].Meta.Labels = Labels{"team": "blue"}
				next.Policies = next.Policies[g.IntN(3):]
			}
			after, err := next.Changes(t.TempDir())
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			maps.apply(t, kept.Apply(difference(before, after)))
			endpoints := next.Endpoints()
			for id := range w.Endpoints() {
				if endpoints[id] == nil {
					endpoints[id] = nil
				}
			}
			maps.apply(t, kept.ApplyEndpoints(endpoints))
			before, w = after, next

			compare(t, seed, next, kept)
			fresh := policy.NewTable(policy.Config{Node: next.Here, Mode: policy.Default, Standalone: true})
			fresh.ApplyEndpoints(next.Endpoints())
			fresh.Apply(after)
			if diff := cmp.Diff(whole(kept.State()), maps.kept); diff != "" {
				t.Fatalf("seed %d step %d: what the updates wrote is not the state (-state +written):\n%s", seed, step, diff)
			}
			if diff := cmp.Diff(numbered(fresh.State()), numbered(kept.State())); diff != "" {
				t.Fatalf("seed %d step %d: identities differ from a fresh start's (-fresh +kept):\n%s", seed, step, diff)
			}
		}
	}
}

// kept is what maps would hold that got every update.
type kept struct {
	Addresses map[string]policy.ID
	Verdicts  map[policy.Pair]policy.ID
	Profiles  map[policy.ID][]policy.Entry
	Endpoints map[uint32]policy.EndpointPolicy
}

type written struct{ kept }

func newKept() *written {
	return &written{kept{map[string]policy.ID{}, map[policy.Pair]policy.ID{}, map[policy.ID][]policy.Entry{}, map[uint32]policy.EndpointPolicy{}}}
}

func whole(u *policy.Update) kept {
	w := newKept()
	w.apply(nil, u)
	return w.kept
}

// numbered is what has to be the same whatever came before: which profile is
// most common, and so left out, is not.
func numbered(u *policy.Update) map[string]policy.ID { return whole(u).Addresses }

func (w *written) apply(t *testing.T, u *policy.Update) {
	for id, p := range u.Profiles {
		w.Profiles[id] = p.Entries
	}
	for pair, profile := range u.Verdicts {
		if w.Profiles[profile] == nil && profile > policy.All {
			t.Fatalf("verdict %v has profile %d, which is not written", pair, profile)
		}
		w.Verdicts[pair] = profile
	}
	for prefix, id := range u.Addresses {
		w.Addresses[prefix.String()] = id
	}
	for id, e := range u.Endpoints {
		w.Endpoints[id] = e
	}
	for _, id := range u.GoneEndpoints {
		delete(w.Endpoints, id)
	}
	for _, prefix := range u.GoneAddresses {
		delete(w.Addresses, prefix.String())
	}
	for _, pair := range u.GoneVerdicts {
		delete(w.Verdicts, pair)
	}
	for _, id := range u.GoneProfiles {
		delete(w.Profiles, id)
	}
}

func difference(before, after model.Changes) model.Changes {
	for name := range before.Pods {
		if after.Pods[name] == nil {
			after.Pods[name] = nil
		}
	}
	for name := range before.Policies {
		if after.Policies[name] == nil {
			after.Policies[name] = nil
		}
	}
	for name := range before.ClusterPolicies {
		if after.ClusterPolicies[name] == nil {
			after.ClusterPolicies[name] = nil
		}
	}
	for name := range before.Namespaces {
		if after.Namespaces[name] == nil {
			after.Namespaces[name] = nil
		}
	}
	return after
}
