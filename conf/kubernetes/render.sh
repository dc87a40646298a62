#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Renders the chart into plain manifests:  render.sh DIRECTORY
set -euo pipefail
[ $# = 1 ] || { sed -n '4s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
chart() { (cd "$here/../../test/kubernetes/chart" && GOFLAGS= go run -trimpath . "$here/chart"); }
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
