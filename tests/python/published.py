"""Writes made-up samples of lists as they are published, of the pictures whose URLs come in as JSON, into a folder, and prints
as JSON what has to come out of each: by URL the class (null: none), the caption (null: none), and columns.
"""

import csv
import hashlib
import io
import json
import os
import sys
import tarfile

import pyarrow
from pyarrow import parquet

folder, urls = sys.argv[1], json.load(sys.stdin)
expected = {}
captions = [f'a "very typical" bus station, été {n}' for n in range(len(urls))]


def expect(name, row):
    """`row` gives class, caption and columns of the n-th picture."""
    expected[name] = {url: dict(zip(("class", "caption", "columns"), row(n))) for n, url in enumerate(urls)}


def path(name):
    return os.path.join(folder, name)


def table(name, columns, caption, renamed):
    parquet.write_table(pyarrow.table(columns), path(name), compression="snappy")
    kept = {renamed.get(column, column): values for column, values in columns.items() if column.lower() != "url"}
    expect(name, lambda n: (None, columns[caption][n], {k: v[n] for k, v in kept.items() if v[n] is not None}))


def floats(by):
    return [n / by for n in range(len(urls))]


ones = list(range(len(urls)))
with open(path("cc3m.tsv"), "w") as file:
    file.writelines(f"{caption}\t{url}\n" for caption, url in zip(captions, urls))
with open(path("cc12m.tsv"), "w") as file:
    file.writelines(f"{url}\t{caption}\n" for caption, url in zip(captions, urls))
for name in ("cc3m.tsv", "cc12m.tsv"):
    expect(name, lambda n: (None, captions[n], {"caption": captions[n]}))

table("laion.parquet", {
    "URL": urls, "TEXT": captions, "WIDTH": [640 + n for n in ones], "HEIGHT": [480 + n for n in ones],
    "similarity": floats(64), "hash": [(-1) ** n * n << 40 for n in ones], "punsafe": floats(1024), "pwatermark": floats(128),
}, "TEXT", {})
table("datacomp.parquet", {
    "uid": [f"{n:032x}" for n in ones], "url": urls, "text": captions, "original_width": [640 + n for n in ones],
    "original_height": [480 + n for n in ones], "clip_b32_similarity_score": floats(32), "clip_l14_similarity_score": floats(16),
    "face_bboxes": [[[0.25, 0.5, 0.75, n / 16.0]] * (n % 3) for n in ones],
    "sha256": [hashlib.sha256(b"%d" % n).hexdigest() for n in ones],
}, "text", {"sha256": "list_sha256"})
table("coyo.parquet", {
    "id": [n << 40 for n in ones], "url": urls, "text": captions, "width": ones, "height": ones,
    "image_phash": [f"{n:016x}" for n in ones], "text_length": [len(caption) for caption in captions], "word_count": ones,
    "num_tokens_bert": ones, "num_tokens_gpt": ones, "num_faces": ones, "clip_similarity_vitb32": floats(64),
    "clip_similarity_vitl14": floats(64), "nsfw_score_opennsfw2": floats(64), "nsfw_score_gantman": floats(64),
    "watermark_score": floats(64), "aesthetic_score_laion_v2": floats(64),
}, "text", {"width": "list_width", "height": "list_height"})

# Joined: a row for each label of a picture, also for those that are not in it.
names = ["ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title", "LabelName", "Confidence"]
with open(path("openimages.csv"), "w") as file:
    rows = csv.writer(file)
    rows.writerow(names)
    for n, url in enumerate(urls):
        row = [f"{n:016x}", "train", url, "https://flickr.example/p", "cc-by", "https://flickr.example/a", "Doe, Jane", captions[n]]
        rows.writerow(row + ["/m/01yrx" if n % 2 else "/m/0bt9lr", 1])
        rows.writerow(row + ["/m/0bt9lr" if n % 2 else "/m/01yrx", 0])
expect("openimages.csv", lambda n: ("/m/01yrx" if n % 2 else "/m/0bt9lr", captions[n],
                                    {"License": "cc-by", "Author": "Doe, Jane", "Title": captions[n]}))

text = "".join(f"n0{1 + n % 3}440764_{n}\t{url}\n" for n, url in enumerate(urls)).encode()
with tarfile.open(path("imagenet_fall11_urls.tgz"), "w:gz") as tar:
    member = tarfile.TarInfo("fall11_urls.txt")
    member.size = len(text)
    tar.addfile(member, io.BytesIO(text))
expect("imagenet_fall11_urls.tgz", lambda n: (f"n0{1 + n % 3}440764", None, {}))
json.dump(expected, sys.stdout)
