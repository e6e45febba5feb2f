#!/usr/bin/env bash
# Finding: a network that NNCF has pruned and stripped still holds all its weights; zeros exist only in the forward pass.
#
# Packages:  nncf 3.4.0, torch 2.14.1, torchao 0.18.0 (which strip imports, though nncf does not require it), CPU.
# Guessed:   `nncf.prune` writes zeros into the weights, or at least `nncf.strip`, which is said to return a clean model
#            ready for deployment, does: its state_dict is that of the plain network, with 90 % zeros.
# Found:     masks are hooks on the function calls, and the weights keep every value. By default `strip` changes nothing:
#            the weights have no zeros, and the masks are further entries of the state_dict. Whoever compresses the file
#            gains nothing, and a plain network that loads the weights (strict=False) is the dense one, with other outputs.
#            Only `strip_format=nncf.StripFormat.IN_PLACE` writes the zeros and takes the masks away.
# Output seen (share of zeros in the first weight, entries of the state_dict, and whether a plain network that loads the
# weights has the pruned network's outputs):
#   pruned             0.00  6 entries  other outputs
#   stripped: native   0.00  6 entries  other outputs
#   stripped: in_place 0.90  4 entries  same outputs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 nncf==3.4.0 torchao==0.18.0
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
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(64, 100), torch.nn.Linear(100, 10)

    def forward(self, x):
        return self.last(self.first(x).relu())


x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
pruned = nncf.prune(Network(), mode=mode, ratio=0.9, examples_inputs=x).eval()
outputs, found = pruned(x), {}
stripped = {
    f"stripped: {way.value}": nncf.strip(pruned, strip_format=way, example_input=x)
    for way in (nncf.StripFormat.NATIVE, nncf.StripFormat.IN_PLACE)
}
for name, network in {"pruned": pruned, **stripped}.items():
    plain = Network()
    plain.load_state_dict(network.state_dict(), strict=False)
    zeros = round((network.first.weight == 0).float().mean().item(), 2)
    found[name] = zeros, len(network.state_dict()), torch.allclose(plain(x), outputs)
    print(f"{name:18s} {zeros:.2f}  {found[name][1]} entries  {'same' if found[name][2] else 'other'} outputs")
expected = [(0.0, 6, False), (0.0, 6, False), (0.9, 4, True)]
sys.exit("the behaviour has changed" if [*found.values()] != expected else None)
PYTHON
