"""Loads a folder of Parquet files with Hugging Face's `datasets` and prints, one a line as JSON: split, key, class, caption,
further columns, and the pixels' digest. Its cache is the second folder.
"""

import hashlib
import json
import os
import sys

folder, cache = sys.argv[1:]
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=cache)

from datasets import ClassLabel, Image, load_dataset  # noqa: E402: it reads where its cache is when it is imported

for split, rows in load_dataset(folder).items():
    label = rows.features["label"]
    assert isinstance(label, ClassLabel) and isinstance(rows.features["image"], Image), rows.features
    for row in rows:
        pixels = hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest()
        name = None if row["label"] is None else label.int2str(row["label"])
        found = {"split": split, "key": row["key"], "class": name, "text": row["text"], "pixels": pixels}
        print(json.dumps(found | {"columns": json.loads(row["columns"] or "{}"), "url": row["url"]}))
