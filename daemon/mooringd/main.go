// SPDX-License-Identifier: Apache-2.0

// Command mooringd is the node daemon: it keeps one node's datapath as the
// cluster's objects and the pods' interfaces want it, and answers the CNI plugin
// and the command line client on a unix socket.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/conf"
)

// version is set at link time.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// usageError is a wrong command line, as opposed to a daemon that failed.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// command executes a command line: 0 done, 1 failed, 2 wrong usage.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var file string
	root := &cobra.Command{
		Use:   "mooringd",
		Short: "The node daemon of Mooring",
		Long: `mooringd runs on every node. It forwards, translates services and tracks
connections for the node's pods, by programs in the kernel that go on while it
is stopped and that the next start adopts.

Every key of the configuration file has a flag of the same name, and the flag
wins. conf/mooringd.yaml documents them all.`,
		Example: `  mooringd --config /etc/mooring/mooringd.yaml
  mooringd --manifests /etc/mooring/manifests --pod-cidrs 10.244.0.0/24,fd00:10:244::/64`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("%q: mooringd takes flags only (see mooringd --help)", args[0])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := load(file, c)
			if err != nil {
				return err
			}
			log := newLog(stderr, config.Log)
			return run(c.Context(), config, log, openDatapath)
		},
	}
	root.Flags().StringVar(&file, "config", "", "configuration file (default "+conf.DefaultConfig+", if it is there)")
	root.CompletionOptions.DisableDefaultCmd = true
	conf.RegisterFlags(root.Flags())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see mooringd --help)", err)}
	})
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "mooringd: %s\n", strings.Join(strings.Fields(err.Error()), " "))
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

func load(file string, c *cobra.Command) (conf.Config, error) {
	if !c.Flags().Changed("config") {
		if _, err := os.Stat(conf.DefaultConfig); !errors.Is(err, fs.ErrNotExist) {
			file = conf.DefaultConfig
		}
	}
	config, err := conf.Load(file, c.Flags())
	var wrong *conf.Error
	if errors.As(err, &wrong) && wrong.Flag != "" {
		err = usageError{err}
	}
	return config, err
}

func newLog(w io.Writer, options conf.Log) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(options.Level)) // conf has checked it
	handler := &slog.HandlerOptions{Level: level}
	if options.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, handler))
	}
	return slog.New(slog.NewTextHandler(w, handler))
}
