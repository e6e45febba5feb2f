#!/usr/bin/env bash
# Finding: timm's cautious optimizers make the step of a sparse weight as many times bigger as it has zeros.
#
# Packages:  timm 1.0.31 (timm.optim), torch 2.14.1, CPU.
# Guessed:   an optimizer that works weight by weight takes the same step for a weight, whatever stands beside it; a
#            gradient that is exactly 0 takes no part.
# Found:     a cautious optimizer keeps the updates whose sign agrees with the gradient's and divides them by the share
#            that it kept of the whole tensor. A gradient of 0 agrees with nothing. So where a mask holds 90 % of a
#            matrix at 0, the others take steps 10 times as big, and 100 times at 99 %: up to 1000 times, where the
#            share is bounded. Rows of an embedding that a batch does not use count in the same way. The plain ones of
#            the same optimizers take the same step at any density. A remedy is lr times the density.
#            (The authors' repository has a question about embeddings, C-Optim issue 15, without these factors.)
# Output seen (mean step of the same 100 weights after 10 updates, in thousandths, with 100, 10 and 1 % nonzeros):
#   adamw     4.960   4.960    4.960
#   cadamw    5.383  54.295  543.492
#   nadamw    6.118   6.118    6.118
#   cnadamw   6.615  66.576  671.119
#   lion      5.500   5.500    5.500
#   clion     5.186  52.123  523.915
#   laprop    4.882   4.882    4.882
#   claprop   5.350  53.883  540.626
#   mars      4.427   4.424    4.419
#   cmars     4.816  48.504  488.143
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import torch
from timm.optim import create_optimizer_v2
from torch import nn

print(*(f"{name} {version(name)}" for name in ("timm", "torch")), "python", sys.version.split()[0])
SIZE, WATCHED = 10_000, 100


def mean_step(name, density):
    """Return how far the first weights of a matrix went in 10 updates, when so many of its weights have a gradient."""
    weight = nn.Parameter(torch.zeros(100, 100))
    optimizer = create_optimizer_v2([weight], opt=name, lr=1e-3, weight_decay=0.0)
    trained = (torch.arange(SIZE) < SIZE * density).view(100, 100)
    for step in range(10):
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(step)).view(100, 100)
        weight.grad = (noise + 0.5) * trained
        optimizer.step()
    return weight.detach().flatten()[:WATCHED].abs().mean().item()


changed = []
for name in ("adamw", "nadamw", "lion", "laprop", "mars"):
    for each, factors in ((name, (1, 1)), ("c" + name, (10, 100))):
        steps = [mean_step(each, density) for density in (1.0, 0.1, 0.01)]
        print(f"{each:8s}", *(f"{1000 * step:8.3f}" for step in steps))
        expected = [steps[0] * factor for factor in (1, *factors)]
        changed += [each for step, value in zip(steps, expected) if abs(step - value) > 0.05 * value]
sys.exit(f"the behaviour has changed: {changed}" if changed else None)
PYTHON
