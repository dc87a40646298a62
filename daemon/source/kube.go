// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	policyv1beta1 "sigs.k8s.io/network-policy-api/apis/v1beta1"

	"github.com/mooring-cni/mooring/daemon/model"
)

const (
	// Changes come in bursts, such as a slice for each service of a rollout: a
	// delivery holds what came within this, so that one object's many changes
	// cost one. It is far below the second within which a change is to arrive.
	gather = 20 * time.Millisecond
	// How long an API server that came back waits for us at most. All nodes ask
	// anew when it does, so this has a jitter.
	retryFirst, retryMaximum = 500 * time.Millisecond, 10 * time.Second
	// A slice may come before its service, and goes after it.
	orphanGrace  = time.Minute
	orphanPeriod = 15 * time.Second
	// How often it is looked whether the server knows a resource that it need not.
	absencePeriod = time.Minute
	// Requests in a second besides the watches: Events.
	requestRate, requestBurst = 10, 30
)

// protobuf is a third of JSON's size and an eighth of its work.
const protobuf = "application/vnd.kubernetes.protobuf"

// KubernetesOptions say which API server to ask, and for what.
type KubernetesOptions struct {
	// Kubeconfig is a file; empty: the pod's own account.
	Kubeconfig string
	// NodeName is this node's.
	NodeName string
	// Policies says that network policies are of interest, and with them the
	// namespaces and, as long as there is a policy, all pods of the cluster.
	Policies bool
	// Version is told to the server.
	Version string
	Log     *slog.Logger
}

// Kubernetes is an API server as a source of objects. It keeps no object of the
// API: each becomes a noun of the model as it arrives.
//
// What the server told last holds until it tells something else. A server that
// is gone, slow or refuses is a problem that is reported, and nothing is
// concluded from its silence.
type Kubernetes struct {
	options KubernetesOptions
	clients map[schema.GroupVersion]*rest.RESTClient
	events  *announcer
	logger  klog.Logger
	wake    chan struct{}

	mutex   sync.Mutex
	shelves map[resource]*shelf
	changed map[key]bool    // since the last delivery
	touched bool            // something else did
	allPods bool            // all pods of the cluster are wanted, not only this node's
	listed  []model.Problem // what others know
	synced  bool            // everything was known once

	// The rest belongs to Run's goroutine.
	delivered        map[key]any
	told, toldSynced bool
	problems         []model.Problem
	orphans          map[key]time.Time // slices without a service, and since when
	grace            time.Duration     // for those

	absence time.Duration // between questions for what the server does not know

	received atomic.Uint64
}

// resource is what one watch is about.
type resource uint8

const (
	services resource = iota
	endpointSlices
	ownPods
	everyPod
	namespaces
	nodes
	networkPolicies
	clusterPolicies
)

// selector leaves out, on the server's side, what other proxies or none serve.
const selector = "!" + labelProxyName + ",!" + labelHeadless

var resources = map[resource]struct {
	kind   kind
	name   string // in the API's paths
	title  string // in messages and metrics
	group  schema.GroupVersion
	object func() runtime.Object
	labels string
}{
	services:        {kindService, "services", "services", corev1.SchemeGroupVersion, func() runtime.Object { return &corev1.Service{} }, selector},
	endpointSlices:  {kindSlice, "endpointslices", "endpointslices", discoveryv1.SchemeGroupVersion, func() runtime.Object { return &discoveryv1.EndpointSlice{} }, selector},
	ownPods:         {kindPod, "pods", "pods of this node", corev1.SchemeGroupVersion, func() runtime.Object { return &corev1.Pod{} }, ""},
	everyPod:        {kindPod, "pods", "pods", corev1.SchemeGroupVersion, func() runtime.Object { return &corev1.Pod{} }, ""},
	namespaces:      {kindNamespace, "namespaces", "namespaces", corev1.SchemeGroupVersion, func() runtime.Object { return &corev1.Namespace{} }, ""},
	nodes:           {kindNode, "nodes", "nodes", corev1.SchemeGroupVersion, func() runtime.Object { return &corev1.Node{} }, ""},
	networkPolicies: {kindPolicy, "networkpolicies", "networkpolicies", networkingv1.SchemeGroupVersion, func() runtime.Object { return &networkingv1.NetworkPolicy{} }, ""},
	clusterPolicies: {kindClusterPolicy, "clusternetworkpolicies", "clusternetworkpolicies", clusterPolicyVersion, func() runtime.Object { return &policyv1beta1.ClusterNetworkPolicy{} }, ""},
}

var clusterPolicyVersion = schema.GroupVersion{Group: policyv1beta1.GroupName, Version: "v1beta1"}

// optional tells whether the API server may not know the resource.
func (r resource) optional() bool { return r == clusterPolicies }

// NewKubernetes makes a source of an API server. It does not ask it anything
// yet: a server that is not there is Run's to report and to wait for.
func NewKubernetes(options KubernetesOptions) (*Kubernetes, error) {
	config, err := restConfig(options.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.UserAgent = "mooringd/" + options.Version
	config.QPS, config.Burst = requestRate, requestBurst
	config.ContentType = protobuf
	config.AcceptContentTypes = protobuf + ",application/json"

	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme, policyv1beta1.Install} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register the API's types: %w", err)
		}
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	k := &Kubernetes{
		options:   options,
		clients:   make(map[schema.GroupVersion]*rest.RESTClient),
		logger:    logr.FromSlogHandler(quiet{options.Log.Handler()}),
		wake:      make(chan struct{}, 1),
		shelves:   make(map[resource]*shelf),
		changed:   make(map[key]bool),
		delivered: make(map[key]any),
		orphans:   make(map[key]time.Time),
		grace:     orphanGrace,
		absence:   absencePeriod,
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return meter{next, &k.received} })
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("reach the Kubernetes API as %s says: %w", origin(options.Kubeconfig), err)
	}
	client := func(group schema.GroupVersion) (*rest.RESTClient, error) {
		one := *config
		one.GroupVersion = &group
		if one.APIPath = "/apis"; group.Group == "" {
			one.APIPath = "/api"
		}
		if group == clusterPolicyVersion { // custom resources are JSON
			one.ContentType, one.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
		}
		made, err := rest.RESTClientForConfigAndClient(&one, transport)
		if err != nil {
			return nil, fmt.Errorf("make a client of %s: %w", group, err)
		}
		return made, nil
	}
	for _, group := range []schema.GroupVersion{corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion, networkingv1.SchemeGroupVersion, clusterPolicyVersion} {
		if k.clients[group], err = client(group); err != nil {
			return nil, err
		}
	}
	// Of its own, so that a flood of Events does not slow the watches.
	events, err := client(corev1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	k.events = newAnnouncer(events, options.NodeName, k.poked, options.Log)
	wanted := []resource{services, endpointSlices, nodes, ownPods}
	if options.Policies {
		wanted = append(wanted, namespaces, networkPolicies, clusterPolicies)
	}
	for _, r := range wanted {
		k.shelves[r] = newShelf(k, r)
	}
	return k, nil
}

func origin(kubeconfig string) string {
	if kubeconfig == "" {
		return "the pod's own account"
	}
	return kubeconfig
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("use the pod's own account for the Kubernetes API: %w", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig %s: %w", kubeconfig, err)
	}
	return config, nil
}

// quiet makes the client library's complaints debug messages: each try against
// a server that is gone is one, and what they mean is in the problems.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, _ slog.Level) bool {
	return q.Handler.Enabled(ctx, slog.LevelDebug)
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }
func (q quiet) WithGroup(name string) slog.Handler       { return quiet{q.Handler.WithGroup(name)} }

// Run watches the API server, delivers all that is of interest once all of it is
// known, and then every change, until the context ends.
func (k *Kubernetes) Run(ctx context.Context, sink Sink) error {
	ctx = klog.NewContext(ctx, k.logger)
	klog.SetLogger(k.logger) // for what the library logs without a context
	k.mutex.Lock()
	for _, s := range k.shelves {
		s.start(ctx)
	}
	k.touched = true // the first delivery says that nothing is known yet
	k.mutex.Unlock()
	go k.events.run(ctx)
	k.poke()
	ticker := time.NewTicker(orphanPeriod)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
			k.mutex.Lock()
			k.touched = true
			k.mutex.Unlock()
		case <-k.wake:
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(gather):
			}
		}
		k.followPolicies(ctx)
		k.deliver(sink, time.Now())
	}
}

func (k *Kubernetes) poke() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// poked is for those who changed what list gives.
func (k *Kubernetes) poked() {
	k.mutex.Lock()
	k.touched = true
	k.mutex.Unlock()
	k.poke()
}

// Announce makes Events of problems with objects of the API, whoever found
// them: all that there are at this time. Those of this source are announced
// without it.
func (k *Kubernetes) Announce(problems []model.Problem) {
	k.mutex.Lock()
	same := slices.Equal(k.listed, problems)
	k.listed = problems
	k.touched = k.touched || !same
	k.mutex.Unlock()
	if !same {
		k.poke()
	}
}

// followPolicies watches all pods as long as there is a network policy: which
// pods a policy names is in their labels. Where there is none, a node needs to
// know its own only.
func (k *Kubernetes) followPolicies(ctx context.Context) {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	want, other := ownPods, everyPod
	for _, r := range []resource{networkPolicies, clusterPolicies} {
		policies := k.shelves[r]
		if policies == nil || !policies.synced {
			return
		}
		if len(policies.objects) > 0 {
			want, other = everyPod, ownPods
		}
	}
	k.allPods = want == everyPod
	if k.shelves[want] == nil {
		k.shelves[want] = newShelf(k, want)
		k.shelves[want].start(ctx)
	}
	// The one in use stays until the other can take its place.
	if old := k.shelves[other]; old != nil && k.shelves[want].synced {
		old.stop()
		delete(k.shelves, other)
		for key := range old.objects {
			k.changed[key] = true
		}
		for key := range k.shelves[want].objects {
			k.changed[key] = true
		}
	}
}

// complete tells whether everything is known. The mutex is held.
func (k *Kubernetes) complete() bool {
	for _, s := range k.shelves {
		if !s.synced {
			return false
		}
	}
	return true
}

// value is what there is of an object now. The mutex is held.
func (k *Kubernetes) value(at key) any {
	for r, s := range k.shelves {
		if resources[r].kind != at.kind {
			continue
		}
		if held := s.objects[at]; held != nil {
			return held.value
		}
	}
	return nil
}

// deliver tells the sink what became different since it was told last.
func (k *Kubernetes) deliver(sink Sink, now time.Time) {
	k.mutex.Lock()
	if !k.touched && len(k.changed) == 0 {
		k.mutex.Unlock()
		return
	}
	k.touched = false
	k.synced = k.synced || k.complete()
	changes := model.Changes{Synced: k.synced}
	if k.synced {
		// A policy names pods: it must not meet a part of them.
		held := k.allPods && (k.shelves[everyPod] == nil || !k.shelves[everyPod].synced)
		for at := range k.changed {
			if held && at.kind.policy() {
				continue
			}
			delete(k.changed, at)
			value := k.value(at)
			before, had := k.delivered[at]
			if value == nil {
				if delete(k.delivered, at); had {
					put(&changes, at, nil)
				}
				continue
			}
			k.delivered[at] = value
			if !had || !reflect.DeepEqual(before, value) {
				put(&changes, at, value)
			}
		}
	}
	changes.Problems = k.list(now)
	announced := append(slices.Clone(changes.Problems), k.listed...)
	k.events.set(announced, k.identify)
	k.mutex.Unlock()

	if k.told && changes.Len() == 0 && changes.Synced == k.toldSynced && slices.Equal(changes.Problems, k.problems) {
		return
	}
	if changes.Synced && !k.toldSynced {
		k.options.Log.Info("objects of the Kubernetes API are known", "objects", changes.Len())
	}
	k.told, k.toldSynced, k.problems = true, changes.Synced, changes.Problems
	sink(changes)
}

// list gives all problems as they stand. The mutex is held.
func (k *Kubernetes) list(now time.Time) []model.Problem {
	var problems []model.Problem
	for _, s := range k.shelves {
		if message := s.ailment(); message != "" {
			problems = append(problems, model.Problem{Object: "Kubernetes API", Field: resources[s.resource].title, Message: message})
		}
		for at := range s.ailing {
			problems = append(problems, s.objects[at].problems...)
		}
	}
	if message := k.events.ailment(); message != "" {
		problems = append(problems, model.Problem{Object: "Kubernetes API", Field: "events", Message: message})
	}
	problems = append(problems, k.unowned(now)...)
	slices.SortFunc(problems, model.CompareProblems)
	return problems
}

// unowned reports slices that no service belongs to and that do not go. The
// mutex is held.
func (k *Kubernetes) unowned(now time.Time) (problems []model.Problem) {
	if !k.synced {
		return nil
	}
	for at, held := range k.shelves[endpointSlices].objects {
		slice, ok := held.value.(*model.EndpointSlice)
		if !ok {
			continue
		}
		if k.shelves[services].objects[key{kindService, slice.Service}] != nil {
			delete(k.orphans, at)
			continue
		}
		since, known := k.orphans[at]
		if !known {
			k.orphans[at] = now
		} else if now.Sub(since) >= k.grace {
			problems = append(problems, model.Problem{Object: at.String(), Field: "metadata.labels", Message: fmt.Sprintf(
				"names Service %s in %s, which is not there: nobody uses these endpoints", slice.Service, discoveryv1.LabelServiceName)})
		}
	}
	for at := range k.orphans {
		if k.shelves[endpointSlices].objects[at] == nil {
			delete(k.orphans, at)
		}
	}
	return problems
}

// identify finds the object that a problem is about. The mutex is held.
func (k *Kubernetes) identify(object string) (*corev1.ObjectReference, bool) {
	kindName, name, _ := strings.Cut(object, " ")
	known, ok := kinds[kindName]
	if !ok || name == "" {
		return nil, false
	}
	at := key{kind: known.kind, name: model.Name{Name: name}}
	if known.kind.namespaced() {
		at.name.Namespace, at.name.Name, _ = strings.Cut(name, "/")
	}
	reference := &corev1.ObjectReference{Kind: kindName, APIVersion: known.apiVersion, Namespace: at.name.Namespace, Name: at.name.Name}
	for r, s := range k.shelves {
		if held := s.objects[at]; held != nil && resources[r].kind == known.kind {
			reference.UID = held.uid
			return reference, true
		}
	}
	return nil, false
}

// WatchStatus is how it stands with one kind of object at the API server.
type WatchStatus struct {
	Resource  string
	Connected bool // the last question was answered
	Synced    bool // everything of it is known
	Objects   int
	Events    uint64 // objects that the server told of
	Errors    uint64 // questions that it did not answer
}

// Watches tells how it stands with the API server, for metrics.
func (k *Kubernetes) Watches() []WatchStatus {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	var list []WatchStatus
	for r, s := range k.shelves {
		list = append(list, WatchStatus{resources[r].title, s.trouble == "" && s.answered, s.synced, len(s.objects), s.told, s.errors})
	}
	slices.SortFunc(list, func(a, b WatchStatus) int { return strings.Compare(a.Resource, b.Resource) })
	return list
}

// Received counts the bytes that the API server has sent.
func (k *Kubernetes) Received() uint64 { return k.received.Load() }

// shelf holds the objects of one resource as the server told them. It is the
// store of a client library's reflector, which lists, watches, continues where
// it was cut off and begins anew where the server cannot.
type shelf struct {
	source   *Kubernetes
	resource resource
	cancel   context.CancelFunc

	// Below the source's mutex.
	stopped  bool
	synced   bool
	objects  map[key]*held
	ailing   map[key]bool // objects with problems
	trouble  string       // with the server
	since    time.Time
	answered bool
	told     uint64
	errors   uint64
}

// held is an object that the server has. Its value is nil where Mooring has
// nothing to do with it.
type held struct {
	value    any
	uid      types.UID // for Events; pods are many and have it with problems only
	problems []model.Problem
}

// converted is an object between the reflector, which wants the API's names of
// it, and the shelf.
type converted struct {
	metav1.ObjectMeta
	key  key
	held *held
}

func newShelf(k *Kubernetes, r resource) *shelf {
	return &shelf{source: k, resource: r, objects: make(map[key]*held), ailing: make(map[key]bool)}
}

func (s *shelf) start(ctx context.Context) {
	ctx, s.cancel = context.WithCancel(ctx)
	about := resources[s.resource]
	list := cache.NewFilteredListWatchFromClient(s.source.clients[about.group], about.name, metav1.NamespaceAll, func(options *metav1.ListOptions) {
		options.LabelSelector = about.labels
		if s.resource == ownPods {
			options.FieldSelector = "spec.nodeName=" + s.source.options.NodeName
		}
	})
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			o, err := list.ListWithContext(ctx, options)
			s.heard(ctx, err)
			return o, s.pause(ctx, err)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			w, err := list.WatchWithContext(ctx, options)
			s.heard(ctx, err)
			return w, s.pause(ctx, err)
		},
	}, about.object(), s, cache.ReflectorOptions{
		Logger: &s.source.logger,
		Name:   about.title,
		Backoff: &wait.Backoff{
			Duration: retryFirst, Cap: retryMaximum, Factor: 2, Jitter: 0.5,
			Steps: int(retryMaximum / retryFirst),
		},
	})
	go reflector.RunWithContext(ctx)
}

// stop ends the watch. The source's mutex is held: what the watch says after
// this is not heard.
func (s *shelf) stop() {
	s.stopped = true
	s.cancel()
}

// absent tells whether an answer is that the server does not know the resource,
// and need not. What it knew a moment ago it does not forget so.
func (s *shelf) absent(err error) bool {
	return s.resource.optional() && apierrors.IsNotFound(err) && len(s.objects) == 0
}

// pause leaves the server alone for a while with a question it does not understand.
func (s *shelf) pause(ctx context.Context, err error) error {
	s.source.mutex.Lock()
	absent := s.absent(err)
	s.source.mutex.Unlock()
	if absent {
		select {
		case <-ctx.Done():
		case <-time.After(wait.Jitter(s.source.absence, 0.5)):
		}
	}
	return err
}

// heard takes note of an answer, or that there was none.
func (s *shelf) heard(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	k := s.source
	k.mutex.Lock()
	defer k.mutex.Unlock()
	absent := s.absent(err)
	if absent && !s.synced {
		k.options.Log.Info("Kubernetes API does not know a resource; it is looked for again now and then", "about", resources[s.resource].title)
		s.synced, k.touched = true, true
		k.poke()
	}
	if err == nil || absent {
		s.answered = true
		if s.trouble != "" {
			k.options.Log.Info("Kubernetes API answers again", "about", resources[s.resource].title, "after", time.Since(s.since).Round(time.Millisecond))
			s.trouble, k.touched = "", true
			k.poke()
		}
		return
	}
	// The reflector begins anew by itself, which is no trouble yet; and it lists
	// where a server knows no streaming lists.
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsInvalid(err) {
		return
	}
	s.errors++
	message := s.explain(err)
	if s.trouble == "" {
		s.since = time.Now()
		k.options.Log.Warn("Kubernetes API does not answer", "about", resources[s.resource].title, "error", message)
	}
	if s.trouble != message {
		s.trouble, k.touched = message, true
		k.poke()
	}
}

// explain says what an error means, without the question's parameters.
func (s *shelf) explain(err error) string {
	var failed *url.Error
	switch {
	case apierrors.IsForbidden(err):
		return err.Error() + "; grant it to mooringd's account (conf/kubernetes has the ClusterRole)"
	case apierrors.IsUnauthorized(err):
		return err.Error() + "; the credentials are not accepted (any more)"
	case errors.As(err, &failed):
		server := failed.URL
		if u, parseErr := url.Parse(failed.URL); parseErr == nil {
			server = u.Host
		}
		return fmt.Sprintf("%s: %v", server, failed.Err)
	}
	return err.Error()
}

// ailment is what is wrong with the watch.
func (s *shelf) ailment() string {
	switch {
	case s.trouble != "" && s.synced:
		return fmt.Sprintf("no news since %s, what is known stays in use: %s", s.since.UTC().Format("2006-01-02 15:04:05Z"), s.trouble)
	case s.trouble != "":
		return "not known yet: " + s.trouble
	case !s.synced:
		return "not known yet: the server has not answered in full"
	}
	return ""
}

// Transformer makes the reflector itself hold nothing larger than the nouns.
func (s *shelf) Transformer() cache.TransformFunc {
	return func(o any) (any, error) { return s.convert(o) }
}

func (s *shelf) convert(o any) (*converted, error) {
	if c, done := o.(*converted); done {
		return c, nil
	}
	var meta *metav1.ObjectMeta
	r := &report{}
	h := &held{}
	at := key{kind: resources[s.resource].kind}
	switch o := o.(type) {
	case *corev1.Service:
		meta = &o.ObjectMeta
		r.object = "Service " + nameOf(meta).String()
		if service := convertService(o, r); service != nil {
			h.value = service
		}
	case *discoveryv1.EndpointSlice:
		meta = &o.ObjectMeta
		r.object = "EndpointSlice " + nameOf(meta).String()
		if slice := convertSlice(o, r); slice != nil {
			h.value = slice
		}
	case *corev1.Pod:
		meta = &o.ObjectMeta
		r.object = "Pod " + nameOf(meta).String()
		h.value = convertPod(o, r)
	case *corev1.Namespace:
		meta = &o.ObjectMeta
		h.value = convertNamespace(o)
	case *corev1.Node:
		meta = &o.ObjectMeta
		r.object = "Node " + o.Name
		h.value = convertNode(o, r)
	case *networkingv1.NetworkPolicy:
		meta = &o.ObjectMeta
		r.object = "NetworkPolicy " + nameOf(meta).String()
		if policy, ok := convertPolicy(o, r); ok {
			h.value = policy
		} else {
			r.add("", "the policy is refused")
		}
	case *policyv1beta1.ClusterNetworkPolicy:
		meta = &o.ObjectMeta
		r.object = "ClusterNetworkPolicy " + o.Name
		if policy, ok := convertClusterPolicy(o, r); ok {
			h.value = policy
		} else {
			r.add("", "the policy is refused")
		}
	default:
		return nil, fmt.Errorf("%T came among the %s", o, resources[s.resource].title)
	}
	if at.name = (model.Name{Name: meta.Name}); at.kind.namespaced() {
		at.name = nameOf(meta)
	}
	if h.problems = r.problems; at.kind != kindPod || len(h.problems) > 0 {
		h.uid = meta.UID
	}
	return &converted{ObjectMeta: metav1.ObjectMeta{Namespace: at.name.Namespace, Name: at.name.Name}, key: at, held: h}, nil
}

// Add is called by the reflector, as are the following.
func (s *shelf) Add(o any) error { return s.put(o) }

// Update replaces an object.
func (s *shelf) Update(o any) error { return s.put(o) }

func (s *shelf) put(o any) error {
	c, err := s.convert(o)
	if err != nil {
		return err
	}
	k := s.source
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if s.stopped {
		return nil
	}
	s.told++
	s.set(c)
	k.poke()
	return nil
}

// set puts an object in its place. A policy that became unsound keeps its
// definition before. The source's mutex is held.
func (s *shelf) set(c *converted) {
	if before := s.objects[c.key]; c.held.value == nil && c.key.kind.policy() && before != nil {
		c.held.value = before.value
	}
	s.objects[c.key] = c.held
	s.source.changed[c.key] = true
	if delete(s.ailing, c.key); len(c.held.problems) > 0 {
		s.ailing[c.key] = true
		s.source.touched = true
	}
}

// Delete forgets an object.
func (s *shelf) Delete(o any) error {
	c, err := s.convert(o)
	if err != nil {
		return err
	}
	k := s.source
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if s.stopped {
		return nil
	}
	s.told++
	s.forget(c.key)
	k.poke()
	return nil
}

func (s *shelf) forget(at key) {
	delete(s.objects, at)
	delete(s.ailing, at)
	s.source.changed[at] = true
}

// Replace takes all that there is: what is not in it was deleted while nobody
// was told.
func (s *shelf) Replace(list []any, _ string) error {
	all := make([]*converted, len(list))
	for i := range list {
		var err error
		if all[i], err = s.convert(list[i]); err != nil {
			return err
		}
		list[i] = nil
	}
	k := s.source
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if s.stopped {
		return nil
	}
	there := make(map[key]bool, len(all))
	for _, c := range all {
		there[c.key] = true
		s.told++
		s.set(c)
	}
	for at := range maps.Clone(s.objects) {
		if !there[at] {
			s.forget(at)
		}
	}
	s.synced = true
	k.touched = true
	k.poke()
	return nil
}

// Resync has nothing to do: nobody is told twice.
func (s *shelf) Resync() error { return nil }

// meter counts what the server sends.
type meter struct {
	http.RoundTripper
	received *atomic.Uint64
}

func (m meter) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := m.RoundTripper.RoundTrip(request)
	if err == nil && response.Body != nil {
		response.Body = metered{response.Body, m.received}
	}
	return response, err
}

type metered struct {
	io.ReadCloser
	received *atomic.Uint64
}

func (m metered) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	m.received.Add(uint64(n))
	return n, err
}
