// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newCtStats(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "stats",
		Short: "Show how the connection table fares",
		Long: `Show how full the connection table is, what ended its entries, and what the
sweep that removes expired ones costs. A connection through a service has one
entry while its socket holds it, however many rows "mooring ct list" has of it.`,
		Example: `  mooring ct stats
  mooring ct stats -o json | jq .deleted`,
	}
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := c.api().ConntrackStats(cmd.Context())
		if err != nil {
			return fmt.Errorf("conntrack statistics: %w", err)
		}
		return printValue(cmd.OutOrStdout(), *output, s, func(w io.Writer) { printStats(w, s) })
	}
	return command
}

func printStats(w io.Writer, s api.ConntrackStats) {
	line := func(key string, value any, note string) {
		if note != "" {
			note = "  " + note
		}
		fmt.Fprintf(w, "%-20s %12v%s\n", key, value, note)
	}
	line("Entries", s.Entries, fmt.Sprintf("of %d", s.MaxEntries))
	line("  tethered", s.Tethered, "end with their socket")
	line("Created", s.Created, "")
	line("Deleted: socket", s.Deleted.Socket, "the owner's socket ended")
	line("  timewait", s.Deleted.Timewait, "its TIME_WAIT ended")
	line("  expired", s.Deleted.Expired, "nothing seen for too long")
	line("  endpoint", s.Deleted.Endpoint, "the pod was deleted")
	line("  backend", s.Deleted.Backend, "the backend was removed")
	line("  flush", s.Deleted.Flush, "mooring ct flush")
	line("Evicted", s.Evicted, "made room for new ones")
	line("Insert failed", s.InsertFailed, "")
	line("Delete failed", s.DeleteFailed, "left to the sweep")
	line("Sweep: runs", s.Sweep.Runs, "")
	line("  scanned", s.Sweep.Scanned, "")
	line("  interval", fmt.Sprintf("%.1f s", s.Sweep.IntervalSeconds), "")
	line("  CPU", fmt.Sprintf("%.3f s", s.Sweep.CPUSeconds), "")
}
