#!/usr/bin/env python3
"""Runs an overlay's pods, on this machine and without a cluster, through what a day may bring.

    pods.py [OVERLAY] [--images FOLDER]        overlays/local-urls, target/images

A dataset is gathered and a run trained while pods are killed and replaced (trial.py). Nothing may be lost, each role must end in order
within its grace, and NetworkPolicies must let pass what is needed and nothing else. What of a cluster is imitated says node.py. The web
that is fetched from has a private address: overlays that forbid these to workers can fetch nothing from it.

Needs root, crun, iptables, and the archives of `make images`. Its figures are the lines that begin with `pods:`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from check import HERE, MANIFESTS, render
from kubelet import until
from network import Failed, Sandbox
from node import Node, isolated
from trial import READY, Client, expect, figures, gather, train

WEB = {"kind": "Service", "metadata": {"name": "web", "namespace": "pictures"},
       "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}


def start(node):
    """All Deployments at once, as `kubectl apply` does."""
    begun = time.monotonic()
    counts = {item["metadata"]["name"]: item["spec"].get("replicas", 1) for item in node.of_kind("Deployment")}
    for name, replicas in counts.items():
        node.scale(name, replicas)
    for name, replicas in counts.items():
        node.await_ready(name, replicas, READY)
    return time.monotonic() - begun


def confined(node, web):
    """Whether policies hold: who reaches whom."""
    (coordinator,), (worker, *_), (trainer, other, *_) = (node.running(name) for name in ("coordinator", "worker", "trainer"))
    cluster = {s["metadata"]["name"]: s["spec"]["clusterIP"] for s in node.services}
    ways = ((worker, cluster["coordinator"], 7070, True), (trainer, cluster["coordinator"], 7070, True), (trainer, other.ip, 9464, True),
            (worker, cluster["web"], 80, True), (worker, web.ip, 8080, True), (web, coordinator.ip, 7070, False),
            (web, cluster["coordinator"], 7070, False), (web, worker.ip, 9464, False), (trainer, cluster["web"], 80, False),
            (coordinator, web.ip, 8080, False), (worker, trainer.ip, 9464, False))
    for sandbox, ip, port, wanted in ways:
        expect(f"{sandbox.name} reaches {ip}:{port}", sandbox.reaches(ip, port), wanted)
    return len(ways)


def finish(node):
    """Ends all pods, and looks at how each has ended."""
    for name in ("worker", "trainer", "coordinator"):
        node.scale(name, 0)
    until("all pods are gone", max(pod.grace for pod in node.pods) + 30, lambda: not node.pods)
    node.check()
    for pod, seconds, code in node.ends:
        expect(f"{pod.name}'s exit code after SIGTERM", code, 0)
        if seconds > pod.grace:
            raise Failed(f"{pod.name} has taken {seconds:.0f} s to end, more than its grace")
    expect("restarts: of the killed worker, coordinator and trainer", sum(pod.restarts for pod in node.gone), 3)
    panics = [line for pod in node.gone for line in pod.log().splitlines() if "panicked" in line]
    expect("panics", panics, [])
    return {"stops": len(node.ends), "slowest_stop_seconds": max(seconds for _, seconds, _ in node.ends),
            "restarts": sum(pod.restarts for pod in node.gone), "slowest_pod_ready_seconds": max(p.seconds_to_ready for p in node.gone)}


def try_pods(overlay, archives, folder):
    node = Node(folder, [*render(overlay), WEB], archives)
    web = Sandbox("web", "pictures", {"app": "web"})
    node.plug(web)
    server = subprocess.Popen(["ip", "netns", "exec", web.name, sys.executable, HERE / "web.py"])
    # Its requests come from the node, as those of `kubectl port-forward` do.
    address = next(s["spec"]["clusterIP"] for s in node.services if s["metadata"]["name"] == "coordinator")
    gleaner = Client(node.image("gleaner:0.1.0").root / "usr/local/bin/gleaner", f"http://{address}:7070", folder)
    try:
        ready, ways = start(node), confined(node, web)
        gather(node, gleaner)
        train(node, gleaner)
        ended = finish(node)
    except Exception as error:
        for log in [*folder.glob("*.log"), *folder.glob("*/*.log")]:
            print(f"== {log.relative_to(folder)}", *log.read_text(errors="replace").splitlines()[-8:], sep="\n")
        sys.exit(f"pods: FAILED: {error if isinstance(error, Failed) else repr(error)}")
    server.kill()
    sizes = {image.tags[0].split("/")[-1].split(":")[0].replace("-", "_") + "_mb": image.bytes // 1000000 for image in node.images}
    figures(node.figures, overlay=overlay.name, ready_seconds=ready, ways_checked=ways, seccomp="on" if node.seccomp else "off", **ended, **sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overlay", nargs="?", type=Path, default=MANIFESTS / "overlays/local-urls")
    parser.add_argument("--images", type=Path, default=HERE.parents[1] / "target/images")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    commands = ("crun", "ip", "iptables-restore", "setpriv", "unshare")
    if missing := [command for command in commands if not shutil.which(command)]:
        sys.exit(f"missing: {', '.join(missing)}; to install: apt-get install --no-install-recommends crun iproute2 iptables")
    if os.geteuid() != 0:
        sys.exit("pods.py: only root can make network namespaces and mounts")
    archives = [args.images / f"{name}.tar" for name in ("gleaner", "gleaner-trainer")]
    if missing := [str(archive) for archive in archives if not archive.exists()]:
        sys.exit(f"missing: {', '.join(missing)}; to make them: make images")
    if args.folder:
        return try_pods(args.overlay, archives, args.folder)
    sys.exit(isolated(__file__, args.overlay, "--images", args.images))


if __name__ == "__main__":
    main()
