// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/node"
)

func newPrepare() *cobra.Command {
	command := &cobra.Command{
		Use:   "prepare",
		Short: "Do what the daemon needs and may have no right to do",
		Long: `Mount a BPF file system where none is, and make this machine a router
(net.ipv4.ip_forward, net.ipv6.conf.all.forwarding, and accept_ra of the uplinks
where it is 1).

mooringd does the same when it starts, if it may. In a container with named
capabilities it may not: there this runs before it, with more rights, and ends.`,
		Example: `  mooring prepare --bpffs /sys/fs/bpf`,
	}
	bpffs := command.Flags().String("bpffs", "/sys/fs/bpf", "where the BPF file system is mounted")
	devices := command.Flags().StringSlice("devices", nil, "uplinks; those of the default routes when not given")
	command.RunE = func(*cobra.Command, []string) error {
		if err := bpf.Mount(*bpffs); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		if err := node.Prepare(*devices); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		return nil
	}
	return command
}
