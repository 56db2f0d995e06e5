"""Prints the pixels of a picture with a profile as littlecms converts them to sRGB.

    colours.py PICTURE          writes width, height, and three bytes a pixel in hex
"""

import io
import sys

from PIL import Image, ImageCms

image = Image.open(sys.argv[1]).convert("RGB")
profile = ImageCms.ImageCmsProfile(io.BytesIO(Image.open(sys.argv[1]).info["icc_profile"]))
converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
print(*converted.size, converted.tobytes().hex())
