"""Looks with onnxruntime, over Pillow's decoder, at the pictures that `gleaner classify -o json` has looked at.

    classified.py MODEL.onnx ANSWERS.json

Prints the logits that it finds, as JSON, a list for each answer. The pictures have the size that the model's are stored with.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

model, answers = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
crop = session.get_inputs()[0].shape[2]
size = json.loads(session.get_modelmeta().custom_metadata_map["resize"])["size"]
found = []
assert answers
for answer in answers:
    assert answer["error"] is None, answer
    image = Image.open(answer["picture"]).convert("RGB")
    assert image.size == (size, size), image.size
    begin = (size - crop) // 2
    pixels = np.asarray(image, dtype=np.float32)[begin : begin + crop, begin : begin + crop] / 255
    (logits,) = session.run(["logits"], {"image": pixels.transpose(2, 0, 1)[None]})
    found.append(logits[0].tolist())
print(json.dumps(found))
