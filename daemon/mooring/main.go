// SPDX-License-Identifier: Apache-2.0

// Command mooring is the command line client of the node daemon: it shows what
// the daemon and its datapath do, in tables for people and JSON or YAML for
// scripts.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
)

// version is set at link time.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Getenv)
	stop()
	os.Exit(code)
}

// usageError is wrong usage, as opposed to a command that could not be done.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// run executes one command line: 0 done, 1 failed, 2 wrong usage. An error is
// one line on stderr.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	root := newRoot(stdout, stderr, getenv)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "mooring: %s\n", strings.Join(strings.Fields(err.Error()), " "))
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// client is what the commands share.
type client struct {
	socket string
	getenv func(string) string
}

func newRoot(stdout, stderr io.Writer, getenv func(string) string) *cobra.Command {
	c := &client{getenv: getenv}
	root := &cobra.Command{
		Use:   "mooring",
		Short: "Look into this node's Mooring daemon and its datapath",
		Long: `mooring shows what the node daemon (mooringd) and its datapath do.

Every list takes -o table, json or yaml; the keys of JSON and YAML are stable.
Exit code 0: done; 1: failed, one line on stderr says why; 2: wrong usage.`,
		Example: `  mooring status                                    is this node well?
  mooring ct list --service default/web             who is connected to a service?
  mooring ct list -o json | jq -r '.[].source'      the same for scripts
  mooring monitor                                   drops and flows as they happen`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetOut(stdout) // the completion command takes it as it is made
	root.SetErr(stderr)
	socket := getenv("MOORING_SOCKET")
	if socket == "" {
		socket = conf.DefaultSocket
	}
	root.PersistentFlags().StringVar(&c.socket, "socket", socket, "unix socket of mooringd; also MOORING_SOCKET")
	root.AddCommand(
		newStatus(c),
		group("ct", "Look into the connection table", newCtList(c), newCtStats(c), newCtFlush(c)),
		group("service", "Look at services", newServiceList(c)),
		group("policy", "Look at network policies", newPolicyList(c), newPolicyExplain(c)),
		group("endpoint", "Look at the pods' interfaces on this node", newEndpointList(c)),
		newMonitor(c),
		group("cni", "Put the CNI plugins and their configuration onto this node, or take them off", newCNIInstall(), newCNIEnable(c), newCNIUninstall()),
		newPrepare(),
		newCleanup(c),
		newVersion(),
	)
	root.InitDefaultCompletionCmd()
	strict(root)
	return root
}

// group is a command that does nothing without one of its own.
func group(name, short string, commands ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: name, Short: short}
	g.AddCommand(commands...)
	return g
}

// strict makes wrong usage what it is: an error with exit code 2, and for a
// group without its command as well.
func strict(command *cobra.Command) {
	command.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
	})
	if command.HasSubCommands() {
		var names []string
		for _, sub := range command.Commands() {
			if sub.IsAvailableCommand() {
				names = append(names, sub.Name())
			}
			strict(sub)
		}
		choice := strings.Join(names, ", ")
		command.Args = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("%q is not a command of %s: %s", args[0], c.CommandPath(), choice)}
			}
			return nil
		}
		command.RunE = func(c *cobra.Command, args []string) error {
			return usageError{fmt.Errorf("%s wants a command: %s", c.CommandPath(), choice)}
		}
		return
	}
	arguments := command.Args
	if arguments == nil {
		arguments = cobra.NoArgs
	}
	command.Args = func(c *cobra.Command, args []string) error {
		if err := arguments(c, args); err != nil {
			if len(args) > 0 {
				err = fmt.Errorf("%s takes no argument %q", c.CommandPath(), args[0])
			}
			return usageError{fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
		}
		return nil
	}
}

func (c *client) api() *api.Client { return api.NewClient(c.socket) }
