// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"os"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

func TestMain(m *testing.M) {
	netns.OnInterrupt()
	os.Exit(m.Run())
}

func TestKubernetes(t *testing.T) {
	c := Start(t, 2)
	c.Apply(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: mooring}
rules:
- apiGroups: [""]
  resources: [nodes, pods, services, namespaces]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch]
- apiGroups: ["", events.k8s.io]
  resources: [events]
  verbs: [create, patch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: mooring}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: mooring}
subjects: [{kind: ServiceAccount, name: mooring, namespace: kube-system}]
`)
	for _, n := range c.Nodes {
		n.StartMooring("metricsAddress: 127.0.0.1:9964\n")
		n.Runtime.Install(t, containerd.Conflist(n.Node, "1.0.0"))
	}
	for _, n := range c.Nodes {
		c.Eventually(time.Minute, n.NodeName+" ready", func() bool {
			out, err := c.Try("get", "node", n.NodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
			return err == nil && out == "True"
		})
	}
	t.Log(c.Kubectl(t, "get", "nodes", "-o", "wide"))
}
