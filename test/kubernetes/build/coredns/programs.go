// SPDX-License-Identifier: Apache-2.0

//go:build programs

// Package build names the DNS server that the conformance tests build.
package build

import _ "github.com/coredns/coredns"
