// SPDX-License-Identifier: Apache-2.0

// Package kernels runs the project's Go tests inside other kernels than the
// machine's own. It fetches Debian's cloud kernels, packs a kernel's modules
// and static test binaries into an initramfs, boots that in QEMU without
// hardware acceleration, and gives the inner tests back as subtests of an
// ordinary go test run.
//
// matrix.go says which kernels and which tests; the rest is machinery, one file
// a stage: mirror.go, fetch.go (the packages), modules.go, programs.go,
// image.go (the initramfs), guest.go (the boot), report.go (the results).
package kernels

import (
	"slices"
	"time"
)

// A Kernel is one column of the matrix.
type Kernel struct {
	// Name is what KERNELS= and Job.Kernels call it.
	Name string
	// Suites hold the package; the newest version in any of them is taken.
	Suites []string
	// Package is the meta package that depends on the current kernel.
	Package string
	// Optional kernels run when the mirror still has them.
	Optional bool
}

// Matrix is every kernel, the slowest to boot first so that two at a time
// finish together.
var Matrix = []Kernel{
	{Name: "newest", Suites: []string{"trixie-backports"}, Package: "linux-image-cloud-amd64"},
	{Name: "6.1", Suites: []string{"bookworm", "bookworm-security"}, Package: "linux-image-cloud-amd64"},
	{Name: "6.12", Suites: []string{"bookworm-security"}, Package: "linux-image-6.12-cloud-amd64"},
	{Name: "5.10", Suites: []string{"bullseye"}, Package: "linux-image-cloud-amd64", Optional: true},
}

// Modules are loaded before the first job, after what they depend on. A kernel
// that has one built in, or not at all, boots all the same.
var Modules = []string{
	// Devices of the node and its pods.
	"veth", "vxlan", "bridge", "dummy", "macvlan", "tun", "8021q",
	// Queues and classifiers.
	"sch_ingress", "cls_bpf", "sch_tbf", "sch_fq", "sch_netem",
	// Socket tables as netlink gives them, and closing sockets through it.
	"inet_diag", "tcp_diag", "udp_diag", "raw_diag",
	// What iptables and nft rules of ours and of portmap and bandwidth need.
	"nf_tables", "nft_compat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_reject_inet",
	// (Counters are a module of their own before 5.11.)
	"nft_counter",
	"nft_limit", "nft_log", "nft_fib_inet", "nft_numgen", "nft_hash",
	"iptable_filter", "iptable_nat", "iptable_raw", "iptable_mangle",
	"ip6table_filter", "ip6table_nat", "ip6table_raw", "ip6table_mangle",
	"nf_conntrack_netlink",
	"xt_conntrack", "xt_MASQUERADE", "xt_nat", "xt_comment", "xt_mark", "xt_connmark", "xt_addrtype",
	"xt_tcpudp", "xt_multiport", "xt_CT", "xt_statistic", "xt_REDIRECT", "xt_limit", "xt_set",
	"ipt_REJECT", "ip6t_REJECT",
}

// A Job is one test binary run once inside each of its kernels.
type Job struct {
	// Name is the subtest's; empty takes the package's path. Two jobs of one
	// package (say, one a hook mode) need two names.
	Name string
	// Package is built with `go test -c -tags root,kernels`, as ./path from the module's
	// root. The guest runs it in /src/path, with the package's testdata beside it.
	Package string
	// Run and Skip are -test.run and -test.skip; an empty Run means all. A Run
	// that matches nothing fails.
	Run, Skip string
	// Env is added to the environment, NAME=value. MOORING_KERNEL (the kernel's
	// series, "6.1") and MOORING_BIN (where Commands are) are always set.
	Env []string
	// Kernels limits the job; empty means every kernel that is not optional.
	Kernels []string
	// Timeout is the inner -test.timeout; zero means five minutes, a multiple of what any takes on a quiet machine.
	Timeout time.Duration
	// Commands are main packages of this module, built static into /src/bin.
	Commands []string
	// Programs are names found in the machine's PATH, taken along with the
	// shared libraries that they load.
	Programs []string
	// Files are files or directories, relative to the module's root, put at the
	// same place under /src.
	Files []string
}

// What the scenario level needs of this module and of the machine.
var (
	datapathCommands = []string{"./daemon/mooringd", "./daemon/mooring", "./plugins/mooring-cni", "./plugins/mooring-ipam"}
	datapathPrograms = []string{"iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore", "ip", "tc"}
)

// Jobs is what runs in every kernel, in this order.
var Jobs = []Job{
	{Package: "./test/kernels/smoke", Programs: []string{"iptables", "ip6tables", "nft"},
		Kernels: []string{"5.10", "6.1", "6.12", "newest"}},
	{Package: "./bpf", Run: "^TestEveryProgramLoads$"},
	{Package: "./test/reachability", Run: "^TestProgramsAgreeWithTheReference$"},
	// The oldest kernel in both modes of the hook, which wait for TIME_WAIT together; the others in the one that auto takes.
	{Name: "everyend", Package: "./test/fate", Run: everyEnd, Timeout: 10 * time.Minute, Kernels: []string{"6.1"}},
	{Name: "everyend/trampoline", Package: "./test/fate", Run: everyEnd, Timeout: 10 * time.Minute, Kernels: []string{"6.12", "newest"},
		Env: []string{"MOORING_HOOK=trampoline"}},
	// The machine's own kernel need not have VLANs.
	{Name: "vlan", Package: "./test/north", Run: "^TestServicesAreReachedByAVLAN$", Timeout: 10 * time.Minute, Kernels: []string{"6.12", "newest"},
		Commands: datapathCommands, Programs: datapathPrograms},
	{Name: "unnamed", Package: "./test/packet", Run: "^TestAnACKWithoutASocket$", Kernels: []string{"6.1", "6.12"}},
}

// everyEnd needs no daemon, which takes long to start in a guest.
const everyEnd = "^TestEveryEndOfASocketEndsItsEntries$"

// ends are the ways in which most flows end, and TIME_WAIT after them.
const ends = "^TestFate$/^(nothing_is_left_of_flows_that_ended|an_entry_shows|a_reused_port|sockets_that_share|a_deleted_pod)"

// Long are jobs that run when KERNELS_LONG=1 or KERNELS_JOBS asks for them: with them
// a kernel takes several minutes.
var Long = []Job{
	{Package: "./test/packet", Timeout: 10 * time.Minute},
	{Name: "everyend/both", Package: "./test/fate", Run: everyEnd, Timeout: 20 * time.Minute, Kernels: []string{"6.12", "newest"}},
	{Name: "ends/trampoline", Package: "./test/fate", Run: ends, Env: []string{"MOORING_HOOK=trampoline"}, Timeout: 10 * time.Minute,
		Commands: datapathCommands, Programs: datapathPrograms},
	{Name: "ends/tracepoint", Package: "./test/fate", Run: ends, Env: []string{"MOORING_HOOK=tracepoint"}, Timeout: 10 * time.Minute,
		Commands: datapathCommands, Programs: datapathPrograms},
	// The number of flows that docs/performance.md speaks of: more than fit into TIME_WAIT there.
	{Name: "fifty/trampoline", Package: "./test/fate", Run: "^TestFate$/^nothing_is_left_of_flows_that_ended", Timeout: 15 * time.Minute,
		Env: []string{"MOORING_HOOK=trampoline", "FATE_CONNECTIONS=50000"}, Commands: datapathCommands, Programs: datapathPrograms},
	{Name: "evicted", Package: "./test/fate", Run: "^TestAConnectionGoesOnWithoutItsEntry$", Timeout: 10 * time.Minute},
	{Name: "fate/trampoline", Package: "./test/fate", Run: "^TestFate$", Env: []string{"MOORING_HOOK=trampoline"}, Timeout: 10 * time.Minute,
		Commands: datapathCommands, Programs: datapathPrograms},
	{Name: "fate/tracepoint", Package: "./test/fate", Run: "^TestFate$", Env: []string{"MOORING_HOOK=tracepoint"}, Timeout: 10 * time.Minute,
		Commands: datapathCommands, Programs: datapathPrograms},
}

func (j Job) runsOn(k Kernel) bool {
	if len(j.Kernels) == 0 {
		return !k.Optional
	}
	return slices.Contains(j.Kernels, k.Name)
}
