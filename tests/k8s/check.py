#!/usr/bin/env python3
"""Renders every overlay and checks what a cluster would otherwise be the first to say.

    check.py [FOLDER ...]      the overlays, or these folders

Each object is held to Kubernetes' own schema, in which unknown fields and API versions are errors, then to what no schema sees:
references, selectors, ports, quantities, and how a pod must be confined. Before that, the check checks itself: it breaks the
overlays in many ways, each of which must be found. Needs kubectl, and kubernetes-validate for Python.
"""

import copy
import functools
import ipaddress
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).resolve().parent
MANIFESTS = HERE.parents[1] / "deploy/k8s"
GUIDE = MANIFESTS.parent / "guide/cluster.md"
# That of this Python's environment, or what is found.
KUBECTL = next((str(path) for path in [Path(sys.executable).with_name("kubectl")] if path.exists()), "kubectl")
# The oldest that the manifests are written for, and the newest that they were checked for.
VERSIONS = ("1.31", "1.36")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
REFERENCES = {
    "configMapRef": "ConfigMap", "configMapKeyRef": "ConfigMap", "configMap": "ConfigMap", "secretRef": "Secret",
    "secretKeyRef": "Secret", "secret": "Secret", "persistentVolumeClaim": "PersistentVolumeClaim",
}
CONFINED_POD = {"automountServiceAccountToken": False, "securityContext.runAsNonRoot": True,
                "securityContext.seccompProfile.type": "RuntimeDefault"}
CONFINED_CONTAINER = {"securityContext.allowPrivilegeEscalation": False, "securityContext.readOnlyRootFilesystem": True,
                      "securityContext.capabilities": {"drop": ["ALL"]}}
# Secrets that no manifest holds: `gleaner cluster secrets` prints them.
PRINTED = {("Secret", name) for name in re.findall(r'"(tls-\w+)"', (HERE.parents[1] / "deploy/src/secrets.rs").read_text())}
# Kubernetes has it in each namespace.
GIVEN = {("ConfigMap", "kube-root-ca.crt")}
# What is in no namespace.
UNSPACED = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
# The binary's flags that are variables too.
SOURCES = [path.read_text() for path in HERE.parents[1].glob("*/src/**/*.rs")]
FLAGS = {flag for text in SOURCES for flag in re.findall(r'env = "(GLEANER_\w+)"', text)}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# The metrics that the roles register, without the prefix that all have.
METRICS = {name for text in SOURCES for name in re.findall(r'\.register\(\s*"(\w+)"', text)}


def fields(required=(), **properties):
    """The schema of an object with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


TEXT, COUNT, LABELS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object", "additionalProperties": {"type": "string"}}
HOURS = {"type": "string", "pattern": r"^\d+h$"}
METADATA = fields(["name"], name=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
# Objects that Kubernetes itself does not know: as much of their definitions as the overlays use.
CUSTOM = {
    # keda.sh/docs, "ScaledObject specification", and "External push" of its scalers
    "keda.sh/v1alpha1 ScaledObject": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(
            ["scaleTargetRef", "triggers"], scaleTargetRef=fields(["name"], name=TEXT, kind=TEXT, apiVersion=TEXT),
            minReplicaCount=COUNT, maxReplicaCount=COUNT, pollingInterval=COUNT, cooldownPeriod=COUNT,
            triggers={"type": "array", "minItems": 1, "items": fields(
                ["type", "metadata"], type={"enum": ["external", "external-push"]},
                metadata=fields(["scalerAddress", "role", "perReplica"], scalerAddress=TEXT, role={"enum": ["worker", "trainer"]},
                                perReplica={"type": "string", "pattern": r"^\d+(\.\d+)?$"}),
                authenticationRef=fields(["name"], name=TEXT))})),
    # keda.sh/docs, "Authentication", and "External push" of its scalers
    "keda.sh/v1alpha1 TriggerAuthentication": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(["secretTargetRef"], secretTargetRef={"type": "array", "minItems": 1, "items": fields(
            ["parameter", "name", "key"], parameter={"enum": ["caCert", "tlsClientCert", "tlsClientKey"]}, name=TEXT, key=TEXT)})),
    # kueue.sigs.k8s.io/docs/reference/kueue.v1beta1
    "kueue.x-k8s.io/v1beta1 LocalQueue": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=fields(["clusterQueue"], clusterQueue=TEXT)),
    # jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2; the Job within is Kubernetes' own
    "jobset.x-k8s.io/v1alpha2 JobSet": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(
            ["replicatedJobs"], network=fields(enableDNSHostnames={"type": "boolean"}), ttlSecondsAfterFinished=COUNT,
            replicatedJobs={"type": "array", "minItems": 1, "items": fields(
                ["name", "template"], name=TEXT, replicas=COUNT, template=fields(["spec"], spec={"type": "object"}))})),
    # cert-manager.io/docs/reference/api-docs
    "cert-manager.io/v1 Issuer": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(selfSigned=fields(), ca=fields(["secretName"], secretName=TEXT))),
    "cert-manager.io/v1 Certificate": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(
            ["secretName", "issuerRef"], secretName=TEXT, issuerRef=fields(["name"], name=TEXT), isCA={"type": "boolean"},
            commonName=TEXT, duration=HOURS, renewBefore=HOURS, usages={"type": "array", "items": {"enum": ["server auth", "client auth"]}},
            dnsNames={"type": "array", "minItems": 1, "items": TEXT},
            privateKey=fields(["algorithm"], algorithm={"enum": ["ECDSA"]}, size={"enum": [256]}, rotationPolicy={"enum": ["Always"]}))),
    # github.com/prometheus-operator/prometheus-operator, Documentation/api-reference
    "monitoring.coreos.com/v1 PrometheusRule": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(["groups"], groups={"type": "array", "minItems": 1, "items": fields(
            ["name", "rules"], name=TEXT, rules={"type": "array", "minItems": 1, "items": fields(
                ["alert", "expr", "labels", "annotations"], alert={"type": "string", "pattern": "^[A-Z][A-Za-z]+$"}, expr=TEXT,
                labels=LABELS, annotations=LABELS, **{"for": {"type": "string", "pattern": r"^\d+(s|m|h)$"}})})})),
    "monitoring.coreos.com/v1 PodMonitor": fields(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=METADATA,
        spec=fields(["selector", "podMetricsEndpoints"], selector=fields(["matchLabels"], matchLabels=LABELS),
                    podMetricsEndpoints={"type": "array", "minItems": 1, "items": fields(
                        ["port"], port=TEXT, interval={"type": "string", "pattern": r"^\d+(ms|s|m)$"}, path=TEXT)})),
}


def render(folder):
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise SystemExit(f"{folder}: {done.stderr.strip()}")
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def get(item, path, default=None):
    """The value at a dotted path; nothing on the way is a nothing at its end."""
    for key in path.split("."):
        item = item.get(key) if isinstance(item, dict) else None
    return default if item is None else item


def every(item, key):
    """All values of `key` at any depth."""
    if isinstance(item, dict):
        yield from [item[key]] if key in item else []
        item = [*item.values()]
    for value in item if isinstance(item, list) else []:
        yield from every(value, key)


def matches(selector, labels):
    if selector.get("matchExpressions"):
        raise ValueError("matchExpressions are not understood by this check")
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


@functools.cache
def schema(text):
    item, faults = json.loads(text), []
    if custom := CUSTOM.get(f"{item.get('apiVersion')} {item.get('kind')}"):
        found = jsonschema.Draft202012Validator(custom).iter_errors(item)
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in found]
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            faults.append(f"{'.'.join(map(str, error.path))}: {error.message[:200]} (schema {version})")
        except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
            faults.append(f"unknown kind or apiVersion: {getattr(error, 'message', error)}")
    return faults


def differs(item, wanted):
    return (f"{path} is not {value}" for path, value in wanted.items() if get(item, path) != value)


def jobs(item):
    """The Jobs that a JobSet makes."""
    return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job.get("name")}, "spec": get(job, "template.spec", {})}
            for job in get(item, "spec.replicatedJobs", [])]


def templates(item):
    """Those of an object's pods."""
    return [found for of in [item, *jobs(item)] if (found := get(of, "spec.template"))]


def workload(item, template, have):
    spec, labels = get(template, "spec"), get(template, "metadata.labels", {})
    chosen = get(item, "spec.selector.matchLabels") and matches(get(item, "spec.selector"), labels)
    if jobs(item) and spec.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "restarts pods of a Job that have ended well"
    # A Job's selector is made for it.
    if not chosen and not jobs(item):
        yield "selector does not match its own pods' labels"
    yield from differs(spec, CONFINED_POD)
    if not get(spec, "securityContext.runAsUser", 0) or get(spec, "hostNetwork") or any(every(spec, "hostPath")):
        yield "pod runs as root, or in the node's network or files"
    if not all(matches(spread["labelSelector"], labels) for spread in spec.get("topologySpreadConstraints", [])):
        yield "topologySpreadConstraints select other pods"
    wanted = [("ServiceAccount", spec.get("serviceAccountName"))]
    for key, kind in REFERENCES.items():
        refs = [ref for ref in every(spec, key) if not ref.get("optional")]
        wanted += [(kind, ref.get("name") or ref.get("secretName") or ref.get("claimName")) for ref in refs]
    yield from (f"{kind} {name} does not exist" for kind, name in wanted if (kind, name) not in have | PRINTED | GIVEN)
    yield from kept(spec)
    yield from spooled(spec)
    queue = get(item, "metadata.labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue and ("LocalQueue", queue) not in have:
        yield f"LocalQueue {queue} does not exist"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in get(spec, "initContainers", []) + get(spec, "containers", []):
        yield from (f"container {container.get('name')}: {fault}" for fault in confined(container, volumes))


def size(text):
    """A number of bytes, of Kubernetes or of a flag."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()
    return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit.removesuffix("B").removesuffix("i")]


def kept(spec):
    """What a pod keeps in memory stays below what it requests, or it is the first to be evicted."""
    in_memory = sum(size(volume["emptyDir"]["sizeLimit"]) for volume in spec.get("volumes", []) if get(volume, "emptyDir.medium") == "Memory")
    for container in spec.get("containers", []):
        cache = next((entry["value"] for entry in container.get("env", []) if entry["name"] == "GLEANER_CACHE_BYTES"), 0)
        requested = get(container, "resources.requests.memory")
        if cache and requested and size(cache) + in_memory >= size(requested):
            yield f"keeps {cache} of pixels and {in_memory} bytes of volumes in memory, and requests {requested}"


def spooled(spec):
    """A list that a coordinator takes lies on the disk as it was sent, and beside it as lines, each of which has up to as much again."""
    for container in spec.get("containers", []):
        if container.get("args") != ["coordinator"]:
            continue
        room = [volume["emptyDir"].get("sizeLimit", "0") for volume in spec.get("volumes", []) if "emptyDir" in volume]
        room = min(map(size, [*room, get(container, "resources.limits.ephemeral-storage", "1024G")]), default=0)
        largest = next((entry["value"] for entry in container.get("env", []) if entry["name"] == "GLEANER_LARGEST_LIST"), "64G")
        if 3 * size(largest) > room:
            yield f"takes lists of {largest} bytes, and has not room for three times as much"


def ports(container):
    """A container's ports, by number and by name."""
    return {key for port in container.get("ports", []) for key in (port["containerPort"], port.get("name"))}


def confined(container, volumes):
    if not re.fullmatch(r"[^@]+(:(?!latest$)[\w][\w.-]*|@sha256:[0-9a-f]{64})", str(container.get("image"))):
        yield f"image {container.get('image')} has no tag, or `latest`"
    for kind, other in (("requests", "limits"), ("limits", "requests")):
        # A limit alone is a request, too.
        for resource in {"cpu", "memory", "ephemeral-storage"} & {"cpu", "memory", *get(container, f"resources.{other}", {})}:
            if not get(container, f"resources.{kind}.{resource}"):
                yield f"no resources.{kind}.{resource}"
    yield from differs(container, CONFINED_CONTAINER)
    mounted = (mount["name"] for mount in container.get("volumeMounts", []))
    yield from (f"volume {name} does not exist" for name in mounted if name not in volumes)
    for probe in PROBES:
        if ports(container) and not container.get(probe):
            yield f"listens, but has no {probe}"
        for port in every(container.get(probe), "port"):
            if port not in ports(container):
                yield f"{probe} asks port {port}, which is not there"


def service(item, found):
    targets = found({"matchLabels": get(item, "spec.selector", {})})
    if not get(item, "spec.selector") or not targets:
        yield "selector matches no pod"
    for port in get(item, "spec.ports", []):
        target = port.get("targetPort", port["port"])
        if not port.get("name") or any(target not in ports for ports in targets):
            yield f"port {port['port']} has no name, or no pod has its target {target}"


def is_within(cidr, other):
    inner, outer = ipaddress.ip_network(cidr), ipaddress.ip_network(other)
    return inner.version == outer.version and inner != outer and inner.subnet_of(outer)


def policy(item, found):
    """A NetworkPolicy. Peers in other namespaces are not among the overlay's objects."""
    selectors = [get(item, "spec.podSelector", {})]
    for way, peers in (("ingress", "from"), ("egress", "to")):
        rules = get(item, f"spec.{way}", [])
        if rules and way.title() not in get(item, "spec.policyTypes", []):
            yield f"has rules for {way} that policyTypes does not name"
        if not all(get(rule, peers) for rule in rules):
            yield f"{way} lets everybody through"
        for block in every(get(item, f"spec.{way}", []), "ipBlock"):
            if not all(is_within(cidr, block["cidr"]) for cidr in block.get("except", [])):
                yield f"{way}: an exception is not within {block['cidr']}"
        selectors += [peer["podSelector"] for rule in rules for peer in get(rule, peers, []) if [*peer] == ["podSelector"]]
    if not all(map(found, selectors)):
        yield "selector matches no pod"


def scaled(item, items):
    """A HorizontalPodAutoscaler or a ScaledObject."""
    name = get(item, "spec.scaleTargetRef.name")
    target = [other for other in items if other.get("kind") == "Deployment" and get(other, "metadata.name") == name]
    if not target:
        yield f"scales Deployment {name}, which does not exist"
    elif get(target[0], "spec.replicas") is not None:
        yield f"scales Deployment {name}, whose replicas are fixed"
    # One that asks for a pod by device must know how many a pod has.
    devices = [int(gpus) for other in target for limits in every(other, "limits") if (gpus := limits.get("nvidia.com/gpu"))]
    asked = [of["perReplica"] for of in every(item, "metadata") if of.get("role") == "trainer"]
    if devices and asked and asked != [str(sum(devices))]:
        yield f"asks for a pod for each {asked[0]} devices, and a pod has {sum(devices)}"
    rivals = [other for other in items if get(other, "spec.scaleTargetRef.name") == name]
    if len(rivals) > 1:
        yield f"is one of {len(rivals)} that scale Deployment {name}"
    services = {f"{get(s, 'metadata.name')}.{get(s, 'metadata.namespace')}.svc:{port['port']}"
                for s in items if s.get("kind") == "Service" for port in get(s, "spec.ports", [])}
    yield from (f"no Service has {address}" for address in every(item, "scalerAddress") if address not in services)


def named(item, have):
    """That what an object names is there."""
    kind = item.get("kind")
    if kind == "ValidatingAdmissionPolicyBinding":
        wanted = [("ValidatingAdmissionPolicy", get(item, "spec.policyName"))]
    elif kind in ("RoleBinding", "ClusterRoleBinding"):
        wanted = [(get(item, "roleRef.kind"), get(item, "roleRef.name")), *((subject["kind"], subject["name"]) for subject in get(item, "subjects", []))]
    elif kind == "ScaledObject":
        wanted = [("TriggerAuthentication", ref["name"]) for ref in every(item, "authenticationRef")]
    elif kind == "TriggerAuthentication":
        wanted = [("Secret", ref["name"]) for ref in get(item, "spec.secretTargetRef", [])]
    elif kind == "Certificate":
        wanted = [("Issuer", get(item, "spec.issuerRef.name"))]
    else:
        return
    yield from (f"{kind} {name} does not exist" for kind, name in wanted if (kind, name) not in have | PRINTED)


def pod_monitor(item, found):
    pods = found(get(item, "spec.selector", {}))
    names = [endpoint["port"] for endpoint in get(item, "spec.podMetricsEndpoints", [])]
    if not pods or any(name not in ports for name in names for ports in pods):
        yield f"a pod that it selects has no port {names}, or it selects none"


def measured(item):
    """Whether all that a dashboard shows, or a rule asks for, is measured."""
    for name in sorted(set(re.findall(r"gleaner_(\w+)", " ".join(every(item, "expr"))))):
        if name not in METRICS and re.sub("_(total|bucket|sum|count)$", "", name) not in METRICS:
            yield f"gleaner_{name} is measured nowhere"


def check(items):
    """All faults of one overlay's objects, each with the object that it is in."""
    faults, have, pods = [], {(item.get("kind"), get(item, "metadata.name")) for item in items}, []
    namespaces = {name for kind, name in have if kind == "Namespace"}
    for template in (template for item in items for template in templates(item)):
        pods.append((get(template, "metadata.labels", {}), set().union(*map(ports, get(template, "spec.containers", [])))))

    def found(selector):
        return [ports for labels, ports in pods if matches(selector, labels)]

    for item in items:
        kind, here = item.get("kind"), list(schema(json.dumps(item)))
        here += [fault for job in jobs(item) for fault in schema(json.dumps(job))]
        here += [fault for template in templates(item) for fault in workload(item, template, have)]
        if kind == "Service":
            here += service(item, found)
        if kind == "NetworkPolicy":
            here += policy(item, found)
        if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            here += scaled(item, items)
        here += named(item, have)
        if kind == "PodMonitor":
            here += pod_monitor(item, found)
        if kind == "ConfigMap":
            here += [fault for name, text in get(item, "data", {}).items() if name.endswith(".json") for fault in measured(json.loads(text))]
        if kind == "PrometheusRule":
            here += measured(item)
        if kind == "PodDisruptionBudget" and not found(get(item, "spec.selector", {})):
            here.append("selector matches no pod")
        variables = [*get(item, "data", {}), *(entry["name"] for env in every(item, "env") for entry in env)]
        here += [f"{name} is no flag of the binary" for name in variables if name.startswith("GLEANER_") and name not in FLAGS]
        amounts = [*every(item, "sizeLimit"), *(q for key in ("requests", "limits") for of in every(item, key) for q in of.values())]
        here += [f"{value!r} is not a quantity" for value in amounts if not QUANTITY.fullmatch(str(value))]
        if kind not in UNSPACED and get(item, "metadata.namespace") not in namespaces:
            here.append("is in no namespace of this overlay")
        faults += [f"{kind} {get(item, 'metadata.name')}: {fault}" for fault in here]
    if not any(item.get("kind") == "NetworkPolicy" and get(item, "spec.podSelector") == {}
               and {"Ingress", "Egress"} <= {*get(item, "spec.policyTypes", [])} for item in items):
        faults.append("no NetworkPolicy holds for all pods")
    return faults


# (object, where, what to put there (None: take it away), the fault that must be found)
BREAKS = (
    ("Deployment/worker", "spec.template.spec.containers.0.imagePulPolicy", "x", "Additional properties are not allowed"),
    ("Deployment/worker", "apiVersion", "apps/v1beta1", "unknown kind or apiVersion"),
    ("Deployment/worker", "spec.selector.matchLabels", {"app": "worker"}, "does not match its own pods"),
    ("Service/coordinator", "spec.selector", {"app.kubernetes.io/component": "coordinater"}, "selector matches no pod"),
    ("ScaledObject/worker", "spec.scaleTargetRef.name", "workers", "scales Deployment workers, which does not exist"),
    ("ScaledObject/worker", "spec.scaleTargetRef.name", "trainer", "is one of 2 that scale Deployment trainer"),
    ("ScaledObject/worker", "spec.maxReplicas", 9, "Additional properties are not allowed"),
    ("ScaledObject/worker", "spec.triggers.0.metadata.role", "workers", "'workers' is not one of"),
    ("ScaledObject/worker", "spec.triggers.0.metadata.scalerAddress", "coordinator:7071", "no Service has coordinator:7071"),
    ("ScaledObject/worker", "apiVersion", "keda.sh/v1", "unknown kind or apiVersion"),
    ("ScaledObject/worker", "spec.triggers.0.authenticationRef", {"name": "coord"}, "TriggerAuthentication coord does not exist"),
    ("TriggerAuthentication/coordinator", "spec.secretTargetRef.0.name", "tls-kedo", "Secret tls-kedo does not exist"),
    ("ScaledObject/trainer", "spec.triggers.0.metadata.perReplica", "4", "devices, and a pod has"),
    ("Deployment/trainer", "spec.template.spec.containers.0.env.0", {"name": "GLEANER_CACHE_BYTES", "value": "4GiB"}, "keeps 4GiB of pixels"),
    ("Deployment/trainer", "metadata.labels", {"kueue.x-k8s.io/queue-name": "x"}, "LocalQueue x does not exist"),
    ("JobSet/birds-1", "spec.replicatedJob", [], "Additional properties are not allowed"),
    ("JobSet/birds-1", "spec.replicatedJobs.0.template.spec.paralelism", 4, "Additional properties are not allowed"),
    ("JobSet/birds-1", "spec.replicatedJobs.0.template.spec.template.spec.securityContext.runAsUser", 0, "runs as root"),
    ("JobSet/birds-1", "spec.replicatedJobs.0.template.spec.template.spec.containers.0.envFrom.0.configMapRef.name", "st", "ConfigMap st does not exist"),
    ("JobSet/birds-1", "spec.replicatedJobs.0.template.spec.template.spec.restartPolicy", "Always", "restarts pods of a Job that"),
    ("JobSet/birds-1", "metadata.labels", {"kueue.x-k8s.io/queue-name": "x"}, "LocalQueue x does not exist"),
    ("LocalQueue/trainers", "spec.clusterQueues", ["gpus"], "Additional properties are not allowed"),
    ("Certificate/tls-worker", "spec.issuerRef.name", "author", "Issuer author does not exist"),
    ("Certificate/tls-worker", "spec.renewBefore", "60d", "does not match"),
    ("ClusterRoleBinding/gleaner-token-reviewer", "subjects.0.name", "coord", "ServiceAccount coord does not exist"),
    ("RoleBinding/trainer", "roleRef.name", "trainers", "Role trainers does not exist"),
    ("ValidatingAdmissionPolicyBinding/gleaner-trainer", "spec.policyName", "gleaner", "ValidatingAdmissionPolicy gleaner does not exist"),
    ("ValidatingAdmissionPolicy/gleaner-trainer", "spec.validation", [], "Additional properties are not allowed"),
    ("HorizontalPodAutoscaler/worker", "spec.scaleTargetRef.name", "coordinator", "whose replicas are fixed"),
    ("HorizontalPodAutoscaler/worker", "spec.maxReplica", 3, "Additional properties are not allowed"),
    ("PodMonitor/gleaner", "spec.podMetricsEndpoints.0.port", "http", "has no port ['http']"),
    ("PodMonitor/gleaner", "spec.selector.matchLabels", {"app": "x"}, "or it selects none"),
    ("ConfigMap/gleaner-dashboard", "data", {"x.json": '{"expr": "rate(gleaner_worker_hugs_total[1m])"}'}, "measured nowhere"),
    ("PrometheusRule/gleaner", "spec.groups.0.rules.0.expr", "gleaner_coordinator_hugs == 0", "measured nowhere"),
    ("NetworkPolicy/web", "spec.egress.0.to.1.ipBlock.except", ["10.0.0.0/8"], "is not within"),
    ("Deployment/worker", "spec.template.spec.containers.0.readinessProbe.httpGet.port", "metric", "asks port metric"),
    ("PodDisruptionBudget/trainer", "spec.selector.matchLabels", {"app": "x"}, "selector matches no pod"),
    ("NetworkPolicy/client", "spec.podSelector.matchLabels", {"gleaner-client": "yes"}, "selector matches no pod"),
    ("NetworkPolicy/coordinator", "spec.ingress.0.from.0.podSelector.matchLabels", {"a": "b"}, "selector matches no pod"),
    ("NetworkPolicy/coordinator", "spec.ingress.0.from", None, "lets everybody through"),
    ("NetworkPolicy/default", "spec.policyTypes", ["Ingress"], "policyTypes does not name"),
    ("NetworkPolicy/default", "spec.podSelector", {"matchLabels": {"app.kubernetes.io/name": "gleaner"}}, "holds for all pods"),
    ("Service/coordinator", "spec.ports.0.targetPort", "http", "no pod has its target http"),
    ("Deployment/worker", "spec.template.spec.serviceAccountName", "work", "ServiceAccount work does not exist"),
    ("Deployment/worker", "spec.template.spec.containers.0.envFrom.0.configMapRef.name", "st", "ConfigMap st does not exist"),
    ("Deployment/worker", "spec.template.spec.containers.0.envFrom.0", {"secretRef": {"name": "s"}}, "Secret s does not exist"),
    ("PersistentVolumeClaim/store", "metadata.name", "stores", "PersistentVolumeClaim store does not exist"),
    ("Deployment/worker", "spec.template.spec.containers.0.volumeMounts.0.name", "v", "volume v does not exist"),
    ("Deployment/worker", "spec.template.spec.containers.0.image", "gleaner:latest", "has no tag, or `latest`"),
    ("Deployment/worker", "spec.template.spec.containers.0.resources.limits.memory", "1GB", "'1GB' is not a quantity"),
    ("Deployment/worker", "spec.template.spec.containers.0.resources", None, "no resources.requests.cpu"),
    ("Deployment/coordinator", "spec.template.spec.containers.0.readinessProbe", None, "has no readinessProbe"),
    ("Deployment/coordinator", "spec.template.spec.containers.0.livenessProbe.httpGet.port", 7071, "asks port 7071"),
    ("Deployment/worker", "spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", False, "is not True"),
    ("Deployment/worker", "spec.template.spec.securityContext.runAsUser", 0, "runs as root"),
    ("Deployment/worker", "spec.template.spec.automountServiceAccountToken", True, "automountServiceAccountToken is not False"),
    ("Deployment/coordinator", "spec.template.spec.containers.0.env", None, "has not room for three times"),
    ("Deployment/worker", "metadata.namespace", None, "is in no namespace"),
    ("Deployment/worker", "spec.template.spec.containers.0.env.0.name", "GLEANER_COORD", "is no flag of the binary"),
)


def self_test(overlays):
    def at_name(items, name):
        return next((item for item in items if f"{item['kind']}/{item['metadata']['name']}" == name), None)

    for name, path, value, expected in BREAKS:
        broken = copy.deepcopy(next(items for items in overlays if at_name(items, name)))
        at = at_name(broken, name)
        *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in way:
            at = at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value
        faults = check(broken)
        if not any(expected in fault for fault in faults):
            raise SystemExit(f"the check is broken: {name} with {path} = {value!r} gave {faults}, not {expected!r}")


def main():
    self_test([render(MANIFESTS / "overlays" / name) for name in ("local", "autoscaled", "local-hpa", "autoscaled-tls", "local-accounts", "eks", "gang")])
    undocumented = sorted(name for name in METRICS if f"gleaner_{name}" not in GUIDE.read_text())
    if undocumented:
        raise SystemExit(f"{GUIDE.name} does not tell of the metrics {undocumented}")
    print(f"{len(BREAKS)} deliberate mistakes, all found")
    wrong = False
    for folder in map(Path, sys.argv[1:] or sorted((MANIFESTS / "overlays").iterdir())):
        items = render(folder)
        faults = check(items)
        wrong |= bool(faults)
        print(f"{folder.name}: {len(items)} objects, {len(faults)} faults", *faults, sep="\n  ")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
