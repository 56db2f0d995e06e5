"""Evaluates a trained model three times: from its safetensors with PyTorch's modules, with torch.jit, and with onnxruntime.

usage: exported_model.py FOLDER
Prints the largest difference of the logits of torch.jit and of onnxruntime from the first, relative to the largest logit, for 1 and for 5 images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from alexnet import build
from tensors import load_file

folder = Path(sys.argv[1])
about = json.loads((folder / "model.json").read_text())
weights = load_file(folder / "model.safetensors")
model, modules = build(about["model"]["arch"], weights, about["crop"])
values = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict(keep_vars=True).items()}
assert weights.keys() == {name for name in values if not name.endswith("num_batches_tracked")}, weights.keys()
with torch.no_grad():
    for name, tensor in weights.items():
        values[name].copy_(tensor)
model.eval()


def evaluate(image):
    channels = lambda key: torch.tensor(about[key], dtype=torch.float32).reshape(1, 3, 1, 1)
    with torch.no_grad():
        return model((image - channels("mean")) / channels("std"))


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
