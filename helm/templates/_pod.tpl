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

{{- define "surefoot.probes" -}}
startupProbe:
  httpGet:
    path: /health/live
    port: http
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ max 1 (ceil (divf .Values.startupSeconds 2)) }}
readinessProbe:
  httpGet:
    path: /health/ready
    port: http
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 1
livenessProbe:
  httpGet:
    path: /health/live
    port: http
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
