"""Writes what PyTorch users have on disk, and checks what was made of it.

    state_dicts.py write FOLDER     writes FOLDER/*.pth, and FOLDER/refused/*.pth, which are no state dicts
    state_dicts.py check FOLDER     every tensor of FOLDER/X.safetensors must be bit by bit that of the state dict in FOLDER/X.pth
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch

from tensors import load_file

what, folder = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(1)


def network():
    layers = OrderedDict(conv=torch.nn.Conv2d(3, 4, 5), norm=torch.nn.BatchNorm2d(4), dense=torch.nn.Linear(7, 2))
    return torch.nn.Sequential(layers)


def write(name, what, **options):
    torch.save(what, folder / f"{name}.pth", **options)


def state_dict(path):
    """The tensors of a network, as they have to come out."""
    loaded = torch.load(path, weights_only=True)
    loaded = loaded.get("state_dict", loaded)
    return {name.replace("module.", ""): tensor for name, tensor in loaded.items() if tensor.is_floating_point()}


if what == "write":
    (folder / "refused").mkdir()
    plain = network().state_dict()
    write("plain", plain)
    write("legacy", plain, _use_new_zipfile_serialization=False)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        write(str(kind).removeprefix("torch."), network().to(kind).state_dict())
    write("channels_last", network().to(memory_format=torch.channels_last).state_dict())
    write("parameters", dict(network().named_parameters()))
    whole = torch.randn(6, 8)
    views = {"whole": whole, "again": whole, "rows": whole[2:4], "columns": whole[:, 1::3], "transposed": whole.t()}
    views |= {"one": whole[3, 5], "none": whole[:0], "wide": whole[1].expand(2, 8), "four": whole.view(2, 3, 4, 2).permute(3, 1, 0, 2)}
    write("views", views)
    write("views_legacy", views, _use_new_zipfile_serialization=False)
    parallel = torch.nn.DataParallel(network())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    parallel.module.dense(torch.randn(1, 7)).sum().backward()
    optimizer.step()
    write("checkpoint", {"epoch": 90, "arch": "alexnet", "best_acc1": torch.tensor(56.5), "state_dict": parallel.state_dict(),
                         "optimizer": optimizer.state_dict()})
    write("refused/network", network())
    write("refused/tensor", whole)
    write("refused/protocol", plain, pickle_protocol=4)
    write("refused/sparse", {"w": whole.to_sparse()})
    torch.jit.script(network()).save(folder / "refused/script.pth")
else:
    for path in folder.glob("*.pth"):
        expected, found = state_dict(path), load_file(path.with_suffix(".safetensors"))
        assert expected.keys() == found.keys(), (path, expected.keys() ^ found.keys())
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype and tensor.shape == found[name].shape, (path, name, tensor.shape)
            numbers = [it.contiguous().flatten().view(torch.uint8) if it.numel() else it for it in (tensor, found[name])]
            assert torch.equal(*numbers), (path, name)
        print(path.stem, len(expected))
