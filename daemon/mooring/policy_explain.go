// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mooring-cni/mooring/daemon/api"
)

// errDifference means that one of the two is wrong.
var errDifference = errors.New("the programs do not do what was computed: this is a fault of the node's datapath, not of the policies")

func newPolicyExplain(c *client) *cobra.Command {
	command := &cobra.Command{
		Use:   "explain --from NAMESPACE/POD --to NAMESPACE/POD|ADDRESS --port PORT/PROTOCOL",
		Short: "Say whether a flow may begin, and which rule decides",
		Long: `Say whether a flow may begin, and which rule decides.

The answer is given twice: as computed, from what the datapath's maps are filled
from, and as the programs of this node decide on a packet that is made for the
question. A difference is an error (exit code 1). That a flow is denied is not.

Policy is enforced at both ends. This node knows the ends that are its pods; for
the other end ask the other node.`,
		Example: `  mooring policy explain --from default/client --to default/web --port 80/TCP
  mooring policy explain --from default/client --to 203.0.113.9 --port 53/UDP
  mooring policy explain --from default/client --to default/web --port ICMP`,
	}
	from := command.Flags().String("from", "", "the pod, or the address, that begins")
	to := command.Flags().String("to", "", "the pod, or the address, it goes to: after service translation")
	port := command.Flags().String("port", "", "destination port and protocol: 80/TCP, 53/UDP, 9/SCTP, or ICMP")
	output := outputFlag(command)
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		question := api.PolicyQuestion{From: *from, To: *to}
		for _, flag := range []struct{ name, value string }{{"from", *from}, {"to", *to}, {"port", *port}} {
			if flag.value == "" {
				return usageError{fmt.Errorf("--%s is missing (see %s --help)", flag.name, cmd.CommandPath())}
			}
		}
		var err error
		if question.Port, question.Protocol, err = parsePort(*port); err != nil {
			return usageError{fmt.Errorf("--port: %w", err)}
		}
		x, err := c.api().ExplainPolicy(cmd.Context(), question)
		if err != nil {
			return fmt.Errorf("explain policy: %w", err)
		}
		if err := printValue(cmd.OutOrStdout(), *output, x, func(w io.Writer) { printExplanation(w, x) }); err != nil {
			return err
		}
		if !x.Agrees {
			return fmt.Errorf("explain policy: %w", errDifference)
		}
		return nil
	}
	return command
}

// parsePort reads 80/TCP, 80 (which is TCP) and ICMP.
func parsePort(text string) (port uint16, protocol string, err error) {
	number, protocol, given := strings.Cut(text, "/")
	protocol = strings.ToUpper(protocol)
	switch {
	case !given && strings.EqualFold(number, "icmp"):
		return 0, "ICMP", nil
	case !given:
		protocol = "TCP"
	case protocol != "TCP" && protocol != "UDP" && protocol != "SCTP":
		return 0, "", fmt.Errorf("%q is not TCP, UDP or SCTP", protocol)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return 0, "", fmt.Errorf("%q is not a port; want 1 to 65535", number)
	}
	return uint16(n), protocol, nil
}

func printExplanation(w io.Writer, x api.Explanation) {
	for _, a := range x.Answers {
		what := x.Protocol
		if x.Port != 0 {
			what = fmt.Sprintf("port %d/%s", x.Port, x.Protocol)
		}
		fmt.Fprintf(w, "%s (%s) -> %s (%s) %s\n", x.From, a.Source, x.To, a.Destination, what)
		fmt.Fprintf(w, "  computed  %s\n  program   %s\n", a.Computed, a.Program)
		printSide(w, "egress", x.From, a.Egress)
		printSide(w, "ingress", x.To, a.Ingress)
	}
}

func printSide(w io.Writer, direction, end string, s *api.PolicySide) {
	if s == nil {
		fmt.Fprintf(w, "  %-8s  not decided here: %s is not a pod of this node\n", direction, end)
		return
	}
	fmt.Fprintf(w, "  %-8s  %s: %s\n", direction, s.Verdict, s.Reason)
	if len(s.Policies) > 0 {
		fmt.Fprintf(w, "            policies that apply: %s\n", strings.Join(s.Policies, ", "))
	}
}
