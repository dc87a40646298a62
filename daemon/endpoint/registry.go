// SPDX-License-Identifier: Apache-2.0

// Package endpoint knows the pods' interfaces on this node: it gives them
// their ids, remembers them across restarts of the daemon, tells the datapath
// of them, and lets go of those whose interface is gone.
package endpoint

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

// MaxID is the highest id: conntrack entries hold it in 16 bits, 0 is none.
const MaxID = 65535

// Datapath is the kernel's side of an endpoint. Both calls may be repeated.
type Datapath interface {
	AddEndpoint(model.Endpoint) error
	RemoveEndpoint(model.Endpoint) error
}

// Links tells which interfaces this network namespace has.
type Links interface {
	// Exists tells whether an interface has both this name and this index.
	// Either alone can be a later one's.
	Exists(name string, index int) (bool, error)
}

// Registry is the set of endpoints. Its methods may be called concurrently.
type Registry struct {
	store    store
	datapath Datapath
	links    Links
	log      *slog.Logger
	changed  func()

	mutex  sync.Mutex // held over the datapath's calls: they come in order
	byKey  map[key]model.Endpoint
	byAddr map[netip.Addr]key
	byID   map[uint32]key
	last   uint32 // id given most recently: ids are reused last
}

// key is an attachment as CNI names it.
type key struct{ containerID, ifname string }

func (k key) String() string { return k.containerID + "/" + k.ifname }

func keyOf(e model.Endpoint) key { return key{e.ContainerID, e.PodIfname} }

// Open restores the endpoints that an earlier run left in stateDir: those whose
// interface is there are adopted, the others' entries are released. changed is
// called after each later change of the set, without a lock held.
func Open(stateDir string, datapath Datapath, links Links, log *slog.Logger, changed func()) (*Registry, error) {
	r := &Registry{
		store: store{dir: filepath.Join(stateDir, "endpoints")}, datapath: datapath, links: links, log: log, changed: changed,
		byKey: map[key]model.Endpoint{}, byAddr: map[netip.Addr]key{}, byID: map[uint32]key{},
	}
	stored, unsound, err := r.store.read()
	if err != nil {
		return nil, fmt.Errorf("read endpoints of %s: %w", r.store.dir, err)
	}
	for _, err := range unsound {
		log.Warn("restore endpoints", "error", err)
	}
	slices.SortFunc(stored, compareID)
	adopted, dropped := 0, 0
	for _, e := range stored {
		alive, err := links.Exists(e.Interface, e.Ifindex)
		if err != nil {
			return nil, fmt.Errorf("look for interface %s of endpoint %d: %w", e.Interface, e.ID, err)
		}
		_, twice := r.byKey[keyOf(e)]
		if !alive || twice || r.claimed(e) {
			r.release(e)
			dropped++
			continue
		}
		r.insert(e)
		if err := datapath.AddEndpoint(e); err != nil {
			return nil, fmt.Errorf("adopt endpoint %d (%s): %w", e.ID, describe(e), err)
		}
		adopted++
	}
	if len(stored) > 0 {
		log.Info("restored endpoints", "adopted", adopted, "dropped", dropped)
	}
	return r, nil
}

// claimed tells whether another endpoint already has one of e's addresses.
func (r *Registry) claimed(e model.Endpoint) bool {
	return slices.ContainsFunc(e.IPs, func(ip netip.Addr) bool { _, taken := r.byAddr[ip]; return taken })
}

// Add makes an endpoint known. The same again answers the same endpoint; one
// whose interface was made anew replaces the old one under its id. An address
// of another endpoint is refused while that one's interface exists.
func (r *Registry) Add(e model.Endpoint) (model.Endpoint, error) {
	e.IPs = slices.Clone(e.IPs)
	for i := range e.IPs {
		e.IPs[i] = e.IPs[i].Unmap()
	}
	if err := validate(e); err != nil {
		return e, api.Errorf(http.StatusBadRequest, "endpoint %s: %v", keyOf(e), err)
	}
	e, changed, err := r.add(e)
	if changed {
		r.changed()
	}
	return e, err
}

func (r *Registry) add(e model.Endpoint) (_ model.Endpoint, changed bool, err error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if alive, err := r.links.Exists(e.Interface, e.Ifindex); err != nil {
		return e, false, fmt.Errorf("look for interface %s: %w", e.Interface, err)
	} else if !alive {
		return e, false, api.Errorf(http.StatusConflict, "endpoint %s: interface %s with index %d is not in mooringd's network namespace", keyOf(e), e.Interface, e.Ifindex)
	}
	for _, ip := range e.IPs {
		owner, taken := r.byAddr[ip]
		if !taken || owner == keyOf(e) {
			continue
		}
		other := r.byKey[owner]
		alive, err := r.links.Exists(other.Interface, other.Ifindex)
		if err != nil {
			return e, changed, fmt.Errorf("look for interface %s: %w", other.Interface, err)
		}
		if alive {
			return e, changed, api.Errorf(http.StatusConflict, "endpoint %s: address %s belongs to endpoint %d (%s), whose interface %s is there: delete that attachment, or mend the IPAM that gave the address twice",
				keyOf(e), ip, other.ID, describe(other), other.Interface)
		}
		r.drop(other, "its address is given to another endpoint")
		changed = true
	}
	if old, known := r.byKey[keyOf(e)]; known {
		e.ID = old.ID
		if !same(old, e) {
			r.drop(old, "replaced")
			changed = true
		}
	} else if e.ID, err = r.nextID(); err != nil {
		return e, changed, err
	}
	if old, known := r.byKey[keyOf(e)]; !known || !same(old, e) {
		if err := r.store.write(e); err != nil {
			return e, changed, fmt.Errorf("remember endpoint %s: %w", keyOf(e), err)
		}
		changed = true
	}
	r.insert(e)
	if err := r.datapath.AddEndpoint(e); err != nil {
		r.drop(e, "the datapath refused it")
		return e, true, fmt.Errorf("endpoint %s: %w", keyOf(e), err)
	}
	return e, changed, nil
}

// Delete lets go of an endpoint. That it is not known is no error.
func (r *Registry) Delete(containerID, ifname string) error {
	r.mutex.Lock()
	e, known := r.byKey[key{containerID, ifname}]
	var err error
	if known {
		err = r.drop(e, "deleted")
	}
	r.mutex.Unlock()
	if known {
		r.changed()
	}
	return err
}

// LinkGone lets go of the endpoint whose interface had this index, if the
// interface is really gone.
func (r *Registry) LinkGone(index int) {
	r.sweep(func(e model.Endpoint) bool { return e.Ifindex == index })
}

// Resync lets go of all endpoints whose interface is gone. It is for the time
// when news of links may have been lost.
func (r *Registry) Resync() {
	r.sweep(func(model.Endpoint) bool { return true })
}

func (r *Registry) sweep(concerned func(model.Endpoint) bool) {
	dropped := false
	r.mutex.Lock()
	for _, e := range r.byKey {
		if !concerned(e) {
			continue
		}
		if alive, err := r.links.Exists(e.Interface, e.Ifindex); err != nil {
			r.log.Warn("look for an endpoint's interface", "endpoint", e.ID, "interface", e.Interface, "error", err)
		} else if !alive {
			r.drop(e, "its interface is gone")
			dropped = true
		}
	}
	r.mutex.Unlock()
	if dropped {
		r.changed()
	}
}

// List returns the endpoints by id.
func (r *Registry) List() []model.Endpoint {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	list := make([]model.Endpoint, 0, len(r.byKey))
	for _, e := range r.byKey {
		list = append(list, e)
	}
	slices.SortFunc(list, compareID)
	return list
}

// Get returns the endpoint of this id.
func (r *Registry) Get(id uint32) (e model.Endpoint, known bool) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	k, known := r.byID[id]
	return r.byKey[k], known
}

// Len counts the endpoints.
func (r *Registry) Len() int {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return len(r.byKey)
}

func (r *Registry) insert(e model.Endpoint) {
	r.byKey[keyOf(e)] = e
	for _, ip := range e.IPs {
		r.byAddr[ip] = keyOf(e)
	}
	r.byID[e.ID] = keyOf(e)
	r.last = e.ID
}

// drop forgets an endpoint and releases what is its own. What cannot be
// released is told, but an endpoint that is gone must not stay for it.
func (r *Registry) drop(e model.Endpoint, why string) error {
	delete(r.byKey, keyOf(e))
	for _, ip := range e.IPs {
		if r.byAddr[ip] == keyOf(e) {
			delete(r.byAddr, ip)
		}
	}
	delete(r.byID, e.ID)
	r.log.Debug("endpoint dropped", "endpoint", e.ID, "attachment", keyOf(e).String(), "pod", e.Pod.String(), "why", why)
	return r.release(e)
}

func (r *Registry) release(e model.Endpoint) error {
	err := errors.Join(r.datapath.RemoveEndpoint(e), r.store.remove(e.ID))
	if err != nil {
		err = fmt.Errorf("release endpoint %d (%s): %w", e.ID, describe(e), err)
		r.log.Error("endpoint dropped, but not all that was its own is gone", "error", err)
	}
	return err
}

// nextID returns the free id that was used longest ago, roughly: entries of an
// endpoint just gone are not mistaken for a new one's.
func (r *Registry) nextID() (uint32, error) {
	for i := range uint32(MaxID) {
		id := (r.last+i)%MaxID + 1
		if _, used := r.byID[id]; !used {
			return id, nil
		}
	}
	return 0, api.Errorf(http.StatusServiceUnavailable, "all %d endpoint ids of this node are in use", MaxID)
}

// same tells whether nothing but the id may differ.
func same(a, b model.Endpoint) bool {
	ips := slices.Equal(a.IPs, b.IPs)
	return ips && a.ContainerID == b.ContainerID && a.PodIfname == b.PodIfname && a.Network == b.Network &&
		a.Pod == b.Pod && a.PodUID == b.PodUID && a.Interface == b.Interface && a.Ifindex == b.Ifindex &&
		a.MAC == b.MAC && a.HostMAC == b.HostMAC && a.Netns == b.Netns
}

func compareID(a, b model.Endpoint) int { return cmp.Compare(a.ID, b.ID) }

// describe names an endpoint for people: by pod where there is one.
func describe(e model.Endpoint) string {
	if e.Pod != (model.Name{}) {
		return "pod " + e.Pod.String()
	}
	return "container " + e.ContainerID
}

func validate(e model.Endpoint) error {
	switch {
	case e.ContainerID == "":
		return errors.New("containerID is empty")
	case e.PodIfname == "":
		return errors.New("podIfname is empty")
	case e.ID > MaxID:
		return fmt.Errorf("id %d is above %d", e.ID, MaxID)
	case e.Interface == "" || e.Ifindex <= 0:
		return fmt.Errorf("interface %q with index %d: both must be given", e.Interface, e.Ifindex)
	case len(e.IPs) == 0:
		return errors.New("ips is empty")
	}
	for i, ip := range e.IPs {
		if !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" {
			return fmt.Errorf("ips[%d]: %q is not an address of a pod", i, ip)
		}
		if slices.Contains(e.IPs[:i], ip) {
			return fmt.Errorf("ips[%d]: %s is there twice", i, ip)
		}
	}
	for _, mac := range []struct{ key, value string }{{"mac", e.MAC}, {"hostMAC", e.HostMAC}} {
		if parsed, err := net.ParseMAC(mac.value); err != nil || len(parsed) != 6 {
			return fmt.Errorf("%s: %q is not an Ethernet address", mac.key, mac.value)
		}
	}
	return nil
}
