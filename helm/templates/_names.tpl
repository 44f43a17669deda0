{{/* Names and labels, written once. */}}

{{- define "surefoot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 52 characters leave room for "-headless" and for the pods' ordinals in a label of 63. */}}
{{- define "surefoot.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "surefoot.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "surefoot.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "surefoot.selectorLabels" -}}
app.kubernetes.io/name: {{ include "surefoot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "surefoot.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "surefoot.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: surefoot
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "surefoot.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "surefoot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "surefoot.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "surefoot.authSecret" -}}
{{ .Values.auth.existingSecret | default (include "surefoot.fullname" .) }}
{{- end }}

{{/* Name of the Secret that holds the Redis URL; empty when each pod embeds its own Valkey. */}}
{{- define "surefoot.redisSecret" -}}
{{- if .Values.redis.existingSecret -}}
{{ .Values.redis.existingSecret }}
{{- else if .Values.redis.url -}}
{{ include "surefoot.fullname" . }}-redis
{{- end }}
{{- end }}

{{- define "surefoot.policiesPath" -}}
{{- if .Values.policies.volume -}}
{{ .Values.policies.path | default "/etc/surefoot/policies" }}
{{- else -}}
{{ .Values.policies.path }}
{{- end }}
{{- end }}

{{/* Name of the port that is served, in the pod and in the Services. */}}
{{- define "surefoot.scheme" -}}
{{- if .Values.tls.existingSecret -}}https{{- else -}}http{{- end }}
{{- end }}

{{/* Name under which the service is reached in the cluster, and the name that its certificate must have. */}}
{{- define "surefoot.host" -}}
{{ include "surefoot.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "surefoot.serverName" -}}
{{ .Values.tls.serverName | default (include "surefoot.host" .) }}
{{- end }}

{{/* What the schema cannot say: combinations that would start, and then lose or refuse something. */}}
{{- define "surefoot.refuse" -}}
{{- $most := .Values.replicaCount -}}
{{- if .Values.autoscaling.enabled -}}
{{- $most = .Values.autoscaling.maxReplicas -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int $most) -}}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int $most) 1) (not (include "surefoot.redisSecret" .)) -}}
{{- fail (printf "%d pods need a Redis that they share: an embedded Valkey belongs to one pod alone. Set redis.url or redis.existingSecret." (int $most)) -}}
{{- end -}}
{{- if and .Values.redis.url .Values.redis.existingSecret -}}
{{- fail "set one of redis.url and redis.existingSecret, not both" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret (or .Values.auth.clientToken .Values.auth.adminToken .Values.auth.keys) -}}
{{- fail "auth.existingSecret holds the tokens and keys: leave auth.clientToken, auth.adminToken and auth.keys empty" -}}
{{- end -}}
{{- with .Values.tls -}}
{{- if and (not .existingSecret) (or .serverName .clientCertificates .clientCASecret .callerSecret) -}}
{{- fail "the values of tls go with tls.existingSecret, which is not set" -}}
{{- end -}}
{{- if ne .clientCertificates (ne .callerSecret "") -}}
{{- fail "tls.clientCertificates needs tls.callerSecret, and the other way round: without a certificate of their own, probes are refused" -}}
{{- end -}}
{{- if and .clientCASecret (not .clientCertificates) -}}
{{- fail "tls.clientCASecret is read with tls.clientCertificates only" -}}
{{- end -}}
{{- end -}}
{{- end }}
