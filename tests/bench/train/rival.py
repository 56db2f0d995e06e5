"""What `make bench-train` and `make bench-gpu` compare with: the same work in PyTorch, torchvision and WebDataset.

    rival.py step SPEC STEPS DEVICE,... WORDS         a process for each device
    rival.py loader SPEC TARS EPOCHS DEVICE
    rival.py run SPEC TARS DEVICE WORDS

WORDS say how, as in `compile+bf16+channels_last`: `eager`, `compile` (torch.compile) or `graphs` (the same with CUDA graphs), `tf32`
(products of matrices too; convolutions compute in it by default), `bf16` (autocast), `channels_last`.

Prints its figures as lines of JSON, as the trainer's `bench` does: processor time of this process and its children, time that passed,
and the most memory of this process alone.
"""

import contextlib
import json
import os
import resource
import sys
import time
import tomllib

import torch
from torch import nn

MEAN, STD = [0.48, 0.46, 0.41], [0.23, 0.22, 0.23]


def cpu_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Clock:
    def __init__(self):
        self.cpu, self.wall = cpu_seconds(), time.monotonic()

    def stop(self, what, images):
        figures = {"what": what, "images": images, "cpu": cpu_seconds() - self.cpu, "wall": time.monotonic() - self.wall}
        print(json.dumps(figures | {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def wide(channels, width):
    return max(round(channels * width / 8) * 8, 8)


def alexnet(model, crop, classes):
    """The spec's network as a PyTorch user writes it: with the batch norm of the whole batch."""
    arch, width, dropout = model.get("arch", "alexnet-bn"), model.get("width", 1.0), model.get("dropout", 0.5)
    norm, slim = arch != "alexnet", arch == "alexnet-slim"
    layers, inputs, side = [], 3, crop
    for channels, size, stride, padding, pool in [
        (64, 11, 2 if crop < 96 else 4, 2, True),
        (192, 5, 1, 2, True),
        (384, 3, 1, 1, False),
        (256, 3, 1, 1, False),
        (256, 3, 1, 1, True),
    ]:
        channels = wide(channels, width)
        layers.append(nn.Conv2d(inputs, channels, size, stride, padding, bias=not norm))
        layers += [nn.BatchNorm2d(channels)] * norm + [nn.ReLU(inplace=True)] + [nn.MaxPool2d(3, 2)] * pool
        side = (side + 2 * padding - size) // stride + 1
        side = (side - 3) // 2 + 1 if pool else side
        inputs = channels
    grid = 1 if slim else min(side, 6)
    layers += [nn.AdaptiveAvgPool2d(grid), nn.Flatten()]
    inputs *= grid * grid
    for _ in range(0 if slim else 2):
        hidden = wide(4096, width)
        layers += [nn.Dropout(dropout), nn.Linear(inputs, hidden, bias=not norm)]
        layers += [nn.BatchNorm1d(hidden)] * norm + [nn.ReLU(inplace=True)]
        inputs = hidden
    layers += [nn.Dropout(dropout)] * slim + [nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def optimizer(model, train):
    return torch.optim.SGD(
        model.parameters(),
        lr=train.get("learning_rate", 0.02),
        momentum=train.get("momentum", 0.9),
        weight_decay=train.get("weight_decay", 5e-4),
        fused=True,
    )


def step(model, sgd, loss, images, labels, half):
    sgd.zero_grad(set_to_none=True)
    with half:
        logits = model(images)
    value = loss(logits.float(), labels)
    value.backward()
    sgd.step()
    # What a training loop keeps of each step.
    with torch.no_grad():
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).sum(0)
    return value.item(), hits[0].item(), hits.sum().item()


def settle(device):
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepared(model, device, words):
    """The model on its device, what it computes within, and how its images lie."""
    if "tf32" in words:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
    half = torch.autocast(device.type, torch.bfloat16) if "bf16" in words else contextlib.nullcontext()
    return model.to(device, memory_format=layout), half, layout


def compiled(model, words):
    if "graphs" in words:
        return torch.compile(model, mode="reduce-overhead")
    return torch.compile(model) if "compile" in words else model


def steps(rank, spec, count, devices, words):
    train, crop, world, device = spec["train"], spec["input"]["crop"], len(devices), torch.device(devices[rank])
    torch.set_num_threads(spec["ranks"]["threads"])
    model, half, layout = prepared(alexnet(spec["model"], crop, 1000), device, words)
    if world > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    sgd, loss = optimizer(model, train), nn.CrossEntropyLoss()
    model = compiled(model, words)
    own = train["batch"] // world
    images, labels = torch.randn(own, 3, crop, crop), torch.randint(1000, (own,), device=device)
    images = images.to(device, memory_format=layout)
    before = 10 if device.type == "cuda" else 2
    for i in range(count + before):
        if i == before:
            settle(device)
            clock = Clock()
        step(model, sgd, loss, images, labels, half)
    settle(device)
    clock.stop("steps", count * own)
    if world > 1:
        torch.distributed.destroy_process_group()


def loader(spec, tars, workers):
    """WebDataset's recipe for one node: shuffled shards and a shuffle buffer, decoded and augmented in worker processes."""
    import webdataset
    from torchvision import transforms

    given, crop = spec["input"], spec["input"]["crop"]
    light = [given.get("brightness", 0.2), given.get("contrast", 0.0), given.get("saturation", 0.0)]
    cut = transforms.RandomCrop(crop)
    if given.get("cut") == "resized":
        cut = transforms.RandomResizedCrop(crop)
    augment = [cut, transforms.RandomHorizontalFlip()] + [transforms.ColorJitter(*light)] * any(light)
    augment = transforms.Compose(augment + [transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    # Of all images: the last batch may be small.
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=100, seed=1)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(augment, lambda label: int(label))
        .batched(spec["train"]["batch"])
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=min(workers, len(tars)))


def epochs(spec, tars, count, device):
    """Each epoch has workers of its own, so that their processor time is known when it ends."""
    threads = spec["ranks"]["threads"]
    torch.set_num_threads(threads)
    for epoch in range(count):
        clock, images = Clock(), 0
        for batch, _ in loader(spec, tars, threads):
            batch.to(device)
            images += len(batch)
        settle(device)
        clock.stop(f"epoch {epoch}", images)


def run(spec, tars, device, words):
    train, threads = spec["train"], spec["ranks"]["threads"]
    clock, images, later = Clock(), 0, None
    torch.set_num_threads(threads)
    model, half, layout = prepared(alexnet(spec["model"], spec["input"]["crop"], 10), device, words)
    sgd, loss = optimizer(model, train), nn.CrossEntropyLoss(label_smoothing=train.get("label_smoothing", 0.0))
    network = compiled(model, words)
    for epoch in range(train["epochs"]):
        for batch, labels in loader(spec, tars, threads):
            batch, labels = batch.to(device, memory_format=layout), torch.as_tensor(labels, device=device)
            step(network, sgd, loss, batch, labels, half)
            images += len(batch)
        torch.save({"model": model.state_dict(), "sgd": sgd.state_dict()}, os.path.join(os.path.dirname(tars[0]), "rival.pt"))
        if later is None:
            later, first = Clock(), images
    clock.stop("run", images)
    if images > first:
        later.stop("later epochs", images - first)


if __name__ == "__main__":
    command, path, *rest = sys.argv[1:]
    with open(path, "rb") as file:
        spec = tomllib.load(file)
    if command == "step":
        count, devices, words = int(rest[0]), rest[1].split(","), rest[2].split("+")
        if len(devices) == 1:
            steps(0, spec, count, devices, words)
        else:
            torch.multiprocessing.spawn(steps, (spec, count, devices, words), nprocs=len(devices))
    else:
        with open(rest[0]) as file:
            tars = file.read().split()
        if command == "loader":
            epochs(spec, tars, int(rest[1]), torch.device(rest[2]))
        else:
            run(spec, tars, torch.device(rest[1]), rest[2].split("+"))
