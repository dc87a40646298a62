// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// Daemon is a node's mooringd, as a process beside the runtime.
type Daemon struct {
	*api.Client

	runtime *Runtime
	config  string
	process *netns.Process
}

// StartDaemon starts mooringd with the node's places. Keys are the rest of its
// configuration file.
func (r *Runtime) StartDaemon(t netns.T, keys string) *Daemon {
	t.Helper()
	n := r.Node
	d := &Daemon{Client: api.NewClient(n.Socket), runtime: r, config: filepath.Join(n.Dir, "mooringd.yaml")}
	config := fmt.Sprintf("nodeName: %s\nsocket: %s\nbpffs: %s\nstateDir: %s\ncgroup: %s\ndevices: [%s]\n%s",
		n.NodeName, n.Socket, n.BPFFS, n.StateDir, r.Cgroup.Path, netns.Uplink, keys)
	if err := os.WriteFile(d.config, []byte(config), 0o644); err != nil {
		t.Fatalf("configure mooringd: %v", err)
	}
	d.Launch()
	return d
}

// Launch starts the daemon again after Stop or Kill.
func (d *Daemon) Launch() {
	t := d.runtime.t
	t.Helper()
	d.process = d.runtime.Node.Command(d.runtime.programs.Path("mooringd"), "--config", d.config).In(d.runtime.Cgroup).Background(t)
	netns.Eventually(t, 60*time.Second, "mooringd answers", func() bool {
		select {
		case <-d.process.Done():
			t.Fatalf("mooringd has ended: %s", d.process.Output())
		default:
		}
		_, err := d.Node(context.Background())
		return err == nil
	})
}

// Stop ends the daemon as its service manager does.
func (d *Daemon) Stop() error { return d.process.Stop() }

// Kill ends the daemon as a crash does.
func (d *Daemon) Kill() { d.process.Kill() }
