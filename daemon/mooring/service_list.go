// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"iter"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newServiceList(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "list",
		Short: "List services with their frontends and backends",
		Example: `  mooring service list
  mooring service list -o json | jq '.[] | select(.name == "web").frontends'`,
	}
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		services, err := c.api().Services(cmd.Context())
		if err != nil {
			return fmt.Errorf("list services: %w", err)
		}
		if *output != asTable {
			return printList[api.Service](cmd.OutOrStdout(), cmd.ErrOrStderr(), *output, sequence(services, nil), nil, "")
		}
		return printList(cmd.OutOrStdout(), cmd.ErrOrStderr(), *output, frontendRows(services), frontendColumns, "No services.")
	}
	return command
}

// frontendRow is a line of the table: a service's frontend, or a service that
// has none.
type frontendRow struct {
	service  api.Service
	frontend *api.Frontend
}

func frontendRows(services []api.Service) iter.Seq2[frontendRow, error] {
	return func(yield func(frontendRow, error) bool) {
		for _, s := range services {
			if len(s.Frontends) == 0 && !yield(frontendRow{service: s}, nil) {
				return
			}
			for i := range s.Frontends {
				if !yield(frontendRow{s, &s.Frontends[i]}, nil) {
					return
				}
			}
		}
	}
}

var frontendColumns = []column[frontendRow]{
	{title: "SERVICE", cell: func(r frontendRow) string { return r.service.Namespace + "/" + r.service.Name }, shorten: true},
	{title: "KIND", cell: func(r frontendRow) string { return r.text(func(f *api.Frontend) string { return f.Kind }) }, expendable: 1},
	{title: "PROTO", cell: func(r frontendRow) string { return r.text(func(f *api.Frontend) string { return f.Protocol }) }},
	{title: "FRONTEND", cell: func(r frontendRow) string {
		return r.text(func(f *api.Frontend) string { return hostPort(f.Address, f.Port) })
	}, shorten: true},
	{title: "BACKENDS", cell: func(r frontendRow) string { return r.text(backends) }, shorten: true},
}

func (r frontendRow) text(of func(*api.Frontend) string) string {
	if r.frontend == nil {
		return "-"
	}
	return of(r.frontend)
}

// backends names a few and counts the rest: a service may have thousands.
func backends(f *api.Frontend) string {
	const named = 3
	if len(f.Backends) == 0 {
		return "none"
	}
	var list []string
	for i, b := range f.Backends {
		if i == named {
			list = append(list, fmt.Sprintf("and %d more", len(f.Backends)-named))
			break
		}
		text := hostPort(b.Address, b.Port)
		if b.State != "active" {
			text += " (" + b.State + ")"
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

func hostPort(address string, port uint16) string {
	return net.JoinHostPort(address, strconv.Itoa(int(port)))
}
