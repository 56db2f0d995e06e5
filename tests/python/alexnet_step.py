"""One training step of AlexNet in PyTorch, from the weights and the batch of another implementation.

usage: alexnet_step.py BATCH STEP ARCH LEARNING_RATE MOMENTUM WEIGHT_DECAY LABEL_SMOOTHING
Prints the largest differences, relative to the largest value of each tensor, of: logits, loss, gradients, stepped values.
"""

import sys

import torch
from tensors import load_file
from torch import nn

batch, step, arch, *numbers = sys.argv[1:]
learning_rate, momentum, weight_decay, label_smoothing = map(float, numbers)
data, theirs = load_file(batch), load_file(step)
before = {name.removeprefix("before."): tensor for name, tensor in theirs.items() if name.startswith("before.")}
dtype = before["features.0.weight"].dtype
torch.set_default_dtype(dtype)


def layer(name, make):
    """The layer, and its norm if it has one, with the given weights; a normed layer has no bias."""
    shape = before[f"{name}.weight"].shape
    normed = f"{name}.norm.weight" in before
    module = make(shape[1], shape[0], not normed)
    parts = [module]
    if normed:
        parts.append(nn.BatchNorm2d(shape[0]) if len(shape) == 4 else nn.BatchNorm1d(shape[0]))
    return parts


convolutions = {0: (11, 4, 2), 3: (5, 1, 2), 6: (3, 1, 1), 8: (3, 1, 1), 10: (3, 1, 1)}
names, modules = [], []


def add(name, parts, *after):
    names.extend([(name, parts[0])] + [(f"{name}.norm", norm) for norm in parts[1:]])
    modules.extend([*parts, *after])


classic = arch == "alexnet-2012"
for index, (size, stride, padding) in convolutions.items():
    groups = 2 if classic and index in (3, 8, 10) else 1
    make = lambda i, o, bias: nn.Conv2d(i * groups, o, size, stride, padding, bias=bias, groups=groups)
    # The paper's alpha is of each square, PyTorch's of their mean.
    pool = [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)] if classic and index in (0, 3) else []
    pool += [nn.MaxPool2d(3, 2)] if index in (0, 3, 10) else []
    add(f"features.{index}", layer(f"features.{index}", make), nn.ReLU(), *pool)
modules += [nn.AdaptiveAvgPool2d(1 if arch == "alexnet-slim" else 6), nn.Flatten()]
for index in () if arch == "alexnet-slim" else (1, 4):
    add(f"classifier.{index}", layer(f"classifier.{index}", nn.Linear), nn.ReLU())
add("classifier.6", layer("classifier.6", nn.Linear))

model = nn.Sequential(*modules)
ours = {f"{name}.{key}": tensor for name, module in names for key, tensor in module.state_dict(keep_vars=True).items()}
with torch.no_grad():
    for name, tensor in before.items():
        ours[name].copy_(tensor)
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
logits = model(data["images"].to(dtype))
loss = nn.functional.cross_entropy(logits, data["labels"], label_smoothing=label_smoothing)
loss.backward()
gradients = {name: ours[name].grad.clone() for name in before}
optimizer.step()


def difference(mine, other):
    return ((mine - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


after = {name.removeprefix("after."): tensor for name, tensor in theirs.items() if name.startswith("after.")}
assert before.keys() == gradients.keys() and before.keys() <= after.keys() <= ours.keys(), after.keys()
print(
    difference(logits, theirs["logits"]),
    difference(loss, theirs["loss"]),
    max(difference(gradients[name], theirs[f"gradient.{name}"]) for name in before),
    max(difference(ours[name], tensor) for name, tensor in after.items()),
)
