"""What both benches of the trainer share: specs, datasets, two sides that take turns at the same work, and what it took them."""

import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPEC = """dataset = "bench"
[model]
arch = "{arch}"
width = {width}
[input]
crop = {crop}
cut = "{cut}"
[train]
epochs = {epochs}
batch = {batch}
[ranks]
lanes = {lanes}
max = 1
threads = {threads}
precision = "{precision}"
layout = "{layout}"
graphs = {graphs}
"""
STEP = dict(arch="alexnet-bn", width=1.0, crop=224, cut="translate", epochs=1, batch=32, lanes=4, precision="f32", layout="auto", graphs="false")
LOADER = dict(STEP, epochs=3, batch=64)
RUN = dict(STEP, arch="alexnet-slim", width=0.25, crop=112, epochs=3, batch=64)


class Failed(SystemExit):
    """A side could not do its work. Ends the bench unless somebody expects it."""


def processes(root):
    """A process and all its descendants."""
    children = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
            except OSError:
                pass
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory(process):
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        return 0.0


def figures(command, env):
    """What a command printed, and the most memory that it and its children held."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=env)
    peak, ended = 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, sum(map(memory, processes(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate(timeout=1800)[0]
    ended.set()
    watcher.join()
    if process.returncode:
        raise Failed(f"failed: {' '.join(map(str, command))}")
    return [json.loads(line) for line in printed.splitlines()], peak


class Bench:
    name = "bench"

    def __init__(self, args, folder):
        self.args, self.folder, self.specs, self.lines = args, Path(folder), 0, []
        # No more threads than both sides are told to use, and none that burns processor time while it waits for another.
        self.env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE", "MASTER_PORT": "29511"}
        self.rival = [sys.executable, HERE / "rival.py"]

    def spec(self, **values):
        self.specs += 1
        path = self.folder / f"{self.specs}.toml"
        path.write_text(SPEC.format(**values))
        return path

    def data(self, name, images, size):
        store = self.folder / name
        store.mkdir()
        figures([self.args.bench, "data", store, images, size], self.env)
        return store

    def turns(self, ours, theirs, repetitions):
        """Both commands again and again, one after the other, and the other way round the next time."""
        results = ([], [])
        for i in range(repetitions):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                results[side].append(figures((ours, theirs)[side], self.env))
        return results

    def say(self, name, **values):
        number = lambda value: value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        self.lines.append(f"{self.name} {name}: " + " ".join(f"{key}={number(value)}" for key, value in values.items()))
        print(self.lines[-1], flush=True)
