// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
)

// Options size the maps and set the programs' constants.
type Options struct {
	BPFFS      string
	MaxEntries uint32    // of the conntrack map
	Hook       string    // conntrack.hook: auto, trampoline, tracepoint or off; empty: off
	Cgroup     string    // where the hook for close() attaches; empty: the root of cgroup2
	Policy     bool      // enforce network policies: what mooring_policies does not have is closed
	SNATPorts  PortRange // of the node, for flows to backends on other nodes; none: 1024-29999
	DSR        bool      // backends on other nodes answer clients outside themselves
	NoCache    bool      // decide every packet by the tables: for comparison
}

// Maps are the shared maps; lib/maps.h says who writes each.
type Maps struct {
	CT        *ebpf.Map `ebpf:"mooring_ct"`
	Embryonic *ebpf.Map `ebpf:"mooring_ct_embryonic"`
	Live      *ebpf.Map `ebpf:"mooring_ct_live"`
	Sockets   *ebpf.Map `ebpf:"mooring_sockets"`
	Ended     *ebpf.Map `ebpf:"mooring_ended"`
	TimeWait  *ebpf.Map `ebpf:"mooring_timewait"`
	Late      *ebpf.Map `ebpf:"mooring_late"`
	Crowds    *ebpf.Map `ebpf:"mooring_crowds"`
	CTStats   *ebpf.Map `ebpf:"mooring_ct_stats"`
	Endpoints *ebpf.Map `ebpf:"mooring_endpoints"`
	Services  *ebpf.Map `ebpf:"mooring_services"`
	Slots     *ebpf.Map `ebpf:"mooring_slots"`
	Backends  *ebpf.Map `ebpf:"mooring_backends"`
	Affinity  *ebpf.Map `ebpf:"mooring_affinity"`
	Frags     *ebpf.Map `ebpf:"mooring_frags"`
	Counters  *ebpf.Map `ebpf:"mooring_counters"`
	Events    *ebpf.Map `ebpf:"mooring_events"`
	Shared    *ebpf.Map `ebpf:"mooring_shared"`

	Policies    *ebpf.Map `ebpf:"mooring_policies"`
	Identities  *ebpf.Map `ebpf:"mooring_identities"`
	Verdicts    *ebpf.Map `ebpf:"mooring_verdicts"`
	Profiles    *ebpf.Map `ebpf:"mooring_profiles"`
	PolicyDrops *ebpf.Map `ebpf:"mooring_policy_drops"`
	Tunnels     *ebpf.Map `ebpf:"mooring_tunnels"`

	SourceRanges  *ebpf.Map `ebpf:"mooring_source_ranges"`
	Uplinks       *ebpf.Map `ebpf:"mooring_uplinks"`
	NodeAddresses *ebpf.Map `ebpf:"mooring_node_addresses"`
	Doors         *ebpf.Map `ebpf:"mooring_doors"`
	Nodes         *ebpf.Map `ebpf:"mooring_nodes"`
}

// Programs are what a daemon runs or attaches.
type Programs struct {
	FromContainer *ebpf.Program
	ToContainer   *ebpf.Program
	FromLimit     *ebpf.Program
	FromWire      *ebpf.Program
	ToWire        *ebpf.Program
	sweep         *ebpf.Program
	bury          *ebpf.Program
	clock         *ebpf.Program
}

// Datapath is the loaded datapath.
type Datapath struct {
	Maps
	Programs
	// JiffiesPerSecond is the kernel's CONFIG_HZ, as measured.
	JiffiesPerSecond uint64
	// Hook is how ends of sockets are noticed.
	Hook Hook

	options  Options
	seal     [6]byte // by which from_wire knows what the driver's program has finished with
	limitMAC net.HardwareAddr
	pins     Pins
	roll     rollCall
	mu       sync.Mutex // of mooring_shared
}

// Load loads the programs and pins them and their maps below opts.BPFFS. Maps
// that are pinned there already are adopted with what they hold; programs are
// replaced, and attached endpoints run the new ones from their next packet on.
func Load(opts Options) (*Datapath, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift the locked memory limit: %w", err)
	}
	if err := Mount(opts.BPFFS); err != nil {
		return nil, err
	}
	d := &Datapath{options: opts, pins: PinsAt(opts.BPFFS)}
	rand.Read(d.seal[:])
	d.seal[0] = d.seal[0]&^1 | 2 // a locally administered address of one station
	if err := d.pins.make(); err != nil {
		return nil, err
	}
	err := d.load(opts)
	if err == nil {
		// What an earlier run's programs have cached is decided again.
		err = d.Invalidate()
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Datapath) load(opts Options) error {
	specs, err := loadSweep()
	if err != nil {
		return fmt.Errorf("read sweep programs: %w", err)
	}
	sweeper, err := d.collection(specs, opts)
	if err != nil {
		return err
	}
	defer sweeper.Close()
	d.sweep = sweeper.DetachProgram("sweep_conntrack")
	if err := sweeper.Assign(&d.Maps); err != nil {
		return fmt.Errorf("take the shared maps: %w", err)
	}
	d.bury = sweeper.DetachProgram("bury_due")
	d.clock = sweeper.DetachProgram("read_clock")
	d.JiffiesPerSecond, err = jiffiesPerSecond(d.clock)
	if err != nil {
		return err
	}

	specs, err = loadEndpoint()
	if err != nil {
		return fmt.Errorf("read endpoint programs: %w", err)
	}
	if err := d.attachHook(opts); err != nil {
		return err
	}
	if err := d.configure(specs, opts); err != nil {
		return err
	}
	if d.limitMAC, err = limitMAC(specs); err != nil {
		return err
	}
	endpoint, err := d.collection(specs, opts)
	if err != nil {
		return err
	}
	defer endpoint.Close()
	d.FromContainer = endpoint.DetachProgram("from_container")
	d.ToContainer = endpoint.DetachProgram("to_container")
	d.FromLimit = endpoint.DetachProgram("from_limit")
	if err := d.loadWire(opts); err != nil {
		return err
	}
	for name, prog := range map[string]*ebpf.Program{"from_container": d.FromContainer, "to_container": d.ToContainer} {
		if err := d.pinProgram(prog, name); err != nil {
			return err
		}
	}
	return nil
}

// configure sets the programs' constants, as far as they have them.
func (d *Datapath) configure(spec *ebpf.CollectionSpec, opts Options) error {
	cache := uint8(1)
	if opts.NoCache {
		cache = 0
	}
	enforced := uint8(0)
	if opts.Policy {
		enforced = 1
	}
	dsr := uint8(0)
	if opts.DSR {
		dsr = 1
	}
	unnamedACKs, unnamedRSTs := uint8(0), uint8(0)
	if d.Hook.UnnamedACKs() {
		unnamedACKs = 1
	}
	if unnamedResets() {
		unnamedRSTs = 1
	}
	snat := opts.SNATPorts
	if snat.First == 0 {
		snat = defaultSNATPorts
	}
	for name, value := range map[string]any{
		"policy_enforced":    enforced,
		"dsr_mode":           dsr,
		"jiffies_per_second": d.JiffiesPerSecond,
		"hook_mode":          d.Hook.mode(),
		"unnamed_acks":       unnamedACKs,
		"unnamed_resets":     unnamedRSTs,
		"ct_direct_limit":    uint64(d.CT.MaxEntries() / 2),
		"cache_decisions":    cache,
		"snat_port_first":    snat.First,
		"snat_ports":         snat.count(),
		"wire_seal":          d.seal,
	} {
		v := spec.Variables[name]
		if v == nil {
			continue
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func sizeMaps(spec *ebpf.CollectionSpec, opts Options) {
	if m := spec.Maps["mooring_ct"]; m != nil {
		m.MaxEntries = max(opts.MaxEntries, 1024)
	}
	if m := spec.Maps["mooring_ct_embryonic"]; m != nil {
		m.MaxEntries = max(opts.MaxEntries/4, 1024)
	}
}

func (d *Datapath) collection(spec *ebpf.CollectionSpec, opts Options) (*ebpf.Collection, error) {
	sizeMaps(spec, opts)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Maps: ebpf.MapOptions{PinPath: d.pins.maps()},
	})
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) {
		lines := refused.Log
		if len(lines) > 8 {
			lines = lines[len(lines)-8:]
		}
		return nil, fmt.Errorf("the kernel's verifier refuses the datapath (6.1 or newer is needed): %w\n%s", err, strings.Join(lines, "\n"))
	}
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, fmt.Errorf("a map pinned below %s has another size or layout (`mooring cleanup` removes it, cutting connections): %w", d.pins.root, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load the datapath: %w", err)
	}
	return c, nil
}

// pinProgram replaces the program's pin in one step: an ADD at this moment
// opens the old program or the new one, never neither.
func (d *Datapath) pinProgram(prog *ebpf.Program, name string) error {
	path := d.pins.program(name)
	if err := os.Remove(path + "~"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old pin: %w", err)
	}
	if err := prog.Pin(path + "~"); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := os.Rename(path+"~", path); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	return nil
}

// Close gives up the daemon's handles. What is pinned goes on.
func (d *Datapath) Close() error {
	for _, m := range []*ebpf.Map{
		d.CT, d.Embryonic, d.Live, d.Sockets, d.Ended, d.TimeWait, d.Late, d.Crowds, d.CTStats,
		d.Endpoints, d.Services, d.Slots, d.Backends, d.Affinity, d.Frags, d.Counters, d.Events, d.Shared,
		d.Policies, d.Identities, d.Verdicts, d.Profiles, d.PolicyDrops, d.Tunnels,
		d.SourceRanges, d.Uplinks, d.NodeAddresses, d.Doors, d.Nodes,
	} {
		m.Close()
	}
	for _, p := range []*ebpf.Program{d.FromContainer, d.ToContainer, d.FromLimit, d.FromWire, d.ToWire, d.sweep, d.bury, d.clock} {
		p.Close()
	}
	d.roll.close()
	return nil
}

// RunSweep makes one pass over the conntrack map in the kernel. s says what to
// delete (timeouts in jiffies) and returns what was found.
func (d *Datapath) RunSweep(s *Sweep) error {
	if err := runSyscall(d.sweep, s); err != nil {
		return fmt.Errorf("sweep the conntrack map: %w", err)
	}
	return nil
}

// Bury deletes the entries of ended sockets whose grace is over and returns how
// many they were, and whether others wait. One caller at a time.
func (d *Datapath) Bury() (total int, waiting bool, err error) {
	frame := make([]byte, 64) // nobody reads it
	for {
		result, err := d.bury.Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			return total, false, fmt.Errorf("delete entries of ended sockets: %w", err)
		}
		deleted := result &^ buryAgain
		total += int(deleted)
		if deleted < burials {
			return total, result&buryAgain != 0, nil
		}
	}
}

const (
	// burials is when one run has surely not seen all: sweep.c's BURIALS, of which
	// each may have deleted a flow's two entries.
	burials = 4096
	// buryAgain is sweep.c's BURY_AGAIN.
	buryAgain = 1 << 30
	// generationBits is lib/abi.h's GENERATION_BITS.
	generationBits = 24
)

// Invalidate voids every decision that sockets have cached: their next packets
// are decided by the tables again. It follows every change that makes a decision
// wrong: a backend or an endpoint that is gone, other policies. Where the table has lost
// a flow meanwhile, its socket may still make the entry again.
func (d *Datapath) Invalidate() error {
	return d.changeShared(func(s *Shared) { s.Generation = next(s.Generation, false) })
}

// Forget is Invalidate for a flush, after which no socket makes its entry again.
func (d *Datapath) Forget() error {
	return d.changeShared(func(s *Shared) { s.Generation = next(s.Generation, true) })
}

// next is the generation after g, which is never 0; the bits above GENERATION_BITS count
// how often everything was to be forgotten.
func next(g uint32, forget bool) uint32 {
	const low = 1<<generationBits - 1
	epoch := g &^ low
	if forget {
		epoch += low + 1
	}
	if g = (g + 1) & low; g == 0 {
		g = 1
	}
	return epoch | g
}

// SetMonitors tells the programs how many watch events: none are written for nobody.
func (d *Datapath) SetMonitors(n int) error {
	return d.changeShared(func(s *Shared) { s.Monitors = uint32(n) })
}

func (d *Datapath) changeShared(change func(*Shared)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var zero uint32
	var s Shared
	if err := d.Shared.Lookup(&zero, &s); err != nil {
		return fmt.Errorf("read mooring_shared: %w", err)
	}
	change(&s)
	if err := d.Shared.Put(&zero, &s); err != nil {
		return fmt.Errorf("write mooring_shared: %w", err)
	}
	return nil
}

// Jiffies reads the clock that entries are stamped with.
func (d *Datapath) Jiffies() (uint64, error) {
	var c abiClock
	if err := runSyscall(d.clock, &c); err != nil {
		return 0, fmt.Errorf("read the kernel's clocks: %w", err)
	}
	return c.Jiffies, nil
}
