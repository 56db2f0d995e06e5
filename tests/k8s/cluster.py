#!/usr/bin/env python3
"""Applies an overlay to the cluster of kubectl's context and puts it through what a day may bring; then removes all of it.

    cluster.py [OVERLAY] [--gleaner BINARY] [--python IMAGE]        overlays/local-urls, target/release/gleaner, python:3.13-slim

A dataset is gathered and a run trained while pods are killed and replaced (trial.py), through `kubectl port-forward`. Nothing may be
lost, no container may restart by itself, and NetworkPolicies must let pass what is needed and nothing else, if the cluster enforces
them. It fetches from a pod of its own in the namespace `pictures`, so workers must be allowed private addresses (local-urls).

Needs kubectl, both images where the overlay looks for them, and an image with Python for that pod and for the one that looks who
reaches whom. Refuses if either namespace is there already. Its figures are the lines that begin with `cluster:`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from check import HERE, KUBECTL, MANIFESTS
from trial import READY, Client, Failed, expect, figures, gather, note, train, until

GLEANER, PICTURES, PORT = "gleaner", "pictures", 17070
ROLES = ("coordinator", "worker", "trainer")
REACHES = """import socket, sys
for way in sys.argv[1:]:
    host, port = way.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 3).close()
        print(way, "yes", flush=True)
    except OSError:
        print(way, "no", flush=True)
"""


def kubectl(*arguments, input=None, namespace=GLEANER, seconds=120):
    done = subprocess.run([KUBECTL, "-n", namespace, *map(str, arguments)], input=input, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise Failed(f"kubectl {' '.join(map(str, arguments))}: {last}")
    return done.stdout


def objects(kind, *arguments, namespace=GLEANER):
    return json.loads(kubectl("get", kind, *arguments, "-o", "json", namespace=namespace))["items"]


class Pod:
    """A pod, as it was when it was looked up."""

    def __init__(self, item):
        self.name, self.ip, self.grace = item["metadata"]["name"], item["status"].get("podIP"), item["spec"]["terminationGracePeriodSeconds"]
        self.ready = any(c["type"] == "Ready" and c["status"] == "True" for c in item["status"].get("conditions", []))
        self.restarts = sum(c["restartCount"] for c in item["status"].get("containerStatuses", []))

    def kill(self):
        """SIGKILL, without a word; its Deployment starts another."""
        kubectl("delete", "pod", self.name, "--grace-period=0", "--force")


class Cluster:
    """The namespace of an overlay that has been applied: scales Deployments, kills and replaces pods."""

    def running(self, deployment):
        items = objects("pods", "-l", f"app.kubernetes.io/component={deployment}")
        live = [item for item in items if "deletionTimestamp" not in item["metadata"] and item["status"]["phase"] in ("Pending", "Running")]
        return [Pod(item) for item in sorted(live, key=lambda item: item["metadata"]["creationTimestamp"])]

    def has(self, pod):
        return any(item["metadata"]["name"] == pod.name for item in objects("pods"))

    def scale(self, deployment, replicas):
        note(f"{deployment} is scaled to {replicas}")
        kubectl("scale", f"deployment/{deployment}", f"--replicas={replicas}")

    def replace(self, pod):
        note(f"{pod.name} is deleted")
        kubectl("delete", "pod", pod.name, "--wait=false")

    def recreate(self, deployment):
        note(f"{deployment} is restarted")
        kubectl("rollout", "restart", f"deployment/{deployment}")
        kubectl("rollout", "status", f"deployment/{deployment}", f"--timeout={READY}s")

    def await_ready(self, deployment, replicas, seconds):
        def ready():
            pods = self.running(deployment)
            return len(pods) == replicas and all(pod.ready for pod in pods)
        until(f"{replicas} of {deployment} are ready", seconds, ready)


def web(image):
    """The pod that is fetched from."""
    labels = {"app": "web"}
    container = {"name": "web", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["python3", "/web/web.py"],
                 "readinessProbe": {"tcpSocket": {"port": 8080}}, "volumeMounts": [{"name": "web", "mountPath": "/web"}],
                 "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    confined = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": PICTURES}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web"}, "data": {"web.py": (HERE / "web.py").read_text()}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": labels},
         "spec": {"containers": [container], "volumes": [{"name": "web", "configMap": {"name": "web"}}], "securityContext": confined,
                  "terminationGracePeriodSeconds": 0}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
         "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]}},
    ]


@contextlib.contextmanager
def forwarded():
    """The coordinator's port on this machine. A forward ends with its pod, so another begins."""
    ended, current = threading.Event(), []

    def keep():
        while not ended.is_set():
            command = [KUBECTL, "-n", GLEANER, "port-forward", "service/coordinator", f"{PORT}:7070"]
            current[:] = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
            current[0].wait()
            ended.wait(1)
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        ended.set()
        for process in current:
            process.terminate()


def start(overlay):
    begun = time.monotonic()
    kubectl("apply", "-k", overlay)
    for name in [item["metadata"]["name"] for item in objects("deployments")]:
        kubectl("rollout", "status", f"deployment/{name}", f"--timeout={READY}s")
    return time.monotonic() - begun


def confined(cluster, image):
    """Whether policies hold: who reaches whom. An ephemeral container in each pod tries it."""
    (coordinator,), (worker, *_), (trainer, other, *_) = map(cluster.running, ROLES)
    served, pictures = "coordinator.gleaner.svc.cluster.local:7070", "web.pictures.svc.cluster.local:80"
    ways = {
        coordinator.name: {pictures: "no"},
        worker.name: {served: "yes", pictures: "yes", f"{coordinator.ip}:9464": "no", f"{trainer.ip}:9464": "no"},
        trainer.name: {served: "yes", f"{other.ip}:9464": "yes", pictures: "no", f"{worker.ip}:9464": "no"},
    }
    for name, wanted in ways.items():
        kubectl("debug", name, f"--image={image}", "--profile=restricted", "--container=who", "--image-pull-policy=IfNotPresent", "--",
                "python3", "-c", REACHES, *wanted)
    for name, wanted in ways.items():
        def said(name=name, lines=len(wanted)):
            # Until the container runs there is no log.
            with contextlib.suppress(Failed):
                text = kubectl("logs", name, "-c", "who")
                return text if text.count("\n") == lines else None
        expect(f"whom {name} reaches", reached(until(f"{name} has tried whom it reaches", READY, said)), wanted)
    outside = {way: "no" for way in (served, f"{coordinator.ip}:7070", f"{worker.ip}:9464", f"{trainer.ip}:9464")}
    found = kubectl("exec", "web", "--", "python3", "-c", REACHES, *outside, namespace=PICTURES)
    expect("whom a pod of another namespace reaches", reached(found), outside)
    return sum(map(len, ways.values())) + len(outside)


def reached(text):
    return dict(line.split() for line in text.splitlines())


def finish(cluster):
    """Whether no container has restarted by itself, and how long all take to end."""
    pods = [pod for name in ROLES for pod in cluster.running(name)]
    expect("containers that restarted by themselves", [pod.name for pod in pods if pod.restarts], [])
    begun = time.monotonic()
    kubectl("scale", "deployment", "--all", "--replicas=0")
    until("all pods are gone", max(pod.grace for pod in pods), lambda: not objects("pods"))
    return time.monotonic() - begun


def logs(folder):
    for log in folder.glob("*.log"):
        yield f"== {log.name}", *log.read_text(errors="replace").splitlines()[-8:]
    for namespace, names in ((PICTURES, ("app=web",)), (GLEANER, [f"app.kubernetes.io/component={role}" for role in ROLES])):
        with contextlib.suppress(Failed):
            yield f"== {namespace}", kubectl("get", "pods", "-o", "wide", namespace=namespace)
            for name in names:
                yield kubectl("logs", f"--selector={name}", "--tail=8", "--prefix", namespace=namespace),


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overlay", nargs="?", type=Path, default=MANIFESTS / "overlays/local-urls")
    parser.add_argument("--gleaner", type=Path, default=HERE.parents[1] / "target/release/gleaner", help="the command line")
    parser.add_argument("--python", default="python:3.13-slim", metavar="IMAGE", help="an image with Python")
    args = parser.parse_args()
    if not args.gleaner.exists():
        sys.exit(f"missing: {args.gleaner}; to make it: make images, or name one with --gleaner")
    try:
        there = {item["metadata"]["name"] for item in objects("namespaces")} & {GLEANER, PICTURES}
    except Failed as error:
        sys.exit(f"cluster.py: {error}")
    if there:
        sys.exit(f"cluster.py: the namespaces {sorted(there)} are there already, and it would remove them; to do so: kubectl delete namespace")
    cluster, failed = Cluster(), None
    with tempfile.TemporaryDirectory(prefix="gleaner-cluster-") as folder, forwarded() as address:
        gleaner = Client(args.gleaner, address, Path(folder))
        try:
            kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": web(args.python)}), namespace=PICTURES)
            kubectl("wait", "pod/web", "--for=condition=Ready", f"--timeout={READY}s", namespace=PICTURES)
            ready, ways = start(args.overlay), confined(cluster, args.python)
            until("the coordinator answers through the forwarded port", READY, gleaner.answered)
            gather(cluster, gleaner)
            train(cluster, gleaner)
            ended = finish(cluster)
            figures(overlay=args.overlay.name, ready_seconds=ready, ways_checked=ways, restarts=0, all_ended_seconds=ended)
        except Exception as error:
            failed = error if isinstance(error, Failed) else repr(error)
            print(*(line for part in logs(Path(folder)) for line in part), sep="\n")
        finally:
            kubectl("delete", "namespace", GLEANER, PICTURES, "--ignore-not-found", seconds=300)
    if failed:
        sys.exit(f"cluster: FAILED: {failed}")


if __name__ == "__main__":
    main()
