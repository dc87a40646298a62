// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

// Whatever a runtime sends, it is read or refused with one of the
// specification's codes and some words, before anything is changed.
func FuzzStdin(f *testing.F) {
	for _, stdin := range []string{
		`{"cniVersion": "1.1.0", "name": "mooring", "type": "mooring-cni"}`,
		`{"cniVersion": "1.0.0", "name": "m", "type": "mooring-cni", "mtu": 1400, "ipam": {"type": "mooring-ipam", "podCIDRs": ["10.244.0.0/24"]}, "dns": {}}`,
		`{"cniVersion": "0.4.0", "name": "m", "type": "mooring-cni", "runtimeConfig": {"mac": "02:11:22:33:44:55", "ips": ["10.244.0.7/24", "fd00::7"],
			"portMappings": [{"HostPort": 80, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}], "bandwidth": {"IngressRate": 10000000, "IngressBurst": 4294967295}}}`,
		`{"cniVersion": "1.0.0", "name": "m", "type": "mooring-cni", "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "lxc0", "mac": "0a:00:00:00:00:01"},
			{"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/a"}], "ips": [{"interface": 1, "address": "10.244.0.7/32"}, {"address": "fd00::7/128"}]}}`,
		`{"cniVersion": "1.0.0", "name": "m", "type": "mooring-cni", "prevResult": {"cniVersion": "1.0.0", "interfaces": [null], "ips": [null]}}`,
		`{"cniVersion": "0.4.0", "name": "m", "type": "mooring-cni", "prevResult": {"cniVersion": "0.4.0", "interfaces": [null], "ips": [null], "routes": [null]}}`,
		`{"cniVersion": "0.4.0", "name": "m", "type": "mooring-cni", "prevResult": {"cniVersion": "0.2.0", "ip4": null, "ip6": {"ip": "x"}}}`,
		`{"cniVersion": "1.1.0", "name": "m", "type": "mooring-cni", "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}, null]}`,
		`[]`, `null`, `"`, `{"name": 1}`, `{"ipam": []}`,
	} {
		f.Add([]byte(stdin), "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;IP=10.244.0.7")
	}
	f.Add([]byte(`{"cniVersion": "1.0.0", "name": "m", "type": "mooring-cni"}`), "=;;=")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		refused := func(err error) bool {
			if err == nil {
				return false
			}
			var coded *types.Error
			if !errors.As(err, &coded) || coded.Msg == "" {
				t.Fatalf("an error without a code or words: %#v", err)
			}
			switch coded.Code {
			case types.ErrInvalidEnvironmentVariables, types.ErrDecodingFailure, types.ErrInvalidNetworkConfig, differs:
			default:
				t.Fatalf("code %d: %s", coded.Code, coded.Msg)
			}
			return true
		}
		a, err := parse(&skel.CmdArgs{StdinData: stdin, Args: args, ContainerID: "a", IfName: "eth0", Netns: "/run/netns/a"})
		if refused(err) {
			return
		}
		result, err := a.previous()
		if refused(err) || result == nil {
			return
		}
		if refused(a.readResult(result)) {
			return
		}
		if len(a.ips) == 0 || len(a.mac) == 0 || len(a.host.mac) == 0 {
			t.Fatalf("read %+v from %s", a, stdin)
		}
	})
}

func TestAttachmentsHaveNamesOfTheirOwn(t *testing.T) {
	args := &skel.CmdArgs{StdinData: []byte(`{"cniVersion": "1.0.0", "name": "mooring", "type": "mooring-cni"}`)}
	seen := map[string]string{}
	for _, who := range [][2]string{{"a", "eth0"}, {"a", "eth1"}, {"b", "eth0"}, {"ae", "th0"}, {strings.Repeat("f", 64), "eth0"}, {strings.Repeat("c", 250), "abcdefghijklmno"}} {
		args.ContainerID, args.IfName = who[0], who[1]
		a, err := parse(args)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.Join(who[:], "/")
		if len(a.host.name) > 15 || !strings.HasPrefix(a.host.name, hostPrefix) || a.mac[0]&3 != 2 || a.host.mac[0]&3 != 2 || cmp.Equal(a.mac, a.host.mac) {
			t.Errorf("%s: %s, %s and %s", name, a.host.name, a.host.mac, a.mac)
		}
		for _, own := range []string{a.host.name, a.host.alias, a.mac.String(), a.host.mac.String()} {
			if other, taken := seen[own]; taken {
				t.Errorf("%s has %s of %s", name, own, other)
			}
			seen[own] = name
		}
		network, containerID, ifname, ours := readAlias(a.host.alias)
		if !ours || network != "mooring" || containerID != who[0] || ifname != who[1] {
			t.Errorf("%q is read as %s, %s, %s, %v", a.host.alias, network, containerID, ifname, ours)
		}
	}
	for _, alias := range []string{"", "mooring", "mooring a b", "mooring a b c d", "someone's uplink", "Mooring a b c"} {
		if _, _, _, ours := readAlias(alias); ours {
			t.Errorf("%q is taken for ours", alias)
		}
	}
}

func TestUndoGoesBackwardsAndPastWhatFails(t *testing.T) {
	var did []string
	run := func(fail error) (err error) {
		var undo undo
		defer undo.unwind(&err)
		for _, what := range []string{"one", "two", "three"} {
			undo.push(what, func() error {
				did = append(did, what)
				if what == "two" {
					return errors.New("it is stuck")
				}
				return nil
			})
		}
		undo.push("nothing", nil)
		return fail
	}
	if err := run(nil); err != nil || did != nil {
		t.Errorf("without an error: %v, took back %v", err, did)
	}
	cause := failed(types.ErrTryAgainLater, "the cause")
	err := run(cause)
	if !cmp.Equal(did, []string{"three", "two", "one"}) || !errors.Is(err, cause) || !strings.Contains(err.Error(), `take back "two": it is stuck`) || code(err) != types.ErrTryAgainLater {
		t.Errorf("took back %v; %v", did, err)
	}
}
