// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newCtFlush(c *client) *cobra.Command {
	return &cobra.Command{
		Use:   "flush",
		Short: "Forget all connections",
		Long: `Forget all connections at once.

Established connections to a service lose their backend: the next packet chooses
a new one, and TCP to it is reset. Connections between pods without a service
go on.`,
		Example: `  mooring ct flush`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			deleted, err := c.api().FlushConntrack(cmd.Context())
			if err != nil {
				return fmt.Errorf("flush connections: %w", err)
			}
			entries := "entries"
			if deleted == 1 {
				entries = "entry"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d %s deleted\n", deleted, entries)
			return err
		},
	}
}
