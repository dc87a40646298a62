// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

func wantCode(t *testing.T, err error, code uint, says string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), says) {
		t.Errorf("%v, want code %d and %q", err, code, says)
	}
}

func TestStanzaWithoutOurKeysHasTheDefaults(t *testing.T) {
	for _, stdin := range []string{
		`{"cniVersion":"1.0.0","name":"mooring","type":"mooring-cni"}`,
		`{"cniVersion":"1.0.0","name":"mooring","type":"mooring-cni","ipam":{}}`,
		`{"cniVersion":"1.0.0","name":"mooring","type":"mooring-cni","ipam":null,"mtu":null,"socket":"","bpffs":""}`,
	} {
		c, err := ParseNetConf([]byte(stdin))
		if err != nil {
			t.Errorf("%s: %v", stdin, err)
			continue
		}
		if c.Socket != DefaultSocket || c.BPFFS != DefaultBPFFS || c.MTU != 0 || !c.IPAM.Own() || c.Name != "mooring" || c.CNIVersion != "1.0.0" {
			t.Errorf("%s: %+v", stdin, c)
		}
	}
}

func TestStanzaSetsEveryKey(t *testing.T) {
	c, err := ParseNetConf([]byte(`{"cniVersion":"1.1.0","name":"net","type":"mooring-cni","socket":"/run/n1/m.sock","bpffs":"/sys/fs/bpf/n1","mtu":1450,
		"ipam":{"type":"mooring-ipam","podCIDRs":["10.244.1.0/24","fd00:10:244:1::/64"],"stateDir":"/var/lib/n1","socket":"/run/n2/m.sock"},
		"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != "/run/n1/m.sock" || c.BPFFS != "/sys/fs/bpf/n1" || c.MTU != 1450 {
		t.Errorf("%+v", c)
	}
	want := IPAMConf{Type: "mooring-ipam", StateDir: "/var/lib/n1", Socket: "/run/n2/m.sock",
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}}
	if diff := cmp.Diff(want, c.IPAM, samePrefix); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}}, c.ValidAttachments); diff != "" {
		t.Error(diff)
	}
}

// Recorded from containerd: capitalised keys, and a burst that no int32 holds.
const containerd = `{"cniVersion":"1.0.0","name":"mooring","type":"mooring-cni","socket":"/run/mooring/mooring.sock",
	"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"io.kubernetes.cri.pod-annotations":true},
	"runtimeConfig":{"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""}],
	"bandwidth":{"IngressRate":10000000,"IngressBurst":4294967295,"EgressRate":10000000,"EgressBurst":4294967295},
	"dns":{"Servers":["10.96.0.10"],"Searches":null,"Options":null},"cgroupPath":"/kubepods/x",
	"io.kubernetes.cri.pod-annotations":{"kubernetes.io/config.seen":"now"}},
	"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"lxc0"}],"ips":[{"address":"10.244.0.5/32","interface":0}],"dns":{}}}`

func TestWhatRuntimesPutInIsAccepted(t *testing.T) {
	c, err := ParseNetConf([]byte(containerd))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ParsePrevResult(); err != nil || c.PrevResult == nil {
		t.Errorf("prevResult: %v, %v", c.PrevResult, err)
	}
	_, err = ParseNetConf([]byte(`{"cniVersion":"1.1.0","cniVersions":["1.1.0"],"name":"n","type":"mooring-cni","args":{"cni":{"ips":["10.244.0.9"]}},
		"dns":{"nameservers":["10.96.0.10"]},"ipMasq":true,"disableCheck":true,"disableGC":true,"loadOnlyInlinedPlugins":false,
		"cni.dev/valid-attachments":null,"cni.dev/attachments":[],"cni.dev/anything":1}`))
	if err != nil {
		t.Error(err)
	}
}

func TestBadStanzaIsRefusedWithCodeAndKey(t *testing.T) {
	stanza := func(more string) string {
		return `{"cniVersion":"1.0.0","name":"n","type":"mooring-cni",` + more + `}`
	}
	for _, test := range []struct {
		stdin string
		code  uint
		says  string
	}{
		{``, 6, "decode"},
		{`{`, 6, "decode"},
		{`not json`, 6, "decode"},
		{`[]`, 6, "decode"},
		{`null`, 6, "no object"},
		{stanza(`"mtu":"1500"`), 6, "mtu"},
		{stanza(`"mtu":1500.5`), 6, "mtu"},
		{stanza(`"socket":5`), 6, "socket"},
		{stanza(`"ipam":[]`), 6, "ipam"},
		{stanza(`"ipam":{"type":5}`), 6, "ipam.type"},
		{stanza(`"ipam":{"podCIDRs":"10.0.0.0/8"}`), 6, "ipam.podCIDRs"},
		{stanza(`"prevResult":[]`), 6, "prevResult"},
		{stanza(`"cni.dev/valid-attachments":{}`), 6, "cni.dev/valid-attachments"},
		{stanza(`"bridge":"br0"`), 7, "bridge: unknown key; accepted keys: socket, bpffs, mtu"},
		{stanza(`"MTU":1500`), 7, "MTU: unknown key"},
		{stanza(`"log-level":1,"Socket":"/x"`), 7, "Socket: unknown key"},
		{stanza(`"mtu":-1`), 7, "mtu: -1 is not accepted; accepted: 0 (the uplink's), or 1280 to 65535"},
		{stanza(`"mtu":1279`), 7, "mtu"},
		{stanza(`"mtu":65536`), 7, "mtu"},
		{stanza(`"socket":"m.sock"`), 7, "socket: \"m.sock\" is no absolute path"},
		{stanza(`"socket":"/` + strings.Repeat("s", 107) + `"`), 7, "socket"},
		{stanza(`"bpffs":"x"`), 7, "bpffs"},
		{stanza(`"ipam":{"type":"mooring-ipam","subnet":"10.0.0.0/8"}`), 7, "ipam.subnet: unknown key; accepted keys: type, podCIDRs, stateDir, socket"},
		{stanza(`"ipam":{"subnet":"10.0.0.0/8"}`), 7, "ipam.subnet"},
		{stanza(`"ipam":{"podCIDRs":["10.0.0.1/8"]}`), 7, "ipam.podCIDRs: 10.0.0.1/8 has host bits"},
		{stanza(`"ipam":{"stateDir":"x"}`), 7, "ipam.stateDir"},
		{stanza(`"ipam":{"type":"../sh"}`), 7, "ipam.type"},
	} {
		_, err := ParseNetConf([]byte(test.stdin))
		wantCode(t, err, test.code, test.says)
		_, err = ParseIPAMNetConf([]byte(test.stdin))
		wantCode(t, err, test.code, test.says)
	}
	c, err := ParseNetConf([]byte(stanza(`"prevResult":{"cniVersion":"9.9.9"}`)))
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.ParsePrevResult(), 6, "prevResult")
}

func TestObjectOfAForeignIPAMIsItsOwnBusiness(t *testing.T) {
	c, err := ParseNetConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"mooring-cni","ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.0.0/24"}]],"podCIDRs":7,"stateDir":{}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.IPAM.Own() || c.IPAM.Type != "host-local" {
		t.Errorf("%+v", c.IPAM)
	}
}

func TestIPAMStandsInOtherPluginsConfigurations(t *testing.T) {
	c, err := ParseIPAMNetConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"bridge","bridge":"br0","mtu":"any","socket":7,"ipam":{"type":"mooring-ipam","socket":"/run/n1/m.sock"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.IPAM.Socket != "/run/n1/m.sock" || c.Type != "bridge" {
		t.Errorf("%+v", c)
	}
	_, err = ParseIPAMNetConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"bridge","ipam":{"type":"host-local"}}`))
	wantCode(t, err, 7, `ipam.type: "host-local" is not accepted; accepted: mooring-ipam`)
	_, err = ParseIPAMNetConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"mooring-ipam","bridge":"br0"}`))
	wantCode(t, err, 7, "bridge: unknown key")
	c, err = ParseIPAMNetConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"mooring-ipam","socket":"/run/n1/m.sock"}`))
	if err != nil || c.Socket != "/run/n1/m.sock" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestShippedConflistIsTheContractsExample(t *testing.T) {
	data, err := os.ReadFile("10-mooring.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(`{"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "mooring", "plugins": [
		{"type": "mooring-cni", "socket": "/run/mooring/mooring.sock", "bpffs": "/sys/fs/bpf/mooring",
		 "mtu": 0, "ipam": {"type": "mooring-ipam"}},
		{"type": "portmap", "capabilities": {"portMappings": true}}]}`), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	list, err := libcni.NetworkConfFromFile("10-mooring.conflist")
	if err != nil {
		t.Fatal(err)
	}
	// The runtime adds the list's name and version to each stanza.
	stanza, err := libcni.InjectConf(list.Plugins[0], map[string]any{"name": list.Name, "cniVersion": list.CNIVersion})
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseNetConf(stanza.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != DefaultSocket || c.BPFFS != DefaultBPFFS || !c.IPAM.Own() || list.CNIVersion != "1.1.0" {
		t.Errorf("version %s, %+v", list.CNIVersion, c)
	}
}

func FuzzNetConf(f *testing.F) {
	f.Add([]byte(containerd))
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"n","type":"bridge","ipam":{"type":"mooring-ipam","podCIDRs":["10.0.0.0/8"],"stateDir":"/s"}}`))
	f.Add([]byte(`{"name":"n","ipam":{"type":"static"}}`))
	f.Fuzz(func(t *testing.T, stdin []byte) {
		for _, parse := range []func([]byte) (*NetConf, error){ParseNetConf, ParseIPAMNetConf} {
			c, err := parse(stdin)
			if err != nil {
				var e *types.Error
				if !errors.As(err, &e) || e.Code != types.ErrDecodingFailure && e.Code != types.ErrInvalidNetworkConfig {
					t.Errorf("%v has neither code 6 nor 7", err)
				}
				continue
			}
			if c.Socket == "" || c.BPFFS == "" || c.IPAM.Type == "" || c.MTU < 0 {
				t.Errorf("%+v", c)
			}
			if err := c.ParsePrevResult(); err == nil && len(c.RawPrevResult) > 0 && c.PrevResult == nil {
				t.Error("prevResult got lost")
			}
		}
	})
}
