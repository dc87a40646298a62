// SPDX-License-Identifier: Apache-2.0

//go:build root

package smoke

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain lifts the lock limit that kernels before 5.11 count maps against.
func TestMain(m *testing.M) {
	if err := rlimit.RemoveMemlock(); err != nil {
		fmt.Fprintln(os.Stderr, "lift the memory lock limit:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// release is uname -r.
func release(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

// before says whether the kernel is older than a version.
func before(t *testing.T, major, minor int) bool {
	t.Helper()
	var gotMajor, gotMinor int
	if _, err := fmt.Sscanf(release(t), "%d.%d", &gotMajor, &gotMinor); err != nil {
		t.Fatalf("read the kernel's version %q: %v", release(t), err)
	}
	return gotMajor < major || gotMajor == major && gotMinor < minor
}

// inGuest says whether a kernel of the matrix runs the test, and not the machine's own.
func inGuest() bool {
	return os.Getenv("MOORING_KERNEL") != ""
}

// newNetns moves the test into a network namespace of its own with lo up. The
// thread is never unlocked: it and the namespace end with the test.
func newNetns(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func TestGuestRunsTheKernelThatWasAskedFor(t *testing.T) {
	want := os.Getenv("MOORING_KERNEL")
	got := regexp.MustCompile(`^\d+\.\d+`).FindString(release(t))
	if inGuest() && got != want {
		t.Errorf("kernel %s runs, expected %s", got, want)
	}
	t.Logf("kernel %s", release(t))
}

func TestFileSystemsAreMounted(t *testing.T) {
	for _, fs := range []struct {
		name  string
		magic int64
		dirs  []string
		// A machine of a developer need not have it: tests mount their own.
		guestOnly bool
	}{
		{"bpf", unix.BPF_FS_MAGIC, []string{"/sys/fs/bpf"}, true},
		{"cgroup2", unix.CGROUP2_SUPER_MAGIC, []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}, false},
		{"proc", unix.PROC_SUPER_MAGIC, []string{"/proc"}, false},
	} {
		if fs.guestOnly && !inGuest() {
			continue
		}
		found := false
		for _, dir := range fs.dirs {
			var s unix.Statfs_t
			if err := unix.Statfs(dir, &s); err == nil && int64(s.Type) == fs.magic {
				found = true
			}
		}
		if !found {
			t.Errorf("no %s at %v", fs.name, fs.dirs)
		}
	}
}

func TestDevicesAndQueuesOfANodeCanBeMade(t *testing.T) {
	newNetns(t)
	for _, l := range []netlink.Link{
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lxc1"}, PeerName: "eth1"},
		&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "overlay"}, FlowBased: true, Port: 8472},
		&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}},
	} {
		if err := netlink.LinkAdd(l); err != nil {
			t.Errorf("add %s %s: %v", l.Type(), l.Attrs().Name, err)
		}
	}
	lxc, err := netlink.LinkByName("lxc1")
	if err != nil {
		t.Fatal(err)
	}
	tbf := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: lxc.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       1 << 20, Limit: 1 << 16, Buffer: 1 << 14,
	}
	if err := netlink.QdiscAdd(tbf); err != nil {
		t.Errorf("add a tbf queue: %v", err)
	}
}

func TestPacketFilterRulesLoad(t *testing.T) {
	newNetns(t)
	for _, rule := range []string{
		"iptables -w -t nat -A POSTROUTING -s 10.244.0.0/16 ! -d 10.244.0.0/16 -m comment --comment mooring -j MASQUERADE",
		"ip6tables -w -t nat -A POSTROUTING -s fd00:10:244::/56 -m mark --mark 0x1/0x1 -j MASQUERADE",
		"iptables -w -t raw -A PREROUTING -s 10.244.0.0/16 -j CT --notrack",
		"iptables -w -t filter -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		"iptables -w -t nat -A PREROUTING -p tcp --dport 8080 -m addrtype --dst-type LOCAL -j DNAT --to-destination 10.244.0.5:80",
		"iptables -w -t nat -A PREROUTING -p tcp -m multiport --dports 80,443 -m statistic --mode random --probability 0.5 -j RETURN",
		"iptables -w -t filter -A FORWARD -p tcp -j REJECT --reject-with tcp-reset",
		"nft add table inet mooring",
		"nft add chain inet mooring forward { type filter hook forward priority 0 ; }",
		"nft add rule inet mooring forward ct state established accept",
	} {
		words := strings.Fields(rule)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", rule, err, out)
		}
	}
}

// newMap makes a map that the test closes.
func newMap(t *testing.T, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatalf("make the %s map: %v", spec.Type, err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func newCounter(t *testing.T) *ebpf.Map {
	t.Helper()
	return newMap(t, &ebpf.MapSpec{Name: "count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
}

func newStorage(t *testing.T) *ebpf.Map {
	t.Helper()
	return newMap(t, &ebpf.MapSpec{
		Name: "storage", Type: ebpf.SkStorage, KeySize: 4, ValueSize: 8, Flags: unix.BPF_F_NO_PREALLOC,
		Key:   &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed},
		Value: &btf.Int{Name: "long long", Size: 8, Encoding: btf.Signed},
	})
}

func count(t *testing.T, m *ebpf.Map) uint64 {
	t.Helper()
	var n uint64
	if err := m.Lookup(uint32(0), &n); err != nil {
		t.Fatalf("read the counter: %v", err)
	}
	return n
}

// increment adds one to the counter and ends the program with 0. It is where
// `out` is.
func increment(m *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}
}

// attachTC attaches to lo's egress, as a tcx link from 6.6 on, else by clsact.
func attachTC(t *testing.T, p *ebpf.Program) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if !before(t, 6, 6) {
		l, err := link.AttachTCX(link.TCXOptions{Interface: lo.Attrs().Index, Program: p, Attach: ebpf.AttachTCXEgress})
		if err != nil {
			t.Fatalf("attach by tcx: %v", err)
		}
		t.Cleanup(func() { l.Close() })
		return
	}
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(clsact); err != nil {
		t.Fatalf("add clsact: %v", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: lo.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          p.FD(), Name: "smoke", DirectAction: true,
	}
	if err := netlink.FilterAdd(filter); err != nil {
		t.Fatalf("attach by clsact: %v", err)
	}
}

func load(t *testing.T, spec *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	spec.License = "GPL"
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatalf("load %s %s: %+v", spec.Type, spec.AttachTo, err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// sendThenClose sends packets from one UDP socket and closes it.
func sendThenClose(t *testing.T, packets int) {
	t.Helper()
	sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	c, err := net.DialUDP("udp4", nil, sink.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range packets {
		if _, err := c.Write([]byte("mooring")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTCProgramSeesEveryPacket(t *testing.T) {
	newNetns(t)
	counter := newCounter(t)
	attachTC(t, load(t, &ebpf.ProgramSpec{Name: "count_packets", Type: ebpf.SchedCLS, Instructions: increment(counter)}))
	sendThenClose(t, 5)
	if n := count(t, counter); n < 5 {
		t.Errorf("the program counted %d packets of 5", n)
	}
}

// TestTrampolineSeesSocketsEnd also holds on machines where the kernel is locked
// so that no trampoline loads: there it must be EPERM and nothing else.
func TestTrampolineSeesSocketsEnd(t *testing.T) {
	newNetns(t)
	counter := newCounter(t)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "count_ends", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: "inet_sock_destruct",
		License: "GPL", Instructions: increment(counter),
	})
	if !inGuest() && errors.Is(err, unix.EPERM) {
		t.Logf("this machine's kernel refuses every trampoline: %v", err)
		return
	}
	if err != nil {
		t.Fatalf("load fentry/inet_sock_destruct: %+v", err)
	}
	defer p.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		t.Fatalf("attach fentry/inet_sock_destruct: %v", err)
	}
	defer l.Close()
	sendThenClose(t, 1)
	waitFor(t, "both sockets' ends", func() bool { return count(t, counter) >= 2 })
}

// storageGet leaves the storage of the socket in R2, or 0, in R0.
func storageGet(storage *ebpf.Map, flags int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, storage.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, flags),
		asm.FnSkStorageGet.Call(),
	}
}

// tracing is a program that counts the sockets that have storage when fn is called.
func tracing(fn string, attach ebpf.AttachType, storage, counter *ebpf.Map) *ebpf.ProgramSpec {
	var code asm.Instructions
	code = append(code, asm.LoadMem(asm.R2, asm.R1, 0, asm.DWord))
	code = append(code, storageGet(storage, 0)...)
	code = append(code, asm.JEq.Imm(asm.R0, 0, "out"))
	code = append(code, increment(counter)...)
	return &ebpf.ProgramSpec{Name: "count_storage", Type: ebpf.Tracing, AttachType: attach, AttachTo: fn, License: "GPL", Instructions: code}
}

// TestSocketStorageReachesTracingPrograms is what fate sharing stands on: what a
// tc program wrote into a socket's storage is there when the socket ends.
func TestSocketStorageReachesTracingPrograms(t *testing.T) {
	newNetns(t)
	storage := newStorage(t)
	if before(t, 5, 11) {
		// Not open to tracing programs yet: one reason why such a kernel is refused.
		p, err := ebpf.NewProgram(tracing("inet_sock_destruct", ebpf.AttachTraceFEntry, storage, newCounter(t)))
		if err == nil {
			p.Close()
			t.Errorf("kernel %s lets a tracing program read a socket's storage: the documentation of kernels is wrong about it", release(t))
		} else if !strings.Contains(fmt.Sprintf("%+v", err), "unknown func bpf_sk_storage_get") {
			t.Errorf("kernel %s refuses for another reason: %+v", release(t), err)
		}
		return
	}

	// The socket of each packet gets storage.
	var code asm.Instructions
	code = append(code, asm.LoadMem(asm.R1, asm.R1, int16(168), asm.DWord)) // __sk_buff.sk
	code = append(code,
		asm.JEq.Imm(asm.R1, 0, "out"),
		asm.FnSkFullsock.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R2, asm.R0),
	)
	code = append(code, storageGet(storage, 1)...) // BPF_SK_STORAGE_GET_F_CREATE
	code = append(code, asm.Mov.Imm(asm.R0, 0).WithSymbol("out"), asm.Return())
	attachTC(t, load(t, &ebpf.ProgramSpec{Name: "tether", Type: ebpf.SchedCLS, Instructions: code}))

	ends := map[string]*ebpf.Map{}
	for _, hook := range []struct {
		fn         string
		attach     ebpf.AttachType
		trampoline bool
	}{
		{"inet_sock_destruct", ebpf.AttachTraceFEntry, true},
		{"tcp_destroy_sock", ebpf.AttachTraceRawTp, false},
	} {
		counter := newCounter(t)
		p, err := ebpf.NewProgram(tracing(hook.fn, hook.attach, storage, counter))
		if hook.trampoline && !inGuest() && errors.Is(err, unix.EPERM) {
			t.Logf("this machine's kernel refuses every trampoline: %v", err)
			continue
		}
		if err != nil {
			t.Fatalf("load %s: %+v", hook.fn, err)
		}
		defer p.Close()
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			t.Fatalf("attach to %s: %v", hook.fn, err)
		}
		defer l.Close()
		ends[hook.fn] = counter
	}

	connectThenClose(t)
	for fn, counter := range ends {
		waitFor(t, fn+" with storage", func() bool { return count(t, counter) >= 1 })
	}
}

// TestStorageFreeIsClosedToTracing is the verifier's refusal that the hook on
// inet_sock_destruct avoids.
func TestStorageFreeIsClosedToTracing(t *testing.T) {
	spec := tracing("bpf_sk_storage_free", ebpf.AttachTraceFEntry, newStorage(t), newCounter(t))
	p, err := ebpf.NewProgram(spec)
	if err == nil {
		p.Close()
		t.Errorf("kernel %s loads fentry/bpf_sk_storage_free with bpf_sk_storage_get: the documentation of the hooks is wrong about it", release(t))
	}
}

// connectThenClose opens a TCP connection over lo and closes both ends.
func connectThenClose(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := binary.Write(client, binary.BigEndian, uint32(1)); err != nil {
		t.Fatal(err)
	}
}

// waitFor gives what the kernel does after a grace period five seconds.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("no %s within 5 s", what)
			return
		}
	}
}
