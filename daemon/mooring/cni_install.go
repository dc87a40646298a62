// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
)

// Names of our files on a node.
var (
	conflistName = "10-mooring.conflist"
	pluginNames  = []string{"mooring-cni", "mooring-ipam"}
)

// Where runtimes look unless they are told otherwise.
const (
	defaultBinDir  = "/opt/cni/bin"
	defaultConfDir = "/etc/cni/net.d"
)

func newCNIInstall() *cobra.Command {
	command := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugins onto this node",
		Long: `Put mooring-cni and mooring-ipam into the container runtime's directory. Each
appears whole, by a rename: a pod that starts meanwhile gets the old version or
the new one. What is right already is not touched.

The runtime does not use them before "mooring cni enable".`,
		Example: `  mooring cni install --from bin
  mooring cni install --from /cni --complete-from /cni/standard --bin /host/opt/cni/bin --conf /host/etc/cni/net.d`,
	}
	from := command.Flags().String("from", "", "directory that holds the plugins (required)")
	complete := command.Flags().String("complete-from", "", "directory of other plugins, which are put beside ours where the node has none of that name")
	bin := command.Flags().String("bin", defaultBinDir, "the runtime's directory of plugins")
	netd := command.Flags().String("conf", defaultConfDir, "the runtime's directory of configurations, which is only looked at")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		if *from == "" {
			return usageError{errors.New("cni install: --from says where the plugins are")}
		}
		out := cmd.OutOrStdout()
		if err := installPlugins(out, *from, *complete, *bin); err != nil {
			return fmt.Errorf("cni install: %w", err)
		}
		rivals, err := sortedBefore(*netd)
		if err != nil {
			return fmt.Errorf("cni install: %w", err)
		}
		for _, rival := range rivals {
			fmt.Fprintf(out, "warning: %s comes before %s in %s, so the runtime takes it and pods are not Mooring's: remove it, unless it is what delegates to Mooring\n", rival, conflistName, *netd)
		}
		return nil
	}
	return command
}

func installPlugins(out io.Writer, from, complete, bin string) error {
	directory, err := openHostDirectory(bin)
	if err != nil {
		return fmt.Errorf("put the plugins into %s: %w", bin, err)
	}
	defer directory.Close()
	// mooring-cni last: it uses the other.
	for _, name := range slices.Backward(pluginNames) {
		if err := installProgram(out, directory, from, name); err != nil {
			return err
		}
	}
	if complete == "" {
		return nil
	}
	others, err := os.ReadDir(complete)
	if err != nil {
		return err
	}
	for _, other := range others {
		if _, err := os.Lstat(filepath.Join(bin, other.Name())); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := installProgram(out, directory, complete, other.Name()); err != nil {
			return err
		}
	}
	return nil
}

func installProgram(out io.Writer, directory *hostDirectory, from, name string) error {
	content, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		return err
	}
	changed, err := directory.put(name, content, 0o755)
	if err != nil {
		return fmt.Errorf("put %s into %s: %w", name, directory.path, err)
	}
	what := "is up to date"
	if changed {
		what = "installed"
	}
	fmt.Fprintf(out, "%s %s\n", filepath.Join(directory.path, name), what)
	return nil
}

// sortedBefore are the configurations that the runtime prefers to ours: it takes
// the first by name.
func sortedBefore(netd string) (rivals []string, err error) {
	entries, err := os.ReadDir(netd)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) && e.Name() < conflistName {
			rivals = append(rivals, e.Name())
		}
	}
	return rivals, nil
}
