"""AlexNet in PyTorch, in all its kinds, around weights that another implementation has named."""

from torch import nn

CONVOLUTIONS = {0: (11, 2), 3: (5, 2), 6: (3, 1), 8: (3, 1), 10: (3, 1)}


def build(arch, weights, crop):
    """The network for images of `crop` x `crop` pixels, and its modules by the names of their weights; its sizes are those of `weights`."""
    names, modules = {}, []

    def add(name, make, *after):
        shape = weights[f"{name}.weight"].shape
        # A normed layer has no bias.
        normed = f"{name}.norm.weight" in weights
        names[name] = make(shape[1], shape[0], not normed)
        modules.append(names[name])
        if normed:
            names[f"{name}.norm"] = nn.BatchNorm2d(shape[0]) if len(shape) == 4 else nn.BatchNorm1d(shape[0])
            modules.append(names[f"{name}.norm"])
        modules.extend(after)

    classic, slim = arch == "alexnet-2012", arch == "alexnet-slim"
    for index, (size, padding) in CONVOLUTIONS.items():
        # Small images keep larger maps.
        stride = (2 if crop < 96 else 4) if index == 0 else 1
        groups = 2 if classic and index in (3, 8, 10) else 1
        convolution = lambda i, o, bias: nn.Conv2d(i * groups, o, size, stride, padding, bias=bias, groups=groups)
        # The paper's alpha is of each square, PyTorch's of their mean.
        pool = [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)] if classic and index in (0, 3) else []
        pool += [nn.MaxPool2d(3, 2)] if index in (0, 3, 10) else []
        add(f"features.{index}", convolution, nn.ReLU(), *pool)
    channels, inputs = weights["features.10.weight"].shape[0], weights["classifier.6.weight" if slim else "classifier.1.weight"].shape[1]
    modules += [nn.AdaptiveAvgPool2d(round((inputs / channels) ** 0.5)), nn.Flatten()]
    for index in () if slim else (1, 4):
        add(f"classifier.{index}", nn.Linear, nn.ReLU())
    add("classifier.6", nn.Linear)
    return nn.Sequential(*modules), names
