// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

// node is a fake kernel: its interfaces, and what its datapath was told.
type node struct {
	mutex  sync.Mutex
	links  map[string]int // all when nil
	known  map[uint32]model.Endpoint
	refuse error
}

func (n *node) Exists(name string, index int) (bool, error) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	return n.links == nil || n.links[name] == index, nil
}

func (n *node) AddEndpoint(e model.Endpoint) error {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	if n.refuse != nil {
		return n.refuse
	}
	n.known[e.ID] = e
	return nil
}

func (n *node) RemoveEndpoint(e model.Endpoint) error {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	delete(n.known, e.ID)
	return nil
}

func newNode(interfaces ...string) *node {
	n := &node{links: map[string]int{}, known: map[uint32]model.Endpoint{}}
	for i, name := range interfaces {
		n.links[name] = 10 + i
	}
	return n
}

func open(t *testing.T, directory string, n *node) *Registry {
	t.Helper()
	r, err := Open(directory, n, n, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func made(container, device string, index int, ips ...string) model.Endpoint {
	e := model.Endpoint{
		ContainerID: container, PodIfname: "eth0", Network: "mooring", Pod: model.Name{Namespace: "default", Name: container},
		Interface: device, Ifindex: index, MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02", Netns: "/run/netns/" + container,
	}
	for _, ip := range ips {
		e.IPs = append(e.IPs, netip.MustParseAddr(ip))
	}
	return e
}

func add(t *testing.T, r *Registry, e model.Endpoint) model.Endpoint {
	t.Helper()
	e, err := r.Add(e)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var compareAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got, compareAddr); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestSameEndpointAgainKeepsItsID(t *testing.T) {
	directory := t.TempDir()
	n := newNode("lxca", "lxcb")
	r := open(t, directory, n)
	a := add(t, r, made("a", "lxca", 10, "10.244.0.5", "fd00:10:244::5"))
	b := add(t, r, made("b", "lxcb", 11, "10.244.0.6"))
	if a.ID == b.ID || a.ID == 0 || b.ID == 0 {
		t.Fatalf("ids %d and %d", a.ID, b.ID)
	}
	equal(t, "a again", add(t, r, made("a", "lxca", 10, "10.244.0.5", "fd00:10:244::5")), a)
	equal(t, "list", r.List(), []model.Endpoint{a, b})
	if got, known := r.Get(b.ID); !known || got.ContainerID != "b" {
		t.Errorf("endpoint %d is %+v, %v", b.ID, got, known)
	}
	equal(t, "datapath", n.known, map[uint32]model.Endpoint{a.ID: a, b.ID: b})

	r = open(t, directory, n)
	equal(t, "list after a restart", r.List(), []model.Endpoint{a, b})
	equal(t, "a again after a restart", add(t, r, made("a", "lxca", 10, "10.244.0.5", "fd00:10:244::5")), a)
}

func TestEndpointMadeAnewReplacesTheOldUnderItsID(t *testing.T) {
	n := newNode("lxca", "lxcb")
	r := open(t, t.TempDir(), n)
	old := add(t, r, made("a", "lxca", 10, "10.244.0.5"))
	n.links = map[string]int{"lxca": 33}
	anew := add(t, r, made("a", "lxca", 33, "10.244.0.9"))
	if anew.ID != old.ID {
		t.Errorf("id %d became %d", old.ID, anew.ID)
	}
	equal(t, "list", r.List(), []model.Endpoint{anew})
	equal(t, "datapath", n.known, map[uint32]model.Endpoint{anew.ID: anew})
	n.links["lxcc"] = 34
	add(t, r, made("c", "lxcc", 34, "10.244.0.5")) // the old address is free
}

func TestAddressOfALiveEndpointIsRefusedAndOfADeadOneTaken(t *testing.T) {
	n := newNode("lxca", "lxcb")
	r := open(t, t.TempDir(), n)
	a := add(t, r, made("a", "lxca", 10, "10.244.0.5", "fd00:10:244::5"))
	_, err := r.Add(made("b", "lxcb", 11, "10.244.0.6", "fd00:10:244::5"))
	if !api.IsConflict(err) {
		t.Fatalf("address of a live endpoint: %v", err)
	}
	for _, word := range []string{"fd00:10:244::5", "default/a", "lxca", "endpoint 1"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v does not name %s", err, word)
		}
	}
	equal(t, "list after the refusal", r.List(), []model.Endpoint{a})
	n.links["lxca"] = 99 // gone; another has its name now
	b := add(t, r, made("b", "lxcb", 11, "10.244.0.6", "fd00:10:244::5"))
	equal(t, "list", r.List(), []model.Endpoint{b})
	equal(t, "datapath", n.known, map[uint32]model.Endpoint{b.ID: b})
}

func TestUnsoundEndpointsAreRefused(t *testing.T) {
	r := open(t, t.TempDir(), newNode("lxca"))
	for name, change := range map[string]func(*model.Endpoint){
		"containerID":             func(e *model.Endpoint) { e.ContainerID = "" },
		"podIfname":               func(e *model.Endpoint) { e.PodIfname = "" },
		"interface":               func(e *model.Endpoint) { e.Interface = "" },
		"ips is empty":            func(e *model.Endpoint) { e.IPs = nil },
		"ips[1]: 10.244.0.5":      func(e *model.Endpoint) { e.IPs = append(e.IPs, netip.MustParseAddr("::ffff:10.244.0.5")) },
		"ips[0]: \"0.0.0.0\"":     func(e *model.Endpoint) { e.IPs[0] = netip.IPv4Unspecified() },
		"mac: \"zz\"":             func(e *model.Endpoint) { e.MAC = "zz" },
		"hostMAC: \"\"":           func(e *model.Endpoint) { e.HostMAC = "" },
		"not in mooringd's netwo": func(e *model.Endpoint) { e.Ifindex++ },
	} {
		e := made("a", "lxca", 10, "10.244.0.5")
		change(&e)
		_, err := r.Add(e)
		var status *api.StatusError
		if !errors.As(err, &status) || status.Code == http.StatusInternalServerError || !strings.Contains(err.Error(), name) {
			t.Errorf("want an error that names %s, got %v", name, err)
		}
	}
	if r.Len() != 0 {
		t.Errorf("refused endpoints are in the list: %v", r.List())
	}
}

func TestEndpointThatTheDatapathRefusesLeavesNothing(t *testing.T) {
	directory := t.TempDir()
	n := newNode("lxca")
	n.refuse = errors.New("map endpoints: no space")
	r := open(t, directory, n)
	if _, err := r.Add(made("a", "lxca", 10, "10.244.0.5")); !errors.Is(err, n.refuse) {
		t.Errorf("got %v", err)
	}
	files, _ := os.ReadDir(filepath.Join(directory, "endpoints"))
	if r.Len() != 0 || len(files) != 0 {
		t.Errorf("left: %v, files %v", r.List(), files)
	}
}

func TestDeleteIsIdempotent(t *testing.T) {
	directory := t.TempDir()
	n := newNode("lxca")
	r := open(t, directory, n)
	add(t, r, made("a", "lxca", 10, "10.244.0.5"))
	for range 2 {
		if err := r.Delete("a", "eth0"); err != nil {
			t.Error(err)
		}
	}
	if len(n.known) != 0 || r.Len() != 0 || open(t, directory, n).Len() != 0 {
		t.Error("the endpoint is still there")
	}
}

func TestIDsAreReusedLastAndRunOut(t *testing.T) {
	r := open(t, t.TempDir(), newNode())
	for want := range uint32(3) {
		id, err := r.nextID()
		if err != nil || id != want+1 {
			t.Fatalf("id %d, %v; want %d", id, err, want+1)
		}
		r.insert(model.Endpoint{ID: id, ContainerID: fmt.Sprint(id)})
	}
	delete(r.byID, 2)
	if id, _ := r.nextID(); id != 4 {
		t.Errorf("after 2 was freed: %d, want 4 first", id)
	}
	for id := range uint32(MaxID + 1) {
		r.byID[id] = key{}
	}
	delete(r.byID, 2)
	if id, _ := r.nextID(); id != 2 {
		t.Errorf("the only free id: %d, want 2", id)
	}
	r.byID[2] = key{}
	if _, err := r.nextID(); !api.IsUnavailable(err) {
		t.Errorf("no id left: %v", err)
	}
}

func TestRestartAdoptsWhatIsThereAndReleasesWhatIsGone(t *testing.T) {
	directory := t.TempDir()
	before := newNode("lxca", "lxcb", "lxcc")
	r := open(t, directory, before)
	a := add(t, r, made("a", "lxca", 10, "10.244.0.5"))
	b := add(t, r, made("b", "lxcb", 11, "10.244.0.6"))
	c := add(t, r, made("c", "lxcc", 12, "10.244.0.7"))
	// Another interface has b's name now, and another c's index.
	after := newNode()
	after.links = map[string]int{"lxca": 10, "lxcb": 21, "lxcz": 12}
	after.known = map[uint32]model.Endpoint{a.ID: a, b.ID: b, c.ID: c} // pinned maps survive
	equal(t, "list", open(t, directory, after).List(), []model.Endpoint{a})
	equal(t, "datapath", after.known, map[uint32]model.Endpoint{a.ID: a})
	equal(t, "after a reboot", open(t, directory, newNode()).List(), []model.Endpoint{})
	files, _ := os.ReadDir(filepath.Join(directory, "endpoints"))
	if len(files) != 0 {
		t.Errorf("files left after a reboot: %v", files)
	}
}

func TestFilesThatPowerLossCutOffAreForgotten(t *testing.T) {
	directory := t.TempDir()
	n := newNode("lxca")
	a := add(t, open(t, directory, n), made("a", "lxca", 10, "10.244.0.5"))
	for name, content := range map[string]string{
		"2.json": "", "3.json": "\x00\x00\x00", "4.json": `{"id":4,"contai`, "5.json": `{"id":6}`, "7.json": `{"id":7}`, "8.json.new": "x", "README": "not ours",
	} {
		if err := os.WriteFile(filepath.Join(directory, "endpoints", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	equal(t, "list", open(t, directory, n).List(), []model.Endpoint{a})
	var left []string
	files, _ := os.ReadDir(filepath.Join(directory, "endpoints"))
	for _, file := range files {
		left = append(left, file.Name())
	}
	equal(t, "files", left, []string{"1.json", "README"})
}

func TestVanishedInterfaceTakesItsEndpointAlong(t *testing.T) {
	n := newNode("lxca", "lxcb")
	changes := 0
	r, err := Open(t.TempDir(), n, n, slog.New(slog.DiscardHandler), func() { changes++ })
	if err != nil {
		t.Fatal(err)
	}
	a := add(t, r, made("a", "lxca", 10, "10.244.0.5"))
	b := add(t, r, made("b", "lxcb", 11, "10.244.0.6"))
	r.LinkGone(10) // a bridge's news about a port that is still there
	equal(t, "after news of an interface that exists", r.List(), []model.Endpoint{a, b})
	delete(n.links, "lxca")
	r.LinkGone(10)
	equal(t, "after a's end", r.List(), []model.Endpoint{b})
	delete(n.links, "lxcb")
	r.Resync()
	equal(t, "after b's end", r.List(), []model.Endpoint{})
	if len(n.known) != 0 || changes != 4 {
		t.Errorf("datapath has %v; %d changes told, want 4", n.known, changes)
	}
}

func TestFiftyAtOnceGetFiftyIDs(t *testing.T) {
	n := newNode()
	n.links = nil
	r := open(t, t.TempDir(), n)
	var wait sync.WaitGroup
	for i := range 50 {
		wait.Go(func() {
			if _, err := r.Add(made(fmt.Sprint("c", i), fmt.Sprint("lxc", i), 100+i, fmt.Sprintf("10.244.0.%d", i+2))); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if r.Len() != 50 || len(n.known) != 50 {
		t.Errorf("%d endpoints, datapath has %d", r.Len(), len(n.known))
	}
}

// A daemon that is killed at any moment forgets no endpoint that it confirmed,
// keeps none whose deletion it confirmed, and finds every file whole.
func TestKilledDaemonFindsWhatItConfirmed(t *testing.T) {
	if directory := os.Getenv("MOORING_TEST_ENDPOINTS"); directory != "" {
		churn(t, directory)
	}
	directory := t.TempDir()
	n := newNode()
	n.links = nil
	for round := range 20 {
		// The test is over when the parent kills it: its own end is a failure.
		command := exec.Command(os.Args[0], "-test.run=^TestKilledDaemonFindsWhatItConfirmed$")
		command.Env = append(os.Environ(), "MOORING_TEST_ENDPOINTS="+directory, fmt.Sprint("MOORING_TEST_ROUND=", round))
		out, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		lines := make(chan string, 1<<16)
		go func() {
			defer close(lines)
			for scan := bufio.NewScanner(out); scan.Scan(); {
				lines <- scan.Text()
			}
		}()
		said := []string{}
		for range 20 {
			said = append(said, <-lines)
		}
		time.Sleep(time.Duration(round*37) * time.Microsecond)
		command.Process.Kill()
		want := map[string]bool{}
		begun := ""
		for line := range lines {
			said = append(said, line)
		}
		for _, line := range said {
			verb, name, _ := strings.Cut(line, " ")
			switch verb {
			case "add", "delete":
				begun = name
			case "added":
				want[name], begun = true, ""
			case "deleted":
				delete(want, name)
				begun = ""
			default:
				t.Fatalf("the daemon said %q", line)
			}
		}
		command.Wait()
		r := open(t, directory, n)
		got := map[string]bool{}
		for _, e := range r.List() {
			got[e.ContainerID] = true
		}
		// What was under way may have happened or not.
		delete(got, begun)
		delete(want, begun)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("round %d, after %d lines (-want +got):\n%s", round, len(said), diff)
		}
		for _, e := range r.List() {
			if err := r.Delete(e.ContainerID, e.PodIfname); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// churn adds and deletes endpoints until somebody kills it, and says so.
func churn(t *testing.T, directory string) {
	n := newNode()
	n.links = nil
	r := open(t, directory, n)
	for i := 0; ; i++ {
		name := fmt.Sprintf("c%s-%d", os.Getenv("MOORING_TEST_ROUND"), i)
		fmt.Println("add", name)
		if _, err := r.Add(made(name, "lxc"+name, i+1, fmt.Sprintf("10.244.%d.%d", i/250%250, i%250+1))); err != nil {
			fmt.Println("error", err)
		}
		fmt.Println("added", name)
		if old := fmt.Sprintf("c%s-%d", os.Getenv("MOORING_TEST_ROUND"), i-5); i >= 5 && i%3 != 0 {
			fmt.Println("delete", old)
			if err := r.Delete(old, "eth0"); err != nil {
				fmt.Println("error", err)
			}
			fmt.Println("deleted", old)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	n := newNode()
	n.links = nil
	r, err := Open(b.TempDir(), n, n, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		if _, err := r.Add(made("c", "lxc", i+1, "10.244.0.5")); err != nil {
			b.Fatal(err)
		}
	}
}
