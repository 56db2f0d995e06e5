"""What a kubelet does for a pod: its container under crun, volumes, files, probes, restarts, and the end."""

import hashlib
import http.client
import itertools
import json
import os
import platform
import random
import resource
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

from check import get
from network import DOMAIN, NAME_SERVER, Failed, Sandbox, run, understood

CRUN = ("crun", "--root", "/run/crun", "--cgroup-manager=cgroupfs")
SECCOMP = Path("/usr/share/containers/seccomp.json")
ARCHITECTURES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
# What of the specs is understood, or of no meaning on one node.
POD_FIELDS = {"automountServiceAccountToken", "containers", "enableServiceLinks", "securityContext", "serviceAccountName",
              "terminationGracePeriodSeconds", "topologySpreadConstraints", "volumes"}
CONTAINER_FIELDS = {"name", "image", "imagePullPolicy", "args", "env", "envFrom", "ports", "resources", "securityContext", "volumeMounts",
                    "startupProbe", "readinessProbe", "livenessProbe"}
SECURITY_FIELDS = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile",
                   "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}
UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Hides what of the kernel a container must not see: the defaults of containerd.
MASKED = [f"/proc/{name}" for name in ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug",
                                       "scsi")] + ["/sys/firmware"]
READ_ONLY = [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")]
BEGINNING = time.monotonic()


def note(text):
    # In one piece, because several threads have something to say.
    print(f"{time.monotonic() - BEGINNING:6.1f} s  {text}\n", end="", flush=True)


def until(what, seconds, check):
    """What `check` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return value


def quantity(text):
    digits = str(text).rstrip("mkMGKi")
    return float(digits) * UNITS.get(str(text)[len(digits):], 1)


def seccomp():
    """The containers project's profile as it holds for a process without capabilities, in the form that crun reads."""
    profile, (name, architecture) = json.loads(SECCOMP.read_text()), ARCHITECTURES[platform.machine()]

    def holds(rule):
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        return not includes.get("caps") and name in includes.get("arches", [name]) and name not in excludes.get("arches", [])

    fields = ("names", "action", "errnoRet", "args")
    rules = [{key: rule[key] for key in fields if rule.get(key) is not None} for rule in profile["syscalls"] if holds(rule)]
    sub = next(entry["subArchitectures"] for entry in profile["archMap"] if entry["architecture"] == architecture)
    return {"defaultAction": profile["defaultAction"], "defaultErrnoRet": profile["defaultErrnoRet"],
            "architectures": [architecture, *sub], "syscalls": rules}


def grpc_serving(ip, port, seconds):
    """grpc.health.v1.Health/Check. Its one request and one answer need little of HTTP/2: no header is compressed, none is read."""
    def frame(kind, flags, stream, payload):
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    def header(name, value):
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    fields = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check", ":authority": ip, "te": "trailers",
              "content-type": "application/grpc"}
    headers = b"".join(header(name.encode(), value.encode()) for name, value in fields.items())
    with socket.create_connection((ip, port), seconds) as connection:
        settings, question = frame(4, 0, 0, b""), frame(0, 1, 1, b"\0\0\0\0\0")
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(1, 4, 1, headers) + question)
        stream = connection.makefile("rb")
        while len(head := stream.read(9)) == 9:
            payload = stream.read(int.from_bytes(head[:3], "big"))
            if head[3] == 0:
                return payload == b"\0\0\0\0\2\x08\1"
            if head[3] in (3, 7) or head[3] == 1 and head[4] & 1:
                break
    return False


class Container:
    """One life of a pod's container."""

    def __init__(self, pod, number):
        folder = pod.folder / str(number)
        self.name, self.over, self.log, self.code = f"{pod.name}.{number}", threading.Event(), pod.folder / f"{number}.log", None
        upper, work, root = (folder / name for name in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir(parents=True)
        run("mount", "-t", "overlay", "-o", f"lowerdir={pod.image.root},upperdir={upper},workdir={work}", "overlay", root)
        self.root = root
        (folder / "config.json").write_text(json.dumps(pod.config(self.name)))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*CRUN, "run", "--bundle", folder, self.name], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)

    def wait(self):
        self.code = self.process.wait()
        self.over.set()
        run("umount", "--lazy", self.root)

    def kill(self, name):
        # It may have ended a moment ago.
        subprocess.run([*CRUN, "kill", self.name, name], capture_output=True, timeout=30)

    def end(self, grace):
        """As a kubelet ends it: the seconds that it took, and its exit code."""
        begun = time.monotonic()
        self.kill("TERM")
        if not self.over.wait(grace):
            self.kill("KILL")
            self.over.wait(30)
        return time.monotonic() - begun, self.code


class Pod(Sandbox):
    """A pod of a Deployment, and the kubelet's care for it."""

    def __init__(self, node, deployment):
        template = deployment["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template).encode()).hexdigest()[:9]
        name = f"{deployment['metadata']['name']}-{digest}-{''.join(random.choices('bcdfghjklmnpqrstvwxz2456789', k=5))}"
        super().__init__(name, deployment["metadata"]["namespace"], template["metadata"]["labels"])
        self.node, self.deployment, self.spec = node, deployment["metadata"]["name"], template["spec"]
        self.container_spec, = self.spec["containers"]
        understood(self.spec, POD_FIELDS)
        understood(self.container_spec, CONTAINER_FIELDS)
        self.security = {**self.spec.get("securityContext", {}), **self.container_spec.get("securityContext", {})}
        understood(self.security, SECURITY_FIELDS)
        self.ports = {port["name"]: port["containerPort"] for port in self.container_spec.get("ports", [])}
        self.image = node.image(self.container_spec["image"])
        self.ready, self.leaving, self.restarts, self.lives, self.container = False, False, 0, [], None
        self.begun, self.seconds_to_ready = time.monotonic(), None
        self.folder = node.folder / name
        self.folder.mkdir()
        self.files = self.write_files()
        self.volumes = {volume["name"]: self.volume(volume) for volume in self.spec.get("volumes", [])}
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def write_files(self):
        """What a kubelet puts over the image's own, by path in the container."""
        texts = {
            "/etc/hostname": f"{self.name}\n",
            "/etc/hosts": "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
                          f"{self.ip}\t{self.name}\n",
            "/etc/resolv.conf": f"search {self.namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\nnameserver {NAME_SERVER}\noptions ndots:5\n",
            "/dev/termination-log": "",
        }
        for path, text in texts.items():
            (self.folder / Path(path).name).write_text(text)
            (self.folder / Path(path).name).chmod(0o666 if path.startswith("/dev") else 0o644)
        return {path: self.folder / Path(path).name for path in texts}

    def volume(self, volume):
        """A volume's folder, given to the pod's fsGroup."""
        understood(volume, {"name", "emptyDir", "persistentVolumeClaim"})
        if claim := volume.get("persistentVolumeClaim"):
            path = self.node.claim(claim["claimName"])
        else:
            path = self.folder / "volumes" / volume["name"]
            path.mkdir(parents=True)
            path.chmod(0o777)
            understood(volume["emptyDir"], {"medium", "sizeLimit"})
            if volume["emptyDir"].get("medium") == "Memory":
                size = int(quantity(volume["emptyDir"]["sizeLimit"]))
                run("mount", "-t", "tmpfs", "-o", f"mode=777,size={size}", "tmpfs", path)
        if "fsGroup" in self.security:
            os.chown(path, -1, self.security["fsGroup"])
            path.chmod(path.stat().st_mode | 0o2070)
        return path

    def environment(self):
        values = dict(entry.split("=", 1) for entry in self.image.config.get("Env", []))
        # The API server's address is there in spite of enableServiceLinks.
        values |= {"HOSTNAME": self.name, "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for source in self.container_spec.get("envFrom", []):
            (kind, reference), = source.items()
            values |= self.node.data({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference)
        for entry in self.container_spec.get("env", []):
            values[entry["name"]] = entry["value"] if "value" in entry else self.field(entry["valueFrom"]["fieldRef"]["fieldPath"])
        if any("$(" in text for text in [*values.values(), *self.container_spec.get("args", [])]):
            raise Failed("variables in values are not understood here")
        return [f"{name}={value}" for name, value in values.items()]

    def field(self, path):
        return {"status.podIP": self.ip, "metadata.name": self.name, "metadata.namespace": self.namespace}[path]

    def config(self, name):
        """The container as OCI's runtime specification has it."""
        security, limits = self.security, get(self.container_spec, "resources.limits", {})
        if security.get("runAsNonRoot") and not security["runAsUser"] or get(security, "capabilities") != {"drop": ["ALL"]}:
            raise Failed("a user that is no number but 0, or capabilities, are not understood here")
        requested = quantity(get(self.container_spec, "resources.requests.cpu", "2m"))
        linux = {
            "cgroupsPath": f"/{self.node.folder.name}/{name}", "maskedPaths": MASKED, "readonlyPaths": READ_ONLY,
            "resources": {"memory": {"limit": int(quantity(limits["memory"]))},
                          "cpu": {"quota": int(quantity(limits["cpu"]) * 100000), "period": 100000, "shares": int(requested * 1024)}},
            "namespaces": [*({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                           {"type": "network", "path": f"/run/netns/{self.name}"}],
        }
        if self.node.seccomp and get(security, "seccompProfile.type") == "RuntimeDefault":
            linux["seccomp"] = self.node.seccomp
        return {
            "ociVersion": "1.0.2", "hostname": self.name, "linux": linux, "mounts": self.mounts(),
            "root": {"path": "root", "readonly": security.get("readOnlyRootFilesystem", False)},
            "process": {
                "args": self.image.config["Entrypoint"] + self.container_spec.get("args", self.image.config.get("Cmd") or []),
                "cwd": self.image.config.get("WorkingDir") or "/", "env": self.environment(), "capabilities": {},
                "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
                "user": {"uid": security["runAsUser"], "gid": security["runAsGroup"], "additionalGids": [security["fsGroup"]]},
                # systemd's default, which containerd's service leaves as it is.
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": resource.getrlimit(resource.RLIMIT_NOFILE)[1]}],
            },
        }

    def mounts(self):
        def mount(path, kind, *options):
            return {"destination": path, "type": kind, "source": kind, "options": ["nosuid", *options]}

        def bind(path, source, access):
            return {"destination": path, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", access]}

        volumes = [bind(entry["mountPath"], self.volumes[entry["name"]], "ro" if entry.get("readOnly") else "rw")
                   for entry in self.container_spec.get("volumeMounts", [])]
        return [
            mount("/proc", "proc", "noexec", "nodev"),
            mount("/dev", "tmpfs", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            mount("/dev/mqueue", "mqueue", "noexec", "nodev"),
            mount("/dev/shm", "tmpfs", "noexec", "nodev", "mode=1777", "size=65536k"),
            mount("/sys", "sysfs", "noexec", "nodev", "ro"),
            mount("/sys/fs/cgroup", "cgroup", "noexec", "nodev", "relatime", "ro"),
            *(bind(path, source, "rw" if path.startswith("/dev") else "ro") for path, source in self.files.items()),
            *volumes,
        ]

    def live(self):
        """Starts the container, and again whenever it ends: at once, then after a pause that doubles."""
        try:
            for number in itertools.count():
                self.container = Container(self, number)
                self.lives.append(self.container)
                threading.Thread(target=self.probe, args=(self.container,), daemon=True).start()
                self.container.wait()
                self.set_ready(False)
                if self.leaving:
                    return
                self.restarts += 1
                note(f"{self.name}: the container has ended with {self.container.code} and is started again")
                time.sleep(min(10 * 2 ** (number - 1), 300) if number else 0)
                if self.leaving:
                    return
        except Exception as error:
            self.node.faults.append(f"{self.name}: {error}")

    def probe(self, container):
        limit = get(self.container_spec, "startupProbe.failureThreshold", 3)
        for failures in self.failures(container, "startupProbe"):
            if failures == 0:
                break
            if failures >= limit:
                self.node.faults.append(f"{self.name}: the startup probe has failed")
                return container.end(self.grace)
        for watch in (self.watch_readiness, self.watch_liveness):
            threading.Thread(target=watch, args=(container,), daemon=True).start()

    def watch_readiness(self, container):
        limit = get(self.container_spec, "readinessProbe.failureThreshold", 3)
        for failures in self.failures(container, "readinessProbe"):
            if failures == 0 or failures >= limit:
                self.set_ready(failures == 0)

    def watch_liveness(self, container):
        limit = get(self.container_spec, "livenessProbe.failureThreshold", 3)
        for failures in self.failures(container, "livenessProbe"):
            if failures and not self.leaving and not container.over.is_set():
                self.node.faults.append(f"{self.name}: the liveness probe has failed")
            if failures >= limit and not self.leaving:
                return container.end(self.grace)

    def failures(self, container, kind):
        """After each try of a probe, how often it has failed since it last succeeded."""
        probe, failures = self.container_spec.get(kind) or {}, 0
        understood(probe, {"grpc", "httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"})
        while probe and not container.over.is_set():
            failures = 0 if self.try_probe(probe) else failures + 1
            yield failures
            container.over.wait(probe.get("periodSeconds", 10))

    def try_probe(self, probe):
        seconds = probe.get("timeoutSeconds", 1)
        try:
            if "grpc" in probe:
                return grpc_serving(self.ip, probe["grpc"]["port"], seconds)
            port = probe["httpGet"]["port"]
            connection = http.client.HTTPConnection(self.ip, self.ports.get(port, port), timeout=seconds)
            connection.request("GET", probe["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False

    def set_ready(self, ready):
        ready = ready and not self.leaving
        if ready and self.seconds_to_ready is None:
            self.seconds_to_ready = time.monotonic() - self.begun
        if ready != self.ready:
            self.ready = ready
            if not self.leaving:
                note(f"{self.name}: {'ready' if ready else 'not ready'}")
            self.node.sync()

    @property
    def grace(self):
        return self.spec["terminationGracePeriodSeconds"]

    def stop(self):
        """As `kubectl delete pod`."""
        self.leaving = True
        self.set_ready(False)
        seconds, code = self.container.end(self.grace)
        note(f"{self.name}: ended with {code} {seconds:.1f} s after SIGTERM")
        self.thread.join(30)
        self.node.left(self, seconds, code)

    def kill(self):
        """Ends the container without a word, as the kernel does when memory is short."""
        self.container.kill("KILL")

    def log(self):
        return "\n".join(life.log.read_text(errors="replace") for life in self.lives)
