"""One node of a Kubernetes cluster as its pods see it: what kubelet, kube-proxy, name server and network do for them.

Containers run under crun as their specs say: arguments, environment, user and groups, no capabilities, no new privileges, a read-only
root, limits of memory and CPU (cgroup), the default seccomp profile of the containers project, volumes. Pods have an address and a host
name each; Services have a fixed address and lead to ready pods; names are answered by a server that knows Services alone; probes,
restarts and graceful ends go as the specs say; NetworkPolicies are enforced, and an ipBlock holds for no pod, as some networks have it.

Not imitated: the API server with its admission, the scheduler, further nodes, rolling updates, eviction (a volume's sizeLimit, unless
it is in memory), storage classes (a claim is a folder that fsGroup is applied to), AppArmor, IPv6, DNS over TCP. What a spec says and
is not understood here is an error, so nothing is left out silently.

All of it lives in namespaces of its own (`isolated`), which the kernel takes down with their first process.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

from check import get
from kubelet import SECCOMP, Pod, seccomp, until
from network import DOMAIN, NAME_SERVER, Failed, answer, run, tables


def remove_cgroups(name):
    """Whether all are gone; those of processes that are about to end are not yet."""
    mounts = (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir())
    for part in sorted((part for mount in mounts for part in mount.glob(f"{name}/**/")), reverse=True):
        with contextlib.suppress(OSError):
            part.rmdir()
    return not any((mount / name).exists() for mount in mounts)


def isolated(script, *arguments):
    """Runs a script in PID, mount and network namespaces of its own, with a folder that is removed afterwards."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="gleaner-pods-"))
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
               sys.executable, script, "--folder", folder, *arguments]
    # In a session of its own, so that Ctrl-C reaches this process alone, which then kills that one.
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        child.kill()
        child.wait()
        until("the containers' control groups are empty", 10, lambda: remove_cgroups(folder.name))
        shutil.rmtree(folder)


class Image:
    """An archive's layers as a folder, and how to start what is in it."""

    def __init__(self, archive, root):
        self.root, self.bytes = root, archive.stat().st_size
        with tarfile.open(archive) as outer:
            manifest, = json.load(outer.extractfile("manifest.json"))
            self.tags = manifest["RepoTags"]
            self.config = json.load(outer.extractfile(manifest["Config"]))["config"]
            for layer in manifest["Layers"]:
                with tarfile.open(fileobj=outer.extractfile(layer)) as files:
                    if any(Path(name).name.startswith(".wh.") for name in files.getnames()):
                        raise Failed(f"{archive}: layers that remove files are not understood here")
                    files.extractall(root, numeric_owner=True, filter="fully_trusted")


class Node:
    """The node, and as much of the controllers as starts and ends pods on it."""

    # What its lines of figures begin with.
    figures = "pods"

    def __init__(self, folder, objects, archives):
        self.folder, self.objects, self.pods, self.ends, self.faults, self.lock = folder, objects, [], [], [], threading.RLock()
        self.others, self.gone = [], []
        self.seccomp = seccomp() if SECCOMP.exists() else None
        self.prepare()
        self.images = [Image(archive, folder / archive.stem) for archive in archives]
        self.services = self.of_kind("Service")
        for number, service in enumerate(self.services, 20):
            service["spec"].setdefault("clusterIP", f"10.96.0.{number}")
        self.sync()
        threading.Thread(target=self.serve_names, daemon=True).start()

    def prepare(self):
        run("mount", "-t", "tmpfs", "tmpfs", "/run")
        # crun refuses control groups of both versions side by side.
        if Path("/sys/fs/cgroup/unified").is_mount():
            run("umount", "/sys/fs/cgroup/unified")
        run("ip", "link", "set", "lo", "up")
        run("ip", "addr", "add", f"{NAME_SERVER}/32", "dev", "lo")
        # Where everything goes that is not here: nowhere, and without an answer, as with packets to a pod that is gone.
        run("ip", "netns", "add", "outside")
        run("ip", "link", "add", "outside", "type", "veth", "peer", "name", "eth0", "netns", "outside")
        for options, link, address in (((), "outside", "192.0.2.1/24"), (("-n", "outside"), "eth0", "192.0.2.2/24")):
            run("ip", *options, "addr", "add", address, "dev", link)
            run("ip", *options, "link", "set", link, "up")
        run("ip", "route", "add", "default", "via", "192.0.2.2")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def of_kind(self, kind):
        return [item for item in self.objects if item["kind"] == kind]

    def named(self, kind, name):
        return next((item for item in self.of_kind(kind) if item["metadata"]["name"] == name), None)

    def data(self, kind, reference):
        item = self.named(kind, reference["name"])
        if item is None and not reference.get("optional"):
            raise Failed(f"no {kind} {reference['name']}")
        return item["data"] if item else {}

    def claim(self, name):
        size = get(self.named("PersistentVolumeClaim", name) or {}, "spec.resources.requests.storage")
        if not size:
            raise Failed(f"no PersistentVolumeClaim {name}")
        path = self.folder / "claims" / name
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return path

    def image(self, name):
        for image in self.images:
            if f"docker.io/library/{name}" in image.tags:
                return image
        raise Failed(f"ErrImageNeverPull: {name} is not in the archives")

    def plug(self, sandbox):
        """Brings something into the network that is no pod of the overlay."""
        with self.lock:
            self.others.append(sandbox)
        self.sync()

    def sync(self):
        """Leads Services to the pods that are ready, and draws the policies anew around those that there are."""
        with self.lock:
            namespaces = {name: {"kubernetes.io/metadata.name": name} for name in ("kube-system", *(s.namespace for s in self.others))}
            for item in self.of_kind("Namespace"):
                name = item["metadata"]["name"]
                namespaces[name] = {**item["metadata"].get("labels", {}), "kubernetes.io/metadata.name": name}
            text = tables(self.services, self.of_kind("NetworkPolicy"), namespaces, self.pods + self.others)
            run("iptables-restore", input=text)

    def serve_names(self):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((NAME_SERVER, 53))
        while True:
            query, client = server.recvfrom(4096)
            names = {f"{s['metadata']['name']}.{s['metadata']['namespace']}.svc.{DOMAIN}": s["spec"]["clusterIP"] for s in self.services}
            server.sendto(answer(query, names), client)

    def running(self, deployment=None):
        return [pod for pod in self.pods if not pod.leaving and deployment in (None, pod.deployment)]

    def start(self, deployment):
        with self.lock:
            self.pods.append(Pod(self, self.named("Deployment", deployment)))
        self.sync()
        return self.pods[-1]

    def left(self, pod, seconds, code):
        with self.lock:
            self.pods.remove(pod)
            self.gone.append(pod)
            self.ends.append((pod, seconds, code))
        self.sync()
        pod.remove()

    def delete(self, pods):
        """Ends pods side by side, without waiting for them."""
        for pod in pods:
            pod.leaving = True
            threading.Thread(target=pod.stop, daemon=True).start()

    def scale(self, deployment, replicas):
        pods = self.running(deployment)
        for _ in range(replicas - len(pods)):
            self.start(deployment)
        # The newest go first, as with a ReplicaSet.
        self.delete(pods[replicas:])

    def replace(self, pod):
        """As `kubectl delete pod`, without waiting for its end."""
        replicas = len(self.running(pod.deployment))
        self.delete([pod])
        self.scale(pod.deployment, replicas)

    def has(self, pod):
        return pod in self.pods

    def recreate(self, deployment):
        """As `kubectl rollout restart` with the strategy Recreate."""
        pods = self.running(deployment)
        self.delete(pods)
        until(f"{deployment} is gone", 150, lambda: not any(pod in self.pods for pod in pods))
        for _ in pods:
            self.start(deployment)

    def await_ready(self, deployment, replicas, seconds):
        def ready():
            self.check()
            pods = self.running(deployment)
            return len(pods) == replicas and all(pod.ready for pod in pods)
        until(f"{replicas} of {deployment} are ready", seconds, ready)

    def check(self):
        if self.faults:
            raise Failed("; ".join(self.faults))
