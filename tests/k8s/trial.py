"""What the pods of a cluster (cluster.py) are put through: a dataset while workers come and go, and a run while trainers do."""

import contextlib
import json
import os
import subprocess
import time
from collections import Counter

from web import CLASSES

URLS, SLICE = 1800, 60
# Seconds for the steps of the run alone, and the fewest epochs: what one tells of the speed may have been a slow moment.
TRAINING, EPOCHS = 90, 12
# Within so many seconds pods are ready.
READY = 60
BEGINNING = time.monotonic()


class Failed(Exception):
    """An expectation that does not hold."""


def note(text):
    print(f"{time.monotonic() - BEGINNING:6.1f} s  {text}", flush=True)


def until(what, seconds, check):
    """What `check` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return value


def expect(what, found, wanted):
    if found != wanted:
        raise Failed(f"{what}: {found}, not {wanted}")


def figures(**values):
    print("cluster:", *(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()), flush=True)


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
    """The `gleaner` command outside of the cluster."""

    def __init__(self, binary, coordinator, folder):
        self.binary, self.folder = binary, folder
        self.environment = {**os.environ, "GLEANER_COORDINATOR": coordinator}

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

    def answered(self):
        with contextlib.suppress(Failed):
            return self("status")

    def end(self, process, seconds):
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"no end within {seconds} s"
        if code != 0:
            raise Failed(f"gleaner {' '.join(process.args[1:])}: {code}")


def leases(pod, gleaner):
    """How many shards a worker's pod is at. Its process is called by the pod's name and a word of its own."""
    workers = json.loads(gleaner("status", "-o", "json"))["workers"]
    return sum(worker["leases"] for worker in workers if worker["worker"].rpartition("-")[0] == pod.name)


def gather(cluster, gleaner):
    """A dataset, while workers are scaled from one to four and back, and one of them and the coordinator are killed."""
    text, outcomes = url_list()
    (gleaner.folder / "list.txt").write_text(text)
    creation = gleaner.begin("dataset", "create", "pictures", "--urls", str(gleaner.folder / "list.txt"), "--size", "72",
                             "--slice-urls", str(SLICE), "--wait")

    def done():
        if creation.poll():
            gleaner.end(creation, 0)
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
    cluster.scale("worker", 4)
    cluster.await_ready("worker", 4, READY)
    victim = cluster.running("worker")[1]
    until(f"{victim.name} is at work", 30, lambda: leases(victim, gleaner) > 0)
    victim.kill()
    four = rate(URLS // 4, URLS * 2 // 3)
    cluster.scale("worker", 1)
    again = rate(URLS * 3 // 4, URLS * 9 // 10)
    coordinator, = cluster.running("coordinator")
    coordinator.kill()
    gleaner.end(creation, 180)
    dataset = gleaner.describe("dataset", "pictures")
    rows = [json.loads(line) for line in gleaner("dataset", "outcomes", "pictures", "-o", "json").splitlines()]
    found = {row["url"]: row["outcome"] for row in rows}
    wrong = Counter((outcomes[url], found.get(url)) for url in outcomes if found.get(url) != outcomes[url])
    expect("URLs with another outcome than they must have", wrong, Counter())
    expect("outcomes", (len(rows), dict(dataset["outcomes"])), (URLS, dict(Counter(outcomes.values()))))
    expect("shards committed", dataset["shards_committed"], dataset["shards"])
    figures(urls=URLS, lost=0, kept=dataset["outcomes"]["kept"],
            shards=f"{dataset['shards_committed']}/{dataset['shards']}",
            urls_per_second_1_worker=one, with_4=four, with_1_again=again)


def train(cluster, gleaner):
    """A run on two trainers, while one is killed, another replaced, and then the coordinator replaced."""
    small = ("model.arch=alexnet-slim", "model.width=0.5", "input.crop=64", "train.batch=64")

    def submit(name, epochs, wait):
        settings = (*small, f"train.epochs={epochs}")
        return gleaner.begin("run", "submit", "--dataset", "pictures", "--name", name, wait,
                             *(word for setting in settings for word in ("--set", setting)))

    # How many epochs take a while here, one tells.
    gleaner.end(submit("first", 1, "--wait"), 300)
    first = gleaner.describe("run", "first")
    per_second = first["last_step"]["images_per_second"]
    epochs = max(EPOCHS, round(TRAINING * per_second / (64 * first["steps_per_epoch"])))
    begun = time.monotonic()
    follow = submit("second", epochs, "--follow")

    def state():
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
    victim, leaver = cluster.running("trainer")[:2]
    victim.kill()
    until("a generation without the killed trainer", 60, lambda: state()["generation"] > generation)
    cluster.await_ready("trainer", 2, READY)
    generation = steps(0.3)["generation"]
    cluster.replace(leaver)
    until("a generation without the trainer that left", 60, lambda: state()["generation"] > generation)
    until("the trainer that left is gone", leaver.grace, lambda: not cluster.has(leaver))
    cluster.await_ready("trainer", 2, READY)
    before = steps(0.6)
    cluster.recreate("coordinator")
    cluster.await_ready("coordinator", 1, READY)
    after = steps(0.6, after=before["step"])
    gleaner.end(follow, 240)
    run = gleaner.describe("run", "second")
    expect("the run's state and steps", (run["state"], run["step"]), ("done", run["epochs"] * run["steps_per_epoch"]))
    gleaner("run", "model", "second", "--to", str(gleaner.folder / "model"))
    figures(epochs=epochs, steps=run["step"], generations=run["generation"],
            generations_by_new_coordinator=after["generation"] - before["generation"],
            test_top1=f"{run['test']['top1']:.2f}", chance=f"{1 / CLASSES:.2f}", images_per_second=per_second,
            train_seconds=time.monotonic() - begun)
