// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// Frame is a packet that a program is given again and again. BPF_PROG_TEST_RUN
// gives the same buffer to each repetition, translated by the one before; so the
// program is called by another one, which first writes the headers anew and then
// tail calls it. That costs a few ns, the same for an empty program: a figure is
// taken as (restore and call the program) - (restore and call an empty one) +
// (an empty one alone).
type Frame struct {
	Data []byte
	// Flows makes the packets those of as many flows, a power of two, in scattered
	// order and each once before one comes again. Up to 16384 differ in the port at
	// PortAt, more also in the two bytes at AddressAt.
	Flows             uint32
	PortAt, AddressAt int
	// Known is what the packet's socket has by heart, as a value of Sockets; nil: it has
	// no socket that is anybody's.
	Known   []byte
	Sockets *ebpf.Map
}

// restored is how much of a frame is written anew: Ethernet, IPv6 and TCP
// without options, which is more than any program changes.
const restored = 14 + 40 + 20

// noted is the size of struct wire_meta.
const noted = 20

const (
	portMask  = 1<<14 - 1
	portFirst = 0x40 // of the port's second byte, so that no port is 0
)

// Runner measures programs in a namespace, by Context (struct __sk_buff up to
// ifindex, or struct xdp_md).
type Runner struct {
	T       netns.T
	NS      *netns.NS
	Context any
	// Repeat is how many packets one measurement takes; zero means 50,000.
	Repeat int

	empty map[ebpf.ProgramType]*ebpf.Program
}

// Nanoseconds measures once: what one packet costs, the floor of an empty
// program included.
func (r *Runner) Nanoseconds(p *ebpf.Program, f Frame) float64 {
	return r.run(r.caller(p, f), f) - r.run(r.caller(r.Empty(p.Type()), f), f) + r.run(r.Empty(p.Type()), f)
}

// Empty is a program of a type that does nothing.
func (r *Runner) Empty(typ ebpf.ProgramType) *ebpf.Program {
	if p := r.empty[typ]; p != nil {
		return p
	}
	verdict := int32(0) // TC_ACT_OK
	if typ == ebpf.XDP {
		verdict = 2 // XDP_PASS
	}
	p := r.load(&ebpf.ProgramSpec{Name: "empty", Type: typ, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
	if r.empty == nil {
		r.empty = make(map[ebpf.ProgramType]*ebpf.Program)
	}
	r.empty[typ] = p
	return p
}

func (r *Runner) load(spec *ebpf.ProgramSpec) *ebpf.Program {
	if spec.Type == ebpf.XDP {
		spec.AttachType = ebpf.AttachXDP // tail calls are among programs of one
	}
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		r.T.Fatalf("load %s: %v", spec.Name, err)
	}
	r.T.Cleanup(func() { p.Close() })
	return p
}

func (r *Runner) arrayOf(typ ebpf.MapType) *ebpf.Map {
	size := uint32(4)
	if typ == ebpf.Array {
		size = 8
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: typ, KeySize: 4, ValueSize: size, MaxEntries: 1})
	if err != nil {
		r.T.Fatalf("make a map: %v", err)
	}
	r.T.Cleanup(func() { m.Close() })
	return m
}

// caller restores the frame and calls p.
func (r *Runner) caller(p *ebpf.Program, f Frame) *ebpf.Program {
	type key struct {
		p *ebpf.Program
		f *byte
	}
	k := key{p, &f.Data[0]}
	if c, ok := callers[k]; ok {
		return c
	}
	length := min(len(f.Data), restored) &^ 7
	data, end := int16(76), int16(80) // struct __sk_buff
	if p.Type() == ebpf.XDP {
		data, end = 0, 4 // struct xdp_md
	}
	target := r.arrayOf(ebpf.ProgramArray)
	if err := target.Put(uint32(0), p); err != nil {
		r.T.Fatalf("make %s callable: %v", p, err)
	}
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	if f.Known != nil {
		code = append(code, r.teach(f)...)
	}
	if p.Type() == ebpf.XDP {
		// What the run before put in front of the frame goes too.
		code = append(code, asm.Mov.Imm(asm.R2, noted), asm.FnXdpAdjustMeta.Call(), asm.Mov.Reg(asm.R1, asm.R6))
	}
	code = append(code,
		asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, end, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, int32(len(f.Data))),
		asm.JGT.Reg(asm.R4, asm.R3, "lost"),
	)
	for at := 0; at < length; at += 8 {
		word := binary.LittleEndian.Uint64(f.Data[at:])
		code = append(code, asm.LoadImm(asm.R5, int64(word), asm.DWord), asm.StoreMem(asm.R2, int16(at), asm.R5, asm.DWord))
	}
	if f.Flows > 1 {
		counter := r.arrayOf(ebpf.Array)
		code = append(code,
			asm.LoadMapValue(asm.R7, counter.FD(), 0),
			asm.LoadMem(asm.R8, asm.R7, 0, asm.DWord),
			asm.Mov.Reg(asm.R9, asm.R8),
			asm.Add.Imm(asm.R8, 1),
			asm.StoreMem(asm.R7, 0, asm.R8, asm.DWord),
			// An odd factor makes a permutation of all numbers below a power of two.
			asm.Mul.Imm(asm.R9, 0x1e3779b1),
			asm.And.Imm(asm.R9, int32(f.Flows-1)),
			asm.Mov.Reg(asm.R8, asm.R9),
			asm.And.Imm(asm.R8, portMask),
			asm.Or.Imm(asm.R8, portFirst<<8),
			asm.StoreMem(asm.R2, int16(f.PortAt), asm.R8, asm.Half),
		)
		if f.Flows > portMask+1 {
			code = append(code, asm.RSh.Imm(asm.R9, 14), asm.StoreMem(asm.R2, int16(f.AddressAt), asm.R9, asm.Half))
		}
	}
	code = append(code,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, target.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, lost).WithSymbol("lost"),
		asm.Return(),
	)
	c := r.load(&ebpf.ProgramSpec{Name: "restore", Type: p.Type(), License: "Dual BSD/GPL", Instructions: code})
	callers[k] = c
	r.T.Cleanup(func() { delete(callers, k) })
	return c
}

// teach has the socket that BPF_PROG_TEST_RUN makes for its packets know what a real
// one does, from the first of them on.
func (r *Runner) teach(f Frame) asm.Instructions {
	known, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(f.Known)), MaxEntries: 1})
	if err == nil {
		r.T.Cleanup(func() { known.Close() })
		err = known.Put(uint32(0), f.Known)
	}
	if err != nil {
		r.T.Fatalf("keep what a socket knows: %v", err)
	}
	return asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 168, asm.DWord), // struct __sk_buff: sk
		asm.JEq.Imm(asm.R7, 0, "lost"),
		asm.LoadMapPtr(asm.R1, f.Sockets.FD()),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.LoadMapValue(asm.R3, known.FD(), 0),
		asm.Mov.Imm(asm.R4, 1), // BPF_SK_STORAGE_GET_F_CREATE
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "lost"),
		asm.Mov.Reg(asm.R1, asm.R6),
	}
}

// callers are those made, by program and frame: rounds use them again.
var callers = map[any]*ebpf.Program{}

// lost is a verdict that no program gives: the tail call did not happen.
const lost = 99

// Verdict runs one packet and says what became of it.
func (r *Runner) Verdict(p *ebpf.Program, f Frame) int {
	verdict, _ := r.repeat(r.caller(p, f), f.Data, 1)
	return int(int32(verdict))
}

func (r *Runner) run(p *ebpf.Program, f Frame) float64 {
	repeat := r.Repeat
	if repeat == 0 {
		repeat = 50_000
	}
	verdict, took := r.repeat(p, f.Data, repeat)
	if verdict == lost {
		r.T.Fatalf("run %s: the packet was lost on the way to the program", p)
	}
	return float64(took.Nanoseconds()) / float64(repeat)
}

func (r *Runner) repeat(p *ebpf.Program, data []byte, repeat int) (verdict uint32, took time.Duration) {
	// Room for programs that make the packet longer.
	out := make([]byte, len(data)+256)
	err := r.NS.Do(func() error {
		return pinned(func() (err error) {
			if p.Type() == ebpf.XDP {
				verdict, took, err = testRun(p, data, out, r.Context, repeat)
				return err
			}
			options := &ebpf.RunOptions{Data: data, DataOut: out, Context: r.Context, Repeat: uint32(repeat)}
			began := time.Now()
			verdict, err = p.Run(options)
			took = time.Since(began)
			return err
		})
	})
	if err != nil {
		r.T.Fatalf("run %s: %v", p, err)
	}
	return verdict, took
}

// testRun is BPF_PROG_TEST_RUN by the kernel's own clock, in whole ns a packet:
// before it runs an XDP program it patches its own code, which takes milliseconds.
func testRun(p *ebpf.Program, data, out []byte, context any, repeat int) (verdict uint32, took time.Duration, err error) {
	ctx, err := binary.Append(nil, binary.NativeEndian, context)
	if err != nil {
		return 0, 0, err
	}
	attr := struct { // union bpf_attr: test
		program, verdict, sizeIn, sizeOut uint32
		in, out                           unsafe.Pointer
		repeat, nanoseconds               uint32
		contextIn, contextOut             uint32
		ctxIn, ctxOut                     unsafe.Pointer
		flags, cpu, batch, _              uint32
	}{
		program: uint32(p.FD()), sizeIn: uint32(len(data)), sizeOut: uint32(len(out)),
		in: unsafe.Pointer(&data[0]), out: unsafe.Pointer(&out[0]),
		repeat: uint32(repeat), contextIn: uint32(len(ctx)), ctxIn: unsafe.Pointer(&ctx[0]),
	}
	for {
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		runtime.KeepAlive(&attr)
		if errno == unix.EINTR {
			continue // by the Go runtime's signals
		}
		if errno != 0 {
			return 0, 0, errno
		}
		return attr.verdict, time.Duration(attr.nanoseconds) * time.Duration(repeat), nil
	}
}

// pinned calls f on one CPU, before everything that is not real time.
func pinned(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	if err := pin(); err != nil {
		return err
	}
	defer func() {
		unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
		unix.SchedSetaffinity(0, &before)
	}()
	return f()
}

// pin binds this thread to the last CPU that it may use.
func pin() error {
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return err
	}
	for cpu := 1023; cpu >= 0; cpu-- {
		if allowed.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 10}, 0)
}
