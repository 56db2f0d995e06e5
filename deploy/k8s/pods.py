#!/usr/bin/env python3
"""Runs an overlay's pods, on this machine and without a cluster, through what a day may bring.

    pods.py [OVERLAY] [--images FOLDER]        overlays/local-urls, target/images

A list is fetched from a little web while workers are scaled from one to four and back, and one of them and the coordinator are killed;
then a run is trained while one trainer is killed, another replaced, and the coordinator replaced. Nothing may be lost, each role must
end in order within its grace, and NetworkPolicies must let pass what is needed and nothing else. What of a cluster is imitated says
node.py. The web has a private address: overlays that forbid these to workers can fetch nothing from it.

Needs root, crun, iptables, and the archives of `make images`. Its figures are the lines that begin with `pods:`.
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from check import HERE, render
from kubelet import until
from network import Failed, Sandbox
from node import Node, isolated

URLS, SLICE, CLASSES = 1800, 60, 4
# So long the web thinks about each request, so that it is the number of connections that bounds a worker.
PAUSE = 3.0
# Seconds for the steps of the run alone.
TRAINING = 60
SIDE, TILES = 200, 8
READY = 60
WEB = {"kind": "Service", "metadata": {"name": "web", "namespace": "pictures"},
       "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}


def picture(number):
    """A PNG of its own: tiles of random colours, of which most are its class's, under noise."""
    rng = random.Random(number)
    own = [(200, 60, 60), (60, 180, 60), (60, 60, 200), (190, 180, 50)][number % CLASSES]
    tile, rows = SIDE // TILES, []
    for _ in range(TILES):
        row = [own if rng.random() < 0.5 else tuple(rng.randrange(240) for _ in own) for _ in range(TILES)]
        rows += [b"".join(bytes(colour) * tile for colour in row)] * tile
    plain = int.from_bytes(b"".join(rows), "big")
    noise = int.from_bytes(rng.randbytes(SIDE * SIDE * 3), "big") & int.from_bytes(b"\x0f" * (SIDE * SIDE * 3), "big")
    pixels = (plain ^ noise).to_bytes(SIDE * SIDE * 3, "big")
    lines = b"".join(b"\0" + pixels[at:at + SIDE * 3] for at in range(0, len(pixels), SIDE * 3))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 0)) + chunk(b"IEND", b"")


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(PAUSE)
        kind, number = self.path.strip("/").split("/")
        body = {"picture": lambda: picture(int(number)), "page": lambda: b"<html>" + b"sold " * 2000}.get(kind, lambda: b"gone")()
        self.send_response(200 if kind in ("picture", "page") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class WebServer(ThreadingHTTPServer):
    request_queue_size = 1024

    def handle_error(self, *_):
        """A killed worker leaves its connections open."""


def url_list():
    """The list's lines, and what must become of each URL."""
    lines, outcomes = [], {}
    for number in range(URLS):
        rotted = {0: ("gone", "not_found"), 1: ("gone", "not_found"), 2: ("page", "not_an_image")}
        kind, outcome = rotted.get(number % 20, ("picture", "kept"))
        # A short name, for which the resolver needs the pod's search list.
        host = "web.pictures.svc"
        if number % 20 == 3:
            host, outcome = f"dead-{number}.example.com", "dns"
        url = f"http://{host}/{kind}/{number}"
        lines.append(f"n{number % CLASSES:08}\t{url}\n")
        outcomes[url] = outcome
    return "".join(lines), outcomes


class Client:
    """The `gleaner` command outside of the cluster. Its requests come from the node, as those of `kubectl port-forward` do."""

    def __init__(self, node):
        self.binary = node.image("gleaner:0.1.0").root / "usr/local/bin/gleaner"
        address = next(s["spec"]["clusterIP"] for s in node.services if s["metadata"]["name"] == "coordinator")
        self.environment, self.folder = {**os.environ, "GLEANER_COORDINATOR": f"http://{address}:7070"}, node.folder

    def __call__(self, *arguments):
        done = subprocess.run([self.binary, *arguments], env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise Failed(f"gleaner {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def describe(self, kind, name):
        return json.loads(self(kind, "describe", name, "-o", "json"))

    def begin(self, *arguments):
        """Starts a command that waits, to outlive what happens meanwhile."""
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        return subprocess.Popen([self.binary, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, process, seconds):
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"no end within {seconds} s"
        if code != 0:
            raise Failed(f"gleaner {' '.join(process.args[1:])}: {code}")


def expect(what, found, wanted):
    if found != wanted:
        raise Failed(f"{what}: {found}, not {wanted}")


def figures(**values):
    print("pods:", *(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()), flush=True)


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


def leases(pod, gleaner):
    """How many shards a worker's pod is at. The cluster knows it by the name that its process has given itself."""
    name = next((json.loads(line)["worker"] for line in pod.log().splitlines() if '"worker started"' in line), None)
    return next((worker["leases"] for worker in json.loads(gleaner("status", "-o", "json"))["workers"] if worker["worker"] == name), 0)


def gather(node, gleaner):
    """A dataset, while workers come and go."""
    text, outcomes = url_list()
    (node.folder / "list.txt").write_text(text)
    creation = gleaner.begin("dataset", "create", "pictures", "--urls", str(node.folder / "list.txt"), "--size", "72",
                             "--slice-urls", str(SLICE), "--wait")

    def done():
        node.check()
        try:
            return sum(gleaner.describe("dataset", "pictures")["outcomes"].values())
        except Failed:
            # It has not been created yet.
            return 0

    def rate(first, last):
        """URLs a second from the first of these counts to the last."""
        until(f"{first} URLs", 120, lambda: done() >= first)
        begun, at = time.monotonic(), done()
        until(f"{last} URLs", 180, lambda: done() >= last)
        return (done() - at) / (time.monotonic() - begun)

    one = rate(60, URLS // 6)
    node.scale("worker", 4)
    node.await_ready("worker", 4, READY)
    victim = node.running("worker")[1]
    until(f"{victim.name} is at work", 30, lambda: leases(victim, gleaner) > 0)
    victim.kill()
    four = rate(URLS // 4, URLS * 2 // 3)
    node.scale("worker", 1)
    again = rate(URLS * 3 // 4, URLS * 9 // 10)
    coordinator, = node.running("coordinator")
    coordinator.kill()
    gleaner.end(creation, 180)
    dataset = gleaner.describe("dataset", "pictures")
    rows = [json.loads(line) for line in gleaner("dataset", "outcomes", "pictures", "-o", "json").splitlines()]
    found = {row["url"]: row["outcome"] for row in rows}
    wrong = Counter((outcomes[url], found.get(url)) for url in outcomes if found.get(url) != outcomes[url])
    expect("URLs with another outcome than they must have", wrong, Counter())
    expect("outcomes", (len(rows), dict(dataset["outcomes"])), (URLS, dict(Counter(outcomes.values()))))
    expect("shards committed", dataset["shards_committed"], dataset["shards"])
    expect("restarts of the killed worker and coordinator", (victim.restarts, coordinator.restarts), (1, 1))
    figures(urls=URLS, lost=0, kept=dataset["outcomes"]["kept"], shards=f"{dataset['shards_committed']}/{dataset['shards']}",
            urls_per_second_1_worker=one, with_4=four, with_1_again=again)


def train(node, gleaner):
    """A run, while trainers and the coordinator come and go."""
    small = ("model.arch=alexnet-slim", "model.width=0.5", "input.crop=64", "train.batch=64")

    def submit(name, epochs, wait):
        settings = (*small, f"train.epochs={epochs}")
        return gleaner.begin("run", "submit", "--dataset", "pictures", "--name", name, wait,
                             *(word for setting in settings for word in ("--set", setting)))

    # How many epochs take a while here, one tells.
    gleaner.end(submit("first", 1, "--wait"), 300)
    first = gleaner.describe("run", "first")
    per_second = first["last_step"]["images_per_second"]
    epochs = max(4, round(TRAINING * per_second / (64 * first["steps_per_epoch"])))
    begun = time.monotonic()
    follow = submit("second", epochs, "--follow")

    def state():
        node.check()
        try:
            return gleaner.describe("run", "second")
        except Failed:
            return {"step": 0, "generation": 0, "world_size": 0}

    def steps(share, after=0):
        """Waits until so much of the run is done, beyond that step, and two ranks are at it."""
        def there():
            run = state()
            if run.get("state") in ("done", "failed", "cancelled"):
                raise Failed(f"the run is {run['state']} too early: {run.get('reason')}")
            total = run.get("epochs", 1) * run.get("steps_per_epoch", 1)
            return run["step"] > max(share * total, after) and run["world_size"] == 2 and run
        return until(f"two ranks are at {share:.0%} of the steps", 240, there)

    generation = steps(0.05)["generation"]
    victim, leaver = node.running("trainer")[:2]
    victim.kill()
    until("a generation without the killed trainer", 60, lambda: state()["generation"] > generation)
    node.await_ready("trainer", 2, READY)
    generation = steps(0.3)["generation"]
    node.delete([leaver])
    node.scale("trainer", 2)
    until("a generation without the trainer that left", 60, lambda: state()["generation"] > generation)
    until("the trainer that left is gone", leaver.grace, lambda: leaver not in node.pods)
    node.await_ready("trainer", 2, READY)
    before = steps(0.6)
    node.recreate("coordinator")
    node.await_ready("coordinator", 1, READY)
    after = steps(0.6, after=before["step"])
    gleaner.end(follow, 240)
    run = gleaner.describe("run", "second")
    expect("the run's state and steps", (run["state"], run["step"]), ("done", run["epochs"] * run["steps_per_epoch"]))
    expect("the killed trainer's restarts", victim.restarts, 1)
    gleaner("run", "model", "second", "--to", str(node.folder / "model"))
    figures(epochs=epochs, steps=run["step"], generations=run["generation"],
            generations_by_new_coordinator=after["generation"] - before["generation"],
            test_top1=f"{run['test']['top1']:.2f}", chance=f"{1 / CLASSES:.2f}", images_per_second=per_second,
            train_seconds=time.monotonic() - begun)


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
    panics = [line for pod in node.gone for line in pod.log().splitlines() if "panicked" in line]
    expect("panics", panics, [])
    return {"stops": len(node.ends), "slowest_stop_seconds": max(seconds for _, seconds, _ in node.ends),
            "restarts": sum(pod.restarts for pod in node.gone), "slowest_pod_ready_seconds": max(p.seconds_to_ready for p in node.gone)}


def try_pods(overlay, archives, folder):
    node = Node(folder, [*render(overlay), WEB], archives)
    web = Sandbox("web", "pictures", {"app": "web"})
    node.plug(web)
    server = subprocess.Popen(["ip", "netns", "exec", web.name, sys.executable, __file__, "--web"])
    gleaner = Client(node)
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
    figures(overlay=overlay.name, ready_seconds=ready, ways_checked=ways, seccomp="on" if node.seccomp else "off", **ended, **sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overlay", nargs="?", type=Path, default=HERE / "overlays/local-urls")
    parser.add_argument("--images", type=Path, default=HERE.parents[1] / "target/images")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--web", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.web:
        WebServer(("0.0.0.0", 8080), Web).serve_forever()
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
