"""Evaluates a trained alexnet-slim three times: from its safetensors with PyTorch's functions, with torch.jit, and with onnxruntime.

usage: exported_model.py FOLDER
Prints the largest difference of the logits of torch.jit and of onnxruntime from the first, relative to the largest logit, for 1 and for 5 images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tensors import load_file
from torch.nn import functional as F

folder = Path(sys.argv[1])
about = json.loads((folder / "model.json").read_text())
weights = load_file(folder / "model.safetensors")
first_stride = 2 if about["crop"] < 96 else 4


def evaluate(image):
    channels = lambda key: torch.tensor(about[key], dtype=torch.float32).reshape(1, 3, 1, 1)
    x = (image - channels("mean")) / channels("std")
    for index, stride, padding, pool in [(0, first_stride, 2, True), (3, 1, 2, True), (6, 1, 1, False), (8, 1, 1, False), (10, 1, 1, True)]:
        x = F.conv2d(x, weights[f"features.{index}.weight"], stride=stride, padding=padding)
        norm = [weights[f"features.{index}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *norm))
        if pool:
            x = F.max_pool2d(x, 3, 2)
    return F.linear(x.mean((2, 3)), weights["classifier.6.weight"], weights["classifier.6.bias"])


script = torch.jit.load(folder / "model.pt")
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
assert [c["synset"] for c in classes] == [c["synset"] for c in about["classes"]], classes
torch.manual_seed(1)
for n in (1, 5):
    image = torch.rand(n, 3, about["crop"], about["crop"])
    expected = evaluate(image)
    logits, probabilities = session.run(["logits", "probabilities"], {"image": image.numpy()})
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5), probabilities
    difference = lambda other: ((other - expected).abs().max() / expected.abs().max()).item()
    print(difference(script(image)), difference(torch.from_numpy(logits)))
