// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newCtList(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "list",
		Short: "List connections: which are active, of which pod, to which service",
		Long: `List what the connection table knows. A connection has one entry or two, and
a row for each of the ways to look at it.

SVC is a flow as the client sent it, with the backend chosen for it; EGRESS and
INGRESS are a flow as it leaves and enters a pod, with the service address that
replies get. An entry ends with its socket, or when nothing was seen for as long
as ENDS says.`,
		Example: `  mooring ct list
  mooring ct list --pod default/client --proto tcp
  mooring ct list --service default/web -o json`,
	}
	pod := command.Flags().String("pod", "", "only connections of this pod, NAMESPACE/NAME")
	service := command.Flags().String("service", "", "only connections to this service, NAMESPACE/NAME")
	protocol := command.Flags().String("proto", "", "only TCP, UDP, ICMP or ICMPv6")
	command.RegisterFlagCompletionFunc("proto", cobra.FixedCompletions([]string{"TCP", "UDP", "ICMP", "ICMPv6"}, cobra.ShellCompDirectiveNoFileComp))
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		var filter api.Filter
		var err error
		if *pod != "" {
			if filter.Pod, err = api.ParseName(*pod); err != nil {
				return usageError{fmt.Errorf("--pod: %w", err)}
			}
		}
		if *service != "" {
			if filter.Service, err = api.ParseName(*service); err != nil {
				return usageError{fmt.Errorf("--service: %w", err)}
			}
		}
		if *protocol != "" {
			if filter.Protocol, err = api.ParseProtocol(*protocol); err != nil {
				return usageError{fmt.Errorf("--proto: %w", err)}
			}
		}
		empty := "No connections."
		if filter != (api.Filter{}) {
			empty = "No connections match."
		}
		rows := c.api().Connections(cmd.Context(), filter)
		if err := printList(cmd.OutOrStdout(), cmd.ErrOrStderr(), *output, rows, connectionColumns, empty); err != nil {
			return fmt.Errorf("list connections: %w", err)
		}
		return nil
	}
	return command
}

var connectionColumns = []column[api.Connection]{
	{title: "TYPE", cell: func(c api.Connection) string { return c.Type }},
	{title: "PROTO", cell: func(c api.Connection) string { return c.Protocol }},
	{title: "SOURCE", cell: func(c api.Connection) string { return c.Source }, shorten: true},
	{title: "DESTINATION", cell: func(c api.Connection) string { return c.Destination }, shorten: true},
	{title: "=> TRANSLATION", cell: func(c api.Connection) string {
		if c.Translation == "" {
			return "-"
		}
		return "=> " + c.Translation
	}, shorten: true},
	{title: "STATE", cell: func(c api.Connection) string { return c.State }, expendable: 1},
	{title: "ENDS", cell: ends, expendable: 2},
	{title: "PACKETS", cell: func(c api.Connection) string { return number(c.Packets) }, right: true, expendable: 4},
	{title: "BYTES", cell: func(c api.Connection) string { return number(c.Bytes) }, right: true, expendable: 5},
	{title: "ENDPOINT", cell: func(c api.Connection) string { return number(c.Endpoint) }, right: true, expendable: 3},
}

// ends says what an entry's life hangs on.
func ends(c api.Connection) string {
	if c.Tethered {
		return "with socket"
	}
	return strings.TrimSpace(fmt.Sprintf("in %ds", c.ExpiresInSeconds))
}
