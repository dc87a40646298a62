// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	policyv1beta1 "sigs.k8s.io/network-policy-api/apis/v1beta1"

	"github.com/mooring-cni/mooring/daemon/model"
)

// apiServer is as much of an API server as a source sees: lists, watches that
// continue from a version, and what goes wrong with them.
type apiServer struct {
	address string
	server  *http.Server

	mutex     sync.Mutex
	changed   *sync.Cond
	version   int
	objects   map[string]map[string]runtime.Object // resource -> namespace/name
	history   []change
	compacted int             // versions up to this one are expired
	refused   map[string]int  // resource -> HTTP status
	silent    bool            // takes requests and answers none
	lists     bool            // does not know streaming lists
	asked     map[string]int  // resource -> lists and watches
	selectors map[string]bool // "pods?fieldSelector=...", as asked
	events    map[string]corev1.Event
}

type change struct {
	version  int
	resource string
	kind     string // ADDED, MODIFIED, DELETED
	object   runtime.Object
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{
		version: 100, objects: map[string]map[string]runtime.Object{}, refused: map[string]int{},
		asked: map[string]int{}, selectors: map[string]bool{}, events: map[string]corev1.Event{},
	}
	a.changed = sync.NewCond(&a.mutex)
	a.start(t)
	t.Cleanup(a.stop)
	return a
}

// start listens, on the same port as before.
func (a *apiServer) start(t *testing.T) {
	t.Helper()
	address := a.address
	if address == "" {
		address = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	a.address = listener.Addr().String()
	a.server = &http.Server{Handler: a}
	go a.server.Serve(listener)
}

// stop is a server that is gone, with every connection.
func (a *apiServer) stop() {
	a.server.Close()
	a.changed.Broadcast()
}

// kubeconfig writes a file that leads to the server.
func (a *apiServer) kubeconfig(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://%s"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u, user: {}}]
current-context: c
`, a.address), 0o600))
	return path
}

// put creates or replaces an object.
func (a *apiServer) put(objects ...runtime.Object) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	for _, o := range objects {
		resource, meta := resourceOf(o)
		a.version++
		meta.ResourceVersion = strconv.Itoa(a.version)
		if meta.UID == "" {
			meta.UID = types.UID("uid-of-" + meta.Name)
		}
		name := meta.Namespace + "/" + meta.Name
		kind := "MODIFIED"
		if a.objects[resource] == nil {
			a.objects[resource] = map[string]runtime.Object{}
		}
		if a.objects[resource][name] == nil {
			kind = "ADDED"
		}
		a.objects[resource][name] = o.DeepCopyObject()
		a.history = append(a.history, change{a.version, resource, kind, o.DeepCopyObject()})
	}
	a.changed.Broadcast()
}

func (a *apiServer) remove(o runtime.Object) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	resource, meta := resourceOf(o)
	a.version++
	delete(a.objects[resource], meta.Namespace+"/"+meta.Name)
	gone := o.DeepCopyObject()
	_, goneMeta := resourceOf(gone)
	goneMeta.ResourceVersion = strconv.Itoa(a.version)
	a.history = append(a.history, change{a.version, resource, "DELETED", gone})
	a.changed.Broadcast()
}

// with changes how the server behaves.
func (a *apiServer) with(f func()) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	f()
	a.changed.Broadcast()
}

func resourceOf(o runtime.Object) (string, *metav1.ObjectMeta) {
	switch o := o.(type) {
	case *corev1.Service:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}
		return "services", &o.ObjectMeta
	case *discoveryv1.EndpointSlice:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}
		return "endpointslices", &o.ObjectMeta
	case *corev1.Pod:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
		return "pods", &o.ObjectMeta
	case *corev1.Namespace:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}
		return "namespaces", &o.ObjectMeta
	case *corev1.Node:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}
		return "nodes", &o.ObjectMeta
	case *networkingv1.NetworkPolicy:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}
		return "networkpolicies", &o.ObjectMeta
	case *policyv1beta1.ClusterNetworkPolicy:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "policy.networking.k8s.io/v1beta1", Kind: "ClusterNetworkPolicy"}
		return "clusternetworkpolicies", &o.ObjectMeta
	}
	panic(fmt.Sprintf("no resource for %T", o))
}

func matches(o runtime.Object, query string) bool {
	pod, ok := o.(*corev1.Pod)
	node, selects := strings.CutPrefix(query, "spec.nodeName=")
	return !ok || !selects || pod.Spec.NodeName == node
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(r.URL.Path, "/")
	resource, query := parts[len(parts)-1], r.URL.Query()
	a.mutex.Lock()
	defer a.mutex.Unlock()
	stop := context.AfterFunc(r.Context(), func() { a.with(func() {}) })
	defer stop()
	a.asked[resource]++
	for _, selector := range []string{"fieldSelector", "labelSelector"} {
		if query.Has(selector) {
			a.selectors[resource+"?"+selector+"="+query.Get(selector)] = true
		}
	}
	for a.silent && r.Context().Err() == nil {
		a.changed.Wait()
	}
	streaming := query.Get("sendInitialEvents") == "true"
	switch {
	case a.refused[resource] != 0:
		a.fail(w, a.refused[resource], resource+" is refused here")
	case r.Method == http.MethodPost && resource == "events":
		a.event(w, r)
	case query.Get("watch") == "" || query.Get("watch") == "false":
		a.list(w, resource, query.Get("fieldSelector"))
	case streaming && a.lists:
		a.fail(w, http.StatusUnprocessableEntity, "sendInitialEvents is forbidden")
	default:
		version, _ := strconv.Atoi(query.Get("resourceVersion"))
		if !streaming && version < a.compacted {
			a.fail(w, http.StatusGone, "too old resource version")
			return
		}
		a.watch(w, r, resource, query.Get("fieldSelector"), version, streaming)
	}
}

func (a *apiServer) fail(w http.ResponseWriter, code int, message string) {
	reason := map[int]metav1.StatusReason{
		http.StatusForbidden: metav1.StatusReasonForbidden, http.StatusGone: metav1.StatusReasonExpired, http.StatusNotFound: metav1.StatusReasonNotFound,
		http.StatusConflict: metav1.StatusReasonAlreadyExists, http.StatusUnprocessableEntity: metav1.StatusReasonInvalid,
	}[code]
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: int32(code), Reason: reason, Message: message})
}

func (a *apiServer) event(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var e corev1.Event
	if err := decodeProtobuf(body, &e); err != nil {
		a.fail(w, http.StatusBadRequest, err.Error())
		return
	}
	if _, there := a.events[e.Name]; there {
		a.fail(w, http.StatusConflict, "already there")
		return
	}
	a.events[e.Name] = e
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	e.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Event"}
	json.NewEncoder(w).Encode(e)
}

// decodeProtobuf reads what a client sends: four bytes and runtime.Unknown.
func decodeProtobuf(body []byte, into interface{ Unmarshal([]byte) error }) error {
	var envelope runtime.Unknown
	if len(body) < 4 {
		return io.ErrUnexpectedEOF
	}
	if err := envelope.Unmarshal(body[4:]); err != nil {
		return err
	}
	return into.Unmarshal(envelope.Raw)
}

func (a *apiServer) list(w http.ResponseWriter, resource, selector string) {
	items := []runtime.Object{}
	for _, name := range slices.Sorted(maps.Keys(a.objects[resource])) {
		if o := a.objects[resource][name]; matches(o, selector) {
			items = append(items, o)
		}
	}
	kind := map[string][2]string{
		"services": {"v1", "ServiceList"}, "endpointslices": {"discovery.k8s.io/v1", "EndpointSliceList"}, "pods": {"v1", "PodList"},
		"namespaces": {"v1", "NamespaceList"}, "nodes": {"v1", "NodeList"}, "networkpolicies": {"networking.k8s.io/v1", "NetworkPolicyList"},
		"clusternetworkpolicies": {"policy.networking.k8s.io/v1beta1", "ClusterNetworkPolicyList"},
	}[resource]
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{
		"apiVersion": kind[0], "kind": kind[1], "metadata": map[string]string{"resourceVersion": strconv.Itoa(a.version)}, "items": items,
	})
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, resource, selector string, version int, streaming bool) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	send := func(kind string, object any) {
		encoder.Encode(map[string]any{"type": kind, "object": object})
		w.(http.Flusher).Flush()
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	if streaming {
		for _, name := range slices.Sorted(maps.Keys(a.objects[resource])) {
			if o := a.objects[resource][name]; matches(o, selector) {
				send("ADDED", o)
			}
		}
		version = a.version
		kind := map[string][2]string{
			"services": {"v1", "Service"}, "endpointslices": {"discovery.k8s.io/v1", "EndpointSlice"}, "pods": {"v1", "Pod"},
			"namespaces": {"v1", "Namespace"}, "nodes": {"v1", "Node"}, "networkpolicies": {"networking.k8s.io/v1", "NetworkPolicy"},
			"clusternetworkpolicies": {"policy.networking.k8s.io/v1beta1", "ClusterNetworkPolicy"},
		}[resource]
		send("BOOKMARK", map[string]any{"apiVersion": kind[0], "kind": kind[1], "metadata": map[string]any{
			"resourceVersion": strconv.Itoa(version), "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"},
		}})
	}
	for r.Context().Err() == nil {
		if version < a.compacted {
			send("ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: http.StatusGone, Reason: metav1.StatusReasonExpired, Message: "too old resource version"})
			return
		}
		for _, c := range a.history {
			if c.version > version && c.resource == resource && matches(c.object, selector) {
				send(c.kind, c.object)
			}
		}
		version = a.version
		if a.refused[resource] != 0 {
			return
		}
		a.changed.Wait()
	}
}

// view is what a sink has heard, put together.
type view struct {
	mutex  sync.Mutex
	all    map[string]string // "Service default/web" -> what of it matters
	synced bool
	told   []model.Changes
	report []string
}

func (v *view) take(c model.Changes) {
	v.mutex.Lock()
	defer v.mutex.Unlock()
	note := func(name string, there bool, text string) {
		if delete(v.all, name); there {
			v.all[name] = text
		}
	}
	for name, o := range c.Services {
		text := ""
		if o != nil {
			for _, p := range o.Ports {
				text += fmt.Sprint(p.Port, " ")
			}
		}
		note("Service "+name.String(), o != nil, strings.TrimSpace(text))
	}
	for name, o := range c.Slices {
		text := ""
		if o != nil {
			for _, e := range o.Endpoints {
				text += e.Addresses[0].String() + " "
			}
		}
		note("EndpointSlice "+name.String(), o != nil, strings.TrimSpace(text))
	}
	for name, o := range c.Pods {
		text := ""
		if o != nil {
			text = o.NodeName
		}
		note("Pod "+name.String(), o != nil, text)
	}
	for name, o := range c.Nodes {
		text := ""
		if o != nil {
			text = fmt.Sprint(o.PodCIDRs)
		}
		note("Node "+name, o != nil, text)
	}
	for name, o := range c.Namespaces {
		note("Namespace "+name, o != nil, "")
	}
	for name, o := range c.Policies {
		note("NetworkPolicy "+name.String(), o != nil, "")
	}
	for name, o := range c.ClusterPolicies {
		text := ""
		if o != nil {
			text = string(o.Tier)
		}
		note("ClusterNetworkPolicy "+name, o != nil, text)
	}
	v.synced = c.Synced
	v.told = append(v.told, c)
	v.report = nil
	for _, p := range c.Problems {
		v.report = append(v.report, p.String())
	}
}

// patience is how long a test waits for what has to come.
const patience = 30 * time.Second

func (v *view) await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		v.mutex.Lock()
		ok := holds()
		v.mutex.Unlock()
		if ok {
			return
		}
		if time.Since(start) > patience {
			v.mutex.Lock()
			defer v.mutex.Unlock()
			t.Fatalf("%s: not within %s; synced %v, objects %v, problems %q", what, patience, v.synced, v.all, v.report)
		}
	}
}

// shows waits for exactly these objects and problems.
func (v *view) shows(t *testing.T, what string, objects state, problems ...string) {
	t.Helper()
	v.await(t, what, func() bool { return v.synced && maps.Equal(v.all, objects) && v.reports(problems...) })
}

func (v *view) reports(problems ...string) bool {
	return len(v.report) == len(problems) && !slices.ContainsFunc(problems, func(p string) bool {
		return !slices.ContainsFunc(v.report, func(got string) bool { return strings.Contains(got, p) })
	})
}

// follow runs a source until the test ends.
func (a *apiServer) follow(t *testing.T, policies bool, change ...func(*Kubernetes)) (*view, *Kubernetes) {
	t.Helper()
	k, err := NewKubernetes(KubernetesOptions{
		Kubeconfig: a.kubeconfig(t), NodeName: "node-a", Policies: policies, Version: "test", Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	for _, f := range change {
		f(k)
	}
	v := &view{all: map[string]string{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx, v.take) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("run ended with %v", err)
		}
	})
	return v, k
}

func aService(name string, ports ...int32) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	s.Spec.ClusterIP = "10.96.0.10"
	for _, port := range ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("p", port), Port: port})
	}
	return s
}

func aSlice(name, service string, addresses ...string) *discoveryv1.EndpointSlice {
	port := int32(8080)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}},
	}
	for _, address := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	return s
}

func aNode(name string, podCIDRs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Spec.PodCIDRs = podCIDRs
	return n
}

func aPod(name, node string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	p.Spec.NodeName = node
	return p
}

func aPolicy(name string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
}

func TestTheAPIsObjectsAndTheirChangesArrive(t *testing.T) {
	for _, streaming := range []bool{true, false} {
		t.Run(map[bool]string{true: "streaming lists", false: "lists"}[streaming], func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			a.lists = !streaming
			a.put(aService("web", 80), aSlice("web-1", "web", "10.244.0.5"), aNode("node-a", "10.244.0.0/24"), aPod("mine", "node-a"), aPod("theirs", "node-b"))
			v, k := a.follow(t, false)
			v.shows(t, "the beginning", state{
				"Service default/web": "80", "EndpointSlice default/web-1": "10.244.0.5", "Node node-a": "[10.244.0.0/24]", "Pod default/mine": "node-a",
			})
			// Until all is known, an object's absence says nothing.
			v.mutex.Lock()
			for i, c := range v.told {
				if !c.Synced && c.Len() > 0 {
					t.Errorf("delivery %d has objects and is not synced: %+v", i, c)
				}
			}
			v.mutex.Unlock()

			a.put(aService("web", 81), aService("dns", 53), aSlice("web-1", "web", "10.244.0.5", "10.244.0.6"), aNode("node-b", "10.244.1.0/24"))
			v.shows(t, "changed", state{
				"Service default/web": "81", "Service default/dns": "53", "EndpointSlice default/web-1": "10.244.0.5 10.244.0.6",
				"Node node-a": "[10.244.0.0/24]", "Node node-b": "[10.244.1.0/24]", "Pod default/mine": "node-a",
			})
			a.remove(aService("dns", 53))
			a.remove(aNode("node-b"))
			v.shows(t, "removed", state{
				"Service default/web": "81", "EndpointSlice default/web-1": "10.244.0.5 10.244.0.6", "Node node-a": "[10.244.0.0/24]", "Pod default/mine": "node-a",
			})
			a.mutex.Lock()
			for _, want := range []string{
				"pods?fieldSelector=spec.nodeName=node-a",
				"services?labelSelector=!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless",
				"endpointslices?labelSelector=!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless",
			} {
				if !a.selectors[want] {
					t.Errorf("the server was not asked for %s, but for %v", want, a.selectors)
				}
			}
			if a.asked["networkpolicies"]+a.asked["namespaces"] > 0 {
				t.Errorf("policies are of no interest and were asked for: %v", a.asked)
			}
			a.mutex.Unlock()
			for _, w := range k.Watches() {
				if !w.Connected || !w.Synced || w.Errors > 0 {
					t.Errorf("watch %+v is not well", w)
				}
			}
			if k.Received() == 0 {
				t.Error("nothing was counted as received")
			}
		})
	}
}

func TestWhatIsNotOursIsLeftOut(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	headless, named := aService("headless", 80), aService("named", 80)
	headless.Spec.ClusterIP = corev1.ClusterIPNone
	named.Spec.Type, named.Spec.ClusterIP = corev1.ServiceTypeExternalName, ""
	a.put(headless, named, aService("web", 80))
	v, _ := a.follow(t, false)
	v.shows(t, "one service", state{"Service default/web": "80"})
	// A service that becomes headless is gone for us, and comes back.
	became := aService("web", 80)
	became.Spec.ClusterIP = corev1.ClusterIPNone
	a.put(became)
	v.shows(t, "became headless", state{})
	a.put(aService("web", 80))
	v.shows(t, "and back", state{"Service default/web": "80"})
}

func TestHeartbeatsAreNoNews(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aNode("node-a", "10.244.0.0/24"), aService("web", 80))
	v, _ := a.follow(t, false)
	v.shows(t, "the beginning", state{"Node node-a": "[10.244.0.0/24]", "Service default/web": "80"})
	v.mutex.Lock()
	before := len(v.told)
	v.mutex.Unlock()
	for i := range 5 {
		beat := aNode("node-a", "10.244.0.0/24")
		beat.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Message: fmt.Sprint(i)}}
		a.put(beat)
	}
	a.put(aService("web", 81)) // tells when the beats are through
	v.shows(t, "a change", state{"Node node-a": "[10.244.0.0/24]", "Service default/web": "81"})
	v.mutex.Lock()
	defer v.mutex.Unlock()
	for _, c := range v.told[before:] {
		if len(c.Nodes) > 0 {
			t.Errorf("a heartbeat was delivered: %+v", c)
		}
	}
}

func TestAServerThatIsGoneCostsNothingAndIsCaughtUpWith(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aService("web", 80), aService("old", 80))
	v, k := a.follow(t, false)
	there := state{"Service default/web": "80", "Service default/old": "80"}
	v.shows(t, "the beginning", there)

	a.stop()
	gone := []string{
		"Kubernetes API: services: no news since", "Kubernetes API: endpointslices: no news since",
		"Kubernetes API: nodes: no news since", "Kubernetes API: pods of this node: no news since",
	}
	v.shows(t, "gone", there, gone...)
	for _, w := range k.Watches() {
		if w.Connected || !w.Synced || w.Errors == 0 {
			t.Errorf("watch %+v of a server that is gone", w)
		}
	}
	a.remove(aService("old", 80))
	a.put(aService("new", 443), aService("web", 81))
	// What is still in the server's history arrives as changes ...
	a.start(t)
	v.shows(t, "back", state{"Service default/web": "81", "Service default/new": "443"})

	a.stop()
	v.shows(t, "gone again", state{"Service default/web": "81", "Service default/new": "443"}, gone...)
	a.remove(aService("new", 443))
	// ... and what is not, as a difference to all that there is.
	a.with(func() { a.history, a.compacted = nil, a.version })
	a.start(t)
	v.shows(t, "back without its history", state{"Service default/web": "81"})
}

func TestAnExpiredVersionIsNoTrouble(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aService("web", 80), aService("old", 80))
	v, _ := a.follow(t, false)
	v.shows(t, "the beginning", state{"Service default/web": "80", "Service default/old": "80"})
	a.with(func() {
		delete(a.objects["services"], "default/old")
		a.version++
		a.history, a.compacted = nil, a.version
	})
	v.shows(t, "listed anew", state{"Service default/web": "80"})
	v.mutex.Lock()
	defer v.mutex.Unlock()
	for _, c := range v.told {
		if c.Synced && len(c.Problems) > 0 {
			t.Errorf("problems were reported: %v", c.Problems)
		}
	}
}

func TestWhatTheAccountMayNotReadIsNamed(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.refused["endpointslices"] = http.StatusForbidden
	a.put(aService("web", 80))
	v, _ := a.follow(t, false)
	v.await(t, "refused", func() bool {
		return !v.synced && v.reports("endpointslices: not known yet: endpointslices is refused here; grant it")
	})
	v.mutex.Lock()
	if len(v.all) > 0 {
		t.Errorf("objects %v were delivered while their endpoints are not known", v.all)
	}
	v.mutex.Unlock()
	a.with(func() { delete(a.refused, "endpointslices") })
	v.shows(t, "granted", state{"Service default/web": "80"})
	// Taken away later: what is known stays.
	a.with(func() { a.refused["services"] = http.StatusForbidden })
	v.shows(t, "taken away", state{"Service default/web": "80"}, "services: no news since")
}

func TestAServerThatDoesNotAnswerIsReported(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.silent = true
	a.put(aService("web", 80))
	v, _ := a.follow(t, false)
	v.await(t, "silence", func() bool {
		return !v.synced && len(v.told) > 0 && slices.ContainsFunc(v.report, func(p string) bool {
			return strings.Contains(p, "services: not known yet: the server has not answered in full")
		})
	})
	a.with(func() { a.silent = false })
	v.shows(t, "answers", state{"Service default/web": "80"})
}

func TestAllPodsAreWatchedOnlyWhileThereIsAPolicy(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aPod("mine", "node-a"), aPod("theirs", "node-b"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	v, k := a.follow(t, true)
	own := state{"Pod default/mine": "node-a", "Namespace default": ""}
	v.shows(t, "own pods", own)

	a.put(aPolicy("deny"))
	v.shows(t, "all pods", state{"Pod default/mine": "node-a", "Pod default/theirs": "node-b", "Namespace default": "", "NetworkPolicy default/deny": ""})
	v.mutex.Lock()
	pods := map[model.Name]bool{}
	for _, c := range v.told {
		for name := range c.Pods {
			pods[name] = true
		}
		if len(c.Policies) > 0 && len(pods) < 2 {
			t.Errorf("a policy came when only %v were known", pods)
		}
	}
	v.mutex.Unlock()

	a.remove(aPolicy("deny"))
	v.shows(t, "own pods again", own)
	titles := []string{}
	for _, w := range k.Watches() {
		titles = append(titles, w.Resource)
	}
	if diff := cmp.Diff([]string{"clusternetworkpolicies", "endpointslices", "namespaces", "networkpolicies", "nodes", "pods of this node", "services"}, titles); diff != "" {
		t.Errorf("watches (-want +got):\n%s", diff)
	}
}

func TestAPolicyWaitsForThePodsItMayName(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aPod("mine", "node-a"), aService("web", 80))
	v, _ := a.follow(t, true)
	own := state{"Pod default/mine": "node-a", "Service default/web": "80"}
	v.shows(t, "own pods", own)
	a.with(func() { a.refused["pods"] = http.StatusForbidden })
	a.put(aPolicy("deny"))
	a.put(aService("web", 81))
	v.await(t, "pods refused", func() bool {
		return v.all["Service default/web"] == "81" && slices.ContainsFunc(v.report, func(p string) bool { return strings.Contains(p, "API: pods: not known yet") })
	})
	v.mutex.Lock()
	if _, there := v.all["NetworkPolicy default/deny"]; there {
		t.Error("the policy was delivered without the pods")
	}
	v.mutex.Unlock()
	a.with(func() { delete(a.refused, "pods") })
	v.shows(t, "granted", state{"Pod default/mine": "node-a", "Service default/web": "81", "NetworkPolicy default/deny": ""})
}

func aClusterPolicy(name string, tier policyv1beta1.Tier) *policyv1beta1.ClusterNetworkPolicy {
	p := &policyv1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.Tier = tier
	p.Spec.Subject.Namespaces = &metav1.LabelSelector{}
	p.Spec.Ingress = []policyv1beta1.ClusterNetworkPolicyIngressRule{{
		Action: policyv1beta1.ClusterNetworkPolicyRuleActionDeny, From: []policyv1beta1.ClusterNetworkPolicyIngressPeer{{Namespaces: &metav1.LabelSelector{}}},
	}}
	return p
}

func TestClusterPoliciesOfTheAPIArriveWithAllPods(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aPod("mine", "node-a"), aPod("theirs", "node-b"), aClusterPolicy("deny", "Admin"))
	v, _ := a.follow(t, true)
	all := state{"Pod default/mine": "node-a", "Pod default/theirs": "node-b", "ClusterNetworkPolicy deny": "Admin"}
	v.shows(t, "all pods", all)
	a.put(aClusterPolicy("deny", "Nobody"))
	v.shows(t, "unsound", all, `"Nobody" is not a tier`, "the policy is refused")
	a.put(aClusterPolicy("deny", "Baseline"))
	all["ClusterNetworkPolicy deny"] = "Baseline"
	v.shows(t, "changed", all)
	a.remove(aClusterPolicy("deny", "Baseline"))
	v.shows(t, "own pods again", state{"Pod default/mine": "node-a"})
}

func TestAnAPIThatKnowsNoClusterPoliciesIsNoTrouble(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.refused["clusternetworkpolicies"] = http.StatusNotFound
	a.put(aPod("mine", "node-a"), aPolicy("deny"))
	v, k := a.follow(t, true, func(k *Kubernetes) { k.absence = 10 * time.Millisecond })
	known := state{"Pod default/mine": "node-a", "NetworkPolicy default/deny": ""}
	v.shows(t, "without them", known)
	for _, w := range k.Watches() {
		if w.Resource == "clusternetworkpolicies" && (!w.Connected || !w.Synced || w.Errors > 0) {
			t.Errorf("the absent resource counts as trouble: %+v", w)
		}
	}

	// Somebody installs the definition.
	a.put(aClusterPolicy("deny", "Admin"))
	a.with(func() { delete(a.refused, "clusternetworkpolicies") })
	known["ClusterNetworkPolicy deny"] = "Admin"
	v.shows(t, "installed", known)

	// An answer that does not know it any more takes nothing away: deletions are told.
	a.with(func() { a.refused["clusternetworkpolicies"] = http.StatusNotFound; a.compacted = a.version + 1 })
	v.shows(t, "gone", known, "clusternetworkpolicies: no news since")
}

func TestAnUnsoundPolicyKeepsItsDefinitionBefore(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(aPolicy("deny"))
	v, _ := a.follow(t, true)
	v.shows(t, "sound", state{"NetworkPolicy default/deny": ""})
	unsound := aPolicy("deny")
	unsound.Spec.PolicyTypes = []networkingv1.PolicyType{"Sideways"}
	a.put(unsound)
	v.shows(t, "unsound", state{"NetworkPolicy default/deny": ""}, `"Sideways" is not a direction`, "the policy is refused")
}

// The objects that the API accepts and that make no sense here.
func TestProblemsWithObjectsBecomeEvents(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	strange := aService("strange", 80)
	strange.Spec.ExternalIPs = []string{"127.0.0.1"}
	a.put(strange, aService("web", 80), aSlice("lost", "nobody", "10.244.0.5"))
	quick := func(k *Kubernetes) { k.grace = 0 }
	v, first := a.follow(t, false, quick)
	_, second := a.follow(t, false, quick)
	first.Announce([]model.Problem{{Object: "Service default/web", Field: "spec.externalIPs", Message: "clash"}, {Object: "Service default/unknown", Message: "is nowhere"}})
	second.Announce([]model.Problem{{Object: "Service default/web", Field: "spec.externalIPs", Message: "clash"}})
	first.poked()
	v.await(t, "the rest works", func() bool {
		return v.all["Service default/web"] == "80" && v.all["Service default/strange"] == "80" && v.reports(`"127.0.0.1" is a loopback address`, "EndpointSlice default/lost: metadata.labels: names Service default/nobody")
	})
	v.await(t, "Events", func() bool { a.mutex.Lock(); defer a.mutex.Unlock(); return len(a.events) == 3 })
	a.mutex.Lock()
	defer a.mutex.Unlock()
	got := map[string]string{}
	for _, e := range a.events {
		got[e.InvolvedObject.Kind+" "+e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name+" "+string(e.InvolvedObject.UID)] = e.Type + " " + e.Reason + ": " + e.Message
	}
	want := map[string]string{
		"Service default/strange uid-of-strange": `Warning ServiceProblem: spec.externalIPs[0]: "127.0.0.1" is a loopback address`,
		"Service default/web uid-of-web":         "Warning ServiceProblem: spec.externalIPs: clash",
		"EndpointSlice default/lost uid-of-lost": "Warning EndpointSliceProblem: metadata.labels: names Service default/nobody in kubernetes.io/service-name, which is not there: nobody uses these endpoints",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Events (-want +got):\n%s", diff)
	}
}

func TestRefusedEventsAreReported(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.refused["events"] = http.StatusForbidden
	strange := aService("strange", 80)
	strange.Spec.ExternalIPs = []string{"127.0.0.1"}
	a.put(strange)
	v, _ := a.follow(t, false)
	v.shows(t, "refused", state{"Service default/strange": "80"}, "loopback", "events: what is wrong with objects is only in status: events is refused here")
}

func TestAThousandPortsAreServed(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	var ports []int32
	for i := range int32(1000) {
		ports = append(ports, 10000+i)
	}
	a.put(aService("wide", ports...))
	v, _ := a.follow(t, false)
	v.await(t, "all ports", func() bool { return len(strings.Fields(v.all["Service default/wide"])) == 1000 && len(v.report) == 0 })
}

func TestABadKubeconfigIsNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "absent")
	if _, err := NewKubernetes(KubernetesOptions{Kubeconfig: path, Log: slog.New(slog.DiscardHandler)}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}
