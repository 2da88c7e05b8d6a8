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
  # It listens once the driver is ready, which in a new cluster takes as long as etcd and the daemons do.
  startupProbe:
    httpGet:
      path: /healthz/leader-election
      port: {{ $name }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 180
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

{{- /* The name that the program answers with: not a choice. */ -}}
{{- define "ashlar.driverName" -}}
csi.ashlar.io
{{- end }}

{{- define "ashlar.etcdName" -}}
{{ .Release.Name }}-etcd
{{- end }}

{{/* The Secret with ca.crt, tls.crt and tls.key for etcd; empty when etcd is spoken to in the clear. */}}
{{- define "ashlar.etcdSecret" -}}
{{- if .Values.etcd.tlsSecret }}{{ .Values.etcd.tlsSecret }}{{ else if .Values.etcd.enabled }}{{ include "ashlar.etcdName" . }}-tls{{ end }}
{{- end }}

{{/* What --metadata is given: the members of the chart's own etcd, or those of the values. */}}
{{- define "ashlar.metadata" -}}
{{- $endpoints := .Values.etcd.endpoints }}
{{- if .Values.etcd.enabled }}
{{- $name := include "ashlar.etcdName" . }}
{{- range $member := until (int .Values.etcd.replicas) }}
{{- $endpoints = append $endpoints (printf "https://%s-%d.%s.%s.svc:2379" $name $member $name $.Release.Namespace) }}
{{- end }}
{{- end -}}
etcd:{{ join "," $endpoints }}
{{- end }}

{{/* Settings by which a node knows where its cluster's records are; `ashlar cluster init` takes the same. */}}
{{- define "ashlar.metadataFlags" -}}
- --metadata={{ include "ashlar.metadata" . }}
- --etcd-prefix={{ .Values.cluster.etcdPrefix }}
{{- if include "ashlar.etcdSecret" . }}
- --etcd-ca=/etcd/ca.crt
- --etcd-cert=/etcd/tls.crt
- --etcd-key=/etcd/tls.key
{{- end }}
{{- end }}

{{/* Every address of a pod, and the pod's own, as parts of HOST:PORT. */}}
{{- define "ashlar.anyHost" -}}
{{ ternary "[::]" "0.0.0.0" (eq .Values.cluster.ipFamily "IPv6") }}
{{- end }}
{{- define "ashlar.podHost" -}}
{{ ternary "[$(POD_IP)]" "$(POD_IP)" (eq .Values.cluster.ipFamily "IPv6") }}
{{- end }}

{{/* What the containers of a cluster's daemon know of their pod. */}}
{{- define "ashlar.memberEnvironment" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: JOIN_DIRECTORY
  value: /join
{{- end }}
