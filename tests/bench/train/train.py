"""`make bench-train`: the trainer against PyTorch, torchvision and WebDataset, on the same data and threads, in one run.

The two take turns; what counts are medians. Processor time is what to trust on a machine that does other things too. Memory is the peak of
the proportional set sizes of all processes of a side together.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from sides import LOADER, RUN, STEP, Bench


class Train(Bench):
    name = "bench-train"

    def steps(self, name, devices, threads):
        spec = self.spec(**STEP, threads=threads)
        count = self.args.steps
        results = self.turns(
            [self.args.bench, "step", spec, count, devices],
            [*self.rival, "step", spec, count, devices, "eager"],
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
            [self.args.bench, "loader", spec, store, 2 << 30, 0, "cpu"],
            [*self.rival, "loader", spec, store / "tars.txt", 1, "cpu"],
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
            [self.args.bench, "run", spec, store, 1 << 30, 0, "cpu"],
            [*self.rival, "run", spec, store / "tars.txt", "cpu", "eager"],
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
        bench = Train(args, folder)
        wanted = lambda part: args.only in (None, part)
        if wanted("loader"):
            store = bench.data("photos-256", args.images, 256)
            bench.loader("loader-resized", "resized", store)
            bench.loader("loader", "translate", store)
        if wanted("epoch"):
            bench.run(bench.data("photos-128", args.images, 128))
        if wanted("step"):
            bench.steps("step", "cpu", args.threads)
        if wanted("ddp"):
            bench.steps("ddp", "cpu,cpu", max(args.threads // 2, 1))
        print(f"{time.monotonic() - begun:.0f} s")
        print("\n".join(bench.lines))


main()
