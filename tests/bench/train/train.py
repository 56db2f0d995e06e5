"""`make bench-train`: the trainer against PyTorch, torchvision and WebDataset, on the same data and threads, in one run.

The two take turns; what counts are medians. Processor time is what to trust on a machine that does other things too. Memory is the peak of
the proportional set sizes of all processes of a side together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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
"""
STEP = dict(arch="alexnet-bn", width=1.0, crop=224, cut="translate", epochs=1, batch=32, lanes=4)
LOADER = dict(STEP, epochs=3, batch=64)
RUN = dict(arch="alexnet-slim", width=0.25, crop=112, cut="translate", epochs=3, batch=64, lanes=4)


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
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return [json.loads(line) for line in printed.splitlines()], peak


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.specs = args, Path(folder), 0
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
        self.lines.append(f"bench-train {name}: " + " ".join(f"{key}={number(value)}" for key, value in values.items()))
        print(self.lines[-1], flush=True)

    def steps(self, name, world, threads):
        spec = self.spec(**STEP, threads=threads)
        count = self.args.steps
        results = self.turns(
            [self.args.bench, "step", spec, count, world],
            [*self.rival, "step", spec, count, world],
            self.args.repetitions,
        )

        def median(side, key):
            total = sum if key == "cpu" else max
            return statistics.median(total(rank[key] for rank in ranks) / count for ranks, _ in results[side])

        cpu, wall = ([median(side, key) for side in (0, 1)] for key in ("cpu", "wall"))
        rss = [statistics.median(peak for _, peak in results[side]) for side in (0, 1)]
        self.say(
            name,
            cpu_ratio=cpu[0] / cpu[1],
            wall_ratio=wall[0] / wall[1],
            cpu_seconds_per_step=f"{cpu[0]:.3f}/{cpu[1]:.3f}",
            wall_seconds_per_step=f"{wall[0]:.3f}/{wall[1]:.3f}",
            memory_mib=f"{rss[0]:.0f}/{rss[1]:.0f}",
        )

    def loader(self, name, cut, store):
        threads = self.args.threads
        spec = self.spec(**LOADER | dict(cut=cut), threads=threads)
        results = self.turns(
            [self.args.bench, "loader", spec, store, 2 << 30],
            [*self.rival, "loader", spec, store / "tars.txt", 1],
            self.args.repetitions,
        )
        rate = lambda epoch: epoch["images"] / epoch["cpu"]
        first = statistics.median(rate(epochs[0]) for epochs, _ in results[0])
        later = statistics.median(rate(epoch) for epochs, _ in results[0] for epoch in epochs[1:])
        theirs = statistics.median(rate(epoch) for epochs, _ in results[1] for epoch in epochs)
        rss = [statistics.median(peak for _, peak in results[side]) for side in (0, 1)]
        self.say(
            name,
            first=first / theirs,
            later=later / theirs,
            images_per_core_second=f"{first:.0f},{later:.0f}/{theirs:.0f}",
            memory_mib=f"{rss[0]:.0f}/{rss[1]:.0f}",
        )

    def run(self, store):
        spec = self.spec(**RUN, threads=self.args.threads)
        results = self.turns(
            [self.args.bench, "run", spec, store, 1 << 30],
            [*self.rival, "run", spec, store / "tars.txt"],
            self.args.repetitions,
        )
        cpu, wall = ([statistics.median(run[0][key] for run, _ in results[side]) for side in (0, 1)] for key in ("cpu", "wall"))
        images = results[0][0][0][0]["images"]
        rss = [statistics.median(peak for _, peak in results[side]) for side in (0, 1)]
        self.say(
            "epoch",
            speedup=cpu[1] / cpu[0],
            wall_speedup=wall[1] / wall[0],
            images_per_core_second=f"{images / cpu[0]:.0f}/{images / cpu[1]:.0f}",
            seconds=f"{wall[0]:.1f}/{wall[1]:.1f}",
            memory_mib=f"{rss[0]:.0f}/{rss[1]:.0f}",
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", required=True, type=Path, help="the trainer's example `bench`")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each measurement")
    parser.add_argument("--images", type=int, default=2000, help="images of the loader's and the run's dataset")
    parser.add_argument("--threads", type=int, default=2, help="of each side; with two ranks, of both together")
    parser.add_argument("--only", choices=["step", "ddp", "loader", "epoch"], help="this part alone")
    args = parser.parse_args()
    print("ours/theirs in every pair; cpu = processor seconds of all processes of a side")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        bench = Bench(args, folder)
        bench.lines = []
        wanted = lambda part: args.only in (None, part)
        if wanted("loader"):
            store = bench.data("photos-256", args.images, 256)
            bench.loader("loader-resized", "resized", store)
            bench.loader("loader", "translate", store)
        if wanted("epoch"):
            bench.run(bench.data("photos-128", args.images, 128))
        if wanted("step"):
            bench.steps("step", 1, args.threads)
        if wanted("ddp"):
            bench.steps("ddp", 2, max(args.threads // 2, 1))
        print(f"{time.monotonic() - begun:.0f} s")
        print("\n".join(bench.lines))


main()
