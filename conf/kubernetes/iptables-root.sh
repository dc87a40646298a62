#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Copies iptables of this Debian with all that it needs into DIRECTORY, for an image
# that has nothing else:  iptables-root.sh DIRECTORY
# Of its two backends the one of nf_tables: it works beside rules of the other.
set -euo pipefail
[ $# = 1 ] || { sed -n '4,6s/^# //p' "$0" >&2; exit 2; }
root=$1
PATH=$PATH:/usr/sbin:/sbin
program=$(command -v xtables-nft-multi) || { echo "iptables-root.sh: xtables-nft-multi is not installed (apt-get install iptables)" >&2; exit 1; }

put() { # FILE [AS]
	install -D -m 755 "$1" "$root${2:-$1}"
}
for name in iptables ip6tables; do
	for verb in "" -restore -save; do put "$program" "/usr/sbin/$name$verb"; done
done
# The extensions are where the program looks for them.
extensions=$(dirname "$(find /usr/lib -path '*/xtables/libxt_comment.so' -print -quit)")
[ -d "$extensions" ] || { echo "iptables-root.sh: no extensions of iptables below /usr/lib" >&2; exit 1; }
mkdir -p "$root$extensions" && cp -L "$extensions"/*.so "$root$extensions/"
# Libraries, and the loader, under the names by which they are asked for: the program's
# and those of the one extension that has one of its own.
ldd "$program" "$extensions/libxt_connlabel.so" | grep -oE '/[^ ()]+\.so[^ ():]*( |$)' | sort -u | while read -r file; do
	case $file in "$extensions"/*) ;; *) put "$file" ;; esac
done
echo hosts: files dns >"$root/nsswitch.tmp" && install -D -m 644 "$root/nsswitch.tmp" "$root/etc/nsswitch.conf" && rm "$root/nsswitch.tmp"
