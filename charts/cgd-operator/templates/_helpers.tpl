{{- /* As Helm's own charts do it: the release and the chart, the chart's name once. */}}
{{- define "cgd.name" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name -}}
{{- $both := printf "%s-%s" .Release.Name $chart -}}
{{- $name := ternary .Release.Name (ternary $chart $both (hasPrefix (printf "%s-" .Release.Name) $chart)) (contains $chart .Release.Name) -}}
{{- .Values.fullnameOverride | default $name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- /* Of what has no namespace: releases of one name in two namespaces must not share it. */}}
{{- define "cgd.clusterName" -}}
{{ .Release.Namespace }}:{{ include "cgd.name" . }}
{{- end }}

{{- define "cgd.serviceAccount" -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) }}
{{- fail "serviceAccount.create is false: set serviceAccount.name to the ServiceAccount that is to have the operator's rights" }}
{{- end }}
{{- .Values.serviceAccount.name | default (include "cgd.name" .) }}
{{- end }}

{{- define "cgd.selector" -}}
app.kubernetes.io/name: cgd-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cgd.labels" -}}
{{ include "cgd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* An image by digest if there is one, else by tag. Takes a list: the image, its name in the values, the root. */}}
{{- define "cgd.image" -}}
{{- $image := index . 0 }}{{ $name := index . 1 }}{{ $root := index . 2 -}}
{{- $repository := required (printf "%s.repository is needed: build images/ and push them, then say where they are" $name) $image.repository -}}
{{- if $image.digest }}{{ $repository }}@{{ $image.digest }}{{ else }}{{ $repository }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* What the Pod Security Standard `restricted` asks of a pod, and of its containers. */}}
{{- define "cgd.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "cgd.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "cgd.placement" -}}
{{- range $field := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values $field }}
{{ $field }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A selector of namespaces by their names; takes the list, and an empty one selects all. */}}
{{- define "cgd.namespaces" -}}
{{- if . }}{matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}]}{{ else }}{}{{ end }}
{{- end }}
