// SPDX-License-Identifier: Apache-2.0

// Package ipam hands out the addresses of a node's pods: one per family from
// the node's ranges. What it has given survives kill -9 and power loss, and many
// processes may ask at once; it needs no daemon.
//
// ranges.go says which address is next and is pure, journal.go is the file's
// format and is pure too, store.go keeps the file, and delegate.go is what CNI
// plugins call, whether the addresses come from here or from another IPAM plugin.
package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/mooring-cni/mooring/conf"
)

// Key is an attachment: the interface of a container in a network.
type Key struct {
	Network     string
	ContainerID string
	Ifname      string
}

func (k Key) String() string {
	return fmt.Sprintf("container %s (network %s, interface %s)", k.ContainerID, k.Network, k.Ifname)
}

// text is the key as the journal has it, without two keys that share one.
func (k Key) text() string { return k.Network + " " + k.ContainerID + " " + k.Ifname }

func (k Key) check() error {
	if len(k.Network)+len(k.ContainerID)+len(k.Ifname) > maxKey {
		return fmt.Errorf("network name, container ID and interface name have more than %d bytes together", maxKey)
	}
	for _, s := range [...]string{k.Network, k.ContainerID, k.Ifname} {
		if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return fmt.Errorf("%q can be no network name, container ID or interface name", s)
		}
	}
	return nil
}

func (k Key) compare(other Key) int {
	return cmp.Or(cmp.Compare(k.Network, other.Network), cmp.Compare(k.ContainerID, other.ContainerID), cmp.Compare(k.Ifname, other.Ifname))
}

// Allocation is what an attachment has.
type Allocation struct {
	Key
	Addrs []netip.Addr
	// Outside says that some of Addrs are in none of the pools: the node's ranges
	// have changed since. They stay with the attachment until it releases them.
	Outside bool
}

// ExhaustedError says that a pool has no address left.
type ExhaustedError struct {
	Pool        netip.Prefix
	Used, Total uint64
}

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("pool %s is exhausted: %d of %d addresses are in use; remove pods from this node, collect attachments that are gone (CNI GC), or give the node a larger range in podCIDRs", e.Pool, e.Used, e.Total)
}

// InUseError says that the address asked for is somebody else's.
type InUseError struct {
	Addr   netip.Addr
	Holder Key
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("address %s is in use by %s; ask for another one or remove that container", e.Addr, e.Holder)
}

// RequestError says that nobody can have the addresses asked for, or not so.
type RequestError struct{ Msg string }

func (e *RequestError) Error() string { return e.Msg }

// NotFoundError says that an attachment has no addresses.
type NotFoundError struct{ Key Key }

func (e *NotFoundError) Error() string { return e.Key.String() + " has no addresses" }

// DamagedError says that the file of allocations does not read back. Nothing is
// given or released until somebody has repaired it.
type DamagedError struct {
	File string
	Err  error
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("%s is damaged, so it is not known which addresses are in use: %v; restore the file, or stop all pods of this node and then remove it", e.File, e.Err)
}

func (e *DamagedError) Unwrap() error { return e.Err }

// minJournal is the least size of the file: room for about 400 records between
// two times that it is written anew, and little to read.
const minJournal = 64 << 10

// Pool is the addresses of one node.
type Pool struct {
	dir     string
	pools   []netip.Prefix
	minSize int
}

// Open takes the allocations below dir, the node's stateDir, and the ranges from
// which to give more. Without ranges it can release and list. It makes nothing:
// the first Allocate does.
func Open(dir string, pools []netip.Prefix) (*Pool, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("open the allocations: the state directory %q is no absolute path", dir)
	}
	if err := conf.CheckPodCIDRs(pools); err != nil {
		return nil, fmt.Errorf("open the allocations in %s: pool %w", dir, err)
	}
	return &Pool{dir: filepath.Join(dir, "ipam"), pools: pools, minSize: minJournal}, nil
}

// Allocate gives key one address of each pool, or the requested one of its
// family, with the length of the pool's prefix. A key that has addresses gets
// the same ones: runtimes repeat themselves.
func (p *Pool) Allocate(ctx context.Context, key Key, requested []netip.Addr) ([]netip.Prefix, error) {
	if err := key.check(); err != nil {
		return nil, fmt.Errorf("allocate an address: %w", &RequestError{err.Error()})
	}
	if len(p.pools) == 0 {
		return nil, fmt.Errorf("allocate an address for %s: %w", key, &RequestError{"the node has no pod ranges (podCIDRs)"})
	}
	if err := p.make(); err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	err := p.locked(ctx, syscall.LOCK_EX, func() error {
		f, held, err := p.read(key)
		if err != nil {
			return err
		}
		defer f.close()
		if held != nil {
			if slices.ContainsFunc(requested, func(a netip.Addr) bool { return !slices.Contains(held, a) }) {
				return &RequestError{fmt.Sprintf("%v asked for, but it has %v already: release them first (DEL)", requested, held)}
			}
			addrs = held
			return nil
		}
		if addrs, err = p.choose(f.journal, requested); err != nil {
			return err
		}
		return f.write(record{op: opGive, key: key, addrs: addrs})
	})
	if err != nil {
		return nil, fmt.Errorf("allocate an address for %s: %w", key, err)
	}
	return p.prefixes(addrs), nil
}

// choose is pure: it says which addresses the next attachment gets.
func (p *Pool) choose(j *journal, requested []netip.Addr) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for i, want := range requested {
		pool := slices.IndexFunc(p.pools, func(pool netip.Prefix) bool { return pool.Contains(want) })
		switch {
		case pool < 0:
			return nil, &RequestError{fmt.Sprintf("address %s is in none of this node's ranges %v", want, p.pools)}
		case !usable(p.pools[pool], want):
			return nil, &RequestError{fmt.Sprintf("address %s is reserved in %s: pods get %s to %s", want, p.pools[pool], first(p.pools[pool]), last(p.pools[pool]))}
		case slices.ContainsFunc(requested[:i], func(other netip.Addr) bool { return p.pools[pool].Contains(other) }):
			return nil, &RequestError{fmt.Sprintf("%v asked for: a pod gets one address of a family", requested)}
		case j.used[family(want)].has(want):
			holder, err := j.holder(want)
			if err != nil {
				return nil, err
			}
			return nil, &InUseError{want, holder}
		}
	}
	for _, pool := range p.pools {
		if i := slices.IndexFunc(requested, pool.Contains); i >= 0 {
			addrs = append(addrs, requested[i])
			continue
		}
		f := family(pool.Addr())
		addr, found := next(pool, j.last[f], &j.used[f], &j.resting[f])
		if !found {
			return nil, &ExhaustedError{pool, j.usedOf(pool), total(pool)}
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

func (j *journal) holder(addr netip.Addr) (Key, error) {
	held, err := j.attachments()
	for key, addrs := range held {
		if slices.Contains(addrs, addr) {
			return key, nil
		}
	}
	return Key{}, err
}

func (s *state) usedOf(pool netip.Prefix) uint64 {
	n := uint64(0)
	for addr := range s.used[family(pool.Addr())].each {
		if usable(pool, addr) {
			n++
		}
	}
	return n
}

func (p *Pool) prefixes(addrs []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, addr := range addrs {
		out[i] = netip.PrefixFrom(addr, addr.BitLen())
		for _, pool := range p.pools {
			if pool.Contains(addr) {
				out[i] = netip.PrefixFrom(addr, pool.Bits())
			}
		}
	}
	return out
}

// Release takes the addresses of key back. That there are none is fine.
func (p *Pool) Release(ctx context.Context, key Key) error {
	err := p.locked(ctx, syscall.LOCK_EX, func() error {
		f, held, err := p.read(key)
		if err != nil {
			return err
		}
		defer f.close()
		if held == nil {
			return nil
		}
		return f.write(record{op: opTake, key: key, addrs: held})
	})
	if err != nil && !errors.Is(err, errNone) {
		return fmt.Errorf("release the addresses of %s: %w", key, err)
	}
	return nil
}

// Check answers what key has, or a NotFoundError.
func (p *Pool) Check(ctx context.Context, key Key) ([]netip.Prefix, error) {
	var addrs []netip.Addr
	err := p.locked(ctx, syscall.LOCK_SH, func() error {
		f, held, err := p.read(key)
		if err != nil {
			return err
		}
		defer f.close()
		addrs = held
		return nil
	})
	if err != nil && !errors.Is(err, errNone) {
		return nil, fmt.Errorf("look up the addresses of %s: %w", key, err)
	}
	if addrs == nil {
		return nil, &NotFoundError{key}
	}
	return p.prefixes(addrs), nil
}

// List answers all that is in use, in the order of the addresses.
func (p *Pool) List(ctx context.Context) ([]Allocation, error) {
	var list []Allocation
	err := p.locked(ctx, syscall.LOCK_SH, func() error {
		f, _, err := p.read(Key{})
		if err != nil {
			return err
		}
		defer f.close()
		held, err := f.attachments()
		if err != nil {
			return &DamagedError{p.path(), err}
		}
		for key, addrs := range held {
			outside := slices.ContainsFunc(addrs, func(addr netip.Addr) bool {
				return !slices.ContainsFunc(p.pools, func(pool netip.Prefix) bool { return usable(pool, addr) })
			})
			list = append(list, Allocation{Key: key, Addrs: addrs, Outside: outside})
		}
		return nil
	})
	if err != nil && !errors.Is(err, errNone) {
		return nil, fmt.Errorf("list the allocations: %w", err)
	}
	slices.SortFunc(list, func(a, b Allocation) int { return a.Addrs[0].Compare(b.Addrs[0]) })
	return list, nil
}

// GC releases what the attachments of network hold that are not valid, and
// answers which those were. Other networks' attachments are not touched.
func (p *Pool) GC(ctx context.Context, network string, valid map[Key]bool) ([]Key, error) {
	var gone []Key
	err := p.locked(ctx, syscall.LOCK_EX, func() error {
		f, _, err := p.read(Key{})
		if err != nil {
			return err
		}
		defer f.close()
		held, err := f.attachments()
		if err != nil {
			return &DamagedError{p.path(), err}
		}
		for key := range held {
			if key.Network == network && !valid[key] {
				gone = append(gone, key)
			}
		}
		slices.SortFunc(gone, Key.compare)
		records := make([]record, len(gone))
		for i, key := range gone {
			records[i] = record{op: opTake, key: key, addrs: held[key]}
		}
		return f.write(records...)
	})
	if err != nil && !errors.Is(err, errNone) {
		return nil, fmt.Errorf("release what network %s has no more: %w", network, err)
	}
	return gone, nil
}

var errNone = errors.New("nothing was ever allocated here")

func (p *Pool) path() string { return filepath.Join(p.dir, "allocations") }

// make makes the directory and sees to it that it is still there after a power
// loss, as the addresses in it are.
func (p *Pool) make() error {
	if _, err := os.Stat(p.dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of the allocations: %w", err)
	}
	state := filepath.Dir(p.dir)
	if err := syncDir(state); err != nil {
		return err
	}
	return syncDir(filepath.Dir(state))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync the directory: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync the directory: %w", err)
	}
	return nil
}

// locked calls fn while this process has the lock. The lock is a file of its
// own, for the journal is replaced now and then, and the kernel gives it back
// however its holder ends. Where there is no directory, nothing was ever given:
// that is errNone, and fn is not called.
func (p *Pool) locked(ctx context.Context, how int, fn func() error) error {
	lock, err := os.OpenFile(filepath.Join(p.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return errNone
	}
	if err != nil {
		return fmt.Errorf("lock the allocations: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), how|syscall.LOCK_NB); err == nil {
		defer lock.Close()
		return fn()
	} else if !errors.Is(err, syscall.EWOULDBLOCK) {
		lock.Close()
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	// flock cannot be interrupted: who does not wait any longer leaves a waiter
	// behind, which gives the lock back as soon as it has it.
	got := make(chan error, 1)
	go func() {
		for {
			err := syscall.Flock(int(lock.Fd()), how)
			if !errors.Is(err, syscall.EINTR) {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		defer lock.Close()
		if err != nil {
			return fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
		return fn()
	case <-ctx.Done():
		go func() {
			<-got
			lock.Close()
		}()
		return fmt.Errorf("wait for the lock %s: %w", lock.Name(), ctx.Err())
	}
}

// file is the journal of a Pool, read under the lock.
type file struct {
	*journal
	pool *Pool
	file *os.File // nil while there is none
}

func (f *file) close() {
	if f.file != nil {
		f.file.Close()
	}
}

// read reads the journal, and what key has.
func (p *Pool) read(key Key) (*file, []netip.Addr, error) {
	f, err := os.OpenFile(p.path(), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return &file{pool: p, journal: new(journal)}, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the allocations: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("read the allocations: %w", err)
	}
	data := make([]byte, info.Size())
	if n, err := f.ReadAt(data, 0); n < len(data) {
		f.Close()
		return nil, nil, fmt.Errorf("read the allocations: %w", err)
	}
	j, held, err := parseJournal(data, key)
	if err != nil {
		f.Close()
		return nil, nil, &DamagedError{p.path(), err}
	}
	return &file{pool: p, journal: j, file: f}, held, nil
}

// write makes records durable, all or none. One record is a small write into
// room that the file has; several, or a full file, or one with something
// incomplete at its end, are a new file in place of the old one.
func (f *file) write(records ...record) error {
	if len(records) == 0 {
		return nil
	}
	if len(records) == 1 && f.file != nil && !f.torn {
		text := appendRecord(nil, f.records, records[0])
		if at := place(f.end, len(text)); at+len(text) <= f.size {
			return f.append(text, at)
		}
	}
	held, err := f.attachments()
	if err != nil {
		return &DamagedError{f.pool.path(), err}
	}
	for _, r := range records {
		for _, addr := range r.addrs {
			if err := f.apply(r.op, addr); err != nil {
				return err
			}
		}
		if delete(held, r.key); r.op == opGive {
			held[r.key] = r.addrs
		}
	}
	return f.replace(held)
}

func (f *file) append(text []byte, at int) error {
	if _, err := f.file.WriteAt(text, int64(at)); err != nil {
		return fmt.Errorf("write the allocations: %w", err)
	}
	if err := syscall.Fdatasync(int(f.file.Fd())); err != nil {
		return fmt.Errorf("write the allocations: sync %s: %w", f.file.Name(), err)
	}
	return nil
}

func (f *file) replace(held map[Key][]netip.Addr) error {
	temp := f.pool.path() + ".new"
	out, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write the allocations: %w", err)
	}
	defer out.Close()
	if _, err := out.Write(f.writeJournal(held, f.pool.minSize)); err != nil {
		return fmt.Errorf("write the allocations: %w", err)
	}
	if err := out.Sync(); err != nil {
		return fmt.Errorf("write the allocations: %w", err)
	}
	if err := os.Rename(temp, f.pool.path()); err != nil {
		return fmt.Errorf("write the allocations: %w", err)
	}
	return syncDir(f.pool.dir)
}
