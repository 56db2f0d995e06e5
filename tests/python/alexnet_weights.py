"""Writes weights of torchvision's AlexNet, an eighth as wide, as its state dict.

    alexnet_weights.py OUT.pth CROP

Prints the sum of each tensor, one a line: NAME SUM.
"""

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
torch.save(network.state_dict(), out)
for name, tensor in network.state_dict().items():
    print(name, tensor.double().sum().item())
