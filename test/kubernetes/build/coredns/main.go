// SPDX-License-Identifier: Apache-2.0

// Command coredns is the DNS server of the conformance tests, and the one that a spec
// runs in a pod: CoreDNS with the plugins that they need and none of those of clouds,
// which take minutes to build.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
)

func main() {
	dnsserver.Directives = []string{"bind", "errors", "log", "cache", "hosts", "kubernetes"}
	coremain.Run()
}
