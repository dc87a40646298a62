// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/conf"
)

func newCNIEnable(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "enable",
		Short: "Put the CNI configuration onto this node once the daemon serves",
		Long: `Put the CNI configuration into the container runtime's directory, by which the
node becomes Ready. It waits until mooringd says that pods can be added, so that
a node is Ready only when its pods get addresses and services.

A configuration that is there already and right is not touched, and not waited
for. One that names a plugin that is not on the node is refused: no pod would
start.`,
		Example: `  mooring cni enable --conflist conf/10-mooring.conflist
  mooring cni enable --conflist /etc/mooring/10-mooring.conflist --bin /host/opt/cni/bin --conf /host/etc/cni/net.d --wait 5m`,
	}
	conflist := command.Flags().String("conflist", "", "the configuration (required)")
	bin := command.Flags().String("bin", defaultBinDir, "the runtime's directory of plugins")
	netd := command.Flags().String("conf", defaultConfDir, "the runtime's directory of configurations")
	wait := command.Flags().Duration("wait", 2*time.Minute, "how long to wait for the daemon")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		if *conflist == "" {
			return usageError{errors.New("cni enable: --conflist says which configuration")}
		}
		content, err := os.ReadFile(*conflist)
		if err != nil {
			return fmt.Errorf("cni enable: %w", err)
		}
		if err := checkConflist(content, *bin); err != nil {
			return fmt.Errorf("cni enable: %s: %w", *conflist, err)
		}
		path := filepath.Join(*netd, conflistName)
		if holds(path, content, conflistMode) {
			fmt.Fprintf(cmd.OutOrStdout(), "%s is up to date\n", path)
			return nil
		}
		if err := c.awaitReady(cmd.Context(), *wait); err != nil {
			return fmt.Errorf("cni enable: %w", err)
		}
		directory, err := openHostDirectory(*netd)
		if err != nil {
			return fmt.Errorf("cni enable: put %s into %s: %w", conflistName, *netd, err)
		}
		defer directory.Close()
		if _, err := directory.put(conflistName, content, conflistMode); err != nil {
			return fmt.Errorf("cni enable: put %s into %s: %w", conflistName, *netd, err)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s installed\n", path)
		return nil
	}
	return command
}

const conflistMode = 0o644

// checkConflist refuses what would fail every pod: a stanza of ours that the
// plugin refuses, and plugins that are not there.
func checkConflist(content []byte, bin string) error {
	var list struct {
		CNIVersion string
		Name       string
		Plugins    []json.RawMessage
	}
	if err := json.Unmarshal(content, &list); err != nil {
		return err
	}
	ours := false
	for _, raw := range list.Plugins {
		var plugin struct{ Type string }
		if err := json.Unmarshal(raw, &plugin); err != nil {
			return err
		}
		if plugin.Type == conf.PluginType {
			ours = true
			if _, err := conf.ParseNetConf(raw); err != nil {
				return err
			}
		}
		if plugin.Type == "" || strings.ContainsRune(plugin.Type, '/') {
			return fmt.Errorf("%q is no plugin's type", plugin.Type)
		}
		if _, err := os.Stat(filepath.Join(bin, plugin.Type)); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("plugin %s is not in %s, and no pod would start: install it there (containernetworking-plugins), or take its stanza out", plugin.Type, bin)
		} else if err != nil {
			return err
		}
	}
	if !ours || list.Name == "" {
		return fmt.Errorf("it has no name, or no plugin of type %s", conf.PluginType)
	}
	return nil
}

// awaitReady returns when the daemon says that pods can be added.
func (c *client) awaitReady(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	why := error(fmt.Errorf("nothing was heard of mooringd on %s", c.socket))
	for {
		node, err := c.api().Node(ctx)
		switch {
		case err == nil && node.Ready:
			return nil
		case err == nil:
			why = fmt.Errorf("mooringd on %s is not ready: %s", c.socket, node.Reason)
		case ctx.Err() == nil:
			why = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("pods cannot be added yet, waited %v: %w", limit, why)
		case <-time.After(250 * time.Millisecond):
		}
	}
}
