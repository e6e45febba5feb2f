#!/usr/bin/env bash
# Finding: NNCF's "global magnitude" ranks shares of a layer's norm, so large layers lose nearly all, small ones little.
#
# Packages:  nncf 3.4.0, torch 2.14.1 (torch.nn.utils.prune.global_unstructured), CPU.
# Guessed:   UNSTRUCTURED_MAGNITUDE_GLOBAL prunes the smallest |W| of the whole network, as global magnitude pruning does
#            in the literature and in torch.
# Found:     each |W| is divided by the 2-norm of its layer. That takes the scale of a layer out, but puts its size in:
#            in a layer of n weights the typical share is 1 / sqrt(n). With weights of one distribution everywhere,
#            LeNet-300-100 at 0.9 loses 95 % of its first layer and 9 % of the last; torch prunes all layers
#            alike. Multiplying a layer by 100 changes nothing in NNCF.
# Output seen (share of each layer that is pruned, normal weights of one scale, ratio 0.9):
#   torch: 784 x 300 0.90, 300 x 100 0.90, 100 x 10 0.92
#   nncf:  784 x 300 0.95, 300 x 100 0.52, 100 x 10 0.09
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 nncf==3.4.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import sys
from importlib.metadata import version

logging.disable(logging.WARNING)
import nncf
import torch
from torch.nn.utils import prune

print(*(f"{name} {version(name)}" for name in ("torch", "nncf")), "python", sys.version.split()[0])
SIZES = {"784 x 300": (784, 300), "300 x 100": (300, 100), "100 x 10": (100, 10)}


class Network(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in SIZES.values())
        for layer in self.layers:
            layer.weight.data.normal_(generator=generator)
        self.layers[0].weight.data.mul_(scale)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.relu())
        return x


def by_torch():
    layers = [(layer, "weight") for layer in Network().layers]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)
    return [round((layer.weight == 0).float().mean().item(), 2) for layer, _ in layers]


def by_nncf(scale=1.0):
    mode, x = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, torch.randn(8, 784)
    pruned = nncf.prune(Network(scale), mode=mode, ratio=0.9, examples_inputs=x)
    masks = {name.split(":")[-2][-1]: mask for name, mask in pruned.state_dict().items() if name.endswith("binary_mask")}
    return [round(1 - masks[str(i)].float().mean().item(), 2) for i in range(len(SIZES))]


found = {"torch": by_torch(), "nncf": by_nncf()}
for name, shares in found.items():
    print(f"{name + ':':6s} " + ", ".join(f"{size} {share:.2f}" for size, share in zip(SIZES, shares, strict=True)))
first, _, last = found["nncf"]
changed = min(found["torch"]) < 0.85 or first < 0.94 or last > 0.2 or by_nncf(scale=100.0) != found["nncf"]
sys.exit("the behaviour has changed" if changed else None)
PYTHON
