"""Reads tars with `webdataset` and prints, one a line as JSON: key, class (null: none), caption, and what stands beside."""

import json
import sys

import webdataset

for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode():
    row = {"key": int(sample["__key__"]), "cls": sample.get("cls"), "txt": sample.get("txt"), "json": sample["json"]}
    print(json.dumps(row))
