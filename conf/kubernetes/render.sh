#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Renders the chart into plain manifests:  render.sh DIRECTORY
set -euo pipefail
[ $# = 1 ] || { sed -n '4s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
# Flags as the tests build the rest of that module, so that this takes what is there.
chart() { (cd "$here/../../test/kubernetes/build" && GOFLAGS= CGO_ENABLED=0 go run -trimpath -gcflags=all=-dwarf=false ./chart "$here/chart"); }
{
	echo "# SPDX-License-Identifier: Apache-2.0"
	echo "#"
	echo "# Rendered from chart/ by make manifests. Replace api.example.internal by the address by"
	echo "# which the nodes' kubelets reach the API server; docs/kubernetes.md is the way from here."
	echo '{apiServer: {host: api.example.internal}}' | chart
} >"$out/mooring.yaml"
{
	echo "# SPDX-License-Identifier: Apache-2.0"
	echo "#"
	echo "# Rendered from chart/ by make manifests, with uninstall: true."
	echo '{uninstall: true}' | chart
} >"$out/uninstall.yaml"
