#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Renders the chart into plain manifests:  render.sh DIRECTORY
set -euo pipefail
[ $# = 1 ] || { sed -n '4s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
# HELM: a helm that is there. Otherwise it is built as the tests build it.
export HELM_CACHE_HOME=/nonexistent HELM_CONFIG_HOME=/nonexistent HELM_DATA_HOME=/nonexistent
helm() {
	if [ -n "${HELM:-}" ]; then
		"$HELM" "$@"
	else
		(cd "$here/../../test/kubernetes/build" && GOFLAGS= CGO_ENABLED=0 go run -trimpath -gcflags=all=-dwarf=false helm.sh/helm/v3/cmd/helm "$@")
	fi
}
# The oldest that the chart accepts: helm would take the version that it was built with.
chart() { helm template mooring "$here/chart" --namespace kube-system --kube-version 1.30 "$@"; }
{
	echo "# SPDX-License-Identifier: Apache-2.0"
	echo "#"
	echo "# Rendered from chart/ by make manifests. Replace api.example.internal by the address by"
	echo "# which the nodes' kubelets reach the API server; docs/kubernetes.md is the way from here."
	chart --set apiServer.host=api.example.internal
} >"$out/mooring.yaml.new"
{
	echo "# SPDX-License-Identifier: Apache-2.0"
	echo "#"
	echo "# Rendered from chart/ by make manifests, with uninstall: true."
	chart --set uninstall=true
} >"$out/uninstall.yaml.new"
for name in mooring uninstall; do mv "$out/$name.yaml.new" "$out/$name.yaml"; done
