#!/usr/bin/env bash
# Finding: on a CPU, the 8-bit optimizers of bitsandbytes move weights that are 0 and never had a gradient but 0.
#
# Package:   bitsandbytes 0.50.2, torch 2.14.1, CPU.
# Guessed:   the 8-bit code has an exact 0 (number 127 of its 256 values), so moments that are 0 stay 0, and a pruned
#            weight under a mask stays pruned.
# Found:     the quantizer of the CPU gives a 0 in a block with other values code 131, a small positive number
#            (2e-5 of the block's largest value), not 127. So a moment that should be 0 is not, and moves the weight.
#            After 5 steps every masked zero is another number: with Lion, which takes the sign, by 4 whole steps of
#            the learning rate, with Adam and SGD by little, but none is 0 any more and the density is 100 %.
#            With float32 moments not one has moved.
# Output seen:
#   zero in a block    code 131    value 2.125e-05 of the largest
#   Adam               moved 0 of 29528 zeros, by 0 at most
#   Adam8bit           moved 29528 of 29528 zeros, by 0.00016 at most
#   AdamW8bit          moved 29528 of 29528 zeros, by 0.00016 at most
#   Lion8bit           moved 29528 of 29528 zeros, by 0.04 at most
#   SGD8bit            moved 29528 of 29528 zeros, by 2.8e-06 at most
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check bitsandbytes==0.50.2 torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch import nn

print(*(f"{name} {version(name)}" for name in ("bitsandbytes", "torch")), "python", sys.version.split()[0])
block = torch.zeros(256)
block[0] = 1.0
codes, state = quantize_blockwise(block)
code, value = codes[1].item(), dequantize_blockwise(codes, state)[1].item()
print(f"zero in a block    code {code}    value {value:.3e} of the largest")
found = [create_dynamic_map()[127].item(), code]

generator = torch.Generator().manual_seed(0)
mask = torch.rand(128, 256, generator=generator) < 0.1
start = torch.randn(128, 256, generator=generator) * mask


def moved(name, **options):
    """Return how many zeros of a masked weight are no longer 0 after 5 steps, and the largest of them."""
    weight = nn.Parameter(start.clone())
    optimizer = getattr(bnb.optim, name)([weight], lr=0.01, **options)
    for step in range(5):
        weight.grad = torch.randn(128, 256, generator=torch.Generator().manual_seed(step)) * mask
        optimizer.step()
    zeros = weight.detach()[~mask]
    count, largest = zeros.count_nonzero().item(), zeros.abs().max().item()
    print(f"{name:18s} moved {count} of {zeros.numel()} zeros, by {largest:.2g} at most")
    return count


found.append(moved("Adam"))
found += [moved(name) for name in ("Adam8bit", "AdamW8bit", "Lion8bit")] + [moved("SGD8bit", momentum=0.9)]
everything = (~mask).sum().item()
sys.exit("the behaviour has changed" if found != [0.0, 131, 0, *[everything] * 4] else None)
PYTHON
