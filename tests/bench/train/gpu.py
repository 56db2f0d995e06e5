"""`make bench-gpu`: the trainer on a device beside PyTorch on the same device, in one run.

All of it runs on any device that both know, `--devices cpu` too, with smaller sizes. Times are by the wall clock, with all that was started
on the device done. The sides take turns; what counts are medians. A way that cannot be had on a machine (torch.compile wants a C++ compiler
on the CPU, a loader wants webdataset and torchvision) is said to have failed, and the others go on.

`f32` is what libtorch does by default: on GPUs convolutions may compute in TF32. Memory is the most that all processes of a side held
together, and on a GPU what was in use there beyond what others used before.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

from sides import HERE, LOADER, STEP, Bench, Failed, figures

# The trainer's own choices, in the words of a run's spec: a precision, a layout if it is not the one by itself, and graphs.
OURS = ["f32", "bf16"]
OURS_ON_GPU = ["tf32", "tf32+nhwc", "tf32+nhwc+graphs", "bf16+nchw", "bf16+graphs"]
EAGER = ["eager", "eager+channels_last", "eager+bf16", "eager+bf16+channels_last"]
COMPILED = ["compile", "compile+bf16", "compile+bf16+channels_last"]
# What a GPU has besides.
THEIRS_ON_GPU = ["eager+tf32", "eager+tf32+channels_last", "compile+tf32", "graphs+tf32+channels_last", "graphs+bf16+channels_last"]
# Batch, lanes, crop, width, steps and images of a measurement, and how often each is repeated.
ON_GPU = dict(batch=256, lanes=8, crop=224, width=1.0, steps=50, images=20000, epochs=4, repetitions=3)
ON_CPU = dict(batch=32, lanes=4, crop=112, width=0.5, steps=4, images=600, epochs=3, repetitions=1)


def is_gpu(device):
    return device.startswith("cuda")


def precisions(device):
    return OURS + (OURS_ON_GPU if is_gpu(device) else [])


def used_on(device):
    """MiB in use on a GPU, by all."""
    gpu = device.partition(":")[2] or "0"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpu = visible[int(gpu)] if int(gpu) < len(visible) else gpu
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", gpu]
    return float(subprocess.run(query, check=True, capture_output=True, text=True).stdout)


class Gpu(Bench):
    name = "bench-gpu"

    def __init__(self, args, folder):
        super().__init__(args, folder)
        # Where Python's torch was installed without its headers, those of libtorch are the same ones.
        if not (Path(torch.__file__).parent / "include").exists():
            include = Path(os.environ.get("LIBTORCH", HERE.parents[2] / "target/libtorch")) / "include"
            self.env["CPATH"] = f"{include}:{include}/torch/csrc/api/include"
        # What torch.compile has made is not for the next run.
        self.env["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor")

    def step_spec(self, device, ranks=1, **values):
        sizes = self.sizes(device)
        chosen = {key: sizes[key] for key in ("batch", "lanes", "crop", "width")}
        precision, *words = values.pop("precision", "f32").split("+")
        layout = next((word for word in words if word != "graphs"), "auto")
        values |= {"precision": precision, "layout": layout, "graphs": str("graphs" in words).lower()}
        return self.spec(**STEP | chosen | values, threads=max(self.args.threads // ranks, 1))

    def sizes(self, device):
        given = {key: getattr(self.args, key) for key in ON_CPU if getattr(self.args, key) is not None}
        return (ON_GPU if is_gpu(device) else ON_CPU) | given

    def measured(self, command, device):
        """What a command printed, the most memory of its processes, and of the device, in MiB."""
        if not is_gpu(device):
            return *figures(command, self.env), 0.0
        before, peak, ended = used_on(device), 0.0, threading.Event()

        def watch():
            nonlocal peak
            while not ended.wait(0.2):
                peak = max(peak, used_on(device))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return *figures(command, self.env), peak - before
        finally:
            ended.set()
            watcher.join()

    def rounds(self, commands, device):
        """Each command as often as it is to be repeated, in turns: its results by its name, none if it failed."""
        results = {name: [] for name in commands}
        for i in range(self.sizes(device)["repetitions"]):
            for name in sorted(commands, reverse=i % 2 == 1):
                if results[name] is None:
                    continue
                try:
                    results[name].append(self.measured(commands[name], device))
                except Failed as failed:
                    if name.startswith("gleaner"):
                        raise
                    print(failed)
                    results[name] = None
        return results

    def say_rates(self, what, device, results, rate):
        """A line for each way, and one that holds ours against the fastest of theirs; `rate` is of what a command printed."""
        rates = {}
        for name, measured in results.items():
            if measured is None:
                self.say(what, device=device, way=name, failed="1")
                continue
            rates[name] = statistics.median(rate(printed) for printed, _, _ in measured)
            memory = {"memory_mib": statistics.median(ram for _, ram, _ in measured)}
            if is_gpu(device):
                memory["device_mib"] = statistics.median(on_device for _, _, on_device in measured)
            self.say(what, device=device, way=name, images_per_second=rates[name], **memory)
        ours = max((name for name in rates if name.startswith("gleaner")), key=rates.get)
        theirs = max((name for name in rates if not name.startswith("gleaner")), key=rates.get, default=None)
        if theirs:
            self.say(f"{what}-fastest", device=device, ours=ours, theirs=theirs, ratio=rates[ours] / rates[theirs])

    def steps(self, what, devices):
        device = devices[0]
        count = self.sizes(device)["steps"]
        spec = {precision: self.step_spec(device, precision=precision, ranks=len(devices)) for precision in precisions(device)}
        step = lambda side, precision, *words: [*side, "step", spec[precision], count, ",".join(devices), *words]
        commands = {f"gleaner+{precision}": step([self.args.bench], precision) for precision in precisions(device)}
        ways = EAGER + COMPILED + (THEIRS_ON_GPU if is_gpu(device) else [])
        commands |= {way: step(self.rival, "f32", way) for way in ways}
        results = self.rounds(commands, device)
        # Ranks work beside each other.
        rate = lambda ranks: sum(rank["images"] for rank in ranks) / max(rank["wall"] for rank in ranks)
        self.say_rates(what, device if len(devices) == 1 else f"{len(devices)}x{device}", results, rate)

    def norm(self, device):
        spec, count = self.step_spec(device), self.sizes(device)["steps"] * 4
        rounds = self.sizes(device)["repetitions"]
        measured = [self.measured([self.args.bench, "norm", spec, count, device], device)[0] for _ in range(rounds)]
        ways = [way["what"] for way in measured[0]]
        milliseconds = lambda way: statistics.median(1000 * printed[way]["wall"] / count for printed in measured)
        self.say("norm", device=device, **{f"{way}_ms": milliseconds(at) for at, way in enumerate(ways)})

    def loader(self, device, store):
        sizes = self.sizes(device)
        values = LOADER | dict(batch=sizes["batch"], lanes=sizes["lanes"], crop=sizes["crop"], epochs=sizes["epochs"])
        spec = self.spec(**values, threads=self.args.threads)
        ours = lambda host, on_device: [self.args.bench, "loader", spec, store, host, on_device, device]
        commands = {
            "gleaner": ours(self.args.cache_bytes, 0),
            "gleaner+on-device": ours(0, self.args.device_cache_bytes),
            "webdataset": [*self.rival, "loader", spec, store / "tars.txt", 1, device],
        }
        results = self.rounds(commands, device)
        self.say_rates("loader", device, results, lambda epochs: epochs[0]["images"] / epochs[0]["wall"])
        later = lambda epochs: sum(epoch["images"] for epoch in epochs[1:]) / sum(epoch["wall"] for epoch in epochs[1:])
        for way in ("gleaner", "gleaner+on-device"):
            rate = statistics.median(later(printed) for printed, _, _ in results[way])
            self.say("loader-later", device=device, way=way, images_per_second=rate)

    def epochs(self, device, store):
        epochs = self.sizes(device)["epochs"]
        spec = {precision: self.step_spec(device, precision=precision, epochs=epochs) for precision in precisions(device)}
        tars = store / "tars.txt"
        ours = lambda precision, host, on_device: [self.args.bench, "run", spec[precision], store, host, on_device, device]
        commands = {f"gleaner+{precision}": ours(precision, self.args.cache_bytes, 0) for precision in precisions(device)}
        commands["gleaner+bf16+on-device"] = ours("bf16", 0, self.args.device_cache_bytes)
        commands["eager"] = [*self.rival, "run", spec["f32"], tars, device, "eager"]
        commands["eager+bf16+channels_last"] = [*self.rival, "run", spec["bf16"], tars, device, "eager+bf16+channels_last"]
        results = self.rounds(commands, device)
        rate = lambda printed: printed[1]["images"] / printed[1]["wall"]
        self.say_rates("epochs-2-to-n", device, results, rate)


PARTS = ["step", "ddp", "norm", "loader", "epoch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, type=Path, help="the trainer's example `bench`")
    parser.add_argument("--devices", default="cuda:0", help="such as cuda:0,cuda:1, or cpu; several are also tried together")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side; of ranks together")
    parser.add_argument("--cache-bytes", type=int, default=16 << 30, help="for decoded images")
    parser.add_argument("--device-cache-bytes", type=int, default=8 << 30, help="for those in a device's own memory, where it keeps them")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone, and others that are named so")
    for key in ON_CPU:
        kind, sizes = (float if key == "width" else int), f"{ON_GPU[key]} on a GPU, {ON_CPU[key]} on the CPU if left out"
        parser.add_argument(f"--{key}", type=kind, help=sizes)
    args = parser.parse_args()
    devices, parts = args.devices.split(","), args.only or PARTS
    if any(map(is_gpu, devices)) and not torch.cuda.is_available():
        parser.error(f"--devices {args.devices}: this Python's torch sees no GPU; `--devices cpu` runs anywhere")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        bench = Gpu(args, folder)
        store = None
        for device in dict.fromkeys(devices):
            if "step" in parts:
                bench.steps("step", [device])
            if "norm" in parts:
                bench.norm(device)
            if {"loader", "epoch"} & set(parts):
                store = store or bench.data("photos-256", bench.sizes(device)["images"], 256)
            if "loader" in parts:
                bench.loader(device, store)
            if "epoch" in parts:
                bench.epochs(device, store)
        if "ddp" in parts and len(devices) > 1:
            bench.steps("ddp", devices)
        print(f"{time.monotonic() - begun:.0f} s")
        print("\n".join(bench.lines))


main()
