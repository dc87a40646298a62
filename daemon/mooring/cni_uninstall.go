// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func newCNIUninstall() *cobra.Command {
	command := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the CNI configuration and plugins off this node",
		Long: `Take the CNI configuration off this node, by which it takes no more pods, and
after it mooring-cni and mooring-ipam. Plugins that are not Mooring's stay.

"mooring cleanup" removes what the daemon made.`,
		Example: `  mooring cni uninstall
  mooring cni uninstall --bin /host/opt/cni/bin --conf /host/etc/cni/net.d --stay`,
	}
	bin := command.Flags().String("bin", defaultBinDir, "the runtime's directory of plugins")
	netd := command.Flags().String("conf", defaultConfDir, "the runtime's directory of configurations")
	stay := command.Flags().Bool("stay", false, "do not end before a signal comes: a DaemonSet's pod shows by running that it is done")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		out := cmd.OutOrStdout()
		err := removeFrom(out, *netd, conflistName)
		if err == nil {
			err = removeFrom(out, *bin, pluginNames...)
		}
		if err != nil {
			return fmt.Errorf("cni uninstall: %w", err)
		}
		if *stay {
			fmt.Fprintln(out, "done")
			<-cmd.Context().Done()
		}
		return nil
	}
	return command
}

// removeFrom takes files off a directory of the node. One that is not there has
// none.
func removeFrom(out io.Writer, path string, names ...string) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	directory, err := openHostDirectory(path)
	if err != nil {
		return err
	}
	defer directory.Close()
	for _, name := range names {
		changed, err := directory.remove(name)
		if err != nil {
			return err
		}
		if changed {
			fmt.Fprintf(out, "%s removed\n", filepath.Join(path, name))
		}
	}
	return nil
}
