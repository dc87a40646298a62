{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "image" -}}
"{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
{{- end -}}

{{- define "socket" -}}
{{ .Values.paths.run }}/mooring.sock
{{- end -}}

{{- /* What every pod of ours on a node is like. */ -}}
{{- define "pod" -}}
hostNetwork: true
# The host's resolver: the cluster's works only once this pod does.
dnsPolicy: Default
priorityClassName: {{ .Values.priorityClassName }}
nodeSelector: {{ toJson .Values.nodeSelector }}
tolerations: {{ toJson .Values.tolerations }}
{{- end -}}

{{- /* The default profiles of AppArmor and seccomp refuse /sys/fs/bpf and, in older runtimes, bpf(2). */ -}}
{{- define "unconfined" -}}
seLinuxOptions: {{ toJson .Values.seLinuxOptions }}
appArmorProfile: {type: Unconfined}
seccompProfile: {type: Unconfined}
{{- end -}}

{{- define "configuration" -}}
{{- $own := dict "socket" (include "socket" .) "bpffs" (printf "%s/mooring" .Values.paths.bpf) "stateDir" .Values.paths.state "cgroup" "/host/cgroup" "metricsAddress" (printf "%s:%v" .Values.metrics.host .Values.metrics.port) -}}
{{- range $key := keys $own -}}
{{- if hasKey $.Values.config $key -}}{{- fail (printf "config.%s: paths and metrics say it" $key) -}}{{- end -}}
{{- end -}}
{{ mergeOverwrite (deepCopy .Values.config) $own | toYaml }}
{{- end -}}

{{- define "conflist" -}}
{{- $ours := dict "type" "mooring-cni" "socket" (include "socket" .) "bpffs" (printf "%s/mooring" .Values.paths.bpf) "ipam" (dict "type" "mooring-ipam" "stateDir" .Values.paths.state) -}}
{{- $list := dict "cniVersion" (first .Values.cni.versions) "name" "mooring" "plugins" (prepend .Values.cni.chained $ours) -}}
{{- if gt (len .Values.cni.versions) 1 -}}{{- $_ := set $list "cniVersions" .Values.cni.versions -}}{{- end -}}
{{ toPrettyJson $list }}
{{- end -}}
