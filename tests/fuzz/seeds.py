"""Writes the seeds of the corpus: small inputs of every format. Usage: seeds.py FOLDER"""

import base64
import gzip
import io
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

folder = Path(sys.argv[1])


def image(name, data):
    for choice in range(10):
        seed("image", f"{name}-{choice}", bytes([choice]) + data)


def seed(target, name, data):
    path = folder / target / f"seed-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Lists: the first byte chooses the format (auto, synset-url, wnid-id-url, csv, tsv, jsonl, parquet).
lists = {
    "plain": b"# comment\nn02084071 http://a.example/1.jpg\nn02084071\thttp://a.example/2.jpg\r\n\n",
    "winter": b"n02084071_1\thttp://a.example/1.jpg\nn02084071_22\thttp://a.example/2.jpg\n",
    "csv": b'synset,url\nn1,http://a/\n"n,2","http://b/""x"\n',
    "tsv": b"url\tsynset\nhttp://a/\tn1\n",
    "jsonl": b'{"synset": "n1", "url": "http://a/"}\n{"url": 1}\n',
    "open-images": b"ImageID,Subset,OriginalURL,LabelName\n00,train,http://a/,/m/01\n",
    "bom": b"\xef\xbb\xbfn1 http://a/\n",
    "bad": b"only\n\xff\xfe\n\0\n",
}
for number, (name, text) in enumerate(lists.items()):
    for format in range(6):
        seed("list", f"{name}-{format}", bytes([format]) + text)
    seed("list", f"{name}-gz", b"\0" + gzip.compress(text, mtime=0))
# "n1 http://a/\n" by zstd.
seed("list", "zst", b"\0" + bytes.fromhex("28b52ffd04006900006e3120687474703a2f2f612f0a") + b"\0\0\0\0")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# Images of 64 x 64 with something to see in them. The first byte chooses one of five modes and two formats.
side = 64
rgb = bytes((x * 3 + y * 5 * (c + 1)) % 256 for y in range(side) for x in range(side) for c in range(3))
rows = b"".join(b"\0" + rgb[y * side * 3 : (y + 1) * side * 3] for y in range(side))
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
image("png", png)
bmp = struct.pack("<2sIHHI", b"BM", 54 + len(rgb), 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, len(rgb), 2835, 2835, 0, 0)
image("bmp", bmp + rgb)
tags = [(256, 3, 1, side), (257, 3, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, side), (279, 4, 1, side * side)]
grey = rgb[::3]
tiff = b"II*\0" + struct.pack("<I", 8 + len(grey)) + grey + struct.pack("<H", len(tags))
tiff += b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0\0\0\0"
image("tiff", tiff)
gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0)
# Uncompressed LZW: a clear code before each three pixels.
bits, length, packed = 0, 0, bytearray()
for at in range(side * side):
    codes = ([4] if at % 2 == 0 else []) + [(at // 3 + at // 64) % 2]
    for code in codes:
        bits |= code << length
        length += 3
        while length >= 8:
            packed.append(bits & 255)
            bits >>= 8
            length -= 8
packed.append((bits | 5 << length) & 255)
gif += b"\2" + b"".join(bytes([len(packed[i : i + 255])]) + packed[i : i + 255] for i in range(0, len(packed), 255)) + b"\0;"
image("gif", gif)
# A grey JPEG of 8 x 8 and the smallest lossy WebP; both too small to be kept, but whole.
image("jpeg", base64.b64decode(
    "/9j/4AAQSkZJRgABAQEASABIAAD/2wBDAAMCAgICAgMCAgIDAwMDBAYEBAQEBAgGBgUGCQgKCgkICQkKDA8MCgsOCwkJDRENDg8QEBEQCgwSExIQEw8QEBD/"
    "wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AVN//2Q=="))
image("webp", base64.b64decode("UklGRiIAAABXRUJQVlA4IBYAAAAwAQCdASoBAAEADsD+JaQAA3AAAAAA"))

# Shards: a block of one sample, and the JSON objects.
block = io.BytesIO()
with tarfile.open(fileobj=block, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    origin = json.dumps({"synset": "n1", "url": "http://a/", "sha256": "0" * 64, "width": 9, "height": 9}).encode()
    for name, data in [("000000000007.jpg", b"\xff\xd8\xff\xd9"), ("000000000007.cls", b"3"), ("000000000007.json", origin)]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
seed("shard", "block", b"\0" + block.getvalue()[:3072])
index = {"version": 1, "nonce": "n", "writer": "w", "shard": 7, "attempt": "9.2", "outcomes": {"kept": 1}, "tars": {}, "outcomes_file": None}
seed("shard", "index", b"\1" + json.dumps(index).encode())
seed("shard", "manifest", b"\2{}")
seed("shard", "outcomes", b"\3PAR1" + b"\0" * 16 + b"PAR1")
seed("shard", "spec", b'\4{"resize": {"size": 64}, "classes": [{"synset": "n1"}], "limits": {"timeout_seconds": 1e300}}')

# Who may come in: tokens, names of callers, a certificate, a method.
seed("door", "tokens", b"\0# who may do what\nanna submitter " + b"ab" * 32 + b"\nw worker " + b"cd" * 32 + b"\n")
seed("door", "name", b"\1worker=*.gleaner")
key = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE" + "A" * 86 + "=="
seed("door", "certificate", b"\2" + b"\x30\x82\x01\x00\x30\x81\xa7\xa0\x03\x02\x01\x02" + base64.b64decode(key))
seed("door", "method", b"\3/grpc.health.v1.Health/Check")

# State dicts: a tensor of 2 x 3 and its transposed, in a zip file and as it was before that.
storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQK\0"
tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K%cK%c\x86K%cK%c\x86\x89ccollections\nOrderedDict\n)RtR"
pickled = b"\x80\x02ccollections\nOrderedDict\n)Rq\0(X\x01\0\0\0a" + tensor % (2, 3, 3, 1) + b"X\x01\0\0\0b" + tensor % (3, 2, 1, 3) + b"u."
numbers = struct.pack("<6f", *range(6))
zipped = io.BytesIO()
with zipfile.ZipFile(zipped, "w") as archive:
    for name, data in [("data.pkl", pickled), ("byteorder", b"little"), ("data/0", numbers)]:
        archive.writestr("a/" + name, data)
seed("state_dict", "zip", zipped.getvalue())
behind = b"\x80\x02]X\x01\0\0\x000a." + struct.pack("<q", 6) + numbers
seed("state_dict", "legacy", bytes.fromhex("80028a0a6cfc9c46f9206aa850192e80024de9032e80027d2e") + pickled + behind)

# Imports: a Parquet file of three pictures in two row groups, and addresses of pictures in files.
parquet = zlib.decompress(base64.b64decode(
    "eNqNVD1P40AQHY83vihCyIqYVSxRuGEEUkAHUqhorncR8QMQTmI+pHD4Et8HLdXVV1BGgl9y5QlR8RMoKPkNzO6SKJEdOMv22Dvz3pt5a7n75XCXFK3S"
    "akJI0ATwASDt9QlojdbakgspoGAdXMZH8BBktUGNKcIziI/qY4oTCdP6+UOgTWouQFEu5Xk+lpV+LSn3PScUUjgtV7I8yE5OpwhcRCA6hDSQmFvTtiJW"
    "lCu9/6yDCmuulsm7hqNhB1rBuH+WXaQUQAdbtfOL9DQjBbSyIW+9qyIbu2eVp8XZBiSGgpRJDtNeNnTJT/00L84vv77ldRC1o4RhnVaiDgRhtOl4HR+B"
    "VnqgB7zH9a22HQ7NVKGEA4EG0T7aLssEtgmLP9bH/MfjYZkAFwmUI3hr12ILXfBv5AevBN4KIrZbNyc9G85ij/QRPyP/xWphRqOrb3ytuC4B3rUBrQ33"
    "Pk/8Ml3dzAEfGIG6q7s8UXytygxgGQxBtRMO/KL4UVU6MUNWOIHWiX81vqstccIK6yfUKONJhM04T0ffvmfFdj/Pt9PR6PJn/CMbjYUw3tvf+byzG5mv"
    "Z3bCrTB05SfxClb7fp8="))
seed("file", "parquet", parquet)
seed("list", "parquet", b"\6" + parquet)
seed("file", "row", b"https://a.example/x.parquet#column=image.bytes&of=1065&span=1&row=2")
seed("file", "member", b"store:///imports/a.tar#name=wren/1.jpg&offset=512&length=99")
