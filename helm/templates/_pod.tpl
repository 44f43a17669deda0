{{/* Parts of the pod that are long enough to stand alone. */}}

{{/* Whether the container gets a client token: always, unless it is served open and none was given. */}}
{{- define "surefoot.hasClientToken" -}}
{{- if or .Values.auth.existingSecret .Values.auth.clientToken (not .Values.auth.allowOpen) -}}true{{- end }}
{{- end }}

{{/* Environment from Secrets; the rest comes from the ConfigMap. A key that may be missing is optional. */}}
{{- define "surefoot.secretEnv" -}}
{{- $secret := include "surefoot.authSecret" . -}}
{{- if include "surefoot.hasClientToken" . }}
- name: SUREFOOT_CLIENT_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ .Values.auth.secretKeys.clientToken }}
      optional: {{ .Values.auth.allowOpen }}
{{- end }}
- name: SUREFOOT_ADMIN_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ .Values.auth.secretKeys.adminToken }}
- name: SUREFOOT_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ .Values.auth.secretKeys.keys }}
      optional: true
{{- with include "surefoot.redisSecret" . }}
- name: SUREFOOT_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ if $.Values.redis.existingSecret }}{{ $.Values.redis.secretKey }}{{ else }}redis-url{{ end }}
{{- end }}
{{- end }}

{{- define "surefoot.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end }}

{{- define "surefoot.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
A kubelet shows no certificate. Where callers need one, a command in the pod asks, with the certificate of
tls.callerSecret for readiness, and without one for liveness: one that has expired must not restart every pod.
*/}}
{{- define "surefoot.asks" -}}
{{- $what := .what -}}
{{- with .root -}}
{{- if .Values.tls.clientCertificates -}}
exec:
  command:
    - python
    - -m
    - service.health_check
    - {{ $what }}
    {{- if eq $what "ready" }}
    - --cert=/etc/surefoot/caller/tls.crt
    - --key=/etc/surefoot/caller/tls.key
    {{- end }}
{{- else -}}
httpGet:
  path: /health/{{ $what }}
  port: {{ include "surefoot.scheme" . }}
  {{- if .Values.tls.existingSecret }}
  scheme: HTTPS
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "surefoot.probes" -}}
{{- $live := include "surefoot.asks" (dict "root" . "what" "live") -}}
{{- /* A command costs a process at each turn. */}}
{{- $commands := .Values.tls.clientCertificates -}}
startupProbe:
  {{- $live | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: {{ $commands | ternary 5 2 }}
  failureThreshold: {{ max 1 (ceil (divf .Values.startupSeconds 2)) }}
readinessProbe:
  {{- include "surefoot.asks" (dict "root" . "what" "ready") | nindent 2 }}
  periodSeconds: {{ $commands | ternary 5 2 }}
  timeoutSeconds: {{ $commands | ternary 5 2 }}
  failureThreshold: 1
livenessProbe:
  {{- $live | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{/*
Volumes with what TLS needs, and where they go. They are mounted as directories, so that a renewed Secret comes through;
fsGroup gives the files to the container's group, and 0440 lets that read them. A Secret's further keys stay out.
*/}}
{{- define "surefoot.tlsVolumes" -}}
{{- with .Values.tls }}
{{- if .existingSecret }}
- name: tls
  projected:
    defaultMode: 0440
    sources:
      {{- include "surefoot.pair" .existingSecret | nindent 6 }}
      {{- if .clientCertificates }}
      - secret:
          name: {{ .clientCASecret | default .existingSecret }}
          items:
            - key: ca.crt
              path: ca.crt
      {{- end }}
{{- end }}
{{- if .clientCertificates }}
- name: caller
  projected:
    defaultMode: 0440
    sources:
      {{- include "surefoot.pair" .callerSecret | nindent 6 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "surefoot.pair" -}}
- secret:
    name: {{ . }}
    items:
      - key: tls.crt
        path: tls.crt
      - key: tls.key
        path: tls.key
{{- end }}

{{- define "surefoot.tlsMounts" -}}
{{- if .Values.tls.existingSecret }}
- name: tls
  mountPath: /etc/surefoot/tls
  readOnly: true
{{- end }}
{{- if .Values.tls.clientCertificates }}
- name: caller
  mountPath: /etc/surefoot/caller
  readOnly: true
{{- end }}
{{- end }}
