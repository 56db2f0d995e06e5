"""Reads safetensors files."""

import json

import torch

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def load_file(path):
    """The tensors of a safetensors file."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")

    def tensor(info):
        begin, end = info["data_offsets"]
        if begin == end:
            return torch.empty(info["shape"], dtype=DTYPES[info["dtype"]])
        flat = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=DTYPES[info["dtype"]])
        return flat.reshape(info["shape"])

    header = json.loads(data[8:start])
    return {name: tensor(info) for name, info in header.items() if name != "__metadata__"}
