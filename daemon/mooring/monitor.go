// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newMonitor(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "monitor",
		Short: "Show drops and new and ended flows as they happen",
		Long: `Show drops and new and ended flows as they happen, until interrupted.

With -o json an event is a line, with -o yaml a document.`,
		Example: `  mooring monitor
  mooring monitor --kind drop
  mooring monitor -o json | jq -c 'select(.pod == "default/web")'`,
	}
	kinds := command.Flags().StringSlice("kind", nil, "only these kinds of events: drop, new, end")
	command.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{"drop", "new", "end"}, cobra.ShellCompDirectiveNoFileComp))
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		wanted := map[string]bool{}
		for _, kind := range *kinds {
			if kind != "drop" && kind != "new" && kind != "end" {
				return usageError{fmt.Errorf("--kind: %q is not drop, new or end", kind)}
			}
			wanted[kind] = true
		}
		err := c.api().Events(cmd.Context(), func(e api.Event) error {
			if len(wanted) > 0 && !wanted[e.Kind] {
				return nil
			}
			return printEvent(cmd.OutOrStdout(), *output, e)
		})
		if cause := cmd.Context().Err(); cause != nil && errors.Is(err, cause) {
			return nil // interrupted: that is how it ends
		}
		return fmt.Errorf("monitor: %w", err)
	}
	return command
}

func printEvent(w io.Writer, f format, e api.Event) error {
	switch f {
	case asJSON:
		return json.NewEncoder(w).Encode(e)
	case asYAML:
		text, err := yaml.Marshal(e)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "---\n%s", text)
		return err
	}
	clock := e.Time
	if t, err := time.Parse(time.RFC3339Nano, e.Time); err == nil {
		clock = t.Local().Format("15:04:05.000")
	}
	text := fmt.Sprintf("%s  %-4s  %-6s  %s -> %s", clock, e.Kind, e.Protocol, e.Source, e.Destination)
	if e.Translation != "" {
		text += " => " + e.Translation
	}
	if e.Reason != "" {
		text += "  " + e.Reason
	}
	if len(e.Policies) > 0 {
		text += " [" + strings.Join(e.Policies, ", ") + "]"
	}
	switch {
	case e.Pod != "":
		text += fmt.Sprintf("  (%s %s)", e.Direction, e.Pod)
	case e.Endpoint != 0:
		text += fmt.Sprintf("  (%s endpoint %d)", e.Direction, e.Endpoint)
	case e.Direction != "":
		text += fmt.Sprintf("  (%s)", e.Direction)
	}
	_, err := fmt.Fprintln(w, text)
	return err
}
