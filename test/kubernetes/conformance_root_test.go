// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"encoding/xml"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

var (
	focus   = flag.String("focus", "", "of the upstream suite: a regular expression; the chosen specs when empty, \"all\" for all that are about services and pods' networks")
	proxy   = flag.String("proxy", "mooring", "what is tested: mooring, or kube-proxy (with the bridge plugin)")
	results = flag.String("results", "", "file to which each spec's result is written, a line each")
	shards  = flag.Int("shards", 3, "how many processes of the suite share the specs")
	nodes   = flag.Int("nodes", 2, "of the suite's cluster; one spec wants three")
)

// The suite's parts that are about what Mooring does, and what is left out of
// them: specs that take minutes, want a cluster to themselves or a cloud.
const (
	ourFocus = `\[sig-network\] (Services|Networking|Conntrack|HostPort|DNS|Connectivity Pod Lifecycle)`
	ourSkip  = `\[Slow\]|\[Serial\]|\[Disruptive\]|\[Flaky\]|\[Feature|FeatureGate|\[Provider`
)

// chosen run always: one of each kind. Each is a regular expression that finds
// one spec.
var chosen = []string{
	`Services should serve a basic endpoint from pods`,
	`Services should serve multiport endpoints from pods`,
	`Services should have session affinity work for service with type clusterIP`,
	`Services should be rejected when no endpoints exist`,
	`Services should serve endpoints on same port and different protocols`,
	`Services should allow pods to hairpin back to themselves through services`,
	`Services should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster`,
	`Conntrack should be able to preserve UDP traffic when server pod cycles for a ClusterIP service$`,
	`Networking Granular Checks: Pods should function for intra-pod communication: http`,
	`Networking Granular Checks: Services should function for pod-Service: udp`,
	`HostPort validates that there is no conflict`,
	`DNS should provide DNS for services`,
	`Connectivity Pod Lifecycle should be able to connect from a Pod to a terminating Pod`,
}

// makeRootfs makes a small Debian that has the tools which specs call, where
// there is none yet.
func makeRootfs(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.RemoveAll(path + ".new"); err != nil { // of a run that was ended
		return err
	}
	command := exec.Command("debootstrap", "--variant=minbase", "--include=curl,wget,netcat-openbsd,iproute2,dnsutils,socat,iperf", "bookworm", path+".new")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap: %w\n%s", err, out)
	}
	return os.Rename(path+".new", path)
}

// conformanceImages are all images of the suite's pods: agnhost in the small
// Debian, and the server of one spec.
func (c *Cluster) conformanceImages(t *testing.T, rootfs string) (archives []string) {
	t.Helper()
	out, err := exec.Command(filepath.Join(c.bin, "e2e"), "--list-images").Output()
	if err != nil {
		t.Fatalf("list the suite's images: %v", err)
	}
	var names []string
	regression := ""
	for name := range strings.FieldsSeq(string(out)) {
		switch {
		case strings.Contains(name, "/regression-issue-74839:"):
			regression = name
		case strings.Contains(name, "/agnhost:"), strings.Contains(name, "/busybox:"), strings.Contains(name, "/glibc-dns-testing:"), strings.Contains(name, "/nginx:"):
			names = append(names, name)
		}
	}
	if regression == "" || len(names) == 0 {
		t.Fatalf("the suite's images are\n%s", out)
	}
	agnhost, coredns := filepath.Join(c.bin, "agnhost"), filepath.Join(c.bin, "coredns")
	path := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for i, image := range []containerd.Image{
		{Names: names, Base: rootfs, Files: map[string]string{"/agnhost": agnhost, "/agnhost-2": agnhost, "/coredns": coredns}, Entrypoint: []string{"/agnhost"}, Command: []string{"pause"}, Environment: path},
		{Names: []string{regression}, Files: map[string]string{"/regression-issue-74839": filepath.Join(c.bin, "regression-issue-74839")}, Entrypoint: []string{"/regression-issue-74839"}, Environment: path},
	} {
		archive := c.path(fmt.Sprintf("conformance-%d.tar", i))
		if err := image.Write(archive); err != nil {
			t.Fatal(err)
		}
		archives = append(archives, archive)
	}
	return archives
}

// serveDNS runs the cluster's DNS server beside the control plane.
func (c *Cluster) serveDNS(t *testing.T) {
	t.Helper()
	corefile := fmt.Sprintf(`.:53 {
	bind %s
	kubernetes cluster.local in-addr.arpa ip6.arpa {
		kubeconfig %s
		pods insecure
		fallthrough in-addr.arpa ip6.arpa
	}
	cache 5
}
`, netns.Router, c.Kubeconfig("admin"))
	if err := os.WriteFile(c.path("Corefile"), []byte(corefile), 0o644); err != nil {
		t.Fatal(err)
	}
	c.run("coredns", "-conf", c.path("Corefile"))
	c.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: %s, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
endpoints: [{addresses: [%s], conditions: {ready: true}}]
`, DNSIP, netns.Router))
}

// routePods lets the API server reach pods, as its proxy does for some specs.
func (c *Cluster) routePods(t *testing.T) {
	t.Helper()
	for _, n := range c.Nodes {
		c.Outside.Sh(t, fmt.Sprintf("ip route add %s via %s; ip -6 route add %s via %s", n.PodCIDRs[0], n.IP, n.PodCIDRs[1], n.IP6))
	}
}

// startKubeProxy makes a node as most clusters have it, to compare with.
func (n *Node) startKubeProxy(t *testing.T, others []*Node) {
	t.Helper()
	for _, other := range others {
		if other != n {
			n.Sh(t, fmt.Sprintf("ip route add %s via %s; ip -6 route add %s via %s", other.PodCIDRs[0], other.IP, other.PodCIDRs[1], other.IP6))
		}
	}
	n.cluster.processes["kube-proxy-"+n.NodeName] = n.Command(filepath.Join(n.cluster.bin, "kube-proxy"), "--kubeconfig="+n.cluster.Kubeconfig("admin"),
		"--hostname-override="+n.NodeName, "--proxy-mode=nftables", "--cluster-cidr="+PodCIDRs,
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0").In(n.Runtime.Cgroup).Background(t)
	n.Runtime.Install(t, fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "bridge-%s", "plugins": [
		{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": true,
		 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}], [{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}, %s]}`,
		n.Name(), filepath.Join(n.Dir, "host-local"), n.PodCIDRs[0], n.PodCIDRs[1], portmap))
}

type spec struct {
	Name    string  `xml:"name,attr"`
	Status  string  `xml:"status,attr"`
	Seconds float64 `xml:"time,attr"`
	Failure string  `xml:"failure"`
	Skipped struct {
		Message string `xml:"message,attr"`
	} `xml:"skipped"`
}

// why a spec that was to run skipped itself; empty for one that was not to run.
func (s spec) why() string {
	reason, itself := strings.CutPrefix(s.Skipped.Message, "skipped - ")
	if !itself || s.Status != "skipped" {
		return ""
	}
	return reason
}

// specs are the results that the suite has left in a directory.
func specs(directory string) (ran []spec, err error) {
	reports, err := filepath.Glob(filepath.Join(directory, "junit*.xml"))
	if err != nil {
		return nil, err
	}
	for _, report := range reports {
		content, err := os.ReadFile(report)
		if err != nil {
			return nil, err
		}
		var suites struct {
			Cases []spec `xml:"testsuite>testcase"`
		}
		if err := xml.Unmarshal(content, &suites); err != nil {
			return nil, fmt.Errorf("read %s: %w", report, err)
		}
		for _, s := range suites.Cases {
			if strings.HasPrefix(s.Name, "[It]") && (s.Status != "skipped" || s.why() != "") {
				ran = append(ran, s)
			}
		}
	}
	return ran, nil
}

// Of what the suite reports, most were not to run.
func TestResultsOfSpecs(t *testing.T) {
	directory := t.TempDir()
	if err := os.WriteFile(filepath.Join(directory, "junit_01.xml"), []byte(`<testsuites><testsuite>
<testcase name="[SynchronizedBeforeSuite]" status="passed" time="1"></testcase>
<testcase name="[It] passes" status="passed" time="2"></testcase>
<testcase name="[It] fails" status="failed" time="3"><failure message="m">why</failure></testcase>
<testcase name="[It] is not to run" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
<testcase name="[It] skips itself" status="skipped" time="4"><skipped message="skipped - Need at least 3 nodes"></skipped></testcase>
</testsuite></testsuites>`), 0o644); err != nil {
		t.Fatal(err)
	}
	ran, err := specs(directory)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range ran {
		got = append(got, fmt.Sprintf("%s %s %s%s", s.Name, s.Status, s.Failure, s.why()))
	}
	want := []string{"[It] passes passed ", "[It] fails failed why", "[It] skips itself skipped Need at least 3 nodes"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// names are the full names of all specs of the suite.
func (c *Cluster) names(t *testing.T) (names []string) {
	t.Helper()
	out, err := exec.Command(filepath.Join(c.bin, "e2e"), "--list-tests").Output()
	if err != nil {
		t.Fatalf("list the suite's specs: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		// file:line: name
		if parts := strings.SplitN(strings.TrimSpace(line), ": ", 2); len(parts) == 2 {
			names = append(names, parts[1])
		}
	}
	if len(names) == 0 {
		t.Fatalf("the suite lists no specs:\n%s", out)
	}
	return names
}

// selected are the names of the specs that a regular expression finds, or of
// the chosen ones: each of those must be there.
func selected(t *testing.T, names []string, focus string) (found []string) {
	t.Helper()
	left := regexp.MustCompile(ourSkip)
	find := func(expression string) (found []string) {
		re, err := regexp.Compile(expression)
		if err != nil {
			t.Fatalf("-focus: %v", err)
		}
		for _, name := range names {
			if re.MatchString(name) && !left.MatchString(name) {
				found = append(found, name)
			}
		}
		return found
	}
	switch focus {
	case "all":
		return find(ourFocus)
	case "":
		for _, c := range chosen {
			one := find(`^\[sig-network\] ` + c)
			if len(one) != 1 {
				t.Errorf("%q finds %d specs, not one: %q", c, len(one), one)
			}
			found = append(found, one...)
		}
		return found
	}
	return find(focus)
}

// runSpecs runs specs by their names, and returns what the suite says of each.
func (c *Cluster) runSpecs(reports string, names []string, limit time.Duration) ([]spec, error) {
	arguments := []string{"--kubeconfig=" + c.Kubeconfig("admin"), "--provider=skeleton", "--num-nodes=" + strconv.Itoa(len(c.Nodes)),
		"--disable-log-dump", "--report-dir=" + reports, "--ginkgo.no-color", "--ginkgo.timeout=" + limit.String()}
	for _, name := range names {
		arguments = append(arguments, "--ginkgo.focus= "+regexp.QuoteMeta(name)+"$") // the suite's name comes before
	}
	command := c.Outside.Command(filepath.Join(c.bin, "e2e"), arguments...).In(c.cgroup)
	command.Env = append(os.Environ(), "PATH="+c.bin+":"+os.Getenv("PATH"))
	out, failed := command.CombinedOutput()
	ran, err := specs(reports)
	if err != nil {
		return nil, err
	}
	if len(ran) != len(names) {
		return ran, fmt.Errorf("%d specs were to run, %d ran (%v):\n%s", len(names), len(ran), failed, out[max(0, len(out)-20000):])
	}
	return ran, nil
}

// TestConformance runs specs of Kubernetes' own suite in a cluster that has no
// kube-proxy.
func TestConformance(t *testing.T) {
	t.Parallel()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	rootfs, made := filepath.Join(programsDirectory(t, root), "rootfs"), make(chan error, 1)
	go func() { made <- makeRootfs(rootfs) }()
	// First what other tests wait for: their clusters run while the rest is built.
	buildPrograms(t, root, packages)
	programs := conformancePackages
	if *proxy == "kube-proxy" {
		programs = append(slices.Clone(programs), kubeProxy)
	}
	buildPrograms(t, root, programs)
	if err := <-made; err != nil {
		t.Fatalf("make the images' file system: %v", err)
	}
	c := Start(t, *nodes)
	c.Apply(t, rights(t))
	archives := c.conformanceImages(t, rootfs)
	for _, n := range c.Nodes {
		for _, archive := range archives {
			n.Runtime.Import(t, archive)
		}
		switch *proxy {
		case "mooring":
			n.StartMooring("metricsAddress: 127.0.0.1:10249\n") // kube-proxy's, which a spec asks
			n.Runtime.Install(t, containerd.Conflist(n.Node, "1.0.0", portmap))
		case "kube-proxy":
			n.startKubeProxy(t, c.Nodes)
		default:
			t.Fatalf("-proxy %s: mooring or kube-proxy", *proxy)
		}
	}
	c.routePods(t)
	c.serveDNS(t)
	for _, n := range c.Nodes {
		c.Eventually(5*time.Minute, n.NodeName+" is ready", func() bool {
			ready, _ := c.ready(n)
			return ready
		})
	}

	names := selected(t, c.names(t), *focus)
	if len(names) == 0 {
		t.Fatalf("-focus %s finds no spec", *focus)
	}
	limit := 20 * time.Minute
	if *focus != "" {
		limit = 150 * time.Minute
	}
	start := time.Now()
	var ran []spec
	var mutex sync.Mutex
	var all sync.WaitGroup
	for i := range min(*shards, len(names)) {
		all.Go(func() {
			var mine []string
			for k := i; k < len(names); k += *shards {
				mine = append(mine, names[k])
			}
			some, err := c.runSpecs(c.path("reports", strconv.Itoa(i)), mine, limit)
			mutex.Lock()
			defer mutex.Unlock()
			ran = append(ran, some...)
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	slices.SortFunc(ran, func(a, b spec) int { return strings.Compare(a.Name, b.Name) })
	var lines strings.Builder
	passed := 0
	for _, s := range ran {
		name := strings.TrimPrefix(s.Name, "[It] ")
		fmt.Fprintf(&lines, "%s\t%.0f\t%s\n", s.Status, s.Seconds, name)
		switch {
		case s.Status == "passed":
			passed++
		case s.why() != "" && *focus != "":
			t.Logf("%s: %s: %s", s.Status, name, s.why())
		default: // nor may one of the chosen skip itself
			t.Errorf("%s: %s\n%s%s", s.Status, name, s.Failure, s.why())
		}
	}
	t.Logf("%d of %d specs passed in %v with %s\n%s", passed, len(ran), time.Since(start).Round(time.Second), *proxy, &lines)
	if *results != "" {
		if err := os.WriteFile(*results, []byte(lines.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
