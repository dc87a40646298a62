// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

func newPolicyList(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "list",
		Short: "List network policies in the order in which they are evaluated",
		Example: `  mooring policy list
  mooring policy list -o json | jq -r '.[] | select(.pods | index("default/web")).name'`,
	}
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		policies, err := c.api().Policies(cmd.Context())
		if err != nil {
			return fmt.Errorf("list policies: %w", err)
		}
		return printList(cmd.OutOrStdout(), cmd.ErrOrStderr(), *output, sequence(policies, nil), policyColumns, "No policies.")
	}
	return command
}

var policyColumns = []column[api.Policy]{
	{title: "POLICY", cell: func(p api.Policy) string {
		if p.Namespace == "" {
			return p.Name
		}
		return p.Namespace + "/" + p.Name
	}, shorten: true},
	{title: "TIER", cell: func(p api.Policy) string {
		if p.Tier == "" {
			return "-"
		}
		return fmt.Sprintf("%s %d", p.Tier, p.Priority)
	}, expendable: 1},
	{title: "DIRECTIONS", cell: func(p api.Policy) string { return strings.Join(p.Directions, ",") }},
	{title: "RULES", cell: func(p api.Policy) string { return fmt.Sprintf("%d/%d", p.IngressRules, p.EgressRules) }, expendable: 2},
	{title: "SUBJECT", cell: func(p api.Policy) string { return p.Subject }, shorten: true},
	{title: "PODS HERE", cell: func(p api.Policy) string {
		const named = 3
		if len(p.Pods) > named {
			return fmt.Sprintf("%s and %d more", strings.Join(p.Pods[:named], ", "), len(p.Pods)-named)
		}
		if len(p.Pods) == 0 {
			return "none"
		}
		return strings.Join(p.Pods, ", ")
	}, shorten: true},
}
