// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/mooring-cni/mooring/conf"
)

// calling is a call of a plugin with this stanza.
func calling(t *testing.T, container, stdin string) *Call {
	t.Helper()
	c, err := conf.ParseIPAMNetConf([]byte(stdin))
	if err != nil {
		t.Fatal(err)
	}
	return &Call{Conf: c, Key: Key{"mooring", container, "eth0"}, Stdin: []byte(stdin)}
}

func TestRangesComeFromTheNodeFileUnlessTheStanzaHasThem(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "mooring.sock")
	stanza := func(ipam string) string {
		return fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "mooring", "type": "bridge", "ipam": {"type": "mooring-ipam", "socket": %q%s}}`, socket, ipam)
	}
	without := calling(t, "a", stanza(""))
	if _, err := without.Add(t.Context()); Code(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "no mooringd has started") {
		t.Errorf("without a node file: %v", err)
	}
	if err := without.Del(t.Context()); err != nil {
		t.Errorf("DEL without a node file: %v", err)
	}
	err := conf.WriteNode(socket, conf.Node{StateDir: filepath.Join(dir, "state"), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("fd00:10:244:3::/64")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ ipam, want string }{
		{"", "10.244.3.2/24 by 10.244.3.1, fd00:10:244:3::2/64 by fd00:10:244:3::1"},
		{`, "podCIDRs": ["10.9.0.0/16"]`, "10.9.0.2/16 by 10.9.0.1"},
		{fmt.Sprintf(`, "podCIDRs": ["10.9.0.0/16"], "stateDir": %q`, filepath.Join(dir, "elsewhere")), "10.9.0.2/16 by 10.9.0.1"},
	} {
		call := calling(t, "a", stanza(test.ipam))
		result, err := call.Add(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, ip := range result.IPs {
			got = append(got, ip.Address.String()+" by "+ip.Gateway.String())
		}
		if strings.Join(got, ", ") != test.want {
			t.Errorf("%s: %v, want %s", test.ipam, got, test.want)
		}
		if addrs, err := call.Check(t.Context()); err != nil || len(addrs) != len(got) {
			t.Errorf("%s: CHECK says %v, %v", test.ipam, addrs, err)
		}
		if err := call.Status(t.Context()); err != nil {
			t.Errorf("%s: STATUS says %v", test.ipam, err)
		}
		for range 2 {
			if err := call.Del(t.Context()); err != nil {
				t.Error(err)
			}
		}
		var none *NotFoundError
		if _, err := call.Check(t.Context()); !errors.As(err, &none) {
			t.Errorf("%s: CHECK after DEL: %v", test.ipam, err)
		}
	}
}

// After a reboot the runtime's DELs come before the daemon, whose node file went
// with the reboot.
func TestStanzaSaysWhereTheAddressesAreBeforeAnyDaemonStarts(t *testing.T) {
	dir := t.TempDir()
	socket, state := filepath.Join(dir, "mooring.sock"), filepath.Join(dir, "state")
	stdin := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "mooring", "type": "mooring-cni", "socket": %q,
		"ipam": {"type": "mooring-ipam", "stateDir": %q}}`, socket, state)
	node := conf.Node{StateDir: state, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.3.0/30")}}
	if err := conf.WriteNode(socket, node); err != nil {
		t.Fatal(err)
	}
	if _, err := calling(t, "a", stdin).Add(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(conf.NodeFile(socket)); err != nil {
		t.Fatal(err)
	}
	if err := calling(t, "a", stdin).Del(t.Context()); err != nil {
		t.Errorf("DEL without a node file: %v", err)
	}
	if err := conf.WriteNode(socket, node); err != nil {
		t.Fatal(err)
	}
	var none *NotFoundError
	if addrs, err := calling(t, "a", stdin).Check(t.Context()); !errors.As(err, &none) {
		t.Errorf("after DEL it has %v (%v)", addrs, err)
	}
}

func TestRequestsForAddressesAreReadWhereverTheyStand(t *testing.T) {
	for name, test := range map[string]struct{ more, ip, want string }{
		"nothing":          {"", "", "[]"},
		"runtimeConfig":    {`, "runtimeConfig": {"ips": ["10.244.0.7/24", "fd00:10:244::7"]}`, "", "[10.244.0.7 fd00:10:244::7]"},
		"args.cni":         {`, "args": {"cni": {"ips": ["10.244.0.7"]}}`, "", "[10.244.0.7]"},
		"CNI_ARGS":         {"", "10.244.0.7", "[10.244.0.7]"},
		"the same twice":   {`, "runtimeConfig": {"ips": ["::ffff:10.244.0.7"]}`, "10.244.0.7", "[10.244.0.7]"},
		"no address":       {`, "args": {"cni": {"ips": ["web"]}}`, "", `args.cni.ips: "web" is no IP address`},
		"ips of no list":   {`, "runtimeConfig": {"ips": "10.244.0.7"}`, "", "decode the addresses asked for"},
		"in CNI_ARGS none": {"", "x", `IP in CNI_ARGS: "x" is no IP address`},
	} {
		call := calling(t, "a", `{"cniVersion": "1.0.0", "name": "mooring", "type": "bridge", "ipam": {"type": "mooring-ipam"}`+test.more+`}`)
		call.RequestedIP = test.ip
		addrs, err := call.requested()
		got := fmt.Sprint(addrs)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, test.want) {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}

func TestErrorsHaveTheSpecificationsCodes(t *testing.T) {
	for _, test := range []struct {
		err  error
		want uint
	}{
		{&ExhaustedError{}, types.ErrTryAgainLater},
		{&InUseError{}, types.ErrTryAgainLater},
		{context.DeadlineExceeded, types.ErrTryAgainLater},
		{&RequestError{"x"}, types.ErrInvalidNetworkConfig},
		{types.NewError(101, "a delegate's", ""), 101},
		{&DamagedError{"x", errors.New("y")}, types.ErrIOFailure},
		{errors.New("disk full"), types.ErrIOFailure},
	} {
		if got := Code(fmt.Errorf("allocate: %w", test.err)); got != test.want {
			t.Errorf("%v: code %d, want %d", test.err, got, test.want)
		}
	}
}
