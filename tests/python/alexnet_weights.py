"""Writes weights of torchvision's AlexNet, an eighth as wide, as a safetensors file of its state dict.

    alexnet_weights.py OUT.safetensors CROP

Prints the sum of each tensor, one a line: NAME SUM.
"""

import json
import sys
from collections import OrderedDict

import torch

out, crop = sys.argv[1], int(sys.argv[2])
stride = 2 if crop < 96 else 4
features = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 11, stride=stride, padding=2),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(3, 2),
    torch.nn.Conv2d(8, 24, 5, padding=2),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(3, 2),
    torch.nn.Conv2d(24, 48, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.Conv2d(48, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(3, 2),
)
side = features(torch.zeros(1, 3, crop, crop)).shape[-1]
side = min(side, 6)
classifier = torch.nn.Sequential(
    torch.nn.Dropout(),
    torch.nn.Linear(32 * side * side, 512),
    torch.nn.ReLU(),
    torch.nn.Dropout(),
    torch.nn.Linear(512, 512),
    torch.nn.ReLU(),
    torch.nn.Linear(512, 1000),
)
network = torch.nn.Sequential(OrderedDict(features=features, classifier=classifier))
head, data = {}, b""
for name, tensor in network.state_dict().items():
    bytes_ = tensor.numpy().tobytes()
    head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(bytes_)]}
    data += bytes_
head = json.dumps(head).encode()
with open(out, "wb") as file:
    file.write(len(head).to_bytes(8, "little") + head + data)
for name, tensor in network.state_dict().items():
    print(name, tensor.double().sum().item())
