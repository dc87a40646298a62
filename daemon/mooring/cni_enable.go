// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
start.

With --stay it waits as long as it takes, and puts the configuration back when
somebody has changed or removed it, until a signal comes.`,
		Example: `  mooring cni enable --conflist conf/10-mooring.conflist
  mooring cni enable --conflist /etc/mooring/10-mooring.conflist --bin /host/opt/cni/bin --conf /host/etc/cni/net.d --stay`,
	}
	conflist := command.Flags().String("conflist", "", "the configuration (required)")
	bin := command.Flags().String("bin", defaultBinDir, "the runtime's directory of plugins")
	netd := command.Flags().String("conf", defaultConfDir, "the runtime's directory of configurations")
	wait := command.Flags().Duration("wait", 2*time.Minute, "how long to wait for the daemon")
	stay := command.Flags().Bool("stay", false, "keep the configuration in place until a signal comes: for a container beside the daemon's")
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
		e := enabler{client: c, out: cmd.OutOrStdout(), content: content, directory: *netd}
		if *stay {
			e.keep(cmd.Context())
			return nil
		}
		if e.inPlace() {
			fmt.Fprintf(e.out, "%s is up to date\n", filepath.Join(*netd, conflistName))
			return nil
		}
		if err := e.enable(cmd.Context(), *wait); err != nil {
			return fmt.Errorf("cni enable: %w", err)
		}
		return nil
	}
	return command
}

// enabler puts one configuration into one directory.
type enabler struct {
	client    *client
	out       io.Writer
	content   []byte
	directory string
}

func (e *enabler) inPlace() bool {
	return holds(filepath.Join(e.directory, conflistName), e.content, conflistMode)
}

// enable puts the configuration in place once the daemon serves.
func (e *enabler) enable(ctx context.Context, wait time.Duration) error {
	if err := e.client.awaitReady(ctx, wait); err != nil {
		return err
	}
	if node, err := e.client.api().Node(ctx); err == nil {
		e.stateDirDiffers(node.StateDir)
	}
	directory, err := openHostDirectory(e.directory)
	if err == nil {
		defer directory.Close()
		_, err = directory.put(conflistName, e.content, conflistMode)
	}
	if err != nil {
		return fmt.Errorf("put %s into %s: %w", conflistName, e.directory, err)
	}
	fmt.Fprintf(e.out, "%s installed\n", filepath.Join(e.directory, conflistName))
	return nil
}

// stateDirDiffers tells of a configuration whose DELs, as long as no daemon has
// started since the machine has, would look for addresses elsewhere.
func (e *enabler) stateDirDiffers(daemons string) {
	var list struct{ Plugins []json.RawMessage }
	if err := json.Unmarshal(e.content, &list); err != nil {
		return
	}
	for _, raw := range list.Plugins {
		c, err := conf.ParseNetConf(raw)
		if err != nil || !c.IPAM.Own() {
			continue
		}
		is := c.IPAM.StateDir
		if is == "" {
			is = conf.DefaultStateDir
		}
		if is != daemons {
			fmt.Fprintf(e.out, "the configuration leads to the addresses in %s, and mooringd keeps them in %s: "+
				"after a reboot a pod's end would not give its addresses back. Say \"stateDir\": %q in ipam of the stanza of %s\n",
				is, daemons, daemons, conf.PluginType)
		}
	}
}

// keep has the configuration in place, and says what it waits for, until ctx is
// done.
func (e *enabler) keep(ctx context.Context) {
	const look = 5 * time.Second
	for ctx.Err() == nil {
		if !e.inPlace() {
			if err := e.enable(ctx, 30*time.Second); err != nil && ctx.Err() == nil {
				fmt.Fprintln(e.out, err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(look):
		}
	}
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
