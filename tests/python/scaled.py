"""Prints the pixels of a picture as others scale it.

    scaled.py PICTURE WIDTH HEIGHT lanczos3|bilinear|area       writes three bytes a pixel in hex

The first two are Pillow's; area is the mean of what a pixel covers, in floating point, as OpenCV's INTER_AREA has it.
"""

import sys

import numpy
from PIL import Image

path, width, height, name = sys.argv[1:]
image = Image.open(path).convert("RGB")
size = int(width), int(height)


def covered(source, target):
    """How much of each source pixel each target pixel covers, each row adding up to 1."""
    edges = numpy.arange(target + 1) * source / target
    pixels = numpy.arange(source)
    cover = numpy.minimum(edges[1:, None], pixels + 1) - numpy.maximum(edges[:-1, None], pixels)
    cover = cover.clip(0)
    return cover / cover.sum(1, keepdims=True)


if name == "area":
    values = numpy.asarray(image, dtype=float)
    down, across = covered(image.height, size[1]), covered(image.width, size[0])
    scaled = numpy.einsum("yh,hwc,xw->yxc", down, values, across)
    print(numpy.rint(scaled).clip(0, 255).astype(numpy.uint8).tobytes().hex())
else:
    filters = {"lanczos3": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
    print(image.resize(size, filters[name]).tobytes().hex())
