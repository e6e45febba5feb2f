#!/usr/bin/env bash
# Finding: `nncf.prune` prunes every weight that equals the threshold, so it may prune a whole layer when asked for half.
#
# Packages:  nncf 3.4.0, torch 2.14.1, CPU.
# Guessed:   `ratio=0.5` prunes half of each layer (UNSTRUCTURED_MAGNITUDE_LOCAL) to within one weight, whatever the
#            weights are: of equal ones, some.
# Found:     a weight stays if its magnitude is above the value at that rank, and all that equal it go. Of weights with
#            few different values, such as those of a network that was quantised or binarised, far more than `ratio` go;
#            of a layer whose weights all have one magnitude, none is left. Nothing is said.
# Output seen (share of a layer of 64 x 100 that is masked):
#   asked 0.50: normal values 0.50, rounded to eighths 0.87, signs alone 1.00
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

print(*(f"{name} {version(name)}" for name in ("torch", "nncf")), "python", sys.version.split()[0])


class Network(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer = torch.nn.Linear(64, 100)
        values = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) / 8
        self.layer.weight.data = change(values)

    def forward(self, x):
        return self.layer(x)


def masked(change):
    """Return the share of the layer's weights that a ratio of 0.5 masks."""
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    pruned = nncf.prune(Network(change), mode=mode, ratio=0.5, examples_inputs=torch.randn(8, 64))
    (mask,) = (x for name, x in pruned.state_dict().items() if name.endswith("binary_mask"))
    return round(1 - mask.float().mean().item(), 2)


changes = {
    "normal values": lambda W: W,
    "rounded to eighths": lambda W: (8 * W).round() / 8,
    "signs alone": torch.sign,
}
found = {name: masked(change) for name, change in changes.items()}
print("asked 0.50: " + ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
changed = found["normal values"] != 0.5 or found["rounded to eighths"] < 0.8 or found["signs alone"] != 1
sys.exit("the behaviour has changed" if changed else None)
PYTHON
