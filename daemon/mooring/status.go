// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newStatus(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "status",
		Short: "Tell whether this node is well, and what it does",
		Long: `Tell whether this node is well, and what it does.

The exit code says whether the daemon answered, not whether the node is healthy:
scripts read "healthy" and "problems" of -o json.`,
		Example: `  mooring status
  mooring status -o json | jq .healthy`,
	}
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := c.api().Status(cmd.Context())
		if err != nil {
			return fmt.Errorf("status: %w", err)
		}
		return printValue(cmd.OutOrStdout(), *output, s, func(w io.Writer) { printStatus(w, s) })
	}
	return command
}

func printStatus(w io.Writer, s api.Status) {
	line := func(key, text string, args ...any) {
		fmt.Fprintf(w, "%-11s "+text+"\n", append([]any{key}, args...)...)
	}
	line("Node", "%s, %s", s.Node, s.Mode)
	line("Version", "mooring %s on Linux %s", s.Version, s.Kernel)
	health := "healthy"
	if !s.Healthy {
		health = "NOT HEALTHY"
	}
	line("Health", "%s", health)
	hook := s.Hook.Mode
	if s.Hook.Reason != "" {
		hook += ": " + s.Hook.Reason
	}
	line("Hook", "%s", hook)
	for i, x := range s.XDP {
		key := ""
		if i == 0 {
			key = "XDP"
		}
		why := ""
		if x.Reason != "" {
			why = ": " + x.Reason
		}
		line(key, "%s %s%s", x.Device, x.Mode, why)
	}
	line("Endpoints", "%d", s.Endpoints)
	line("Services", "%d with %s", s.Services, count(s.Backends, "backend"))
	fill := 0.0
	if s.Conntrack.MaxEntries > 0 {
		fill = 100 * float64(s.Conntrack.Entries) / float64(s.Conntrack.MaxEntries)
	}
	line("Conntrack", "%d of %d entries (%.1f %%)", s.Conntrack.Entries, s.Conntrack.MaxEntries, fill)
	for i, p := range s.Problems {
		key := ""
		if i == 0 {
			key = "Problems"
		}
		line(key, "%s", p)
	}
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
