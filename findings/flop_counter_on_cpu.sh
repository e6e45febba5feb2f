#!/usr/bin/env bash
# Finding: torch's FlopCounterMode leaves out most of a Transformer, an LSTM or a bilinear layer on a CPU.
#
# Package:   torch 2.14.1 (torch.utils.flop_counter), CPU.
# Guessed:   the counter says what a module multiplies, whichever kernel torch picks for it.
# Found:     it counts the operators that it has a formula for. On a CPU these get none, and count as 0 without a word:
#            - scaled_dot_product_attention, unless the MATH kernel is asked for
#            - the whole of nn.TransformerEncoderLayer in eval mode without gradients (its fast path), linear layers too
#            - nn.LSTM, nn.Bilinear
#            So one and the same encoder layer counts 0, 1310720 or 1361920 operations, by mode and kernel alone.
# Output seen:
#   attention        0 51200              as it is; with the MATH kernel
#   encoder layer    0 1310720 1361920    fast path; plain path; plain path with the MATH kernel
#   LSTM             0 122880             counted; by hand
#   bilinear         0 40960              counted; by hand
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("ignore")
print("torch", torch.__version__, "python", sys.version.split()[0])


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def plainly(run):
    with sdpa_kernel(SDPBackend.MATH):
        return counted(run)


torch.manual_seed(0)
q = torch.randn(2, 4, 10, 16)
attend = lambda: scaled_dot_product_attention(q, q, q)
layer, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), torch.randn(2, 10, 64)
fast = torch.no_grad()(lambda: layer(x))
found = {
    "attention": (counted(attend), plainly(attend)),
    "encoder layer": (counted(fast), counted(lambda: layer(x)), plainly(lambda: layer(x))),
    "LSTM": (counted(lambda: nn.LSTM(16, 32)(torch.randn(5, 2, 16))), 2 * 5 * 2 * 4 * 32 * (16 + 32)),
    "bilinear": (counted(lambda: nn.Bilinear(16, 32, 8)(torch.randn(5, 16), torch.randn(5, 32))), 2 * 5 * 8 * 16 * 32),
}
for name, numbers in found.items():
    print(f"{name:16s}", *numbers)
expected = {
    "attention": (0, 2 * 2 * 2 * 4 * 10 * 10 * 16),
    "encoder layer": (0, 2 * 20 * (64 * 192 + 64 * 64 + 2 * 64 * 128), 0),
    "LSTM": (0, 122880),
    "bilinear": (0, 40960),
}
expected["encoder layer"] = (*expected["encoder layer"][:2], sum(expected["encoder layer"]) + expected["attention"][1])
sys.exit("the behaviour has changed" if found != expected else None)
PYTHON
