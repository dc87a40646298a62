// SPDX-License-Identifier: Apache-2.0

package source

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Labels of the API that tell what an object is for.
const (
	labelProxyName = "service.kubernetes.io/service-proxy-name"
	labelHeadless  = corev1.IsHeadlessService
	// What the cluster's autoscaler marks a node with before it removes it.
	taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"
)

const defaultAffinityTimeout = 3 * time.Hour // v1.DefaultClientIPServiceAffinitySeconds

// report collects what is wrong with one object while it is converted. Its
// fields are paths as the API server's own validation writes them.
type report struct {
	object   string
	problems []model.Problem
	// broken are the paths whose value had the wrong type: decoding has
	// reported them and left a zero value there, which says nothing.
	broken map[string]bool
}

func (r *report) add(field, format string, args ...any) {
	r.problems = append(r.problems, model.Problem{Object: r.object, Field: field, Message: fmt.Sprintf(format, args...)})
}

// skips tells whether decoding has already reported a list's element.
func (r *report) skips(list string, i int) bool {
	return len(r.broken) > 0 && r.broken[at(list, i)]
}

// breaks tells whether a value of the wrong type was at a path or below it.
func (r *report) breaks(path string) bool {
	for broken := range r.broken {
		if rest, below := strings.CutPrefix(broken, path); below && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return true
		}
	}
	return false
}

func at(list string, i int) string { return list + "[" + strconv.Itoa(i) + "]" }

// intern makes the many copies of one string, such as a node's name in every
// endpoint, one.
func intern(s string) string {
	if s == "" {
		return ""
	}
	return unique.Make(s).Value()
}

func nameOf(o *metav1.ObjectMeta) model.Name {
	namespace := o.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	return model.Name{Namespace: intern(namespace), Name: o.Name}
}

// address reads an IP address that can serve somebody: specified, and in its
// usual notation, since leading zeros and mapped addresses mean different
// hosts to different readers.
func (r *report) address(field, text string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		r.add(field, "%q is not an IP address", text)
	case addr.Zone() != "":
		r.add(field, "%q has a zone, which means nothing on other nodes", text)
	case addr.Is4In6():
		r.add(field, "%q is an IPv4 address in IPv6 notation; write %s", text, addr.Unmap())
	case addr.IsUnspecified():
		r.add(field, "%q is the unspecified address", text)
	case addr.IsLoopback():
		r.add(field, "%q is a loopback address", text)
	case addr.IsLinkLocalUnicast(), addr.IsLinkLocalMulticast():
		r.add(field, "%q is a link-local address", text)
	case addr.IsMulticast():
		r.add(field, "%q is a multicast address", text)
	case !addr.IsGlobalUnicast():
		r.add(field, "%q is the broadcast address", text)
	default:
		return addr, true
	}
	return netip.Addr{}, false
}

func (r *report) prefix(field, text string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(strings.TrimSpace(text))
	switch {
	case err != nil:
		r.add(field, "%q is not a CIDR such as 203.0.113.0/24 or 2001:db8::/32", text)
	case prefix.Addr().Is4In6():
		r.add(field, "%q is an IPv4 block in IPv6 notation", text)
	default:
		return prefix.Masked(), true
	}
	return netip.Prefix{}, false
}

func (r *report) port(field string, port int32) (uint16, bool) {
	if port < 1 || port > 65535 {
		r.add(field, "%d is not a port; want 1 to 65535", port)
		return 0, false
	}
	return uint16(port), true
}

func (r *report) protocol(field string, protocol corev1.Protocol) (model.Protocol, bool) {
	switch protocol {
	case "", corev1.ProtocolTCP:
		return model.TCP, true
	case corev1.ProtocolUDP:
		return model.UDP, true
	case corev1.ProtocolSCTP:
		return model.SCTP, true
	}
	r.add(field, "%q is not a protocol; want TCP, UDP or SCTP", protocol)
	return 0, false
}

// convertService gives nil for a service that is not Mooring's to serve:
// headless, an external name, or another proxy's.
func convertService(o *corev1.Service, r *report) *model.Service {
	spec := &o.Spec
	if _, others := o.Labels[labelProxyName]; others || spec.Type == corev1.ServiceTypeExternalName {
		return nil
	}
	if spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(spec.ClusterIPs, corev1.ClusterIPNone) {
		return nil
	}
	s := &model.Service{
		Name:            nameOf(&o.ObjectMeta),
		UID:             string(o.UID),
		PublishNotReady: spec.PublishNotReadyAddresses,
		Selector:        spec.Selector,
	}
	switch spec.Type {
	case "", corev1.ServiceTypeClusterIP:
	case corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer:
		s.NodePorts = true
	default:
		r.add("spec.type", "%q is not a type of service; want ClusterIP, NodePort, LoadBalancer or ExternalName; served as ClusterIP", spec.Type)
	}
	s.ClusterIPs = clusterIPs(spec, r)
	for i, text := range spec.ExternalIPs {
		if r.skips("spec.externalIPs", i) {
			continue
		}
		if addr, ok := r.address(at("spec.externalIPs", i), text); ok && !slices.Contains(s.ExternalIPs, addr) {
			s.ExternalIPs = append(s.ExternalIPs, addr)
		}
	}
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		loadBalancer(o, s, r)
	}
	switch spec.SessionAffinity {
	case "", corev1.ServiceAffinityNone:
	case corev1.ServiceAffinityClientIP:
		s.AffinityTimeout = affinityTimeout(spec, r)
	default:
		r.add("spec.sessionAffinity", "%q is not an affinity; want None or ClientIP; served without affinity", spec.SessionAffinity)
	}
	if policy := spec.InternalTrafficPolicy; policy != nil {
		switch *policy {
		case corev1.ServiceInternalTrafficPolicyCluster:
		case corev1.ServiceInternalTrafficPolicyLocal:
			s.InternalLocal = true
		default:
			r.add("spec.internalTrafficPolicy", "%q is not a policy; want Cluster or Local; served as Cluster", *policy)
		}
	}
	switch spec.ExternalTrafficPolicy {
	case "", corev1.ServiceExternalTrafficPolicyCluster:
	case corev1.ServiceExternalTrafficPolicyLocal:
		s.ExternalLocal = s.NodePorts || len(s.ExternalIPs) > 0
	default:
		r.add("spec.externalTrafficPolicy", "%q is not a policy; want Cluster or Local; served as Cluster", spec.ExternalTrafficPolicy)
	}
	if spec.HealthCheckNodePort != 0 && s.ExternalLocal && spec.Type == corev1.ServiceTypeLoadBalancer {
		s.HealthCheckNodePort, _ = r.port("spec.healthCheckNodePort", spec.HealthCheckNodePort)
	}
	if spec.TrafficDistribution != nil {
		switch d := *spec.TrafficDistribution; d {
		case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferSameNode:
			s.TrafficDistribution = d
		case "":
		default:
			r.add("spec.trafficDistribution", "%q is not a distribution; want PreferClose, PreferSameZone or PreferSameNode; ignored", d)
		}
	}
	s.Ports = servicePorts(spec.Ports, spec.Type == corev1.ServiceTypeNodePort, r)
	return s
}

func clusterIPs(spec *corev1.ServiceSpec, r *report) []netip.Addr {
	const field = "spec.clusterIPs"
	texts := spec.ClusterIPs
	if len(texts) == 0 {
		switch {
		case spec.ClusterIP != "":
			if addr, ok := r.address("spec.clusterIP", spec.ClusterIP); ok {
				return []netip.Addr{addr}
			}
		case !r.breaks("spec.clusterIP") && !r.breaks(field):
			r.add("spec.clusterIP", "is missing: the API server would allocate one, a manifest has to name it (or None)")
		}
		return nil
	}
	if spec.ClusterIP != "" && spec.ClusterIP != texts[0] {
		r.add("spec.clusterIP", "%q differs from spec.clusterIPs[0] %q; the list is used", spec.ClusterIP, texts[0])
	}
	var addrs []netip.Addr
	for i, text := range texts {
		if r.skips(field, i) {
			continue
		}
		addr, ok := r.address(at(field, i), text)
		if !ok {
			continue
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.add(at(field, i), "%q is a second address of its family; a service has one per family", text)
			continue
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

func loadBalancer(o *corev1.Service, s *model.Service, r *report) {
	const ingress = "status.loadBalancer.ingress"
	for i := range o.Status.LoadBalancer.Ingress {
		entry := &o.Status.LoadBalancer.Ingress[i]
		// A balancer that proxies sends to node ports; its own address is not ours.
		if r.skips(ingress, i) || entry.IP == "" || entry.IPMode != nil && *entry.IPMode != corev1.LoadBalancerIPModeVIP {
			continue
		}
		if addr, ok := r.address(at(ingress, i)+".ip", entry.IP); ok && !slices.Contains(s.LoadBalancerIPs, addr) {
			s.LoadBalancerIPs = append(s.LoadBalancerIPs, addr)
		}
	}
	const ranges = "spec.loadBalancerSourceRanges"
	for i, text := range o.Spec.LoadBalancerSourceRanges {
		if r.skips(ranges, i) {
			continue
		}
		if prefix, ok := r.prefix(at(ranges, i), text); ok {
			s.SourceRanges = append(s.SourceRanges, prefix)
		}
	}
	// No range means everybody, so none left of those named must not.
	if len(s.SourceRanges) == 0 && (len(o.Spec.LoadBalancerSourceRanges) > 0 || r.breaks(ranges)) {
		r.add(ranges, "none of the ranges can be read; the load balancer addresses are not served, rather than open to all")
		s.LoadBalancerIPs = nil
	}
}

func affinityTimeout(spec *corev1.ServiceSpec, r *report) time.Duration {
	config := spec.SessionAffinityConfig
	if config == nil || config.ClientIP == nil || config.ClientIP.TimeoutSeconds == nil {
		return defaultAffinityTimeout
	}
	seconds := *config.ClientIP.TimeoutSeconds
	if seconds < 1 || seconds > 86400 {
		r.add("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is out of range; want 1 to 86400; 10800 is used", seconds)
		return defaultAffinityTimeout
	}
	return time.Duration(seconds) * time.Second
}

func servicePorts(ports []corev1.ServicePort, needNodePort bool, r *report) []model.ServicePort {
	const field = "spec.ports"
	if len(ports) == 0 {
		if !r.breaks(field) {
			r.add(field, "is empty; a service needs a port to be reached")
		}
		return nil
	}
	type number struct {
		protocol model.Protocol
		port     uint16
	}
	converted := make([]model.ServicePort, 0, len(ports))
	names, numbers := make(map[string]int, len(ports)), make(map[number]int, len(ports))
	for i := range ports {
		if r.skips(field, i) {
			continue
		}
		port, ok := servicePort(&ports[i], i, r)
		if !ok {
			continue
		}
		if first, taken := names[port.Name]; taken {
			if port.Name == "" {
				r.add(at(field, i)+".name", "is missing; every port of a service with several needs a name")
			} else {
				r.add(at(field, i)+".name", "%q is also the name of spec.ports[%d], which keeps it", port.Name, first)
			}
			continue
		}
		if first, taken := numbers[number{port.Protocol, port.Port}]; taken {
			r.add(at(field, i)+".port", "%d/%s is also spec.ports[%d], which keeps it", port.Port, port.Protocol, first)
			continue
		}
		if port.NodePort == 0 && needNodePort {
			r.add(at(field, i)+".nodePort", "is missing: the API server would allocate one, a manifest has to name it")
		}
		names[port.Name], numbers[number{port.Protocol, port.Port}] = i, i
		converted = append(converted, port)
	}
	return converted
}

func servicePort(o *corev1.ServicePort, i int, r *report) (port model.ServicePort, ok bool) {
	field := func(name string) string { return at("spec.ports", i) + name }
	port.Name = intern(o.Name)
	if port.Port, ok = r.port(field(".port"), o.Port); !ok {
		return port, false
	}
	if port.Protocol, ok = r.protocol(field(".protocol"), o.Protocol); !ok {
		return port, false
	}
	if o.NodePort != 0 {
		if port.NodePort, ok = r.port(field(".nodePort"), o.NodePort); !ok {
			return port, false
		}
	}
	switch target := o.TargetPort; {
	case target.Type == intstr.Int && target.IntVal == 0, target.Type == intstr.String && target.StrVal == "":
		port.TargetPort = port.Port
	case target.Type == intstr.Int:
		port.TargetPort, ok = r.port(field(".targetPort"), target.IntVal)
	default:
		if n, err := strconv.ParseUint(target.StrVal, 10, 16); err == nil && n > 0 {
			r.add(field(".targetPort"), "%q is text; write the number without quotes; %d is used", target.StrVal, n)
			port.TargetPort = uint16(n)
			break
		}
		if errs := validation.IsValidPortName(target.StrVal); len(errs) > 0 {
			r.add(field(".targetPort"), "%q is neither a port nor a port's name: %s", target.StrVal, errs[0])
			return port, false
		}
		port.TargetName = intern(target.StrVal)
	}
	return port, ok
}

// convertSlice gives nil for a slice that belongs to no service of ours.
func convertSlice(o *discoveryv1.EndpointSlice, r *report) *model.EndpointSlice {
	if _, others := o.Labels[labelProxyName]; others {
		return nil
	}
	if _, headless := o.Labels[labelHeadless]; headless {
		return nil
	}
	service := o.Labels[discoveryv1.LabelServiceName]
	if service == "" {
		r.add("metadata.labels", "have no %s, which says whose endpoints these are; the slice is not used", discoveryv1.LabelServiceName)
		return nil
	}
	s := &model.EndpointSlice{Name: nameOf(&o.ObjectMeta)}
	s.Service = model.Name{Namespace: s.Namespace, Name: service}
	switch o.AddressType {
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
	case discoveryv1.AddressTypeFQDN:
		r.add("addressType", "FQDN endpoints cannot be reached through a service's address; the slice is not used")
		return nil
	case "":
		r.add("addressType", "is missing; want IPv4 or IPv6; the addresses' own family is used")
	default:
		r.add("addressType", "%q is not an address type; want IPv4 or IPv6; the addresses' own family is used", o.AddressType)
	}
	for i := range o.Ports {
		if r.skips("ports", i) {
			continue
		}
		if port, ok := slicePort(&o.Ports[i], i, r); ok {
			s.Ports = append(s.Ports, port)
		}
	}
	s.Endpoints = make([]model.SliceEndpoint, 0, len(o.Endpoints))
	for i := range o.Endpoints {
		if r.skips("endpoints", i) {
			continue
		}
		if endpoint, ok := sliceEndpoint(&o.Endpoints[i], i, s.Namespace, o.AddressType, r); ok {
			s.Endpoints = append(s.Endpoints, endpoint)
		}
	}
	return s
}

func slicePort(o *discoveryv1.EndpointPort, i int, r *report) (port model.EndpointPort, ok bool) {
	if o.Name != nil {
		port.Name = intern(*o.Name)
	}
	if o.Port == nil {
		r.add(at("ports", i)+".port", "is missing; want the port of the endpoints")
		return port, false
	}
	if port.Port, ok = r.port(at("ports", i)+".port", *o.Port); !ok {
		return port, false
	}
	protocol := corev1.ProtocolTCP
	if o.Protocol != nil {
		protocol = *o.Protocol
	}
	port.Protocol, ok = r.protocol(at("ports", i)+".protocol", protocol)
	return port, ok
}

func sliceEndpoint(o *discoveryv1.Endpoint, i int, namespace string, family discoveryv1.AddressType, r *report) (model.SliceEndpoint, bool) {
	e := model.SliceEndpoint{Ready: true}
	field := func(name string) string { return at("endpoints", i) + name }
	if len(o.Addresses) == 0 {
		r.add(field(".addresses"), "is empty; an endpoint has one address")
		return e, false
	}
	for j, text := range o.Addresses {
		if len(r.broken) > 0 && r.broken[at(field(".addresses"), j)] {
			continue
		}
		addr, err := netip.ParseAddr(text)
		// The plain case builds no path.
		if err != nil || addr.Zone() != "" || !addr.IsGlobalUnicast() || addr.Is4In6() {
			r.address(at(field(".addresses"), j), text)
			continue
		}
		if family == discoveryv1.AddressTypeIPv4 && !addr.Is4() || family == discoveryv1.AddressTypeIPv6 && addr.Is4() {
			r.add(at(field(".addresses"), j), "%q is not of the slice's addressType %s", text, family)
			continue
		}
		if len(e.Addresses) > 0 {
			r.add(at(field(".addresses"), j), "%q is not used: only an endpoint's first address is, as by kube-proxy; make it an endpoint of its own", text)
			break
		}
		e.Addresses = append(e.Addresses, addr)
	}
	if len(e.Addresses) == 0 {
		return e, false
	}
	if o.Conditions.Ready != nil {
		e.Ready = *o.Conditions.Ready
	}
	e.Serving = e.Ready
	if o.Conditions.Serving != nil {
		e.Serving = *o.Conditions.Serving
	}
	if o.Conditions.Terminating != nil {
		e.Terminating = *o.Conditions.Terminating
	}
	if o.NodeName != nil {
		e.NodeName = intern(*o.NodeName)
	}
	if o.Zone != nil {
		e.Zone = intern(*o.Zone)
	}
	if o.Hints != nil {
		for _, zone := range o.Hints.ForZones {
			e.HintZones = append(e.HintZones, intern(zone.Name))
		}
		for _, node := range o.Hints.ForNodes {
			e.HintNodes = append(e.HintNodes, intern(node.Name))
		}
	}
	if target := o.TargetRef; target != nil && target.Kind == "Pod" {
		e.Pod = model.Name{Namespace: intern(target.Namespace), Name: target.Name}
		if e.Pod.Namespace == "" {
			e.Pod.Namespace = namespace
		}
	}
	return e, true
}

func convertPod(o *corev1.Pod, r *report) *model.Pod {
	p := &model.Pod{
		Name:        nameOf(&o.ObjectMeta),
		UID:         string(o.UID),
		Labels:      o.Labels,
		NodeName:    intern(o.Spec.NodeName),
		HostNetwork: o.Spec.HostNetwork,
	}
	// A finished pod's addresses may be another pod's by now.
	if o.Status.Phase != corev1.PodSucceeded && o.Status.Phase != corev1.PodFailed {
		for i := range o.Status.PodIPs {
			if r.skips("status.podIPs", i) {
				continue
			}
			if addr, ok := r.address(at("status.podIPs", i)+".ip", o.Status.PodIPs[i].IP); ok {
				p.IPs = append(p.IPs, addr)
			}
		}
		if len(p.IPs) == 0 && o.Status.PodIP != "" {
			if addr, ok := r.address("status.podIP", o.Status.PodIP); ok {
				p.IPs = append(p.IPs, addr)
			}
		}
	}
	for i := range o.Spec.Containers {
		if !r.skips("spec.containers", i) {
			p.Ports = append(p.Ports, containerPorts(&o.Spec.Containers[i], at("spec.containers", i), r)...)
		}
	}
	for i := range o.Spec.InitContainers {
		// Sidecars run as long as the pod, and their ports count.
		c := &o.Spec.InitContainers[i]
		if !r.skips("spec.initContainers", i) && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			p.Ports = append(p.Ports, containerPorts(c, at("spec.initContainers", i), r)...)
		}
	}
	return p
}

func containerPorts(c *corev1.Container, field string, r *report) []model.ContainerPort {
	field += ".ports"
	ports := make([]model.ContainerPort, 0, len(c.Ports))
	for i := range c.Ports {
		if len(r.broken) > 0 && r.broken[at(field, i)] {
			continue
		}
		o := &c.Ports[i]
		number, ok := r.port(at(field, i)+".containerPort", o.ContainerPort)
		if !ok {
			continue
		}
		protocol, ok := r.protocol(at(field, i)+".protocol", o.Protocol)
		if !ok {
			continue
		}
		port := model.ContainerPort{Name: intern(o.Name), Protocol: protocol, Port: number}
		if o.HostPort != 0 {
			port.HostPort, _ = r.port(at(field, i)+".hostPort", o.HostPort)
		}
		ports = append(ports, port)
	}
	return ports
}

func convertNamespace(o *corev1.Namespace) *model.Namespace {
	labels := o.Labels
	// The API server sets it; selectors by namespace name rely on it.
	if labels[corev1.LabelMetadataName] != o.Name {
		labels = make(map[string]string, len(o.Labels)+1)
		for key, value := range o.Labels {
			labels[key] = value
		}
		labels[corev1.LabelMetadataName] = o.Name
	}
	return &model.Namespace{Name: o.Name, Labels: labels}
}

func convertNode(o *corev1.Node, r *report) *model.Node {
	n := &model.Node{Name: o.Name, Labels: o.Labels, Zone: intern(o.Labels[corev1.LabelTopologyZone])}
	n.Leaving = o.DeletionTimestamp != nil || slices.ContainsFunc(o.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taintToBeDeleted })
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, a := range o.Status.Addresses {
			if a.Type != kind || r.skips("status.addresses", i) {
				continue
			}
			if addr, ok := r.address(at("status.addresses", i)+".address", a.Address); ok && !slices.Contains(n.Addresses, addr) {
				n.Addresses = append(n.Addresses, addr)
			}
		}
	}
	cidrs, field := o.Spec.PodCIDRs, "spec.podCIDRs"
	for i, text := range cidrs {
		if r.skips(field, i) {
			continue
		}
		if prefix, ok := r.prefix(at(field, i), text); ok {
			n.PodCIDRs = append(n.PodCIDRs, prefix)
		}
	}
	if len(cidrs) == 0 && o.Spec.PodCIDR != "" {
		if prefix, ok := r.prefix("spec.podCIDR", o.Spec.PodCIDR); ok {
			n.PodCIDRs = append(n.PodCIDRs, prefix)
		}
	}
	return n
}

// convertPolicy gives false where the policy as a whole cannot be understood.
// An unsound part of a rule is left out of the rule, which then allows less.
func convertPolicy(o *networkingv1.NetworkPolicy, r *report) (*model.Policy, bool) {
	p := &model.Policy{Name: nameOf(&o.ObjectMeta)}
	selector, ok := r.selector("spec.podSelector", &o.Spec.PodSelector)
	if !ok {
		return nil, false
	}
	p.PodSelector = selector
	for i, direction := range o.Spec.PolicyTypes {
		switch direction {
		case networkingv1.PolicyTypeIngress:
			p.Ingress = true
		case networkingv1.PolicyTypeEgress:
			p.Egress = true
		default:
			r.add(at("spec.policyTypes", i), "%q is not a direction; want Ingress or Egress", direction)
			return nil, false
		}
	}
	if len(o.Spec.PolicyTypes) == 0 {
		p.Ingress, p.Egress = true, len(o.Spec.Egress) > 0
	}
	if p.Ingress {
		for i := range o.Spec.Ingress {
			rule := &o.Spec.Ingress[i]
			p.IngressRules = append(p.IngressRules, policyRule(at("spec.ingress", i), ".from", rule.From, rule.Ports, r))
		}
	} else if len(o.Spec.Ingress) > 0 {
		r.add("spec.ingress", "has no effect: spec.policyTypes does not name Ingress")
	}
	if p.Egress {
		for i := range o.Spec.Egress {
			rule := &o.Spec.Egress[i]
			p.EgressRules = append(p.EgressRules, policyRule(at("spec.egress", i), ".to", rule.To, rule.Ports, r))
		}
	} else if len(o.Spec.Egress) > 0 {
		r.add("spec.egress", "has no effect: spec.policyTypes does not name Egress")
	}
	return p, true
}

func policyRule(field, peersField string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, r *report) model.PolicyRule {
	rule := model.PolicyRule{AllPeers: len(peers) == 0, AllPorts: len(ports) == 0}
	for i := range peers {
		if peer, ok := policyPeer(at(field+peersField, i), &peers[i], r); ok {
			rule.Peers = append(rule.Peers, peer)
		}
	}
	for i := range ports {
		if port, ok := policyPort(at(field+".ports", i), &ports[i], r); ok {
			rule.Ports = append(rule.Ports, port)
		}
	}
	return rule
}

func policyPeer(field string, o *networkingv1.NetworkPolicyPeer, r *report) (peer model.PolicyPeer, ok bool) {
	if o.IPBlock != nil {
		if o.PodSelector != nil || o.NamespaceSelector != nil {
			r.add(field, "has ipBlock beside a selector; a peer is either; the peer is left out")
			return peer, false
		}
		return policyBlock(field+".ipBlock", o.IPBlock, r)
	}
	if o.PodSelector == nil && o.NamespaceSelector == nil {
		r.add(field, "is empty; want podSelector, namespaceSelector or ipBlock; the peer is left out")
		return peer, false
	}
	if o.PodSelector != nil {
		selector, ok := r.selector(field+".podSelector", o.PodSelector)
		if !ok {
			return peer, false
		}
		peer.PodSelector = &selector
	}
	if o.NamespaceSelector != nil {
		selector, ok := r.selector(field+".namespaceSelector", o.NamespaceSelector)
		if !ok {
			return peer, false
		}
		peer.NamespaceSelector = &selector
	}
	return peer, true
}

func policyBlock(field string, o *networkingv1.IPBlock, r *report) (peer model.PolicyPeer, ok bool) {
	block := &model.IPBlock{}
	if block.CIDR, ok = r.prefix(field+".cidr", o.CIDR); !ok {
		return peer, false
	}
	for i, text := range o.Except {
		// Without an exception the block would allow what was excepted.
		except, ok := r.prefix(at(field+".except", i), text)
		if !ok {
			return peer, false
		}
		if except.Bits() < block.CIDR.Bits() || !block.CIDR.Contains(except.Addr()) {
			r.add(at(field+".except", i), "%s is not inside %s; the peer is left out", except, block.CIDR)
			return peer, false
		}
		block.Except = append(block.Except, except)
	}
	return model.PolicyPeer{IPBlock: block}, true
}

func policyPort(field string, o *networkingv1.NetworkPolicyPort, r *report) (port model.PolicyPort, ok bool) {
	protocol := corev1.ProtocolTCP
	if o.Protocol != nil {
		protocol = *o.Protocol
	}
	if port.Protocol, ok = r.protocol(field+".protocol", protocol); !ok {
		return port, false
	}
	if o.Port == nil {
		if o.EndPort != nil {
			r.add(field+".endPort", "%d has no port to start from; the port is left out", *o.EndPort)
			return port, false
		}
		return port, true
	}
	if o.Port.Type == intstr.String {
		if errs := validation.IsValidPortName(o.Port.StrVal); len(errs) > 0 {
			r.add(field+".port", "%q is neither a port nor a port's name: %s", o.Port.StrVal, errs[0])
			return port, false
		}
		if o.EndPort != nil {
			r.add(field+".endPort", "%d cannot end a range that starts with the name %q; the port is left out", *o.EndPort, o.Port.StrVal)
			return port, false
		}
		port.Name = intern(o.Port.StrVal)
		return port, true
	}
	if port.Port, ok = r.port(field+".port", o.Port.IntVal); !ok {
		return port, false
	}
	port.EndPort = port.Port
	if o.EndPort != nil {
		if port.EndPort, ok = r.port(field+".endPort", *o.EndPort); !ok {
			return port, false
		}
		if port.EndPort < port.Port {
			r.add(field+".endPort", "%d is below port %d; the port is left out", port.EndPort, port.Port)
			return port, false
		}
	}
	return port, true
}

func (r *report) selector(field string, o *metav1.LabelSelector) (model.Selector, bool) {
	selector := make(model.Selector, 0, len(o.MatchLabels)+len(o.MatchExpressions))
	for key, value := range o.MatchLabels {
		if errs := validation.IsQualifiedName(key); len(errs) > 0 {
			r.add(field+".matchLabels", "%q is not a label: %s", key, errs[0])
			return nil, false
		}
		selector = append(selector, model.Requirement{Key: key, Operator: model.In, Values: []string{value}})
	}
	for i := range o.MatchExpressions {
		e, field := &o.MatchExpressions[i], at(field+".matchExpressions", i)
		operator := model.Operator(e.Operator)
		switch operator {
		case model.In, model.NotIn:
			if len(e.Values) == 0 {
				r.add(field+".values", "is empty; %s needs a value", operator)
				return nil, false
			}
		case model.Exists, model.DoesNotExist:
			if len(e.Values) > 0 {
				r.add(field+".values", "%s takes no values", operator)
				return nil, false
			}
		default:
			r.add(field+".operator", "%q is not an operator; want In, NotIn, Exists or DoesNotExist", e.Operator)
			return nil, false
		}
		if errs := validation.IsQualifiedName(e.Key); len(errs) > 0 {
			r.add(field+".key", "%q is not a label: %s", e.Key, errs[0])
			return nil, false
		}
		selector = append(selector, model.Requirement{Key: e.Key, Operator: operator, Values: slices.Clone(e.Values)})
	}
	return selector.Sorted(), true
}
