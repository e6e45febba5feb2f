#!/usr/bin/env bash
# Finding: of torch's fused optimizers, Adam and AdamW step parameters that FSDP2 shards; SGD and Adagrad raise.
#
# Package:   torch 2.14.1 (fully_shard, torch.optim), CPU, gloo, 1 process.
# Guessed:   `fused=True` works for sharded parameters with all optimizers that have it, since it works with AdamW, or it
#            is refused where the optimizer is made, as it is for parameters of unfit types. Each process steps its own
#            shard, so no optimizer has to know of the others.
# Found:     Adam and AdamW step. SGD (with and without momentum) and Adagrad are made without a word, and raise
#            NotImplementedError at the first step, after the first backward pass: the operators _fused_sgd_ and
#            _fused_adagrad_ have no rule for DTensors. foreach=True works with all of them.
# Output seen:
#   Adam      fused steps                 foreach steps
#   AdamW     fused steps                 foreach steps
#   SGD       fused NotImplementedError   foreach steps
#   Adagrad   fused NotImplementedError   foreach steps
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
cat > "$folder/check.py" <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh


def outcome(optimizer, mesh, **form):
    """Return what the first step of a sharded layer does, and check that it moves the weight."""
    layer = nn.Linear(4, 3)
    fully_shard(layer, mesh=mesh)
    before = layer.weight.full_tensor().clone()
    steps = optimizer(layer.parameters(), lr=0.1, **form)
    layer(torch.ones(2, 4)).sum().backward()
    try:
        steps.step()
    except NotImplementedError:
        return "NotImplementedError"
    assert not torch.equal(layer.weight.full_tensor(), before)
    return "steps"


print("torch", torch.__version__)
with tempfile.NamedTemporaryFile() as store:
    dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    found = {}
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        fused, foreach = outcome(optimizer, mesh, fused=True), outcome(optimizer, mesh, foreach=True)
        print(f"{optimizer.__name__:9s} fused {fused:21s} foreach {foreach}")
        found[optimizer.__name__] = fused, foreach
    dist.destroy_process_group()
raises = ("NotImplementedError", "steps")
assert found == {"Adam": ("steps", "steps"), "AdamW": ("steps", "steps"), "SGD": raises, "Adagrad": raises}, found
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
