"""Reads tars with `webdataset` and prints, one a line: key, label, SHA-256 of the decoded RGB pixels, width, height."""

import hashlib
import io
import sys

import webdataset
from PIL import Image

for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    print(int(sample["__key__"]), int(sample["cls"]), pixels, image.width, image.height)
