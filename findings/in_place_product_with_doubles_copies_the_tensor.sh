#!/usr/bin/env bash
# Finding: float32 values that are multiplied in place by a column of doubles take four times their memory meanwhile.
#
# Packages:  torch 2.14.1, CPU.
# Guessed:   x.mul_(factors) writes into x and needs no memory beside it, whatever dtype the factors have.
# Found:     a factor with a dimension takes part in type promotion. The product is computed in float64: x is copied into
#            doubles, the result is another such copy, and it is rounded back into x. out=x does the same. A single number
#            without a dimension does not, and factors of x's own dtype need no memory. Row by row the copies are as
#            small as one likes and the result is the same to the last bit. Scaling the rows of a layer by factors that
#            were computed in float64 so sets the peak of a process's memory.
# Output seen (most memory beside x, over that of x):
#   column of doubles: 4.00
#   column of doubles, out=x: 4.00
#   one double: 0.00
#   column of floats: 0.00
#   column of doubles, 64 rows at a time: 0.25, the same values: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torch.profiler import ProfilerActivity, profile

print("torch", version("torch"), "python", sys.version.split()[0])
torch.set_num_threads(1)
torch.manual_seed(0)
x, factors = torch.randn(1024, 1024), torch.rand(1024, 1, dtype=torch.float64)


def beside(name, run):
    """Print the most memory that is held at a time while something runs, over that of x."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    print(f"{name}: {most / x.nbytes:.2f}", end="")
    return round(most / x.nbytes, 2)


def by_rows(y):
    for rows, some in zip(y.split(64), factors.split(64)):
        rows.mul_(some)


found = []
for name, run in (
    ("column of doubles", lambda: x.mul_(factors)),
    ("column of doubles, out=x", lambda: torch.mul(x, factors, out=x)),
    ("one double", lambda: x.mul_(torch.tensor(0.5, dtype=torch.float64))),
    ("column of floats", lambda: x.mul_(factors.float())),
):
    found.append(beside(name, run))
    print()
whole, parts = x.clone(), x.clone()
whole.mul_(factors)
found.append(beside("column of doubles, 64 rows at a time", lambda: by_rows(parts)))
same = torch.equal(whole, parts)
print(f", the same values: {same}")
sys.exit(None if found == [4.0, 4.0, 0.0, 0.0, 0.25] and same else "the behaviour has changed")
PYTHON
