// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"strings"
	"time"
)

// OwnMounts gives the node a mount namespace. Programs that the node's Command
// starts from now on are in it and see what Bind puts where; the machine does not.
func (n *Node) OwnMounts(t T) {
	t.Helper()
	holder := n.NS.Command("unshare", "--mount", "--propagation", "private",
		"sh", "-ec", "mount --make-rshared /; echo ready; exec sleep infinity").Background(t)
	Eventually(t, 20*time.Second, n.NodeName+" has mounts of its own", func() bool {
		return strings.Contains(holder.Output(), "ready")
	})
	n.mounts = fmt.Sprintf("/proc/%d/ns/mnt", holder.Cmd.Process.Pid)
}

// Bind shows a directory under another name in the node's mount namespace.
func (n *Node) Bind(t T, from, to string) {
	t.Helper()
	if out, err := n.Command("mount", "--bind", from, to).CombinedOutput(); err != nil {
		t.Fatalf("mount %s on %s in %s: %v: %s", from, to, n.NodeName, err, out)
	}
}

// Command prepares a program that runs in the node's namespaces.
func (n *Node) Command(name string, args ...string) *Cmd {
	if n.mounts == "" {
		return n.NS.Command(name, args...)
	}
	return n.NS.Command("nsenter", append([]string{"--mount=" + n.mounts, "--", name}, args...)...)
}
