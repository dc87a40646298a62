#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What `make install` and `make uninstall` do, for packages too:
#   install.sh install|uninstall BUILT BIN CNI_BIN CNI_CONF CONF UNITS     (directories)
set -euo pipefail
[ $# = 7 ] || { sed -n '4,5s/^# //p' "$0" >&2; exit 2; }
action=$1 built=$2 bin=$3 cni_bin=$4 cni_conf=$5 conf=$6 units=$7
here=$(dirname "$0")

# A file appears whole, and under its name by a rename within its directory: a
# container runtime starts the old plugin or the new one, and notices a new
# configuration (containerd does not see one that is moved in from elsewhere).
put() { # MODE FILE DIRECTORY
	local name=${2##*/}
	install -d "$3"
	install -m "$1" "$2" "$3/.$name.new"
	mv -f "$3/.$name.new" "$3/$name"
	echo "  $3/$name"
}

# Configuration that was edited stays; ours goes beside it.
keep() { # FILE DIRECTORY
	local name=${1##*/}
	if [ -e "$2/$name" ] && ! cmp -s "$1" "$2/$name"; then
		install -m 644 "$1" "$2/$name.new"
		echo "  $2/$name is kept as it is; the one of this version is $name.new"
	else
		put 644 "$1" "$2"
	fi
}

case $action in
install)
	put 755 "$built/mooringd" "$bin"
	put 755 "$built/mooring" "$bin"
	keep "$here/mooringd.yaml" "$conf"
	# Only where systemd has its place.
	[ ! -d "$units" ] || put 644 "$here/mooringd.service" "$units"
	put 755 "$built/mooring-ipam" "$cni_bin"
	put 755 "$built/mooring-cni" "$cni_bin"
	# Last: from here on the runtime takes pods, and waits for the daemon.
	keep "$here/10-mooring.conflist" "$cni_conf"
	[ -x "$cni_bin/portmap" ] || echo "  10-mooring.conflist chains portmap, which is not in $cni_bin: install containernetworking-plugins, or delete its stanza"
	;;
uninstall)
	# First: no new pods.
	rm -f "$cni_conf/10-mooring.conflist" "$cni_conf/10-mooring.conflist.new"
	rm -f "$cni_bin/mooring-cni" "$cni_bin/mooring-ipam" "$bin/mooringd" "$bin/mooring" "$units/mooringd.service"
	echo "  $conf and the state directory stay; pins of the datapath go with a reboot, or with \`mooring cleanup\` before this"
	;;
*)
	echo "install.sh: $action: neither install nor uninstall" >&2
	exit 2
	;;
esac
