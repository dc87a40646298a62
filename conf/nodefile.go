// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// Node is what the plugins need to know of the node's daemon. The daemon leaves
// it in a file beside its socket, so that DEL works while the daemon is down and
// ADD needs no question for it. The keys are those of GET /v1/node.
type Node struct {
	Name     string         `json:"name"`
	MTU      int            `json:"mtu"`
	BPFFS    string         `json:"bpffs"`
	StateDir string         `json:"stateDir"`
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	Ready    bool           `json:"ready"`
	Reason   string         `json:"reason"`
}

// NodeFile is the node file of the daemon on socket: mooring.sock -> mooring.json.
func NodeFile(socket string) string {
	return strings.TrimSuffix(socket, ".sock") + ".json"
}

// ReadNode reads the node file of the daemon on socket. The error is
// fs.ErrNotExist when no daemon has started since the machine has.
func ReadNode(socket string) (Node, error) {
	path := NodeFile(socket)
	data, err := os.ReadFile(path)
	if err != nil {
		return Node{}, fmt.Errorf("read the node file: %w", err)
	}
	var n Node
	if err := json.Unmarshal(data, &n); err != nil {
		return Node{}, fmt.Errorf("read the node file %s: %w (remove it and restart mooringd, which writes it)", path, err)
	}
	return n, nil
}

// WriteNode puts n where ReadNode finds it. Readers see the old file or the new
// one, never a part. The file need not survive a power loss: it describes a
// daemon that does not either.
func WriteNode(socket string, n Node) error {
	path := NodeFile(socket)
	if n.PodCIDRs == nil {
		n.PodCIDRs = []netip.Prefix{} // a list for scripts, not null
	}
	data, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return fmt.Errorf("write the node file %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the directory of the node file: %w", err)
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write the node file: %w", err)
	}
	defer os.Remove(temp.Name()) // nothing is there after the rename
	defer temp.Close()
	if _, err := temp.Write(append(data, '\n')); err != nil {
		return fmt.Errorf("write the node file: %w", err)
	}
	// The plugins run as root, but people look at it too.
	if err := temp.Chmod(0o644); err != nil {
		return fmt.Errorf("write the node file: %w", err)
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return fmt.Errorf("write the node file: %w", err)
	}
	return nil
}
