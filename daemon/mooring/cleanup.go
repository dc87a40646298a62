// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/node"
)

func newCleanup(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Mooring made on this node",
		Long: `Remove everything that Mooring made in this network namespace: programs, maps
and their pins, iptables chains, routes, the daemon's socket and node file. It
asks nothing. Pods keep their interfaces but lose their services and, with the
masquerade, the world.

The daemon must be stopped: it would make everything anew. --force cleans up
under a running daemon, for one that cannot be stopped.

What must not be lost while pods run stays: the addresses given, in the state
directory. When no pod is left, --state removes that too.`,
		Example: `  systemctl stop mooringd && mooring cleanup
  mooring --socket /run/mooring-b/mooring.sock cleanup      a second daemon's
  mooring cleanup --state                                   before uninstalling`,
	}
	bpffs := command.Flags().String("bpffs", "", "pin root of the daemon; from its node file beside the socket when not given")
	force := command.Flags().Bool("force", false, "clean up although the daemon runs")
	wait := command.Flags().Duration("wait", 0, "how long to wait for a daemon that is being stopped")
	state := command.Flags().Bool("state", false, "remove the state directory too: addresses given, endpoints")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		if os.Geteuid() != 0 {
			return errors.New("cleanup: only root can remove what mooringd made: run it as root")
		}
		if !*force {
			if err := c.refuseWhileRunning(cmd.Context(), *wait); err != nil {
				return err
			}
		}
		where, err := c.locate(*bpffs)
		if err != nil {
			return err
		}
		if where.BPFFS == "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "mooring: no node file %s tells of a daemon on this socket; pins are looked for where --bpffs says\n", conf.NodeFile(c.socket))
		}
		return cleanup(c.socket, where, *state)
	}
	return command
}

// refuseWhileRunning fails when a daemon answers, and when one may be there
// that does not, for as long as it may be waited for.
func (c *client) refuseWhileRunning(ctx context.Context, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		asking, cancel := context.WithTimeout(ctx, 3*time.Second)
		_, err := c.api().Node(asking)
		cancel()
		if api.IsNotRunning(err) {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("cleanup: mooringd runs on %s and would make everything anew: stop it first (systemctl stop mooringd), or use --force", c.socket)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// locate says where the daemon of this socket kept its things. Its node file
// tells; without one only the defaults of the default socket are certain not to
// be another daemon's.
func (c *client) locate(bpffs string) (conf.Node, error) {
	n, err := conf.ReadNode(c.socket)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return n, fmt.Errorf("cleanup: %w", err)
	}
	if err != nil && c.socket == conf.DefaultSocket {
		n = conf.Node{BPFFS: conf.DefaultBPFFS, StateDir: conf.DefaultStateDir}
	}
	if bpffs != "" {
		n.BPFFS = bpffs
	}
	return n, nil
}

// cleanup takes one thing after the other away, the traffic first, and goes on
// where one fails.
func cleanup(socket string, where conf.Node, state bool) error {
	errs := []error{
		removePins(where.BPFFS),
		node.Cleanup(),
		api.RemoveSocket(socket),
		removeFile(conf.NodeFile(socket)),
	}
	if state && where.StateDir != "" {
		errs = append(errs, os.RemoveAll(where.StateDir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	return nil
}

// removePins removes a daemon's pins, and with them what they hold. A directory
// elsewhere than in a BPF file system has none.
func removePins(bpffs string) error {
	if bpffs == "" {
		return nil
	}
	var at unix.Statfs_t
	if err := unix.Statfs(bpffs, &at); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("look at %s: %w", bpffs, err)
	}
	if at.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("remove the pins in %s: it is not in a BPF file system: is it the daemon's bpffs?", bpffs)
	}
	return bpf.Remove(bpffs)
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
