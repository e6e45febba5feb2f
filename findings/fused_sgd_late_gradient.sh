#!/usr/bin/env bash
# Finding: torch's fused SGD with momentum raises when a parameter gets its first gradient after the others.
#
# Package:   torch 2.14.1 (torch.optim.SGD), CPU.
# Guessed:   the plain, the foreach and the fused implementation are one optimizer; fused=True is quicker, no more.
# Found:     plain and foreach begin the momentum of a parameter at its first gradient. Fused begins all of them at the
#            first step: where a parameter has none then (a branch that is used later, a layer that is thawed, a head of
#            another task), the next step with its gradient raises a TypeError that names neither parameter nor remedy.
#            Adam, AdamW and Adagrad, fused, take such a parameter as their other implementations do.
# Output seen:
#   SGD      plain     0.439 0.71
#   SGD      foreach   0.439 0.71
#   SGD      fused     TypeError at step 1
#   Adam     fused     0.7 0.8
#   AdamW    fused     0.6973 0.7981
#   Adagrad  fused     0.7716 0.8293
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn

print("torch", torch.__version__, "python", sys.version.split()[0])


def trained(name, options):
    """Return two parameters after three steps, the second of which has a gradient from the second step on."""
    early, late = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = getattr(torch.optim, name)([early, late], lr=0.1, **options)
    for step in range(3):
        optimizer.zero_grad()
        (early if step == 0 else early + late).sum().backward()
        try:
            optimizer.step()
        except TypeError as error:
            return f"{type(error).__name__} at step {step}"
    return f"{early.item():.4g} {late.item():.4g}"


cases = [("SGD", {}), ("SGD", {"foreach": True}), ("SGD", {"fused": True})]
cases += [(name, {"fused": True}) for name in ("Adam", "AdamW", "Adagrad")]
found = []
for name, kind in cases:
    found.append(trained(name, kind | ({"momentum": 0.9} if name == "SGD" else {})))
    print(f"{name:8s} {next(iter(kind), 'plain'):9s} {found[-1]}")
expected = ["0.439 0.71", "0.439 0.71", "TypeError at step 1", "0.7 0.8", "0.6973 0.7981", "0.7716 0.8293"]
sys.exit("the behaviour has changed" if found != expected else None)
PYTHON
