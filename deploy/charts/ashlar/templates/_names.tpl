{{/* Names, labels and pieces that several templates need. */}}

{{- define "ashlar.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "ashlar.daemonName" -}}
{{ .Release.Name }}-daemon
{{- end }}

{{- define "ashlar.controllerName" -}}
{{ .Release.Name }}-csi-controller
{{- end }}

{{- define "ashlar.nodeName" -}}
{{ .Release.Name }}-csi-node
{{- end }}

{{/* Labels of every object: call with (list . "component"). */}}
{{- define "ashlar.labels" -}}
{{ include "ashlar.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ashlar
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end }}

{{/* Labels that find the pods of a component; they never change: call with (list . "component"). */}}
{{- define "ashlar.selector" -}}
app.kubernetes.io/name: ashlar
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* What a container that needs nothing is given. */}}
{{- define "ashlar.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* A value as text. Numbers reach templates as floating point, and large ones would be written as 1e+06. */}}
{{- define "ashlar.text" -}}
{{- if kindIs "float64" . }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* Belongs into the securityContext of a pod. */}}
{{- define "ashlar.seLinux" -}}
{{- with .Values.seLinuxType -}}
seLinuxOptions:
  type: {{ . }}
{{- end }}
{{- end }}

{{/* Answers Probe of the CSI container over HTTP: call with (list . "address:port"). The answer decides readiness only:
     Probe tells of the daemon, and a restart of the driver would not bring that back. */}}
{{- define "ashlar.livenessProbeContainer" -}}
- name: liveness-probe
  image: {{ (index . 0).Values.sidecars.livenessProbe.image }}
  args:
    - --csi-address=/csi/csi.sock
    - --http-endpoint={{ index . 1 }}
    - --probe-timeout=5s
    - --v={{ (index . 0).Values.sidecars.logLevel }}
  securityContext:
    {{- include "ashlar.unprivileged" . | nindent 4 }}
  resources:
    {{- toYaml (index . 0).Values.sidecars.livenessProbe.resources | nindent 4 }}
  volumeMounts:
    - name: socket-dir
      mountPath: /csi
{{- end }}

{{/* A sidecar that elects a leader and calls the controller: call with (list . name port extraArguments). */}}
{{- define "ashlar.sidecar" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $sidecar := index $root.Values.sidecars $name -}}
- name: csi-{{ $name }}
  image: {{ $sidecar.image }}
  args:
    - --csi-address=/csi/csi.sock
    - --leader-election
    - --leader-election-namespace=$(POD_NAMESPACE)
    - --http-endpoint=:{{ index . 2 }}
    - --kube-api-qps=20
    - --kube-api-burst=100
    - --v={{ $root.Values.sidecars.logLevel }}
    {{- range index . 3 }}
    - {{ . }}
    {{- end }}
  env:
    - name: POD_NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    {{- if eq $name "provisioner" }}
    # With these two it sets the owner of the capacity objects, so that they go with the Deployment.
    - name: NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
    {{- end }}
  ports:
    - name: {{ $name }}
      containerPort: {{ index . 2 }}
  livenessProbe:
    httpGet:
      path: /healthz/leader-election
      port: {{ $name }}
    periodSeconds: 20
    timeoutSeconds: 5
    failureThreshold: 3
  securityContext:
    {{- include "ashlar.unprivileged" . | nindent 4 }}
  resources:
    {{- toYaml $sidecar.resources | nindent 4 }}
  volumeMounts:
    - name: socket-dir
      mountPath: /csi
{{- end }}
