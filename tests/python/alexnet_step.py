"""One training step of AlexNet in PyTorch, from the weights and the batch of another implementation.

usage: alexnet_step.py BATCH STEP ARCH LEARNING_RATE MOMENTUM WEIGHT_DECAY LABEL_SMOOTHING
Prints the largest differences, relative to the largest value of each tensor, of: logits, loss, gradients, stepped values.
"""

import sys

import torch
from alexnet import build
from tensors import load_file
from torch import nn

batch, step, arch, *numbers = sys.argv[1:]
learning_rate, momentum, weight_decay, label_smoothing = map(float, numbers)
data, theirs = load_file(batch), load_file(step)
before = {name.removeprefix("before."): tensor for name, tensor in theirs.items() if name.startswith("before.")}
dtype = before["features.0.weight"].dtype
torch.set_default_dtype(dtype)

model, modules = build(arch, before, data["images"].shape[-1])
ours = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict(keep_vars=True).items()}
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
