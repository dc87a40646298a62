// SPDX-License-Identifier: Apache-2.0

package conf_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
)

var node = conf.Node{Name: "n1", MTU: 1450, BPFFS: "/sys/fs/bpf/n1", StateDir: "/var/lib/n1",
	PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd00:10:244::/64")}, Ready: true, Reason: "r"}

func TestNodeFileStandsBesideTheSocket(t *testing.T) {
	for socket, want := range map[string]string{
		"/run/mooring/mooring.sock": "/run/mooring/mooring.json",
		"/run/mooring/api":          "/run/mooring/api.json",
		"/run/a.sock/b":             "/run/a.sock/b.json",
	} {
		if got := conf.NodeFile(socket); got != want {
			t.Errorf("%s: %s, want %s", socket, got, want)
		}
	}
}

func TestNodeFileReadsBackAsWritten(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "m.sock")
	for _, want := range []conf.Node{{Name: "first"}, node} {
		if err := conf.WriteNode(socket, want); err != nil {
			t.Fatal(err)
		}
		got, err := conf.ReadNode(socket)
		if err != nil {
			t.Fatal(err)
		}
		if want.PodCIDRs == nil {
			want.PodCIDRs = []netip.Prefix{}
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(socket))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestNodeFileHasTheKeysOfTheAPI(t *testing.T) {
	written, err := json.Marshal(node)
	if err != nil {
		t.Fatal(err)
	}
	answered, err := json.Marshal(api.Node{Name: node.Name, MTU: node.MTU, BPFFS: node.BPFFS, StateDir: node.StateDir, PodCIDRs: node.PodCIDRs, Ready: node.Ready, Reason: node.Reason})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(answered), string(written)); diff != "" {
		t.Error(diff)
	}
}

func TestMissingAndBrokenNodeFilesAreToldApart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m.sock")
	if _, err := conf.ReadNode(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, content := range []string{"", "{", `{"podCIDRs":["x"]}`, `{"mtu":"a"}`} {
		if err := os.WriteFile(conf.NodeFile(socket), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := conf.ReadNode(socket); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), conf.NodeFile(socket)) {
			t.Errorf("%q: %v", content, err)
		}
	}
}
