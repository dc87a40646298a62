// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newEndpointList(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "list",
		Short: "List the pods' interfaces on this node",
		Example: `  mooring endpoint list
  mooring endpoint list -o json | jq -r '.[] | "\(.id) \(.ips[0])"'`,
	}
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		endpoints, err := c.api().Endpoints(cmd.Context())
		if err != nil {
			return fmt.Errorf("list endpoints: %w", err)
		}
		return printList(cmd.OutOrStdout(), cmd.ErrOrStderr(), *output, sequence(endpoints, nil), endpointColumns, "No endpoints: no pod of this node has an interface from Mooring.")
	}
	return command
}

var endpointColumns = []column[api.Endpoint]{
	{title: "ID", cell: func(e api.Endpoint) string { return number(e.ID) }, right: true},
	{title: "POD", cell: func(e api.Endpoint) string {
		if e.Pod == "" {
			return "-"
		}
		return e.Namespace + "/" + e.Pod
	}, shorten: true},
	{title: "IPS", cell: func(e api.Endpoint) string {
		var list []string
		for _, ip := range e.IPs {
			list = append(list, ip.String())
		}
		return orDash(strings.Join(list, ","))
	}, shorten: true},
	{title: "INTERFACE", cell: func(e api.Endpoint) string { return e.Interface }},
	{title: "MAC", cell: func(e api.Endpoint) string { return e.MAC }, expendable: 3},
	{title: "CONTAINER", cell: func(e api.Endpoint) string {
		const short = 13 // as crictl shows it
		if len(e.ContainerID) > short {
			return e.ContainerID[:short]
		}
		return e.ContainerID
	}, expendable: 1},
	{title: "IFNAME", cell: func(e api.Endpoint) string { return e.Ifname }, expendable: 4},
	{title: "NETNS", cell: func(e api.Endpoint) string { return orDash(e.Netns) }, expendable: 5},
}
